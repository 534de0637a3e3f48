"""The report of gpu_report.sh: what ran on which GPU, how it ended, what the tests counted.

python benchmarks/gpu_report.py device FILE              the GPU, its clocks now, driver, versions
python benchmarks/gpu_report.py build FILE               what the compiled module says of itself
python benchmarks/gpu_report.py write FOLDER FILE        from what gpu_report.sh left in FOLDER
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

SMI_FIELDS = (
    "name",
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "ecc.mode.current",
    "mig.mode.current",
)


def said_by(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def clocks() -> dict[str, str] | None:
    """Read, never set: what they are is part of the result."""
    query = ",".join(SMI_FIELDS)
    said = said_by("nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader")
    if not said:
        return None
    values = [value.strip() for value in said.splitlines()[0].split(",")]
    return dict(zip(SMI_FIELDS, values, strict=False))


def release(tool: str, pattern: str) -> str | None:
    match = re.search(pattern, said_by(tool, "--version") or "")
    return match and match[1]


def device() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"gpu": None, "nvidia_smi": clocks()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    found["versions"] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nvcc": release("nvcc", r"release ([0-9.]+)"),
        "ncu": release("ncu", r"Version ([0-9.]+)"),
        "compute_sanitizer": release("compute-sanitizer", r"version ([0-9.]+)"),
    }
    return found


def built() -> dict[str, Any] | None:
    """In a process that may fail."""
    code = "import json; from gumbel_ext import _C; print(json.dumps(dict(_C.build_info())))"
    said = said_by(sys.executable, "-c", code)
    found: dict[str, Any] | None = json.loads(said) if said else None
    return found


def reason(case: ElementTree.Element) -> str:
    skipped = case.find("skipped")
    message = None if skipped is None else skipped.get("message")
    return " ".join((message or "no reason").split())


def tests_of(path: Path) -> dict[str, Any]:
    """Counts, names of failures, reasons of what was skipped, and what tests recorded."""
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    failed: list[str] = []
    recorded: dict[str, dict[str, float]] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome = next(
            (kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None),
            "passed",
        )
        counts[outcome] += 1
        if outcome == "skipped":
            skipped[reason(case)] += 1
        elif outcome != "passed":
            failed.append(name)
        test = re.sub(r"\[.*", "", name)
        for entry in case.iter("property"):
            key, value = str(entry.get("name")), float(entry.get("value", "nan"))
            of_test = recorded.setdefault(test, {})
            least = min(value, of_test.get(key, value))
            of_test[key] = least if key.startswith("least ") else of_test.get(key, 0) + value
    return {
        "counts": dict(counts),
        "failed": sorted(failed),
        "skipped": [{"reason": why, "tests": n} for why, n in skipped.most_common()],
        "recorded": recorded,
    }


def near_ties(suites: dict[str, Any]) -> dict[str, Any] | None:
    """Choices that differ from the CPU's, over all tests that count them."""
    choices = differ = 0.0
    for suite in suites.values():
        for values in suite.get("recorded", {}).values():
            choices += values.get("choices", 0)
            differ += values.get("choices that differ from the CPU's", 0)
    if not choices:
        return None
    return {"choices": int(choices), "differ": int(differ), "share": differ / choices}


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() and path.stat().st_size else None


def write(folder: Path) -> dict[str, Any]:
    names = ("stage", "outcome", "seconds", "detail")
    rows = (folder / "stages.tsv").read_text().splitlines()
    stages = [dict(zip(names, row.split("\t"), strict=False)) for row in rows]
    suites: dict[str, Any] = {}
    for path in sorted(folder.glob("*.xml")):
        try:
            suites[path.stem] = tests_of(path)
        except ElementTree.ParseError as error:
            suites[path.stem] = {"unreadable": str(error)}
    about = read(folder / "about.json") or {}
    before, after = (read(folder / f"device-{when}.json") for when in ("before", "after"))
    return {
        **about,
        "commit": about.get("commit") or None,
        "device": before,
        "clocks_after": after and after["nvidia_smi"],
        "build": read(folder / "build.json"),
        "stages": [{**stage, "seconds": int(stage["seconds"])} for stage in stages],
        "tests": suites,
        "near_ties": near_ties(suites),
    }


def main(arguments: list[str]) -> int:
    report: Any
    match arguments:
        case ["device", target]:
            report = device()
        case ["build", target]:
            report = built()
        case ["write", folder, target]:
            report = write(Path(folder))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    # Whole or not at all, also where the run is interrupted.
    partial = Path(target + ".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
