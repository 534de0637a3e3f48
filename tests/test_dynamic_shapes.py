"""One graph for every size, of every function; and for every number that a user may change."""

import graph_calls
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import gumbel_ext

SIZES = ((3, 4, 5), (6, 9, 7), (11, 5, 8))


@pytest.fixture(autouse=True)
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def logits(shape, device, learn=False):
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(device).requires_grad_(learn)


def seeded(function, *arguments):
    torch.manual_seed(7)
    return function(*arguments)


def gradient(y, x):
    weight = torch.arange(y.numel(), device=y.device, dtype=y.dtype).sin().view(y.shape)
    return torch.autograd.grad((y * weight).sum(), x)[0]


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("name", graph_calls.EVERY)
def test_one_graph_for_all_sizes(device, name, dim):
    def function(x):
        return graph_calls.EVERY[name](x, dim=dim)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    for shape in SIZES:
        x = logits(shape, device, learn=True)
        actual, expected = seeded(compiled, x), seeded(function, x)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient(actual, x), gradient(expected, x), rtol=1e-4, atol=1e-5)
        # Dynamo traces the first call twice where it makes a number symbolic in vain.
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs <= 2


STRICTLY = ("soft", "topk", "embedding_hard", "soft_argmax", "soft_argmax_2d")


@pytest.mark.parametrize(
    ("name", "strict"),
    [(name, False) for name in graph_calls.EVERY] + [(name, True) for name in STRICTLY],
)
def test_exported_with_dynamic_sizes(device, name, strict):
    class Module(torch.nn.Module):
        def forward(self, x):
            return graph_calls.EVERY[name](x, dim=1)

    sizes = {d: Dim(f"size_{d}", min=3) for d in range(3)}
    program = export(Module(), (logits((4, 6, 5), device),), dynamic_shapes=(sizes,), strict=strict)
    for runnable in (program, program.run_decompositions()):
        for shape in SIZES:
            x = logits(shape, device)
            torch.testing.assert_close(
                seeded(runnable.module(), x), seeded(Module(), x), rtol=1e-5, atol=1e-6
            )


def topk(x, k):
    return graph_calls.topk(x, 1, k)


def many(x, num_samples):
    return graph_calls.chosen(x, gumbel_ext.gumbel_argmax(x, 1, num_samples=num_samples), 1)


def gumbel_rao(x, k):
    return gumbel_ext.gumbel_rao(x, 0.7, k, 1)


def gapped(x, gap):
    return gumbel_ext.gapped_straight_through(x, 0.7, gap, 1)


NUMBERS = {
    "topk": (topk, range(2, 9)),
    "many": (many, range(2, 9)),
    "gumbel_rao": (gumbel_rao, range(2, 9)),
    "gapped": (gapped, [0.3 + 0.1 * i for i in range(7)]),
    "gapped_by_int": (gapped, range(2, 9)),
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_does_not_recompile(device, name, dynamic):
    """A limit of 8 recompilations would end compiling."""
    function, numbers = NUMBERS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    x = logits((4, 10, 5), device, learn=True)
    for number in numbers:
        actual, expected = seeded(compiled, x, number), seeded(function, x, number)
        assert torch.equal(actual, expected)
        torch.testing.assert_close(gradient(actual, x), gradient(expected, x))
    # Without dynamic=True the second call finds out that the number changes.
    assert counter.frame_count <= (1 if dynamic else 2)


@pytest.mark.parametrize("gap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_gap_that_is_no_gap(device, gap):
    """Under compilation the kernel checks it, which alone knows the value."""
    message = "gapped_straight_through: gap must be positive and finite, or None, got"
    for function in (gapped, torch.compile(gapped, backend="aot_eager", fullgraph=True)):
        with pytest.raises(Exception, match=message):
            function(logits((4, 10, 5), device), gap)
