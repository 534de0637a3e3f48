import os
import runpy
from pathlib import Path

import hypothesis
import oracle
import pytest
import torch
from feature_table import FeatureTable
from oracle import rng_state
from processes import Processes

# Compiling and sharing two cores make single examples slow; the seed is fixed for CI.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--features",
        choices=("check", "write"),
        help="compare docs/features.md with the tests that ran, or write it",
    )
    parser.addoption(
        "--device",
        choices=("cpu", "cuda", "emulated"),
        default="cpu",
        help="where the tests put their tensors (default cpu); emulated: on the CPU, but the "
        "operators run the kernels for CUDA, emulated",
    )


def pytest_configure(config):
    for marker in (
        "slow: takes minutes or many GB; runs with --slow",
        "cpu_only(reason): about the CPU kernels alone; skipped with --device cuda",
        "cuda_only: about the CUDA kernels; runs with --device cuda or emulated",
        "gpu_only(reason): needs hardware, not only the kernels; skipped with --device emulated",
        "sanitizer: small; also run under compute-sanitizer",
        "feature(name, *, ops, modes): a cell of docs/features.md that this test vouches for",
    ):
        config.addinivalue_line("markers", marker)
    if config.getoption("--features"):
        config.pluginmanager.register(FeatureTable(config.getoption("--features") == "write"))
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--device cuda: torch {torch.__version__} sees no GPU")
        if not torch._C._dispatch_has_kernel_for_dispatch_key("gumbel_ext::gumbel_softmax", "CUDA"):
            raise pytest.UsageError(
                "--device cuda: gumbel_ext was built without CUDA; "
                "run: FORCE_CUDA=1 pip install --no-build-isolation ."
            )
    if config.getoption("--device") == "emulated":
        torch.ops.load_library(emulated_library())
        torch.ops.gumbel_ext_emulated.take_over()
        oracle.emulated = True


def emulated_library():
    """Path of the operators for CUDA, emulated: GUMBEL_EXT_EMULATED_CUDA, or built if need be."""
    built = os.environ.get("GUMBEL_EXT_EMULATED_CUDA")
    if built:
        return built
    script = runpy.run_path(str(Path(__file__).parent / "cuda" / "emulated" / "build.py"))
    return str(script["build"](script["default_folder"]()))


def pytest_report_header(config):
    share = os.environ.get("CI_SHARE")
    if config.getoption("--device") == "emulated" and share:
        return f"share {share} of the tests with a device"
    return None


def choose_emulated(config, items):
    """Of the tests with a device, those of CI_SHARE: 2/6 is every sixth, from the second on.

    The others say nothing about the kernels, or too slowly.
    """
    share, of = map(int, os.environ.get("CI_SHARE", "1/1").split("/"))
    kept = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    kept = kept[share - 1 :: of]
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def pytest_collection_modifyitems(config, items):
    device = config.getoption("--device")
    if device == "emulated":
        choose_emulated(config, items)
    for item in items:
        cpu_only, gpu_only = map(item.get_closest_marker, ("cpu_only", "gpu_only"))
        if cpu_only and device != "cpu":
            reason = cpu_only.kwargs.get("reason", "the CPU kernels alone")
            item.add_marker(pytest.mark.skip(reason=f"cpu_only: {reason}"))
        if gpu_only and device == "emulated":
            reason = gpu_only.kwargs.get("reason", "the hardware, not only the kernels")
            item.add_marker(pytest.mark.skip(reason=f"gpu_only: {reason}"))
        if (item.get_closest_marker("cuda_only") or gpu_only) and device == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run with --device cuda"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def pytest_generate_tests(metafunc):
    # As a parameter, so that the names of the tests carry the device.
    if "device" in metafunc.fixturenames:
        device = metafunc.config.getoption("--device")
        where = "cpu" if device == "emulated" else device
        metafunc.parametrize("device", [where], ids=[device], indirect=True)


# For the whole session, so that hypothesis may share it among the examples of a test.
@pytest.fixture(scope="session")
def device(request):
    return request.param


@pytest.fixture
def state(device):
    """The rng_state whose noise ``oracle.noise`` gives."""
    return rng_state(device=device)


@pytest.fixture(params=[False, True], ids=["soft", "hard"])
def hard(request):
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(20260)


@pytest.fixture
def thread_count():
    """A function that sets the number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks():
    """Processes that each check what the function given to ``run`` computes there."""
    processes = Processes()
    yield processes
    processes.stop()
