"""Samples and means from near one-hot to near uniform, as figure 1 of Jang et al., 1611.01144."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

import gumbel_ext
from benchmarks.environment import rounded
from benchmarks.labels import GUMBEL_EXT
from benchmarks.style import FAINT, GRID, INK, STYLES, heading

SEED = 1611_01144
PROBABILITIES = (0.08, 0.12, 0.30, 0.06, 0.22, 0.15, 0.07)
TAUS = (0.1, 0.5, 1.0, 10.0)
ROWS_SHOWN = 2
MARK = "#E69F00"


def compute(draws: int = 1 << 20) -> dict[str, Any]:
    """Means over ``draws`` rows and the first rows, hard and at each temperature, on one noise."""
    logits = torch.tensor(PROBABILITIES).log().expand(draws, -1)
    columns = []
    for tau in (None, *TAUS):
        y = gumbel_ext.gumbel_softmax(
            logits, tau or 1.0, hard=tau is None, rng_state=torch.tensor([SEED, 0])
        ).double()
        error = y.std(0) / draws**0.5
        columns.append(
            {
                "tau": tau,
                "mean": [rounded(float(value)) for value in y.mean(0)],
                "standard_error": [rounded(float(value)) for value in error],
                "samples": [[rounded(float(v)) for v in row] for row in y[:ROWS_SHOWN]],
            }
        )
    return {"seed": SEED, "draws": draws, "probabilities": PROBABILITIES, "columns": columns}


def draw(data: dict[str, Any]) -> Figure:
    columns = data["columns"]
    rows = ["mean", *(f"sample {i + 1}" for i in range(len(columns[0]["samples"])))]
    figure, panels = plt.subplots(len(rows), len(columns), figsize=(8, 3.7), sharex=True)
    figure.subplots_adjust(left=0.1, right=0.985, top=0.83, bottom=0.1, wspace=0.1, hspace=0.16)
    classes = range(len(data["probabilities"]))
    color = STYLES[GUMBEL_EXT]["color"]
    for i, (column, values) in enumerate(zip(panels.T, columns, strict=True)):
        heights = [values["mean"], *values["samples"]]
        for axes, shown in zip(column, heights, strict=True):
            axes.bar(classes, shown, width=0.72, color=INK if axes is column[0] else color)
            top = 0.5 if axes is column[0] else 1
            axes.set(ylim=(0, 1.04 * top), yticks=(0, top / 2, top))
            axes.set_yticklabels(["0", "", f"{top:g}"] if i == 0 else [])
            axes.set_xticks(classes, [str(c + 1) for c in classes], fontsize=7)
            axes.tick_params(axis="x", length=0)
            axes.grid(axis="y", color=GRID, linewidth=0.7)
            axes.set_axisbelow(True)
        column[0].hlines(
            data["probabilities"],
            [c - 0.46 for c in classes],
            [c + 0.46 for c in classes],
            color=MARK,
            linewidth=1.8,
        )
        name = "hard" if values["tau"] is None else f"τ = {values['tau']:g}"
        column[0].set_title(name, fontsize=10, fontweight="bold", pad=5)
    for axes, row in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(row, labelpad=6)
    heading(
        figure,
        "Samples and their mean",
        "orange: softmax(logits); the samples of a row have the same noise",
    )
    figure.text(0.54, 0.014, "class", ha="center", va="bottom", color=FAINT, fontsize=8)
    return figure
