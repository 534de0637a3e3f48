"""Bias and variance of the estimators against the exact gradient, by enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

import gumbel_ext
from benchmarks.environment import rounded
from benchmarks.style import GRID, heading

SEED = 20265  # of the noise, which all estimators and temperatures share
INPUTS_SEED = 20266  # of the problems
VARIABLES = 4
CLASSES = 4
SIZE = VARIABLES * CLASSES
LEAVE_ONE_OUT_SAMPLES = 4
TAUS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
TABLE_TAUS = (0.1, 0.5, 1.0)

Loss = Callable[[Tensor], Tensor]
"""f: one-hot or other values (..., VARIABLES, CLASSES) -> (...)."""

QUADRATIC, SINUSOIDS, NETWORK = "quadratic", "sinusoids", "network"


@dataclass(frozen=True)
class Problem:
    """A loss of independent categorical variables, whose expectation is to be differentiated."""

    logits: Tensor  # (VARIABLES, CLASSES)
    loss: Loss


def problems() -> dict[str, Problem]:
    """The three, made from ``INPUTS_SEED``."""
    generator = torch.Generator().manual_seed(INPUTS_SEED)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    matrix, vector = normal(SIZE, SIZE), normal(SIZE)

    def quadratic(z: Tensor) -> Tensor:
        z = z.flatten(-2)
        return (F.linear(z, matrix) * z).sum(-1) / 2 + F.linear(z, vector)

    frequencies, phases, weights = 0.5 * normal(6, SIZE), math.pi * normal(6), normal(6)

    def sinusoids(z: Tensor) -> Tensor:
        return F.linear(F.linear(z.flatten(-2), frequencies, phases).sin(), weights)

    hidden, output = normal(16, SIZE), normal(8, 16)
    pixels = torch.randint(2, (8,), generator=generator).float()

    def network(z: Tensor) -> Tensor:
        """-log p(x|z) of a decoder with one hidden layer and eight black or white pixels."""
        scores = F.linear(F.linear(z.flatten(-2), hidden).tanh(), output)
        return (F.softplus(scores) - pixels * scores).sum(-1)

    losses = {QUADRATIC: quadratic, SINUSOIDS: sinusoids, NETWORK: network}
    return {name: Problem(normal(VARIABLES, CLASSES), loss) for name, loss in losses.items()}


def configurations() -> Tensor:
    """All values of the variables: (CLASSES ** VARIABLES, VARIABLES, CLASSES)."""
    index = torch.tensor(list(itertools.product(range(CLASSES), repeat=VARIABLES)))
    return F.one_hot(index, CLASSES).float()


def exact_gradient(problem: Problem) -> Tensor:
    """Of E[f(z)] in the logits, a sum over all values, in float64: (VARIABLES, CLASSES)."""
    logits = problem.logits.double().requires_grad_()
    z = configurations()
    probabilities = (z * logits.log_softmax(-1)).sum((-2, -1)).exp()
    (gradient,) = torch.autograd.grad((probabilities * problem.loss(z)).sum(), logits)
    return gradient


def straight_through(logits: Tensor, rng_state: Tensor) -> Tensor:
    """A sample whose gradient is that of softmax(logits), without noise or temperature."""
    index = gumbel_ext.gumbel_argmax(logits, rng_state=rng_state)
    p = logits.softmax(-1)
    return F.one_hot(index, CLASSES) + (p - p.detach())


def straight_through_gumbel_softmax(logits: Tensor, tau: float, rng_state: Tensor) -> Tensor:
    return gumbel_ext.gumbel_softmax(logits, tau, hard=True, rng_state=rng_state)


def gumbel_rao(k: int) -> Callable[[Tensor, float, Tensor], Tensor]:
    return lambda logits, tau, state: gumbel_ext.gumbel_rao(logits, tau, k, rng_state=state)


STRAIGHT_THROUGH = "straight-through"
GUMBEL_SOFTMAX = "straight-through Gumbel-softmax"
ZGR, REINMAX, GAPPED = "ZGR", "ReinMax", "gapped straight-through"
SCORE_FUNCTION = f"score function, leave-one-out, {LEAVE_ONE_OUT_SAMPLES} samples"
RAO = {k: f"Gumbel-Rao, K = {k}" for k in (1, 10, 100)}

# (logits, tau, rng_state) -> one-hot samples whose gradient is the estimator's.
WITH_TAU: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    GUMBEL_SOFTMAX: straight_through_gumbel_softmax,
    **{name: gumbel_rao(k) for k, name in RAO.items()},
    REINMAX: lambda logits, tau, state: gumbel_ext.reinmax(logits, tau, rng_state=state),
    GAPPED: lambda logits, tau, state: gumbel_ext.gapped_straight_through(
        logits, tau, rng_state=state
    ),
}
# Those without a temperature: (logits, rng_state).
WITHOUT_TAU: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    STRAIGHT_THROUGH: straight_through,
    ZGR: lambda logits, state: gumbel_ext.zgr(logits, rng_state=state),
}


def through_sample(problem: Problem, sample: Callable[[Tensor], Tensor], draws: int) -> Tensor:
    """Gradients of ``draws`` samples of all variables: (draws, VARIABLES, CLASSES)."""
    logits = problem.logits.repeat(draws, 1, 1).requires_grad_()
    (gradients,) = torch.autograd.grad(problem.loss(sample(logits)).sum(), logits)
    return gradients


def score_function(problem: Problem, draws: int, rng_state: Tensor) -> Tensor:
    """(f(z) - b) d log p(z), b the mean loss of the other samples; the mean over the samples."""
    logits = problem.logits.expand(draws, LEAVE_ONE_OUT_SAMPLES, -1, -1)
    z = F.one_hot(gumbel_ext.gumbel_argmax(logits, rng_state=rng_state), CLASSES)
    loss = problem.loss(z.float())
    # f less the mean of the others is f less the mean of all, times n / (n - 1).
    n = LEAVE_ONE_OUT_SAMPLES
    advantage = (loss - loss.mean(-1, keepdim=True)) * n / (n - 1)
    return (advantage[..., None, None] * (z - logits.softmax(-1))).mean(1)


def errors(gradients: Tensor, exact: Tensor) -> dict[str, float]:
    """Bias, standard deviation and root mean squared error, over the norm of the exact gradient.

    The squared norm of the mean's error has the variance over the number of draws taken off, which
    is what it would be without a bias, too. ``resolution`` is the root of that number: a bias of
    its size is not told from none.
    """
    draws = len(gradients)
    gradients = gradients.double()
    size = exact.norm()
    variance = gradients.var(0).sum() / size**2
    squared = (gradients.mean(0) - exact).norm() ** 2 / size**2 - variance / draws
    bias = squared.clamp(min=0)
    return {
        "bias": rounded(float(bias.sqrt())),
        "deviation": rounded(float(variance.sqrt())),
        "rmse": rounded(float((bias + variance).sqrt())),
        "resolution": rounded(float((variance / draws).sqrt())),
    }


def compute(draws: int = 1 << 16, taus: Sequence[float] = TAUS) -> dict[str, Any]:
    """The errors of every estimator on every problem, at every temperature if it has one."""
    state = torch.tensor([SEED, 0])
    results = []
    for problem_name, problem in problems().items():
        exact = exact_gradient(problem)

        def add(
            estimator: str,
            tau: float | None,
            gradients: Tensor,
            problem_name: str = problem_name,
            exact: Tensor = exact,
        ) -> None:
            results.append(
                {
                    "problem": problem_name,
                    "estimator": estimator,
                    "tau": tau,
                    **errors(gradients, exact),
                }
            )

        for estimator, with_tau in WITH_TAU.items():
            for tau in taus:
                sampled = through_sample(
                    problem,
                    lambda logits, sample=with_tau, tau=tau: sample(logits, tau, state),
                    draws,
                )
                add(estimator, tau, sampled)
        for estimator, without in WITHOUT_TAU.items():
            sampled = through_sample(
                problem, lambda logits, sample=without: sample(logits, state), draws
            )
            add(estimator, None, sampled)
        add(SCORE_FUNCTION, None, score_function(problem, draws, state))
    return {
        "seed": SEED,
        "inputs_seed": INPUTS_SEED,
        "draws": draws,
        "variables": VARIABLES,
        "classes": CLASSES,
        "results": results,
    }


# Okabe and Ito's palette, as in style.py. K = 1 has the law of straight-through Gumbel-softmax.
LINES: dict[str, dict[str, Any]] = {
    GUMBEL_SOFTMAX: {"color": "#333333", "marker": "s"},
    RAO[10]: {"color": "#56B4E9", "marker": "o"},
    RAO[100]: {"color": "#0072B2", "marker": "o"},
    REINMAX: {"color": "#D55E00", "marker": "^"},
    GAPPED: {"color": "#009E73", "marker": "v"},
    ZGR: {"color": "#0072B2", "linestyle": (0, (4, 1.5))},
    STRAIGHT_THROUGH: {"color": "#CC79A7", "linestyle": (0, (1, 1.2))},
    SCORE_FUNCTION: {"color": "#E69F00", "linestyle": (0, (5, 1.5, 1, 1.5))},
}
ROWS = {"bias": "bias", "deviation": "standard deviation", "rmse": "root mean squared error"}


def of(data: dict[str, Any], problem: str, estimator: str) -> list[dict[str, Any]]:
    return [
        row for row in data["results"] if (row["problem"], row["estimator"]) == (problem, estimator)
    ]


def draw(data: dict[str, Any]) -> Figure:
    names = list(dict.fromkeys(row["problem"] for row in data["results"]))
    figure, panels = plt.subplots(
        len(ROWS), len(names), figsize=(8, 7.2), sharex=True, sharey="row"
    )
    figure.subplots_adjust(left=0.085, right=0.985, top=0.84, bottom=0.065, wspace=0.07, hspace=0.1)
    taus = sorted({row["tau"] for row in data["results"] if row["tau"] is not None})
    for line, (key, label) in zip(panels, ROWS.items(), strict=True):
        for axes, problem in zip(line, names, strict=True):
            for estimator, style in LINES.items():
                rows = of(data, problem, estimator)
                if rows[0]["tau"] is None:
                    axes.axhline(rows[0][key], linewidth=1.5, **style)
                else:
                    values = [row[key] for row in rows]
                    axes.plot(taus, values, linewidth=1.5, markersize=3.5, **style)
            axes.set_xscale("log")
            axes.grid(color=GRID, linewidth=0.7)
            axes.set_axisbelow(True)
            if key == "bias":
                axes.set_title(problem, fontsize=10, fontweight="bold", loc="left")
                axes.set_ylim(-0.03, 1.03)
            else:
                axes.set_yscale("log")
                axes.set_ylim(0.15, 7)
                axes.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
            axes.minorticks_off()
        line[0].set_ylabel(label)
    panels[0, 0].set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    figure.text(0.535, 0.008, "τ", ha="center", va="bottom")
    heading(figure, "Bias and variance of the gradient", "over the norm of the exact gradient")
    figure.legend(
        handles=[
            Line2D([], [], linewidth=1.5, markersize=4, **style, label=name)
            for name, style in LINES.items()
        ],
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.3 / figure.get_figheight()),
        ncols=3,
        frameon=False,
        fontsize=8,
        handlelength=3,
        columnspacing=1.4,
    )
    return figure


def table(data: dict[str, Any]) -> str:
    """Bias, standard deviation and root mean squared error, each estimator at ``TABLE_TAUS``."""
    names = list(dict.fromkeys(row["problem"] for row in data["results"]))
    estimators = list(dict.fromkeys(row["estimator"] for row in data["results"]))
    lines = [
        f"| | τ | {' | '.join(names)} |",
        f"|---|---:|{'---:|' * len(names)}",
    ]
    for estimator in estimators:
        first = True
        for tau in (None, *TABLE_TAUS):
            rows = [row for name in names for row in of(data, name, estimator) if row["tau"] == tau]
            if rows:
                cells = (
                    f"{row['bias']:.3f}, {row['deviation']:.3g}, {row['rmse']:.3g}" for row in rows
                )
                shown = "" if tau is None else f"{tau:g}"
                lines.append(f"| {estimator if first else ''} | {shown} | {' | '.join(cells)} |")
                first = False
    return "\n".join(lines)
