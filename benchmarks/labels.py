"""Names that the JSON carries: written by bench_cpu.py, looked up by plot.py."""

GUMBEL_EXT = "gumbel_ext"
EAGER = "F.gumbel_softmax"
COMPILED = "torch.compile(F.gumbel_softmax)"
ARGMAX = "argmax(logits + gumbel)"
SOFTMAX = "F.softmax"
COPY = "Tensor.copy_"
SAME_TWICE = "F.softmax again"

DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ((65536, 8), (65536, 64), (4096, 1024), (512, 8192), (32, 131072))
INNER_DIM = (4, 8192, 32, 32)  # reduced over dim=1
TINY = (20, 10)

SOFT_FORWARD, HARD_FORWARD, INDEX = "soft forward", "hard forward", "index"
SOFT_TRAIN, HARD_TRAIN = "soft forward+backward", "hard forward+backward"
SOFT_BACKWARD, HARD_BACKWARD = "soft backward", "hard backward"
CONTROL = "control"
