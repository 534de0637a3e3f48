"""Temperatures by schedule, by learning, and decoupled between forward and backward."""

import copy
import json
import math
import pickle

import pytest
import torch
from oracle import (
    DTYPES,
    DispatchLog,
    assert_row_errors,
    assert_soft_close,
    assert_tau_gradient_close,
    condition,
    noise,
    rng_state,
    row_shape,
)

from gumbel_ext import _reference, decoupled_gumbel_softmax, gumbel_softmax
from gumbel_ext.temperature import (
    CosineTemperature,
    ExponentialTemperature,
    LearnableTemperature,
    LinearTemperature,
    PiecewiseTemperature,
    TemperatureSchedule,
)

SCHEDULES = {
    "exponential": lambda: ExponentialTemperature(1e-2, 0.5, start=2.0, every=10),
    "linear": lambda: LinearTemperature(2.0, 0.5, 100),
    "cosine": lambda: CosineTemperature(2.0, 0.5, 100, every=5),
    "piecewise": lambda: PiecewiseTemperature([20, 50], [1.0, 0.7, 0.4]),
}


def feature(name, mode="eager"):
    return pytest.mark.feature(name, ops=("decoupled_gumbel_softmax",), modes=(mode,))


def course(schedule, steps):
    taus = [schedule.tau]
    for _ in range(steps):
        schedule.step()
        taus.append(schedule.tau)
    return taus


def test_schedules_follow_their_formulas():
    taus = course(SCHEDULES["exponential"](), 300)
    for t, tau in enumerate(taus):
        assert tau == max(0.5, 2 * math.exp(-1e-2 * (t // 10 * 10)))
    assert taus[9] == 2.0 > taus[10]
    assert taus[-1] == 0.5

    taus = course(SCHEDULES["linear"](), 120)
    assert taus[50] == pytest.approx(1.25)
    assert taus[0] == 2.0
    assert taus[100:] == [0.5] * 21

    taus = course(SCHEDULES["cosine"](), 120)
    assert taus[25] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi / 4)))
    assert taus[25:30] == [taus[25]] * 5
    assert taus[100:] == [0.5] * 21

    taus = course(SCHEDULES["piecewise"](), 60)
    assert taus == [1.0] * 20 + [0.7] * 30 + [0.4] * 11


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_state_goes_through_a_checkpoint(make):
    schedule = make()
    course(schedule, 37)
    state = json.loads(json.dumps(schedule.state_dict()))
    resumed = make()
    tensor = resumed.tensor
    resumed.load_state_dict(state)
    assert resumed.tensor is tensor
    assert tensor.item() == resumed.tau == schedule.tau
    assert course(resumed, 80) == course(schedule, 80)
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other.state_dict() == schedule.state_dict()
        other.step()
        assert other.tensor.item() == other.tau
    assert schedule.steps == 117
    assert f"steps={schedule.steps}" in repr(schedule)
    assert type(schedule).__name__ in repr(schedule)


class Linear(LinearTemperature):
    """One of a user's, with the attributes of its base."""


@pytest.mark.parametrize("of", [*SCHEDULES, "own"])
@pytest.mark.parametrize("into", [*SCHEDULES, "own"])
def test_state_of_another_schedule_is_refused(of, into):
    kinds = {**SCHEDULES, "own": lambda: Linear(1.0, 0.1, 10)}
    given, taken = kinds[of](), kinds[into]()
    given.step()
    if of == into:
        taken.load_state_dict(given.state_dict())
        assert (taken.steps, taken.tau) == (1, given.tau)
        return
    before = repr(taken)
    names = f"^{type(taken).__name__}: state_dict .* {type(given).__name__}$"
    with pytest.raises(ValueError, match=names):
        taken.load_state_dict(given.state_dict())
    assert repr(taken) == before


def test_state_of_an_earlier_version():
    """It does not name the class; the entries say as much as they can."""
    state = SCHEDULES["linear"]().state_dict()
    assert state.pop("class") == "LinearTemperature"
    SCHEDULES["linear"]().load_state_dict({**state, "steps": 3})
    with pytest.raises(ValueError, match="PiecewiseTemperature: state_dict must have the keys"):
        SCHEDULES["piecewise"]().load_state_dict(state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": 0},
        {"total_steps": 0},
        {"steps": "a"},
        {"steps": -5},
        {"steps": 2.5},
        {"start": -1},
    ],
    ids=str,
)
def test_a_state_that_is_refused_changes_nothing(wrong):
    schedule = LinearTemperature(2.0, 0.5, 10)
    schedule.step()
    before = schedule.state_dict(), schedule.tau
    with pytest.raises((TypeError, ValueError), match=r"^LinearTemperature: [^\n]*$"):
        schedule.load_state_dict({**schedule.state_dict(), **wrong})
    assert (schedule.state_dict(), schedule.tau) == before


def test_a_schedule_of_ones_own():
    class Halving(TemperatureSchedule):
        def __init__(self, start):
            self.start = start
            super().__init__()

        def at(self, step):
            return self.start / 2**step

    assert course(Halving(1.0), 3) == [1.0, 0.5, 0.25, 0.125]


def test_annealing_compiles_once():
    compiles = 0

    def count(graph, _):
        nonlocal compiles
        compiles += 1
        return graph

    schedule = LinearTemperature(2.0, 0.5, 10)
    state, logits = rng_state(), torch.randn(4, 9)

    @torch.compile(fullgraph=True, backend=count)
    def sample(logits, tau):
        return gumbel_softmax(logits, tau, rng_state=state)

    for _ in range(6):
        expected = gumbel_softmax(logits, schedule.tau, rng_state=state)
        assert torch.equal(sample(logits, schedule.tensor), expected)
        schedule.step()
    assert compiles == 1


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ExponentialTemperature(0.0), ValueError, "rate must be positive and finite"),
        (lambda: ExponentialTemperature("1"), TypeError, "rate must be a number, got '1'"),
        (lambda: ExponentialTemperature(1e-3, 2.0), ValueError, "start must be at least minimum"),
        (lambda: ExponentialTemperature(1e-3, every=0), ValueError, "every must be at least 1"),
        (lambda: LinearTemperature(1.0, 0.0, 9), ValueError, "end must be positive and finite"),
        (lambda: CosineTemperature(1.0, 0.5, 2.5), TypeError, "total_steps must be an int"),
        (lambda: PiecewiseTemperature([5, 5], [1, 2, 3]), ValueError, "milestones must increase"),
        (lambda: PiecewiseTemperature([5], [1.0]), ValueError, "values must be one more"),
        (lambda: PiecewiseTemperature([5], [1.0, -1.0]), ValueError, "values must be positive"),
        (lambda: LearnableTemperature(0.1, 0.1), ValueError, "initial must be finite and greater"),
        (lambda: LearnableTemperature(math.nan), ValueError, "initial must be finite"),
        (lambda: LearnableTemperature("1"), TypeError, "initial must be a number or a tensor"),
        (lambda: LearnableTemperature(1.0, -1.0), ValueError, "minimum must be finite and not"),
    ],
)
def test_errors_name_the_argument(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ---- learnt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [1e-6, 0.3, 5.0, 1e4])
@pytest.mark.parametrize("minimum", [0.0, 0.5])
def test_learnable_temperature_begins_where_told(initial, minimum):
    tau = LearnableTemperature(initial + minimum, minimum)
    torch.testing.assert_close(tau(), torch.tensor(initial + minimum))


def test_learnable_temperature_stays_positive_with_a_finite_gradient(device):
    tau = LearnableTemperature(torch.ones(3, 1), minimum=0.0).to(device)
    with torch.no_grad():
        tau.raw.copy_(torch.tensor([[-1e30], [-200.0], [1e30]]))
    assert (tau() > 0).all()
    tau().sum().backward()
    assert tau.raw.grad.isfinite().all()
    assert (LearnableTemperature(0.7, 0.5).to(torch.bfloat16)() >= 0.5).all()


def test_learnable_temperatures_are_learnt_by_head(device):
    tau = LearnableTemperature(torch.full((4, 1, 1), 0.8), minimum=0.1).to(device)
    logits = torch.randn(4, 5, 6, device=device)
    y = gumbel_softmax(logits, tau=tau(), rng_state=rng_state(device=device))
    (y * torch.randn_like(y)).sum().backward()
    assert (tau.raw.grad.abs() > 1e-4).all()
    assert repr(tau) == "LearnableTemperature(shape=[4, 1, 1], minimum=0.1)"
    again = LearnableTemperature(torch.ones(4, 1, 1), minimum=0.1).to(device)
    again.load_state_dict(tau.state_dict())
    assert torch.equal(again(), tau())


# ---- decoupled ----------------------------------------------------------------------------------

SHAPES = (((7, 5), -1), ((3, 2500), -1), ((2, 9, 50), 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_value_of_one_temperature_and_gradient_of_the_other(shape, dim, dtype, state, device):
    g = noise(shape)
    logits = (3 * torch.randn(shape)).to(device=device, dtype=dtype).requires_grad_()
    grad = torch.randn(shape).to(device=device, dtype=dtype)
    rows = row_shape(shape, dim)
    tau_backward = (torch.rand(rows, device=device) + 0.5).to(
        torch.promote_types(dtype, torch.float32)
    )
    tau_backward.requires_grad_()
    mask = torch.rand(shape, device=device) < 0.8
    mask.select(0, 0).fill_(False)
    y, index = decoupled_gumbel_softmax(
        logits, 0.2, tau_backward, dim=dim, mask=mask, return_index=True, rng_state=state
    )
    # The value is, bit for bit, that of the sample at the forward temperature.
    plain, plain_index = gumbel_softmax(
        logits.detach(), 0.2, dim=dim, mask=mask, return_index=True, rng_state=state
    )
    assert torch.equal(y, plain)
    assert torch.equal(index, plain_index)

    exact = logits.detach().cpu().double().requires_grad_()
    exact_tau = tau_backward.detach().cpu().double().requires_grad_()
    expected, _ = _reference.decoupled_gumbel_softmax(
        exact, 0.2, exact_tau, dim=dim, mask=mask.cpu(), noise=g
    )
    assert_soft_close(y, expected.detach(), condition(logits, g, 0.2, dim))
    y.backward(grad)
    expected.backward(grad.cpu().double())
    assert_row_errors(logits.grad, exact.grad, logits, grad, tau_backward, g, dim, mask=mask.cpu())
    assert_tau_gradient_close(
        tau_backward.grad,
        exact_tau.grad,
        exact.grad,
        logits,
        grad,
        tau_backward,
        g,
        dim,
        mask.cpu(),
    )
    # The gradient of the forward temperature is another one.
    other = gumbel_softmax(logits, 0.2, dim=dim, mask=mask, rng_state=state)
    assert not torch.allclose(torch.autograd.grad(other, logits, grad)[0], logits.grad, rtol=0.05)


def test_one_hot_at_every_forward_temperature(state, device):
    logits = torch.randn(6, 9, device=device, requires_grad=True)
    grad = torch.randn(6, 9, device=device)
    for tau_forward in (0.1, 3.0):
        y = decoupled_gumbel_softmax(logits, tau_forward, 0.8, hard=True, rng_state=state)
        plain = gumbel_softmax(logits, 0.8, hard=True, rng_state=state)
        assert torch.equal(y, plain)
        gradients = [torch.autograd.grad(v, logits, grad)[0] for v in (y, plain)]
        assert torch.equal(*gradients)


def test_nothing_of_the_size_of_a_sample_is_kept(state, device):
    kept = []

    def pack(t):
        kept.append(t)
        return t

    logits = torch.randn(6, 900, device=device, requires_grad=True).clone()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), DispatchLog() as log:
        y = decoupled_gumbel_softmax(logits, 0.3, 1.0, rng_state=state)
        y.sum().backward()
    assert sum(t.numel() for t in kept if t.data_ptr() != logits.data_ptr()) < 20
    assert log.names == ["gumbel_softmax", "gumbel_softmax_hard_backward"]


def test_draws_one_state_of_its_generator(device):
    logits = torch.randn(6, 9, device=device, requires_grad=True)
    generators = [torch.Generator(device).manual_seed(5) for _ in range(2)]
    first = decoupled_gumbel_softmax(logits, 0.3, 1.0, generator=generators[0])
    assert torch.equal(first, gumbel_softmax(logits, 0.3, generator=generators[1]))
    again = [decoupled_gumbel_softmax(logits, 0.3, 1.0, generator=g) for g in generators]
    assert torch.equal(*again)
    assert not torch.equal(first, again[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@feature("torch.func grad")
@feature("vmap with rng_state")
def test_transforms_give_the_same(dtype, state, device):
    logits = torch.randn(3, 6, device=device).to(dtype)
    grad = torch.randn(3, 6, device=device).to(dtype)

    def loss(z):
        y = decoupled_gumbel_softmax(z, 0.3, 1.2, rng_state=state)
        return (y * grad).sum(), y

    gradient, y = torch.func.grad(loss, has_aux=True)(logits)
    plain = logits.clone().requires_grad_()
    value, plain_y = loss(plain)
    value.backward()
    torch.testing.assert_close(y, plain_y.detach())
    torch.testing.assert_close(gradient, plain.grad)
    mask = torch.tensor([[True] * 6, [False] * 6, [True, False] * 3], device=device)
    y = torch.func.vmap(
        lambda z, m: decoupled_gumbel_softmax(z, 0.3, 1.2, mask=m, rng_state=state)
    )(logits, mask)
    expected = torch.stack(
        [
            decoupled_gumbel_softmax(z, 0.3, 1.2, mask=m, rng_state=state)
            for z, m in zip(logits, mask, strict=True)
        ]
    )
    torch.testing.assert_close(y, expected)
    scalars = torch.func.vmap(lambda z: decoupled_gumbel_softmax(z, 0.3, 1.2, rng_state=state))
    assert scalars(logits[0]).tolist() == [1] * 6


@pytest.mark.parametrize(
    "randomness",
    [
        pytest.param("same", marks=feature("vmap randomness=same")),
        pytest.param("different", marks=feature("vmap randomness=different")),
    ],
)
def test_vmap_draws_the_noise_of_the_sampler(randomness, device):
    logits = torch.randn(4, 3, 6, device=device)

    def with_seed(function):
        torch.manual_seed(3)
        return torch.func.vmap(function, randomness=randomness)(logits)

    ours = with_seed(lambda z: decoupled_gumbel_softmax(z, 0.3, 1.2))
    torch.testing.assert_close(ours, with_seed(lambda z: gumbel_softmax(z, 0.3)))
    gradients = with_seed(
        torch.func.grad(lambda z: decoupled_gumbel_softmax(z, 0.3, 1.2)[:, 0].sum())
    )
    expected = with_seed(torch.func.grad(lambda z: gumbel_softmax(z, 1.2, hard=True)[:, 0].sum()))
    torch.testing.assert_close(gradients, expected)


@feature("autograd.functional hessian")
@feature("torch.func hessian")
@feature("torch.func jvp")
def test_derivatives_of_the_second_order(state, device):
    logits = torch.randn(2, 4, dtype=torch.float64, device=device)
    grad = torch.randn(2, 4, dtype=torch.float64, device=device)

    def loss(z):
        return (decoupled_gumbel_softmax(z, 0.3, 1.2, rng_state=state) * grad).sum()

    def at_backward(z):
        return (gumbel_softmax(z, 1.2, rng_state=state) * grad).sum()

    expected = torch.autograd.functional.hessian(at_backward, logits)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, logits), expected)
    torch.testing.assert_close(torch.func.hessian(loss)(logits), expected)
    _, tangent = torch.func.jvp(loss, (logits,), (grad,))
    torch.testing.assert_close(tangent, (torch.func.grad(at_backward)(logits) * grad).sum())


@feature("torch.compile(fullgraph=True), forward and backward", "compiled")
def test_compiled(state, device):
    compiled = torch.compile(decoupled_gumbel_softmax, fullgraph=True, backend="aot_eager")
    logits = torch.randn(6, 9, device=device, requires_grad=True)
    grad = torch.randn(6, 9, device=device)
    results = [f(logits, 0.3, 1.2, rng_state=state) for f in (compiled, decoupled_gumbel_softmax)]
    assert torch.equal(*results)
    assert torch.equal(*[torch.autograd.grad(y, logits, grad)[0] for y in results])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0.0, 1.0), ValueError, "tau_forward must be positive and finite, got 0"),
        ((1.0, math.inf), ValueError, "tau_backward must be positive and finite, got inf"),
        (("1", 1.0), TypeError, "tau_forward must be a number or a tensor, got '1'"),
        ((1.0, torch.ones(2)), ValueError, "tau_backward must broadcast to"),
        ((1.0, 1.0, False, 2), IndexError, "dim must be between -2 and 1"),
    ],
)
def test_decoupled_errors_name_the_argument(arguments, error, words):
    with pytest.raises(error, match=f"decoupled_gumbel_softmax: {words}"):
        decoupled_gumbel_softmax(torch.randn(2, 3), *arguments)
