"""What a benchmark ran on: machine, versions, revision."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import gumbel_ext
from gumbel_ext import _C

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpuinfo(*fields: str) -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in fields:
            return value.strip()
    return ""


def caches() -> dict[str, int]:
    """Bytes of each data cache that the first core sees, by name (L1d, L2, L3)."""
    found: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index[0-9]*")):
        kind, size = _read(f"{index}/type"), _read(f"{index}/size")
        if kind == "Instruction" or not size:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
        level = _read(f"{index}/level")
        found[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size.rstrip("KM")) * unit
    return found


def last_level_cache() -> int:
    return max(caches().values(), default=32 << 20)


def machine() -> dict[str, Any]:
    flags = set(_cpuinfo("flags", "Features").split())
    interesting = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "asimd")
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpuinfo("model name", "Model") or platform.processor(),
        "architecture": platform.machine(),
        "cores_available": len(affinity(0)) if affinity else os.cpu_count(),
        "caches_bytes": caches(),
        "flags": [flag for flag in interesting if flag in flags],
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled") or None,
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip(),
    }


def versions() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gumbel_ext": gumbel_ext.__version__,
        "gumbel_ext_cpu_capability": _C.cpu_capability(),
        "gumbel_ext_build": dict(_C.build_info()),
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def revision() -> dict[str, Any]:
    """The commit, and whether tracked files other than docs and results differ from it."""
    sources = ("--", ".", ":!docs", ":!benchmarks/results")
    changed = _git("status", "--porcelain", "--untracked-files=no", *sources)
    return {
        # A copy of the tree that left .git behind can be told its commit.
        "commit": _git("rev-parse", "HEAD") or os.environ.get("GUMBEL_EXT_COMMIT"),
        "modified": None if changed is None else bool(changed),
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def rounded(value: float) -> float:
    """Four significant digits: more would only make every two runs differ everywhere."""
    return float(f"{value:.4g}")
