"""Time and peak memory of gumbel_ext on a GPU beside its peers -> one JSON file.

python benchmarks/bench_cuda.py [--quick] [--cases PATTERN] [--dry-run] [--output FILE]
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import math
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import environment
import torch
from bench_cpu import FORMAT, Progress, dump, rows, spread
from cases import Case, Inputs, bind, check, functions, workloads
from environment import rounded
from labels import (
    CONTROL,
    COPY,
    CUDA_LAUNCHES,
    CUDA_SHAPES,
    DTYPES,
    EAGERLY,
    GUMBEL_EXT,
    HARD_BACKWARD,
    HARD_FORWARD,
    HARD_TRAIN,
    IN_A_GRAPH,
    INDEX,
    INNER_DIM,
    SOFT_BACKWARD,
    SOFT_FORWARD,
    SOFT_TRAIN,
    SOFTMAX,
)
from timing import CALLS_IN_A_ROW, Budget, CacheFlush, Call, Measurement, measure_on_gpu
from torch._functorch import config as functorch_config

RESULTS = Path(__file__).resolve().parent / "results"

FULL = Budget(seconds=0.4, min_rounds=9, max_rounds=200)
QUICK = Budget(seconds=0.2, min_rounds=5, max_rounds=60)

# Tensors of the size of the logits that an operator must read and write at least.
TENSORS_MOVED = {
    SOFT_FORWARD: 2,
    HARD_FORWARD: 2,
    INDEX: 1,
    SOFT_BACKWARD: 3,
    HARD_BACKWARD: 3,
    SOFT_TRAIN: 5,
    HARD_TRAIN: 5,
    CONTROL: 2,
}
# Tensors of that size that live at once in the hungriest contender, beside inputs and copies.
TENSORS_LIVE = {INDEX: 4, SOFT_FORWARD: 4, HARD_FORWARD: 6, CONTROL: 2}
TENSORS_LIVE_IN_TRAINING = 9
TENSORS_OF_INPUTS = {SOFT_TRAIN: 2, HARD_TRAIN: 2, SOFT_BACKWARD: 8, HARD_BACKWARD: 8}

CALLS_IN_A_GRAPH = 20


# --- cases ---


def all_cases() -> list[Case]:
    """The most telling ones first: a run that is cut short has them."""
    control = [Case("control", CONTROL, (16384, 1024), quick=True)]
    cases = [*control, *shapes(), *launches(), *long_rows(), *other_dims(), *users()]
    return sorted(cases, key=lambda case: not case.quick)


def shapes() -> Iterable[Case]:
    """The sweep that the targets are stated for."""
    forwards, backwards = (SOFT_FORWARD, HARD_FORWARD, INDEX), (SOFT_BACKWARD, HARD_BACKWARD)
    for dtype in DTYPES:
        for shape in CUDA_SHAPES:
            middle = shape[1] in (1024, 16384)
            for op in (*forwards, *backwards):
                # Compiling takes seconds a case, much longer than measuring it.
                often = "always" if shape[1] == 1024 else "full"
                compiled = often if middle and dtype != "float16" else "never"
                quick = dtype == "float32" or (dtype == "bfloat16" and middle)
                yield Case("shapes", op, shape, dtype, compiled=compiled, quick=quick)
            if middle and dtype != "float16":
                compiled = "full" if shape[1] == 1024 else "never"
                yield Case("shapes", SOFT_TRAIN, shape, dtype, compiled=compiled)
                yield Case("shapes", HARD_TRAIN, shape, dtype, compiled=compiled)
    for op in (*forwards, *backwards):
        yield Case("shapes", op, (16384, 1024), "float64")


def launches() -> Iterable[Case]:
    """Tensors so small that only the launches count."""
    for variant in (EAGERLY, IN_A_GRAPH):
        for shape in CUDA_LAUNCHES:
            first = shape == CUDA_LAUNCHES[0]
            for op in (SOFT_FORWARD, HARD_FORWARD, INDEX, SOFT_TRAIN, HARD_TRAIN):
                often = "always" if op in (SOFT_FORWARD, HARD_TRAIN) else "full"
                compiled = often if first else "never"
                yield Case("launches", op, shape, variant=variant, compiled=compiled, quick=first)


def long_rows() -> Iterable[Case]:
    """Fewer rows than a GPU has multiprocessors."""
    few: list[tuple[int, int]] = [(1, 1 << 22), (4, 1 << 17), (32, 1 << 17), (16, 128_256)]
    for shape in few:
        for dtype in ("float32", "bfloat16"):
            for op in (SOFT_FORWARD, HARD_FORWARD, INDEX, SOFT_BACKWARD, HARD_BACKWARD):
                quick = shape[0] == 4 and dtype == "float32"
                yield Case("long rows", op, shape, dtype, quick=quick)


def other_dims() -> Iterable[Case]:
    for shape in (INNER_DIM, (64, 32, 56, 56), (16, 4096, 16)):
        for dtype in ("float32", "bfloat16"):
            for op in (SOFT_FORWARD, HARD_FORWARD, INDEX, SOFT_BACKWARD, HARD_BACKWARD):
                quick = shape == INNER_DIM and dtype == "float32"
                yield Case("layouts", op, shape, dtype, dim=1, quick=quick)
    for op in (SOFT_FORWARD, HARD_FORWARD):
        yield Case("layouts", op, (16384, 1024), variant="mask")


def users() -> Iterable[Case]:
    """As on the CPU, where they are large enough to be about anything but launches."""
    for case in workloads():
        if case.elements >= 1 << 19:
            yield replace(case, compiled="never", quick=False)


def memory_cases() -> list[Case]:
    kinds = [((16384, 1024), "float32"), ((16384, 1024), "bfloat16"), ((256, 131072), "float32")]
    return [
        Case("memory", op, shape, dtype, compiled="full", quick=dtype == "float32")
        for shape, dtype in kinds
        for op in (SOFT_TRAIN, HARD_TRAIN)
    ]


# --- one case ---


def fitted(case: Case, free_bytes: int, cache_bytes: int) -> Case:
    """The case with as many of its rows as the memory of the GPU has room for."""
    live = TENSORS_LIVE.get(case.op, TENSORS_LIVE_IN_TRAINING)
    while case.shape[0] > 1:
        bytes_each = case.elements * case.torch_dtype.itemsize
        sets = max(2, math.ceil(2 * cache_bytes / bytes_each))
        # Of each set of inputs the logits, of a training step the gradient too, and of a backward
        # what every contender saves.
        of_inputs = sets * TENSORS_OF_INPUTS.get(case.op, 1)
        tensors = of_inputs + live + TENSORS_MOVED[case.op]
        if tensors * bytes_each <= 0.85 * free_bytes:
            break
        case = replace(case, shape=(case.shape[0] // 2, *case.shape[1:]))
    return case


def bytes_moved(case: Case) -> int:
    """What the operator must read and write at least, the int64 index of each row included."""
    indices = {INDEX: 1, SOFT_BACKWARD: 1, HARD_BACKWARD: 1, SOFT_TRAIN: 2, HARD_TRAIN: 2}
    rows_of_case = case.elements // case.shape[case.dim]
    logits = case.elements * case.torch_dtype.itemsize
    return TENSORS_MOVED[case.op] * logits + 8 * indices.get(case.op, 0) * rows_of_case


def copier(case: Case) -> Call:
    """Tensor.copy_ that moves as many bytes as the operator must: half of them read."""
    source = torch.zeros(max(1, bytes_moved(case) // 2), dtype=torch.uint8, device="cuda")
    destination = torch.empty_like(source)
    return lambda _: destination.copy_(source)


def in_a_graph(call: Call) -> Call:
    """Twenty calls as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_A_GRAPH):
            call(0)
    return lambda _: graph.replay()


def contenders(
    case: Case, inputs: Inputs, with_compile: bool, skipped: list[dict[str, str]]
) -> dict[str, Call]:
    """Those that can run: one that cannot is written down, and the others still race."""
    race: dict[str, Call] = {}
    for name, function in functions(case, with_compile).items():
        try:
            if name == GUMBEL_EXT:
                check(case, inputs, function)
            call = bind(case, inputs, function)
            call(0)
            torch.cuda.synchronize()
            race[name] = in_a_graph(call) if case.variant == IN_A_GRAPH else call
        except RuntimeError as error:  # which the compiler's errors are, too
            if name in (GUMBEL_EXT, SOFTMAX):
                raise
            skipped.append({"case": case.name, "contender": name, "reason": first_line(error)})
            torch.cuda.empty_cache()
    if case.variant == "contiguous" and case.op != CONTROL:
        race[COPY] = copier(case)
    return race


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_case(
    case: Case,
    budget: Budget,
    flush: CacheFlush,
    cache_bytes: int,
    with_compile: bool,
    skipped: list[dict[str, str]],
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    inputs = Inputs(case, "cuda", cache_bytes)
    race = contenders(case, inputs, with_compile, skipped)
    if case.group == "launches":
        in_a_row = CALLS_IN_A_ROW if case.variant == EAGERLY else 1
        measured = measure_on_gpu(race, inputs.count, budget, None, in_a_row)
        # The profiler takes longer than the measurement: once for each op.
        profiled = race if case.quick else {}
        kernels = {name: kernels_per_call(call) for name, call in profiled.items()}
        if case.variant == IN_A_GRAPH:
            measured = {name: one_of_many(m, CALLS_IN_A_GRAPH) for name, m in measured.items()}
            kernels = {n: None if k is None else k / CALLS_IN_A_GRAPH for n, k in kernels.items()}
    else:
        measured = measure_on_gpu(race, inputs.count, budget, flush)
        kernels = {}

    table = rows(case, measured)
    for row in table:
        name = row["contender"]
        del row["minor_faults_per_call"]
        if COPY in measured:
            share = measured[COPY].relative_to(measured[name])
            row["share_of_copy_bandwidth"] = spread(share)
            speed = bytes_moved(case) / measured[name].seconds.median
            row["gigabytes_per_second"] = rounded(speed * 1e-9)
        if name in kernels:
            row["kernels_per_call"] = kernels[name]
    return table


def one_of_many(measured: Measurement, count: int) -> Measurement:
    """The time of one call of `count` that were timed together."""
    each = tuple(seconds / count for seconds in measured.rounds)
    return Measurement(each, measured.calls * count, 0.0)


def kernels_per_call(call: Call) -> float | None:
    """Kernels, copies and fills that a call starts; None where the profiler cannot see them."""
    calls = 4
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            for _ in range(calls):
                call(0)
            torch.cuda.synchronize()
        started = [e for e in seen.events() if e.device_type.name == "CUDA"]
    except RuntimeError:
        return None
    return len(started) / calls if started else None


def requested_bytes(when: str) -> int:
    """What was asked of the allocator; the blocks that it hands out may be a megabyte larger."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{when}"])


def run_memory_case(case: Case, with_compile: bool) -> list[dict[str, Any]]:
    """Peaks of PyTorch's CUDA allocator above the live logits and incoming gradient."""
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": case.torch_dtype, "generator": generator}
    logits = torch.randn(case.shape, **options).requires_grad_()
    grad = torch.randn(case.shape, **options)
    output = case.elements * case.torch_dtype.itemsize
    rows_of_case = case.elements // case.shape[case.dim]
    table = []
    for name, function in functions(case, with_compile).items():
        for _ in range(3):  # the first calls compile
            torch.autograd.grad(function(logits), logits, grad)
        gc.collect()
        before = requested_bytes("current")
        torch.cuda.reset_peak_memory_stats()
        y = function(logits)
        saved = requested_bytes("current") - before - output
        gradient = torch.autograd.grad(y, logits, grad)
        peak = requested_bytes("peak") - before
        del y, gradient
        table.append(
            {
                "case": case.name,
                "op": case.op,
                "dtype": case.dtype,
                "shape": list(case.shape),
                "contender": name,
                "allocator_peak_bytes_per_element": rounded(peak / case.elements),
                "saved_beyond_output_bytes_per_element": rounded(saved / case.elements),
                "saved_beyond_output_bytes_per_row": rounded(saved / rows_of_case),
                "resident_peak_bytes_per_element": None,
            }
        )
    return table


# --- a run ---


def gpu() -> dict[str, Any]:
    """What the GPU is, as far as PyTorch tells."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_cache_bytes": cache_size(),
        "driver": ask_nvidia_smi("driver_version"),
        "cuda": torch.version.cuda,
    }


def cache_size() -> int:
    properties = torch.cuda.get_device_properties(0)
    return int(getattr(properties, "L2_cache_size", 0)) or 64 << 20


def clocks() -> dict[str, str | None]:
    """Clocks, temperature and power now; None where nvidia-smi does not say."""
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate")
    return {field: ask_nvidia_smi(field) for field in fields}


def ask_nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def warm_up(seconds: float = 1.0) -> None:
    """Bring the clocks to where work keeps them."""
    x = torch.randn(4096, 4096, device="cuda")
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        for _ in range(10):
            x.sin_()
        torch.cuda.synchronize()


def file_name(gpu_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def usable() -> str | None:
    """Why no GPU can be measured; None where one can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gumbel_ext::gumbel_softmax", "CUDA"):
        return "gumbel_ext was built without CUDA: FORCE_CUDA=1 python setup.py build_ext --inplace"
    return None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a minute")
    parser.add_argument("--cases", metavar="PATTERN", help="only cases named like *PATTERN*")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory cases out")
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="start no further case after N seconds"
    )
    parser.add_argument(
        "--dry-run", "--list", action="store_true", help="print the cases and stop; needs no GPU"
    )
    parser.add_argument("--output", type=Path, help="JSON file (default under benchmarks/results)")
    arguments = parser.parse_args()
    if arguments.seconds is not None and not arguments.seconds > 0:
        parser.error(f"--seconds must be positive, got {arguments.seconds:g}")
    return arguments


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    pattern = f"*{arguments.cases}*" if arguments.cases else "*"
    found = [*all_cases(), *([] if arguments.no_memory else memory_cases())]
    found = sorted(found, key=lambda case: not case.quick)
    return [
        case
        for case in found
        if fnmatch.fnmatch(case.name, pattern) and (case.quick or not arguments.quick)
    ]


def main() -> int:
    arguments = parse_arguments()
    cases = chosen_cases(arguments)
    if not cases:
        print(f"bench_cuda.py: no case matches --cases {arguments.cases}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        print("\n".join(case.name for case in cases))
        return 0
    reason = usable()
    if reason is not None:
        print(f"bench_cuda.py: {reason}", file=sys.stderr)
        return 2

    warnings.filterwarnings("ignore")  # torch's own, about its compiler: they bury the progress
    # A backward is timed many times on one graph, which compiled ones forbid to save memory.
    functorch_config.donated_buffer = False
    quick, device = arguments.quick, gpu()
    partial = arguments.cases or arguments.no_compile or arguments.no_memory
    kind = "-quick" if quick else "-partial" if partial else ""
    output = arguments.output or RESULTS / f"gpu-{file_name(device['name'])}{kind}.json"
    budget = QUICK if quick else FULL
    document: dict[str, Any] = {
        "format": FORMAT,
        "device": "cuda",
        "date": environment.now(),
        "quick": quick,
        "complete": False,
        "threads": torch.get_num_threads(),
        "clock": "cuda events",
        "budget": asdict(budget),
        "machine": {**environment.machine(), "gpu": device},
        "versions": environment.versions(),
        "revision": environment.revision(),
        "gpu_state": {"before": clocks(), "after": None},
        "duration_seconds": 0,
        "skipped": [],
        "rows": [],
        "memory_rows": [],
    }
    warm_up()
    document["gpu_state"]["warm"] = clocks()
    cache_bytes = cache_size()
    flush = CacheFlush(cache_bytes)
    skipped: list[dict[str, str]] = document["skipped"]
    progress = Progress(len(cases))
    started = written = time.monotonic()
    interrupted = False
    try:
        for case in cases:
            elapsed = time.monotonic() - started
            if arguments.seconds is not None and elapsed >= arguments.seconds:
                skipped.append({"case": case.name, "reason": f"out of {arguments.seconds:g} s"})
                continue
            progress.start(case.name)
            with_compile = case.compiled == "always" or (case.compiled == "full" and not quick)
            with_compile = with_compile and not arguments.no_compile
            table: list[dict[str, Any]] = []
            try:
                if case.group == "memory":
                    table = run_memory_case(case, with_compile)
                else:
                    fitting = fitted(case, torch.cuda.mem_get_info()[0], cache_bytes)
                    table = run_case(fitting, budget, flush, cache_bytes, with_compile, skipped)
            except RuntimeError as error:
                skipped.append({"case": case.name, "reason": first_line(error)})
                print(f"bench_cuda.py: skipped {case.name}: {first_line(error)}", file=sys.stderr)
                if not gpu_answers():
                    raise
            document["memory_rows" if case.group == "memory" else "rows"] += table
            progress.finish(table)
            gc.collect()
            torch.cuda.empty_cache()
            if time.monotonic() - written > 10:
                # What is measured outlives whatever ends this process.
                document["duration_seconds"] = round(time.monotonic() - started)
                dump(document, output)
                written = time.monotonic()
    except KeyboardInterrupt:
        interrupted = True
    except RuntimeError as error:
        print(f"bench_cuda.py: the GPU is lost: {first_line(error)}", file=sys.stderr)
        interrupted = True
    document["complete"] = not interrupted and not skipped
    document["duration_seconds"] = round(time.monotonic() - started)
    document["gpu_state"]["after"] = clocks()
    dump(document, output)
    print(f"wrote {output} ({document['duration_seconds']} s)")
    late = [s for s in skipped if s["reason"].startswith("out of ")]
    if late:
        print(f"{len(late)} of {len(cases)} cases were left out for want of time")
    return 130 if interrupted else 1 if len(skipped) > len(late) else 0


def gpu_answers() -> bool:
    """Whether the error of a case left the GPU in working order."""
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
