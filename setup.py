"""Builds the compiled module gumbel_ext._C against the torch of this environment.

Metadata is in pyproject.toml. The install command is `pip install --no-build-isolation .`.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import sysconfig
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent


def stop(reason: str, mend: str) -> None:
    """Ends the build with one line: pip prints it last, under the name of the failed step."""
    sys.exit(f"gumbel_ext: {reason}; run: {mend}")


if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools {setuptools.__version__} is too old", "pip install 'setuptools>=77'")

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    # pip's isolated environment shows the build only what build-system.requires lists. torch is
    # not listed there on purpose: the module must be compiled for the torch it will run with.
    if any("pip-build-env-" in path for path in sys.path):
        stop(
            "torch cannot be seen from pip's isolated build environment",
            "pip install 'torch>=2.8' 'setuptools>=77' ninja && pip install --no-build-isolation .",
        )
    stop(
        f"torch is not installed for {sys.executable}",
        "pip install 'torch>=2.8' && pip install --no-build-isolation .",
    )

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8):
    stop(f"torch {torch.__version__} is too old", "pip install --upgrade 'torch>=2.8'")

if not Path(sysconfig.get_path("include"), "Python.h").is_file():
    stop(
        "the C headers of this Python are missing (Python.h)",
        "apt-get install python3-dev (or your system's equivalent)",
    )

VERSION = runpy.run_path(str(ROOT / "gumbel_ext" / "_version.py"))["__version__"]

# CMakeLists.txt has the same list without module.cpp.
SOURCES = [
    "csrc/arguments.cpp",
    "csrc/autograd.cpp",
    "csrc/library.cpp",
    "csrc/meta.cpp",
    "csrc/module.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/gumbel_softmax_cpu.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/cpu/kernels_baseline.cpp",
    "csrc/cpu/plan.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/gumbel_softmax_cuda.cpp",
    "csrc/cuda/launch_bfloat16.cu",
    "csrc/cuda/launch_float16.cu",
    "csrc/cuda/launch_float32.cu",
    "csrc/cuda/launch_float64.cu",
    "csrc/cuda/plan.cpp",
]
HEADERS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in {".h", ".inc", ".cuh"}
)

# - No -march: the files under csrc/cpu carry their own target, chosen at run time.
# - No -std: torch adds the one it needs.
# - -ffp-contract=off: a*b+c is rounded once only where the source says fma, so that every
#   instruction set gives the same bits.
# - -fopenmp when compiling only: at::parallel_for is inlined and serial without it. The OpenMP
#   runtime must be the one inside torch, which torch.set_num_threads governs, so none is linked.
CXX_FLAGS = [
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fopenmp",
    "-fvisibility=hidden",
    "-g0",
]


def string_literal(text: str) -> str:
    return json.dumps(text)


class BuildWithRecord(BuildExtension):
    """BuildExtension that keeps objects per torch and leaves a record of what it built for."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Editable installs get a throw-away folder from setuptools, which would compile everything
        # again each time; and objects for another torch must never be linked.
        name = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = str(ROOT / "build" / name)

    def run(self) -> None:
        super().run()
        # Readable when the module itself does not load: see gumbel_ext/_build_check.py.
        record = json.dumps({"gumbel_ext": VERSION, "torch": torch.__version__}, indent=2)
        folders = [Path(self.build_lib) / "gumbel_ext"]
        if self.inplace:
            folders.append(ROOT / "gumbel_ext")
        for folder in folders:
            (folder / "_built_for.json").write_text(record + "\n", encoding="utf-8")


# The kernels include no torch header, so nothing here needs torch's own nvcc flags. -g0 as above;
# no --use_fast_math: it would break the noise contract.
NVCC_FLAGS = ["-O3", "-Xcudafe", "--diag_suppress=20012"]
# Compute capabilities to compile for where TORCH_CUDA_ARCH_LIST does not say: Ampere, Hopper, and
# PTX for what comes after.
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels: FORCE_CUDA=1 or 0 decides, else torch and a GPU do."""
    forced = os.environ.get("FORCE_CUDA")
    if forced in {"0", "1"}:
        if forced == "1" and torch.version.cuda is None:
            stop(
                f"FORCE_CUDA=1, but torch {torch.__version__} is built without CUDA",
                "pip install a torch with CUDA, or unset FORCE_CUDA",
            )
        if forced == "1" and CUDA_HOME is None:
            stop(
                "FORCE_CUDA=1, but no CUDA toolkit was found",
                "CUDA_HOME=/path/to/cuda pip install --no-build-isolation .",
            )
        return forced == "1"
    return torch.version.cuda is not None and CUDA_HOME is not None and torch.cuda.is_available()


def cuda_include_flags() -> list[str]:
    """Headers that torch includes and a partial toolkit lacks lie in the wheels that torch uses."""
    site_packages = Path(torch.__file__).resolve().parent.parent
    folders = sorted((site_packages / "nvidia").glob("cu*/include"))
    return [flag for folder in folders for flag in ("-idirafter", str(folder))]


CUDA = wants_cuda()
if CUDA:
    # Without a visible GPU torch would look for one to compile for.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)

extension = (CUDAExtension if CUDA else CppExtension)(
    "gumbel_ext._C",
    SOURCES + (CUDA_SOURCES if CUDA else []),
    depends=HEADERS,
    include_dirs=[str(ROOT / "csrc")],
    define_macros=[
        ("GUMBEL_EXT_VERSION", string_literal(VERSION)),
        ("GUMBEL_EXT_TORCH_VERSION", string_literal(torch.__version__)),
        ("GUMBEL_EXT_CXX_FLAGS", string_literal(" ".join(CXX_FLAGS))),
    ]
    + (
        [("GUMBEL_EXT_CUDA_ARCHITECTURES", string_literal(os.environ["TORCH_CUDA_ARCH_LIST"]))]
        if CUDA
        else []
    ),
    extra_compile_args={
        "cxx": CXX_FLAGS + (cuda_include_flags() if CUDA else []),
        "nvcc": NVCC_FLAGS,
    },
)

setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": BuildWithRecord})
