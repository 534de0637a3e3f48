"""Classes drawn without replacement are the k largest of logits + noise, in order.

On the CPU the noisy logits of the kernels are logits + gumbel_noise to the bit, so that a stable
sort of them is the exact answer.  CUDA kernels round the sum once, gumbel_noise and the addition
here twice: there two classes within that rounding may change places.
"""

import itertools
import math

import pytest
import torch
from oracle import DTYPES, SEED, as_int64, eps, rng_state, runs_cpu_kernels
from torch.library import opcheck

import gumbel_ext
from gumbel_ext import _reference, gumbel_topk


def feature(name, mode="eager"):
    return pytest.mark.feature(name, ops=("gumbel_topk",), modes=(mode,))


def noisy(logits, state, mask=None):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    noise = gumbel_ext.gumbel_noise(
        logits.shape, dtype=dtype, device=logits.device, rng_state=state
    )
    z = logits.detach().to(dtype) + noise
    return z if mask is None else z.masked_fill(~mask, -torch.inf)


def assert_exact(index, logits, k, state, dim=-1, mask=None):
    z = noisy(logits, state, mask)
    order = z.sort(dim=dim, descending=True, stable=True)
    exact = torch.where(order.values == -torch.inf, -1, order.indices).narrow(dim, 0, k)
    assert index.dtype == torch.int64
    assert index.shape == exact.shape
    if runs_cpu_kernels(logits.device):
        assert torch.equal(index, exact)
        return
    assert torch.equal(index < 0, exact < 0)
    lost = order.values.narrow(dim, 0, k) - z.gather(dim, index.clamp(min=0))
    lost = lost.abs().nan_to_num(0.0).masked_fill(index < 0, 0.0)
    assert (lost <= 4 * eps(z.dtype) * z.abs().nan_to_num(0.0, 0.0, 0.0).amax().clamp(min=1)).all()
    assert int((index != exact).sum()) <= 1 + index.numel() // 1000


SHAPES = [
    (5, 1),
    (7, 2),
    (300, 10),
    (3, 4, 17),
    (9, 191),
    (5, 1000),
    (3, 2049),
    (2, 5000),
    (1, 70_001),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_k_largest_in_order(device, shape, dtype):
    logits = (2 * torch.randn(shape)).to(device, dtype)
    state = rng_state(device=device)
    classes = shape[-1]
    for k in sorted({1, 2, 5, 40, 1500, classes} & set(range(1, classes + 1))):
        assert_exact(gumbel_topk(logits, k, rng_state=state), logits, k, state)


@pytest.mark.parametrize("inner", [1, 2, 3, 15, 16, 33, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_dim(device, inner, dtype):
    for outer, classes in ((3, 11), (1, 2500), (2, 300)):
        logits = torch.randn(outer, classes, inner, device=device, dtype=dtype)
        mask = torch.rand(logits.shape, device=device) < 0.5
        state = rng_state(device=device)
        for k in (1, 4, 11):
            index = gumbel_topk(logits, k, dim=1, rng_state=state)
            assert_exact(index, logits, k, state, 1)
            assert index.is_contiguous()
            index = gumbel_topk(logits, k, dim=-2, mask=mask, rng_state=state)
            assert_exact(index, logits, k, state, 1, mask)


def test_first_is_the_argmax_and_prefixes_agree(device):
    for shape, dim in (((40, 1000), 1), ((6, 50, 40), 1), ((4, 30, 3), 1), ((33, 7), 0)):
        logits = torch.randn(shape, device=device)
        state = rng_state(device=device)
        most = gumbel_topk(logits, 7, dim, rng_state=state)
        argmax = gumbel_ext.gumbel_argmax(logits, dim, keepdim=True, rng_state=state)
        assert torch.equal(most.narrow(dim, 0, 1), argmax)
        for j in range(1, 7):
            fewer = gumbel_topk(logits, j, dim, rng_state=state)
            assert torch.equal(most.narrow(dim, 0, j), fewer)


def test_the_reference(device):
    logits = torch.randn(20, 30, device=device).double()
    mask = torch.rand(20, 30, device=device) < 0.3
    state = rng_state()
    index = gumbel_topk(logits, 12, mask=mask, rng_state=state)
    expected = _reference.gumbel_topk(logits.cpu(), 12, mask=mask.cpu(), rng_state=state)
    assert (expected < 0).any()
    assert torch.equal(index.cpu(), expected)


def layouts(base):
    """The same numbers in other places of memory."""
    yield base.t().contiguous().t()
    wide = torch.zeros(base.shape[0], 2 * base.shape[1] + 3, dtype=base.dtype, device=base.device)
    part = wide[:, 1 : 1 + 2 * base.shape[1] : 2]
    part.copy_(base)
    yield part
    shifted = torch.empty(base.numel() + 1, dtype=base.dtype, device=base.device)[1:]
    yield shifted.view(base.shape).copy_(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts(device, dtype):
    state = rng_state(device=device)
    for rows, classes in ((50, 37), (5, 2500)):
        logits = torch.randn(rows, classes, device=device, dtype=dtype)
        mask = torch.rand(rows, classes, device=device) < 0.5
        for dim in (0, 1):
            expected = gumbel_topk(logits, 5, dim, mask=mask, rng_state=state)
            assert_exact(expected, logits, 5, state, dim, mask)
            for other in layouts(logits):
                assert torch.equal(gumbel_topk(other, 5, dim, mask=mask, rng_state=state), expected)
            for other in layouts(mask):
                assert torch.equal(
                    gumbel_topk(logits, 5, dim, mask=other, rng_state=state), expected
                )
        one = logits[:1].expand(rows, classes)
        assert torch.equal(
            gumbel_topk(one, 5, rng_state=state), gumbel_topk(one.clone(), 5, rng_state=state)
        )


@pytest.mark.cpu_only(reason="threads of the CPU kernels")
@pytest.mark.parametrize("shape", [(1, 200_000), (3, 70_000), (2, 40_000, 3), (70, 60, 70)])
def test_the_same_bits_with_every_number_of_threads(shape, thread_count):
    logits = torch.randn(shape)
    logits[(0,) * len(shape)] = -torch.inf
    for k in (1, 3, 60):
        found = []
        for threads in (1, 2, 3, 7):
            thread_count(threads)
            found.append(gumbel_topk(logits, k, 1, rng_state=rng_state()))
        assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.cpu_only(reason="threads of the CPU kernels")
def test_one_part_of_a_shared_row_may_hold_all_the_best(thread_count):
    logits = torch.randn(1, 100_000)
    logits[0, 70_000:70_100] += 40
    found = []
    for threads in (1, 2, 7):
        thread_count(threads)
        found.append(gumbel_topk(logits, 60, rng_state=rng_state()))
    assert ((found[0] >= 70_000) & (found[0] < 70_100)).all()
    assert all(torch.equal(found[0], other) for other in found)


def test_places_left_are_minus_one(device):
    state = rng_state(device=device)
    logits = torch.randn(6, 300, device=device)
    logits[0, 2:] = -torch.inf
    logits[1] = -torch.inf
    mask = torch.ones(6, 300, dtype=torch.bool, device=device)
    mask[2, :297] = False
    mask[3] = False
    mask[4, 1] = False
    index, log_prob = gumbel_topk(logits, 5, mask=mask, return_log_prob=True, rng_state=state)
    assert_exact(index, logits, 5, state, mask=mask)
    assert (index >= 0).sum(1).tolist() == [2, 0, 3, 0, 5, 5]
    assert sorted(index[0, :2].tolist()) == [0, 1]
    # Two classes, both chosen: the second is certain.
    expected = logits[0, :2].log_softmax(0)[index[0, 0]]
    torch.testing.assert_close(log_prob[0], expected)
    inside = logits.double().masked_fill(~mask, -torch.inf).cpu()
    rows = [0, 2, 4, 5]
    expected = _reference.ordered_log_prob(inside[rows], index[rows].cpu())
    torch.testing.assert_close(log_prob[rows].cpu().double(), expected, rtol=1e-5, atol=1e-6)
    assert log_prob[1] == 0
    assert log_prob[3] == 0
    assert log_prob.isfinite().all()


def test_ties_and_special_logits(device):
    state = rng_state(device=device)
    # So large that the noise rounds away: all classes tie.
    for classes in (9, 300, 3000):
        logits = torch.full((3, classes), 2.0**100, device=device)
        logits[1, 5] = torch.inf
        logits[2, 7], logits[2, 3], logits[2, 8] = torch.nan, torch.nan, torch.inf
        assert gumbel_topk(logits, 4, rng_state=state).tolist() == [
            [0, 1, 2, 3],
            [5, 0, 1, 2],
            [3, 7, 8, 0],
        ]
        columns = gumbel_topk(logits.t().contiguous(), 4, 0, rng_state=state)
        assert columns.t().tolist() == [[0, 1, 2, 3], [5, 0, 1, 2], [3, 7, 8, 0]]
        mask = torch.ones_like(logits, dtype=torch.bool)
        mask[:, 3] = False
        assert gumbel_topk(logits, 2, mask=mask, rng_state=state)[2].tolist() == [7, 8]


def test_more_nans_than_places(device):
    logits = torch.randn(2, 5000, device=device)
    logits[:, 100:4000:3] = torch.nan
    index = gumbel_topk(logits, 20, rng_state=rng_state(device=device))
    assert index[0].tolist() == list(range(100, 160, 3))


def test_all_classes_are_a_permutation(device):
    for classes in (1, 6, 257, 20_000):
        index = gumbel_topk(torch.randn(3, classes, device=device), classes)
        assert torch.equal(index.sort(1).values.cpu(), torch.arange(classes).expand(3, -1))


def test_shapes_without_elements_or_dimensions(device):
    before = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert gumbel_topk(torch.zeros(3, 5, device=device), 0).shape == (3, 0)
    assert gumbel_topk(torch.zeros(0, 5, device=device), 2).shape == (0, 2)
    assert gumbel_topk(torch.zeros(2, 0, device=device), 0).shape == (2, 0)
    index, log_prob = gumbel_topk(torch.zeros(0, 5, device=device), 2, return_log_prob=True)
    assert index.shape == (0, 2)
    assert log_prob.shape == (0,)
    after = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(before, after)
    index, log_prob = gumbel_topk(torch.tensor(2.0, device=device), 1, return_log_prob=True)
    assert index.tolist() == [0]
    assert log_prob.shape == ()
    assert log_prob == 0


def test_one_state_a_call(device):
    logits = torch.randn(20, 30, device=device)
    generator = torch.Generator(device).manual_seed(5)
    state = gumbel_ext.draw_rng_state(generator)
    after = generator.get_state()
    generator.manual_seed(5)
    index = gumbel_topk(logits, 3, generator=generator)
    assert torch.equal(index, gumbel_topk(logits, 3, rng_state=state))
    assert torch.equal(generator.get_state(), after)


# ---- the distribution


def probabilities(logits, k):
    """Of every ordered sample of k classes, by enumeration."""
    weights = logits.double().exp()
    found = {}
    for order in itertools.permutations(range(len(logits)), k):
        left, p = weights.sum(), 1.0
        for i in order:
            p *= float(weights[i] / left)
            left = left - weights[i]
        found[order] = p
    return found


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_ordered_samples_are_plackett_luce(device, k):
    """Chi-square over all ordered samples, alpha = 1e-6 a case."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -0.4])
    rows = 200_000
    state = torch.tensor([as_int64(SEED) + k, 3])
    index = gumbel_topk(logits.to(device).expand(rows, 5), k, rng_state=state).cpu()
    code = (index * 5 ** torch.arange(k)).sum(1)
    counts = torch.bincount(code, minlength=5**k)
    expected = probabilities(logits, k)
    chi = 0.0
    for order, p in expected.items():
        seen = int(counts[sum(c * 5**j for j, c in enumerate(order))])
        chi += (seen - rows * p) ** 2 / (rows * p)
    assert sum(expected.values()) == pytest.approx(1)
    degrees = len(expected) - 1
    # Wilson and Hilferty's normal approximation of chi-square.
    z = ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    assert z < 4.75, (chi, degrees)


def test_how_often_a_class_is_included(device):
    """Inclusion by enumeration, five standard deviations a class: alpha = 3e-6 in all."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, 0.5, -3.0])
    rows, k = 200_000, 3
    index = gumbel_topk(logits.to(device).expand(rows, 6), k, rng_state=torch.tensor([11, 0])).cpu()
    seen = torch.bincount(index.flatten(), minlength=6).double() / rows
    expected = torch.zeros(6, dtype=torch.float64)
    for order, p in probabilities(logits, k).items():
        expected[list(order)] += p
    sigma = (expected * (1 - expected) / rows).sqrt()
    assert ((seen - expected).abs() < 5 * sigma).all()


# ---- log-probability


def log_prob_of(logits, index, dim=-1):
    from gumbel_ext.topk import _log_prob

    return _log_prob(logits, index, dim, None)


def test_log_prob_sums_to_one():
    logits = torch.randn(6, dtype=torch.float64)
    for k in (1, 2, 3, 6):
        orders = torch.tensor(list(itertools.permutations(range(6), k)))
        log_prob = log_prob_of(logits.expand(len(orders), 6), orders)
        assert log_prob.exp().sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_log_prob_is_that_of_the_formula(device, dtype, spread):
    for shape, dim, k in (((50, 7), 1, 7), ((6, 40, 5), 1, 13), ((4, 400), -1, 70)):
        logits = (spread * torch.randn(shape)).to(device, dtype)
        index, log_prob = gumbel_topk(logits, k, dim, return_log_prob=True)
        assert log_prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = _reference.ordered_log_prob(logits.cpu().double(), index.cpu(), dim)
        # Near 0 the reference has the absolute error of a log_softmax in float64.
        torch.testing.assert_close(
            log_prob.cpu().double(),
            expected,
            rtol=30 * eps(log_prob.dtype),
            atol=64 * k * eps(torch.float64),
        )


def test_log_prob_where_the_chosen_hold_nearly_all_mass():
    """log(sigmoid) of a difference, never a sum less another: relative accuracy down to e^-80."""
    for gap in (1.0, 20.0, 80.0):
        logits = torch.tensor([gap, 0.0, -gap])
        index = torch.tensor([0, 1])
        expected = _reference.ordered_log_prob(logits.double(), index)
        exact = -math.log1p(math.exp(-gap) + math.exp(-2 * gap)) - math.log1p(math.exp(-gap))
        assert float(log_prob_of(logits, index)) == pytest.approx(exact, rel=1e-6)
        assert float(log_prob_of(logits.double(), index)) == pytest.approx(exact, rel=1e-14)
        assert float(expected) == pytest.approx(exact, abs=1e-12)
    logits = torch.tensor([1e13, 0.0, -1e13])
    assert log_prob_of(logits, torch.tensor([0, 1, 2])) == 0
    assert float(log_prob_of(logits, torch.tensor([2, 1, 0]))) == pytest.approx(-3e13)
    assert float(log_prob_of(logits, torch.tensor([2, -1, -1]))) == pytest.approx(-2e13)


def test_derivatives_of_log_prob():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        logits[1, 2:] = -torch.inf
    state = rng_state()

    def log_prob(values):
        inside = torch.cat([values[:1], torch.where(keep, values[1:2], -torch.inf), values[2:]])
        return gumbel_topk(inside, 4, return_log_prob=True, rng_state=state)[1]

    keep = torch.tensor([[True, True, False, False, False]])
    values = logits.detach().nan_to_num(neginf=0.0).requires_grad_()
    assert torch.autograd.gradcheck(log_prob, values)
    assert torch.autograd.gradgradcheck(log_prob, values)


def test_the_gradient_of_log_prob_is_finite_and_right(device):
    """Against the derivative of the formula, in rows of every kind; a random-weighted loss."""
    logits = 20 * torch.randn(8, 40, device=device)
    logits[1, 3:] = -torch.inf
    logits[2] = -torch.inf
    logits.requires_grad_()
    index, log_prob = gumbel_topk(logits, 6, return_log_prob=True)
    weight = torch.randn(8, device=device)
    (log_prob * weight).sum().backward()
    expected = torch.zeros(8, 40, dtype=torch.float64)
    weights = logits.detach().cpu().double()
    for r in range(8):
        left = weights[r].clone()
        for i in index[r].tolist():
            if i < 0:
                continue
            expected[r] -= left.softmax(0)
            expected[r, i] += 1
            left[i] = -torch.inf
    expected *= weight.cpu().double().unsqueeze(1)
    torch.testing.assert_close(logits.grad.cpu().double(), expected, rtol=1e-5, atol=1e-6)


# ---- as an operator


@feature("torch.library.opcheck")
def test_opcheck(device):
    op = torch.ops.gumbel_ext.gumbel_topk.default
    state = rng_state(device=device)
    for dtype in DTYPES:
        logits = torch.randn(4, 5, 6, device=device, dtype=dtype, requires_grad=True)
        mask = torch.rand(5, 1, device=device) < 0.7
        opcheck(op, (logits, 3, 1, mask, None, state))
        opcheck(op, (logits, 6, -1, None, None, state, [7, 300, 20, 2]))


def test_positions_are_those_of_a_part(device):
    whole = torch.randn(6, 50, 20, device=device)
    state = rng_state(device=device)
    op = torch.ops.gumbel_ext.gumbel_topk
    for dim in (0, 1, 2):
        other = (dim + 1) % 3
        expected = gumbel_topk(whole, 4, dim, rng_state=state).narrow(other, 2, 3)
        base = 2 * [1000, 20, 1][other]
        part = whole.narrow(other, 2, 3)
        index = op(part, 4, dim, None, None, state, [base, 1000, 20, 1])
        assert torch.equal(index, expected)


@feature("torch.compile(fullgraph=True), forward and backward", "compiled")
def test_compiles(device):
    state = rng_state(device=device)

    def sample(logits, k):
        index, log_prob = gumbel_topk(logits, k, return_log_prob=True, rng_state=state)
        return index, log_prob

    logits = torch.randn(6, 20, device=device, requires_grad=True)
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    index, log_prob = compiled(logits, 3)
    expected, expected_log_prob = sample(logits, 3)
    assert torch.equal(index, expected)
    torch.testing.assert_close(log_prob, expected_log_prob)
    gradients = [
        torch.autograd.grad(v.square().sum(), logits)[0] for v in (log_prob, sample(logits, 3)[1])
    ]
    torch.testing.assert_close(*gradients)


@feature("two calls in one graph draw different noise", "compiled")
def test_two_calls_draw_twice_in_a_compiled_training_graph(device):
    def sample(logits):
        return gumbel_topk(logits, 5) - gumbel_topk(logits, 5), logits.sin().sum()

    logits = torch.randn(6, 20, device=device, requires_grad=True)
    difference, loss = torch.compile(sample, fullgraph=True, backend="aot_eager")(logits)
    loss.backward()
    assert (difference != 0).any()


@pytest.mark.parametrize(
    "randomness",
    [
        pytest.param("error", marks=feature("vmap randomness=error")),
        pytest.param("same", marks=feature("vmap randomness=same")),
        pytest.param("different", marks=feature("vmap randomness=different")),
    ],
)
@feature("vmap with rng_state")
@feature("vmap over rng_state")
def test_vmap(device, randomness):
    logits = torch.randn(4, 3, 9, device=device)
    state = rng_state(device=device)
    states = torch.stack([state, state + 1, state + 2, state + 3])

    def sample(x, s):
        return gumbel_topk(x, 4, return_log_prob=True, rng_state=s)

    index, log_prob = torch.vmap(sample, randomness=randomness)(logits, states)
    for i in range(4):
        expected, expected_log_prob = sample(logits[i], states[i])
        assert torch.equal(index[i], expected)
        torch.testing.assert_close(log_prob[i], expected_log_prob)
    index, _ = torch.vmap(sample, (1, None), randomness=randomness)(logits, state)
    for i in range(3):
        assert torch.equal(index[i], sample(logits[:, i], state)[0])
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness error mode"):
            torch.vmap(lambda x: gumbel_topk(x, 2))(logits)
        return
    flat = torch.zeros(8, 50, device=device)
    index = torch.vmap(lambda x: gumbel_topk(x, 5), randomness=randomness)(flat)
    assert (index == index[0]).all() == (randomness == "same")


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 6}, ValueError, "k must be between 0 and the number of classes, 5, got 6"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"k": 1.0}, TypeError, "k must be an int, got 1.0"),
        ({"k": True}, TypeError, "k must be an int, got True"),
        ({"k": 1, "dim": 2}, IndexError, "dim must be between -2 and 1"),
        ({"k": 1, "dim": "0"}, TypeError, "dim must be an int, got '0'"),
        ({"k": 1, "mask": torch.ones(4, 5)}, TypeError, "mask must have dtype bool"),
        ({"k": 1, "mask": torch.ones(3, 5).bool()}, ValueError, "mask must broadcast"),
        ({"k": 1, "mask": 1}, TypeError, "mask must be a tensor, got int"),
        ({"k": 1, "rng_state": torch.zeros(3).long()}, ValueError, "rng_state must be"),
        ({"k": 1, "generator": 1}, TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"gumbel_topk: {message}"):
        gumbel_topk(torch.zeros(4, 5), **arguments)


def test_errors_of_logits():
    with pytest.raises(TypeError, match="gumbel_topk: logits must be a tensor, got list"):
        gumbel_topk([1.0], 1)
    with pytest.raises(TypeError, match=r"gumbel_topk: logits must have dtype .*, got torch.int64"):
        gumbel_topk(torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match="gumbel_topk: logits must be a dense"):
        gumbel_topk(torch.zeros(3, 4).to_sparse(), 1)
    with pytest.raises(ValueError, match=r"gumbel_topk: k must be between 0 and .*, 4, got 5"):
        torch.ops.gumbel_ext.gumbel_topk(torch.zeros(3, 4), 5, -1, None, None, None)
