"""Several samples of every row: those of repeated logits, and nothing is repeated in memory."""

import math

import pytest
import torch
from oracle import DTYPES, rng_state
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import gumbel_ext
from gumbel_ext import gumbel_argmax


def repeated(logits, count):
    shape = logits.shape if logits.dim() else (1,)
    return logits.expand(count, *shape).clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"), [((7, 300), -1), ((7, 300), 0), ((3, 40, 5), 1), ((4, 3, 20), 2), ((9,), 0)]
)
def test_samples_are_those_of_repeated_logits(device, shape, dim, dtype):
    logits = torch.randn(shape, device=device, dtype=dtype)
    mask = torch.rand(shape, device=device) < 0.8
    state = rng_state(device=device)
    at = dim % len(shape)
    for count in (1, 2, 33):
        samples = gumbel_argmax(logits, dim, mask=mask, num_samples=count, rng_state=state)
        one_by_one = gumbel_argmax(repeated(logits, count), at + 1, mask=mask, rng_state=state)
        assert samples.dtype == torch.int64
        assert samples.is_contiguous()
        assert samples.shape == (*shape[:at], count, *shape[at + 1 :])
        assert torch.equal(samples, one_by_one.movedim(0, at))


def test_the_first_sample_is_the_single_one_and_prefixes_agree(device):
    logits = torch.randn(6, 50, device=device)
    state = rng_state(device=device)
    samples = gumbel_argmax(logits, num_samples=9, rng_state=state)
    assert torch.equal(samples[:, 0], gumbel_argmax(logits, rng_state=state))
    assert torch.equal(samples[:, :4], gumbel_argmax(logits, num_samples=4, rng_state=state))


def test_one_state_a_call(device):
    logits = torch.randn(6, 50, device=device)
    generator = torch.Generator(device).manual_seed(3)
    state = gumbel_ext.draw_rng_state(generator)
    after = generator.get_state()
    generator.manual_seed(3)
    samples = gumbel_argmax(logits, num_samples=100, generator=generator)
    assert torch.equal(samples, gumbel_argmax(logits, num_samples=100, rng_state=state))
    assert torch.equal(generator.get_state(), after)


def test_shapes_without_dimensions_or_elements(device):
    assert gumbel_argmax(torch.tensor(1.0, device=device), num_samples=4).tolist() == [0] * 4
    mask = torch.tensor(False, device=device)
    one = torch.tensor(1.0, device=device)
    assert gumbel_argmax(one, num_samples=2, mask=mask).tolist() == [-1, -1]
    assert gumbel_argmax(torch.zeros(0, 4, device=device), num_samples=3).shape == (0, 3)
    none = gumbel_argmax(torch.zeros(2, 0, device=device), num_samples=3)
    assert none.tolist() == [[-1] * 3] * 2


def test_frequencies(device):
    """Five standard deviations a class: alpha = 3e-6."""
    logits = torch.tensor([[1.0, 0.0, -2.0, 0.5, -torch.inf]], device=device)
    count = 400_000
    samples = gumbel_argmax(logits, num_samples=count, rng_state=torch.tensor([17, 0]))
    p = logits[0].double().softmax(0).cpu()
    seen = torch.bincount(samples[0].cpu(), minlength=5).double() / count
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()


# ---- memory


def allocated(call):
    """Bytes that a call asked of the allocator, those freed again included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    tree = seen.profiler.kineto_results.experimental_event_tree()
    sizes, left = [], list(tree)
    while left:
        event = left.pop()
        left += event.children
        if event.typed[0] == _EventType.Allocation:
            sizes.append(event.typed[1].alloc_size)
    return sum(size for size in sizes if size > 0)


@pytest.mark.cpu_only(reason="CUDA copies pieces of at most 4M elements")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 512), (2, 20_000), (8, 100, 40)], ids=str)
def test_nothing_of_the_size_of_the_repeated_logits_is_allocated(shape, dtype):
    logits = torch.randn(shape).to(dtype)
    count = 40
    index_bytes = 8 * count * logits[:, 0].numel()
    samples = allocated(lambda: gumbel_argmax(logits, dim=1, num_samples=count))
    # The index, and the copy that puts the samples in the place of dim.
    assert index_bytes <= samples <= 2 * index_bytes + 4096
    whole = allocated(lambda: gumbel_argmax(repeated(logits, count), 2))
    assert whole > count * logits.numel() * logits.element_size()


class Copies(TorchDispatchMode):
    """Names of the operators that ran and made a tensor as large as the repeated logits."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= (
                self.numel * tensor.element_size()
            ):
                self.names.append(str(function))
        return result


def test_no_operator_copies_expanded_logits(device):
    logits = torch.randn(30, 40, device=device)
    with Copies(50 * logits.numel()) as large:
        gumbel_argmax(logits, num_samples=50)
        gumbel_ext.gumbel_topk(logits.expand(50, 30, 40), 2)
    assert large.names == []
    leaf = logits.clone().requires_grad_()
    with Copies(50 * logits.numel()) as large:
        y = gumbel_ext.gumbel_softmax(leaf.expand(50, 30, 40), hard=True)
    assert large.names == ["gumbel_ext.gumbel_softmax.default"]  # y itself
    assert y.shape == (50, 30, 40)


def test_hard_samples_of_expanded_logits_keep_the_view(device):
    """What the backward keeps is expanded: the logits, of a leaf a copy of it. O(rows)."""
    logits = torch.randn(30, 40, device=device, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append((tensor.shape, tensor.stride(), tensor.untyped_storage().nbytes()))
        return tensor

    state = rng_state(device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = gumbel_ext.gumbel_softmax(logits.expand(50, 30, 40), 0.7, hard=True, rng_state=state)
    largest = max(kept, key=lambda saved: saved[0].numel())
    assert largest == ((50, 30, 40), (0, 40, 1), logits.nbytes)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()

    whole = repeated(logits.detach(), 50).requires_grad_()
    z = gumbel_ext.gumbel_softmax(whole, 0.7, hard=True, rng_state=state)
    assert torch.equal(y, z)
    (z * weight).sum().backward()
    assert torch.equal(logits.grad, whole.grad.sum(0))


def test_soft_samples_of_expanded_logits(device):
    logits = torch.randn(3, 20, 30, device=device)
    state = rng_state(device=device)
    mask = torch.rand(4, 3, 20, 1, device=device) < 0.8
    tau = torch.rand(4, 3, 1, 30, device=device) + 0.5
    for hard in (False, True):
        found = [
            gumbel_ext.gumbel_softmax(
                x, tau, hard, dim=2, mask=mask, return_index=True, rng_state=state
            )
            for x in (logits.expand(4, 3, 20, 30), repeated(logits, 4))
        ]
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.cuda_only
@pytest.mark.parametrize("shape", [(7, 3000), (1, 5_000_000), (3, 500, 20)], ids=str)
def test_pieces_have_the_bits_of_the_whole(shape):
    """More elements than are copied at once; and a sample of more, which is not copied at all."""
    count = 20_000_000 // math.prod(shape)
    logits = torch.randn(shape, device="cuda")
    whole = repeated(logits, count)
    state = rng_state(device="cuda")
    tau = torch.rand(count, shape[0], *[1] * (len(shape) - 1), device="cuda") + 0.5
    mask = torch.rand(whole.shape, device="cuda") < 0.9
    weight = torch.randn_like(whole)
    index_bytes = 8 * whole.numel() // shape[1]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    samples = gumbel_argmax(logits, 1, num_samples=count, rng_state=state)
    assert torch.cuda.max_memory_allocated() - before <= 4 * index_bytes + (1 << 25)
    assert torch.equal(samples.movedim(1, 0), gumbel_argmax(whole, 2, rng_state=state))
    for hard in (False, True):
        found = []
        for x in (logits.expand(count, *shape), whole):
            leaf = x.detach().requires_grad_()
            y = gumbel_ext.gumbel_softmax(leaf, tau, hard, dim=2, mask=mask, rng_state=state)
            found.append((y.detach(), *torch.autograd.grad((y * weight).sum(), leaf)))
        assert torch.equal(found[0][0], found[1][0])
        if hard:  # a soft backward reads y, not the expanded logits
            assert torch.equal(found[0][1], found[1][1])


@pytest.mark.cuda_only
def test_pieces_share_one_state_in_a_graph():
    logits = torch.randn(7, 3000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    gumbel_argmax(logits, num_samples=1000)
    with torch.cuda.graph(graph):
        samples = gumbel_argmax(logits, num_samples=1000)
    torch.cuda.manual_seed(5)
    graph.replay()
    first = samples.clone()
    graph.replay()
    assert not torch.equal(first, samples)
    torch.cuda.manual_seed(5)
    assert torch.equal(first, gumbel_argmax(logits, num_samples=1000))


# ---- modes and errors


def test_compiles_and_exports(device):
    logits = torch.randn(6, 20, device=device)
    state = rng_state(device=device)

    class Sample(torch.nn.Module):
        def forward(self, logits, state):
            return gumbel_argmax(logits, num_samples=5, rng_state=state)

    expected = gumbel_argmax(logits, num_samples=5, rng_state=state)
    compiled = torch.compile(Sample(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, state), expected)
    exported = torch.export.export(Sample(), (logits, state))
    assert torch.equal(exported.module()(logits, state), expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(device, randomness):
    logits = torch.randn(20, 30, device=device).expand(8, 20, 30)
    state = rng_state(device=device)
    samples = torch.vmap(
        lambda x: gumbel_argmax(x, num_samples=3, rng_state=state), randomness=randomness
    )(logits)
    expected = gumbel_argmax(logits[0], num_samples=3, rng_state=state)
    assert torch.equal(samples, expected.expand(8, 20, 3))
    samples = torch.vmap(lambda x: gumbel_argmax(x, num_samples=3), randomness=randomness)(logits)
    assert (samples == samples[0]).all() == (randomness == "same")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": -3}, ValueError, "num_samples must be at least 1, got -3"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be an int, got 2.0"),
        ({"num_samples": True}, TypeError, "num_samples must be an int, got True"),
        ({"num_samples": 2, "keepdim": True}, ValueError, "keepdim must be False with num_samples"),
        ({"num_samples": 2, "dim": 2}, IndexError, r"dim must be between -2 and 1 for logits of 2"),
        ({"num_samples": 2, "dim": -3}, IndexError, r"dim must be between -2 and 1 .*, got -3"),
        (
            {"num_samples": 2, "mask": torch.ones(2, 4, 5).bool()},
            ValueError,
            r"mask must broadcast to the shape of logits, \[4, 5\], got shape \[2, 4, 5\]",
        ),
        ({"num_samples": 2, "mask": torch.ones(4, 5)}, TypeError, "mask must have dtype bool"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"gumbel_argmax: {message}"):
        gumbel_argmax(torch.zeros(4, 5), **arguments)
