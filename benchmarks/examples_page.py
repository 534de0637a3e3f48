"""Tables and pictures of docs/examples.md from the examples' results; reads nothing else.

python benchmarks/examples_page.py [--times FOLDER] [--docs FOLDER] [--check]

Results of the examples lie in docs/examples/, the times of bench_semi_supervised.py and
bench_vector_quantizer.py in benchmarks/results. The page has lines `<!-- example: NAME -->` and
`<!-- end example: NAME -->`; what stands between them is made anew, and left alone where there is
no result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from style import FAINT, FONT, GRID, heading, save
from tables import number, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples"))

import results  # noqa: E402

OURS, SECOND, THEIRS = (
    {"color": "#0072B2", "marker": "o"},
    {"color": "#56B4E9", "marker": "s", "linestyle": "--"},
    {"color": "#333333", "marker": "^"},
)


@dataclass(frozen=True)
class Times:
    """A section with the times of a training step; its result is that of a bench_*.py."""

    section: str
    result: str  # NAME-cpu-avx2.json
    picture: str
    heading: str
    alt: str
    classes: str  # what their number is called, in the table and below the picture
    classes_axis: str
    compared: str  # whose time over the first one's is shown
    ratio: str  # the heading of that column
    styles: tuple[dict[str, str], ...]


TIMES = (
    Times(
        section="times",
        result="semi-supervised",
        picture="semi-supervised-time.png",
        heading="Training step: one class or all",
        alt="A training step against K",
        classes="K",
        classes_axis="classes K",
        compared="sum over the classes",
        ratio="sum over straight-through",
        styles=(OURS, SECOND, THEIRS),
    ),
    Times(
        section="quantizer_times",
        result="vector-quantizer",
        picture="vector-quantizer-time.png",
        heading="Training step of the quantiser",
        alt="A training step against the codes of a group",
        classes="codes",
        classes_axis="codes of each of two groups",
        compared="F.gumbel_softmax, multiply and sum",
        ratio="multiply and sum over GumbelVectorQuantizer",
        styles=(OURS, THEIRS, SECOND),
    ),
)


def example_section(document: dict[str, Any]) -> str:
    """The table of an example, and what it was made with."""
    settings, versions = document["settings"], document["versions"]
    seeds = settings["seeds"]
    more = [
        f"{name} {value}"
        for name, value in settings.items()
        if name not in ("steps", "seeds", "threads")
    ]
    caption = [
        f"{settings['steps']:,} steps",
        results.seeds(document),
        *more,
        f"torch {versions['torch']}",
        f"gumbel_ext {versions['gumbel_ext']}",
        f"Python {versions['python']}",
    ]
    spread = " Mean ± standard deviation over the seeds." if len(seeds) > 1 else ""
    return f"{results.table(document)}\n\n{', '.join(caption)}.{spread}"


def contenders(document: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in document["rows"]))


def of_contender(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["contender"] == name]


def machine_text(document: dict[str, Any]) -> str:
    machine, versions, threads = document["machine"], document["versions"], document["threads"]
    return (
        f"{machine['cpu']}, {versions['gumbel_ext_cpu_capability']} kernels, "
        f"{threads} thread{'s' if threads > 1 else ''}, torch {versions['torch']}"
    )


def times_section(document: dict[str, Any], times: Times) -> str:
    """One row a number of classes: milliseconds of each, and a ratio to the first."""
    names = contenders(document)
    compared = names.index(times.compared)
    columns = [of_contender(document, name) for name in names]
    lines = [
        [
            str(of_classes[0]["classes"]),
            *(number(row["milliseconds_per_step"]["median"]) for row in of_classes),
            f"{number(of_classes[compared]['time_over_baseline']['median'])}x",
        ]
        for of_classes in zip(*columns, strict=True)
    ]
    header = [times.classes, *(f"{name}, ms" for name in names), times.ratio]
    caption = (
        f"{machine_text(document)}, {document['date'][:10]}. Batch of {document['batch']}. "
        "Medians; the ratio is formed in each of the interleaved rounds."
    )
    picture = f"![{times.alt}]({times.picture})"
    return f"{table(header, lines, 0)}\n\n{caption}\n\n{picture}"


def times_picture(document: dict[str, Any], times: Times, path: Path) -> None:
    with plt.rc_context(FONT):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        figure.subplots_adjust(left=0.1, right=0.985, top=0.9, bottom=0.18)
        names = contenders(document)
        for name, style in zip(names, times.styles, strict=True):
            rows = of_contender(document, name)
            classes = [row["classes"] for row in rows]
            milliseconds = [row["milliseconds_per_step"]["median"] for row in rows]
            axes.plot(classes, milliseconds, label=name, linewidth=2, markersize=5, **style)
        for row in of_contender(document, times.compared):
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
        figure.text(0.985, 0.014, machine_text(document), ha="right", fontsize=7, color=FAINT)
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
                    color=OURS["color"],
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
PICTURES: dict[str, tuple[Callable[[dict[str, Any], Path], None], str]] = {
    "vae_estimators": (vae_picture, "vae-estimators.png")
}


def with_section(text: str, name: str, section: str) -> str:
    """The page with what stands between the two lines replaced."""
    begin, end = f"<!-- example: {name} -->", f"<!-- end example: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"examples.md must have the lines {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"


def load_times(folder: Path, times: Times) -> dict[str, Any] | None:
    """The result of a whole run, if there is one."""
    found = sorted(folder.glob(f"{times.result}-cpu-*.json"))
    path = next((path for path in found if not path.stem.endswith("-quick")), None)
    document: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path else None
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=Path, default=RESULTS, help="folder of the steps' times")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the page's folder")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the page would")
    arguments = parser.parse_args()
    page = arguments.docs / "examples.md"
    text = page.read_text(encoding="utf-8")
    made = text
    documents = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((arguments.docs / "examples").glob("*.json"))
    ]
    for document in documents:
        made = with_section(made, document["example"], example_section(document))
    measured = [(times, load_times(arguments.times, times)) for times in TIMES]
    for times, document in measured:
        if document:
            made = with_section(made, times.section, times_section(document, times))
    if arguments.check:
        if made != text:
            print("examples_page.py: not what the results say: examples.md", file=sys.stderr)
        return int(made != text)
    page.write_text(made, encoding="utf-8")
    for document in documents:
        if document["example"] in PICTURES:
            draw, file = PICTURES[document["example"]]
            draw(document, arguments.docs / file)
    for times, document in measured:
        if document:
            times_picture(document, times, arguments.docs / times.picture)
        else:
            print(f"examples_page.py: no times of the step: {times.result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
