"""No import circles, nor such as imports inside functions hide until they are called."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = ["benchmarks", "gumbel_ext"]


def modules_of(package):
    """Module -> file, for all modules of a package; of a compiled one the file is its stub."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py*")):
        if path.suffix not in (".py", ".pyi"):
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module, path, modules):
    """The modules that a module names in its imports, wherever in it they stand.

    `from package import name` means the module of that name where there is one, and else the
    package. A block under `if TYPE_CHECKING` imports nothing.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found = name if name in modules else base
                if found in modules:
                    yield found


def circle(graph):
    """A circle of the graph as a list of modules, the first one again at its end; else None."""
    done = set()

    def search(module, way):
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return None
        for following in sorted(graph.get(module, ())):
            found = search(following, [*way, module])
            if found:
                return found
        done.add(module)
        return None

    return next(filter(None, (search(module, []) for module in sorted(graph))), None)


def graph_of(package):
    modules = modules_of(package)
    return {
        module: set(imported(module, path, modules)) - {module} for module, path in modules.items()
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other(package):
    graph = graph_of(package)
    assert sum(map(len, graph.values())) > len(graph) / 2  # imports are found at all
    found = circle(graph)
    assert found is None, " -> ".join(found)


def test_a_circle_is_found_wherever_it_hides(tmp_path, monkeypatch):
    monkeypatch.setattr("test_imports.ROOT", tmp_path)
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from package.a import x\n")
    (package / "a.py").write_text("import package.inner.b\nif TYPE_CHECKING:\n    from . import c")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "b.py").write_text("def f():\n    from .. import c\n")
    (package / "c.py").write_text("x = 1\n")
    assert circle(graph_of("package")) is None
    (package / "c.py").write_text("def f():\n    from .a import x\n")
    names = ["a", "inner.b", "c", "a"]
    assert circle(graph_of("package")) == [f"package.{name}" for name in names]
