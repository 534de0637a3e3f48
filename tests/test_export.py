"""torch.export: every op, dynamic batches, saved and loaded; the seed and the noise of eager."""

import pytest
import torch
from oracle import TORCH, rng_state
from torch.export import Dim, export

import gumbel_ext

OPS = torch.ops.gumbel_ext
# Every op that the functions call, and the name of its column.
SOFTMAX, ARGMAX, NOISE = (
    OPS.gumbel_softmax.default,
    OPS.gumbel_argmax.default,
    OPS.gumbel_noise.default,
)


class Sampler(torch.nn.Module):
    """All functions and all arguments that an exported program can have."""

    def __init__(self, hard, stateless=False):
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)
        self.hard = hard
        self.stateless = stateless

    def forward(self, x, tau, mask, state):
        logits = self.linear(x)
        randomness = {"rng_state": state} if self.stateless else {}
        return (
            *gumbel_ext.gumbel_softmax(
                logits, tau, self.hard, dim=1, mask=mask, return_index=True, **randomness
            ),
            gumbel_ext.gumbel_softmax(logits, 0.7, self.hard, **randomness),
            gumbel_ext.gumbel_argmax(logits, 1, keepdim=True, mask=mask, **randomness),
            gumbel_ext.gumbel_noise(logits.shape, device=x.device, **randomness),
        )


def inputs(device, rows=3):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 5, 6, generator=generator).to(device)
    tau = 0.5 + torch.rand(rows, 1, 6, generator=generator).to(device)
    mask = (torch.rand(rows, 5, 1, generator=generator) < 0.8).to(device)
    return x, tau, mask, rng_state(device=device)


def program_of(module, device, strict, dynamic=True):
    batch = {0: Dim("batch")}
    return export(
        module,
        inputs(device),
        dynamic_shapes=(batch, batch, batch, None) if dynamic else None,
        strict=strict,
    )


def seeded(function, *arguments, seed=5):
    torch.manual_seed(seed)
    return function(*arguments)


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def feature(name):
    return pytest.mark.feature(
        name, ops=("gumbel_softmax", "gumbel_argmax", "gumbel_noise"), modes=("exported",)
    )


strictness = pytest.mark.parametrize(
    "strict",
    [
        pytest.param(True, marks=feature("torch.export strict")),
        pytest.param(False, marks=feature("torch.export non-strict")),
    ],
    ids=["strict", "non-strict"],
)


@strictness
@pytest.mark.parametrize("stateless", [False, True], ids=["generator", "rng_state"])
def test_program_equals_eager(device, hard, strict, stateless):
    """In every batch size, and after the decompositions that compilers ask for."""
    module = Sampler(hard, stateless).to(device)
    program = program_of(module, device, strict)
    targets = [node.target for node in program.graph.nodes]
    assert [targets.count(op) for op in (SOFTMAX, ARGMAX, NOISE)] == [2, 1, 1]
    for runnable in (program, program.run_decompositions()):
        for rows in (3, 7, 2):
            arguments = inputs(device, rows)
            actual = seeded(runnable.module(), *arguments)
            assert_equal(actual, seeded(module, *arguments))


@strictness
def test_calls_draw_different_noise(device, hard, strict):
    class Twice(torch.nn.Module):
        def forward(self, x):
            return tuple(gumbel_ext.gumbel_softmax(x, 1.0, hard) for _ in range(2))

    x = torch.zeros(50, 10, device=device)
    program = export(Twice(), (x,), strict=strict)
    first, second = program.module()(x), program.module()(x)
    draws = [*first, *second]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not torch.equal(a, b)


@feature("torch.export save and load")
def test_saved_and_loaded(device, hard, tmp_path):
    module = Sampler(hard).to(device)
    torch.export.save(program_of(module, device, strict=False), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    arguments = inputs(device, 4)
    assert_equal(seeded(program.module(), *arguments), seeded(module, *arguments))


@feature("torch.export: gradients of the program's module")
def test_gradients_through_a_program(device, hard):
    module = Sampler(hard).to(device)
    exported = program_of(module, device, strict=False).module()
    arguments = inputs(device, 4)
    weight = torch.randn(4, 5, 6, device=device)

    def gradients(of):
        y, _, other, *_ = seeded(of, *arguments)
        of.zero_grad()
        ((y + 2 * other) * weight).sum().backward()
        return [parameter.grad.clone() for parameter in of.parameters()]

    expected = gradients(module)
    assert_equal(gradients(exported), expected)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)


def test_a_number_becomes_part_of_the_program(device, hard):
    """As any number does under export; a temperature that changes must be a tensor."""

    class Module(torch.nn.Module):
        def forward(self, x, tau):
            return gumbel_ext.gumbel_softmax(x, tau, hard)

    x = torch.randn(4, 5, device=device)
    program = export(Module(), (x, 0.5))
    assert torch.equal(
        seeded(program.module(), x, 0.5), seeded(gumbel_ext.gumbel_softmax, x, 0.5, hard)
    )
    with pytest.raises((AssertionError, RuntimeError)):
        program.module()(x, 0.7)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_a_generator_cannot_be_exported(device, hard, strict):
    """The non-strict exporter would keep the example's generator for good and take no other."""

    class Module(torch.nn.Module):
        def forward(self, x, generator):
            return gumbel_ext.gumbel_softmax(x, hard=hard, generator=generator)

    generator = torch.Generator(device)
    words = "generator cannot be an input of an exported program"
    if TORCH < (2, 13):  # the exporter comes first, or hides the words
        words += r"|type `?<class 'torch._C.Generator'>|raised exception"
    with pytest.raises(Exception, match=words):
        export(Module(), (torch.randn(4, 5, device=device), generator), strict=strict)
