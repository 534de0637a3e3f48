"""Loads the compiled module, or says in one line why it does not load and what mends it.

A C++ extension of PyTorch works with the minor release of torch it was compiled for and no other,
and one with CUDA kernels only with a torch of the same major release of CUDA. Otherwise it may fail
to load with an undefined symbol, or load and misbehave. The build therefore leaves a record beside
the module (`_built_for.json`) that is read before the module is.
"""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

RECORD = Path(__file__).with_name("_built_for.json")
SOURCE_TREE = Path(__file__).resolve().parent.parent
INSTALL_COMMAND = "pip install --no-build-isolation --no-deps"


class BuiltFor(NamedTuple):
    """What the module was compiled for; `cuda` is None if it has no CUDA kernels."""

    torch: str
    cuda: str | None


def built_for() -> BuiltFor | None:
    """Returns what the record beside the module says; None if there is no record."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        return BuiltFor(record["torch"], record.get("cuda"))
    except (OSError, ValueError, KeyError):
        return None


def install_command() -> str:
    """Returns the command that compiles the package again for the torch of this environment."""
    if (SOURCE_TREE / "setup.py").is_file():
        # Imported from the source tree itself, where only an editable install puts the module.
        return f"{INSTALL_COMMAND} --editable {shlex.quote(str(SOURCE_TREE))}"
    return f"{INSTALL_COMMAND} --force-reinstall . (in the source tree of gumbel_ext)"


def check_torch_version(running: str, built_for: str) -> None:
    """Raises ImportError unless both versions of torch have the same major and minor number."""
    if running.split(".")[:2] != built_for.split(".")[:2]:
        raise ImportError(
            f"gumbel_ext was built for torch {built_for}, found torch {running}; "
            f"run: {install_command()}"
        )


def check_cuda_version(running: str | None, built_for: str | None) -> None:
    """Raises ImportError if the module has CUDA kernels that this torch cannot run.

    Args:
        running: the CUDA release of this torch, `torch.version.cuda`; None in a build without CUDA.
        built_for: the CUDA release of the toolkit that compiled the kernels; None without kernels,
            which goes with every torch.
    """
    if built_for is None:
        return
    if running is None or running.split(".")[0] != built_for.split(".")[0]:
        found = "without CUDA" if running is None else f"for CUDA {running}"
        raise ImportError(
            f"gumbel_ext was built for CUDA {built_for}, found torch {torch.__version__}, built "
            f"{found}; run: {install_command()}"
        )


def load_compiled_module() -> ModuleType:
    """Imports `gumbel_ext._C`, which registers the ops with the dispatcher.

    Raises:
        ImportError: the module is missing, was built for another torch or CUDA, or does not load.
            The message ends with the command that mends it.
    """
    build = built_for()
    if build is not None:
        check_torch_version(torch.__version__, build.torch)
        check_cuda_version(torch.version.cuda, build.cuda)
    try:
        return importlib.import_module("gumbel_ext._C")
    except ModuleNotFoundError as error:
        if error.name != "gumbel_ext._C":
            raise
        raise ImportError(
            f"gumbel_ext in {Path(__file__).parent} has no compiled module for this Python; "
            f"run: {install_command()}"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"gumbel_ext._C, built for torch {build.torch if build else 'unknown'}, does not load "
            f"with torch {torch.__version__}: {error}; run: {install_command()}"
        ) from error
