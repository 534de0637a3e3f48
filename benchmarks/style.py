"""How pictures look: those of the benchmarks and those of docs/figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.labels import (
    ARGMAX,
    COMPILED,
    COMPILED_ARGMAX,
    COPY,
    EAGER,
    GUMBEL_EXT,
    RELAXED,
    SOFTMAX,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from PIL import Image

# Okabe and Ito's palette, which the common forms of colour blindness keep apart; markers and
# dashes say the same again.
INK, FAINT, GRID = "#222222", "#8a8a8a", "#dddddd"
STYLES: dict[str, dict[str, Any]] = {
    EAGER: {"color": "#333333", "marker": "s", "linewidth": 1.3, "markersize": 4},
    ARGMAX: {"color": "#333333", "marker": "s", "linewidth": 1.3, "markersize": 4},
    COMPILED: {"color": "#E69F00", "marker": "^", "linewidth": 1.3, "markersize": 4.5},
    COMPILED_ARGMAX: {"color": "#E69F00", "marker": "^", "linewidth": 1.3, "markersize": 4.5},
    GUMBEL_EXT: {"color": "#0072B2", "marker": "o", "linewidth": 2.4, "markersize": 5.5},
    RELAXED: {"color": "#CC79A7", "marker": "D", "linewidth": 1.3, "markersize": 3.2},
    SOFTMAX: {
        "color": "#CC79A7",
        "marker": "D",
        "linewidth": 1.2,
        "markersize": 3.2,
        "linestyle": (0, (4, 2)),
    },
    COPY: {
        "color": FAINT,
        "marker": "",
        "linewidth": 1.2,
        "linestyle": (0, (1, 1.5)),
    },
}
FONT: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def heading(figure: Any, title: str, note: str = "") -> None:
    """A line on top: what is shown, and on the right how to read it."""
    y = 1 - 0.24 / figure.get_figheight()
    figure.text(0.014, y, title, fontsize=11.5, fontweight="bold", va="baseline")
    figure.text(0.985, y, note, fontsize=8.5, va="baseline", ha="right")


def legend(figure: Any, contenders: Sequence[str], extra: Sequence[Line2D] = ()) -> None:
    """One line below the heading."""
    keys = [Line2D([], [], **STYLES[name], label=name) for name in contenders]
    figure.legend(
        handles=[*keys, *extra],
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.3 / figure.get_figheight()),
        ncols=4,
        frameon=False,
        fontsize=8,
        handlelength=2.6,
        columnspacing=1.4,
    )


def save(figure: Any, path: Path) -> None:
    """Same data, same bytes: no date and no program version inside the file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200, facecolor="white")
    plt.close(figure)
    # A palette holds what few colours and their edges need, in a third of the bytes.
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)
