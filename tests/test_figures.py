"""The numbers behind docs/figures.md say what its captions say; pictures are not compared."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.distributions import RelaxedOneHotCategorical

import gumbel_ext

pytestmark = pytest.mark.cpu_only(reason="the pictures compare samplers on the CPU")

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
NAMES = ("samples", "class_bias", "noise_tail", "gradient_error", "estimator_error")
OURS, EAGER, RELAXED = "gumbel_ext", "F.gumbel_softmax", "RelaxedOneHotCategorical"

# Of a whole test, at a random seed; the seeds are fixed.
ALPHA = 1e-4


@pytest.fixture(scope="module")
def module():
    """Imports a file of docs/figures, as ``draw.py`` there does."""
    before = list(sys.path)
    sys.path[:0] = [str(FIGURES), str(FIGURES.parents[1])]
    pytest.importorskip("matplotlib")
    yield importlib.import_module
    sys.path[:] = before


def by(results, *keys):
    return {tuple(result[key] for key in keys): result for result in results}


def test_samples_go_from_one_hot_to_uniform(module):
    samples = module("samples")
    data = samples.compute(draws=1 << 14)
    hard, *soft = data["columns"]
    limit = stats.norm.isf(ALPHA / 2 / len(samples.PROBABILITIES))
    for mean, error, exact in zip(
        hard["mean"], hard["standard_error"], samples.PROBABILITIES, strict=True
    ):
        assert abs(mean - exact) < limit * error + 1e-4  # the last digit kept
    assert [column["tau"] for column in soft] == sorted(samples.TAUS)
    for i in range(samples.ROWS_SHOWN):
        # The same noise, so the same winner; and the larger tau, the smaller its share.
        chosen = hard["samples"][i].index(1)
        shares = [column["samples"][i][chosen] for column in soft]
        assert all(max(column["samples"][i]) == s for column, s in zip(soft, shares, strict=True))
        assert shares == sorted(shares, reverse=True)
    peaks = [max(column["mean"]) for column in soft]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] - 1 / len(samples.PROBABILITIES) < 0.02


def test_eager_prefers_low_classes_and_we_do_not(module):
    """Eight equal classes; eager's excess in bfloat16 is seen with 2^19 rows at z > 12."""
    class_bias = module("class_bias")
    data = class_bias.compute(calls=1, contenders=(OURS, EAGER))
    found = by(data["results"], "dtype", "contender")
    for dtype in class_bias.DTYPES:
        ours = found[dtype, OURS]
        assert ours["p_value"] > ALPHA / len(class_bias.DTYPES)
        assert ours["rows_without_class"] == 0
        assert stats.chi2.sf(ours["chi_square"], data["degrees_of_freedom"]) == pytest.approx(
            ours["p_value"], rel=0.01
        )
    eager = found["bfloat16", EAGER]
    assert eager["p_value"] < 1e-20
    assert eager["counts"][0] > 1.02 * data["rows"] / data["classes"]
    assert eager["counts"][-1] < 0.98 * data["rows"] / data["classes"]


def test_tails_end_where_the_picture_says(module):
    noise_tail = module("noise_tail")
    data = noise_tail.compute({OURS: 1, EAGER: 1, RELAXED: 1})
    assert stats.gumbel_r.sf(data["levels"]) == pytest.approx(
        [2.0**power for power in data["exact_survival_log2"]], rel=1e-4
    )
    found = by(data["results"], "contender", "dtype")
    expected = [2.0**power * noise_tail.CHUNK for power in data["exact_survival_log2"]]
    for key in ((OURS, "float32"), (EAGER, "float32")):
        for count, mean in zip(found[key]["above"], expected, strict=True):
            low, high = stats.poisson.interval(1 - ALPHA / len(expected), mean)
            assert low <= count <= high
    for dtype, largest in (("bfloat16", 5), ("float16", 7)):
        result = found[RELAXED, dtype]
        assert result["largest_finite"] < largest
        beyond = [i for i, level in enumerate(data["levels"]) if level >= largest]
        assert expected[beyond[0]] > 1000
        assert all(result["above"][i] == 0 for i in beyond)


def test_a_class_that_the_truncated_noise_never_draws():
    """Due 393 times; the page says 0."""
    logits = torch.tensor([6.5, 0.0], dtype=torch.bfloat16)
    tau = torch.tensor(1.0, dtype=torch.bfloat16)
    relaxed = RelaxedOneHotCategorical(tau, logits=logits, validate_args=False)
    draws = 1 << 18
    assert (relaxed.sample((draws,)).argmax(-1) == 0).all()
    low, high = stats.poisson.interval(1 - ALPHA, draws / (1 + math.exp(6.5)))
    assert low <= gumbel_ext.gumbel_argmax(logits.expand(draws, 2)).sum() <= high


def test_a_noise_beyond_every_number_is_counted(module):
    noise_tail = module("noise_tail")
    noise = torch.zeros(noise_tail.CHUNK)
    noise[:5] = torch.tensor([2.0, 3.0, 30.0, float("inf"), float("inf")])
    result = noise_tail.tail(lambda like: noise, "float32", 2)
    assert result["above"][0] == 2 * 4  # the first level is 2.01
    assert result["above"][-1] == 2 * 3
    assert (result["infinite"], result["largest_finite"]) == (4, 30)


def test_eagers_gradient_is_lost_at_low_temperature_and_ours_is_not(module):
    gradient_error = module("gradient_error")
    data = gradient_error.compute(rows=4096, dtypes=("float32", "bfloat16"))
    found = by(data["results"], "dtype", "form", "tau", "contender")
    assert len(found) == 2 * 2 * len(gradient_error.TAUS) * 2
    for (dtype, form, tau, contender), row in found.items():
        assert row["rows_counted"] > data["rows"] / 4
        if contender == OURS:
            eps, eps32 = torch.finfo(getattr(torch, dtype)).eps, torch.finfo(torch.float32).eps
            # Logits and noise of a row seldom exceed 4 and 10: K = 1 + 14 / tau.
            assert row["p999"] <= 4 * eps + 16 * (1 + 14 / tau) * eps32
            assert 0 < row["median"] < row["p999"]
            # Underflow is a matter of logits and noise. Were these not independent, as numbers from
            # one seed are not, it would show here.
            rows, other = data["rows"], found[dtype, form, tau, EAGER]["rows_counted"]
            share = (row["rows_counted"] + other) / (2 * rows)
            spread = (2 * rows * share * (1 - share)) ** 0.5
            comparisons = 2 * len(gradient_error.TAUS)
            limit = stats.norm.isf(ALPHA / 2 / comparisons)
            assert abs(row["rows_counted"] - other) <= max(limit * spread, 6)
    for form in gradient_error.FORMS:
        assert found["bfloat16", form, 0.1, EAGER]["median"] > 0.1
        for dtype in ("float32", "bfloat16"):
            assert found[dtype, form, 0.01, EAGER]["median"] > 0.8
            # Where eager is right both are: the comparison is with the same function.
            assert (
                found[dtype, form, 10.0, EAGER]["p999"] < 4 * torch.finfo(getattr(torch, dtype)).eps
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_eagers_noise_is_the_one_it_draws(module, dtype):
    """Otherwise the picture would blame it for an error that is not its own."""
    gradient_error = module("gradient_error")
    logits = torch.randn(64, 10).to(dtype)
    noise = gradient_error.eager_noise(logits)
    torch.manual_seed(gradient_error.SEED)
    assert torch.equal(((logits + noise) / 0.5).softmax(-1), F.gumbel_softmax(logits, 0.5))


@pytest.fixture(scope="module")
def estimator_errors(module):
    """By problem, estimator and temperature, of 2^13 draws: bias, deviation, resolution."""
    data = module("estimator_error").compute(draws=1 << 13, taus=(0.5, 1.0))
    return by(data["results"], "problem", "estimator", "tau")


def unbiased(row):
    """The squared error of the mean is 17 times its expectation once in 27,000, or less often."""
    return row["bias"] <= 4 * row["resolution"]


def test_which_estimators_have_no_bias(module, estimator_errors):
    """The score function, wherever the exact gradient is right; ReinMax and ZGR on quadratics."""
    e = module("estimator_error")
    for problem in (e.QUADRATIC, e.SINUSOIDS, e.NETWORK):
        for name in (*e.WITH_TAU, *e.WITHOUT_TAU, e.SCORE_FUNCTION):
            row = estimator_errors[problem, name, 1.0 if name in e.WITH_TAU else None]
            none = name == e.SCORE_FUNCTION
            none |= problem == e.QUADRATIC and name in (e.REINMAX, e.ZGR)
            assert unbiased(row) == none, (problem, name)
        assert not unbiased(estimator_errors[problem, e.REINMAX, 0.5])


def test_reinmax_at_temperature_1_is_zgr(module, estimator_errors):
    e = module("estimator_error")
    for problem in (e.QUADRATIC, e.SINUSOIDS, e.NETWORK):
        reinmax, zgr = (
            estimator_errors[problem, e.REINMAX, 1.0],
            estimator_errors[problem, e.ZGR, None],
        )
        assert reinmax["deviation"] == pytest.approx(zgr["deviation"], rel=1e-3)
        assert reinmax["bias"] == pytest.approx(zgr["bias"], rel=1e-3, abs=1e-3)


def test_gumbel_rao_has_one_bias_and_a_variance_that_falls_with_k(module, estimator_errors):
    """var = E[var(straight-through | D)] / K + var(Rao), so that two values of K give the third."""
    e = module("estimator_error")
    for problem in (e.QUADRATIC, e.SINUSOIDS, e.NETWORK):
        for tau in (0.5, 1.0):
            through = estimator_errors[problem, e.GUMBEL_SOFTMAX, tau]
            k1, k10, k100 = (estimator_errors[problem, e.RAO[k], tau] for k in (1, 10, 100))
            for row in (k1, k10, k100):
                # Of the norm of a vector of errors; the means of two are compared.
                limit = 4 * (row["resolution"] + through["resolution"])
                assert abs(row["bias"] - through["bias"]) < limit
            # Four standard errors of a deviation, where the kurtosis of the errors is 10.
            assert k1["deviation"] == pytest.approx(through["deviation"], rel=0.066)
            one, ten, hundred = (row["deviation"] ** 2 for row in (k1, k10, k100))
            assert one > ten > hundred
            rao = (10 * ten - one) / 9
            assert (one - rao) / 100 + rao == pytest.approx(hundred, rel=0.05)


def test_the_mean_of_straight_through_is_the_enumerated_one(module):
    """Of an estimator that is a function of the discrete sample, the mean is a sum."""
    e = module("estimator_error")
    draws = 1 << 13
    for problem in e.problems().values():
        z = e.configurations().requires_grad_()
        (slope,) = torch.autograd.grad(problem.loss(z).sum(), z)
        p = problem.logits.softmax(-1)
        probability = (z * p).sum(-1).prod(-1)
        through = p * (slope - (p * slope).sum(-1, keepdim=True))
        expected = (probability[:, None, None] * through).sum(0)
        state = torch.tensor([7, 0])
        sampled = e.through_sample(problem, lambda x, s=state: e.straight_through(x, s), draws)
        error = sampled.std(0) / math.sqrt(draws)
        # 48 numbers at alpha = 1e-4 in all: 4.9 standard errors.
        assert ((sampled.mean(0) - expected).abs() <= 4.9 * error + 1e-6).all()


def test_the_table_of_the_page_is_that_of_the_numbers(module):
    draw = module("draw")
    text = draw.PAGE.read_text(encoding="utf-8")
    for name in NAMES:
        data = json.loads((FIGURES / f"{name}.json").read_text())
        assert draw.with_table(text, name, data) == text
    data["results"][-1]["bias"] = 0.125
    assert draw.with_table(text, name, data) != text


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_kept_draw_the_picture(module, name, tmp_path, monkeypatch):
    draw = module("draw")
    assert tuple(draw.FIGURES) == NAMES
    assert (FIGURES / f"{name}.png").stat().st_size < 150_000
    data = json.loads((FIGURES / f"{name}.json").read_text())
    assert data["seed"] == draw.FIGURES[name].SEED
    assert set(data["versions"]) == set(draw.provenance()["versions"])
    (tmp_path / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setattr(sys, "argv", ["draw.py", name, "--redraw", "--out", str(tmp_path)])
    draw.main()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
