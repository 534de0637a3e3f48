"""Distributions, with fixed seeds.

Every test states alpha, the chance that a right implementation would have failed at a random seed,
and what it detects.  The seeds are fixed, so a test that passes once passes always.
"""

import math

import pytest
import torch
from oracle import DTYPES, SIXTEEN_BIT, rng_state
from scipy import stats

import gumbel_ext

ALPHA = 1e-4
INF = float("inf")


def chi_square(index, probability):
    """p-value of the counts of ``index`` under ``probability``."""
    counts = torch.bincount(index.flatten(), minlength=len(probability)).double()
    expected = probability.double() * counts.sum()
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    assert expected[possible].min() > 5, "too few draws for a chi-square test"
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    return stats.chi2.sf(float(statistic), int(possible.sum()) - 1)


def power_of_chi_square(probability, alternative, draws):
    """Chance to reject ``probability`` at ALPHA when ``alternative`` is the truth."""
    shift = draws * ((alternative - probability) ** 2 / probability).sum()
    freedom = len(probability) - 1
    limit = stats.chi2.isf(ALPHA, freedom)
    return stats.ncx2.sf(limit, freedom, float(shift))


# ---- the chosen class ---------------------------------------------------------------------------

ROWS = 100_000
UNEVEN = {
    "two": [0.0, 1.0],
    "seven": [0.0, -1.0, 2.0, 0.5, -2.0, 1.0, 0.0],
    "forty": [0.1 * (i % 13) for i in range(40)],
    "with_minus_infinity": [0.0, -INF, 1.0, -INF, 0.5],
    "far_from_zero": [-80.0, -81.0, -79.5],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", UNEVEN.values(), ids=UNEVEN)
def test_index_is_categorical(device, logits, dtype):
    """Gumbel-max: the index follows softmax(logits), for every way to ask for it."""
    row = torch.tensor(logits).to(device, dtype)
    probability = torch.softmax(row.double().cpu(), -1)
    expanded = row.expand(ROWS, -1)
    for seed, draw in enumerate(
        (
            lambda state: gumbel_ext.gumbel_argmax(expanded, rng_state=state),
            lambda state: gumbel_ext.gumbel_softmax(
                expanded, 0.3, return_index=True, rng_state=state
            )[1],
            lambda state: gumbel_ext.gumbel_softmax(expanded, hard=True, rng_state=state).argmax(
                -1
            ),
        )
    ):
        index = draw(rng_state(seed, 0, device))
        assert chi_square(index.cpu(), probability) > ALPHA


def test_power_to_see_a_wrong_class():
    """One class of seven 5 % too likely is seen with probability 0.997."""
    probability = torch.softmax(torch.tensor(UNEVEN["seven"], dtype=torch.float64), -1)
    biased = probability.clone()
    biased[2] *= 1.05
    assert power_of_chi_square(probability, biased / biased.sum(), ROWS) > 0.997


@pytest.mark.parametrize("shape", [(7, 50_000), (10, 7, 5000), (300, 7, 7, 23)], ids=str)
def test_index_is_categorical_over_other_dims(device, shape):
    row = torch.tensor(UNEVEN["seven"], device=device)
    dim = 0 if len(shape) == 2 else 1
    view = [1] * len(shape)
    view[dim] = 7
    index = gumbel_ext.gumbel_argmax(
        row.view(view).expand(shape), dim, rng_state=rng_state(3, 0, device)
    )
    assert chi_square(index.cpu(), torch.softmax(row.double().cpu(), -1)) > ALPHA


def test_masked_index_is_categorical_over_what_is_left(device):
    row = torch.tensor(UNEVEN["seven"], device=device)
    mask = torch.tensor([True, False, True, True, False, True, True], device=device)
    probability = torch.softmax(row.double().masked_fill(~mask, -INF).cpu(), -1)
    index = gumbel_ext.gumbel_argmax(
        row.expand(ROWS, -1), mask=mask, rng_state=rng_state(4, 0, device)
    )
    assert chi_square(index.cpu(), probability) > ALPHA


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_sixteen_bit_classes_are_equal(device, dtype):
    """Eight equal classes at tau = 10: rounding before the choice gives the low ones too much.

    Eager fails this at z = 40.
    """
    logits = torch.zeros((), dtype=dtype, device=device).expand(400_000, 8)
    _, index = gumbel_ext.gumbel_softmax(
        logits, 10.0, return_index=True, rng_state=rng_state(5, 0, device)
    )
    assert chi_square(index.cpu(), torch.full((8,), 1 / 8)) > ALPHA


@pytest.mark.cpu_only(reason="CUDA would make 50,000 rows of 262,144 dense; test_cuda.py races too")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tail_race(device, dtype):
    """A head 20.5 above 262,143 tails loses 32.8 times in 100,000 draws.

    Noise that stops at 16.7 (a 24-bit uniform) or 18 never lets a tail win: 0 times.  The number of
    wins is Poisson; the interval below has alpha = ALPHA, and 0 has probability 8e-8 in truth.
    Draws are split between the dtypes, so the expectation is 16.4 in each.
    """
    classes, gap, draws = 1 << 18, 20.5, 50_000
    head = math.exp(gap)
    expected = draws * (classes - 1) / (classes - 1 + head)
    assert expected == pytest.approx(32.8 / 2, rel=1e-2)
    row = torch.zeros(classes, dtype=dtype, device=device)
    row[0] = gap
    index = gumbel_ext.gumbel_argmax(
        row.expand(draws, -1), rng_state=rng_state(6, 0 if dtype == torch.float32 else 2, device)
    )
    wins = int((index != 0).sum())
    low, high = stats.poisson.interval(1 - ALPHA, expected)
    assert low > 1
    assert low <= wins <= high
    tails = index[index != 0].double() / classes
    assert stats.kstest(tails.cpu().numpy(), "uniform").pvalue > ALPHA


# ---- the noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise_is_gumbel(device, dtype):
    """Kolmogorov-Smirnov over a million draws: sees a distance of 0.0023 between the CDFs."""
    noise = gumbel_ext.gumbel_noise(
        1_000_000, dtype=dtype, device=device, rng_state=rng_state(7, 0, device)
    )
    assert stats.kstest(noise.cpu().double().numpy(), "gumbel_r").pvalue > ALPHA


def test_moments(device):
    noise = gumbel_ext.gumbel_noise(
        4_000_000, dtype=torch.float64, device=device, rng_state=rng_state(8, 0, device)
    )
    variance = math.pi**2 / 6
    limit = stats.norm.isf(ALPHA / 2)
    error = math.sqrt(variance / noise.numel())
    assert abs(float(noise.mean()) - 0.5772156649015329) < limit * error
    # The kurtosis of the Gumbel distribution is 5.4, which gives the error of the variance.
    assert abs(float(noise.var()) - variance) < limit * variance * math.sqrt(4.4 / noise.numel())


def test_tail_is_exponential(device):
    """Counts above high levels are Poisson: P(G > x) = 1 - exp(-exp(-x)).

    Of 400 million draws 6.1 are expected above 18, where a 24-bit uniform gives 0; that alone has
    probability 0.002 in truth.
    """
    draws, chunk = 400_000_000, 50_000_000
    counts = dict.fromkeys((8.0, 12.0, 14.0, 16.0, 18.0), 0)
    for seed in range(draws // chunk):
        noise = gumbel_ext.gumbel_noise(chunk, device=device, rng_state=rng_state(seed, 9, device))
        tail = noise[noise > min(counts)]
        for level in counts:
            counts[level] += int((tail > level).sum())
    for level, count in counts.items():
        expected = -draws * math.expm1(-math.exp(-level))
        low, high = stats.poisson.interval(1 - ALPHA, expected)
        assert low <= count <= high, level


# ---- independence -------------------------------------------------------------------------------


def correlation_p_value(a, b):
    """Two-sided p-value of no correlation between two long samples."""
    r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    return 2 * stats.norm.sf(abs(float(r)) * math.sqrt(a.numel()))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 63, 64, 1024])
def test_neighbours_are_independent(device, lag):
    """Lanes of a vector, words of a block and rows of a tensor; in three views of the noise."""
    noise = gumbel_ext.gumbel_noise(
        1_000_000 + lag, dtype=torch.float64, device=device, rng_state=rng_state(10, 0, device)
    )
    uniform = torch.exp(-torch.exp(-noise))
    for x in (noise, noise.square(), uniform):
        assert correlation_p_value(x[lag:], x[:-lag]) > ALPHA


def test_calls_are_independent(device):
    """Consecutive draws of one generator, consecutive seeds and offsets two apart."""
    # On CUDA a generator's seed is the key itself: 0 would draw the noise of by_state(0, ...).
    generator = torch.Generator(device).manual_seed(0 if device == "cpu" else 17)

    def by_generator():
        return gumbel_ext.gumbel_noise(
            500_000, dtype=torch.float64, device=device, generator=generator
        )

    def by_state(seed, offset):
        return gumbel_ext.gumbel_noise(
            500_000, dtype=torch.float64, device=device, rng_state=rng_state(seed, offset, device)
        )

    draws = [by_generator(), by_generator(), by_state(0, 0), by_state(1, 0), by_state(0, 2)]
    draws += [by_state(1 << 32, 0), by_state(0, 1 << 32)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not (a == b).any()
            assert correlation_p_value(a, b) > ALPHA


def test_pairs_of_rows_are_independent(device):
    """Chi-square over the 49 pairs of choices of neighbouring rows, and of the same row twice."""
    row = torch.tensor(UNEVEN["seven"], device=device)
    probability = torch.softmax(row.double().cpu(), -1)
    pairs = torch.outer(probability, probability).flatten()
    generator = torch.Generator(device).manual_seed(1)
    first, second = (
        gumbel_ext.gumbel_argmax(row.expand(2 * ROWS, -1), generator=generator).cpu()
        for _ in range(2)
    )
    assert chi_square(first[0::2] * 7 + first[1::2], pairs) > ALPHA
    assert chi_square(first * 7 + second, pairs) > ALPHA


# ---- the relaxed sample -------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.2, 1.0, 3.0])
def test_soft_sample_of_two_classes_is_logistic(device, tau):
    """``log(y1 / y0) * tau`` is logistic around the difference of the logits (Maddison et al.)."""
    logits = torch.tensor([0.3, -0.5], dtype=torch.float64, device=device).expand(ROWS, 2)
    y = gumbel_ext.gumbel_softmax(logits, tau, rng_state=rng_state(11, 0, device)).cpu()
    difference = tau * (y[:, 1].log() - y[:, 0].log())
    assert stats.kstest(difference.numpy(), "logistic", args=(-0.8, 1)).pvalue > ALPHA


def test_equal_logits_share_the_mass(device):
    """The mean of y is 1/5 for each of five classes: a Bonferroni test at ALPHA over them."""
    logits = torch.zeros(ROWS, 5, dtype=torch.float64, device=device)
    y = gumbel_ext.gumbel_softmax(logits, 1.0, rng_state=rng_state(12, 0, device)).cpu()
    z = (y.mean(0) - 0.2) / (y.std(0) / math.sqrt(ROWS))
    assert (z.abs() < stats.norm.isf(ALPHA / 10)).all()
