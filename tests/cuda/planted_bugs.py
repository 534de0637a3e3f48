"""Plants bugs in the CUDA kernels, one at a time, and expects the emulated tests to catch each.

    python tests/cuda/planted_bugs.py [only bugs whose description contains this]

Every barrier of the kernels is deleted in turn, found by its name, so that a new one is covered
without being listed; masks, bounds checks, tie-breaks and the like are listed below. Needs g++, no
CUDA. About four minutes on two cores.
"""

# ruff: noqa: E501
from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

BARRIERS = re.compile(r"^ *(__syncthreads|cluster_barrier)\(\);\n", re.MULTILINE)
BARRIER_FILES = ("team.cuh", "column_kernels.cuh", "row_kernels.cuh", "stream_kernels.cuh")


@dataclass(frozen=True)
class Bug:
    what: str
    file: str
    old: str
    new: str
    nth: int = 0  # which occurrence of `old`, of `of`
    of: int = 1
    address_sanitizer: bool = False  # who sees it: ASan + UBSan instead of the race detector

    def plant(self, folder: Path) -> None:
        path = folder / "csrc" / "cuda" / self.file
        text = path.read_text(encoding="utf-8")
        places = [match.start() for match in re.finditer(re.escape(self.old), text)]
        if len(places) != self.of:
            sys.exit(
                f"planted_bugs: {self.what}: {self.file} has {len(places)} x {self.old!r}, "
                f"expected {self.of}"
            )
        start = places[self.nth]
        path.write_text(text[:start] + self.new + text[start + len(self.old) :], encoding="utf-8")


def deleted_barriers() -> list[Bug]:
    bugs = []
    for file in BARRIER_FILES:
        text = (ROOT / "csrc" / "cuda" / file).read_text(encoding="utf-8")
        lines = [match.group(0) for match in BARRIERS.finditer(text)]
        for position, line in enumerate(lines):
            nth = lines[:position].count(line)
            name = line.strip().rstrip(";")
            bugs.append(
                Bug(
                    f"{file}: {name} number {nth + 1} deleted",
                    file,
                    line,
                    "",
                    nth,
                    text.count(line),
                )
            )
    return bugs


BUGS = [
    # ---- agreement among threads
    Bug("lane 31 left out of the mask", "team.cuh", "kWholeWarp = 0xFFFFFFFFu", "kWholeWarp = 0x7FFFFFFFu"),
    Bug("teams reduce over their neighbours", "team.cuh", "if (distance < lanes) v = op(",
        "if (distance <= lanes) v = op("),
    Bug("integer teams reduce over their neighbours", "team.cuh",
        "if (distance < lanes) v = Smaller()(", "if (distance <= lanes) v = Smaller()("),
    Bug("largest of teams over their neighbours", "team.cuh",
        "if (distance < lanes) v = Larger()(", "if (distance <= lanes) v = Larger()("),
    Bug("negative numbers in the order of their bits", "team.cuh",
        "return b ^ ((b >> 31) & 0x7FFFFFFF);", "return b;"),
    Bug("a slow row diverges from the rest of its warp", "team.cuh",
        "return __any_sync(kWholeWarp, flag);", "return flag;"),
    Bug("every lane writes its warp's part", "team.cuh",
        "if (threadIdx.x % 32 == 0) of_warp", "of_warp"),
    Bug("the last warp's part is forgotten", "team.cuh", "for (int w = 1; w < kWarps; ++w)",
        "for (int w = 1; w < kWarps - 1; ++w)"),
    Bug("every thread writes its block's part", "team.cuh",
        "if (threadIdx.x == 0) of_block[0] = v;", "of_block[0] = v;"),
    Bug("a block of the cluster is forgotten", "team.cuh",
        "for (unsigned b = 1; b < cluster_blocks(); ++b)", "for (unsigned b = 2; b < cluster_blocks(); ++b)"),
    Bug("empty parts are rescaled", "team.cuh", "part.best.value == largest", "false"),
    # ---- ties and NaN
    Bug("ties between threads to the higher index", "team.cuh", "b.index < a.index", "b.index > a.index"),
    Bug("ties between held threads to the higher index", "row_kernels.cuh",
        "index = team.reduce(index, Smaller());", "index = team.reduce(index, Larger());"),
    Bug("ties between held groups to the higher index", "row_kernels.cuh",
        "for (int k = kGroups - 1; k >= 0; --k)", "for (int k = 0; k < kGroups; ++k)"),
    Bug("ties in a held group to the higher index", "row_kernels.cuh",
        "for (int v = kGroup - 1; v >= 0; --v)", "for (int v = 0; v < kGroup; ++v)"),
    Bug("ties in a streamed group to the higher index", "row_view.cuh",
        "for (int v = count - 1; v >= 0; --v)", "for (int v = 0; v < count; ++v)"),
    Bug("ties between streamed groups to the later", "row_view.cuh", "if (top <= best.value ||",
        "if (top < best.value ||"),
    Bug("ties between columns' classes to the later, index only", "column_kernels.cuh",
        "if (!(z[j] <= best[j].value) &&", "if (!(z[j] < best[j].value) &&"),
    Bug("ties between columns' classes to the later, soft", "column_kernels.cuh",
        "if (!(z[j] <= best.value)) {", "if (!(z[j] < best.value)) {"),
    Bug("a number displaces a NaN in a streamed row", "row_view.cuh", " || best.is_nan()) return;", ") return;"),
    Bug("a number displaces a NaN in a column", "column_kernels.cuh", " && !best[j].is_nan())", ")"),
    Bug("a number displaces a NaN in a soft column", "column_kernels.cuh",
        "if (best.is_nan()) continue;", ""),
    Bug("a number beats another thread's NaN", "team.cuh", "b.is_nan() || b.value > a.value",
        "b.value > a.value"),
    Bug("the last NaN of a thread instead of the first", "row_view.cuh",
        "first_nan = c;\n      break;", "first_nan = c;"),
    Bug("the last allowed class instead of the first", "row_view.cuh",
        "if (first_allowed == kNoIndex) first_allowed = c;", "first_allowed = c;"),
    Bug("the last allowed class of a column", "column_kernels.cuh",
        "if (first_allowed == kNoIndex) first_allowed = c;", "first_allowed = c;"),
    Bug("an index although nothing is above -inf", "row_kernels.cuh",
        "top > -infinity<Scalar>() ? index : kNoIndex", "index"),
    Bug("+inf in a column is an ordinary winner", "column_kernels.cuh",
        "best.value == infinity<Scalar>() || ", ""),
    Bug("exponentials of -inf less -inf in a streamed row", "stream_kernels.cuh",
        "if (total.best.value == -infinity<Scalar>()) return;", ""),
    Bug("forbidden rows have gradients", "row_kernels.cuh", "if (forbidden) {", "if (false) {"),
    Bug("forbidden streamed rows have gradients", "stream_kernels.cuh", "if (forbidden) {", "if (false) {"),
    Bug("a tau that is none passes", "row_view.cuh", "if (!(tau > 0 && tau < infinity<Scalar>()))", "if (false)"),
    # ---- the mask
    Bug("the mask is ignored", "row_view.cuh", "if (p.mask != nullptr) {", "if (false) {"),
    Bug("the columns' mask is ignored", "column_kernels.cuh", "if (p.mask != nullptr) {", "if (false) {"),
    Bug("the mask decides nothing about forbidden rows", "row_view.cuh",
        "if (!is_allowed(p, row, c)) continue;", ""),
    Bug("the mask decides nothing about forbidden columns", "column_kernels.cuh",
        "if (!view.allowed(p, column, c)) continue;", ""),
    Bug("the mask is read past the row", "row_view.cuh", "if (span.holds(v) && !is_allowed(",
        "if (!is_allowed(", address_sanitizer=True),
    Bug("the mask is read past the columns", "column_kernels.cuh",
        "if (j < view.columns && !view.allowed(", "if (!view.allowed(", address_sanitizer=True),
    # ---- bounds
    Bug("loads past the row", "row_view.cuh", "span.holds(v) ? address[v] : outside", "address[v]"),
    Bug("stores past the row", "row_view.cuh", "if (span.holds(v)) address[v]", "address[v]"),
    Bug("vectors before the row", "row_view.cuh", "row.vector && s.c >= 0 &&", "row.vector &&"),
    Bug("vectors past the row", "row_view.cuh", " && s.c <= row.classes - kGroup;", ";"),
    Bug("vectors that are not aligned", "row_view.cuh", "s.vector = row.vector && ", "s.vector = ",
        address_sanitizer=True),
    *(Bug(f"alignment of operand {nth + 1} is not looked at", "row_view.cuh", operand, "true",
          address_sanitizer=True)
      for nth, operand in enumerate(("aligned<T>(p.logits, first)", "aligned<T>(p.y, first)",
                                     "aligned<T>(p.grad, first)", "aligned<T>(p.grad_logits, first)"))),
    Bug("rows past the last", "row_view.cuh", "const bool exists = row < p.outer * p.inner;",
        "const bool exists = true;", address_sanitizer=True),
    *(Bug(f"a row that does not exist writes, place {nth + 1}", "row_kernels.cuh",
          "team.rank() == 0 && row.classes > 0)", "team.rank() == 0)", nth, 3) for nth in range(3)),
    *(Bug(f"every thread of a team writes, place {nth + 1}", "row_kernels.cuh",
          "team.rank() == 0 && row.classes > 0)", "row.classes > 0)", nth, 3) for nth in range(3)),
    Bug("groups of the next chunk", "row_view.cuh", "if (group >= last) break;", ""),
    *(Bug(f"groups of the next chunk, backward, place {nth + 1}", "stream_kernels.cuh",
          "if (group >= chunk.last_group) break;", "", nth, 2) for nth in range(2)),
    *(Bug(f"every thread writes a split row's part, place {nth + 1}", "stream_kernels.cuh",
          "if (team.rank() == 0) partials_of_row", "partials_of_row", nth, 3) for nth in range(3)),
    Bug("every thread writes the split winner's one", "stream_kernels.cuh",
        "if (team.rank() == 0) narrow(", "narrow("),
    Bug("every chunk writes the index", "stream_kernels.cuh", "team.rank() == 0 && blockIdx.y == 0) p.index",
        "team.rank() == 0) p.index"),
    Bug("every chunk writes dtau", "stream_kernels.cuh", "team.rank() == 0 && blockIdx.y == 0) {",
        "team.rank() == 0) {"),
    Bug("a chunk of a split row is forgotten", "stream_kernels.cuh", "k < p.chunks;", "k < p.chunks - 1;"),
    Bug("every block records the state", "noise.cuh", "blockIdx.x != 0 || ", ""),
    Bug("every chunk records the state", "noise.cuh", "blockIdx.y != 0 || ", ""),
    Bug("every thread records the state", "noise.cuh", " || threadIdx.x != 0)", ")"),
    Bug("noise past the end", "noise.cuh", "if (4 * k + j < count) narrow(", "narrow(", address_sanitizer=True),
    Bug("loads past the columns", "column_kernels.cuh", "out[j] = j < view.columns ?", "out[j] = true ?",
        address_sanitizer=True),
    Bug("stores past the columns", "column_kernels.cuh", "if (j < view.columns) narrow(", "narrow("),
    Bug("tau of columns past the last", "column_kernels.cuh",
        "tau[j] = inverse_tau<Scalar>(p, view.row + (j < view.columns ? j : 0));",
        "tau[j] = inverse_tau<Scalar>(p, view.row + j);", address_sanitizer=True),
    Bug("tau of columns past the last, backward", "column_kernels.cuh",
        "inverse[j] = inverse_tau<Scalar>(p, view.row + (j < view.columns ? j : 0)).inverse;",
        "inverse[j] = inverse_tau<Scalar>(p, view.row + j).inverse;", address_sanitizer=True),
    Bug("special columns past the last", "column_kernels.cuh", "special[j] = j < view.columns && (",
        "special[j] = (", address_sanitizer=True),
    Bug("indices of columns past the last", "column_kernels.cuh",
        "warp == 0 && j < view.columns) p.index", "warp == 0) p.index"),
    Bug("every warp writes the columns' index", "column_kernels.cuh",
        "warp == 0 && j < view.columns) p.index", "j < view.columns) p.index"),
    Bug("winners of columns past the last", "column_kernels.cuh", "if (j >= view.columns) continue;", "",
        address_sanitizer=True),
    Bug("index of columns past the last, backward", "column_kernels.cuh",
        "const std::int64_t index = j < view.columns ? p.index[view.row + j] : -1;",
        "const std::int64_t index = p.index[view.row + j];", address_sanitizer=True),
    Bug("dtau of columns past the last", "column_kernels.cuh", "warp == 0 && j < view.columns) {", "warp == 0) {"),
    Bug("every warp writes the columns' dtau", "column_kernels.cuh", "warp == 0 && j < view.columns) {",
        "j < view.columns) {"),
    Bug("every warp writes the columns' one", "column_kernels.cuh", "if (index % kWarps == warp) narrow(", "narrow("),
    Bug("vectors across fewer columns than four", "column_kernels.cuh",
        "v.vector = v.columns == kColumnsPerLane && ", "v.vector = "),
    Bug("vectors across columns that are apart", "column_kernels.cuh", "p.inner_stride == 1 &&", "true &&"),
    Bug("vectors across classes that are not aligned alike", "column_kernels.cuh",
        "p.class_stride % kColumnsPerLane == 0 && ", "true && ", address_sanitizer=True),
    *(Bug(f"alignment of columns' operand {nth + 1} is not looked at", "column_kernels.cuh", operand,
          "true", address_sanitizer=True)
      for nth, operand in enumerate(("aligned<T>(p.logits, v.offset)", "aligned<T>(p.y, v.offset)",
                                     "aligned<T>(p.grad, v.offset)", "aligned<T>(p.grad_logits, v.offset)"))),
    Bug("an index that is no class", "row_view.cuh", "if (index >= row.classes) return", "if (false) return", address_sanitizer=True),
    Bug("an index that is no class, recomputed", "row_kernels.cuh", "if (index >= 0 && index < row.classes) {", "if (index >= 0) {", address_sanitizer=True),
    Bug("an index that is no class, columns", "column_kernels.cuh", "if (index >= classes) {", "if (false) {", address_sanitizer=True),
    # ---- the noise
    Bug("the second word is never asked for", "noise.cuh", "< (1u << 20);", "< 0u;"),
    Bug("block numbers wrap at 32 bits", "noise.cuh", "if (high != block_high_) {", "if (false) {"),
    Bug("the offset counts words", "noise.cuh", "if (source.offset_in_words) state.offset /= 4;", ""),
    Bug("the offset within a graph is forgotten", "noise.cuh", " + source.offset_more;", ";"),
]  # fmt: skip


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, **options)  # type: ignore[call-overload]


def compiler_flags(address_sanitizer: bool) -> tuple[list[str], list[str]]:
    """Flags of everything, and those of the kernels alone."""
    flags = [
        "-std=c++20", "-g1", "-O0", "-ffp-contract=off", "-Wno-unknown-pragmas",
        "-DGUMBEL_EXT_EMULATE_CUDA", "-DGUMBEL_EXT_TYPE=float", "-Itests/cuda", "-Icsrc/cuda",
    ]  # fmt: skip
    if platform.machine() == "x86_64" and "fma" in Path("/proc/cpuinfo").read_text().split():
        flags.append("-mfma")
    if address_sanitizer:
        return [*flags, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []
    return flags, ["-fsanitize=thread"]


class Suite:
    """The emulated tests of float32, compiled for each kind of checker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compiler = os.environ.get("CXX", "g++")
        self.objects: dict[bool, list[str]] = {}
        sources = ["csrc/cuda/plan.cpp", "csrc/cpu/plan.cpp", "csrc/cpu/kernels_baseline.cpp"]
        if platform.machine() == "x86_64":
            sources.append("csrc/cpu/kernels_avx2.cpp")
        shared = []
        for source in sources:
            shared.append(str(folder / (source.replace("/", "-") + ".o")))
            self.compile(
                ["-std=c++20", "-O2", "-ffp-contract=off", "-c", source, "-o", shared[-1]], ROOT
            )
        for address_sanitizer in (False, True):
            emulation = str(folder / f"emulation-{address_sanitizer}.o")
            flags, _ = compiler_flags(address_sanitizer)
            self.compile([*flags, "-O2", "-c", "tests/cuda/emulation.cpp", "-o", emulation], ROOT)
            self.objects[address_sanitizer] = [emulation, *shared]

    def compile(self, arguments: list[str], folder: Path) -> None:
        done = run([self.compiler, *arguments], cwd=folder)
        if done.returncode != 0:
            sys.exit(
                f"planted_bugs: does not compile: {' '.join(arguments)}\n{done.stderr[-2000:]}"
            )

    def first_failure(self, tree: Path, address_sanitizer: bool) -> str | None:
        """What the tests of `tree` say, or None when they pass."""
        flags, of_kernels = compiler_flags(address_sanitizer)
        program = tree / "kernels"
        self.compile(
            [*flags, *of_kernels, "-c", "tests/cuda/test_cuda_kernels.cpp", "-o", f"{program}.o"],
            tree,
        )
        self.compile(
            [*flags, f"{program}.o", *self.objects[address_sanitizer], "-o", str(program)], tree
        )
        environment = dict(
            os.environ,
            GUMBEL_EXT_QUICK="1",
            GUMBEL_EXT_FAIL_FAST="1",
            ASAN_OPTIONS="detect_leaks=0",
        )
        try:
            done = run([str(program)], env=environment, timeout=300)
        except subprocess.TimeoutExpired:
            return "no end within five minutes"
        if done.returncode == 0:
            return None
        lines = [
            line
            for line in (done.stdout + done.stderr).splitlines()
            if "FAILED" in line or "ERROR" in line or "runtime error" in line
        ]
        return lines[0] if lines else f"exit status {done.returncode}"


def main() -> int:
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    bugs = [bug for bug in [*deleted_barriers(), *BUGS] if only in bug.what]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        suite = Suite(base)

        def tree(title: str) -> Path:
            folder = base / title
            for part in ("csrc", "tests/cuda"):
                shutil.copytree(ROOT / part, folder / part)
            return folder

        def caught(numbered: tuple[int, Bug]) -> tuple[Bug, str | None]:
            number, bug = numbered
            folder = tree(f"bug{number}")
            bug.plant(folder)
            failure = suite.first_failure(folder, bug.address_sanitizer)
            shutil.rmtree(folder)
            return bug, failure

        for address_sanitizer in (False, True):
            failure = suite.first_failure(tree(f"sound{address_sanitizer}"), address_sanitizer)
            if failure is not None:
                sys.exit(f"planted_bugs: fails without a bug: {failure}")
        missed = 0
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
            for bug, failure in pool.map(caught, enumerate(bugs)):
                missed += failure is None
                print(
                    f"{'MISSED' if failure is None else 'caught'}: {bug.what}"
                    + (f"  [{failure[:110]}]" if failure else ""),
                    flush=True,
                )
    print(f"{len(bugs) - missed} of {len(bugs)} planted bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
