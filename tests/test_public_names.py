"""Every public name is listed by ``python -m gumbel_ext.info``, documented and annotated."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gumbel_ext
from gumbel_ext import info

PACKAGE = Path(gumbel_ext.__file__).parent


def module_name(file):
    return "gumbel_ext" if file.stem == "__init__" else f"gumbel_ext.{file.stem}"


def exported():
    """``(module, name)`` of every name in the ``__all__`` of a public file, read from its text."""
    for file in sorted(PACKAGE.glob("*.py")):
        if file.stem.startswith("_") and file.stem != "__init__":
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    yield module_name(file), name


NAMES = list(exported())


@pytest.mark.cpu_only(reason="names are those of the package, whatever the device")
def test_info_lists_every_public_name():
    command = [sys.executable, "-m", "gumbel_ext.info", "--json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert ("gumbel_ext.functional", "gumbel_softmax") in NAMES
    names = {(module, name) for module, found in listed["names"].items() for name in found}
    assert names == {(module, name) for module, name in NAMES if module in listed["names"]}
    # A module is left out only where something it needs is not installed.
    left_out = {module for module, _ in NAMES} - set(listed["names"])
    assert left_out == set(listed["not_importable"])
    assert left_out <= {"gumbel_ext.onnx"}

    lines = [line.split(maxsplit=1) for line in info.as_table(listed).splitlines()]
    for module, found in listed["names"].items():
        assert [module, ", ".join(found)] in lines


def test_info_says_why_a_module_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gumbel_ext.patch", None)
    names, missing = info.public_names()
    assert "gumbel_ext.patch" not in names
    assert "gumbel_ext.patch" in missing
    table = info.as_table({"names": names, "not_importable": missing})
    assert missing["gumbel_ext.patch"] in table


def public_functions(value):
    """A function itself; of a class, what it defines under a public name, and its constructor."""
    if not inspect.isclass(value):
        return [value]
    found = []
    for name, member in vars(value).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if inspect.isfunction(function) and (not name.startswith("_") or name == "__init__"):
            found.append(function)
    return found


@pytest.mark.parametrize(("module", "name"), NAMES, ids=map(".".join, NAMES))
def test_a_public_name_is_documented_and_annotated(module, name):
    if module == "gumbel_ext.onnx":
        pytest.importorskip("onnxscript")
    value = getattr(importlib.import_module(module), name)
    if name == "__version__":
        assert isinstance(value, str)
        return
    # Not inherited: a class without a docstring would show that of its base. And not generated: a
    # dataclass without one shows its signature.
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc
    assert not doc.startswith(f"{name}(")
    for function in public_functions(value):
        if function.__name__ != "__init__":
            documented = inspect.getdoc(getattr(value, function.__name__, function))
            assert documented, f"{function.__qualname__} has no docstring"
        signature = inspect.signature(function)
        missing = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
        ]
        assert not missing, f"{function.__qualname__}: {missing} are not annotated"
        assert signature.return_annotation is not signature.empty, function.__qualname__
