"""The suites: every module and package here is one, and is found by that; see benchmarks.race."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

NAMES = tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))


def suite(name: str) -> ModuleType:
    """Imports one; the examples want packages that the core does without."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
