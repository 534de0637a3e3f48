"""Tables of the family's pages in docs/ from results of bench_family.py and bench_family_cuda.py;
reads nothing else.

python benchmarks/family_tables.py [RESULT ...] [--docs FOLDER] [--check]
python benchmarks/family_tables.py RESULT ... --page FILE

A page has the lines `<!-- family: PAGE -->` and `<!-- end family: PAGE -->`; what stands between
them is made anew: a table of the CPU's result, and one of each GPU's. Without files those in
benchmarks/results are taken, and with files of one kind those of the other. With --page the tables
of the files go into one page of their own. A rehearsal is shown outside docs/ only.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from labels import COPY
from tables import NOT_YET, RESULTS, ROOT, number, refuse_rehearsal, shape_text, table

Document = dict[str, Any]


def markers(page: str) -> tuple[str, str]:
    return f"<!-- family: {page} -->", f"<!-- end family: {page} -->"


def on_gpu(document: Document) -> bool:
    return document.get("device") == "cuda"


def times_table(document: Document, page: str) -> str:
    """One row a case and contender: its time, and how many times longer than ours it takes."""
    of_page = [row for row in document["rows"] if row["page"] == page and row["contender"] != COPY]
    # Columns that some rows of the page have, and no others.
    shares = any("share_of_copy_bandwidth" in row for row in of_page)
    kernels = any(row.get("kernels_per_call") is not None for row in of_page)
    memory = any("allocator_peak_bytes" in row for row in of_page)
    unit, scale = ("ps", 1e3) if on_gpu(document) else ("ns", 1.0)
    lines = []
    for _, of_case in groupby(of_page, key=lambda row: row["case"]):
        for place, row in enumerate(of_case):
            ratio = row["time_over_baseline"]
            named = (row["op"], row["variant"], row.get("called"))
            first = place == 0
            share = row.get("share_of_copy_bandwidth")
            started, peak = row.get("kernels_per_call"), row.get("allocator_peak_bytes")
            lines.append(
                [
                    " ".join(part for part in named if part) if first else "",
                    shape_text(row["shape"]) if first else "",
                    row["dtype"] if first else "",
                    row["contender"],
                    number(row["microseconds_per_call"]["median"]),
                    number(row["median_ns_per_element"] * scale),
                    "1" if first else f"{number(ratio['median'])}",
                    *([f"{share['median']:.2f}" if share else ""] if shares else []),
                    *(["" if started is None else f"{started:g}"] if kernels else []),
                    *([number(peak / 1e6) if peak else ""] if memory else []),
                ]
            )
    header = ["operation", "shape", "dtype", "", "µs a call", f"{unit} an element", "times ours"]
    header += ["of a copy's bandwidth"] if shares else []
    header += ["kernels"] if kernels else []
    header += ["peak MB"] if memory else []
    return table(header, lines, 4)


def caption(document: Document) -> str:
    machine, versions, date = document["machine"], document["versions"], document["date"][:10]
    if on_gpu(document):
        gpu = machine["gpu"]
        where = f"{gpu['name']}, driver {gpu['driver']}"
    else:
        threads = document["threads"]
        where = (
            f"{machine['cpu']}, {versions['gumbel_ext_cpu_capability']} kernels, "
            f"{threads} thread{'s' if threads > 1 else ''}"
        )
    warning = " **A rehearsal: these numbers mean nothing.**" if document.get("rehearsal") else ""
    return (
        f"{where}, torch {versions['torch']}, {date}. Medians; a ratio is formed in each of the "
        f"interleaved rounds.{warning}"
    )


def section(documents: list[Document], page: str) -> str:
    """The tables of a page, the CPU's first; or that there is none yet of a GPU."""
    parts = []
    for document in documents:
        if any(row["page"] == page for row in document["rows"]):
            parts += [times_table(document, page), caption(document)]
        elif on_gpu(document):
            parts.append(f"On {document['machine']['gpu']['name']}: left out.")
    if not any(map(on_gpu, documents)):
        parts.append(f"On a GPU: {NOT_YET}.")
    return "\n\n".join(parts)


def with_tables(text: str, documents: list[Document], page: str) -> str:
    """The text of a page with its tables made anew; as it is if the page has none."""
    begin, end = markers(page)
    if begin not in text and end not in text:
        return text
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}.md must have the lines {begin} and {end} once each")
    if not any(row["page"] == page for document in documents for row in document["rows"]):
        return text
    before, rest = text.split(begin)
    return f"{before}{begin}\n{section(documents, page)}\n{end}{rest.split(end)[1]}"


def one_page(documents: list[Document]) -> str:
    """All tables of some results, a heading for each page that they are of."""
    rows = [row for document in documents for row in document["rows"]]
    parts = ["# The family"]
    for page in sorted({row["page"] for row in rows}):
        parts += [f"## {page}"]
        for document in documents:
            if any(row["page"] == page for row in document["rows"]):
                parts += [times_table(document, page), caption(document)]
    return "\n\n".join(parts) + "\n"


def default_results() -> list[Path]:
    """A whole run on the CPU, and those on GPUs."""
    of_cpu = sorted(RESULTS.glob("family-cpu-*.json"))
    of_gpus = sorted([*RESULTS.glob("family-gpu-*.json"), *RESULTS.glob("gpu-*/family.json")])
    of_cpu, of_gpus = (
        [path for path in paths if not path.stem.endswith(("-quick", "-partial"))]
        for paths in (of_cpu, of_gpus)
    )
    return [*of_cpu[:1], *of_gpus]


def read(path: Path) -> Document:
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def write_pages(documents: list[Document], docs: Path, check: bool) -> int:
    stale = []
    pages = {row["page"] for document in documents for row in document["rows"]}
    for file in sorted(docs.glob("*.md")):
        text = file.read_text(encoding="utf-8")
        made = with_tables(text, documents, file.stem)
        if markers(file.stem)[0] in text:
            pages.discard(file.stem)
        if made != text:
            stale.append(file.name)
            if not check:
                file.write_text(made, encoding="utf-8")
    for page in sorted(pages):
        print(f"family_tables.py: {page}.md has no place for its table", file=sys.stderr)
    if check and stale:
        print(f"family_tables.py: not what the results say: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 1 if pages else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT", help="JSON files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the pages' folder")
    parser.add_argument("--page", type=Path, help="one page for all, and no others")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a page would")
    arguments = parser.parse_args()
    try:
        documents = [read(path) for path in arguments.results]
        if arguments.page is None:
            kinds = {on_gpu(document) for document in documents}
            documents += [d for d in map(read, default_results()) if on_gpu(d) not in kinds]
        if not documents:
            print("family_tables.py: no result; run benchmarks/bench_family.py", file=sys.stderr)
            return 1
        if any(document.get("rehearsal") for document in documents):
            refuse_rehearsal(arguments.page or arguments.docs)
        if arguments.page is None:
            documents.sort(key=on_gpu)
            return write_pages(documents, arguments.docs, arguments.check)
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text(one_page(documents), encoding="utf-8")
        print(f"wrote {arguments.page}")
        return 0
    except (OSError, ValueError) as error:
        print(f"family_tables.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
