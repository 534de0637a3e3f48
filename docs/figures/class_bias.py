"""How often each of equally likely classes is drawn in half precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import gumbel_ext
from benchmarks.environment import rounded
from benchmarks.labels import COMPILED, EAGER, GUMBEL_EXT
from benchmarks.style import GRID, INK, STYLES, heading, legend

SEED = 20260
CLASSES = 8
TAU = 10.0
CHUNK = 1 << 19  # rows of one call
DTYPES = ("bfloat16", "float16")


def sampler(contender: str) -> Callable[..., Tensor]:
    if contender == GUMBEL_EXT:
        return gumbel_ext.gumbel_softmax
    return F.gumbel_softmax if contender == EAGER else torch.compile(F.gumbel_softmax)


def compute(
    calls: int = 16, contenders: Sequence[str] = (GUMBEL_EXT, EAGER, COMPILED)
) -> dict[str, Any]:
    """Counts of the classes of one-hot samples of zero logits, and their chi-square test."""
    results = []
    for dtype in DTYPES:
        logits = torch.zeros(CHUNK, CLASSES, dtype=getattr(torch, dtype))
        for contender in contenders:
            sample = sampler(contender)
            torch.manual_seed(SEED)
            counts = torch.zeros(CLASSES, dtype=torch.int64)
            for _ in range(calls):
                # A NaN row is no class: the comparison is False.
                counts += (sample(logits, tau=TAU, hard=True) == 1).sum(0)
            expected = int(counts.sum()) / CLASSES
            chi2 = float(((counts - expected) ** 2 / expected).sum())
            results.append(
                {
                    "dtype": dtype,
                    "contender": contender,
                    "counts": counts.tolist(),
                    "rows_without_class": calls * CHUNK - int(counts.sum()),
                    "chi_square": rounded(chi2),
                    "p_value": rounded(
                        float(
                            torch.special.gammaincc(
                                torch.tensor((CLASSES - 1) / 2, dtype=torch.float64),
                                torch.tensor(chi2 / 2, dtype=torch.float64),
                            )
                        )
                    ),
                }
            )
    return {
        "seed": SEED,
        "rows": calls * CHUNK,
        "classes": CLASSES,
        "tau": TAU,
        "degrees_of_freedom": CLASSES - 1,
        "results": results,
    }


def draw(data: dict[str, Any]) -> Figure:
    figure, panels = plt.subplots(1, len(DTYPES), figsize=(8, 3.3), sharey=True)
    figure.subplots_adjust(left=0.085, right=0.985, top=0.735, bottom=0.14, wspace=0.06)
    classes, rows = data["classes"], data["rows"]
    share = 1 / classes
    band = 300 * ((1 - share) / (share * rows)) ** 0.5
    contenders = list(dict.fromkeys(result["contender"] for result in data["results"]))
    for axes, dtype in zip(panels, DTYPES, strict=True):
        axes.axhline(0, color=INK, linewidth=0.8)
        for result in data["results"]:
            if result["dtype"] != dtype:
                continue
            name = result["contender"]
            shift = 0.12 * (contenders.index(name) - 1)
            excess = [100 * (count / rows / share - 1) for count in result["counts"]]
            style = {**STYLES[name], "linewidth": 0.9}
            axes.errorbar([i + 1 + shift for i in range(classes)], excess, yerr=band, **style)
        tests = [result for result in data["results"] if result["dtype"] == dtype]
        for i, result in enumerate(tests):
            axes.text(
                0.99,
                0.97 - 0.09 * i,
                f"χ² = {result['chi_square']:,.0f}",
                color=STYLES[result["contender"]]["color"],
                fontweight="bold",
                transform=axes.transAxes,
                ha="right",
                va="top",
            )
        axes.set_title(dtype, fontsize=10, fontweight="bold", loc="left")
        axes.set_xticks(range(1, classes + 1))
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel("class")
    panels[0].set_ylabel("frequency against 1/8, %")
    heading(
        figure,
        f"{classes} equal classes, hard samples at τ = {data['tau']:g}",
        f"{rows / 1e6:.1f} million rows each; bars: 3 standard errors",
    )
    legend(figure, contenders)
    return figure
