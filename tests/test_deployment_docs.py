"""The Python in docs/deployment.md runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"


@pytest.mark.cpu_only(reason="the page's tensors are on the CPU")
def test_the_pages_python_runs(tmp_path, monkeypatch):
    """All blocks, one after the other. AOTInductor's minutes are spent in test_libtorch.py."""
    monkeypatch.chdir(tmp_path)
    programs = []

    def compile_and_package(program, *, package_path):
        assert isinstance(program, torch.export.ExportedProgram)
        programs.append(program)
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: programs.pop().module())
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["y"].shape == (4, 8)
    assert (names["y"].argmax(-1) == names["index"]).all()
