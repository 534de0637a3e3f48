"""Whether the tests that ran launched every kernel of csrc/cuda, for `pytest -p launched_kernels`.

What no test launches, no sanitizer looks at.  Fails the run, and names what is missing.
"""

import re
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"


def kernels_of_the_sources():
    files = [*SOURCES.glob("*.cuh"), *SOURCES.glob("*.cu")]
    found = (
        re.findall(r"^GUMBEL_EXT_KERNEL\(.*\n(\w+_kernel)\(", f.read_text(), re.M) for f in files
    )
    return {name for names in found for name in names}


class Launches:
    """Of one run, as the profiler of CUDA has them."""

    def pytest_sessionstart(self, session):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profile.start()

    def names(self):
        torch.cuda.synchronize()
        self.profile.stop()
        events = self.profile.profiler.kineto_results.events()
        found = (re.search(r"(\w+_kernel)\b", event.name()) for event in events)
        return {match[1] for match in found if match}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        every = kernels_of_the_sources()
        self.missing = sorted(every - self.names())
        self.of = len(every)
        if self.missing and session.exitstatus == 0:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter):
        launched = self.of - len(self.missing)
        terminalreporter.line(f"launched {launched} of {self.of} kernels", bold=True)
        for name in self.missing:
            terminalreporter.line(f"never launched: {name}", red=True)


def pytest_configure(config):
    if config.getoption("--device") != "cuda":
        raise pytest.UsageError("-p launched_kernels: only CUDA's profiler knows; see --device")
    config.pluginmanager.register(Launches())
