"""The core on a GPU: every regime of its kernels, its generators, what cannot raise."""

import functools
import math

import pytest
import torch
from oracle import (
    DTYPES,
    assert_index_close,
    assert_one_hot,
    assert_row_errors,
    assert_rows_sum_to_one,
    assert_soft_close,
    assert_tau_gradient_close,
    condition,
    eps,
    noise,
    placed,
    rng_state,
    row_shape,
)

import gumbel_ext
from gumbel_ext import _reference

pytestmark = pytest.mark.cuda_only

INF, NAN = float("inf"), float("nan")
OPS = torch.ops.gumbel_ext


@functools.lru_cache(maxsize=4)
def noise_of(shape, device):
    """Reference noise in float64.  Large shapes are made on the GPU, and would take minutes
    elsewhere; small ones are not, so that under compute-sanitizer little else runs there.
    """
    if math.prod(shape) < 1 << 18:
        return noise(shape)
    return _reference.gumbel_noise(shape, rng_state(device=device))


# ---- every regime against the reference ---------------------------------------------------------

# What csrc/cuda/plan.cpp tells apart on a GPU of about a hundred multiprocessors: how many classes
# a team of threads holds, rows that begin inside a vector, rows that too few blocks would share.
SMALL = {
    "one_lane": ((37, 3), -1),
    "one_lane_full": ((64, 4), -1),
    "two_lanes": ((50, 8), -1),
    "two_lanes_odd": ((50, 7), -1),
    "four_lanes": ((41, 13), -1),
    "eight_lanes": ((33, 32), -1),
    "warp": ((19, 128), -1),
    "warp_odd": ((19, 127), -1),
    "warp_two_groups": ((9, 255), -1),
    "warp_most_groups": ((9, 768), -1),
    "block": ((5, 1025), -1),
    "block_256": ((3, 6144), -1),
    "block_480": ((3, 9001), -1),
    "block_480_full": ((3, 11_517), -1),
    "cluster_of_two": ((3, 12_001), -1),
    "cluster_of_four": ((3, 16_001), -1),
    "split_row": ((2, 20_011), -1),
    "columns": ((3, 40, 33), 1),
    "columns_odd": ((2, 19, 7), 1),
    "columns_first": ((50, 12), 0),
    "columns_shared": ((2, 700, 5), 1),
}
LARGE = {
    "clusters_of_eight": ((70, 50_003), -1),
    "clusters_of_sixteen": ((67, 131_072), -1),
    "clusters_of_large_blocks": ((67, 150_001), -1),
    "one_huge_row": ((1, 3_000_001), -1),
    "many_rows": ((300_001, 10), -1),
    "image": ((2, 512, 32, 32), 1),
    "columns_many_classes": ((2, 30_011, 9), 1),
}


def draw_inputs(shape, dim, dtype, device, unaligned=False):
    """``(logits, grad, mask, tau)``, made on the CPU and moved as they are.

    Nothing but copies writes them, so that compute-sanitizer, told to watch this package's kernels
    alone, takes none of it for memory that nobody wrote.
    """

    logits, grad = (placed(x, device, unaligned) for x in torch.randn(2, *shape).to(dtype))
    mask = torch.rand(shape) < 0.7
    rows = row_shape(shape, dim)
    tau = 0.3 + torch.rand(rows).to(torch.float64 if dtype == torch.float64 else torch.float32)
    mask.movedim(dim, 0)[0] = True  # every row keeps a choice,
    mask.movedim(dim, -1)[(-1,) * (len(shape) - 1)] = False  # but one
    return logits, grad, mask.to(device), tau.to(device)


def expectation(logits, tau, dim, grad, mask, noise):
    """``(y, dlogits, dtau)`` of the reference, float64: made where the noise is, to the CPU."""
    where = noise.device
    leaf = logits.detach().to(where, torch.float64).requires_grad_()
    tau = torch.as_tensor(tau).detach().to(where, torch.float64).requires_grad_()
    mask = None if mask is None else mask.to(where)
    y, _ = _reference.gumbel_softmax(leaf, tau, dim=dim, mask=mask, noise=noise)
    gradients = torch.autograd.grad(y, (leaf, tau), grad.to(where, torch.float64))
    return [t.detach().cpu() for t in (y, *gradients)]


def assert_choice(index, logits, noise, dim, mask):
    """The best class that the mask allows but for near-ties; -1 where it allows none."""
    if mask is None:
        assert_index_close(index, logits, noise, dim)
        return
    mask, index = mask.cpu(), index.cpu()
    some = mask.any(dim)
    assert (index[~some] == -1).all()
    low = torch.where(mask, logits.cpu().double(), 0.0)
    scores = (low + noise).masked_fill(~mask, -INF).movedim(dim, -1)[some]
    chosen = scores.gather(-1, index[some].unsqueeze(-1)).squeeze(-1)
    size = (low.abs() + noise.abs()).movedim(dim, -1)[some].amax(-1)
    lost = scores.amax(-1) - chosen
    assert (lost <= 8 * eps(torch.promote_types(logits.dtype, torch.float32)) * size).all()
    assert int((lost > 0).sum()) <= 1 + lost.numel() // 1000


def check_against_reference(logits, grad, mask, tau, dim, state):
    """Soft, hard and index, forward and backward."""
    made = noise_of(tuple(logits.shape), logits.device)
    g = made.cpu()
    learned = isinstance(tau, torch.Tensor)
    wanted_y, wanted_logits, wanted_tau = expectation(logits, tau, dim, grad, mask, made)
    k = condition(logits, g, tau, dim)
    alone = gumbel_ext.gumbel_argmax(logits, dim, mask=mask, rng_state=state)
    assert_choice(alone, logits, g, dim, mask)
    cpu_mask = None if mask is None else mask.cpu()

    for hard in (False, True):
        leaf = logits.detach().requires_grad_()
        temperature = tau.detach().requires_grad_() if learned else tau
        y, index = gumbel_ext.gumbel_softmax(
            leaf, temperature, hard, dim=dim, mask=mask, return_index=True, rng_state=state
        )
        assert torch.equal(index, alone)
        if hard:
            one_hot = torch.zeros_like(y).scatter(dim, index.clamp(min=0).unsqueeze(dim), 1)
            assert torch.equal(y, one_hot * (index >= 0).unsqueeze(dim))
        else:
            assert_soft_close(y, wanted_y, k)
            if mask is None:
                assert_rows_sum_to_one(y, dim)

        inputs = (leaf, temperature) if learned else (leaf,)
        actual = torch.autograd.grad(y, inputs, grad)
        # Of few rows the percentile is the worst: one whose terms cancel loses a little more.
        assert_row_errors(
            actual[0], wanted_logits, logits, grad, tau, g, dim, mask=cpu_mask, slack=4.0
        )
        if mask is not None:
            assert (actual[0].cpu()[~cpu_mask] == 0).all()
        if learned:
            assert_tau_gradient_close(
                actual[1], wanted_tau, wanted_logits, logits, grad, tau, g, dim, cpu_mask
            )


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SMALL.values(), ids=SMALL)
def test_small(device, state, shape, dim, dtype):
    logits, grad, mask, tau = draw_inputs(shape, dim, dtype, device)
    check_against_reference(logits, grad, None, 0.5, dim, state)
    check_against_reference(logits, grad, mask, tau, dim, state)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SMALL.values(), ids=SMALL)
def test_unaligned(device, state, shape, dim, dtype):
    """One element past an aligned address: vectors must be loaded whole or not at all."""
    logits, grad, _, _ = draw_inputs(shape, dim, dtype, device, unaligned=True)
    assert logits.data_ptr() % 16 != 0
    check_against_reference(logits, grad, None, 0.5, dim, state)


@pytest.mark.gpu_only(reason="millions of elements")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), LARGE.values(), ids=LARGE)
def test_large(device, state, shape, dim, dtype):
    logits, grad, mask, tau = draw_inputs(shape, dim, dtype, device)
    check_against_reference(logits, grad, None, 0.5, dim, state)
    check_against_reference(logits, grad, mask, tau, dim, state)


@pytest.mark.gpu_only(reason="millions of elements")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(270, 190_001), (270, 16_500)],
    ids=["longer_than_clusters", "longer_than_blocks"],
)
def test_rows_of_a_large_tensor(device, state, shape, dtype):
    """Rows that are streamed, with and without clusters; the reference has time for three."""
    logits, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    rows = [0, shape[0] // 2, shape[0] - 1]
    g = torch.stack(
        [_reference.gumbel_noise(shape[1:], rng_state(), [row * shape[1], 1]) for row in rows]
    )
    few, few_grad = logits[rows], grad[rows]
    y, dlogits, _ = expectation(few, 0.5, -1, few_grad, None, g)
    for hard in (False, True):
        leaf = logits.detach().requires_grad_()
        actual, index = gumbel_ext.gumbel_softmax(
            leaf, 0.5, hard, return_index=True, rng_state=state
        )
        (gradient,) = torch.autograd.grad(actual, leaf, grad)
        assert_index_close(index[rows], few, g)
        if hard:
            assert_one_hot(actual.detach(), index)
        else:
            assert_soft_close(actual[rows], y, condition(few, g, 0.5))
        assert_row_errors(gradient[rows], dlogits, few, few_grad, 0.5, g, slack=4.0)
        assert torch.equal(index, gumbel_ext.gumbel_argmax(logits, rng_state=state))


@pytest.mark.gpu_only(reason="other blocks come and go")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [*LARGE.values(), *SMALL.values()], ids=[*LARGE, *SMALL])
def test_runs_give_the_same_bits(device, state, shape, dim, dtype):
    """While other blocks come and go: the order of a sum must not depend on who is first."""
    logits, grad, mask, tau = draw_inputs(shape, dim, dtype, device)
    tau.requires_grad_()
    other, disturbance = torch.cuda.Stream(), torch.randn(1 << 20, device=device)

    def results():
        out = []
        for hard in (False, True):
            leaf = logits.detach().requires_grad_()
            y, index = gumbel_ext.gumbel_softmax(
                leaf, tau, hard, dim=dim, mask=mask, return_index=True, rng_state=state
            )
            out += [y.detach(), index, *torch.autograd.grad(y, (leaf, tau), grad)]
        return [*out, gumbel_ext.gumbel_argmax(logits, dim, mask=mask, rng_state=state)]

    expected = results()
    for _ in range(4):
        with torch.cuda.stream(other):
            for _ in range(8):
                disturbance.sin_()
        for a, b in zip(results(), expected, strict=True):
            assert torch.equal(a, b)


# ---- generators ---------------------------------------------------------------------------------


@pytest.mark.gpu_only(reason="the CPU's generator is none of Philox")
def test_generators_seed_is_the_state(device):
    """CUDA generators are Philox themselves: seed and offset are the noise contract's."""
    generator = torch.Generator(device).manual_seed(1234)
    for call in range(3):
        noise = gumbel_ext.gumbel_noise(
            1000, dtype=torch.float64, device=device, generator=generator
        )
        state = torch.tensor([1234, 2 * call], device=device)
        again = gumbel_ext.gumbel_noise(1000, dtype=torch.float64, device=device, rng_state=state)
        assert torch.equal(noise, again)
    used = OPS.gumbel_softmax(
        torch.zeros(3, 4, device=device), 1.0, None, False, -1, None, False, generator, None
    )[2]
    assert used.tolist() == [1234, 6]


# ---- what cannot raise, and what does -----------------------------------------------------------


@pytest.mark.gpu_only(reason="on the CPU temperatures are looked at")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (7, 40), (7, 2100), (7, 10_001), (7, 20_000)], ids=str)
def test_bad_temperature_in_a_tensor_is_a_nan_row(device, state, shape, dtype, tau_dtype):
    """To raise would be to wait for the GPU.  Other rows are untouched, the index too."""
    logits, grad = torch.randn(2, *shape).to(device, dtype)
    good = torch.full((shape[0], 1), 0.5, dtype=tau_dtype, device=device)
    bad = good.clone()
    for row, value in enumerate((0.0, -1.0, NAN, INF, -INF), start=1):
        bad[row] = value
    results = []
    for tau in (good, bad):
        leaf = logits.detach().requires_grad_()
        y, index = gumbel_ext.gumbel_softmax(leaf, tau, return_index=True, rng_state=state)
        results.append((y.detach(), index, torch.autograd.grad(y, leaf, grad)[0]))
    (y, index, gradient), (bad_y, bad_index, bad_gradient) = results
    assert bad_y[1:6].isnan().all()
    assert bad_gradient[1:6].isnan().all()
    assert torch.equal(bad_index, index)
    for row in (0, 6):
        assert torch.equal(bad_y[row], y[row])
        assert torch.equal(bad_gradient[row], gradient[row])


@pytest.mark.parametrize("tau", [0.0, -1.5, NAN, INF], ids=str)
def test_bad_temperature_on_the_cpu_raises(device, tau):
    """A number in a CPU tensor can be read at no cost."""
    with pytest.raises(ValueError, match="tau"):
        gumbel_ext.gumbel_softmax(torch.zeros(3, 4, device=device), torch.tensor(tau))


def test_temperature_may_be_a_number_on_the_cpu(device, state):
    logits = torch.randn(30, 40).to(device)
    tau = torch.tensor(0.5, requires_grad=True)
    y = gumbel_ext.gumbel_softmax(logits, tau, rng_state=state)
    assert torch.equal(y.detach(), gumbel_ext.gumbel_softmax(logits, 0.5, rng_state=state))
    weight = torch.randn(30, 40).to(device)
    (gradient,) = torch.autograd.grad(y, tau, weight)
    on_device = torch.tensor(0.5, device=device, requires_grad=True)
    y = gumbel_ext.gumbel_softmax(logits, on_device, rng_state=state)
    assert gradient.device.type == "cpu"
    torch.testing.assert_close(gradient, torch.autograd.grad(y, on_device, weight)[0].cpu())


@pytest.mark.gpu_only(reason="needs two devices")
def test_devices_may_not_be_mixed(device):
    logits = torch.zeros(3, 4)
    for argument, other in (
        ("mask", torch.ones(3, 4, dtype=torch.bool)),
        ("tau", torch.ones(3, 1)),
    ):
        with pytest.raises(ValueError, match=argument):
            gumbel_ext.gumbel_softmax(logits.to(device), **{argument: other})
        with pytest.raises(ValueError, match=argument):
            gumbel_ext.gumbel_softmax(logits, **{argument: other.to(device)})
    with pytest.raises(ValueError, match="rng_state"):
        gumbel_ext.gumbel_softmax(logits, rng_state=rng_state(device=device))
    with pytest.raises(ValueError, match="generator"):
        gumbel_ext.gumbel_softmax(logits.to(device), generator=torch.Generator())
    with pytest.raises(ValueError, match="generator"):
        gumbel_ext.gumbel_softmax(logits, generator=torch.Generator(device))


def test_a_row_may_not_be_longer_than_an_index_within_it(device):
    logits = torch.zeros((), dtype=torch.float16, device=device).expand(1 << 31)
    with pytest.raises(ValueError, match="classes"):
        gumbel_ext.gumbel_argmax(logits)


@pytest.mark.slow
@pytest.mark.gpu_only(reason="34 GB")
def test_positions_past_the_low_counter_word(device):
    """Position 2^34 is block 2^32, where the third counter word carries into the fourth."""
    classes, rows = 1 << 20, (1 << 14) + 4  # 34 GB
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free memory on the GPU")
    logits = torch.zeros((), dtype=torch.bfloat16, device=device).expand(rows, classes)
    index = gumbel_ext.gumbel_argmax(logits, rng_state=rng_state(device=device))
    for row in (0, (1 << 14) - 1, 1 << 14, rows - 1):
        noise = _reference.gumbel_noise([classes], rng_state(device=device), [row * classes, 1])
        assert_index_close(index[row].view(1), logits[:1], noise.cpu().view(1, -1))


def test_one_hot_is_exact(device, state):
    """Largest and smallest numbers of each dtype around the one that is chosen."""
    for dtype in DTYPES:
        logits = torch.randn(64, 100).to(device, dtype)
        logits[:, 7] = torch.finfo(dtype).max
        logits[:, 8] = torch.finfo(dtype).min
        y, index = gumbel_ext.gumbel_softmax(logits, 1e-3, True, return_index=True, rng_state=state)
        assert (index == 7).all()
        assert_one_hot(y, index)
