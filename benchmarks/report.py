"""Everything that needs a GPU, in ten minutes and without a network -> a folder with its report.

python -m benchmarks.report [--out FOLDER] [--seconds N] [--only STAGE,...] [--prebuilt FOLDER]
                            [--rehearse]

Builds for the GPU, runs the tests on it, compute-sanitizer, the benchmarks and the profiler. The
folder gets eight files at most: report.json, summary.txt, log.txt, bench.json, family.json,
gpu-speed.png, gpu-memory.png, rest.tar.gz. Python must have torch, and for the tests pytest,
hypothesis, scipy and mpmath. GUMBEL_EXT_COMMIT names the commit where there is no .git,
GUMBEL_EXT_EMULATED_CUDA the emulated kernels for a rehearsal if they are built.

Exit status: 0 where no stage failed; skipped ones have a reason. A sanitizer that was cut without
having found anything has not failed; how far it came is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Neither gumbel_ext nor a module that imports it: the build comes first.
from benchmarks import ncu
from benchmarks.report_json import COUNTS, built, clocks, device_record, near_ties, tests_of

ROOT = Path(__file__).resolve().parents[1]

STAGES = ("build", "tests", "suite", "kernels", "sanitizers", "bench", "family", "ncu", "plots")
CHECKS = ("tests", "suite", "kernels", "sanitizers")


@dataclass(frozen=True)
class Part:
    """Stages of a run that go on at the same time."""

    name: str
    share: int  # of the time that this and the later parts have
    most: int  # seconds
    stages: tuple[str, ...]


PARTS = (
    Part("build", 120, 400, ("build",)),
    Part("checks", 200, 420, CHECKS),
    Part("bench", 110, 420, ("bench",)),
    Part("family", 60, 260, ("family",)),
    Part("ncu", 50, 180, ("ncu",)),
    Part("plots", 20, 60, ("plots",)),
)
SHORTEST = 5  # seconds that a stage is started for


class Schedule:
    """Shares the time of a run out among its parts; what a part leaves the next ones have."""

    def __init__(
        self, seconds: int, only: Iterable[str], now: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self._now, self._started = seconds, now, now()
        self.stages = tuple(only)
        self.parts = [part for part in PARTS if set(part.stages) & set(self.stages)]

    @property
    def spent(self) -> int:
        """Seconds since the start."""
        return int(self._now() - self._started)

    def room(self, name: str) -> int:
        """Seconds that a part may take, of those that are left."""
        names = [part.name for part in self.parts]
        due = self.parts[names.index(name) :]
        left = self.seconds - self.spent
        room = left * due[0].share // sum(part.share for part in due)
        # Nothing runs without the build: it may take twice its share from the others.
        room = 2 * room if name == "build" else room
        return min(room, left - 5, due[0].most)

    def plan(self) -> str:
        """The shares as they are at the start."""
        whole = sum(part.share for part in self.parts)
        shares = (
            f"{part.name} {min(self.seconds * part.share // whole, part.most)} s"
            for part in self.parts
        )
        return f"plan: {', '.join(shares)}; in all {self.seconds} s"


@dataclass
class Stage:
    """One command, its log, and how it ended."""

    name: str
    log: Path
    limit: int = 0
    outcome: str = "running"  # then ok, skipped, FAILED or cut
    detail: str = ""
    seconds: int = 0
    was_cut: bool = False
    process: subprocess.Popen[bytes] | None = None
    waiting: threading.Thread | None = None

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        """Runs the command in the background, in a process group of its own."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        self.waiting = threading.Thread(target=self._wait, args=(time.monotonic(),), daemon=True)
        self.waiting.start()

    def _wait(self, started: float) -> None:
        assert self.process is not None
        try:
            self.process.wait(self.limit)
        except subprocess.TimeoutExpired:
            self.was_cut = True
            self.end(signal.SIGINT)  # on which Python ends with what it has
        self.seconds = int(time.monotonic() - started)

    def end(self, how: signal.Signals) -> None:
        """Ends what the command has started; what does not end is killed."""
        assert self.process is not None
        for sign, patience in ((how, 10), (signal.SIGKILL, None)):
            try:
                os.killpg(self.process.pid, sign)
                self.process.wait(patience)
                return
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return

    def text(self) -> str:
        """The log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def last_line(self, pattern: str) -> str:
        """The last line of the log with the pattern, for a table."""
        found = [line for line in self.text().splitlines() if re.search(pattern, line)]
        return found[-1].replace("\t", " ").strip("= \r")[:110] if found else ""

    def judge(
        self, pattern: str, excuse: str = "", unharmed: str = "", failed: bool = False
    ) -> None:
        """Waits; the last line with `pattern` tells how it went.

        A failure with `excuse` is a skipped stage; one that was cut with `unharmed` has only not
        come to its end.
        """
        if self.process is None:
            return
        assert self.waiting is not None
        self.waiting.join()
        status, text = self.process.returncode, self.text()
        self.detail = self.last_line(pattern)
        if status == 0 and not failed and not self.was_cut:
            self.outcome = "ok"
        elif excuse and re.search(excuse, text):
            self.outcome, self.detail = "skipped", self.last_line(excuse)
        elif self.was_cut:
            harmed = failed or re.search(r"^(FAILED|ERROR) |[1-9]\d* failed", text, re.MULTILINE)
            unharmed_so_far = unharmed and re.search(unharmed, text, re.MULTILINE) and not harmed
            self.outcome = "cut" if unharmed_so_far else "FAILED"
            self.detail = f"cut after {self.limit} s; {self.detail}"
        else:
            self.outcome = "FAILED"
            self.detail = f"{self.detail or self.last_line('[^ ]')} (exit {status})"


def missing(*modules: str) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


@dataclass
class Report:
    """A run: its stages, and what they leave behind."""

    arguments: argparse.Namespace
    schedule: Schedule
    work: Path
    out: Path
    gpu: str
    capability: str
    about: dict[str, Any]
    stages: dict[str, Stage] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    limits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.work / "rest").mkdir()
        toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
        # ninja and the CUDA tools may lie beside the interpreter and in the toolkit alone.
        places = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), str(toolkit)]
        os.environ["PATH"] = os.pathsep.join(places)
        self.environment |= {
            "PATH": os.environ["PATH"],
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
            ),
        }

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU."""
        return bool(self.arguments.rehearse)

    def wanted(self, stage: str) -> bool:
        """Whether the stage is asked for."""
        return stage in self.schedule.stages

    def skip(self, name: str, reason: str) -> None:
        """Leaves a stage out."""
        self.stages[name] = Stage(name, self.work / f"{name}.log", 0, "skipped", reason)
        print(f"-- {name}: skipped: {reason}", flush=True)

    def start(self, name: str, limit: int, command: list[str], **environment: str) -> None:
        """Starts a stage in the background, for so many seconds at most."""
        if limit < SHORTEST:
            self.skip(name, "no time was left")
            return
        stage = self.stages[name] = Stage(name, self.work / f"{name}.log", limit)
        stage.start(command, {**self.environment, **environment})
        print(f"-- {name}: at most {limit} s", flush=True)

    def finish(self, name: str, pattern: str, excuse: str = "") -> None:
        """Waits for a stage, if it was started; see Stage.judge."""
        stage = self.stages.get(name)
        if stage is None or stage.process is None:
            return
        stage.judge(pattern, excuse)
        self.said(stage)

    def said(self, stage: Stage) -> None:
        """Tells how a stage ended."""
        print(
            f"-- {stage.name}: {stage.outcome} after {stage.seconds} s: {stage.detail}", flush=True
        )
        self.write()

    def ended_well(self, name: str) -> bool:
        """Whether nothing is wrong with a stage, or it was not asked for."""
        return name not in self.stages or self.stages[name].outcome == "ok"

    @property
    def reason_without_build(self) -> str:
        """Why nothing that needs the build can run; empty where it can."""
        if self.ended_well("build"):
            return ""
        return f"the build is {self.stages['build'].outcome}"

    # --- what is left behind ---

    def write(self, ended: bool = False) -> dict[str, Any]:
        """report.json as things stand, whole or not at all."""
        suites = {path.stem: tests_of(path) for path in sorted(self.work.glob("*.xml"))}
        report = {
            "rehearsal": self.rehearsal,
            "ended": ended,
            "seconds": self.schedule.spent,
            **self.about,
            "stages": [
                {
                    "stage": stage.name,
                    "outcome": stage.outcome,
                    "seconds": stage.seconds,
                    "detail": stage.detail,
                }
                for stage in self.stages.values()
            ],
            "tests": suites,
            "near_ties": near_ties(suites),
        }
        partial = self.out / "report.json.partial"
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.replace(self.out / "report.json")
        return report

    def write_logs(self) -> None:
        """The end of every stage's log in one file."""
        parts = [
            f"\n===== {stage.name}: {stage.outcome}\n\n{stage.text()[-1_500_000:]}"
            for stage in self.stages.values()
            if stage.log.exists()
        ]
        (self.out / "log.txt").write_text("".join(parts))

    def interrupted(self) -> None:
        """Ends what runs and says so."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for stage in self.stages.values():
            if stage.outcome == "running":
                if stage.process is not None and stage.process.poll() is None:
                    stage.end(signal.SIGTERM)
                stage.outcome, stage.detail = "FAILED", "the run was interrupted"
        self.write()
        self.write_logs()

    def summary(self, report: dict[str, Any]) -> Iterable[str]:
        """The lines of summary.txt."""
        gpu = self.gpu or "no GPU (a rehearsal)"
        torch = self.about["device"]["versions"]["torch"]
        yield f"\ngumbel_ext on {gpu}, torch {torch}: {self.schedule.spent} s\n"
        for stage in self.stages.values():
            yield f"{stage.name:11} {stage.outcome:8} {stage.seconds:4} s  {stage.detail}"
        for name in ("tests", "suite", "kernels"):
            text = self.stages[name].text() if name in self.stages else ""
            failed = re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)
            if failed:
                yield f"\n{name}:"
                yield from (line[:160] for line in failed[:12])
        if report["near_ties"]:
            ties = report["near_ties"]
            yield f"\nchoices that differ from the CPU's: {ties['differ']} of {ties['choices']}"
        for suite, found in report["tests"].items():
            if found.get("skipped"):
                yield f"\n{suite}, skipped:"
                for entry in found["skipped"][:12]:
                    yield f"  {entry['tests']:5} {entry['reason'][:100]}"
        if self.limits:
            yield "\nncu:"
            yield from (line[:220] for line in self.limits[:60])
        page = self.work / "rest" / "benchmarks.md"
        if page.exists() and not self.rehearsal:
            yield "\nagainst the targets (all of it in benchmarks.md of rest.tar.gz):"
            lines = page.read_text().splitlines()
            shown = r"\| (op |[a-z ]*\| (float32|bfloat16) )"
            yield from [line for line in lines if re.match(shown, line)][:32]
        yield f"\neverything is in {self.out}"

    def end(self) -> int:
        """The exit status, after all files are written."""
        report = self.write(ended=True)
        self.write_logs()
        rest = self.work / "rest"
        for path in [*self.work.glob("*.xml"), *self.work.glob("*.log")]:
            shutil.copy(path, rest)
        for path in self.out.glob("*.partial"):
            path.unlink()
        with tarfile.open(self.out / "rest.tar.gz", "w:gz") as archive:
            archive.add(rest, ".")
        lines = list(self.summary(report))
        failures = [stage for stage in self.stages.values() if stage.outcome == "FAILED"]
        if failures:
            lines.append(f"{len(failures)} of {len(self.stages)} stages failed")
        text = "\n".join(lines)
        print(text)
        (self.out / "summary.txt").write_text(text + "\n")
        return 1 if failures else 0


# --- build ---

EMULATED = "tests/cuda/emulated/build.py"
REHEARSED_BUILD = """
import os, runpy, sys
from gumbel_ext import _C
print("gumbel_ext:", _C.build_info())
sys.argv = sys.argv[1:]
built = os.environ.get("GUMBEL_EXT_EMULATED_CUDA")
print(built) if built else runpy.run_path(sys.argv[0], run_name="__main__")
"""
PREBUILT = """
import pathlib, shutil, sys
folder = pathlib.Path(sys.argv[1])
for path in [*folder.glob("_C*.so"), folder / "_built_for.json"]:
    shutil.copy(path, "gumbel_ext")
from gumbel_ext import _C
print("prebuilt:", _C.build_info())
"""


def build(run: Report) -> None:
    python, room = sys.executable, run.schedule.room("build")
    if run.rehearsal:
        # The module is the tree's own, as rehearsing that is not worth minutes; kernels are built.
        run.start("build", room, [python, "-c", REHEARSED_BUILD, EMULATED])
        run.finish("build", r"^/.*\.so$|[Ee]rror")
        if run.ended_well("build"):
            found = re.findall(r"^/.*\.so$", run.stages["build"].text(), re.MULTILINE)
            run.environment["GUMBEL_EXT_EMULATED_CUDA"] = found[-1]
    elif run.arguments.prebuilt:
        run.start("build", 60, [python, "-c", PREBUILT, str(run.arguments.prebuilt)])
        run.finish("build", "^prebuilt:|[Ee]rror")
    elif missing("setuptools"):
        run.skip("build", "setuptools is missing")
    else:
        if shutil.which("ninja") is None:
            print("-- build: ninja is missing: one compiler at a time")
        run.start(
            "build",
            room,
            [python, "setup.py", "build_ext", "--inplace"],
            FORCE_CUDA="1",
            TORCH_CUDA_ARCH_LIST=run.capability,
            MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count())),
        )
        run.finish("build", "^(copying|gumbel_ext:|ninja: |.*[Ee]rror)")


# --- tests, and the sanitizers beside them: they wait for the host more than for the GPU ---

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Two processes a tool, of about as many kernels each: these files, and the other ones about CUDA.
FIRST_HALF = ("tests/test_cuda.py", "tests/test_cuda_positions.py", "tests/test_cuda_topk.py")
OWN_ERROR = re.compile(r"^========= +at .*gumbel_ext", re.MULTILINE)


def checks(run: Report) -> None:
    lacking = missing("pytest", "hypothesis", "scipy", "mpmath", "numpy")
    reason = f"not installed: {' '.join(lacking)}" if lacking else ""
    reason = run.reason_without_build or reason
    room, cores = run.schedule.room("checks"), os.cpu_count() or 1
    of_cuda = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_cuda*.py"))
    pytest = [sys.executable, "-m", "pytest", "-q", "-ra", "--tb=short", "-p", "no:cacheprovider"]
    where = "emulated" if run.rehearsal else "cuda"
    threads = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}

    def tests(stage: str, processes: int, *arguments: str, **environment: str) -> None:
        if not run.wanted(stage):
            return
        if reason:
            run.skip(stage, reason)
            return
        # pytest's own -n spreads tests over processes, which share the GPU.
        spread = ["-n", str(processes)] if processes > 1 and not missing("xdist") else []
        junit = f"--junitxml={run.work / stage}.xml"
        command = [*pytest, *spread, "--device", where, junit, *arguments]
        run.start(stage, room, command, **{**threads, **environment})

    if run.rehearsal:
        tests("tests", 1, *of_cuda)
        tests("suite", 1, "tests/test_errors.py", "tests/test_edges.py")
        if run.wanted("kernels"):
            run.skip("kernels", "only CUDA's profiler knows what was launched")
    else:
        tests("tests", cores // 4, *of_cuda)
        tests("suite", cores // 2, "tests", *(f"--ignore={file}" for file in of_cuda))
        path = os.pathsep.join([str(ROOT / "tests"), run.environment["PYTHONPATH"]])
        launched = ("-p", "launched_kernels", "-m", "sanitizer", *of_cuda)
        tests("kernels", 1, *launched, PYTHONPATH=path)
    sanitizers = list(start_sanitizers(run, reason, pytest, room, of_cuda, threads))
    run.finish("tests", COUNTS)
    run.finish("suite", COUNTS)
    run.finish("kernels", "^launched [0-9]+ of|[Ee]rror")
    for name in sanitizers:
        finish_sanitizer(run, run.stages[name])


def start_sanitizers(
    run: Report,
    reason: str,
    pytest: list[str],
    room: int,
    of_cuda: list[str],
    threads: dict[str, str],
) -> Iterable[str]:
    if not run.wanted("sanitizers"):
        return
    if run.rehearsal:
        reason = "make cuda-check runs the kernels under ASan, UBSan and a race detector"
    elif not reason and shutil.which("compute-sanitizer") is None:
        reason = "compute-sanitizer is not installed"
    halves = (FIRST_HALF, [file for file in of_cuda if file not in FIRST_HALF])
    for tool in SANITIZERS:
        # Vectors of bfloat16 are those of float16; where operands lie says nothing about threads
        # that race or meet.
        tests = "not bfloat16"
        tests += " and not unaligned" if tool in ("racecheck", "synccheck") else ""
        # initcheck must see what PyTorch's kernels write, and may find fault with them: only reads
        # by this package's count. The others need not look at PyTorch's.
        if tool == "initcheck":
            options = ["--show-backtrace", "no", "--print-limit", "10000"]
        else:
            options = ["--kernel-name", "kns=gumbel_ext", "--error-exitcode", "86"]
            options += ["--print-limit", "20"]
        if tool == "memcheck":
            options += ["--report-api-errors", "no"]
        for number, files in enumerate(halves, 1):
            name = f"{tool}-{number}"
            yield name
            if reason:
                run.skip(name, reason)
                continue
            chosen = ["--device", "cuda", "-m", "sanitizer", "-k", tests, *files]
            command = ["compute-sanitizer", "--tool", tool, *options, *pytest, *chosen]
            # Each tensor gets an allocation of its own, past the end of which nothing may be
            # touched.
            run.start(name, room, command, **threads, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def finish_sanitizer(run: Report, stage: Stage) -> None:
    if stage.process is None:
        return
    assert stage.waiting is not None
    stage.waiting.join()
    own = len(OWN_ERROR.findall(stage.text()))
    said = stage.last_line("(ERROR|RACECHECK) SUMMARY")
    with stage.log.open("a") as log:
        log.write(f"\n{own} errors in kernels of gumbel_ext; {said}\n")
    no_device = "Device not supported|LibraryNotLoaded"
    stage.judge("^[0-9]+ errors in kernels of", no_device, "^0 errors in kernels of", own > 0)
    if stage.outcome == "cut":
        stage.detail += f", {stage.last_line(COUNTS)}"
    run.said(stage)


# --- speed, alone on the GPU; what limits the kernels; tables and pictures ---


def result_of(run: Report, stage: str) -> Path:
    return run.out / f"{'rehearsal-' if run.rehearsal else ''}{stage}.json"


def speed(run: Report, stage: str, suite: str) -> None:
    room = run.schedule.room(stage)
    if run.reason_without_build:
        run.skip(stage, run.reason_without_build)
        return
    # The program stops by itself while it can still write all that it has.
    if run.rehearsal:
        seconds = 40 if room > 60 else room // 2
    else:
        seconds = room - 20 if room > 40 else (room + 1) // 2
    device = "rehearsal" if run.rehearsal else "cuda"
    command = [sys.executable, "-m", "benchmarks.run", suite, "--device", device]
    command += ["--seconds", str(max(1, seconds)), "--output", str(result_of(run, stage))]
    run.start(stage, room, command)
    run.finish(stage, r"^(wrote|benchmarks\.run:)")


NCU = "ncu --clock-control none --kernel-name-base demangled --kernel-name regex:gumbel_ext --csv"
NCU_SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "ComputeWorkloadAnalysis")


def profile(run: Report) -> None:
    if run.rehearsal:
        run.skip("ncu", "needs a GPU; this is a rehearsal")
    elif run.reason_without_build:
        run.skip("ncu", run.reason_without_build)
    elif shutil.which("ncu") is None:
        run.skip("ncu", "ncu is not installed")
    else:
        # The clocks stay as they are: they are not this program's to set.
        sections = [f"--section={name}" for name in NCU_SECTIONS]
        command = [*NCU.split(), "--page", "details", *sections]
        command += [sys.executable, "-m", "benchmarks.ncu"]
        run.start("ncu", run.schedule.room("ncu"), command)
        refused = "ERR_NVGPUCTRPERM|LibraryNotLoaded"
        run.finish("ncu", "==ERROR==|==PROF== Disconnected", refused)
        if run.stages["ncu"].outcome != "skipped":
            answer = Path(shutil.copy(run.stages["ncu"].log, run.work / "rest" / "ncu.csv"))
            run.limits = list(ncu.table(answer))


def plots(run: Report) -> None:
    results = [
        path for path in (result_of(run, "bench"), result_of(run, "family")) if path.exists()
    ]
    if not results:
        run.skip("plots", "nothing was measured")
        return
    rest = run.work / "rest"
    command = [sys.executable, "-m", "benchmarks.pages", *map(str, results), "--docs", str(rest)]
    run.start("plots", run.schedule.room("plots"), command)
    run.finish("plots", r"^(benchmarks\.pages:|wrote|matplotlib)|Error")
    for picture in rest.glob("*.png"):
        shutil.move(picture, run.out / picture.name)


# --- a run ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="the folder (default benchmarks/results/gpu-<name of the GPU>)"
    )
    parser.add_argument(
        "--seconds",
        type=int,
        help="for all stages (default 570, of a rehearsal 1140), shared out by the plan that is "
        "printed first; a stage that is too slow is cut: those after it still run",
    )
    parser.add_argument(
        "--only",
        default="all",
        help=f"some of {','.join(STAGES)}. All of them fit one run; two have time to spare: "
        "build,tests,suite,kernels,sanitizers, then build,bench,family,ncu,plots",
    )
    parser.add_argument(
        "--prebuilt", type=Path, help="folder with _C*.so and _built_for.json: builds nothing"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="without a GPU, on the CUDA kernels emulated: does this program work?",
    )
    arguments = parser.parse_args(argv)
    if arguments.seconds is None:
        arguments.seconds = 1140 if arguments.rehearse else 570
    if arguments.seconds < 1:
        parser.error(f"--seconds must be a positive number, got {arguments.seconds}")
    arguments.only = STAGES if arguments.only == "all" else arguments.only.split(",")
    for stage in arguments.only:
        if stage not in STAGES:
            parser.error(f"--only: no stage is named {stage}")
    if arguments.prebuilt is not None:
        arguments.prebuilt = arguments.prebuilt.resolve()
        if not list(arguments.prebuilt.glob("_C*.so")):
            parser.error(f"--prebuilt: there is no _C*.so in {arguments.prebuilt}")
    return arguments


def commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or os.environ.get("GUMBEL_EXT_COMMIT")


def measure(run: Report) -> None:
    wanted = {part.name for part in run.schedule.parts}
    if "build" in wanted:
        build(run)
    run.about["build"] = built()
    if "checks" in wanted:
        checks(run)
    if "bench" in wanted:
        speed(run, "bench", "core")
    if "family" in wanted:
        speed(run, "family", "family")
    run.about["clocks_after"] = clocks()
    if "ncu" in wanted:
        profile(run)
    if "plots" in wanted:
        plots(run)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = device_record()
    if device is None:
        print(f"benchmarks.report: {sys.executable} cannot import torch", file=sys.stderr)
        return 2
    gpu = device["gpu"] if not arguments.rehearse else None
    if gpu is None and not arguments.rehearse:
        version = device["versions"]["torch"]
        print(
            f"benchmarks.report: torch {version} sees no GPU; --rehearse runs what needs none",
            file=sys.stderr,
        )
        return 2
    name = gpu["name"] if gpu else ""
    in_path = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    default = ROOT / "benchmarks" / "results" / f"gpu-{in_path}"
    if not gpu:
        default = Path(tempfile.gettempdir()) / "gumbel_ext-gpu-rehearsal"
    out = (arguments.out or default).resolve()
    out.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(arguments.seconds, arguments.only)
    about = {"commit": commit(), "device": device, "clocks_after": None, "build": None}
    # Handlers of Python's, so that stages hear an interrupt also where this process was made deaf.
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory() as work:
        run = Report(
            arguments, schedule, Path(work), out, name, gpu["capability"] if gpu else "", about
        )
        versions = device["versions"]
        print(
            f"gumbel_ext on {name or 'no GPU'}, torch {versions['torch']}, "
            f"Python {versions['python']}, to {out}\n{schedule.plan()}",
            flush=True,
        )
        run.write()
        try:
            measure(run)
        except KeyboardInterrupt:
            run.interrupted()
            return 130
        return run.end()


if __name__ == "__main__":
    sys.exit(main())
