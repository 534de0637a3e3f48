"""Tables and picture of docs/examples.md from the examples' results; reads nothing else.

python benchmarks/examples_page.py [--times FILE] [--docs FOLDER] [--check]

Results of the examples lie in docs/examples/, the times of bench_semi_supervised.py in
benchmarks/results. The page has lines `<!-- example: NAME -->` and `<!-- end example: NAME -->`;
what stands between them is made anew, and left alone where there is no result.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from plot import number, table
from style import FAINT, FONT, GRID, heading, save

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples"))

import results  # noqa: E402

TIMES = "times"
PICTURE = "semi-supervised-time.png"
STYLES = (
    {"color": "#0072B2", "marker": "o"},
    {"color": "#56B4E9", "marker": "s", "linestyle": "--"},
    {"color": "#333333", "marker": "^"},
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


def times_section(document: dict[str, Any]) -> str:
    """One row a number of classes: milliseconds of each, and ratios to the first."""
    names = contenders(document)
    columns = [of_contender(document, name) for name in names]
    lines = [
        [
            str(of_classes[0]["classes"]),
            *(number(row["milliseconds_per_step"]["median"]) for row in of_classes),
            f"{number(of_classes[-1]['time_over_baseline']['median'])}x",
        ]
        for of_classes in zip(*columns, strict=True)
    ]
    header = ["K", *(f"{name}, ms" for name in names), "sum over straight-through"]
    caption = (
        f"{machine_text(document)}, {document['date'][:10]}. Batch of {document['batch']}. "
        "Medians; the ratio is formed in each of the interleaved rounds."
    )
    return f"{table(header, lines, 0)}\n\n{caption}\n\n![A training step against K]({PICTURE})"


def times_picture(document: dict[str, Any], path: Path) -> None:
    with plt.rc_context(FONT):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        figure.subplots_adjust(left=0.1, right=0.985, top=0.9, bottom=0.18)
        for name, style in zip(contenders(document), STYLES, strict=True):
            rows = of_contender(document, name)
            classes = [row["classes"] for row in rows]
            times = [row["milliseconds_per_step"]["median"] for row in rows]
            axes.plot(classes, times, label=name, linewidth=2, markersize=5, **style)
        # The last drawn is the sum, whose ratios are the point of the picture.
        for row, time in zip(rows, times, strict=True):
            axes.annotate(
                f"{row['time_over_baseline']['median']:.2g}x",
                (row["classes"], time),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(top=max(times) * 1.6)
        axes.set_xticks(classes, [str(each) for each in classes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("classes K")
        axes.set_ylabel("milliseconds a training step (log)")
        axes.grid(color=GRID, linewidth=0.6)
        axes.legend(frameon=False, loc="upper left")
        heading(figure, "Training step: one class or all", "numbers: time over straight-through")
        figure.text(0.985, 0.014, machine_text(document), ha="right", fontsize=7, color=FAINT)
        save(figure, path)


def with_section(text: str, name: str, section: str) -> str:
    """The page with what stands between the two lines replaced."""
    begin, end = f"<!-- example: {name} -->", f"<!-- end example: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"examples.md must have the lines {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"


def default_times() -> Path | None:
    found = sorted(RESULTS.glob("semi-supervised-cpu-*.json"))
    return next((path for path in found if not path.stem.endswith("-quick")), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=Path, help="JSON file (default in benchmarks/results)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the page's folder")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the page would")
    arguments = parser.parse_args()
    page = arguments.docs / "examples.md"
    text = page.read_text(encoding="utf-8")
    made = text
    for path in sorted((arguments.docs / "examples").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        made = with_section(made, document["example"], example_section(document))
    times_path = arguments.times or default_times()
    times = json.loads(times_path.read_text(encoding="utf-8")) if times_path else None
    if times:
        made = with_section(made, TIMES, times_section(times))
    if arguments.check:
        if made != text:
            print("examples_page.py: not what the results say: examples.md", file=sys.stderr)
        return int(made != text)
    page.write_text(made, encoding="utf-8")
    if times:
        times_picture(times, arguments.docs / PICTURE)
    else:
        print("examples_page.py: no times; run benchmarks/bench_semi_supervised.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
