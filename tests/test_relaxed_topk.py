"""Relaxed k-hot samples: the definition where that is stable, and its limits where it is not."""

import pytest
import torch
from oracle import DTYPES, eps, rng_state

import gumbel_ext
from gumbel_ext import _reference, gumbel_topk, relaxed_topk


def k_hot(index, logits, dim):
    """Ones at the classes of ``index``; -1 is none."""
    classes = logits.shape[dim]
    each = torch.nn.functional.one_hot(index.movedim(dim, -1) + 1, classes + 1)[..., 1:]
    return each.sum(-2).movedim(-1, dim).to(logits.dtype)


@pytest.mark.parametrize("tau", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("k", [2, 3, 6])
def test_the_definition(device, k, tau):
    logits = torch.randn(30, 9, device=device)
    state = rng_state(device=device)
    expected = _reference.relaxed_topk(logits.cpu().double(), k, tau, rng_state=state.cpu())
    for dtype in (torch.float32, torch.float64):
        y = relaxed_topk(logits.to(dtype), k, tau, rng_state=state)
        assert y.dtype == dtype
        # The definition takes log(1 - a), for a near 1 with the absolute error of a.
        torch.testing.assert_close(
            y.cpu().double(), expected, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-9
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_sum_to_k(device, dtype):
    logits = (3 * torch.randn(5, 12, 7)).to(device, dtype)
    for tau in (1e-3, 0.1, 1.0, 50.0):
        for k in (1, 2, 5, 12):
            y = relaxed_topk(logits, k, tau, dim=1).double()
            assert (y >= 0).all()
            assert ((y.sum(1) - k).abs() <= 30 * k * eps(dtype)).all()


def test_an_entry_can_exceed_one():
    """Of two classes both are chosen, and the first step gave one of them more than half."""
    y = relaxed_topk(torch.zeros(100, 2), 2, 1.0)
    assert (y > 1.2).any()
    torch.testing.assert_close(y.sum(1), torch.full((100,), 2.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((40, 20), -1), ((4, 20, 6), 1)])
def test_hard_is_the_k_hot_of_gumbel_topk(device, shape, dim, dtype):
    logits = torch.randn(shape).to(device, dtype)
    mask = torch.rand(shape, device=device) < 0.3
    state = rng_state(device=device)
    for k in (1, 3, 20):
        for m in (None, mask):
            index = gumbel_topk(logits, k, dim, mask=m, rng_state=state)
            y = relaxed_topk(logits, k, 0.7, True, dim, mask=m, rng_state=state)
            assert y.dtype == dtype
            assert torch.equal(y, k_hot(index, logits, dim))


@pytest.mark.parametrize("tau", [1e-2, 1e-6, 1e-30, 1e-44])
def test_the_limit_of_a_low_tau(device, tau):
    """Entries round to 1 and 0; neither values nor gradients are ever NaN."""
    logits = 3 * torch.randn(50, 15, device=device)
    logits[3, 2:] = -torch.inf
    logits.requires_grad_()
    state = rng_state(device=device)
    index = gumbel_topk(logits, 6, rng_state=state)
    y = relaxed_topk(logits, 6, tau, rng_state=state)
    assert y.isfinite().all()
    weight = torch.randn(50, 15, device=device)
    (gradient,) = torch.autograd.grad((y * weight).sum(), logits)
    assert not gradient.isnan().any()
    if tau < 1e-5:
        torch.testing.assert_close(y, k_hot(index, logits, 1), rtol=0, atol=1e-3)


def test_gradients():
    """Of the soft sample by differences, of the hard one equal to the soft one's."""
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    tau = torch.rand(2, 1, dtype=torch.float64) + 0.5
    tau.requires_grad_()
    state = rng_state()
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2:] = False

    def sample(x, t, hard=False):
        return relaxed_topk(x, 3, t, hard, mask=mask, rng_state=state)

    assert torch.autograd.gradcheck(sample, (logits, tau))
    assert torch.autograd.gradgradcheck(sample, (logits, tau))
    weight = torch.randn(2, 4, dtype=torch.float64)
    soft, hard = (
        torch.autograd.grad((sample(logits, tau, hard) * weight).sum(), (logits, tau))
        for hard in (False, True)
    )
    for a, b in zip(soft, hard, strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0
    assert (soft[0][1, 2:] == 0).all()


def test_the_gradient_where_an_entry_rounds_to_one():
    """A gap of 60 at tau = 1: 1 - a is e^-60, and log(1 - a) is -60 with a derivative."""
    logits = torch.tensor([[60.0, 0.0, -1.0, -2.0]], requires_grad=True)
    wide = logits.detach().double().requires_grad_()
    weight = torch.tensor([[0.3, -1.0, 2.0, 0.7]])
    state = rng_state()
    for x in (logits, wide):
        y = relaxed_topk(x, 2, 1.0, rng_state=state)
        (y * weight.to(x.dtype)).sum().backward()
    assert logits.grad.abs().max() > 1e-3
    torch.testing.assert_close(logits.grad, wide.grad.float(), rtol=1e-3, atol=1e-6)


def test_one_class_is_gumbel_softmax(device):
    logits = torch.randn(20, 8, device=device)
    state = rng_state(device=device)
    for hard in (False, True):
        expected = gumbel_ext.gumbel_softmax(logits, 0.5, hard, rng_state=state)
        assert torch.equal(relaxed_topk(logits, 1, 0.5, hard, rng_state=state), expected)
    # The steps for more classes, of which the first is one.
    noise = gumbel_ext.gumbel_noise(logits.shape, device=device, rng_state=state)
    from gumbel_ext.topk import _relaxed

    allowed = torch.ones_like(logits, dtype=torch.bool)
    y = _relaxed(logits + noise, allowed, 1, torch.tensor(0.5, device=device), 1)
    torch.testing.assert_close(y, gumbel_ext.gumbel_softmax(logits, 0.5, rng_state=state))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("k", [1, 4])
def test_rows_with_fewer_classes(device, k, hard):
    logits = torch.randn(5, 6, device=device)
    logits[0, 2:] = -torch.inf
    logits[1] = -torch.inf
    mask = torch.ones(5, 6, dtype=torch.bool, device=device)
    mask[2, 1:] = False
    mask[3] = False
    logits.requires_grad_()
    y = relaxed_topk(logits, k, 0.5, hard, mask=mask)
    expected = torch.tensor([2.0, 0, 1, 0, 4]).clamp(max=k)
    torch.testing.assert_close(y.sum(1).cpu(), expected)
    assert (y[0, 2:] == 0).all()
    assert (y[2, 1:] == 0).all()
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()
    assert (gradient[3] == 0).all()


def test_one_state_a_call(device):
    logits = torch.randn(20, 30, device=device)
    generator = torch.Generator(device).manual_seed(5)
    state = gumbel_ext.draw_rng_state(generator)
    after = generator.get_state()
    for k in (1, 3):
        generator.manual_seed(5)
        y = relaxed_topk(logits, k, generator=generator)
        assert torch.equal(y, relaxed_topk(logits, k, rng_state=state))
        assert torch.equal(generator.get_state(), after)


def test_compiles(device):
    logits = torch.randn(6, 20, device=device, requires_grad=True)
    state = rng_state(device=device)

    def sample(x, t):
        return relaxed_topk(x, 2, t, rng_state=state)

    tau = torch.tensor(0.7, device=device)
    y = torch.compile(sample, fullgraph=True, backend="aot_eager")(logits, tau)
    torch.testing.assert_close(y, sample(logits, tau))
    weight = torch.randn_like(y)
    compiled, eager = (
        torch.autograd.grad((v * weight).sum(), logits)[0] for v in (y, sample(logits, tau))
    )
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("hard", [False, True])
def test_vmap(device, hard):
    logits = torch.randn(4, 3, 9, device=device)
    tau = torch.rand(4, device=device) + 0.5
    state = rng_state(device=device)

    def sample(x, t):
        return relaxed_topk(x, 3, t, hard, rng_state=state)

    y = torch.vmap(sample)(logits, tau)
    for i in range(4):
        torch.testing.assert_close(y[i], sample(logits[i], tau[i]))
    same = torch.zeros(5, 40, device=device)
    y = torch.vmap(lambda x: relaxed_topk(x, 3, 0.5, hard), randomness="different")(same)
    assert (y != y[0]).any()
    y = torch.vmap(lambda x: relaxed_topk(x, 3, 0.5, hard), randomness="same")(same)
    assert (y == y[0]).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 6}, ValueError, "k must be between 0 and the number of classes, 5, got 6"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2, "tau": 0}, ValueError, "tau must be positive and finite, got 0"),
        ({"k": 2, "tau": torch.inf}, ValueError, "tau must be positive and finite, got inf"),
        ({"k": 2, "tau": "1"}, TypeError, "tau must be a number or a tensor"),
        ({"k": 2, "tau": torch.ones(3, 1)}, ValueError, "tau must broadcast"),
        ({"k": 2, "mask": torch.ones(4, 5)}, TypeError, "mask must have dtype bool"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"relaxed_topk: {message}"):
        relaxed_topk(torch.zeros(4, 5), **arguments)
