"""docs/features.md from the tests: a cell is there because a test that vouches for it passed.

`make features` writes the file; `make test` compares.
"""

from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "features.md"
OPS = (
    "gumbel_softmax",
    "gumbel_softmax_hard",
    "gumbel_argmax",
    "gumbel_noise",
    "binary_concrete",
    "gumbel_topk",
    "gumbel_log_softmax",
    "concrete_log_prob",
    "straight_through_softmax",
    "soft_argmax",
    "decoupled_gumbel_softmax",
    "gumbel_rao",
    "zgr",
    "reinmax",
    "gapped_straight_through",
    "gumbel_embedding",
)
MODES = ("eager", "compiled", "exported")
# Sections in order: title, and the files whose tests are listed there.
SECTIONS = {
    "Derivatives and torch.func": ("test_functorch", "test_vmap"),
    "torch.compile and checkpointing": ("test_compile", "test_checkpoint"),
    "Export, deployment, C++, serialization": (
        "test_export",
        "test_onnx",
        "test_libtorch",
        "test_serialization",
    ),
    "Modes, dtypes, tensor subclasses": ("test_modes",),
    "Many processes": ("test_distributed", "test_dtensor"),
    "In place of `F.gumbel_softmax`": ("test_patch", "test_clients", "test_client_models"),
}
# Tests of the relatives: their features stand in the rows of the same name.
RELATIVES = (
    "test_binary_ops",
    "test_topk",
    "test_log_softmax",
    "test_concrete_density",
    "test_straight_through_softmax",
    "test_soft_argmax",
    "test_temperature",
    "test_estimators",
    "test_embedding_ops",
)
HEAD = """# What works where

Made from the tests by `make features`, and compared with them by `make test`: a word stands in a
cell if a test of that feature with that op passes. **eager**: called as it is. **compiled**: inside
`torch.compile`. **exported**: in a program of `torch.export`, AOTInductor, ONNX or TorchScript.
An empty cell is not tested; often there is nothing to test (an index has no derivative).

"""


def _own_section(item):
    module = Path(str(item.path)).stem
    return next((title for title, files in SECTIONS.items() if module in files), None)


def _sections(items):
    """The section of each feature, by the files that are listed there."""
    return {
        mark.args[0]: _own_section(item)
        for item in items
        if _own_section(item)
        for mark in item.iter_markers("feature")
    }


def _cells(item, sections):
    """``(section, feature, op, mode)`` that a test vouches for."""
    relative = Path(str(item.path)).stem in RELATIVES
    params = item.callspec.params if hasattr(item, "callspec") else {}
    for mark in item.iter_markers("feature"):
        (name,), ops, modes = mark.args, mark.kwargs["ops"], mark.kwargs["modes"]
        section = sections.get(name) if relative else _own_section(item)
        if section is None or not set(ops) <= set(OPS) or not set(modes) <= set(MODES):
            raise pytest.UsageError(f"{item.nodeid}: unknown section, op or mode of {mark}")
        for op in ops:
            # With the fixture `hard` a test of the softmax is one of its two forms.
            if op == "gumbel_softmax" and params.get("hard") is True:
                op = "gumbel_softmax_hard"
            elif op == "gumbel_softmax_hard" and params.get("hard") is False:
                op = "gumbel_softmax"
            for mode in modes:
                yield section, name, op, mode


class FeatureTable:
    def __init__(self, write):
        self.write = write
        self.cells = {}  # nodeid -> cells
        self.outcomes = {}  # cell -> outcomes of its tests

    def pytest_collection_modifyitems(self, items):
        sections = _sections(items)
        self.cells = {item.nodeid: list(_cells(item, sections)) for item in items}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            for cell in self.cells.get(report.nodeid, ()):
                self.outcomes.setdefault(cell, set()).add(report.outcome)

    def page(self, shown):
        text = [HEAD]
        for section in SECTIONS:
            features = sorted({cell[1] for cell in shown if cell[0] == section}, key=str.lower)
            if not features:
                continue
            text.append(f"## {section}\n\n")
            text.append("| | " + " | ".join(OPS) + " |\n" + "|---" * (1 + len(OPS)) + "|\n")
            for name in features:
                row = [
                    ", ".join(mode for mode in MODES if (section, name, op, mode) in shown)
                    for op in OPS
                ]
                text.append(f"| {name} | " + " | ".join(row) + " |\n")
            text.append("\n")
        return "".join(text).rstrip() + "\n"

    def pytest_sessionfinish(self, session):
        passed = {
            c for c, seen in self.outcomes.items() if "passed" in seen and "failed" not in seen
        }
        if self.write:
            PAGE.write_text(self.page(passed), encoding="utf-8")
            return
        # What this machine cannot show is no contradiction.
        skipped = {c for c, seen in self.outcomes.items() if seen == {"skipped"}}
        page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if page not in (self.page(passed), self.page(passed | skipped)):
            reporter = session.config.pluginmanager.get_plugin("terminalreporter")
            reporter.write_line(
                f"{PAGE.name} is not what the tests say; run: make features", red=True
            )
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
