"""What report.json says: the GPU, the build, and what the tests counted and skipped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

# The last line of pytest.
COUNTS = "(passed|failed|error|skipped|no tests ran).* in [0-9.]+"

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


ROOT = Path(__file__).resolve().parents[1]


def said_by(*command: str, timeout: float = 20) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=timeout, cwd=ROOT
        )
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


def device_record() -> dict[str, Any] | None:
    """The GPU, its clocks now, driver, versions; None without torch.

    From a process of its own, so that none stays on the GPU beside those that are measured.
    """
    code = "import json; from benchmarks.report_json import device; print(json.dumps(device()))"
    said = said_by(sys.executable, "-c", code, timeout=120)
    found: dict[str, Any] | None = json.loads(said) if said else None
    return found


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
    """What the compiled module says of itself, in a process that may fail."""
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
    try:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    except ElementTree.ParseError as error:  # still being written
        return {"unreadable": str(error)}
    for case in cases:
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
