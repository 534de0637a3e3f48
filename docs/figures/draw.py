"""The pictures of docs/figures.md: computes what each shows, keeps the numbers, draws them.

python docs/figures/draw.py [NAME ...] [--out DIRECTORY] [--redraw]

Without names it makes all of them. Each leaves NAME.png and, with seeds and versions, NAME.json;
--redraw draws from the JSON that is there and computes nothing. A table of the numbers goes into
the region NAME of figures.md, unless --out says where else pictures go.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent.parent))

import class_bias  # noqa: E402
import estimator_error  # noqa: E402
import gradient_error  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import noise_tail  # noqa: E402
import samples  # noqa: E402

from benchmarks import environment, style  # noqa: E402
from benchmarks.pages import with_region  # noqa: E402

PAGE = HERE.parent / "figures.md"
MODULES = (samples, class_bias, noise_tail, gradient_error, estimator_error)
FIGURES = {module.__name__: module for module in MODULES}


def provenance() -> dict[str, Any]:
    """What the numbers depend on beside their seeds; no date, so that a run can be compared."""
    versions = environment.versions()
    names = ("gumbel_ext", "gumbel_ext_cpu_capability", "torch", "torch_cpu_capability", "python")
    return {
        "versions": {name: versions[name] for name in names},
        "cpu": environment.machine()["cpu"],
        "threads": torch.get_num_threads(),
    }


def picture(name: str, data: dict[str, Any], path: Path) -> None:
    with plt.rc_context(style.FONT):
        style.save(FIGURES[name].draw(data), path)


def with_table(text: str, name: str, data: dict[str, Any]) -> str:
    """The page with the table of a picture made anew, if the picture has one."""
    if not hasattr(FIGURES[name], "table"):
        return text
    return with_region(text, name, FIGURES[name].table(data), "docs/figures/draw.py")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of docs/figures.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the pictures and JSON")
    parser.add_argument("--redraw", action="store_true", help="draw from the JSON that is there")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(FIGURES))
    if unknown:
        parser.error(f"no figure {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or FIGURES:
        started = time.perf_counter()
        record = arguments.out / f"{name}.json"
        if arguments.redraw:
            data = json.loads(record.read_text())
        else:
            data = {**provenance(), **FIGURES[name].compute()}
            record.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
        picture(name, data, arguments.out / f"{name}.png")
        if arguments.out == HERE:
            page = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(with_table(page, name, data), encoding="utf-8")
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
