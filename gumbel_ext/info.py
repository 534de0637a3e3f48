"""What is installed and in use, to read or to paste into a report.

    python -m gumbel_ext.info           a table
    python -m gumbel_ext.info --json    the same as one JSON object

It also works, and says why, when the compiled module does not load; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from gumbel_ext._build_check import built_for, install_command, load_compiled_module
from gumbel_ext._version import __version__

CAPABILITY_VARIABLE = "GUMBEL_EXT_CPU_CAPABILITY"


def registered_ops() -> list[str]:
    """Returns the schema of every op that `gumbel_ext` has registered, sorted by name."""
    schemas = torch._C._jit_get_all_schemas()
    return sorted(str(schema) for schema in schemas if schema.name.startswith("gumbel_ext::"))


def public_names() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Finds what the modules of the package export.

    Returns:
        By module, the package itself first, each name of its ``__all__`` with what it is: class,
        function or value. And by module the reason why it cannot be imported, such as a package
        that is not installed.
    """
    package = importlib.import_module("gumbel_ext")
    found = [module.name for module in pkgutil.iter_modules(package.__path__)]
    public = [f"gumbel_ext.{name}" for name in found if not name.startswith("_")]
    names: dict[str, dict[str, str]] = {}
    missing: dict[str, str] = {}
    for path in ["gumbel_ext", *sorted(public)]:
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            missing[path] = str(error)
            continue
        exported = {name: _kind(getattr(module, name)) for name in getattr(module, "__all__", ())}
        if exported:
            names[path] = dict(sorted(exported.items()))
    return names, missing


def _kind(value: object) -> str:
    if inspect.isclass(value):
        return "class"
    return "function" if callable(value) else "value"


def cuda_sentence(build_cuda: str | None, torch_cuda: str | None, gpus: int) -> str:
    """Says whether the ops run on CUDA, and if not, why and what to do about it.

    Args:
        build_cuda: the CUDA release that the kernels were compiled with; None in a CPU build.
        torch_cuda: the CUDA release of this torch; None in a build without CUDA.
        gpus: how many GPUs torch sees.
    """
    if build_cuda is not None:
        if gpus:
            return f"CUDA {build_cuda} kernels are built in; GPUs seen by torch: {gpus}."
        return f"CUDA {build_cuda} kernels are built in, but torch sees no GPU."
    command = f"FORCE_CUDA=1 {install_command()}"
    if torch_cuda is None:
        return (
            "This build has no CUDA kernels, and this torch has no CUDA. To build them, install a "
            f"torch with CUDA and a CUDA toolkit of the same major release, then run: {command}"
        )
    return (
        "This build has no CUDA kernels. To build them, install a CUDA "
        f"{torch_cuda.split('.')[0]} toolkit with nvcc, then run: {command}"
    )


def collect() -> dict[str, object]:
    """Returns versions, machine, CPU capability, CUDA, build flags, names and ops; JSON types only.

    `error` is None when the compiled module can be used. Otherwise it says why not, and what could
    not be found out is None or empty.
    """
    record = built_for()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    info: dict[str, object] = {
        "gumbel_ext": __version__,
        "location": str(Path(__file__).parent),
        "error": None,
        "torch": torch.__version__,
        "torch_built_for": record.torch if record else None,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": None,
        "cpu_capabilities": [],
        "cpu_capability_forced": os.environ.get(CAPABILITY_VARIABLE),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
        "cuda": None,
        "build": None,
        "names": {},
        "not_importable": {},
        "ops": [],
    }
    try:
        load_compiled_module()
        from gumbel_ext import _C

        build = _C.build_info()
        info["build"] = build
        info["cuda"] = cuda_sentence(
            build["cuda"]["version"] if build["cuda"] else None, torch.version.cuda, gpus
        )
        info["names"], info["not_importable"] = public_names()
        info["ops"] = registered_ops()
        info["cpu_capabilities"] = _C.cpu_capabilities()
        info["cpu_capability"] = _C.cpu_capability()
    except (ImportError, ValueError) as error:  # ValueError: the variable names no capability
        info["error"] = str(error)
    return info


def as_table(info: Mapping[str, object]) -> str:
    """Lays out what `collect` returns as lines of `name  value`, nested values indented."""
    lines = []
    for name, value in info.items():
        if (name == "error" and value is None) or (name == "not_importable" and not value):
            continue
        if name == "names" and isinstance(value, Mapping):
            lines.append(f"{name:<22}  {sum(map(len, value.values()))}")
            width = max(map(len, value), default=0)
            lines += [f"  {key:<{width}}  {', '.join(item)}" for key, item in value.items()]
        elif isinstance(value, Mapping):
            lines.append(name)
            lines += [f"  {key:<20}  {_as_text(item)}" for key, item in value.items()]
        elif name == "ops" and isinstance(value, list):
            lines.append(f"{name:<22}  {len(value)}")
            lines += [f"  {schema}" for schema in value]
        else:
            lines.append(f"{name:<22}  {_as_text(value)}")
    return "\n".join(lines)


def _as_text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_as_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def main() -> int:
    """Prints the information; returns 1 if the compiled module cannot be used, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m gumbel_ext.info", description="What gumbel_ext is installed and in use."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()

    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else as_table(info))
    return 0 if info["error"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
