import hypothesis
import pytest
import torch
from oracle import rng_state

from gumbel_ext import _C

DEVICES = ["cpu"]
if torch.cuda.is_available() and _C.build_info().get("cuda"):
    DEVICES.append("cuda")

# Compiling and sharing two cores make single examples slow; the seed is fixed for CI.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes or many GB; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(params=DEVICES)
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
