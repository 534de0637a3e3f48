"""Tables and pictures of README.md and docs/ from benchmark results; reads nothing else.

python -m benchmarks.pages [RESULT.json ...] [--docs FOLDER] [--check]

Without files it takes every whole run in benchmarks/results and what the examples left. Tables go
into the regions of pages, between `<!-- begin NAME: made by benchmarks.pages -->` and
`<!-- end NAME -->`; the text around them, which says what they show, is kept. In another folder
than docs/ pages and regions that are missing are made. A rehearsal is shown in other folders only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.results import CAPABILITY_NAMES, Result, default_results
from benchmarks.tables import (
    NOT_YET,
    TIMES,
    Times,
    example_section,
    family_section,
    kernel_share,
    launches_section,
    memory_section,
    predicted_shares,
    steps_section,
    times_section,
    with_measured,
    workloads_section,
)
from benchmarks.targets import gpu_targets_section, targets_section

# --- pages and their regions ---


def markers(region: str, maker: str = "benchmarks.pages") -> tuple[str, str]:
    return f"<!-- begin {region}: made by {maker} -->", f"<!-- end {region} -->"


def with_region(page: str, region: str, body: str, maker: str = "benchmarks.pages") -> str:
    """The page with what stands between the region's two lines made anew."""
    begin, end = markers(region, maker)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have the lines {begin} and {end} once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"


class Pages:
    """Pages of a folder, and the README.md beside docs/, with regions that are made anew."""

    def __init__(self, docs: Path) -> None:
        self.docs = docs
        self.texts: dict[Path, str] = {}

    def path(self, name: str) -> Path:
        """The file of a page."""
        if name == "README.md":
            return self.docs.resolve().parent / name
        return self.docs / name

    def there(self, name: str) -> bool:
        """Whether the folder has this page."""
        return self.path(name).exists() and (
            name != "README.md" or self.docs.resolve().name == "docs"
        )

    def edit(self, name: str, change: Callable[[str], str]) -> None:
        """Changes the text of a page."""
        path = self.path(name)
        if path not in self.texts:
            self.texts[path] = path.read_text(encoding="utf-8") if path.exists() else ""
        self.texts[path] = change(self.texts[path])

    def fill(self, name: str, region: str, body: str) -> None:
        """Makes a region anew; where it is missing it is made, but not in the project's pages."""

        def filled(text: str) -> str:
            if markers(region)[0] not in text and not in_project(self.docs):
                lines = [f"## {region}", "", *markers(region)]
                text = "\n".join([text.rstrip(), "", *lines, ""]).lstrip()
            return with_region(text, region, body)

        try:
            self.edit(name, filled)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def in_project(docs: Path) -> bool:
    return docs.resolve().is_relative_to(ROOT / "docs")


# --- regions ---


Section = Callable[[Result], str]
CPU_REGIONS: dict[str, Section] = {
    "targets": targets_section,
    "workloads": workloads_section,
    "memory": memory_section,
    "times": times_section,
}
GPU_REGIONS: dict[str, Section] = {
    "gpu setup": Result.setup,
    "gpu targets": gpu_targets_section,
    "gpu launches": launches_section,
    "gpu memory": memory_section,
    "gpu times": times_section,
}


def over_results(section: Section, results: list[Result], titled: bool) -> str:
    """The section of each result, under its kernels or GPU where there are several."""
    texts = [section(result) for result in results]
    if titled and len(results) > 1:
        titles = [
            result.gpu_name
            if result.on_gpu
            else f"{CAPABILITY_NAMES.get(result.capability, result.capability)} kernels"
            for result in results
        ]
        texts = [f"*{title}*\n\n{text}" for title, text in zip(titles, texts, strict=True)]
    return "\n\n".join(texts)


def readme_picture(results: list[Result]) -> str:
    if not results:
        return ""
    return (
        "\nAnd on a GPU "
        f"({results[0].gpu_name}, [docs/benchmarks.md](docs/benchmarks.md#on-a-gpu)):\n\n"
        "![Time per element on a GPU against PyTorch](docs/gpu-speed.png)"
    )


def readme_status(results: list[Result]) -> str:
    if not results:
        return "**Not measured on a GPU** yet; no speed is claimed for CUDA."
    return f"CUDA was measured on {', '.join(result.gpu_name for result in results)} alone."


def core_regions(pages: Pages, results: list[Result], of_all: bool) -> None:
    """`of_all`: these are all results that there are, so that without one of a GPU nothing has
    been measured there.
    """
    of_cpu = [result for result in results if not result.on_gpu]
    of_gpu = [result for result in results if result.on_gpu]
    for region, section in CPU_REGIONS.items() if of_cpu else ():
        pages.fill("benchmarks.md", region, over_results(section, of_cpu, region != "targets"))
    if not of_gpu and not of_all:
        return
    nothing = {"gpu targets": gpu_targets_section(None)}
    for region, section in GPU_REGIONS.items():
        body = over_results(section, of_gpu, region != "gpu setup")
        body = body if of_gpu else nothing.get(region, NOT_YET_SENTENCE)
        pages.fill("benchmarks.md", region, body)
    if pages.there("kernels-cuda.md"):
        setup = over_results(Result.setup, of_gpu, titled=False)
        pages.fill("kernels-cuda.md", "gpu setup", setup or NOT_YET_SENTENCE)
        pages.edit("kernels-cuda.md", lambda page: with_shares(page, of_gpu))
    if pages.there("kernels-cuda-table.md"):
        pages.edit("kernels-cuda-table.md", lambda page: with_measured(page, of_gpu, kernel_share))
    if pages.there("README.md"):
        pages.fill("README.md", "gpu picture", readme_picture(of_gpu))
        pages.fill("README.md", "gpu status", readme_status(of_gpu))


NOT_YET_SENTENCE = f"**{NOT_YET.capitalize()}** on a GPU."


def with_shares(page: str, results: list[Result]) -> str:
    begin, end = markers("shares")
    body = page.partition(begin)[2].partition(end)[0].strip()
    return with_region(page, "shares", with_measured(body, results, predicted_shares))


def family_regions(pages: Pages, results: list[Result]) -> None:
    """With results of one kind of device those of the other are shown beside them."""
    kinds = {result.on_gpu for result in results}
    known = [result for result in default_results() if result.suite == "family"]
    results = results + [result for result in known if result.on_gpu not in kinds]
    shown = [result for result in results if not result.on_gpu][:1]
    shown += [result for result in results if result.on_gpu]
    for page in sorted({row["page"] for result in shown for row in result.rows}):
        pages.fill(f"{page}.md", "family", family_section(shown, page))


def step_times(results: Iterable[Result]) -> list[tuple[Times, Result]]:
    """The steps of which there is a result, with the first of it."""
    found = {result.name: result for result in reversed(list(results))}
    return [(times, found[times.result]) for times in TIMES if times.result in found]


def documents_of_examples(docs: Path) -> list[dict[str, Any]]:
    paths = sorted((docs / "examples").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


# --- pictures ---


def draw(docs: Path, core: list[Result], steps: list[Result], examples: list[Any]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no pictures")
        return
    from benchmarks import plot

    for on_gpu, name in ((False, "cpu"), (True, "gpu")):
        result = next((result for result in core if result.on_gpu == on_gpu), None)
        if result is not None and result.speed_rows():
            plot.speed_picture(result, docs / f"{name}-speed.png")
        if result is not None and result.memory_rows:
            plot.memory_picture(result, docs / f"{name}-memory.png")
    for times, result in step_times(steps):
        plot.times_picture(result, times, docs / times.picture)
    for document in examples:
        if document["example"] in plot.EXAMPLES:
            picture, file = plot.EXAMPLES[document["example"]]
            picture(document, docs / file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.pages", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the pages' folder")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a page is out of date"
    )
    arguments = parser.parse_args(argv)
    docs, of_all = arguments.docs, not arguments.results
    pages = Pages(docs)
    try:
        results = [Result(path) for path in arguments.results]
        results = results or default_results()
        if in_project(docs) and any(result.rehearsal for result in results):
            raise ValueError(f"a rehearsal is not for {docs}: name a place outside docs/")
        core, family, steps = (
            [result for result in results if result.suite == suite]
            for suite in ("core", "family", "steps")
        )
        if core or of_all:
            core_regions(pages, core, of_all)
        if family:
            family_regions(pages, family)
        for times, result in step_times(steps):
            pages.fill("examples.md", times.section, steps_section(result, times))
        examples = documents_of_examples(docs) if of_all else []
        for document in examples:
            pages.fill("examples.md", document["example"], example_section(document))
    except (OSError, ValueError) as error:
        print(f"benchmarks.pages: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        stale = [
            path
            for path, text in pages.texts.items()
            if not path.exists() or text != path.read_text(encoding="utf-8")
        ]
        for path in stale:
            print(f"benchmarks.pages: {path} is not what the results say", file=sys.stderr)
        return 1 if stale else 0
    docs.mkdir(parents=True, exist_ok=True)
    for path, text in pages.texts.items():
        path.write_text(text, encoding="utf-8")
    draw(docs, core, steps, examples)
    print(f"wrote {', '.join(sorted(path.name for path in pages.texts))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
