"""How far the tail of the Gumbel noise reaches that samplers draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions.utils import clamp_probs

import gumbel_ext
from benchmarks.environment import rounded
from benchmarks.labels import COMPILED, EAGER, GUMBEL_EXT, RELAXED
from benchmarks.style import FAINT, GRID, STYLES, heading, legend

SEED = 20261
DTYPES = ("float32", "bfloat16", "float16")
CHUNK = 1 << 22
FEWEST = 3  # draws that a point of the picture stands for
FIRST, LAST = 3, 31  # the survival probabilities 2^-3 ... 2^-31, by halves

# One noise serves every dtype of gumbel_ext. Drawing it is quick, which pays for more of it.
CALLS = {GUMBEL_EXT: 1 << 9, EAGER: 1 << 6, COMPILED: 1 << 6, RELAXED: 1 << 6}


def levels() -> Tensor:
    """X with P(G > x) = 2^-k for k from FIRST to LAST by halves, float64."""
    k = torch.arange(2 * FIRST, 2 * LAST + 1, dtype=torch.float64) / 2
    return -torch.log(-torch.log1p(-torch.exp2(-k)))


def eager_noise(like: Tensor) -> Tensor:
    """As F.gumbel_softmax draws it, rounded as there."""
    return -torch.empty_like(like).exponential_().log()


def relaxed_noise(like: Tensor) -> Tensor:
    """As torch.distributions.RelaxedOneHotCategorical draws it."""
    uniform = clamp_probs(torch.rand(like.shape, dtype=like.dtype))
    return -((-(uniform.log())).log())


def sampler(contender: str) -> Callable[[Tensor], Tensor]:
    if contender == GUMBEL_EXT:
        return lambda like: gumbel_ext.gumbel_noise(like.shape, dtype=torch.float32)
    if contender == COMPILED:
        # The compiled F.gumbel_softmax keeps the noise in float32, as here.
        return torch.compile(lambda like: eager_noise(like).float())
    return eager_noise if contender == EAGER else relaxed_noise


def tail(draw_noise: Callable[[Tensor], Tensor], dtype: str, calls: int) -> dict[str, Any]:
    """How many of ``calls * CHUNK`` draws exceed each level, and the largest finite one."""
    limits = levels()
    like = torch.zeros(CHUNK, dtype=getattr(torch, dtype))
    bins = torch.zeros(len(limits) + 1, dtype=torch.int64)
    largest, infinite = -math.inf, 0
    torch.manual_seed(SEED)
    for _ in range(calls):
        noise = draw_noise(like)
        large = noise[noise > float(limits[0])].double()
        bins += torch.bincount(torch.bucketize(large, limits), minlength=len(limits) + 1)
        finite = large[large < math.inf]
        infinite += len(large) - len(finite)
        largest = max(largest, float(finite.max()))
    above = bins.flip(0).cumsum(0).flip(0)[1:]
    return {
        "dtype": dtype,
        "draws": calls * CHUNK,
        "above": above.tolist(),
        "largest_finite": rounded(largest),
        "infinite": infinite,
    }


def compute(calls: dict[str, int] | None = None, dtypes: Sequence[str] = DTYPES) -> dict[str, Any]:
    """Counts of draws above each level, for each contender and dtype."""
    results = []
    for contender, number in (calls or CALLS).items():
        for dtype in dtypes[:1] if contender == GUMBEL_EXT else dtypes:
            draw_noise = sampler(contender)
            results.append({"contender": contender, **tail(draw_noise, dtype, number)})
    return {
        "seed": SEED,
        "levels": [round(float(level), 5) for level in levels()],
        "exact_survival_log2": [-k / 2 for k in range(2 * FIRST, 2 * LAST + 1)],
        "results": results,
    }


def draw(data: dict[str, Any]) -> Figure:
    figure, panels = plt.subplots(1, len(DTYPES), figsize=(8, 3.9), sharex=True, sharey=True)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.775, bottom=0.125, wspace=0.08)
    x = data["levels"]
    exact = [2.0**power for power in data["exact_survival_log2"]]
    floor = exact[-1]
    for axes, dtype in zip(panels, DTYPES, strict=True):
        axes.plot(x, exact, color=FAINT, linewidth=1.1, linestyle=(0, (3, 2)))
        for result in data["results"]:
            name = result["contender"]
            if name != GUMBEL_EXT and result["dtype"] != dtype:
                continue
            points = [
                (level, count / result["draws"])
                for level, count in zip(x, result["above"], strict=True)
                if count >= FEWEST
            ]
            # The line ends where the draws do, unless they should have gone on: then it falls.
            end = len(points)
            if end < len(x) and exact[end] * result["draws"] > 3 * FEWEST:
                points.append((result["largest_finite"], floor))
            elif result["infinite"]:
                axes.annotate(
                    "infinite",
                    points[-1],
                    xytext=(-1, 4),
                    textcoords="offset points",
                    ha="right",
                    fontsize=8,
                )
            order = list(CALLS).index(name)
            style = {**STYLES[name], "markevery": (2 * order, 8)}
            axes.plot(*zip(*points, strict=True), **style, zorder=3 + order)
        axes.set_title(dtype, fontsize=10, fontweight="bold", loc="left")
        axes.set_yscale("log", base=2)
        axes.set_yticks([2.0**-k for k in range(5, LAST, 5)])
        axes.set(ylim=(floor, 2.0**-FIRST), xlim=(x[0], x[-1]))
        axes.minorticks_off()
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel("x")
        axes.set_xticks(range(5, 22, 5))
    panels[0].set_ylabel("share of the noise above x")
    heading(figure, "The tail of the noise", "dashed: exact; a line that falls: no noise beyond")
    legend(figure, [GUMBEL_EXT, EAGER, COMPILED, RELAXED])
    return figure
