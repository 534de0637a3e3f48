"""Pictures of docs/ from benchmark results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.labels import (
    ARGMAX,
    COMPILED,
    COMPILED_ARGMAX,
    COPY,
    EAGER,
    GUMBEL_EXT,
    HARD_FORWARD,
    INDEX,
    SOFT_FORWARD,
    SOFTMAX,
)
from benchmarks.results import CAPABILITY_NAMES, Result, asked_shape
from benchmarks.style import FAINT, FONT, GRID, STYLES, heading, save
from benchmarks.tables import Times, shape_text

STEP_STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "#0072B2", "marker": "o"},
    "second": {"color": "#56B4E9", "marker": "s", "linestyle": "--"},
    "theirs": {"color": "#333333", "marker": "^"},
}


def draw_panel(axes: Axes, result: Result, op: str, peer: str, title: str) -> None:
    order = [COPY, SOFTMAX, COMPILED, COMPILED_ARGMAX, peer, GUMBEL_EXT]
    for contender in order:
        found = [(i, result.find(op, contender, shape)) for i, shape in enumerate(result.shapes)]
        points = [(i, row["median_ns_per_element"]) for i, row in found if row is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), **STYLES[contender], zorder=order.index(contender)
            )
    for i, shape in enumerate(result.shapes):
        ours, theirs = result.find(op, GUMBEL_EXT, shape), result.find(op, peer, shape)
        if ours is None or theirs is None:
            continue
        ratio = theirs["time_over_baseline"]["median"]
        axes.annotate(
            f"{ratio:.0f}x" if ratio >= 9.5 else f"{ratio:.1f}x",
            (i, ours["median_ns_per_element"]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            fontweight="bold",
            color=STYLES[GUMBEL_EXT]["color"],
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=len(order),
        )
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left", pad=6)
    axes.set_yscale("log")
    axes.set_xlim(-0.4, len(result.shapes) - 0.6)
    # The rows of a GPU's shapes only keep it busy: there is no room to say how many.
    labels = [
        f"{columns}" if result.on_gpu else f"{rows}\nx\n{columns}"
        for rows, columns in result.shapes
    ]
    axes.set_xticks(
        range(len(labels)), labels, fontsize=6 if result.on_gpu else 7, linespacing=0.95
    )
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def speed_picture(result: Result, path: Path) -> None:
    with plt.rc_context(FONT):
        figure, panels = plt.subplots(1, 3, figsize=(8, 4.3), sharey=True)
        figure.subplots_adjust(left=0.075, right=0.985, top=0.755, bottom=0.19, wspace=0.08)
        draw_panel(panels[0], result, SOFT_FORWARD, EAGER, "soft")
        draw_panel(panels[1], result, HARD_FORWARD, EAGER, "hard (straight-through)")
        draw_panel(panels[2], result, INDEX, ARGMAX, "index only")
        times = [row["median_ns_per_element"] for row in result.speed_rows()]
        first = panels[0]
        first.set_ylim(min(times) / 1.5, max(times) * 2)
        first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        first.yaxis.set_minor_formatter(NullFormatter())
        first.set_ylabel("nanoseconds per element (log)")
        where = "classes of float32 logits" if result.on_gpu else "logits, float32: rows x classes"
        panels[1].set_xlabel(where, labelpad=5)

        names = {
            EAGER: "PyTorch: F.gumbel_softmax, argmax(logits + noise)",
            COMPILED: "torch.compile(F.gumbel_softmax)",
            GUMBEL_EXT: "gumbel_ext",
            SOFTMAX: "F.softmax, no noise",
            COPY: "copying as many bytes" if result.on_gpu else "copying the logits",
        }
        keys = [Line2D([], [], **STYLES[name], label=text) for name, text in names.items()]
        keys = [keys[2], keys[0], keys[1], keys[3], keys[4]]  # filled column by column
        figure.legend(
            handles=keys,
            loc="upper left",
            bbox_to_anchor=(0.004, 0.935),
            ncols=3,
            frameon=False,
            fontsize=8,
            handlelength=2.6,
            columnspacing=1.4,
        )
        heading(
            figure,
            "Gumbel-softmax on a GPU" if result.on_gpu else "Gumbel-softmax on the CPU",
            "lower is better; numbers: times faster than PyTorch",
        )
        figure.text(
            0.985,
            0.014,
            result.machine(CAPABILITY_NAMES.get(result.capability, result.capability)),
            fontsize=7,
            color=FAINT,
            ha="right",
        )
        save(figure, path)


def memory_picture(result: Result, path: Path) -> None:
    shape = [16384, 1024] if result.on_gpu else [4096, 1024]
    wanted = [
        row for row in result.memory_rows if asked_shape(row) == shape and row["dtype"] == "float32"
    ]
    if not wanted:
        return
    order = [GUMBEL_EXT, COMPILED, EAGER]
    with plt.rc_context(FONT):
        figure, panels = plt.subplots(1, 2, figsize=(8, 2.2), sharex=True, sharey=True)
        figure.subplots_adjust(left=0.262, right=0.985, top=0.74, bottom=0.24, wspace=0.08)
        for axes, op in zip(panels, ("soft", "hard"), strict=True):
            rows = {r["contender"]: r for r in wanted if r["op"] == f"{op} forward+backward"}
            present = [name for name in order if name in rows]
            peaks = [rows[name]["allocator_peak_bytes_per_element"] for name in present]
            colors = [STYLES[name]["color"] for name in present]
            places = [order.index(name) for name in present]
            axes.barh(places, peaks, height=0.6, color=colors)
            for place, peak in zip(places, peaks, strict=True):
                axes.annotate(
                    f"{peak:.1f}",
                    (peak, place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontweight="bold",
                )
            axes.axvline(8, color=FAINT, linewidth=1.1, linestyle=(0, (3, 2)), zorder=3)
            title = "soft" if op == "soft" else "hard (straight-through)"
            axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
            axes.set_xlim(0, max(r["allocator_peak_bytes_per_element"] for r in wanted) * 1.15)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        panels[0].set_yticks(range(len(order)), order, fontsize=8)
        panels[0].invert_yaxis()
        panels[0].set_xlabel("bytes per element")
        panels[1].set_xlabel("dashed: output and gradient alone, 8 bytes")
        figure.text(
            0.014,
            0.91,
            f"Peak memory of one forward and backward, float32 logits {shape_text(shape)}",
            fontsize=10.5,
            fontweight="bold",
        )
        save(figure, path)


def times_picture(result: Result, times: Times, path: Path) -> None:
    with plt.rc_context(FONT):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        figure.subplots_adjust(left=0.1, right=0.985, top=0.9, bottom=0.18)
        names = result.contenders
        for name, style in zip(names, times.styles, strict=True):
            rows = result.of_contender(name)
            classes = [row["classes"] for row in rows]
            milliseconds = [row["milliseconds_per_step"]["median"] for row in rows]
            axes.plot(
                classes, milliseconds, label=name, linewidth=2, markersize=5, **STEP_STYLES[style]
            )
        for row in result.of_contender(times.compared):
            axes.annotate(
                f"{row['time_over_baseline']['median']:.2g}x",
                (row["classes"], row["milliseconds_per_step"]["median"]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.3)
        axes.set_xticks(classes, [str(each) for each in classes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(times.classes_axis)
        axes.set_ylabel("milliseconds a training step (log)")
        axes.grid(color=GRID, linewidth=0.6)
        axes.legend(frameon=False, loc="upper left")
        heading(figure, times.heading, f"numbers: time over {names[0].split(', ')[-1]}")
        figure.text(0.985, 0.014, result.machine(), ha="right", fontsize=7, color=FAINT)
        save(figure, path)


def vae_picture(document: dict[str, Any], path: Path) -> None:
    """Mean and standard deviation of every estimator, and its seeds as small points."""
    names = list(document["rows"])
    columns = {"test_nats": "test images", "train_nats": "training images"}
    with plt.rc_context(FONT):
        figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), sharex=True, sharey=True)
        figure.subplots_adjust(left=0.33, right=0.985, top=0.83, bottom=0.13, wspace=0.06)
        for axes, (key, title) in zip(panels, columns.items(), strict=True):
            for place, name in enumerate(names):
                values = document["rows"][name][key]
                axes.plot(values, [place + 0.22] * len(values), ".", color=FAINT, markersize=3.5)
                axes.errorbar(
                    statistics.fmean(values),
                    place,
                    xerr=statistics.stdev(values) if len(values) > 1 else None,
                    color=STEP_STYLES["ours"]["color"],
                    marker="o",
                    markersize=5,
                    capsize=3,
                )
            axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
            axes.grid(color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        figure.text(0.66, 0.014, "negative ELBO, nats", ha="center", va="bottom")
        seeds = len(document["settings"]["seeds"])
        heading(
            figure,
            "The bound of the discrete model, by estimator",
            f"mean ± standard deviation of {seeds} seeds (grey)",
        )
        save(figure, path)


# Drawn from the result of an example: its name -> function and file.
EXAMPLES: dict[str, tuple[Callable[[dict[str, Any], Path], None], str]] = {
    "vae_estimators": (vae_picture, "vae-estimators.png")
}
