"""Without Python: the library that CMake builds, and AOTInductor's packages on top of it.

The library is built below build/, from the same sources as the Python module, and again only when
they changed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim, export

import gumbel_ext

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / f"cmake-{torch.__version__}"
OP_NAMES = ("gumbel_softmax", "gumbel_softmax_hard", "gumbel_argmax", "gumbel_noise")

pytestmark = pytest.mark.cpu_only(reason="the library is built without CUDA here")


def tool(name):
    """The one beside the interpreter, as pip installs it, or the one on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing; run: pip install -r requirements-dev.txt")
    return found


def run(*command):
    """With the package that is under test, wherever this one was found."""
    path = os.pathsep.join((str(Path(gumbel_ext.__file__).parents[1]), *sys.path))
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def programs():
    """Folder of the client's programs, which use the installed library."""
    try:
        run(
            tool("cmake"),
            *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
            *("-S", ROOT, "-B", FOLDER, "-DCMAKE_BUILD_TYPE=Release"),
            *("-DGUMBEL_EXT_CUDA=OFF", "-DGUMBEL_EXT_TESTS=ON"),
            "-DGUMBEL_EXT_PRECOMPILED_HEADERS=ON",
            f"-DTorch_DIR={torch.utils.cmake_prefix_path}/Torch",
            f"-DPython_EXECUTABLE={sys.executable}",
        )
    except AssertionError as error:
        if torch.version.cuda is None or "PyTorch: CUDA cannot be found" not in str(error):
            raise
        pytest.skip("a torch with CUDA is found by CMake only where there is a whole CUDA toolkit")
    run(tool("cmake"), "--build", FOLDER, "-j", os.environ.get("MAX_JOBS", "2"))
    run(tool("ctest"), "--test-dir", FOLDER, "--output-on-failure", "-R", "install|build_client")
    return FOLDER / "client"


@pytest.mark.feature("C++: libtorch without Python", ops=OP_NAMES, modes=("eager",))
def test_client_matches_python(programs):
    """Every function of the header, forward and backward, every dtype: bit for bit."""
    output = run(tool("ctest"), "--test-dir", FOLDER, "--verbose", "-R", "expected|client")
    assert "100 tensors compared with Python's, 0 failures" in output
    assert "100% tests passed" in output


def test_client_sees_a_difference(programs, tmp_path):
    """The comparison can fail, on the last bit of one element."""
    sys.path.insert(0, str(ROOT / "tests" / "cpp" / "client"))
    try:
        from expected import expected
    finally:
        sys.path.pop(0)
    tensors = expected()
    changed = tensors["float32.hard.masked.grad_tau"]
    changed[0] = torch.nextafter(changed[0], torch.tensor(torch.inf))
    torch.save(tensors, tmp_path / "changed.pt")
    done = subprocess.run(
        [programs / "client", tmp_path / "changed.pt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "float32.hard.masked.grad_tau differs" in done.stdout
    assert "1 failures" in done.stdout


def test_installed_package_refuses_another_torch(programs, tmp_path):
    """One minor release of libtorch has one ABI."""
    series = ".".join(torch.__version__.split(".")[:2])
    (tmp_path / "TorchConfig.cmake").write_text("set(Torch_FOUND TRUE)\n")
    (tmp_path / "TorchConfigVersion.cmake").write_text(
        "set(PACKAGE_VERSION 2.7.1)\nset(PACKAGE_VERSION_COMPATIBLE TRUE)\n"
    )
    done = subprocess.run(
        [
            *(tool("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
            *("-S", ROOT / "tests" / "cpp" / "client", "-B", tmp_path / "build"),
            *(f"-Dgumbel_ext_ROOT={FOLDER / 'installed'}", f"-DTorch_DIR={tmp_path}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert f"gumbel_ext was built for libtorch {series}, found 2.7.1; build it again" in message


# ---- AOTInductor --------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(6, 8)

    def forward(self, x, tau, state):
        logits = self.encoder(x)
        y, index = gumbel_ext.gumbel_softmax(logits, tau, return_index=True)
        return (
            y,
            index,
            gumbel_ext.gumbel_softmax(logits, 0.7, hard=True),
            gumbel_ext.gumbel_softmax(logits, 0.7, hard=True),
            gumbel_ext.gumbel_softmax(logits, tau, rng_state=state),
            gumbel_ext.gumbel_argmax(logits),
            gumbel_ext.gumbel_noise(logits.shape),
        )


def inputs(rows):
    return torch.randn(rows, 6), torch.tensor(0.5), torch.tensor([-(2**62) - 3, 2**40 + 1])


@pytest.fixture(scope="module")
def model_and_package(tmp_path_factory):
    torch.manual_seed(1)
    model = Model().eval()
    with torch.no_grad():
        program = export(model, inputs(4), dynamic_shapes=({0: Dim("batch")}, None, None))
        path = tmp_path_factory.mktemp("aoti") / "model.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return model, path


def eager_results(model, arguments, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return [*model(*arguments), *model(*arguments)]


def assert_same(actual, expected):
    """The ops run the same kernels; what surrounds them may round otherwise."""
    assert len(actual) == len(expected) == 14
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        if a.dtype == torch.int64:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for first, second in ((2, 3), (0, 7), (6, 13)):
        assert not torch.equal(actual[first], actual[second])


@pytest.mark.feature("AOTInductor from Python", ops=OP_NAMES, modes=("exported",))
@pytest.mark.parametrize("rows", [4, 9, 2])
def test_package_in_python(model_and_package, rows):
    model, path = model_and_package
    package = torch._inductor.aoti_load_package(str(path))
    arguments = inputs(rows)
    torch.manual_seed(7)
    actual = [*package(*arguments), *package(*arguments)]
    assert_same(actual, eager_results(model, arguments, 7))


@pytest.mark.feature("AOTInductor from C++", ops=OP_NAMES, modes=("exported",))
@pytest.mark.parametrize("rows", [4, 9, 2])
def test_package_in_cpp(programs, model_and_package, tmp_path, rows):
    model, path = model_and_package
    arguments = inputs(rows)
    torch.save(list(arguments), tmp_path / "inputs.pt")
    run(programs / "run_package", path, 7, tmp_path / "inputs.pt", tmp_path / "outputs.pt")
    actual = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert_same(actual, eager_results(model, arguments, 7))
