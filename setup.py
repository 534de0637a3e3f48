"""Builds the compiled module gumbel_ext._C against the torch of this environment.

Metadata is in pyproject.toml. The install command is `pip install --no-build-isolation .`.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
INSTALL = "pip install --no-build-isolation ."


def stop(reason: str, mend: str) -> None:
    """Ends the build with one line: pip prints it last, under the name of the failed step."""
    sys.exit(f"gumbel_ext: {reason}; run: {mend}")


def has_cuda_headers(toolkit: Path) -> bool:
    """Whether the headers are there, in the place of NVIDIA's installers or in that of conda."""
    places = ("include", "targets/*/include")
    return any(any(toolkit.glob(f"{place}/cuda_runtime.h")) for place in places)


def choose_cuda_home() -> None:
    """Sets CUDA_HOME, unless the user did, to a toolkit that has headers.

    torch takes the folder above that of the nvcc on PATH, which has none if that is a link to the
    compiler or a script around it. It looks when torch.utils.cpp_extension is imported.
    """
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    nvcc = shutil.which("nvcc")
    toolkits = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent] if nvcc else []
    for toolkit in (*toolkits, Path("/usr/local/cuda")):
        if has_cuda_headers(toolkit) and (toolkit / "bin" / "nvcc").is_file():
            os.environ["CUDA_HOME"] = str(toolkit)
            return


if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools {setuptools.__version__} is too old", "pip install 'setuptools>=77'")

try:
    import torch

    if torch.version.cuda is not None:
        choose_cuda_home()
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
        f"pip install 'torch>=2.8' && {INSTALL}",
    )

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8):
    stop(f"torch {torch.__version__} is too old", "pip install --upgrade 'torch>=2.8'")

if not Path(sysconfig.get_path("include"), "Python.h").is_file():
    stop(
        "the C headers of this Python are missing (Python.h)",
        "apt-get install python3-dev (or your system's equivalent)",
    )

VERSION = runpy.run_path(str(ROOT / "gumbel_ext" / "_version.py"))["__version__"]


def below_csrc(*patterns: str) -> list[str]:
    found = (path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


# As in CMakeLists.txt, which leaves out module.cpp.
SOURCES = below_csrc("*.cpp", "ops/*.cpp", "cpu/*.cpp")
CUDA_SOURCES = below_csrc("cuda/*.cpp", "cuda/*.cu")
HEADERS = below_csrc("**/*.h", "**/*.inc", "**/*.cuh")

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
    # As nvcc has NVCC_APPEND_FLAGS; for instance -O0, for a module that nobody measures.
    *os.environ.get("CXX_APPEND_FLAGS", "").split(),
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
        # A finished module newer than every source is not up to date if it is for another torch,
        # or without CUDA. Ninja finds out which objects are.
        self.force = True

    def run(self) -> None:
        super().run()
        # Readable when the module itself does not load: see gumbel_ext/_build_check.py.
        built_for = {"gumbel_ext": VERSION, "torch": torch.__version__, "cuda": CUDA}
        record = json.dumps(built_for, indent=2)
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


def cuda_toolkit() -> str | None:
    """Returns the version of the CUDA toolkit to build the kernels with; None to build without.

    FORCE_CUDA=1 or 0 decides. Unless it is set, the kernels are built where torch has CUDA and sees
    a GPU, and there is a toolkit.
    """
    forced = os.environ.get("FORCE_CUDA", "")
    if forced not in {"", "0", "1"}:
        stop(f"FORCE_CUDA must be 0 or 1, got {forced!r}", f"FORCE_CUDA=1 {INSTALL}")
    if forced == "0":
        return None
    if torch.version.cuda is None:
        if forced:
            stop(
                f"FORCE_CUDA=1, but torch {torch.__version__} is built without CUDA",
                f"unset FORCE_CUDA; {INSTALL} (or install a torch with CUDA first)",
            )
        return None
    series = torch.version.cuda.split(".")[0]
    build = f"CUDA_HOME=/path/to/cuda-{series} {INSTALL}"
    if CUDA_HOME is None:
        if forced:
            stop("FORCE_CUDA=1, but no CUDA toolkit was found", f"FORCE_CUDA=1 {build}")
        if torch.cuda.is_available():
            print(
                f"gumbel_ext: no CUDA toolkit was found, building for the CPU only; for CUDA: "
                f"{build}",
                file=sys.stderr,
            )
        return None
    if not forced and not torch.cuda.is_available():
        return None
    # torch checks this too, but only when it compiles, and says it as a tuple with a %s in it.
    build += f" (or without CUDA: FORCE_CUDA=0 {INSTALL})"
    toolkit = Path(CUDA_HOME)
    if not has_cuda_headers(toolkit):
        stop(f"there is no include/cuda_runtime.h in CUDA_HOME={toolkit}", build)
    version = nvcc_version(toolkit / "bin" / "nvcc")
    if version is None:
        stop(f"there is no bin/nvcc that runs in CUDA_HOME={toolkit}", build)
    elif version.split(".")[0] != series:
        stop(
            f"the toolkit in CUDA_HOME={toolkit} is CUDA {version}, but torch "
            f"{torch.__version__} is built for CUDA {torch.version.cuda}",
            build,
        )
    return version


def nvcc_version(nvcc: Path) -> str | None:
    """Returns for instance "13.0"; None if it cannot be run or does not say."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+\.\d+)", said.stdout)
    return match and match[1]


def cuda_include_flags() -> list[str]:
    """Headers outside CUDA_HOME/include: those of conda, and of the wheels that torch uses.

    The wheels have what torch includes and a partial toolkit lacks.
    """
    site_packages = Path(torch.__file__).resolve().parent.parent
    folders = sorted(Path(CUDA_HOME).glob("targets/*/include"))
    folders += sorted((site_packages / "nvidia").glob("cu*/include"))
    return [flag for folder in folders for flag in ("-idirafter", str(folder))]


CUDA = cuda_toolkit()
if CUDA and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
    # torch would compile for the GPUs it sees, and fail where it sees none.
    os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES

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
        [
            ("GUMBEL_EXT_CUDA_VERSION", string_literal(CUDA)),
            ("GUMBEL_EXT_CUDA_ARCHITECTURES", string_literal(os.environ["TORCH_CUDA_ARCH_LIST"])),
        ]
        if CUDA
        else []
    ),
    extra_compile_args={
        "cxx": CXX_FLAGS + (cuda_include_flags() if CUDA else []),
        "nvcc": NVCC_FLAGS,
    },
)

setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": BuildWithRecord})
