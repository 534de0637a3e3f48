"""Error of the gradient against the temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

import gumbel_ext
from benchmarks.environment import rounded
from benchmarks.labels import EAGER, GUMBEL_EXT
from benchmarks.style import FAINT, GRID, INK, STYLES, heading, legend
from gumbel_ext import _reference

SEED = 20262  # of the noise
INPUTS_SEED = 20263  # another one: from the same, logits and eager's noise are the same numbers
CLASSES = 10
DTYPES = ("float32", "bfloat16", "float16")
TAUS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
FORMS = ("soft", "hard")
DASHES = (0, (3, 1.5))


def gradient_of(function: Callable[[Tensor], Tensor], logits: Tensor, grad: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(logits), logits, grad)
    return gradient


def exact_gradient(logits: Tensor, tau: float, noise: Tensor, grad: Tensor) -> Tensor:
    """In float64, from the values that logits, noise and incoming gradient really have.

    That of the soft sample, which is also that of the straight-through one.
    """
    return gradient_of(
        lambda x: _reference.gumbel_softmax(x, tau, noise=noise.double())[0],
        logits.double(),
        grad.double(),
    )


def gumbel_ext_gradient(logits: Tensor, tau: float, hard: bool, grad: Tensor) -> Tensor:
    state = torch.tensor([SEED, 0])
    return gradient_of(
        lambda x: gumbel_ext.gumbel_softmax(x, tau, hard, rng_state=state), logits, grad
    )


def eager_noise(logits: Tensor) -> Tensor:
    """The noise that F.gumbel_softmax draws after the same seed, in its dtype."""
    torch.manual_seed(SEED)
    return -torch.empty_like(logits).exponential_().log()


def eager_gradient(logits: Tensor, tau: float, hard: bool, grad: Tensor) -> Tensor:
    torch.manual_seed(SEED)
    return gradient_of(lambda x: F.gumbel_softmax(x, tau, hard), logits, grad)


def row_errors(gradient: Tensor, exact: Tensor, tau: float, grad: Tensor) -> Tensor:
    """Largest error of a row over its largest entry, of rows that do not underflow.

    Those are left out whose exact gradient, or the probabilities it is a product of, come near the
    smallest number that ``gradient``'s dtype holds in full: 2^-14 in float16, whose subnormal
    numbers both sides keep, and 2^-100 elsewhere, as float32 arithmetic may take them for 0.
    """
    size = exact.abs().amax(-1)
    smallest = max(torch.finfo(gradient.dtype).tiny, 2.0**-100)
    counted = size > smallest * (1 + 2 * grad.double().abs().amax(-1) / tau)
    return ((gradient.double() - exact).abs().amax(-1) / size)[counted]


def compute(rows: int = 1 << 16, dtypes: Sequence[str] = DTYPES) -> dict[str, Any]:
    """Median and 99.9th percentile of the row error, for both forms and contenders."""
    generator = torch.Generator().manual_seed(INPUTS_SEED)
    drawn = torch.randn(2, rows, CLASSES, dtype=torch.float64, generator=generator)
    ours = _reference.gumbel_noise((rows, CLASSES), torch.tensor([SEED, 0]))
    results = []
    for dtype in dtypes:
        logits, grad = drawn.to(getattr(torch, dtype))
        theirs = eager_noise(logits)
        for tau in TAUS:
            for contender, noise, gradient in (
                (GUMBEL_EXT, ours, gumbel_ext_gradient),
                (EAGER, theirs, eager_gradient),
            ):
                exact = exact_gradient(logits, tau, noise, grad)
                for form in FORMS:
                    error = row_errors(
                        gradient(logits, tau, form == "hard", grad), exact, tau, grad
                    )
                    results.append(
                        {
                            "dtype": dtype,
                            "form": form,
                            "tau": tau,
                            "contender": contender,
                            "median": rounded(float(error.median())),
                            "p999": rounded(float(error.quantile(0.999))),
                            "rows_counted": len(error),
                        }
                    )
    return {
        "seed": SEED,
        "inputs_seed": INPUTS_SEED,
        "rows": rows,
        "classes": CLASSES,
        "results": results,
    }


def draw(data: dict[str, Any]) -> Figure:
    figure, panels = plt.subplots(len(FORMS), len(DTYPES), figsize=(8, 5), sharex=True, sharey=True)
    figure.subplots_adjust(left=0.08, right=0.985, top=0.83, bottom=0.09, wspace=0.06, hspace=0.12)
    for i, form in enumerate(FORMS):
        for axes, dtype in zip(panels[i], DTYPES, strict=True):
            for name in (EAGER, GUMBEL_EXT):
                rows = [
                    row
                    for row in data["results"]
                    if (row["dtype"], row["form"], row["contender"]) == (dtype, form, name)
                ]
                taus = [row["tau"] for row in rows]
                style = STYLES[name]
                axes.plot(taus, [row["median"] for row in rows], **style)
                dashed = {**style, "linestyle": DASHES, "linewidth": 1.1, "markersize": 3}
                axes.plot(taus, [row["p999"] for row in rows], **dashed)
            unit = torch.finfo(getattr(torch, dtype)).eps / 2
            axes.axhline(unit, color=FAINT, linewidth=1.1, linestyle=(0, (1, 1.5)))
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(color=GRID, linewidth=0.7)
            axes.set_axisbelow(True)
            axes.minorticks_off()
            if i == 0:
                axes.set_title(dtype, fontsize=10, fontweight="bold", loc="left")
        panels[i, 0].set_ylabel(f"{form}: error of a row")
    panels[0, 0].set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    figure.text(0.535, 0.014, "τ", ha="center", va="bottom")
    heading(
        figure,
        "Error of the gradient",
        "relative to the row's largest entry; dotted: unit roundoff",
    )
    keys = [
        Line2D([], [], color=INK, linewidth=1.3, label="median"),
        Line2D(
            [], [], color=INK, linewidth=1.1, linestyle=(0, (3, 1.5)), label="99.9th percentile"
        ),
    ]
    legend(figure, [GUMBEL_EXT, EAGER], extra=keys)
    return figure
