"""Defined results at the edges: infinite and NaN logits, empty choices, the rarest random words."""

import pytest
import torch
from oracle import (
    DTYPES,
    SIXTEEN_BIT,
    assert_one_hot,
    assert_soft_close,
    condition,
    eps,
    noise,
    noise_for,
    reference,
    rng_state,
)

import gumbel_ext
from gumbel_ext import _C, _reference

INF, NAN = float("inf"), float("nan")

# (rows, classes, class dimension first): one case for each path through the kernels.
REGIMES = {
    "short": (7, 5, False),
    "vector": (7, 40, False),
    "long": (5, 2100, False),
    "split_rows": (2, 70_001, False),
    "inner": (35, 40, True),
    "long_inner": (9, 2100, True),
}
EDGE_ROW = 1


@pytest.fixture(params=REGIMES.values(), ids=REGIMES)
def regime(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


class Case:
    """Logits of a regime, addressed as a table of rows wherever the class dimension lies."""

    def __init__(self, regime, dtype, device):
        rows, classes, first = regime
        self.dim = 0 if first else -1
        shape = (classes, rows) if first else (rows, classes)
        self.logits = torch.randn(shape).to(device, dtype)
        self.state = rng_state(device=device)
        self.mask = None

    def table(self, tensor):
        return tensor.movedim(self.dim, -1)

    @property
    def rows(self):
        return self.table(self.logits)

    def add_mask(self):
        self.mask = torch.ones_like(self.logits, dtype=torch.bool)
        return self.table(self.mask)

    def run(self, hard, tau=0.5):
        """``(y, index, gradient)`` as tables, for an incoming gradient without zeros."""
        leaf = self.logits.detach().requires_grad_()
        y, index = gumbel_ext.gumbel_softmax(
            leaf,
            tau,
            hard,
            dim=self.dim,
            mask=self.mask,
            return_index=True,
            rng_state=self.state,
        )
        generator = torch.Generator().manual_seed(1)
        grad = torch.rand(y.shape, generator=generator).to(y) + 0.5
        (gradient,) = torch.autograd.grad(y, leaf, grad)
        alone = gumbel_ext.gumbel_argmax(
            self.logits, self.dim, mask=self.mask, rng_state=self.state
        )
        assert torch.equal(alone, index)
        assert (index >= -1).all()
        assert (index < self.rows.shape[-1]).all()
        return self.table(y.detach()), index, self.table(gradient)


@pytest.fixture
def case(regime, dtype, device):
    return Case(regime, dtype, device)


def other_rows(tensor):
    keep = [row for row in range(tensor.shape[0]) if row != EDGE_ROW]
    return tensor[keep]


def assert_other_rows_untouched(actual, clean):
    for a, b in zip(actual, clean, strict=True):
        assert torch.equal(other_rows(a), other_rows(b))


def assert_nan_row(case, hard, clean):
    y, index, _ = actual = case.run(hard)
    assert y[EDGE_ROW].isnan().all()
    assert_other_rows_untouched(actual, clean)
    return int(index[EDGE_ROW])


# ---- logits -------------------------------------------------------------------------------------


def test_minus_infinity_is_never_chosen(case, hard):
    """As every third class of a structured choice: probability, gradient exactly 0."""
    case.rows[:, 1::3] = -INF
    y, index, gradient = case.run(hard)
    assert (y[:, 1::3] == 0).all()
    assert (gradient[:, 1::3] == 0).all()
    assert (index % 3 != 1).all()
    assert gradient.isfinite().all()
    g = case.table(noise(case.logits.shape))
    expected, _ = reference(case.rows, 0.5, hard, noise=g)
    if hard:
        assert_one_hot(y, index)
    else:
        assert_soft_close(y, expected, condition(case.rows, g, 0.5))


def test_minus_infinity_in_all_but_one(case, hard):
    case.rows[EDGE_ROW] = -INF
    case.rows[EDGE_ROW, -1] = -5.0
    y, index, gradient = case.run(hard)
    assert index[EDGE_ROW] == case.rows.shape[-1] - 1
    assert y[EDGE_ROW, -1] == 1
    assert (y[EDGE_ROW, :-1] == 0).all()
    assert (gradient[EDGE_ROW] == 0).all()


def test_row_of_minus_infinity_is_nan(case, hard):
    clean = case.run(hard)
    case.rows[EDGE_ROW] = -INF
    index = assert_nan_row(case, hard, clean)
    assert index == 0


@pytest.mark.parametrize("places", [(0,), (-1,), (3, 1), (2, -1), (1, -2)], ids=str)
def test_nan_takes_its_row(case, hard, places):
    """The index is that of the first NaN, in a vector's tail and across split rows, too."""
    clean = case.run(hard)
    classes = case.rows.shape[-1]
    case.rows[EDGE_ROW, 0] = 1e4  # a certain winner otherwise
    for place in places:
        case.rows[EDGE_ROW, place] = NAN
    index = assert_nan_row(case, hard, clean)
    assert index == min(place % classes for place in places)


@pytest.mark.parametrize("value", [-INF, NAN], ids=str)
def test_temperature_of_a_nan_row_has_a_nan_gradient(case, hard, value):
    """As the row's logits have: what trains a temperature must see it."""
    tau = torch.full(case.rows.shape[:1], 0.5, dtype=torch.float64).to(case.logits.device)
    tau = tau.unsqueeze(case.dim).requires_grad_()

    def gradient():
        y = gumbel_ext.gumbel_softmax(
            case.logits, tau, hard, dim=case.dim, rng_state=case.state
        ).double()
        (of_tau,) = torch.autograd.grad(y, tau, y.detach().cos())
        return of_tau.squeeze(case.dim)

    clean = gradient()
    case.rows[EDGE_ROW] = value
    actual = gradient()
    assert actual[EDGE_ROW].isnan()
    assert torch.equal(other_rows(actual), other_rows(clean))


def test_nan_of_any_sign_and_payload(device, hard):
    bits = torch.tensor([-4194304, 2143289344, -1, 2147483647], dtype=torch.int32)
    for pattern in bits:
        logits = torch.zeros(3, 20, device=device)
        logits[1, 7] = pattern.view(torch.float32)
        y, index = gumbel_ext.gumbel_softmax(logits, 0.5, hard, return_index=True)
        assert y[1].isnan().all()
        assert index[1] == 7
        assert y[[0, 2]].isfinite().all()


def test_plus_infinity_is_nan_as_in_softmax(case):
    clean = case.run(False)
    case.rows[EDGE_ROW, 3] = INF
    index = assert_nan_row(case, False, clean)
    assert index == 3


def test_plus_infinity_hard_stays_in_range(case):
    """Soft's NaN has no meaning for a choice; whatever hard returns, other rows are right."""
    clean = case.run(True)
    case.rows[EDGE_ROW, 3] = INF
    actual = case.run(True)
    assert actual[1][EDGE_ROW] == 3
    assert_other_rows_untouched(actual[:2], clean[:2])


def test_plus_infinity_before_and_after_nan(case):
    for places in ((1, 3), (3, 1)):
        case.rows[EDGE_ROW, places[0]] = INF
        case.rows[EDGE_ROW, places[1]] = NAN
        y, index, _ = case.run(False)
        assert y[EDGE_ROW].isnan().all()
        assert index[EDGE_ROW] == places[1]
        case.rows[EDGE_ROW] = 0


@pytest.mark.parametrize("value", ["max", "min", "smallest"])
def test_extreme_finite_logits(case, hard, value):
    """The largest numbers of a dtype are ordinary logits, over the smallest temperature, too."""
    finfo = torch.finfo(case.logits.dtype)
    number = {"max": finfo.max, "min": finfo.min, "smallest": finfo.smallest_normal * finfo.eps}
    case.rows[EDGE_ROW, 2] = number[value]
    for tau in (1.0, 1e-3, 1e-40):
        y, index, gradient = case.run(hard, tau)
        assert y.isfinite().all()
        assert gradient.isfinite().all() or tau == 1e-40
        if value == "max":
            assert index[EDGE_ROW] == 2
            assert y[EDGE_ROW, 2] == 1
        if value == "min":
            assert y[EDGE_ROW, 2] == 0


def test_one_class(device, dtype, hard):
    for shape, dim in (((5, 1), -1), ((1, 5), 0), ((2, 1, 40), 1)):
        logits = torch.randn(shape).to(device, dtype).requires_grad_()
        y, index = gumbel_ext.gumbel_softmax(logits, 0.5, hard, dim=dim, return_index=True)
        assert (y == 1).all()
        assert (index == 0).all()
        (gradient,) = torch.autograd.grad(y, logits, torch.rand_like(y))
        assert (gradient == 0).all()


def test_scalar(device, dtype, hard):
    logits = torch.tensor(3.0, dtype=dtype, device=device, requires_grad=True)
    for dim in (-1, 0):
        y, index = gumbel_ext.gumbel_softmax(logits, 0.5, hard, dim=dim, return_index=True)
        assert y.shape == index.shape == ()
        assert y == 1
        assert index == 0
        assert torch.autograd.grad(y, logits)[0] == 0
        assert gumbel_ext.gumbel_argmax(logits, dim, keepdim=True) == 0


# ---- masks --------------------------------------------------------------------------------------


def test_fully_masked_row(case, hard):
    """Zeros, index -1 and a zero gradient, whatever logits lie under the mask."""
    allowed = case.add_mask()
    clean = case.run(hard)
    allowed[EDGE_ROW] = False
    for value in (0.0, -INF, INF, NAN):
        case.rows[EDGE_ROW] = value
        y, index, gradient = actual = case.run(hard)
        assert (y[EDGE_ROW] == 0).all()
        assert index[EDGE_ROW] == -1
        assert (gradient[EDGE_ROW] == 0).all()
        assert_other_rows_untouched(actual, clean)


def test_mask_of_nothing(case, hard):
    case.add_mask()[:] = False
    y, index, gradient = case.run(hard)
    assert (y == 0).all()
    assert (index == -1).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("value", [INF, NAN], ids=str)
def test_values_under_the_mask_do_not_matter(case, hard, value):
    allowed = case.add_mask()
    allowed[:, 1::2] = False
    clean = case.run(hard)
    case.rows[:, 1::2] = value
    for a, b in zip(case.run(hard), clean, strict=True):
        assert torch.equal(a, b)


def test_mask_equals_minus_infinity(case, hard):
    case.add_mask()[:, 2::3] = False
    masked = case.run(hard)
    case.mask = None
    case.rows[:, 2::3] = -INF
    for a, b in zip(masked, case.run(hard), strict=True):
        assert torch.equal(a, b)


def test_allowed_classes_at_minus_infinity(case, hard):
    """The mask allows a choice and the logits leave none: a NaN row, as without the mask."""
    clean_mask = case.add_mask()
    clean_mask[EDGE_ROW, 0] = False
    clean = case.run(hard)
    case.rows[EDGE_ROW] = -INF
    index = assert_nan_row(case, hard, clean)
    assert 0 <= index < case.rows.shape[-1]


def test_fully_masked_row_has_no_tau_gradient(device, hard):
    logits = torch.randn(3, 6, device=device)
    mask = torch.ones(3, 6, dtype=torch.bool, device=device)
    mask[1] = False
    tau = torch.full((3, 1), 0.5, device=device, requires_grad=True)
    y = gumbel_ext.gumbel_softmax(logits, tau, hard, mask=mask)
    (gradient,) = torch.autograd.grad(y, tau, torch.randn_like(y))
    assert gradient[1] == 0
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_second_derivative_of_masked_and_infinite_rows(device, hard):
    """No NaN leaks out of a row that has a defined gradient."""
    logits = torch.randn(4, 6, dtype=torch.float64, device=device)
    logits[0, 2] = -INF
    logits.requires_grad_()
    mask = torch.ones(4, 6, dtype=torch.bool, device=device)
    mask[1] = False
    mask[2, :4] = False
    tau = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    y = gumbel_ext.gumbel_softmax(logits, tau, hard, mask=mask)
    first = torch.autograd.grad(y, (logits, tau), torch.randn_like(y), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1].square(), (logits, tau))
    for gradient in (*first, *second):
        assert gradient.isfinite().all()
    for gradient in (first[0], second[0]):
        assert gradient[0, 2] == 0
        assert (gradient[1] == 0).all()
        assert (gradient[2, :4] == 0).all()


# ---- the rarest random words --------------------------------------------------------------------

# Offset 0: (seed, position, hi).  One word in 2^32 is like each of these; found by search.
RARE_WORDS = {
    "zero": (1343428, 3, 0),
    "zero_again": (293046734, 1, 0),
    "all_ones": (454088803, 1, 0xFFFFFFFF),
    "all_ones_again": (1352247272, 0, 0xFFFFFFFF),
    "last_of_lower_tail": (971768647, 1, (1 << 20) - 1),
    "first_above_lower_tail": (217150085, 3, 1 << 20),
    "first_of_upper_tail": (212718477, 0, (1 << 32) - (1 << 20)),
    "last_below_upper_tail": (1010814918, 1, (1 << 32) - (1 << 20) - 1),
}


@pytest.mark.parametrize(("seed", "position", "hi"), RARE_WORDS.values(), ids=RARE_WORDS)
def test_rare_words_through_the_ops(device, dtype, seed, position, hi):
    state = rng_state(seed, 0, device)
    words = _reference.random_words(torch.tensor([position]), state.cpu())
    assert int(words[0]) == hi
    exact = _reference.gumbel(*words)
    drawn = gumbel_ext.gumbel_noise(8, dtype=dtype, device=device, rng_state=state)[position].cpu()
    assert abs(drawn.double() - exact) <= 4 * eps(dtype) * max(1, abs(exact))

    for shape, dim in (((1, 40), -1), ((40, 1), 0), ((5, 4), -1), ((4, 33), 0), ((1, 3000), -1)):
        logits = torch.zeros(shape, dtype=dtype, device=device)
        g = noise_for(logits, state)
        expected, expected_index = reference(logits, 0.5, dim=dim, noise=g)
        y, index = gumbel_ext.gumbel_softmax(
            logits, 0.5, dim=dim, return_index=True, rng_state=state
        )
        assert_soft_close(y, expected, condition(logits, g, 0.5, dim))
        assert torch.equal(index.cpu(), expected_index)


def test_largest_noise_wins(device, dtype):
    """hi = 0 stands for noise of 22.2 to 45: it beats logits that 24-bit uniforms never reach."""
    seed, position, _ = RARE_WORDS["zero"]
    state = rng_state(seed, 0, device)
    for classes in (4, 40):
        logits = torch.full((1, classes), 18.0, dtype=dtype, device=device)
        logits[0, position] = 0.0
        y, index = gumbel_ext.gumbel_softmax(logits, 0.1, return_index=True, rng_state=state)
        assert index == position
        assert y[0, position] > 0.9


@pytest.mark.parametrize("sixteen", SIXTEEN_BIT, ids=str)
def test_large_noise_is_not_rounded_away(sixteen):
    """Float16 holds 45, and the float32 value is what is rounded."""
    words = torch.tensor([0, 1, 1 << 19]), torch.tensor([0, 0, 0])
    single = _C.gumbel_from_words(*words, torch.float32)
    assert single[0] > 45
    assert single.to(sixteen).isfinite().all()
