"""Tables of the family's pages in docs/ from the result of bench_family.py; reads nothing else.

python benchmarks/family_tables.py [RESULT] [--docs FOLDER] [--check]

A page has the lines `<!-- family: PAGE -->` and `<!-- end family: PAGE -->`; what stands between
them is made anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from tables import number, shape_text, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def markers(page: str) -> tuple[str, str]:
    return f"<!-- family: {page} -->", f"<!-- end family: {page} -->"


def section(document: dict[str, Any], page: str) -> str:
    """One row a case and contender: its time, and how many times longer than ours it takes."""
    lines = []
    of_page = [row for row in document["rows"] if row["page"] == page]
    memory = any("allocator_peak_bytes" in row for row in of_page)
    for _, of_case in groupby(of_page, key=lambda row: row["case"]):
        for place, row in enumerate(of_case):
            ratio = row["time_over_baseline"]
            operation = " ".join(part for part in (row["op"], row["variant"]) if part)
            first = place == 0
            peak = row.get("allocator_peak_bytes")
            lines.append(
                [
                    operation if first else "",
                    shape_text(row["shape"]) if first else "",
                    row["dtype"] if first else "",
                    row["contender"],
                    number(row["microseconds_per_call"]["median"]),
                    number(row["median_ns_per_element"]),
                    "1" if first else f"{number(ratio['median'])}",
                    *([number(peak / 1e6) if peak else ""] if memory else []),
                ]
            )
    header = ["operation", "shape", "dtype", "", "µs a call", "ns an element", "times ours"]
    header += ["peak MB"] if memory else []
    machine, versions = document["machine"], document["versions"]
    threads = document["threads"]
    caption = (
        f"{machine['cpu']}, {versions['gumbel_ext_cpu_capability']} kernels, "
        f"{threads} thread{'s' if threads > 1 else ''}, torch {versions['torch']}, "
        f"{document['date'][:10]}. Medians; a ratio is formed in each of the interleaved rounds."
    )
    return f"{table(header, lines, 4)}\n\n{caption}"


def with_table(text: str, document: dict[str, Any], page: str) -> str:
    """The text of a page with its table made anew; as it is if the page has none."""
    begin, end = markers(page)
    if begin not in text and end not in text:
        return text
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}.md must have the lines {begin} and {end} once each")
    if not any(row["page"] == page for row in document["rows"]):
        return text
    before, rest = text.split(begin)
    return f"{before}{begin}\n{section(document, page)}\n{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, help="JSON file (default in results/)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the pages' folder")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a page would")
    arguments = parser.parse_args()
    results = [arguments.result] if arguments.result else sorted(RESULTS.glob("family-cpu-*.json"))
    results = [path for path in results if not path.stem.endswith(("-quick", "-partial"))]
    if not results and not arguments.result:
        print("family_tables.py: no result yet; run benchmarks/bench_family.py", file=sys.stderr)
        return 1
    path = arguments.result or results[0]
    document = json.loads(path.read_text(encoding="utf-8"))
    stale = []
    pages = {row["page"] for row in document["rows"]}
    for file in sorted(arguments.docs.glob("*.md")):
        text = file.read_text(encoding="utf-8")
        made = with_table(text, document, file.stem)
        if markers(file.stem)[0] in text:
            pages.discard(file.stem)
        if made != text:
            stale.append(file.name)
            if not arguments.check:
                file.write_text(made, encoding="utf-8")
    for page in sorted(pages):
        print(f"family_tables.py: {page}.md has no place for its table", file=sys.stderr)
    if arguments.check and stale:
        print(f"family_tables.py: not what {path.name} says: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 1 if pages else 0


if __name__ == "__main__":
    sys.exit(main())
