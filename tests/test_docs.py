"""The Python in the pages of docs/ runs as it stands."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# test_deployment_docs.py runs the one, with what takes minutes replaced; the lines of the other are
# parts of programs for several processes, which test_distributed.py and test_dtensor.py run.
ELSEWHERE = ("deployment.md", "distributed.md")
PAGES = sorted(page.name for page in DOCS.glob("*.md") if page.name not in ELSEWHERE)


def blocks(page):
    """The Python blocks of a page, each after as many empty lines as precede it there."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text.count("\n", 0, block.start(1)) + block[1]


@pytest.mark.cpu_only(reason="the pages' tensors are on the CPU")
@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))])
def test_the_pages_python_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, one after the other, with the names of those before."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, str(DOCS / page), "exec"), names)
