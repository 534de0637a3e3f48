"""Reads the machine code of the built CUDA kernels: what can be known of them without a GPU.

    python tests/cuda/check_binary.py gumbel_ext/_C*.so [--table docs/kernels-cuda-table.md]
    python tests/cuda/check_binary.py gumbel_ext/_C*.so --accept

Asserts, for every kernel and architecture in the module: no local memory and no spills, no
arithmetic in double precision outside the float64 kernels, loads and stores of 16 bytes, and
hardly more instructions an element than instructions_per_element.json says; --accept writes that
file anew. Needs cuobjdump and nvdisasm (PyPI:
nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm), and c++filt.

Instructions an element are counted along one way through the control flow: that of rows that are
aligned and whole, without mask or temperature tensor or special values, none of whose noise needs
its second word. It is the shortest of the ways that load and store whole vectors and make noise for
every element loaded; loops without wide loads are avoided, being for everything else. Of the
family's kernels, whose operands may be of several types, the way is that of known numbers of wide
loads and stores once around each loop over a row; what a row costs besides is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

TYPE_BYTES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}
TYPE_NAMES = {"float": "float32", "double": "float64", "BFloat16": "bfloat16", "Half": "float16"}

# Instructions an element as counted when the file was written, with the compiler that it names.
COUNTS = Path(__file__).with_name("instructions_per_element.json")
# The op whose loop over draws is counted, not its loads and stores.
PER_DRAW = "a conditional draw of Gumbel-Rao"
# More than this above them means that something has got worse.
ALLOWANCE = 1.05

# An H100 that moves 3.0 TB/s has this many instruction slots for a byte: 132 multiprocessors x 4
# schedulers x 32 lanes x 1.73 GHz / 3.0 TB/s.
SLOTS_PER_BYTE = 9.75


@dataclass
class Instruction:
    opcode: str
    operands: str
    predicate: str


@dataclass
class Function:
    """The control flow of one kernel: basic blocks and where each may go on."""

    blocks: list[list[Instruction]] = field(default_factory=list)
    successors: list[list[int]] = field(default_factory=list)

    def opcodes(self) -> Iterable[str]:
        return (instruction.opcode for block in self.blocks for instruction in block)


@dataclass(frozen=True)
class Resources:
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int


def tool(name: str) -> str:
    """The path of a CUDA binary tool: on PATH, or where its wheel puts it."""
    found = shutil.which(name)
    if found:
        return found
    for folder in map(Path, sys.path):
        for path in sorted(folder.glob(f"nvidia/cu*/bin/{name}")):
            return str(path)
    sys.exit(
        f"check_binary: {name} not found; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


def nvcc() -> str:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("nvcc") or str(home / "bin" / "nvcc")


def output_of(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=True).stdout


def demangled(names: list[str]) -> dict[str, str]:
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True
    ).stdout.splitlines()
    # "void gumbel_ext::...::kernel<T, (gumbel_ext::...::Phase)1>(Params)" -> "kernel<T, 1>"
    short = [re.sub(r"^void |gumbel_ext::(cuda_device::|cuda::)?", "", line) for line in text]
    short = [re.sub(r"\(.*\)$", "", line.replace("(Phase)", "")) for line in short]
    return dict(zip(names, short, strict=True))


def functions_of(cubin: Path) -> dict[str, Function]:
    functions: dict[str, list[str | Instruction]] = {}
    lines: list[str | Instruction] | None = None
    for raw in output_of(tool("nvdisasm"), "-c", str(cubin)).splitlines():
        line = raw.strip()
        if section := re.match(r"\.section\s+(?:\.text\.([^,\s]+))?", line):
            lines = functions.setdefault(section[1], []) if section[1] else None
        elif lines is None:
            continue
        elif label := re.match(r"(\.L\w+):", line):
            lines.append(label[1])
        elif parts := re.match(
            r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", line
        ):
            lines.append(Instruction(parts[2], parts[3], parts[1] or ""))
    return {name: control_flow(found) for name, found in functions.items()}


def control_flow(lines: list[str | Instruction]) -> Function:
    function = Function()
    labels: dict[str, int] = {}
    block: list[Instruction] = []

    def end_block() -> None:
        nonlocal block
        if block:
            function.blocks.append(block)
            block = []

    for line in lines:
        if isinstance(line, str):
            end_block()
            labels[line] = len(function.blocks)
        elif line.opcode != "NOP":
            block.append(line)
            if line.opcode.split(".")[0] in {"BRA", "EXIT", "RET", "JMP", "CALL"}:
                end_block()
    end_block()
    for number, instructions in enumerate(function.blocks):
        last = instructions[-1]
        kind = last.opcode.split(".")[0]
        following = [number + 1] if number + 1 < len(function.blocks) else []
        targets = re.findall(r"\.L\w+", last.operands)
        # A branch has its condition before it or among its operands.
        conditional = bool(last.predicate) or bool(re.match(r"!?U?P\d|~", last.operands))
        if kind in {"EXIT", "RET"}:
            goes_on = following if conditional else []
        elif kind == "BRA" and ".DIV" in last.opcode:
            goes_on = following  # the other way is for warps that diverged
        elif kind == "BRA" or (kind == "CALL" and targets and targets[-1] in labels):
            # A call of a label, not of a function, does not come back.
            goes_on = [labels[target] for target in targets[-1:] if target in labels]
            goes_on += following if conditional else []
        else:
            goes_on = following
        function.successors.append(goes_on)
    return function


def is_wide(opcode: str, kind: str, bytes_: int) -> bool:
    """Whether it moves a vector of elements. Tables are read by .CONSTANT loads, one at a time."""
    wide = opcode.startswith(f"{kind}.E") and f".{8 * bytes_}" in opcode
    return wide and not opcode.endswith(".CONSTANT")


# Wide loads, wide stores, marks: instructions by which one tells that an element was worked on.
Counts = tuple[int, int, int]


class HotPath:
    """The way of ordinary rows through a kernel."""

    def __init__(self, function: Function, vector_bytes: int, noise: bool, double: bool) -> None:
        self.function = function
        self.vector_bytes = vector_bytes
        # Noise takes two logarithms an element; in float64, two words made into numbers. A backward
        # from y takes at least one fused multiply-add.
        self.mark = ("I2F.F64" if double else "MUFU.LG2") if noise else r"[DF](FMA|MUL)"
        self.marks_per_element = 2 if noise else 1
        self.back_edges, self.reachable = self.find_back_edges()
        self.loops = self.find_loops()
        self.avoided: set[int] = set()
        for body in self.loops.values():
            if not any(self.loads(block) for block in body):
                self.avoided |= body

    def loads(self, block: int) -> int:
        return sum(is_wide(i.opcode, "LDG", self.vector_bytes) for i in self.function.blocks[block])

    def stores(self, block: int) -> int:
        return sum(is_wide(i.opcode, "STG", self.vector_bytes) for i in self.function.blocks[block])

    def marks(self, block: int) -> int:
        return sum(bool(re.match(self.mark, i.opcode)) for i in self.function.blocks[block])

    def find_back_edges(self) -> tuple[set[tuple[int, int]], set[int]]:
        back: set[tuple[int, int]] = set()
        open_blocks, done = {0}, set[int]()
        stack = [(0, iter(self.function.successors[0]))]
        while stack:
            block, successors = stack[-1]
            for successor in successors:
                if successor in open_blocks:
                    back.add((block, successor))
                elif successor not in done:
                    open_blocks.add(successor)
                    stack.append((successor, iter(self.function.successors[successor])))
                    break
            else:
                open_blocks.discard(block)
                done.add(block)
                stack.pop()
        return back, done

    def find_loops(self) -> dict[int, set[int]]:
        predecessors = defaultdict(list)
        for block in self.reachable:
            for successor in self.function.successors[block]:
                predecessors[successor].append(block)
        loops: dict[int, set[int]] = defaultdict(set)
        for latch, header in self.back_edges:
            body, pending = {header, latch}, [latch]
            while pending:
                block = pending.pop()
                if block == header:
                    continue
                for predecessor in predecessors[block]:
                    if predecessor not in body and predecessor in self.reachable:
                        body.add(predecessor)
                        pending.append(predecessor)
            loops[header] |= body
        return loops

    def ways(self, start: int, ends: set[int], allowed: set[int]) -> dict[Counts, tuple[int, int]]:
        """What can be met from start to one of ends, and how few instructions that takes.

        The costs are (blocks of loops without wide loads, instructions).
        """
        order: list[int] = []
        seen = {start}
        stack = [(start, iter(self.function.successors[start]))]
        while stack:
            block, successors = stack[-1]
            for successor in successors:
                edge = (block, successor)
                if successor in allowed and successor not in seen and edge not in self.back_edges:
                    seen.add(successor)
                    stack.append((successor, iter(self.function.successors[successor])))
                    break
            else:
                order.append(block)
                stack.pop()
        found: dict[int, dict[Counts, tuple[int, int]]] = {}
        for block in order:
            onward: dict[Counts, tuple[int, int]] = {}
            for successor in self.function.successors[block]:
                if (block, successor) in self.back_edges:
                    continue
                for counts, cost in found.get(successor, {}).items():
                    onward[counts] = min(cost, onward.get(counts, cost))
            if block in ends:
                onward[(0, 0, 0)] = (0, 0)
            avoided = block in self.avoided
            here = (self.loads(block), self.stores(block), self.marks(block))
            found[block] = {
                (loads + here[0], stores + here[1], marks + here[2]): (
                    cost[0] + avoided,
                    cost[1] + len(self.function.blocks[block]),
                )
                for (loads, stores, marks), cost in onward.items()
            }
        return found[start]

    def per_element(
        self, ways: dict[Counts, tuple[int, int]], element_bytes: int, operands: int, store: bool
    ) -> float | None:
        """Instructions an element along the ordinary way among these, None if there is none."""
        most = max((loads for loads, _, _ in ways), default=0)
        elements = most * self.vector_bytes // (element_bytes * operands)
        stores = most // operands if store else 0
        costs = [
            (marks, cost)
            for (loads, stored, marks), cost in ways.items()
            if loads == most and stored == stores and marks >= elements * self.marks_per_element
        ]
        return min(costs)[1][1] / elements if elements and costs else None

    def whole(self) -> dict[Counts, tuple[int, int]]:
        ends = {b for b in self.reachable if self.function.blocks[b][-1].opcode == "EXIT"}
        return self.ways(0, ends, self.reachable)

    def by_loops(self, expected: list[Counts], elements: int) -> float | None:
        """Instructions an element once around its loops, of so many wide loads and stores each."""
        loops = self.inner_loops()
        if len(loops) != len(expected):
            return None
        total = 0
        for ways, (loads, stores, marks) in zip(loops, expected, strict=True):
            costs = [
                cost
                for counts, cost in ways.items()
                if counts[:2] == (loads, stores) and counts[2] >= marks
            ]
            if not costs:
                return None
            total += min(costs)[1]
        return total / elements

    def inner_loops(self) -> list[dict[Counts, tuple[int, int]]]:
        """Ways once around each innermost loop with wide loads."""
        wide = {h: body for h, body in self.loops.items() if any(self.loads(b) for b in body)}
        found = []
        for header, body in sorted(wide.items()):
            if any(other != header and other in body for other in wide):
                continue
            latches = {latch for latch, head in self.back_edges if head == header}
            found.append(self.ways(header, latches, body))
        return found

    def per_draw(self, groups: int, double: bool) -> float | None:
        """Instructions an element and draw, once around the loop over conditional draws.

        The ordinary way makes a number of a word, of two in float64, for every element of all
        groups, and enters none of the loops within.
        """
        self.mark = "I2F"
        elements, found = 4 * groups, []
        for header, body in self.loops.items():
            if not any(i.opcode.startswith("SHFL") for b in body for i in self.function.blocks[b]):
                continue
            within = [other for other in self.loops if other != header and other in body]
            self.avoided = set().union(*(self.loops[other] for other in within))
            latches = {latch for latch, head in self.back_edges if head == header}
            found += [
                instructions
                for (_, _, marks), (avoided, instructions) in self.ways(
                    header, latches, body
                ).items()
                if marks == elements * (2 if double else 1) and avoided == 0
            ]
        return min(found) / elements if found else None


@dataclass(frozen=True)
class Kernel:
    architecture: int
    name: str
    type: str
    op: str
    regime: str
    threads: int
    resources: Resources
    per_element: float | None  # instructions
    dtype: str = ""  # if not that of `type`

    @property
    def rank(self) -> int:
        """Regimes in the order of row length."""
        first = ["lane", "a warp", "threads", "a cluster", "streamed", "split", "columns"]
        place = next(n for n, word in enumerate(first) if word in self.regime)
        number = re.match(r"\d+", self.regime)
        return 1000 * place + (int(number[0]) if number else 0)

    @property
    def bytes_per_element(self) -> int:
        size = TYPE_BYTES[self.type]
        # Of memory that the whole call moves: streamed rows are read twice, a second time from the
        # second-level cache where they fit.
        moved = {"soft": 2, "hard": 2, "index": 1, "backward": 3, "backward, recomputed": 3}
        return size * moved[self.op]

    def occupancy(self) -> float:
        """Of a multiprocessor of compute capability 9.0, in parts of its 64 warps."""
        warps = self.threads // 32
        by_registers = 65536 // (warps * (-(-self.resources.registers * 32 // 256) * 256))
        by_shared = 228 * 1024 // (self.resources.shared_bytes + 1024)
        blocks = min(32, 64 // warps, by_registers, by_shared)
        return blocks * warps / 64


def classified(name: str) -> list[tuple[str, str, int, bool, bool]]:
    """(op, regime, threads, by loop, with stores) of a demangled kernel; twice for picks."""
    parts = re.match(r"(\w+?)_kernel<(.*)>$", name)
    if not parts:
        return []  # a kernel without elements
    kind, rest = parts.groups()
    # Kernels of soft samples have a form for y and one for log y.
    soft = "log sample" if rest.endswith(", true") else "soft"
    rest = re.sub(", (true|false)$", "", rest)
    if kind in ROW_LOOPS or kind.startswith(("binary", "topk", "estimator")):
        # See counted_by_loops(); topk_scores, binary_positions and the estimators in closed form
        # are not counted.
        return []
    team = re.search(r"(Lane|Block|Cluster)Team<(\d+)>", rest)
    if team:
        lanes = int(team[2])
        regime = {
            "Lane": "a warp a row" if lanes == 32 else f"{lanes} lane{'s' * (lanes > 1)} a row",
            "Block": f"{lanes} threads a row",
            "Cluster": f"a cluster of {lanes} threads a block a row",
        }[team[1]]
        last = rest.rsplit(", ", 1)[1]
        threads = 128 if team[1] == "Lane" else lanes
        if kind == "pick_rows":
            regime += f", {last} at a time"
            by_loop = lanes >= 32
            return [
                ("hard", regime, threads, by_loop, True),
                ("index", regime, threads, by_loop, False),
            ]
        held = "group" if last == "1" else "groups"
        if kind == "gumbel_rao_rows":
            return [(PER_DRAW, f"{regime}, {last} {held} held", threads, True, True)]
        op = {
            "soft_rows": soft,
            "backward_rows": "backward",
            "backward_recompute_rows": "backward, recomputed",
        }[kind]
        return [(op, f"{regime}, {last} {held} held", threads, False, True)]
    phase = {"0": "streamed", "1": "split, first pass", "2": "split, second pass"}
    if kind in {"soft_stream", "backward_stream"}:
        op = soft if kind == "soft_stream" else "backward"
        return [(op, phase[rest[-1]], 256, True, rest[-1] != "1")]
    if kind == "pick_partial":
        return [("hard", "split", 256, True, True), ("index", "split", 256, True, False)]
    if kind in {"soft_columns", "backward_columns", "pick_columns"}:
        warps = int(rest.split(", ")[1])
        regime = f"columns, {warps} warp{'s' * (warps > 1)}"
        ops = [("hard", True), ("index", False)]
        if kind != "pick_columns":
            ops = [(soft if kind == "soft_columns" else "backward", True)]
        return [(op, regime, 32 * warps, True, store) for op, store in ops]
    return []  # noise, and what is small by nature


# Kernels on rows of operands that lie anywhere (row_operands.cuh), compiled for the type computed
# in. Of each loop over a row: operands read of the inputs' type, read of the accumulate type,
# written of the inputs' type; and whether it takes exponentials that classes may be excused from.
ROW_LOOPS = {
    "log_gradient": ("log gradient", [(1, 1, 0, True), (1, 1, 1, True)]),
    "density": ("density, its gradients in the second loop", [(2, 0, 0, True), (2, 0, 2, True)]),
    "straight_through_backward": ("straight-through backward", [(2, 0, 0, True), (2, 0, 1, True)]),
    "soft_argmax": ("soft-argmax", [(1, 0, 0, False), (1, 0, 0, False)]),
    "soft_argmax_backward": ("soft-argmax backward", [(1, 0, 1, False)]),
}
ROW_GROUP = 4  # kRowGroup


def counted_by_loops(name: str, function: Function) -> list[tuple[str, str, str, float | None]]:
    """(op, dtype, regime, instructions an element) of a kernel that is known by its loops."""
    parts = re.match(r"(\w+?)_kernel<(\w+)(?:, (.*?))? ?>$", name)
    if not parts:
        return []
    kind, type_, rest = parts.groups()
    if kind not in (*ROW_LOOPS, "binary", "topk_rows"):
        return []
    size, double = TYPE_BYTES[type_], type_ == "double"
    if kind in ROW_LOOPS:
        op, loops = ROW_LOOPS[kind]
        team = re.search(r"(Lane|Block)Team<(\d+)>", rest)
        regime = f"{team[2]} {'lanes' if team[1] == 'Lane' else 'threads'} a row"  # type: ignore[index]
        if kind.startswith("soft_argmax"):
            coordinates = int(rest[-1])
            op += f", {coordinates} coordinate{'s' * (coordinates > 1)}"
            typed, _, stores, exponentials = loops[-1]
            loops = [*loops[:-1], (typed, coordinates, stores, exponentials)]
        vectors = ROW_GROUP * size // 16
        # One instruction each; in float64 a series.
        mark, marks = (r"D(FMA|MUL)", 12 * ROW_GROUP) if double else ("MUFU.EX2", ROW_GROUP)
        whole = [((a + b) * vectors, s * vectors, e * marks) for a, b, s, e in loops]
        path = HotPath(function, 16, False, double)
        path.mark = mark
        found = [(op, TYPE_NAMES[type_], regime, path.by_loops(whole, ROW_GROUP))]
        if not double:
            narrow = [(a, s, e * marks) for a, _, s, e in loops]
            path = HotPath(function, 8, False, False)
            path.mark = mark
            found.append((op, "16 bits", regime, path.by_loops(narrow, ROW_GROUP)))
        return found
    group = 4 if double else 16 // size
    vectors, scores = group * size // 16, group * (8 if double else 4) // 16
    path = HotPath(function, 16, True, double)
    noise = 0 if kind == "binary" and rest == "true" else group * path.marks_per_element
    dtype = TYPE_NAMES[type_]
    if kind == "binary":
        backward = rest == "true"
        op = "binary backward" if backward else "binary"
        loops_ = [((1 + backward) * vectors, vectors, noise)]
        return [(op, dtype, "groups", path.by_loops(loops_, group))]
    # Choosing one more takes a look at the scores again, of one thread.
    regime = re.sub(r"\w+Team<(\d+)>", r"\1 threads a row", rest).strip()
    by_loop = path.by_loops([(vectors, scores, noise), (scores, 0, 0)], group)
    return [("topk, scores and one choice", dtype, regime, by_loop)]


def resources_of(cubin: Path) -> dict[str, Resources]:
    text = output_of(tool("cuobjdump"), "-res-usage", str(cubin))
    found = {}
    for name, usage in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text):
        value = {key: int(number) for key, number in re.findall(r"(\w+)(?:\[\d\])?:(\d+)", usage)}
        found[name] = Resources(value["REG"], value["SHARED"], value["STACK"], value["LOCAL"])
    return found


def problems_of(name: str, type_: str, function: Function, resources: Resources) -> list[str]:
    problems = []
    if resources.stack_bytes or resources.local_bytes:
        problems.append(f"{resources.stack_bytes} + {resources.local_bytes} bytes of local memory")
    opcodes = set(function.opcodes())
    if local := sorted(o for o in opcodes if o.split(".")[0] in {"LDL", "STL"}):
        problems.append(f"spills: {', '.join(local)}")
    # A soft-argmax ends each row in float64: a few numbers, by one thread.
    if type_ != "double" and not name.startswith("soft_argmax"):
        doubles = sorted(o for o in opcodes if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|.*\.F64", o))
        if doubles:
            problems.append(f"double precision: {', '.join(doubles)}")
    wide = 8 if "columns" in name and TYPE_BYTES[type_] == 2 else 16
    if not re.search("finish|noise|positions|topk_scores", name):
        for kind in ("LDG", "STG"):
            if kind == "STG" and re.search("stream_kernel<.*, 1(, false)?>$", name):
                continue  # a first pass stores one number a block
            if kind == "STG" and name.startswith("soft_argmax_kernel"):
                continue  # a few numbers a row
            if not any(is_wide(opcode, kind, wide) for opcode in opcodes):
                problems.append(f"no {kind} of {wide} bytes")
    return problems


def read_module(module: Path) -> tuple[list[Kernel], list[str]]:
    kernels, problems = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if module.suffix == ".cubin":
            shutil.copy(module, folder)
        else:
            output_of(tool("cuobjdump"), "-xelf", "all", str(module.resolve()), cwd=folder)
        for cubin in sorted(folder.glob("*.cubin")):
            architecture = int(re.search(r"(?:sm_|-)(\d+)\.cubin$", cubin.name)[1])  # type: ignore[index]
            functions = functions_of(cubin)
            usage = resources_of(cubin)
            names = demangled(list(functions))
            for mangled, function in functions.items():
                shown = names[mangled]
                element = re.search(r"<(\w+)", shown)
                type_ = element[1] if element else ""
                resources = usage[mangled]
                problems += [
                    f"sm_{architecture} {shown}: {problem}"
                    for problem in problems_of(shown, type_, function, resources)
                ]
                vector = 8 if "columns" in shown and TYPE_BYTES[type_] == 2 else 16
                noise = not shown.startswith(("backward_rows", "backward_stream", "backward_col"))
                kernels += [
                    Kernel(architecture, shown, type_, op, regime, 0, resources, count, dtype)
                    for op, dtype, regime, count in counted_by_loops(shown, function)
                ]
                path = HotPath(function, vector, noise, type_ == "double")
                for op, regime, threads, by_loop, store in classified(shown):
                    if op == PER_DRAW:
                        count = path.per_draw(int(shown[-2]), type_ == "double")
                        kernels.append(
                            Kernel(
                                architecture, shown, type_, op, regime, threads, resources, count
                            )
                        )
                        continue
                    loops = path.inner_loops() if by_loop else [path.whole()]
                    size, operands = TYPE_BYTES[type_], 2 if op.startswith("backward") else 1
                    # Of several loops over a row only the last stores, and adds to the others.
                    counts = [
                        path.per_element(ways, size, operands, store and number == len(loops) - 1)
                        for number, ways in enumerate(loops)
                    ]
                    known = [count for count in counts if count is not None]
                    kernels.append(
                        Kernel(architecture, shown, type_, op, regime, threads, resources,
                               sum(known) if known and len(known) == len(counts) else None)
                    )  # fmt: skip
    return kernels, problems


def counted(kernels: list[Kernel]) -> dict[str, dict[str, float]]:
    """Instructions an element by "op, dtype" and regime; the most of all architectures."""
    counts: dict[str, dict[str, float]] = defaultdict(dict)
    for kernel in kernels:
        if kernel.per_element is not None:
            of_op = counts[f"{kernel.op}, {kernel.dtype or TYPE_NAMES[kernel.type]}"]
            most = max(of_op.get(kernel.regime, 0.0), kernel.per_element)
            of_op[kernel.regime] = round(most, 1)
    return dict(counts)


def grown(kernels: list[Kernel]) -> list[str]:
    known = json.loads(COUNTS.read_text(encoding="utf-8"))["instructions"]
    problems = []
    for kernel in kernels:
        title = f"sm_{kernel.architecture} {kernel.name} as {kernel.op}"
        expected = known.get(f"{kernel.op}, {kernel.dtype or TYPE_NAMES[kernel.type]}", {}).get(
            kernel.regime
        )
        if kernel.per_element is None:
            problems.append(f"{title}: no way through it was found that handles whole vectors")
        elif expected is None:
            problems.append(f"{title}: not in {COUNTS.name}")
        elif kernel.per_element > ALLOWANCE * expected:
            problems.append(
                f"{title}: {kernel.per_element:.1f} instructions an element, were {expected}"
            )
    return problems


def table(kernels: list[Kernel], compiler: str) -> str:
    lines = [
        "# The CUDA kernels in figures",
        "",
        f"Written by tests/cuda/check_binary.py from the machine code for sm_90 ({compiler});",
        "what was measured, by benchmarks.pages.",
        "How to read it: [kernels-cuda.md](kernels-cuda.md).",
    ]
    columns = (
        "| regime | dtype | registers | shared bytes | occupancy | instructions | bytes | slots "
    )
    columns += "| predicted share of memory's rate | measured |"
    of_op: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        if kernel.architecture == 90 and kernel.per_element is not None:
            of_op[kernel.op].append(kernel)
    for op in ("soft", "hard", "index", "backward", "backward, recomputed"):
        lines += [
            "",
            f"## {op}",
            "",
            columns,
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        order = list(TYPE_NAMES)
        for kernel in sorted(of_op[op], key=lambda k: (k.rank, k.regime, order.index(k.type))):
            slots = SLOTS_PER_BYTE * kernel.bytes_per_element
            lines.append(
                f"| {kernel.regime} | {TYPE_NAMES[kernel.type]} "
                f"| {kernel.resources.registers} | {kernel.resources.shared_bytes} "
                f"| {kernel.occupancy():.2f} | {kernel.per_element:.0f} "
                f"| {kernel.bytes_per_element} | {slots:.0f} "
                f"| {min(1.0, slots / kernel.per_element):.2f} | not yet measured |"  # type: ignore[operator]
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("modules", nargs="+", type=Path)
    parser.add_argument("--table", type=Path, help="write the page of figures here")
    parser.add_argument("--accept", action="store_true", help=f"write {COUNTS.name} anew")
    arguments = parser.parse_args()
    kernels: list[Kernel] = []
    problems: list[str] = []
    for module in arguments.modules:
        found, wrong = read_module(module)
        kernels += found
        problems += wrong
    if not kernels:
        sys.exit("check_binary: no CUDA kernels in " + " ".join(map(str, arguments.modules)))
    release = re.search(r"release (\S+),", output_of(nvcc(), "--version"))
    compiler = f"nvcc {release[1]}" if release else "nvcc"
    if arguments.accept:
        record = {"compiler": compiler, "instructions": counted(kernels)}
        COUNTS.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    problems += grown(kernels)
    if arguments.table:
        arguments.table.write_text(table(kernels, compiler), encoding="utf-8")
    for problem in problems:
        print(problem)
    architectures = sorted({kernel.architecture for kernel in kernels})
    print(
        f"{len(kernels)} kernels and ops for sm_{', sm_'.join(map(str, architectures))}, "
        f"{compiler}: {len(problems)} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
