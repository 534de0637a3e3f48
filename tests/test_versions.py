"""A module built for another torch is refused in one line that says what mends it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gumbel_ext
from gumbel_ext import _build_check

PACKAGE = Path(gumbel_ext.__file__).parent
MODULES = [path.name for path in PACKAGE.glob("_C.*.so")]
# An editable install finds the module in the tree for every package of this name.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]; "
INSTALL = "pip install --no-build-isolation --no-deps"


@pytest.mark.parametrize(
    ("running", "built_for"),
    [("2.13.0", "2.13.0"), ("2.13.1+cpu", "2.13.0+cu130"), ("2.8.0", "2.8.0a0+git1234")],
)
def test_same_minor_release_is_accepted(running, built_for):
    _build_check.check_torch_version(running, built_for)


@pytest.mark.parametrize(
    ("running", "built_for"),
    [("2.8.0", "2.13.0"), ("2.13.0+cpu", "2.11.0"), ("2.1.3", "2.13.0"), ("3.13.0", "2.13.0")],
)
def test_other_releases_are_refused(running, built_for):
    with pytest.raises(ImportError) as caught:
        _build_check.check_torch_version(running, built_for)
    message = str(caught.value)
    assert message.startswith(f"gumbel_ext was built for torch {built_for}, found torch {running};")
    assert message.endswith(f"run: {_build_check.install_command()}")
    assert "\n" not in message


def test_record_of_this_build():
    """Of the torch that compiled the module, which the module itself repeats."""
    from gumbel_ext import _C

    assert _build_check.built_for().torch == torch.__version__
    assert _C.build_info()["torch"] == torch.__version__


@pytest.fixture
def package(tmp_path):
    """A copy of the package to spoil: its folder. The compiled module is a link."""
    copy = tmp_path / "gumbel_ext"
    copy.mkdir()
    for path in PACKAGE.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, copy)
    for name in MODULES:
        (copy / name).symlink_to(PACKAGE / name)
    (copy / "_built_for.json").write_text((PACKAGE / "_built_for.json").read_text())
    return copy


def run(package, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=package.parent,
        env={"PYTHONPATH": str(package.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def other_torch(package):
    record = json.loads((package / "_built_for.json").read_text())
    (package / "_built_for.json").write_text(json.dumps(record | {"torch": "2.99.0"}))
    # A module of another torch may crash instead of failing: it must not even be opened.
    for name in MODULES:
        (package / name).unlink()
        (package / name).write_bytes(b"opened")
    return f"gumbel_ext was built for torch 2.99.0, found torch {torch.__version__}"


def no_module(package):
    for name in MODULES:
        (package / name).unlink()
    (package / "_built_for.json").unlink()
    return f"gumbel_ext in {package} has no compiled module for this Python"


def broken_module(package):
    for name in MODULES:
        (package / name).unlink()
        (package / name).write_bytes(b"\x7fELF")
    return (
        f"gumbel_ext._C, built for torch {torch.__version__}, does not load with torch "
        f"{torch.__version__}: "
    )


@pytest.mark.parametrize("spoil", [other_torch, no_module, broken_module])
def test_import_says_what_mends_it(package, spoil):
    expected = spoil(package)
    done = run(package, "-c", ALONE + "import gumbel_ext")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {expected}")
    assert re.search(rf"; run: {INSTALL} --force-reinstall \. \(in the source tree", last)


def test_info_still_answers(package):
    """It is what one runs to find out."""
    expected = other_torch(package)
    done = run(package, "-m", "gumbel_ext.info", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["error"].startswith(expected)
    assert (found["torch"], found["torch_built_for"]) == (torch.__version__, "2.99.0")
    assert found["ops"] == []


def test_the_copy_itself_is_sound(package):
    """Or the tests above would show the copy's faults."""
    call = "import gumbel_ext, torch; gumbel_ext.gumbel_softmax(torch.ones(3))"
    done = run(package, "-c", ALONE + call)
    assert (done.returncode, done.stderr) == (0, "")
