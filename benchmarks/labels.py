"""Names that the JSON carries: written by race.py, looked up by pages.py."""

GUMBEL_EXT = "gumbel_ext"
EAGER = "F.gumbel_softmax"
COMPILED = "torch.compile(F.gumbel_softmax)"
ARGMAX = "argmax(logits + gumbel)"
COMPILED_ARGMAX = "torch.compile(argmax(logits + gumbel))"
RELAXED = "RelaxedOneHotCategorical"
SOFTMAX = "F.softmax"
COPY = "Tensor.copy_"
SAME_TWICE = "F.softmax again"

DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ((65536, 8), (65536, 64), (4096, 1024), (512, 8192), (32, 131072))
INNER_DIM = (4, 8192, 32, 32)  # reduced over dim=1
TINY = (20, 10)

# On a GPU; a run with less memory has fewer rows of the largest.
CUDA_SHAPES = (
    (1048576, 8),
    (32768, 256),
    (16384, 1024),
    (8192, 4096),
    (8192, 16384),
    (8192, 65536),
    (8192, 262144),
)
# Classes of those at which torch.compile races too.
COMPILED_CLASSES = (1024, 16384)
CUDA_LAUNCHES = ((20, 10), (128, 8), (64, 64), (100, 30, 10))
# How a case of few elements is called: one by one, or twenty times in a CUDA graph.
EAGERLY, IN_A_GRAPH = "one by one", "in a graph"

SOFT_FORWARD, HARD_FORWARD, INDEX = "soft forward", "hard forward", "index"
SOFT_TRAIN, HARD_TRAIN = "soft forward+backward", "hard forward+backward"
SOFT_BACKWARD, HARD_BACKWARD = "soft backward", "hard backward"
CONTROL = "control"
# The group of cases that go through every kernel of docs/kernels-cuda-table.md.
REGIMES = "regimes"
