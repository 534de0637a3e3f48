"""Time and peak memory of gumbel_ext beside its peers -> a JSON file for each suite.

python -m benchmarks.run [SUITE ...] [--device cpu|cuda|rehearsal] [--quick] [--cases PATTERN] ...
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._functorch import config as functorch_config

from benchmarks import cases, environment
from benchmarks.compiled import compiled
from benchmarks.device import Cpu, Device, Gpu, Rehearsal, answers, unusable
from benchmarks.race import Case, Options, Row, UnsuitableGpuError, first_line

FORMAT = 1
# Seconds after which what is measured is written again: it outlives whatever ends the process.
WRITTEN_EVERY = 10.0
INTERRUPTED = 130


class Progress:
    """A line on stderr that rewrites itself; nothing where stderr is not a terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()
        self.visible = sys.stderr.isatty()

    def start(self, name: str) -> None:
        """Show the case that starts now."""
        if not self.visible:
            return
        elapsed = time.monotonic() - self.started
        left = f", {elapsed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        text = f"[{self.done + 1}/{self.total}{left}] {name}"
        print(f"\r\x1b[2K{text[:110]}", end="", file=sys.stderr, flush=True)

    def finish(self, name: str, table: list[Row]) -> None:
        """Replace the line by the case's result."""
        self.done += 1
        if not self.visible:
            return
        cells = []
        for row in table:
            if "allocator_peak_bytes_per_element" in row:
                number = f"{row['allocator_peak_bytes_per_element']:.3g} B"
            elif "milliseconds_per_step" in row:
                number = f"{row['milliseconds_per_step']['median']:.3g} ms"
            else:
                number = f"{row['median_ns_per_element']:.3g}"
            cells.append(f"{row['contender']} {number}")
        print(f"\r\x1b[2K{name}: {', '.join(cells)}", file=sys.stderr, flush=True)


def dump(document: dict[str, Any], path: Path) -> None:
    """JSON with one table row on a line, so that two runs compare line by line."""
    tables = {"rows", "memory_rows"}
    parts = []
    for key, value in document.items():
        if key in tables:
            lines = ",\n".join("    " + json.dumps(row) for row in value)
            text = f"[\n{lines}\n  ]" if value else "[]"
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    unfinished.replace(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(cases.NAMES)}; all unless named"
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "rehearsal"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a minute")
    parser.add_argument("--cases", metavar="PATTERN", help="only cases named like *PATTERN*")
    parser.add_argument(
        "--threads", type=int, help="torch.set_num_threads (default 2, of the examples' steps 1)"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time instead of wall time: for a busy machine, and with --threads 1 alone",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory cases out")
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="start no further case after N seconds"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--output", type=Path, help="JSON file (default in benchmarks/results)")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.suites) - set(cases.NAMES))
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; there are {', '.join(cases.NAMES)}")
    arguments.suites = arguments.suites or list(cases.NAMES)
    threads, output = arguments.threads, arguments.output
    if threads is not None and threads < 1:
        parser.error(f"--threads must be at least 1, got {threads}")
    if arguments.cpu_time and threads != 1:
        # Threads that wait for each other spin, which is CPU time too.
        parser.error(f"--cpu-time needs --threads 1, got {threads}")
    if arguments.seconds is not None and not arguments.seconds > 0:
        parser.error(f"--seconds must be positive, got {arguments.seconds:g}")
    if output is not None and len(arguments.suites) > 1:
        parser.error("--output is for one suite: name it")
    if arguments.device == "rehearsal" and output is not None and "rehearsal" not in output.name:
        parser.error(f"--output of a rehearsal must be named so (rehearsal-...), got {output.name}")
    return arguments


def chosen(suite: ModuleType, device: type[Device], arguments: argparse.Namespace) -> list[Case]:
    pattern = f"*{arguments.cases}*" if arguments.cases else "*"
    wanted = [case for case in suite.cases(device) if case.quick or not arguments.quick]
    return [case for case in wanted if fnmatch.fnmatch(case.name, pattern)]


def result_path(name: str, device: Device, arguments: argparse.Namespace, kind: str) -> Path:
    """Only a whole run under the targets' conditions takes the name that is kept."""
    prefix = "" if name == "core" else f"{name}-"
    start = "rehearsal-" if device.rehearsal else ""
    ending = "" if device.rehearsal else kind
    path = environment.RESULTS / f"{start}{prefix}{device.file_name}{ending}.json"
    return arguments.output or path


@contextmanager
def unsearched(device: Device, arguments: argparse.Namespace) -> Iterator[None]:
    """The garbage collector without the compiler's modules: half a million objects that it would
    search around every case, for longer than most cases take.
    """
    if device.on_gpu and not arguments.no_compile:
        # Where it fails, each contender that wants it will say so.
        with suppress(Exception):
            compiled(lambda x: x.sin())(torch.ones(1, device=device.torch_device))
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def warn(message: str) -> None:
    print(f"benchmarks.run: {message}", file=sys.stderr)


def run_suite(
    name: str, suite: ModuleType, wanted: list[Case], arguments: argparse.Namespace, device: Device
) -> int:
    """Measures the cases in their order and writes the JSON; the exit status."""
    threads = arguments.threads or suite.THREADS
    if not device.on_gpu:
        torch.set_num_threads(threads)
    partial = arguments.cases or arguments.no_compile or arguments.no_memory
    partial = partial or (not device.on_gpu and threads != suite.THREADS)
    kind = "-quick" if arguments.quick else "-partial" if partial else ""
    output = result_path(name, device, arguments, kind)
    budget = device.quick if arguments.quick else device.full
    options = Options(arguments.quick, not arguments.no_compile, not arguments.no_memory, threads)
    state = device.state()
    document: dict[str, Any] = {
        "format": FORMAT,
        **({"device": "cuda", "rehearsal": device.rehearsal} if device.on_gpu else {}),
        "date": environment.now(),
        "quick": arguments.quick,
        "complete": False,
        "threads": torch.get_num_threads(),
        "clock": device.clock_name,
        "budget": asdict(budget),
        "machine": {
            **environment.machine(),
            **({"gpu": device.describe()} if device.on_gpu else {}),
        },
        "versions": environment.versions(),
        "revision": environment.revision(),
        device.state_name: {"before": state, "after": None},
        "duration_seconds": 0,
        "skipped": [],
        **suite.about(device),
        "rows": [],
        "memory_rows": [],
    }
    cores = document["machine"]["cores_available"]
    if not device.on_gpu and state is not None and state > 0.3 * cores:
        warn(f"load average {state:.2f}: the machine is not quiet")
    device.warm_up()
    if device.on_gpu:
        document[device.state_name]["warm"] = device.state()
    skipped = document["skipped"]
    progress = Progress(len(wanted))
    started = written = time.monotonic()
    out_of_time = f"out of {arguments.seconds or 0:g} s"
    excused = {out_of_time}
    interrupted = False
    # A backward is timed many times on one graph, which compiled ones forbid to save memory.
    backwards = functorch_config.patch(donated_buffer=False)
    try:
        with backwards, warnings.catch_warnings(), unsearched(device, arguments):
            warnings.simplefilter("ignore")  # torch's own, about its compiler: they bury the rest
            for case in wanted:
                elapsed = time.monotonic() - started
                if arguments.seconds is not None and elapsed >= arguments.seconds:
                    skipped.append({"case": case.name, "reason": out_of_time})
                    continue
                progress.start(case.name)
                rows: list[Row] = []
                try:
                    table, rows = suite.measure(case, device, budget, options, skipped)
                    document[table] += rows
                except UnsuitableGpuError as reason:
                    skipped.append({"case": case.name, "reason": str(reason)})
                    excused.add(str(reason))
                except Exception as error:  # one case should not end the run
                    skipped.append({"case": case.name, "reason": first_line(error)})
                    warn(f"skipped {case.name}: {first_line(error)}")
                    if not answers(device):
                        raise
                progress.finish(case.name, rows)
                gc.collect()
                device.empty_cache()
                if time.monotonic() - written > WRITTEN_EVERY:
                    document["duration_seconds"] = round(time.monotonic() - started)
                    dump(document, output)
                    written = time.monotonic()
    except KeyboardInterrupt:
        interrupted = True
    except RuntimeError as error:
        warn(f"the GPU is lost: {first_line(error)}")
        interrupted = True
    document["complete"] = not interrupted and not skipped
    document["duration_seconds"] = round(time.monotonic() - started)
    document[device.state_name]["after"] = device.state()
    dump(document, output)
    print(f"wrote {output} ({document['duration_seconds']} s)", flush=True)
    late = [s for s in skipped if s["reason"] == out_of_time]
    if late:
        print(f"{len(late)} of {len(wanted)} cases were left out for want of time")
    failed = any(s["reason"] not in excused for s in skipped)
    return INTERRUPTED if interrupted else 1 if failed else 0


DEVICES: dict[str, type[Device]] = {"cpu": Cpu, "cuda": Gpu, "rehearsal": Rehearsal}


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    """Runs the suites that are asked for, one after the other; the worst exit status."""
    arguments = parse_arguments(argv)
    kind = type(device) if device else DEVICES[arguments.device]
    reason = unusable() if kind is Gpu and not arguments.list else None
    if reason is not None:
        warn(reason)
        return 2
    if device is None and not arguments.list:
        # Before the cases: in a rehearsal what they compile is only traced.
        device = Cpu(arguments.cpu_time) if kind is Cpu else kind()
    suites = {name: cases.suite(name) for name in arguments.suites}
    wanted = {name: chosen(suite, kind, arguments) for name, suite in suites.items()}
    if not any(wanted.values()):
        warn(f"no case matches --cases {arguments.cases}" if arguments.cases else "no case")
        return 2
    if arguments.list or device is None:
        print("\n".join(case.name for found in wanted.values() for case in found))
        return 0
    statuses = [0]
    for name, found in wanted.items():
        if found and statuses[-1] != INTERRUPTED:
            statuses.append(run_suite(name, suites[name], found, arguments, device))
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
