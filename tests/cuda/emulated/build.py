"""Builds the operators for CUDA so that they run without a GPU, their kernels emulated.

python tests/cuda/emulated/build.py [FOLDER]    prints the path of the library

csrc/cuda, unchanged, against the headers of this folder in place of CUDA's. Once loaded into a
process that has imported gumbel_ext, ``torch.ops.gumbel_ext_emulated.take_over()`` sends calls with
tensors of the CPU there: `pytest --device emulated`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent


def flags() -> list[str]:
    found = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
    found += ["-Wno-unknown-pragmas", "-DGUMBEL_EXT_EMULATE_CUDA"]
    if platform.machine() == "x86_64" and " fma " in Path("/proc/cpuinfo").read_text():
        found.append("-mfma")  # fma() as one instruction, not a function: ten times faster
    for folder in (HERE / "include", HERE.parent, ROOT / "csrc"):
        found += ["-I", str(folder)]
    for folder in include_paths():
        found += ["-isystem", folder]
    return found


def ninja_file(folder: Path) -> str:
    """Operators without optimization, as the time is the compiler's; kernels are what runs long."""
    header = folder / "torch_headers.h"
    operators = f"-O0 -include {header}"
    shared = f"{operators} -include {HERE / 'without_registration.h'}"
    sources = dict.fromkeys(sorted((ROOT / "csrc" / "cuda").glob("*.cu")), "-O1")
    sources |= {HERE.parent / "emulation.cpp": "-O2"}
    sources |= dict.fromkeys(sorted((ROOT / "csrc" / "cuda").glob("*.cpp")), operators)
    sources |= {HERE / "take_over.cpp": operators}
    # Functions of the module that the operators call, and that it does not export.
    for pattern in ("*.cpp", "ops/*.cpp"):
        sources |= dict.fromkeys(sorted((ROOT / "csrc").glob(pattern)), shared)
    del sources[ROOT / "csrc" / "module.cpp"]
    libraries = Path(torch.__file__).resolve().parent / "lib"
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')} {' '.join(flags())}",
        "language = c++",
        "rule compile",
        "  command = $cxx $more -MMD -MF $out.d -x $language -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{libraries} -ltorch -ltorch_cpu -lc10 -Wl,-z,defs",
        # Found beside where the header would be, which need not be there.
        f"build {header}.gch: compile {HERE / header.name}",
        "  more = -O0",
        "  language = c++-header",
    ]
    objects = []
    for source, more in sources.items():
        objects.append(f"{source.stem}.o")
        after = f" | {header}.gch" if "-include" in more else ""
        lines += [f"build {objects[-1]}: compile {source}{after}", f"  more = {more}"]
    assert len(set(objects)) == len(objects)
    return "\n".join([*lines, f"build {library(folder).name}: link {' '.join(objects)}", ""])


def library(folder: Path) -> Path:
    return folder / "libgumbel_ext_emulated_cuda.so"


def default_folder() -> Path:
    """One for each torch: objects for another must never be linked."""
    return ROOT / "build" / f"emulated-cuda-torch{torch.__version__}"


def build(folder: Path) -> Path:
    """Compile what is not up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(folder), encoding="utf-8")
    jobs = os.environ.get("MAX_JOBS", "2")
    subprocess.run(["ninja", "-C", str(folder), "-j", jobs], check=True, stdout=sys.stderr)
    return library(folder)


if __name__ == "__main__":
    print(build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else default_folder()))
