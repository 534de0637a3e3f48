"""Plants bugs in the CUDA kernels, one at a time, and expects the emulated tests to catch each.

    python tests/cuda/planted_bugs.py [only bugs whose description contains this]

With CI_SHARE=2/6 it runs every sixth of them, from the second on; all are planted, so that one
that no longer finds its place is always seen. With CPU_OBJECTS=FOLDER the CPU kernels, which the
others are compared with, are those compiled there.

Every barrier of the kernels is deleted in turn, found by its name, so that a new one is covered
without being listed; masks, bounds checks, tie-breaks and the like are listed below, each by the
function that it lies in: functions may move to other files, and lines may be wrapped. All bugs are
compiled at once, each behind a switch that an environment variable turns on. Needs g++, no CUDA.
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
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("csrc", "cuda")
# The programs whose tests bugs show in, tests/cuda/test_NAME_kernels.cpp: a bug in the first that
# includes its file.
PROGRAMS = ("gumbel_softmax", "binary_concrete", "concrete", "deterministic", "estimators")
# Where a bug in a file shows; the others show everywhere.
REGIMES = {
    "stream_kernels.cuh": "stream,split",
    "column_kernels.cuh": "columns",
    "topk_kernels.cuh": "topk",
}

NOT_CODE = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:\\\n|[^\n])*', re.DOTALL | re.MULTILINE
)
BARRIER = re.compile(r"\b(?:__syncthreads|cluster_barrier)\(\);")


@dataclass(frozen=True)
class Bug:
    """`old`, the nth of its occurrences in a function or a type, becomes `new`, where BUG switches.

    `where` is the name, with that of the type if need be: "take_group", "BlockTeam::any". The file
    is found by itself, and white space does not matter.
    """

    what: str
    where: str
    old: str
    new: str
    nth: int = 0
    of: int = 1
    program: str = ""  # that it shows in, if not the first that includes its file


def swap(
    what: str, where: str, old: str, new: str, nth: int = 0, of: int = 1, program: str = ""
) -> Bug:
    """An expression for another."""
    return Bug(what, where, old, f"(BUG ? ({new}) : ({old}))", nth, of, program)


def drop(what: str, where: str, statement: str, nth: int = 0, of: int = 1) -> Bug:
    """A statement deleted."""
    return Bug(what, where, statement, f"if (!BUG) {{ {statement} }}", nth, of)


def loop(what: str, where: str, old: str, counter: str, count: str) -> Bug:
    """A loop that runs down to 0 runs up instead."""
    new = (
        f"for (int {counter} = BUG ? 0 : {count} - 1; BUG ? {counter} < {count} : {counter} >= 0; "
        f"{counter} += BUG ? 1 : -1)"
    )
    return Bug(what, where, old, new)


@dataclass(frozen=True)
class Place:
    """A part of a file; of a definition with its name, behind those of the types around it."""

    file: str
    start: int
    end: int
    name: str = ""


def tests_of(program: str) -> Path:
    return Path("tests", "cuda", f"test_{program}_kernels.cpp")


def code_alone(text: str) -> str:
    """C++ with comments, strings and preprocessor lines blanked, every character in its place."""
    return NOT_CODE.sub(lambda part: re.sub(r"[^\n]", " ", part[0]), text)


def defined_by(header: str) -> tuple[str, str]:
    """(kind, name) of what the code before an opening brace begins."""
    for brackets, instead in ((r"<[^<>]*>", ""), (r"\([^()]*\)", "@")):
        while (shorter := re.sub(brackets, instead, header)) != header:
            header = shorter
    # The name whose parentheses end the header or precede a constructor's initialisers.
    if function := re.search(r"(\w+)\s*@[\s@]*(?:const\s*)?(?::[^:]|$)", header):
        return "function", function[1]
    if type_ := re.search(r"\b(?:struct|class|union)\s+(\w+)[\w\s:,]*$", header):
        return "type", type_[1]
    return ("namespace", "") if "namespace" in header else ("block", "")


def definitions(file: str, code: str) -> list[Place]:
    """Its types and functions, those within others after them."""
    found: list[Place] = []
    around: list[tuple[str, str, int]] = []
    begin = 0
    for mark in re.finditer(r"[{};]", code):
        if mark[0] == "{":
            kind, name = "block", ""
            if all(outer in ("namespace", "type") for outer, _, _ in around):
                kind, name = defined_by(code[begin : mark.start()])
            around.append((kind, name, begin))
        elif mark[0] == "}":
            _, name, start = around.pop()
            if name:
                names = [*(outer for _, outer, _ in around if outer), name]
                found.append(Place(file, start, mark.end(), "::".join(names)))
        begin = mark.end()
    return sorted(found, key=lambda place: (place.start, -place.end))


class Sources:
    """The kernels' code, and where in it everything is defined."""

    def __init__(self, root: Path) -> None:
        paths = (p for p in sorted((root / KERNELS).iterdir()) if not p.name.endswith("_cuda.cpp"))
        self.texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
        self.code = {file: code_alone(text) for file, text in self.texts.items()}
        self.definitions = [d for file, code in self.code.items() for d in definitions(file, code)]
        self.included_by = {name: self.included(root / tests_of(name)) for name in PROGRAMS}

    def included(self, path: Path) -> set[str]:
        """The names of the files that one includes, also by way of others."""
        found, pending = set[str](), [path.read_text(encoding="utf-8")]
        while pending:
            names = {Path(name).name for name in re.findall(r'#include "(.*)"', pending.pop())}
            pending += [self.texts[name] for name in names & self.texts.keys() - found]
            found |= names
        return found

    def program_of(self, bug: Bug) -> str:
        file = self.find(bug).file
        including = (name for name in PROGRAMS if file in self.included_by[name])
        return bug.program or next(including, PROGRAMS[0])

    def find(self, bug: Bug) -> Place:
        there = [d for d in self.definitions if f"::{d.name}".endswith(f"::{bug.where}")]
        if not there:
            sys.exit(f"planted_bugs: {bug.what}: nothing in {KERNELS} defines {bug.where}")
        tokens = map(re.escape, re.findall(r"\w+|[^\w\s]", bug.old))
        pattern = re.compile(r"\s*".join(tokens))
        places = [
            Place(d.file, *match.span())
            for d in there
            for match in pattern.finditer(self.code[d.file], d.start, d.end)
        ]
        if len(places) != bug.of:
            files = ", ".join(dict.fromkeys(d.file for d in there))
            sys.exit(
                f"planted_bugs: {bug.what}: {bug.where} in {files} has {len(places)} x "
                f"{bug.old!r}, expected {bug.of}"
            )
        return places[bug.nth]

    def deleted_barriers(self) -> list[Bug]:
        calls: dict[tuple[str, str], int] = defaultdict(int)
        for file, code in self.code.items():
            inside = [d for d in self.definitions if d.file == file]
            for call in BARRIER.finditer(code):
                around = [d.name for d in inside if d.start <= call.start() < d.end]
                calls[around[-1], call[0]] += 1
        return [
            drop(f"{where}: {call[:-1]} number {nth + 1} deleted", where, call, nth, of)
            for (where, call), of in calls.items()
            for nth in range(of)
        ]


BUGS = [
    # ---- agreement among threads
    Bug("lane 31 left out of a shuffle's mask", "shuffle_xor", "__shfl_xor_sync(kWholeWarp, ", "__shfl_xor_sync(BUG ? 0x7FFFFFFFu : kWholeWarp, "),
    *(swap(f"teams reduce over their neighbours, place {nth + 1}", "reduce_lanes", "distance < lanes", "distance <= lanes", nth, 3) for nth in range(3)),
    swap("negative numbers in the order of their bits", "reduce_lanes", "b ^ ((b >> 31) & 0x7FFFFFFF)", "b"),
    swap("a slow row diverges from the rest of its warp", "LaneTeam::any", "__any_sync(kWholeWarp, flag)", "flag"),
    Bug("lane 31 left out of a vote's mask", "LaneTeam::any", "__any_sync(kWholeWarp, flag)", "__any_sync(BUG ? 0x7FFFFFFFu : kWholeWarp, flag)"),
    swap("every lane writes its warp's part", "BlockTeam::reduce", "threadIdx.x % 32 == 0", "true"),
    swap("the last warp's part is forgotten", "BlockTeam::reduce", "w < kWarps", "w < kWarps - 1"),
    swap("every thread writes its block's part", "ClusterTeam::reduce", "threadIdx.x == 0", "true"),
    Bug("a block of the cluster is forgotten", "ClusterTeam::reduce", "unsigned b = 1; b < cluster_blocks()", "unsigned b = BUG ? 2 : 1; b < cluster_blocks()"),
    swap("empty parts are rescaled", "MergeSums::rescaled", "part.best.value == largest", "false"),
    # ---- ties and NaN
    swap("ties between threads to the higher index", "BetterOf::operator", "b.index < a.index", "b.index > a.index"),
    Bug("ties between held threads to the higher index", "soft_rows_kernel", "index = team.reduce(index, Smaller());", "index = BUG ? -team.reduce(-index, Smaller()) : team.reduce(index, Smaller());"),
    loop("ties between held groups to the higher index", "soft_rows_kernel", "for (int k = kGroups - 1; k >= 0; --k)", "k", "kGroups"),
    loop("ties in a held group to the higher index", "soft_rows_kernel", "for (int v = kGroup - 1; v >= 0; --v)", "v", "kGroup"),
    loop("ties in a streamed group to the higher index", "take_group", "for (int v = count - 1; v >= 0; --v)", "v", "count"),
    swap("ties between streamed groups to the later", "take_group", "top <= best.value", "top < best.value"),
    swap("ties between columns' classes to the later, index only", "pick_columns_kernel", "z[j] <= best[j].value", "z[j] < best[j].value"),
    swap("ties between columns' classes to the later, soft", "soft_columns_kernel", "z[j] <= best.value", "z[j] < best.value"),
    Bug("a number displaces a NaN in a streamed row", "take_group", "|| best.is_nan()) return", "|| (!BUG && best.is_nan())) return"),
    Bug("a number displaces a NaN in a column", "pick_columns_kernel", "&& !best[j].is_nan()) best", "&& (BUG || !best[j].is_nan())) best"),
    drop("a number displaces a NaN in a soft column", "soft_columns_kernel", "if (best.is_nan()) continue;"),
    swap("a number beats another thread's NaN", "BetterOf::operator", "b.is_nan() || b.value > a.value", "b.value > a.value"),
    Bug("the last NaN of a thread instead of the first", "settle_row", "first_nan = c; break;", "first_nan = c; if (!BUG) break;"),
    Bug("the last allowed class instead of the first", "settle_row", "if (first_allowed == kNoIndex) first_allowed = c;", "if (BUG || first_allowed == kNoIndex) first_allowed = c;"),
    Bug("the last allowed class of a column", "settle_column", "if (first_allowed == kNoIndex) first_allowed = c;", "if (BUG || first_allowed == kNoIndex) first_allowed = c;"),
    swap("an index although nothing is above -inf", "soft_rows_kernel", "top > -infinity<Scalar>() ? index : kNoIndex", "index"),
    swap("+inf in a column is an ordinary winner", "soft_columns_kernel", "best.value == infinity<Scalar>()", "false"),
    drop("exponentials of -inf less -inf in a streamed row", "soft_stream_kernel", "if (total.best.value == -infinity<Scalar>()) return;"),
    Bug("forbidden rows have gradients", "gradient_of_held", "if (forbidden) {", "if (!BUG && forbidden) {"),
    Bug("forbidden streamed rows have gradients", "backward_stream_kernel", "if (forbidden) {", "if (!BUG && forbidden) {"),
    swap("a tau that is none passes", "inverse_tau", "tau > 0 && tau < infinity<Scalar>()", "true"),
    # ---- the mask
    Bug("the mask is ignored", "noisy_group", "if (p.mask != nullptr) {", "if (!BUG && p.mask != nullptr) {"),
    Bug("the columns' mask is ignored", "noisy_columns", "if (p.mask != nullptr) {", "if (!BUG && p.mask != nullptr) {"),
    drop("the mask decides nothing about forbidden rows", "settle_row", "if (!is_allowed(p, row, c)) continue;"),
    drop("the mask decides nothing about forbidden columns", "settle_column", "if (!view.allowed(p, column, c)) continue;"),
    Bug("the mask is read past the row", "noisy_group", "if (span.holds(v) && !is_allowed(", "if ((BUG || span.holds(v)) && !is_allowed("),
    Bug("the mask is read past the columns", "noisy_columns", "if (j < view.columns && !view.allowed(", "if ((BUG || j < view.columns) && !view.allowed("),
    # ---- bounds
    Bug("loads past the row", "RawGroup::load", "span.holds(v) ? address[v]", "(BUG || span.holds(v)) ? address[v]"),
    Bug("stores past the row", "RawGroup::store", "if (span.holds(v)) address[v]", "if (BUG || span.holds(v)) address[v]"),
    swap("vectors before the row", "GroupSpan::of", "s.c >= 0", "true"),
    swap("vectors past the row", "GroupSpan::of", "s.c <= row.classes - kGroup", "true"),
    Bug("vectors that are not aligned", "GroupSpan::of", "s.vector = row.vector && ", "s.vector = (BUG || row.vector) && "),
    *(swap(f"alignment of {operand} is not looked at", "RowView::of", f"aligned<T>(p.{operand}, first)", "true") for operand in ("logits", "y", "grad", "grad_logits")),
    swap("rows past the last", "RowView::of", "row < p.outer * p.inner", "true"),
    *(swap(f"a row that does not exist writes, {kernel}", kernel, "team.rank() == 0 && row.classes > 0", "team.rank() == 0") for kernel in ("soft_rows_kernel", "gradient_of_held", "pick_rows_kernel")),
    *(swap(f"every thread of a team writes, {kernel}", kernel, "team.rank() == 0 && row.classes > 0", "row.classes > 0") for kernel in ("soft_rows_kernel", "gradient_of_held", "pick_rows_kernel")),
    Bug("groups of the next chunk", "for_noisy_groups", "if (group >= last) break;", "if (!BUG && group >= last) break;"),
    *(Bug(f"groups of the next chunk, backward, place {nth + 1}", "for_y_and_grad", "if (group >= chunk.last_group) break;", "if (!BUG && group >= chunk.last_group) break;", nth, 2) for nth in range(2)),
    *(Bug(f"every thread writes a split row's part, {kernel}", kernel, "if (team.rank() == 0) partials_of_row", "if (BUG || team.rank() == 0) partials_of_row") for kernel in ("soft_stream_kernel", "pick_partial_kernel", "backward_stream_kernel")),
    Bug("every thread writes the split winner's one", "pick_finish_kernel", "if (team.rank() == 0) narrow(", "if (BUG || team.rank() == 0) narrow("),
    Bug("every chunk writes the index", "soft_stream_kernel", "blockIdx.y == 0) p.index", "(BUG || blockIdx.y == 0)) p.index"),
    Bug("every chunk writes dtau", "backward_stream_kernel", "blockIdx.y == 0) {", "(BUG || blockIdx.y == 0)) {"),
    swap("a chunk of a split row is forgotten", "merge_partials", "k < p.chunks", "k < p.chunks - 1"),
    swap("every block records the state", "record_state", "blockIdx.x != 0", "false"),
    swap("every chunk records the state", "record_state", "blockIdx.y != 0", "false"),
    swap("every thread records the state", "record_state", "threadIdx.x != 0", "false"),
    swap("noise past the end", "noise_kernel", "n + j < count", "true"),
    Bug("loads past the columns", "load_columns", "out[j] = j < view.columns ?", "out[j] = (BUG || j < view.columns) ?"),
    Bug("stores past the columns", "store_columns", "if (j < view.columns) narrow(", "if (BUG || j < view.columns) narrow("),
    *(swap(f"tau of columns past the last, {kernel}", kernel, "(j < view.columns ? j : 0)", "j") for kernel in ("soft_columns_kernel", "backward_columns_kernel")),
    Bug("special columns past the last", "soft_columns_kernel", "special[j] = j < view.columns && ", "special[j] = (BUG || j < view.columns) && "),
    swap("indices of columns past the last", "soft_columns_kernel", "warp == 0 && j < view.columns", "warp == 0"),
    swap("every warp writes the columns' index, soft", "soft_columns_kernel", "warp == 0 && j < view.columns", "j < view.columns"),
    Bug("every warp writes the columns' index", "pick_columns_kernel", "warp == 0) p.index", "(BUG || warp == 0)) p.index"),
    Bug("winners of columns past the last", "pick_columns_kernel", "if (j >= view.columns) continue;", "if (!BUG && j >= view.columns) continue;"),
    Bug("index of columns past the last, backward", "backward_columns_kernel", "index = j < view.columns ? p.index", "index = (BUG || j < view.columns) ? p.index"),
    swap("dtau of columns past the last", "backward_columns_kernel", "warp == 0 && j < view.columns", "warp == 0"),
    swap("every warp writes the columns' dtau", "backward_columns_kernel", "warp == 0 && j < view.columns", "j < view.columns"),
    swap("every warp writes the columns' one", "pick_columns_kernel", "index % kWarps == warp", "true"),
    swap("vectors across fewer columns than four", "ColumnView::of", "v.columns == kColumnsPerLane", "true"),
    swap("vectors across columns that are apart", "ColumnView::of", "p.inner_stride == 1", "true"),
    swap("vectors across classes that are not aligned alike", "ColumnView::of", "p.class_stride % kColumnsPerLane == 0", "true"),
    *(swap(f"alignment of columns' {operand} is not looked at", "ColumnView::of", f"aligned<T>(p.{operand}, v.offset)", "true") for operand in ("logits", "y", "grad", "grad_logits")),
    swap("an index that is no class", "chosen_gradient", "index >= row.classes", "false"),
    swap("an index that is no class, recomputed", "backward_recompute_rows_kernel", "index < row.classes", "true"),
    swap("an index that is no class, columns", "backward_columns_kernel", "index >= classes", "false"),
    # ---- the noise
    swap("the second word is never asked for", "in_tail", "(hi ^ spread_top_bit(DeviceU32{hi}).v) < (1u << 20)", "false"),
    swap("block numbers wrap at 32 bits", "follow", "high != block_high_", "false"),
    drop("the offset counts words", "read_state", "if (source.offset_in_words) state.offset /= 4;"),
    swap("the offset within a graph is forgotten", "read_state", "source.offset_more", "0"),
    # ---- noise positions
    swap("groups begin where row-major positions have them", "RowView::of", "static_cast<int>(v.position % kGroup)", "static_cast<int>((v.position - p.first_position) % kGroup)"),
    swap("rows take the strides of row-major positions, outer", "RowView::of", "static_cast<std::uint64_t>(p.position_outer_stride)", "static_cast<std::uint64_t>(p.classes * p.inner)"),
    swap("rows take the strides of row-major positions, inner", "RowView::of", "static_cast<std::uint64_t>(p.position_inner_stride)", "std::uint64_t(1)"),
    Bug("the first position of rows is 0", "RowView::of", "p.first_position + static_cast", "(BUG ? 0 : p.first_position) + static_cast"),
    swap("the table is ignored", "RowView::of", "kNoise && p.row_positions != nullptr", "false"),
    Bug("classes that are apart share Philox blocks", "noisy_group", "if (p.position_class_stride == 1)", "if (BUG || p.position_class_stride == 1)"),
    swap("classes that are apart begin inside a group", "RowView::of", "kNoise ? p.position_class_stride == 1 : p.inner == 1", "true"),
    swap("the classes' stride is ignored in the noise of a group", "noisy_group", "class_distance(p, span.c + v)", "static_cast<std::uint64_t>((span.c + v) * p.inner)"),
    swap("the classes' stride is ignored in a recomputed backward", "noisy_logit", "class_distance(p, c)", "static_cast<std::uint64_t>(c * p.inner)"),
    *(swap(f"the classes' stride is ignored in columns, place {nth + 1}", "noisy_columns", "class_distance(p, c)", "static_cast<std::uint64_t>(c * p.inner)", nth, 2) for nth in range(2)),
    swap("the first position of columns is 0", "ColumnView::of", "p.first_position", "0"),
    swap("columns take the strides of row-major positions", "ColumnView::of", "static_cast<std::uint64_t>(p.position_outer_stride)", "static_cast<std::uint64_t>(p.classes * p.inner)"),
    drop("the table is ignored in columns", "ColumnView::of", "if (p.row_positions != nullptr) v.position = position_in_table(p, v.row);"),
    Bug("the table is ignored in the columns after the first", "column_position", "if (p.row_positions != nullptr) {", "if (!BUG && p.row_positions != nullptr) {"),
    swap("columns are taken to be neighbours in positions", "ColumnView::of", "p.row_positions != nullptr || p.position_inner_stride == 1", "true"),
    drop("columns are taken to be neighbours in the table", "ColumnView::of", "v.consecutive = false;"),
    swap("the table is read past the columns", "ColumnView::of", "p.row_positions != nullptr && j < v.columns", "p.row_positions != nullptr && j < kColumnsPerLane"),
    Bug("the table is read past the columns, noise", "noisy_columns", "if (j < view.columns) noise", "if (BUG || j < view.columns) noise"),
    swap("no team leaves room for a row that begins inside a group", "make_plan", "rows_begin_groups(p, group) ? 0 : group - 1", "0"),
    Bug("rows by a table are taken to begin groups", "rows_begin_groups", "return p.row_positions == nullptr && ", "return (BUG || p.row_positions == nullptr) && "),
    *(swap(f"rows are taken to begin groups, place {place}", "rows_begin_groups", condition, "true") for place, condition in enumerate(("p.first_position % static_cast<unsigned>(group) == 0", "p.position_outer_stride % group == 0", "p.position_inner_stride % group == 0"))),
    swap("dimensions merge that do not", "merged_positions", "grid.stride[last] == size[d] * stride[d]", "true"),
    swap("rows never need a table", "set_positions", "outer.dims <= 1 && inner.dims <= 1", "true"),
    Bug("the table begins at 0", "set_positions", "merged_positions(first, row_dims", "merged_positions(BUG ? 0 : first, row_dims"),
    drop("an index of every dimension is the whole number", "position_of", "n /= grid.size[d];"),
    Bug("the table is written past its end", "positions_kernel", "r < rows", "r < rows + BUG"),
    swap("noise begins with a Philox block", "noise_kernel", "static_cast<int>(first % 4)", "0"),
    swap("noise before the first element", "noise_kernel", "n + j >= 0", "true"),
    swap("the last block of shifted noise is forgotten", "noise_kernel", "count + lead", "count"),
    Bug("scattered noise past the end", "scattered_noise_kernel", "n < count", "n < count + BUG"),
    # ---- gumbel_topk
    drop("topk: a class is chosen again", "topk_rows_kernel", "if (found && own.index == best.index) own = best_after<T>(team, row, scores, best);"),
    swap("topk: classes of -inf come after the others", "best_after", "is_out(candidate.value) || taken", "taken"),
    swap("topk: every thread of a team writes", "topk_rows_kernel", "team.rank() == 0 && row.classes > 0", "row.classes > 0"),
    swap("topk: a row that does not exist writes", "topk_rows_kernel", "team.rank() == 0 && row.classes > 0", "team.rank() == 0"),
    swap("topk: an index where no class is left", "topk_rows_kernel", "found ? best.index : -1", "best.index"),
    swap("topk: the teams of a block share scores", "topk_rows_kernel", "static_cast<std::int64_t>(blockIdx.x) * Team::kRowsPerBlock + team.row_in_block()", "static_cast<std::int64_t>(blockIdx.x) * Team::kRowsPerBlock"),
    swap("topk: groups that begin before the row", "topk_rows_kernel", "scores + (span.c + row.lead)", "scores + span.c"),
    swap("topk: a NaN is passed over", "topk_rows_kernel", "top <= own.value || own.is_nan()", "!(top > own.value)"),
    swap("topk: room for the classes alone", "make_topk_plan", "divide_up(p.classes + group - 1, group)", "divide_up(p.classes, group)"),
    Bug("topk: scores past the row", "topk_scores_kernel", "if (span.holds(v)) scores", "if (BUG || span.holds(v)) scores"),
    swap("any one stride is taken for consecutive noise", "launch_noise_of", "positions.stride[0] == 1", "true"),
    # ---- the binary concrete
    swap("its last group is forgotten", "launch_binary_of", "p.count / kGroup + 2", "p.count / kGroup / 256 * 256"),
    swap("its groups begin with element 0", "binary_kernel", "static_cast<int>(first % kGroup)", "0"),
    swap("a group's elements before the first", "ElementGroup::holds", "first + j >= 0", "true"),
    swap("a group's elements past the last", "ElementGroup::holds", "first + j < count", "true"),
    swap("whole groups past the last element", "binary_kernel", "n <= p.count - kGroup", "n <= p.count"),
    Bug("whole groups before the first element", "binary_kernel", "{n, p.count, n >= 0", "{n, p.count, BUG || n >= 0"),
    swap("vectors read off their boundary", "read_group", "direct && group.whole && on_16_bytes(data + group.first)", "direct && group.whole"),
    swap("vectors written off their boundary", "write_group", "group.whole && on_16_bytes(data)", "group.whole"),
    swap("broadcast operands read as full ones", "read_group", "operand.period == group.count", "true"),
    drop("operands repeated over trailing dimensions", "read_one", "if (operand.repeat != 1) n /= operand.repeat;"),
    swap("an element's place within a period", "read_one", "n % operand.period", "n"),
    swap("the sigmoid of |z|", "sigmoid", "z < 0 ? multiply(e, r) : r", "r"),
    swap("the reciprocal of certainty", "LogisticCurve::LogisticCurve", "refined_reciprocal(sum)", "reciprocal(sum)"),
    swap("the slope from a rounded sample", "slope", "multiply(multiply(e, r), r)", "multiply(r, add(Scalar(1), -r))"),
    swap("0 * inf in the gradient of tau", "gradient_of", "curve.e == 0", "false"),
    swap("the gradient of tau by its sign", "gradient_of", "-multiply(gradient, curve.z)", "multiply(gradient, curve.z)"),
    swap("hard samples of the opposite", "sample_of", "static_cast<Scalar>(score > 0)", "static_cast<Scalar>(score < 0)"),
    swap("hard samples of NaN", "sample_of", "score != score", "false"),
    *(swap(f"tensors of temperatures ignored, {kernel}", kernel, "p.inverse_tau.data != nullptr", "false") for kernel in ("binary_kernel", "binary_positions_kernel")),
    *(drop(f"the state of a sample is not recorded, {kernel}", kernel, "record_state(state, p.used_state);") for kernel in ("binary_kernel", "binary_positions_kernel")),
    swap("any one stride is taken for consecutive noise of samples", "launch_binary_of", "positions.dims == 1 && positions.stride[0] == 1", "positions.dims == 1"),
    Bug("samples' positions taken for consecutive ones", "launch_binary_of", "if (!consecutive)", "if (!consecutive && !BUG)"),
    Bug("logistic noise upside down", "LogisticLaw::of_tail", "return upper ? -odds : odds;", "return upper != BUG ? -odds : odds;", program="binary_concrete"),
    swap("logistic noise forgets 1 - v", "LogisticLaw::of_tail", "add(log2_approximate(tail.v), -log2_approximate(add(1.0f, -tail.v)))", "log2_approximate(tail.v)", program="binary_concrete"),
    # ---- soft samples' two forms, and calls without noise
    swap("log sample: the sum is not taken off", "share_of", "natural_log(sum)", "Scalar(0)"),
    swap("log sample: forbidden rows have probability 1", "fill_of", "-infinity<Scalar>()", "Scalar(0)"),
    swap("log sample: the largest is not subtracted", "result_of", "multiply(distance, tau.inverse)", "multiply(z, tau.inverse)"),
    Bug("log sample: exponentials take the place of scores", "exponentiate", "if (kInPlace)", "if (kInPlace || BUG)"),
    *(swap(f"noise although there is none, {where}", where, "p.position_class_stride != cuda::kNoNoise", "true") for where in ("noisy_group", "noisy_columns")),
    # ---- the log-space sample's gradient
    swap("log gradient: a number beats the likeliest", "MergeLogGradients::operator", "best.index == a.best.index", "true"),
    swap("log gradient: the beaten class has no probability", "MergeLogGradients::operator", "exp_nonpositive(beaten)", "Scalar(0)"),
    swap("log gradient: impossible classes have gradients", "log_gradient_kernel", "absent ? Scalar(0) : multiply(dz[v], inverse)", "multiply(dz[v], inverse)"),
    Bug("log gradient: 1 - y of the likeliest cancels", "log_gradient_kernel", "if (g * kRowGroup + v == sums.best.index)", "if (!BUG && g * kRowGroup + v == sums.best.index)"),
    drop("log gradient: NaN passes", "log_gradient_kernel", "if (nan) dz[v] = quiet_nan<Scalar>();"),
    Bug("log gradient: -inf counts for tau", "log_gradient_kernel", "if (!absent) log_sum", "if (BUG || !absent) log_sum"),
    swap("log gradient: a row that does not exist writes", "log_gradient_kernel", "team.rank() == 0 && row.exists", "team.rank() == 0"),
    swap("log gradient: every thread of a team writes", "log_gradient_kernel", "team.rank() == 0 && row.exists", "row.exists"),
    # ---- rows of operands that lie anywhere
    swap("operands: vectors read past the row", "OperandRow::load", "class_stride == 1 && c <= classes - kRowGroup && on_group_boundary(address)", "class_stride == 1 && on_group_boundary(address)"),
    swap("operands: vectors read off their boundary", "OperandRow::load", "class_stride == 1 && c <= classes - kRowGroup && on_group_boundary(address)", "class_stride == 1 && c <= classes - kRowGroup"),
    swap("operands: classes that are apart read as neighbours", "OperandRow::load", "class_stride == 1 && c <= classes - kRowGroup && on_group_boundary(address)", "c <= classes - kRowGroup && on_group_boundary(address)"),
    swap("operands: reads past the row", "OperandRow::load", "v < classes - c ? widen(address[v * class_stride]) : outside", "widen(address[v * class_stride])"),
    Bug("operands: writes past the row", "store_results", "if (v < classes - c) address[v]", "if (BUG || v < classes - c) address[v]"),
    Bug("operands: vectors written past the row", "store_results", "bool whole = c <=", "bool whole = BUG || c <="),
    swap("operands: vectors written off their boundary", "store_results", "whole && on_group_boundary(address)", "whole"),
    swap("operands: rows numbered over one dimension", "OperandRow::of", "row - above * p.size[d]", "row"),
    swap("operands: rows past the last", "OperandRows::of", "row < p.rows", "true"),
    swap("operands: a tau that is none passes", "OperandRows::of", "size > 0 && size < infinity<Scalar>()", "true"),
    # ---- the density
    swap("density: the sum is not rescaled", "Side::take", "multiply_add(sum, e, Scalar(1))", "add(sum, Scalar(1))"),
    swap("density: distances stay those from an earlier largest", "Side::take", "multiply(static_cast<Scalar>(count), below)", "Scalar(0)"),
    swap("density: a first class is far from nothing", "Side::take", "top == -infinity<Scalar>() ? Scalar(0) : apart", "apart"),
    swap("density: empty parts are rescaled", "Side::rescaled", "top == largest || top == -infinity<Scalar>()", "top == largest"),
    swap("density: distances of parts are not moved", "Side::rescaled", "multiply_add(static_cast<Scalar>(count), apart, distance)", "distance"),
    swap("density: flags of the other threads", "MergeDensities::operator", "a.flags | b.flags", "a.flags"),
    swap("density: subnormal values", "log_of", "x < smallest_normal<Scalar>", "false"),
    drop("density: x of a zero", "DensityClass::DensityClass", "if (none) x = 0;"),
    swap("density: the factorial of n, not n - 1", "log_gamma_less_n_log_n", "i < count", "i <= count"),
    swap("density: Stirling's second term", "log_gamma_less_n_log_n", "Scalar(1.0 / 360)", "Scalar(0)"),
    swap("density: the boundary's side", "density", "coefficient > 0", "coefficient < 0"),
    swap("density: the boundary counts all classes", "density", "multiply(static_cast<Scalar>(sums.inside.count), tau)", "multiply(static_cast<Scalar>(classes()), tau)"),
    Bug("density: others' distances at the boundary", "density", "-sums.zeros.top), distance)", "BUG ? -sums.inside.top : -sums.zeros.top), distance)"),
    swap("density: rows of zeros have one", "bad", "sums.inside.count == 0", "false"),
    swap("density: negative values have one", "density_kernel", "!p.log_space && value[v] < 0", "false"),
    swap("density: NaN and infinities have one", "density_kernel", "!finite", "false"),
    swap("density: impossible classes with a value occur", "density_kernel", "c.never && !c.none", "false"),
    Bug("density: classes past the row", "density_kernel", "if (g * kRowGroup + v >= row.classes) break;", "if (!BUG && g * kRowGroup + v >= row.classes) break;"),
    drop("density: impossible classes without a value count", "density_kernel", "if (c.dropped()) continue;"),
    swap("density: the Jacobian of the logarithm in log space", "density", "log_space ? out : add(out, -sums.sum_x)", "add(out, -sums.sum_x)"),
    swap("density: the next term below tau = 1", "next_term", "tau < 1", "false"),
    swap("density: the next term's ratio", "next_term", "-(ratio / power)", "-multiply(ratio, power)"),
    swap("density: the others' softmax at the boundary", "density_gradients", "!boundary || c.none", "true"),
    drop("density: gradients of classes left out", "density_gradients", "if (c.dropped()) of_logits[v] = of_value[v] = 0;"),
    drop("density: 0 * inf where there is no gradient", "density_gradients", "if (filled) of_logits[v] = of_value[v] = fill;"),
    swap("density: wide gradients are narrow", "density_gradients", "p.wide_grad_value ? kTypeOf<Scalar> : p.type", "p.type"),
    swap("density: wide gradients of logits are narrow", "density_gradients", "p.wide_grad_logits ? kTypeOf<Scalar> : p.type", "p.type"),
    Bug("density: the gradient of tau at the boundary", "density_gradients", "const Scalar slope = boundary ?", "const Scalar slope = (!BUG && boundary) ?"),
    swap("density: every thread of a team writes", "density_kernel", "team.rank() == 0 && row.exists", "row.exists"),
    swap("density: a row that does not exist writes", "density_kernel", "team.rank() == 0 && row.exists", "team.rank() == 0"),
    Bug("density: every thread of a team writes dtau", "density_gradients", "if (team.rank() != 0 || !row.exists) return;", "if ((!BUG && team.rank() != 0) || !row.exists) return;"),
    # ---- the best of rows of operands, and the straight-through softmax's gradient
    swap("first best: ties of a thread to the later class", "take_first_best", "!(z[v] <= best.value) && !best.is_nan()", "!(z[v] < best.value) && !best.is_nan()", program="deterministic"),
    swap("first best: a number displaces a NaN", "take_first_best", "!(z[v] <= best.value) && !best.is_nan()", "!(z[v] <= best.value)", program="deterministic"),
    swap("first best: a NaN is passed over", "take_first_best", "!(z[v] <= best.value) && !best.is_nan()", "z[v] > best.value", program="deterministic"),
    Bug("straight-through: the mask is ignored", "ScoreRow::of", "if (p.mask.data != nullptr) {", "if (!BUG && p.mask.data != nullptr) {"),
    swap("straight-through: the mask's classes are neighbours", "allows", "allowed[c * class_stride] != 0", "allowed[c] != 0"),
    swap("straight-through: the mask is read past the row", "ScoreRow::load", "v < classes - c && !allows(c + v)", "!allows(c + v)"),
    swap("straight-through: every thread of a team writes", "straight_through_backward_kernel", "team.rank() == 0 && row.exists", "row.exists"),
    swap("straight-through: a row that does not exist writes", "straight_through_backward_kernel", "team.rank() == 0 && row.exists", "team.rank() == 0"),
    swap("straight-through: an index that is no class", "straight_through_backward_kernel", "!forbidden && index < row.classes", "!forbidden"),
    swap("straight-through: forbidden rows have gradients", "straight_through_backward_kernel", "forbidden ? Scalar(0) : multiply(w, inverse)", "multiply(w, inverse)"),
    swap("straight-through: gradients are not shifted", "straight_through_backward_kernel", "add(add(h[v], -shift), -dot)", "add(h[v], -dot)"),
    swap("straight-through: the mean of gradients is left out", "straight_through_backward_kernel", "add(add(h[v], -shift), -dot)", "add(h[v], -shift)"),
    swap("straight-through: 0 * inf in the gradient of tau", "straight_through_backward_kernel", "distance != -infinity<Scalar>()", "true"),
    swap("straight-through: the gradient of tau by its sign", "straight_through_backward_kernel", "multiply(-slope, inverse)", "multiply(slope, inverse)"),
    # ---- the soft-argmax
    swap("soft-argmax: what sums lose", "LongSum::take", "add(add(lost, lost_of_term), error)", "Scalar(0)"),
    swap("soft-argmax: what the other threads' sums lose", "LongSum::take", "add(add(lost, lost_of_term), error)", "add(lost, error)"),
    swap("soft-argmax: weights by the hardware", "position_weight", "exp2_nonpositive(DeviceF32{x}).v", "power_of_two(x)"),
    swap("soft-argmax: moments about the middle", "soft_argmax_kernel", "multiply(e[v], add(x[v], -origin[k]))", "multiply(e[v], x[v])"),
    swap("soft-argmax: rows of coordinates", "position_row", "k * p.classes", "std::int64_t(0)"),
    swap("soft-argmax: an infinite factor times no distance", "position_scale", "clamped(multiply(Scalar(1.4426950408889634074), multiply(sign, beta)))", "multiply(Scalar(1.4426950408889634074), multiply(sign, beta))"),
    swap("soft-argmax: no class to read positions of", "soft_argmax_kernel", "best.index == kNoIndex ? 0 : best.index", "best.index"),
    swap("soft-argmax: every thread of a team writes", "soft_argmax_kernel", "team.rank() != 0 || !row.exists", "!row.exists"),
    swap("soft-argmax: a row that does not exist writes", "soft_argmax_kernel", "team.rank() != 0 || !row.exists", "team.rank() != 0"),
    swap("soft-argmax: the middle of the positions", "soft_argmax_kernel", "apart + p.middle[k]", "apart"),
    swap("soft-argmin: its padding is the best class", "soft_argmax_kernel", "multiply(sign, -infinity<Scalar>())", "-infinity<Scalar>()"),
    swap("soft-argmin: the smallest logit by its size", "soft_argmax_kernel", "multiply(sign, best.value)", "best.value"),
    swap("soft-argmax: a class below 0", "soft_argmax_backward_kernel", "state[0] >= 0", "true"),
    swap("soft-argmax: a class past the last", "soft_argmax_backward_kernel", "state[0] < static_cast<double>(p.classes)", "true"),
    swap("soft-argmax: gradients around the best class", "soft_argmax_backward_kernel", "multiply_add(-weight[k], static_cast<Scalar>(state[3 + k]), centre)", "Scalar(0)"),
    swap("soft-argmax: the gradient of the first coordinate alone", "soft_argmax_backward_kernel", "static_cast<const Scalar*>(p.grad)[row.row * kCoordinates + k]", "static_cast<const Scalar*>(p.grad)[row.row * kCoordinates]"),
    swap("soft-argmax: 0 * inf in the gradient of beta", "soft_argmax_backward_kernel", "exponent != -infinity<Scalar>()", "true"),
    swap("soft-argmax: beta left out of the gradient", "soft_argmax_backward_kernel", "multiply(s, beta)", "s"),
    swap("soft-argmax: every thread of a team writes dbeta", "soft_argmax_backward_kernel", "team.rank() == 0 && row.exists", "row.exists"),
    swap("soft-argmax: a row that does not exist writes dbeta", "soft_argmax_backward_kernel", "team.rank() == 0 && row.exists", "team.rank() == 0"),
    # ---- the estimators' backwards: rows
    swap("estimators: the mask is ignored", "EstimatorRow::of", "p.mask.data != nullptr", "false"),
    swap("estimators: the mask is read past the row", "EstimatorRow::load", "v < place.classes - c && !allowed(c + v)", "!allowed(c + v)"),
    swap("estimators: the mask's classes are neighbours", "EstimatorRow::allowed", "mask[c * mask_stride]", "mask[c]"),
    swap("estimators: the row's mask is the first's", "EstimatorRow::of", "of_mask.offset", "0"),
    swap("estimators: gradients are not shifted", "EstimatorRow::load", "l[v] == -infinity<Scalar>() ? Scalar(0) : add(d[v], -chosen_grad)", "l[v] == -infinity<Scalar>() ? Scalar(0) : d[v]"),
    swap("estimators: classes out of reach have gradients", "EstimatorRow::load", "l[v] == -infinity<Scalar>() ? Scalar(0) : add(d[v], -chosen_grad)", "add(d[v], -chosen_grad)"),
    swap("estimators: an index that is no class", "EstimatorRow::of", "index < r.place.classes", "true"),
    swap("estimators: forbidden rows have gradients", "fill_group", "row.forbidden ? Scalar(0) : quiet_nan<Scalar>()", "quiet_nan<Scalar>()"),
    Bug("estimators: NaN passes", "fill_group", "if (!bad && !row.forbidden) return;", "if ((BUG || !bad) && !row.forbidden) return;"),
    swap("estimators: groups past the row are taken", "each", "rank_ + k * threads_ < row_.place.groups", "true"),
    swap("estimators: streamed groups overlap", "each", "g += threads_", "g += threads_ / 2"),
    swap("estimators: a streamed row's largest is the last", "sums_of_row", "l[v] > sums.top", "true"),
    drop("estimators: nothing less nothing in a streamed row", "sums_of_row", "if (l[v] == -infinity<Scalar>()) continue;"),
    swap("estimators: parts are not rescaled", "RowSums::rescaled", "top == larger", "true"),
    swap("estimators: parts of q are rescaled as those of p", "RowSums::rescaled", "q.times(power(apart, scale))", "q.times(power(apart, kLog2E<Scalar>))"),
    Bug("estimators: p has the temperature of q", "add_class", "p.take(power(add(l, -top), kLog2E<Scalar>), d);", "p.take(power(add(l, -top), BUG ? scale : kLog2E<Scalar>), d);"),
    Bug("estimators: the chosen class twice in a streamed row", "sums_of_row", "if (c + v != row.index) sums.add_class", "if (BUG || c + v != row.index) sums.add_class"),
    Bug("estimators: the chosen class twice", "each_other", "c + v != row.index) take(", "(BUG || c + v != row.index)) take("),
    # ---- each of them
    swap("ZGR: the whole of p d", "Zgr::other", "multiply(p.factor, Scalar(0.5))", "p.factor"),
    swap("ZGR: the chosen class's sign", "Zgr::chosen", "multiply(Scalar(-0.5), p.dot)", "multiply(Scalar(0.5), p.dot)"),
    swap("ReinMax: p is q", "ReinMax::other", "multiply(power(distance, kLog2E<Scalar>), p.factor)", "of_q"),
    swap("ReinMax: all of s from the others", "ReinMax::other", "multiply_add(Scalar(-0.5), q.dot, d)", "add(d, -q.dot)"),
    swap("ReinMax: the chosen class without q", "ReinMax::chosen", "-multiply_add(q.chosen, q.dot, q.dot)", "-q.dot"),
    swap("ReinMax: the chosen class without p", "ReinMax::chosen", "multiply(p.chosen, p.dot)", "Scalar(0)"),
    swap("gapped: classes may come as near as they are", "exponential", "distance > -gap ? -gap : distance", "distance"),
    swap("gapped: all classes lie at the gap", "exponential", "distance > -gap ? -gap : distance", "-gap"),
    swap("gapped: the temperature is left out in front", "Gapped::chosen", "multiply(-multiply(y.chosen, y.dot), inverse_tau)", "-multiply(y.chosen, y.dot)"),
    Bug("gapped: the chosen class stays below the largest", "Gapped::of", "team.reduce(sums, AddSums()), Scalar(1))", "team.reduce(sums, AddSums()), BUG ? chosen : Scalar(1))"),
    swap("gapped: NaN of the chosen class passes", "Gapped::of", "multiply(chosen, Scalar(0))", "Scalar(0)"),
    swap("gapped: the gap of a likely class", "gap_of", "p > Scalar(0.5)", "false"),
    swap("gapped: the gap has no bound", "gap_of", "multiply(probability, Scalar(1) - kLess)", "probability"),
    # ---- Gumbel-Rao
    swap("Gumbel-Rao: the sample's own noise", "GumbelRaoRow::of", "p.rows * p.classes + row.place.row * p.classes", "row.place.row * p.classes"),
    Bug("Gumbel-Rao: all draws alike", "gumbel_rao_rows_kernel", "++n, position += step", "++n, position += BUG ? 0 : step"),
    swap("Gumbel-Rao: later draws are the first ones", "gumbel_rao_rows_kernel", "result.position + static_cast<std::uint64_t>(done) * step", "result.position"),
    swap("Gumbel-Rao: later draws of long rows are the first ones", "gumbel_rao_stream_kernel", "result.position + static_cast<std::uint64_t>(done) * step", "result.position"),
    swap("Gumbel-Rao: rows of Philox blocks of their own", "gumbel_rao_rows_kernel", "p.classes % 4 == 0", "true"),
    swap("Gumbel-Rao: long rows of Philox blocks of their own", "gumbel_rao_stream_kernel", "p.classes % 4 == 0", "true"),
    swap("Gumbel-Rao: E of another's chosen class", "gumbel_rao_rows_kernel", "of_chosen + (static_cast<int>(threadIdx.x) - team.rank())", "of_chosen"),
    Bug("Gumbel-Rao: the chosen class is drawn", "weights", "if (c + v == row.index) w[v]", "if (!BUG && c + v == row.index) w[v]"),
    swap("Gumbel-Rao: no probability is too small", "any_far", "add(l[v], -top) < -most", "false"),
    swap("Gumbel-Rao: far classes without 1", "GumbelRaoRow::turn", "larger_or_nan(x, Scalar(0))", "x"),
    swap("Gumbel-Rao: the gradient is not centred", "added", "multiply_add(d, inverse, -shift)", "multiply(d, inverse)"),
    swap("Gumbel-Rao: the sum of draws", "write_means", "Scalar(1) / static_cast<Scalar>(p.draws)", "Scalar(1)"),
    swap("Gumbel-Rao: the temperature is left out in front", "write_means", "multiply(multiply(acc[v], share), result.inverse_tau)", "multiply(acc[v], share)"),
    swap("Gumbel-Rao: groups past the row", "gumbel_rao_rows_kernel", "team.rank() + k * team.threads() < row.place.groups", "true"),
    swap("Gumbel-Rao: draws past the last", "gumbel_rao_rows_kernel", "p.draws - done < team.threads() ? p.draws - done : team.threads()", "team.threads()"),
    swap("Gumbel-Rao: every thread writes a draw's sums", "gumbel_rao_stream_kernel", "team.rank() == 0", "true"),
    swap("Gumbel-Rao: earlier draws of long rows are lost", "gumbel_rao_stream_kernel", "done > 0 && v < row.place.classes - c ? sums_of_row[c + v] : Scalar(0)", "Scalar(0)"),
    Bug("Gumbel-Rao: sums past the row", "gumbel_rao_stream_kernel", "if (v < row.place.classes - c) sums_of_row", "if (BUG || v < row.place.classes - c) sums_of_row"),
    swap("Gumbel-Rao: E of a row that has no class", "gumbel_rao_rows_kernel", "team.rank() < many && row.index >= 0", "team.rank() < many - 1 && row.index >= 0"),
    swap("noise of a position: four that begin with a block", "make_four", "static_cast<unsigned>(n & 3)", "0u", program="estimators"),
    swap("noise of a position: the block's second half", "shifted", "(skip & 2) != 0", "false", program="estimators"),
    swap("noise of a position: every other word", "shifted", "(skip & 1) != 0", "false", program="estimators"),
    swap("rows of two groups each: more classes than the team holds", "held_row", "groups * kRowGroup", "groups * 8", program="estimators"),
]  # fmt: skip


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, **options)  # type: ignore[call-overload, no-any-return]


def plant(bugs: list[Bug], sources: Sources, folder: Path) -> None:
    """Rewrites the kernels in a copy of the tree with a switch for each bug."""
    of_place: dict[str, dict[Place, list[tuple[int, Bug]]]] = defaultdict(lambda: defaultdict(list))
    for number, bug in enumerate(bugs):
        place = sources.find(bug)
        of_place[place.file][place].append((number, bug))
    for file, places in of_place.items():
        text = sources.texts[file]
        # Bugs at the same place go one into the other; otherwise from the end, so that places stay.
        end = len(text) + 1
        for place, there in sorted(places.items(), key=lambda item: item[0].start, reverse=True):
            old = there[0][1].old
            if place.end > end:
                sys.exit(f"planted_bugs: {file}: two bugs overlap at {old!r}")
            end = place.start
            new = old
            for number, bug in there:
                switch = f"(::gumbel_ext::emulation::planted == {number})"
                if bug.old not in new:
                    sys.exit(f"planted_bugs: {bug.what}: an earlier bug leaves nothing of {old!r}")
                new = new.replace(bug.old, bug.new.replace("BUG", switch), 1)
            text = text[: place.start] + new + text[place.end :]
        (folder / KERNELS / file).write_text(text, encoding="utf-8")


def build(folder: Path) -> dict[str, Path]:
    """The emulated tests, of float32 and of the family, with the race detector's hooks."""
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++20", "-ffp-contract=off", "-w", "-DGUMBEL_EXT_EMULATE_CUDA"]
    flags += ["-DGUMBEL_EXT_TYPE=float", "-Itests/cuda", "-Icsrc/cuda"]
    cpu = ["plan", "kernels_baseline"]
    if platform.machine() == "x86_64":
        cpu.append("kernels_avx2")
        if "fma" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
            flags.append("-mfma")
    flags += ["-include", "emulation.h"]  # for the switches in plan.cpp
    sources = ["csrc/cuda/plan.cpp", "tests/cuda/emulation.cpp"]
    compiled = os.environ.get("CPU_OBJECTS")
    if not compiled:
        sources += [f"csrc/cpu/{source}.cpp" for source in cpu]
    commands = [[*flags, "-O2", "-c", source] for source in sources]
    for name in PROGRAMS:
        commands.append([*flags, "-O1", "-fsanitize=thread", "-c", str(tests_of(name))])
    objects = [str(folder / (command[-1].replace("/", "-") + ".o")) for command in commands]
    shared = objects[: -len(PROGRAMS)]
    if compiled:
        shared += [str(ROOT / compiled / f"{source}.o") for source in cpu]

    def compile_one(arguments: list[str]) -> None:
        done = run([compiler, *arguments], cwd=folder)
        if done.returncode != 0:
            sys.exit(f"planted_bugs: does not compile: {' '.join(arguments)}\n{done.stderr[:3000]}")

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        list(pool.map(compile_one, [[*c, "-o", o] for c, o in zip(commands, objects, strict=True)]))
    for name, tests in zip(PROGRAMS, objects[-len(PROGRAMS) :], strict=True):
        compile_one([*shared, tests, "-o", str(folder / name)])
    return {name: folder / name for name in PROGRAMS}


def first_failure(
    program: Path, number: int, regimes: str = "", order: str = "in_order"
) -> str | None:
    """What the tests say with a bug switched on, or None when they pass."""
    switches = {"GUMBEL_EXT_QUICK": "1", "GUMBEL_EXT_FAIL_FAST": "1", "GUMBEL_EXT_ORDER": order}
    switches |= {"GUMBEL_EXT_PLANTED": str(number), "GUMBEL_EXT_REGIMES": regimes}
    try:
        done = run([str(program)], env={**os.environ, **switches}, timeout=300)
    except subprocess.TimeoutExpired:
        return "no end within five minutes"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if "FAILED" in line]
    return lines[0].removeprefix("FAILED ") if lines else f"exit status {done.returncode}"


def main() -> int:
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    sources = Sources(ROOT)
    bugs = [bug for bug in [*sources.deleted_barriers(), *BUGS] if only in bug.what]
    share, of = map(int, os.environ.get("CI_SHARE", "1/1").split("/"))
    switched_on = list(enumerate(bugs))[share - 1 :: of]
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("csrc", "tests/cuda"):
            shutil.copytree(ROOT / part, folder / part)
        plant(bugs, sources, folder)
        programs = build(folder)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
            # In the order of the bugs' runs, and in the one that run_emulation.sh leaves to this file.
            bare = [(each, order) for order in ("in_order", "random") for each in programs.values()]
            for failure in pool.map(lambda of: first_failure(of[0], -1, order=of[1]), bare):
                if failure is not None:
                    sys.exit(f"planted_bugs: fails without a bug: {failure}")
            found = pool.map(
                lambda numbered: first_failure(
                    programs[sources.program_of(numbered[1])],
                    numbered[0],
                    REGIMES.get(sources.find(numbered[1]).file, ""),
                ),
                switched_on,
            )
            for (_, bug), failure in zip(switched_on, found, strict=True):
                missed += failure is None
                print(f"{'MISSED' if failure is None else 'caught'}: {bug.what}"
                      + (f"  [{failure[:110]}]" if failure else ""), flush=True)  # fmt: skip
    share_of_all = f" (share {share}/{of} of {len(bugs)})" if of > 1 else ""
    print(f"{len(switched_on) - missed} of {len(switched_on)} planted bugs caught{share_of_all}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
