"""Plants bugs in the CUDA kernels, one at a time, and expects the emulated tests to catch each.

    python tests/cuda/planted_bugs.py [only bugs whose description contains this]

With CI_SHARE=2/6 it runs every sixth of them, from the second on; all are planted, so that one
whose place has changed is always seen. With CPU_OBJECTS=FOLDER the CPU kernels, which the others
are compared with, are those compiled there.

Every barrier of the kernels is deleted in turn, found by its name, so that a new one is covered
without being listed; masks, bounds checks, tie-breaks and the like are listed below. All bugs are
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
KERNELS = ROOT / "csrc" / "cuda"

BARRIER = re.compile(r"\b(?:__syncthreads|cluster_barrier)\(\);")
BARRIER_FILES = (
    "team.cuh",
    "row_view.cuh",
    "row_kernels.cuh",
    "stream_kernels.cuh",
    "column_kernels.cuh",
    "topk_kernels.cuh",
    "gumbel_rao_kernels.cuh",
)


@dataclass(frozen=True)
class Bug:
    """`old`, the nth of its occurrences in a file, becomes `new`, in which BUG is the switch."""

    what: str
    file: str
    old: str
    new: str
    nth: int = 0
    of: int = 1

    def place(self, text: str) -> int:
        places = [match.start() for match in re.finditer(re.escape(self.old), text)]
        if len(places) != self.of:
            sys.exit(
                f"planted_bugs: {self.what}: {self.file} has {len(places)} x {self.old!r}, "
                f"expected {self.of}"
            )
        return places[self.nth]


def swap(what: str, file: str, old: str, new: str, nth: int = 0, of: int = 1) -> Bug:
    """An expression for another."""
    return Bug(what, file, old, f"(BUG ? ({new}) : ({old}))", nth, of)


def drop(what: str, file: str, statement: str, nth: int = 0, of: int = 1) -> Bug:
    """A statement deleted."""
    return Bug(what, file, statement, f"if (!BUG) {{ {statement} }}", nth, of)


def loop(what: str, file: str, old: str, counter: str, count: str, of: int = 1) -> Bug:
    """A loop that runs down to 0 runs up instead."""
    new = (
        f"for (int {counter} = BUG ? 0 : {count} - 1; BUG ? {counter} < {count} : {counter} >= 0; "
        f"{counter} += BUG ? 1 : -1)"
    )
    return Bug(what, file, old, new, 0, of)


def deleted_barriers() -> list[Bug]:
    bugs = []
    for file in BARRIER_FILES:
        text = (KERNELS / file).read_text(encoding="utf-8")
        calls = [match.group(0) for match in BARRIER.finditer(text)]
        for position, call in enumerate(calls):
            nth = calls[:position].count(call)
            bugs.append(
                drop(
                    f"{file}: {call[:-1]} number {nth + 1} deleted",
                    file,
                    call,
                    nth,
                    calls.count(call),
                )
            )
    return bugs


P, G, L, K, T, V, R, S, C, N, Q = (
    "plan.cpp",
    "positions.cuh",
    "launch_positions.cu",
    "launch.cuh",
    "team.cuh",
    "row_view.cuh",
    "row_kernels.cuh",
    "stream_kernels.cuh",
    "column_kernels.cuh",
    "noise.cuh",
    "topk_kernels.cuh",
)
B, M = "binary_kernels.cuh", "launch_binary.cu"
A, X, D = "row_operands.cuh", "log_sample_kernels.cuh", "density_kernels.cuh"
W = "launch_concrete.cu"
Z, E = "straight_through_kernels.cuh", "soft_argmax_kernels.cuh"
F, Y, H = "estimator_kernels.cuh", "gumbel_rao_kernels.cuh", "launch_estimators.cu"

BUGS = [
    # ---- agreement among threads
    Bug("lane 31 left out of a shuffle's mask", T, "__shfl_xor_sync(kWholeWarp, ", "__shfl_xor_sync(BUG ? 0x7FFFFFFFu : kWholeWarp, "),
    *(swap(f"teams reduce over their neighbours, place {nth + 1}", T, "distance < lanes", "distance <= lanes", nth, 3) for nth in range(3)),
    swap("negative numbers in the order of their bits", T, "b ^ ((b >> 31) & 0x7FFFFFFF)", "b"),
    swap("a slow row diverges from the rest of its warp", T, "__any_sync(kWholeWarp, flag)", "flag"),
    Bug("lane 31 left out of a vote's mask", T, "__any_sync(kWholeWarp, flag)", "__any_sync(BUG ? 0x7FFFFFFFu : kWholeWarp, flag)"),
    swap("every lane writes its warp's part", T, "threadIdx.x % 32 == 0", "true"),
    swap("the last warp's part is forgotten", T, "w < kWarps", "w < kWarps - 1"),
    swap("every thread writes its block's part", T, "threadIdx.x == 0", "true"),
    Bug("a block of the cluster is forgotten", T, "unsigned b = 1; b < cluster_blocks()", "unsigned b = BUG ? 2 : 1; b < cluster_blocks()"),
    swap("empty parts are rescaled", T, "part.best.value == largest", "false"),
    # ---- ties and NaN
    swap("ties between threads to the higher index", T, "b.index < a.index", "b.index > a.index"),
    Bug("ties between held threads to the higher index", R, "index = team.reduce(index, Smaller());", "index = BUG ? -team.reduce(-index, Smaller()) : team.reduce(index, Smaller());"),
    loop("ties between held groups to the higher index", R, "for (int k = kGroups - 1; k >= 0; --k)", "k", "kGroups"),
    loop("ties in a held group to the higher index", R, "for (int v = kGroup - 1; v >= 0; --v)", "v", "kGroup"),
    loop("ties in a streamed group to the higher index", V, "for (int v = count - 1; v >= 0; --v)", "v", "count"),
    swap("ties between streamed groups to the later", V, "top <= best.value", "top < best.value"),
    swap("ties between columns' classes to the later, index only", C, "z[j] <= best[j].value", "z[j] < best[j].value"),
    swap("ties between columns' classes to the later, soft", C, "z[j] <= best.value", "z[j] < best.value"),
    Bug("a number displaces a NaN in a streamed row", V, "|| best.is_nan()) return", "|| (!BUG && best.is_nan())) return"),
    Bug("a number displaces a NaN in a column", C, "&& !best[j].is_nan()) best", "&& (BUG || !best[j].is_nan())) best"),
    drop("a number displaces a NaN in a soft column", C, "if (best.is_nan()) continue;"),
    swap("a number beats another thread's NaN", T, "b.is_nan() || b.value > a.value", "b.value > a.value"),
    Bug("the last NaN of a thread instead of the first", V, "first_nan = c;\n      break;", "first_nan = c;\n      if (!BUG) break;"),
    Bug("the last allowed class instead of the first", V, "if (first_allowed == kNoIndex) first_allowed = c;", "if (BUG || first_allowed == kNoIndex) first_allowed = c;"),
    Bug("the last allowed class of a column", C, "if (first_allowed == kNoIndex) first_allowed = c;", "if (BUG || first_allowed == kNoIndex) first_allowed = c;"),
    swap("an index although nothing is above -inf", R, "top > -infinity<Scalar>() ? index : kNoIndex", "index"),
    swap("+inf in a column is an ordinary winner", C, "best.value == infinity<Scalar>()", "false"),
    drop("exponentials of -inf less -inf in a streamed row", S, "if (total.best.value == -infinity<Scalar>()) return;"),
    Bug("forbidden rows have gradients", R, "if (forbidden) {", "if (!BUG && forbidden) {"),
    Bug("forbidden streamed rows have gradients", S, "if (forbidden) {", "if (!BUG && forbidden) {"),
    swap("a tau that is none passes", V, "tau > 0 && tau < infinity<Scalar>()", "true"),
    # ---- the mask
    Bug("the mask is ignored", V, "if (p.mask != nullptr) {", "if (!BUG && p.mask != nullptr) {"),
    Bug("the columns' mask is ignored", C, "if (p.mask != nullptr) {", "if (!BUG && p.mask != nullptr) {"),
    drop("the mask decides nothing about forbidden rows", V, "if (!is_allowed(p, row, c)) continue;"),
    drop("the mask decides nothing about forbidden columns", C, "if (!view.allowed(p, column, c)) continue;"),
    Bug("the mask is read past the row", V, "if (span.holds(v) && !is_allowed(", "if ((BUG || span.holds(v)) && !is_allowed("),
    Bug("the mask is read past the columns", C, "if (j < view.columns && !view.allowed(", "if ((BUG || j < view.columns) && !view.allowed("),
    # ---- bounds
    Bug("loads past the row", V, "span.holds(v) ? address[v]", "(BUG || span.holds(v)) ? address[v]"),
    Bug("stores past the row", V, "if (span.holds(v)) address[v]", "if (BUG || span.holds(v)) address[v]"),
    swap("vectors before the row", V, "s.c >= 0", "true"),
    swap("vectors past the row", V, "s.c <= row.classes - kGroup", "true"),
    Bug("vectors that are not aligned", V, "s.vector = row.vector && ", "s.vector = (BUG || row.vector) && "),
    *(swap(f"alignment of {operand} is not looked at", V, f"aligned<T>(p.{operand}, first)", "true") for operand in ("logits", "y", "grad", "grad_logits")),
    swap("rows past the last", V, "row < p.outer * p.inner", "true"),
    *(swap(f"a row that does not exist writes, place {nth + 1}", R, "team.rank() == 0 && row.classes > 0", "team.rank() == 0", nth, 3) for nth in range(3)),
    *(swap(f"every thread of a team writes, place {nth + 1}", R, "team.rank() == 0 && row.classes > 0", "row.classes > 0", nth, 3) for nth in range(3)),
    Bug("groups of the next chunk", V, "if (group >= last) break;", "if (!BUG && group >= last) break;"),
    *(Bug(f"groups of the next chunk, backward, place {nth + 1}", S, "if (group >= chunk.last_group) break;", "if (!BUG && group >= chunk.last_group) break;", nth, 2) for nth in range(2)),
    *(Bug(f"every thread writes a split row's part, place {nth + 1}", S, "if (team.rank() == 0) partials_of_row", "if (BUG || team.rank() == 0) partials_of_row", nth, 3) for nth in range(3)),
    Bug("every thread writes the split winner's one", S, "if (team.rank() == 0) narrow(", "if (BUG || team.rank() == 0) narrow("),
    Bug("every chunk writes the index", S, "blockIdx.y == 0) p.index", "(BUG || blockIdx.y == 0)) p.index"),
    Bug("every chunk writes dtau", S, "blockIdx.y == 0) {", "(BUG || blockIdx.y == 0)) {"),
    swap("a chunk of a split row is forgotten", S, "k < p.chunks", "k < p.chunks - 1"),
    swap("every block records the state", N, "blockIdx.x != 0", "false"),
    swap("every chunk records the state", N, "blockIdx.y != 0", "false"),
    swap("every thread records the state", N, "threadIdx.x != 0", "false"),
    swap("noise past the end", N, "n + j < count", "true"),
    Bug("loads past the columns", C, "out[j] = j < view.columns ?", "out[j] = (BUG || j < view.columns) ?"),
    Bug("stores past the columns", C, "if (j < view.columns) narrow(", "if (BUG || j < view.columns) narrow("),
    *(swap(f"tau of columns past the last, place {nth + 1}", C, "(j < view.columns ? j : 0)", "j", nth, 2) for nth in range(2)),
    Bug("special columns past the last", C, "special[j] = j < view.columns && ", "special[j] = (BUG || j < view.columns) && "),
    swap("indices of columns past the last", C, "warp == 0 && j < view.columns", "warp == 0", 0, 2),
    swap("every warp writes the columns' index, soft", C, "warp == 0 && j < view.columns", "j < view.columns", 0, 2),
    Bug("every warp writes the columns' index", C, "warp == 0) p.index", "(BUG || warp == 0)) p.index"),
    Bug("winners of columns past the last", C, "if (j >= view.columns) continue;", "if (!BUG && j >= view.columns) continue;"),
    Bug("index of columns past the last, backward", C, "index = j < view.columns ? p.index", "index = (BUG || j < view.columns) ? p.index"),
    swap("dtau of columns past the last", C, "warp == 0 && j < view.columns", "warp == 0", 1, 2),
    swap("every warp writes the columns' dtau", C, "warp == 0 && j < view.columns", "j < view.columns", 1, 2),
    swap("every warp writes the columns' one", C, "index % kWarps == warp", "true"),
    swap("vectors across fewer columns than four", C, "v.columns == kColumnsPerLane", "true"),
    swap("vectors across columns that are apart", C, "p.inner_stride == 1", "true"),
    swap("vectors across classes that are not aligned alike", C, "p.class_stride % kColumnsPerLane == 0", "true"),
    *(swap(f"alignment of columns' {operand} is not looked at", C, f"aligned<T>(p.{operand}, v.offset)", "true") for operand in ("logits", "y", "grad", "grad_logits")),
    swap("an index that is no class", V, "index >= row.classes", "false"),
    swap("an index that is no class, recomputed", R, "index < row.classes", "true"),
    swap("an index that is no class, columns", C, "index >= classes", "false"),
    # ---- the noise
    swap("the second word is never asked for", N, "(hi ^ spread_top_bit(DeviceU32{hi}).v) < (1u << 20)", "false"),
    swap("block numbers wrap at 32 bits", N, "high != block_high_", "false"),
    drop("the offset counts words", N, "if (source.offset_in_words) state.offset /= 4;"),
    swap("the offset within a graph is forgotten", N, "source.offset_more", "0"),
    # ---- noise positions
    swap("groups begin where row-major positions have them", V, "static_cast<int>(v.position % kGroup)", "static_cast<int>((v.position - p.first_position) % kGroup)"),
    swap("rows take the strides of row-major positions, outer", V, "static_cast<std::uint64_t>(p.position_outer_stride)", "static_cast<std::uint64_t>(p.classes * p.inner)"),
    swap("rows take the strides of row-major positions, inner", V, "static_cast<std::uint64_t>(p.position_inner_stride)", "std::uint64_t(1)"),
    Bug("the first position of rows is 0", V, "p.first_position + static_cast", "(BUG ? 0 : p.first_position) + static_cast"),
    swap("the table is ignored", V, "kNoise && p.row_positions != nullptr", "false"),
    Bug("classes that are apart share Philox blocks", V, "if (p.position_class_stride == 1)", "if (BUG || p.position_class_stride == 1)"),
    swap("classes that are apart begin inside a group", V, "kNoise ? p.position_class_stride == 1 : p.inner == 1", "true"),
    swap("the classes' stride is ignored in the noise of a group", V, "class_distance(p, span.c + v)", "static_cast<std::uint64_t>((span.c + v) * p.inner)"),
    swap("the classes' stride is ignored in a recomputed backward", V, "class_distance(p, c)", "static_cast<std::uint64_t>(c * p.inner)"),
    *(swap(f"the classes' stride is ignored in columns, place {nth + 1}", C, "class_distance(p, c)", "static_cast<std::uint64_t>(c * p.inner)", nth, 2) for nth in range(2)),
    swap("the first position of columns is 0", C, "p.first_position", "0"),
    swap("columns take the strides of row-major positions", C, "static_cast<std::uint64_t>(p.position_outer_stride)", "static_cast<std::uint64_t>(p.classes * p.inner)"),
    drop("the table is ignored in columns", C, "if (p.row_positions != nullptr) v.position = position_in_table(p, v.row);"),
    Bug("the table is ignored in the columns after the first", C, "if (p.row_positions != nullptr) {", "if (!BUG && p.row_positions != nullptr) {"),
    swap("columns are taken to be neighbours in positions", C, "p.row_positions != nullptr || p.position_inner_stride == 1", "true"),
    drop("columns are taken to be neighbours in the table", C, "v.consecutive = false;"),
    swap("the table is read past the columns", C, "p.row_positions != nullptr && j < v.columns", "p.row_positions != nullptr && j < kColumnsPerLane"),
    Bug("the table is read past the columns, noise", C, "if (j < view.columns) noise", "if (BUG || j < view.columns) noise"),
    swap("no team leaves room for a row that begins inside a group", P, "rows_begin_groups(p, group) ? 0 : group - 1", "0"),
    Bug("rows by a table are taken to begin groups", P, "return p.row_positions == nullptr && ", "return (BUG || p.row_positions == nullptr) && "),
    *(swap(f"rows are taken to begin groups, place {place}", P, condition, "true") for place, condition in enumerate(("p.first_position % static_cast<unsigned>(group) == 0", "p.position_outer_stride % group == 0", "p.position_inner_stride % group == 0"))),
    swap("dimensions merge that do not", P, "grid.stride[last] == size[d] * stride[d]", "true"),
    swap("rows never need a table", P, "outer.dims <= 1 && inner.dims <= 1", "true"),
    Bug("the table begins at 0", P, "merged_positions(first, row_dims", "merged_positions(BUG ? 0 : first, row_dims"),
    drop("an index of every dimension is the whole number", G, "n /= grid.size[d];"),
    Bug("the table is written past its end", L, "r < rows", "r < rows + BUG"),
    swap("noise begins with a Philox block", N, "static_cast<int>(first % 4)", "0"),
    swap("noise before the first element", N, "n + j >= 0", "true"),
    swap("the last block of shifted noise is forgotten", N, "count + lead", "count"),
    Bug("scattered noise past the end", N, "n < count", "n < count + BUG"),
    # ---- gumbel_topk
    drop("topk: a class is chosen again", Q, "if (found && own.index == best.index) own = best_after<T>(team, row, scores, best);"),
    swap("topk: classes of -inf come after the others", Q, "is_out(candidate.value) || taken", "taken"),
    swap("topk: every thread of a team writes", Q, "team.rank() == 0 && row.classes > 0", "row.classes > 0"),
    swap("topk: a row that does not exist writes", Q, "team.rank() == 0 && row.classes > 0", "team.rank() == 0"),
    swap("topk: an index where no class is left", Q, "found ? best.index : -1", "best.index"),
    swap("topk: the teams of a block share scores", Q, "static_cast<std::int64_t>(blockIdx.x) * Team::kRowsPerBlock + team.row_in_block()", "static_cast<std::int64_t>(blockIdx.x) * Team::kRowsPerBlock"),
    swap("topk: groups that begin before the row", Q, "scores + (span.c + row.lead)", "scores + span.c"),
    swap("topk: a NaN is passed over", Q, "top <= own.value || own.is_nan()", "!(top > own.value)"),
    swap("topk: room for the classes alone", P, "divide_up(p.classes + group - 1, group)", "divide_up(p.classes, group)"),
    Bug("topk: scores past the row", Q, "if (span.holds(v)) scores", "if (BUG || span.holds(v)) scores"),
    swap("any one stride is taken for consecutive noise", K, "positions.stride[0] == 1", "true"),
    # ---- the binary concrete
    swap("its last group is forgotten", M, "p.count / kGroup + 2", "p.count / kGroup / 256 * 256"),
    swap("its groups begin with element 0", B, "static_cast<int>(first % kGroup)", "0"),
    swap("a group's elements before the first", B, "first + j >= 0", "true"),
    swap("a group's elements past the last", B, "first + j < count", "true"),
    swap("whole groups past the last element", B, "n <= p.count - kGroup", "n <= p.count"),
    Bug("whole groups before the first element", B, "{n, p.count, n >= 0", "{n, p.count, BUG || n >= 0"),
    swap("vectors read off their boundary", B, "direct && group.whole && on_16_bytes(data + group.first)", "direct && group.whole"),
    swap("vectors written off their boundary", B, "group.whole && on_16_bytes(data)", "group.whole"),
    swap("broadcast operands read as full ones", B, "operand.period == group.count", "true"),
    drop("operands repeated over trailing dimensions", B, "if (operand.repeat != 1) n /= operand.repeat;"),
    swap("an element's place within a period", B, "n % operand.period", "n"),
    swap("the sigmoid of |z|", B, "z < 0 ? multiply(e, r) : r", "r"),
    swap("the reciprocal of certainty", B, "refined_reciprocal(sum)", "reciprocal(sum)"),
    swap("the slope from a rounded sample", B, "multiply(multiply(e, r), r)", "multiply(r, add(Scalar(1), -r))"),
    swap("0 * inf in the gradient of tau", B, "curve.e == 0", "false"),
    swap("the gradient of tau by its sign", B, "-multiply(gradient, curve.z)", "multiply(gradient, curve.z)"),
    swap("hard samples of the opposite", B, "static_cast<Scalar>(score > 0)", "static_cast<Scalar>(score < 0)"),
    swap("hard samples of NaN", B, "score != score", "false"),
    *(swap(f"tensors of temperatures ignored, place {nth + 1}", B, "p.inverse_tau.data != nullptr", "false", nth, 2) for nth in range(2)),
    *(drop(f"the state of a sample is not recorded, place {nth + 1}", B, "record_state(state, p.used_state);", nth, 2) for nth in range(2)),
    swap("any one stride is taken for consecutive noise of samples", M, "positions.dims == 1 && positions.stride[0] == 1", "positions.dims == 1"),
    Bug("samples' positions taken for consecutive ones", M, "if (!consecutive)", "if (!consecutive && !BUG)"),
    Bug("logistic noise upside down", N, "return upper ? -odds : odds;", "return upper != BUG ? -odds : odds;"),
    swap("logistic noise forgets 1 - v", N, "add(log2_approximate(tail.v), -log2_approximate(add(1.0f, -tail.v)))", "log2_approximate(tail.v)"),
    # ---- the log-space sample and its gradient
    swap("log sample: teams of rows that begin amid a group", W, "(from_start ? 0 : kGroup - 1)", "0"),
    swap("log sample: results written where logits are read", X, "r.logits.row * p.rows.classes", "r.logits.offset"),
    swap("log sample: vectors written off their boundary", X, "reinterpret_cast<std::uintptr_t>(first) % 16 == 0", "true"),
    swap("log sample: vectors written past a streamed row", X, "span.c <= span.classes - kGroup", "true"),
    swap("log sample: the largest is not subtracted", X, "multiply(add(z[v], -top), inverse_tau)", "multiply(z[v], inverse_tau)"),
    swap("log sample: forbidden rows are NaN", X, "kind == RowKind::kForbidden", "false"),
    swap("log sample: NaN of a held row passes", X, "sum != sum", "false"),
    swap("log sample: streamed rows without a class", X, "total.best.index == kNoIndex", "false"),
    drop("log sample: exponentials of -inf less -inf", X, "if (total.best.value == -infinity<Scalar>()) return;"),
    swap("log gradient: a number beats the likeliest", X, "best.index == a.best.index", "true"),
    swap("log gradient: the beaten class has no probability", X, "exp_nonpositive(beaten)", "Scalar(0)"),
    swap("log gradient: impossible classes have gradients", X, "absent ? Scalar(0) : multiply(dz[v], inverse)", "multiply(dz[v], inverse)"),
    Bug("log gradient: 1 - y of the likeliest cancels", X, "if (g * kRowGroup + v == sums.best.index)", "if (!BUG && g * kRowGroup + v == sums.best.index)"),
    drop("log gradient: NaN passes", X, "if (nan) dz[v] = quiet_nan<Scalar>();"),
    Bug("log gradient: -inf counts for tau", X, "if (!absent) log_sum", "if (BUG || !absent) log_sum"),
    swap("log gradient: a row that does not exist writes", X, "team.rank() == 0 && row.exists", "team.rank() == 0"),
    swap("log gradient: every thread of a team writes", X, "team.rank() == 0 && row.exists", "row.exists"),
    # ---- rows of operands that lie anywhere
    swap("operands: vectors read past the row", A, "class_stride == 1 && c <= classes - kRowGroup && on_group_boundary(address)", "class_stride == 1 && on_group_boundary(address)"),
    swap("operands: vectors read off their boundary", A, "class_stride == 1 && c <= classes - kRowGroup && on_group_boundary(address)", "class_stride == 1 && c <= classes - kRowGroup"),
    swap("operands: classes that are apart read as neighbours", A, "class_stride == 1 && c <= classes - kRowGroup && on_group_boundary(address)", "c <= classes - kRowGroup && on_group_boundary(address)"),
    swap("operands: reads past the row", A, "v < classes - c ? widen(address[v * class_stride]) : outside", "widen(address[v * class_stride])"),
    Bug("operands: writes past the row", A, "if (v < classes - c) address[v]", "if (BUG || v < classes - c) address[v]"),
    Bug("operands: vectors written past the row", A, "bool whole = c <=", "bool whole = BUG || c <="),
    swap("operands: vectors written off their boundary", A, "whole && on_group_boundary(address)", "whole"),
    swap("operands: rows numbered over one dimension", A, "row - above * p.size[d]", "row"),
    swap("operands: rows past the last", A, "row < p.rows", "true"),
    swap("operands: a tau that is none passes", A, "size > 0 && size < infinity<Scalar>()", "true"),
    # ---- the density
    swap("density: the sum is not rescaled", D, "multiply_add(sum, e, Scalar(1))", "add(sum, Scalar(1))"),
    swap("density: distances stay those from an earlier largest", D, "multiply(static_cast<Scalar>(count), below)", "Scalar(0)"),
    swap("density: a first class is far from nothing", D, "top == -infinity<Scalar>() ? Scalar(0) : apart", "apart"),
    swap("density: empty parts are rescaled", D, "top == largest || top == -infinity<Scalar>()", "top == largest"),
    swap("density: distances of parts are not moved", D, "multiply_add(static_cast<Scalar>(count), apart, distance)", "distance"),
    swap("density: flags of the other threads", D, "a.flags | b.flags", "a.flags"),
    swap("density: subnormal values", D, "x < smallest_normal<Scalar>", "false"),
    drop("density: x of a zero", D, "if (none) x = 0;"),
    swap("density: the factorial of n, not n - 1", D, "i < count", "i <= count"),
    swap("density: Stirling's second term", D, "Scalar(1.0 / 360)", "Scalar(0)"),
    swap("density: the boundary's side", D, "coefficient > 0", "coefficient < 0", 0, 1),
    swap("density: the boundary counts all classes", D, "multiply(static_cast<Scalar>(sums.inside.count), tau)", "multiply(static_cast<Scalar>(classes()), tau)"),
    Bug("density: others' distances at the boundary", D, "-sums.zeros.top), distance)", "BUG ? -sums.inside.top : -sums.zeros.top), distance)"),
    swap("density: rows of zeros have one", D, "sums.inside.count == 0", "false"),
    swap("density: negative values have one", D, "!p.log_space && value[v] < 0", "false"),
    swap("density: NaN and infinities have one", D, "!finite", "false"),
    swap("density: impossible classes with a value occur", D, "c.never && !c.none", "false"),
    Bug("density: classes past the row", D, "if (g * kRowGroup + v >= row.classes) break;", "if (!BUG && g * kRowGroup + v >= row.classes) break;"),
    drop("density: impossible classes without a value count", D, "if (c.dropped()) continue;"),
    swap("density: the Jacobian of the logarithm in log space", D, "log_space ? out : add(out, -sums.sum_x)", "add(out, -sums.sum_x)"),
    swap("density: the next term below tau = 1", D, "tau < 1", "false"),
    swap("density: the next term's ratio", D, "-(ratio / power)", "-multiply(ratio, power)"),
    swap("density: the others' softmax at the boundary", D, "!boundary || c.none", "true"),
    drop("density: gradients of classes left out", D, "if (c.dropped()) of_logits[v] = of_value[v] = 0;"),
    drop("density: 0 * inf where there is no gradient", D, "if (filled) of_logits[v] = of_value[v] = fill;"),
    swap("density: wide gradients are narrow", D, "p.wide_grad_value ? kTypeOf<Scalar> : p.type", "p.type"),
    swap("density: wide gradients of logits are narrow", D, "p.wide_grad_logits ? kTypeOf<Scalar> : p.type", "p.type"),
    Bug("density: the gradient of tau at the boundary", D, "const Scalar slope = boundary ?", "const Scalar slope = (!BUG && boundary) ?"),
    swap("density: every thread of a team writes", D, "team.rank() == 0 && row.exists", "row.exists"),
    swap("density: a row that does not exist writes", D, "team.rank() == 0 && row.exists", "team.rank() == 0"),
    Bug("density: every thread of a team writes dtau", D, "if (team.rank() != 0 || !row.exists) return;", "if ((!BUG && team.rank() != 0) || !row.exists) return;"),
    # ---- the straight-through softmax without noise
    swap("first best: ties of a thread to the later class", A, "!(z[v] <= best.value) && !best.is_nan()", "!(z[v] < best.value) && !best.is_nan()"),
    swap("first best: a number displaces a NaN", A, "!(z[v] <= best.value) && !best.is_nan()", "!(z[v] <= best.value)"),
    swap("first best: a NaN is passed over", A, "!(z[v] <= best.value) && !best.is_nan()", "z[v] > best.value"),
    Bug("straight-through: the mask is ignored", Z, "if (p.mask.data != nullptr) {", "if (!BUG && p.mask.data != nullptr) {"),
    swap("straight-through: the mask's classes are neighbours", Z, "allowed[c * class_stride] != 0", "allowed[c] != 0"),
    swap("straight-through: the mask is read past the row", Z, "v < classes - c && !allows(c + v)", "!allows(c + v)"),
    swap("straight-through: rows of -inf have no class", Z, "nothing && index >= 0", "false"),
    swap("straight-through: NaN rows are one-hot", Z, "best.is_nan()", "false"),
    Bug("straight-through: a slow row diverges from the rest of its warp", Z, "if (team.any(nothing)) {", "if (BUG ? nothing : team.any(nothing)) {"),
    swap("straight-through: forbidden rows have a class", Z, "allowed == kNoIndex ? -1 : allowed", "allowed == kNoIndex ? 0 : allowed"),
    swap("straight-through: the last allowed class", Z, "c < row.classes && allowed == kNoIndex", "c < row.classes"),
    swap("straight-through: no one", Z, "own.index == index", "own.index < index"),
    *(swap(f"straight-through: every thread of a team writes, place {nth + 1}", Z, "team.rank() == 0 && row.exists", "row.exists", nth, 2) for nth in range(2)),
    *(swap(f"straight-through: a row that does not exist writes, place {nth + 1}", Z, "team.rank() == 0 && row.exists", "team.rank() == 0", nth, 2) for nth in range(2)),
    swap("straight-through: an index that is no class", Z, "!forbidden && index < row.classes", "!forbidden"),
    swap("straight-through: forbidden rows have gradients", Z, "forbidden ? Scalar(0) : multiply(w, inverse)", "multiply(w, inverse)"),
    swap("straight-through: gradients are not shifted", Z, "add(add(h[v], -shift), -dot)", "add(h[v], -dot)"),
    swap("straight-through: the mean of gradients is left out", Z, "add(add(h[v], -shift), -dot)", "add(h[v], -shift)"),
    swap("straight-through: 0 * inf in the gradient of tau", Z, "distance != -infinity<Scalar>()", "true"),
    swap("straight-through: the gradient of tau by its sign", Z, "multiply(-slope, inverse)", "multiply(slope, inverse)"),
    # ---- the soft-argmax
    swap("soft-argmax: what sums lose", E, "add(add(lost, lost_of_term), error)", "Scalar(0)"),
    swap("soft-argmax: what the other threads' sums lose", E, "add(add(lost, lost_of_term), error)", "add(lost, error)"),
    swap("soft-argmax: weights by the hardware", E, "exp2_nonpositive(DeviceF32{x}).v", "power_of_two(x)"),
    swap("soft-argmax: moments about the middle", E, "multiply(e[v], add(x[v], -origin[k]))", "multiply(e[v], x[v])"),
    swap("soft-argmax: rows of coordinates", E, "k * p.classes", "std::int64_t(0)"),
    swap("soft-argmax: an infinite factor times no distance", E, "clamped(multiply(Scalar(1.4426950408889634074), multiply(sign, beta)))", "multiply(Scalar(1.4426950408889634074), multiply(sign, beta))"),
    swap("soft-argmax: no class to read positions of", E, "best.index == kNoIndex ? 0 : best.index", "best.index"),
    swap("soft-argmax: every thread of a team writes", E, "team.rank() != 0 || !row.exists", "!row.exists"),
    swap("soft-argmax: a row that does not exist writes", E, "team.rank() != 0 || !row.exists", "team.rank() != 0"),
    swap("soft-argmax: the middle of the positions", E, "apart + p.middle[k]", "apart"),
    swap("soft-argmin: its padding is the best class", E, "multiply(sign, -infinity<Scalar>())", "-infinity<Scalar>()", 0, 2),
    swap("soft-argmin: the smallest logit by its size", E, "multiply(sign, best.value)", "best.value"),
    swap("soft-argmax: a class below 0", E, "state[0] >= 0", "true"),
    swap("soft-argmax: a class past the last", E, "state[0] < static_cast<double>(p.classes)", "true"),
    swap("soft-argmax: gradients around the best class", E, "multiply_add(-weight[k], static_cast<Scalar>(state[3 + k]), centre)", "Scalar(0)"),
    swap("soft-argmax: the gradient of the first coordinate alone", E, "static_cast<const Scalar*>(p.grad)[row.row * kCoordinates + k]", "static_cast<const Scalar*>(p.grad)[row.row * kCoordinates]"),
    swap("soft-argmax: 0 * inf in the gradient of beta", E, "exponent != -infinity<Scalar>()", "true"),
    swap("soft-argmax: beta left out of the gradient", E, "multiply(s, beta)", "s"),
    swap("soft-argmax: every thread of a team writes dbeta", E, "team.rank() == 0 && row.exists", "row.exists"),
    swap("soft-argmax: a row that does not exist writes dbeta", E, "team.rank() == 0 && row.exists", "team.rank() == 0"),
    # ---- the estimators' backwards: rows
    swap("estimators: the mask is ignored", F, "p.mask.data != nullptr", "false"),
    swap("estimators: the mask is read past the row", F, "v < place.classes - c && !allowed(c + v)", "!allowed(c + v)"),
    swap("estimators: the mask's classes are neighbours", F, "mask[c * mask_stride]", "mask[c]"),
    swap("estimators: the row's mask is the first's", F, "of_mask.offset", "0"),
    swap("estimators: gradients are not shifted", F, "l[v] == -infinity<Scalar>() ? Scalar(0) : add(d[v], -chosen_grad)", "l[v] == -infinity<Scalar>() ? Scalar(0) : d[v]"),
    swap("estimators: classes out of reach have gradients", F, "l[v] == -infinity<Scalar>() ? Scalar(0) : add(d[v], -chosen_grad)", "add(d[v], -chosen_grad)"),
    swap("estimators: an index that is no class", F, "index < r.place.classes", "true"),
    swap("estimators: forbidden rows have gradients", F, "row.forbidden ? Scalar(0) : quiet_nan<Scalar>()", "quiet_nan<Scalar>()"),
    Bug("estimators: NaN passes", F, "if (!bad && !row.forbidden) return;", "if ((BUG || !bad) && !row.forbidden) return;"),
    swap("estimators: groups past the row are taken", F, "rank_ + k * threads_ < row_.place.groups", "true"),
    swap("estimators: streamed groups overlap", F, "g += threads_", "g += threads_ / 2"),
    swap("estimators: a streamed row's largest is the last", F, "l[v] > sums.top", "true"),
    drop("estimators: nothing less nothing in a streamed row", F, "if (l[v] == -infinity<Scalar>()) continue;"),
    swap("estimators: parts are not rescaled", F, "top == larger", "true"),
    swap("estimators: parts of q are rescaled as those of p", F, "q.times(power(apart, scale))", "q.times(power(apart, kLog2E<Scalar>))"),
    Bug("estimators: p has the temperature of q", F, "p.take(power(add(l, -top), kLog2E<Scalar>), d);", "p.take(power(add(l, -top), BUG ? scale : kLog2E<Scalar>), d);"),
    Bug("estimators: the chosen class twice in a streamed row", F, "if (c + v != row.index) sums.add_class", "if (BUG || c + v != row.index) sums.add_class"),
    Bug("estimators: the chosen class twice", F, "c + v != row.index) take(", "(BUG || c + v != row.index)) take("),
    # ---- each of them
    swap("ZGR: the whole of p d", F, "multiply(p.factor, Scalar(0.5))", "p.factor"),
    swap("ZGR: the chosen class's sign", F, "multiply(Scalar(-0.5), p.dot)", "multiply(Scalar(0.5), p.dot)"),
    swap("ReinMax: p is q", F, "multiply(power(distance, kLog2E<Scalar>), p.factor)", "of_q"),
    swap("ReinMax: all of s from the others", F, "multiply_add(Scalar(-0.5), q.dot, d)", "add(d, -q.dot)"),
    swap("ReinMax: the chosen class without q", F, "-multiply_add(q.chosen, q.dot, q.dot)", "-q.dot"),
    swap("ReinMax: the chosen class without p", F, "multiply(p.chosen, p.dot)", "Scalar(0)"),
    swap("gapped: classes may come as near as they are", F, "distance > -gap ? -gap : distance", "distance"),
    swap("gapped: all classes lie at the gap", F, "distance > -gap ? -gap : distance", "-gap"),
    swap("gapped: the temperature is left out in front", F, "multiply(-multiply(y.chosen, y.dot), inverse_tau)", "-multiply(y.chosen, y.dot)"),
    Bug("gapped: the chosen class stays below the largest", F, "team.reduce(sums, AddSums()), Scalar(1))", "team.reduce(sums, AddSums()), BUG ? chosen : Scalar(1))"),
    swap("gapped: NaN of the chosen class passes", F, "multiply(chosen, Scalar(0))", "Scalar(0)"),
    swap("gapped: the gap of a likely class", F, "p > Scalar(0.5)", "false"),
    swap("gapped: the gap has no bound", F, "multiply(probability, Scalar(1) - kLess)", "probability"),
    # ---- Gumbel-Rao
    swap("Gumbel-Rao: the sample's own noise", Y, "p.rows * p.classes + row.place.row * p.classes", "row.place.row * p.classes"),
    Bug("Gumbel-Rao: all draws alike", Y, "++n, position += step", "++n, position += BUG ? 0 : step"),
    swap("Gumbel-Rao: later draws are the first ones", Y, "result.position + static_cast<std::uint64_t>(done) * step", "result.position", 0, 2),
    swap("Gumbel-Rao: later draws of long rows are the first ones", Y, "result.position + static_cast<std::uint64_t>(done) * step", "result.position", 1, 2),
    swap("Gumbel-Rao: rows of Philox blocks of their own", Y, "p.classes % 4 == 0", "true", 0, 2),
    swap("Gumbel-Rao: long rows of Philox blocks of their own", Y, "p.classes % 4 == 0", "true", 1, 2),
    swap("Gumbel-Rao: E of another's chosen class", Y, "of_chosen + (static_cast<int>(threadIdx.x) - team.rank())", "of_chosen"),
    Bug("Gumbel-Rao: the chosen class is drawn", Y, "if (c + v == row.index) w[v]", "if (!BUG && c + v == row.index) w[v]"),
    swap("Gumbel-Rao: no probability is too small", Y, "add(l[v], -top) < -most", "false"),
    swap("Gumbel-Rao: far classes without 1", Y, "larger_or_nan(x, Scalar(0))", "x"),
    swap("Gumbel-Rao: the gradient is not centred", Y, "multiply_add(d, inverse, -shift)", "multiply(d, inverse)"),
    swap("Gumbel-Rao: the sum of draws", Y, "Scalar(1) / static_cast<Scalar>(p.draws)", "Scalar(1)"),
    swap("Gumbel-Rao: the temperature is left out in front", Y, "multiply(multiply(acc[v], share), result.inverse_tau)", "multiply(acc[v], share)"),
    swap("Gumbel-Rao: groups past the row", Y, "team.rank() + k * team.threads() < row.place.groups", "true"),
    swap("Gumbel-Rao: draws past the last", Y, "p.draws - done < team.threads() ? p.draws - done : team.threads()", "team.threads()"),
    swap("Gumbel-Rao: every thread writes a draw's sums", Y, "team.rank() == 0", "true"),
    swap("Gumbel-Rao: earlier draws of long rows are lost", Y, "done > 0 && v < row.place.classes - c ? sums_of_row[c + v] : Scalar(0)", "Scalar(0)"),
    Bug("Gumbel-Rao: sums past the row", Y, "if (v < row.place.classes - c) sums_of_row", "if (BUG || v < row.place.classes - c) sums_of_row"),
    swap("Gumbel-Rao: E of a row that has no class", Y, "team.rank() < many && row.index >= 0", "team.rank() < many - 1 && row.index >= 0"),
    swap("noise of a position: four that begin with a block", N, "static_cast<unsigned>(n & 3)", "0u", 1, 4),
    swap("noise of a position: the block's second half", N, "(skip & 2) != 0", "false"),
    swap("noise of a position: every other word", N, "(skip & 1) != 0", "false"),
    swap("rows of two groups each: more classes than the team holds", H, "4 * kOfThread", "8 * kOfThread"),
]  # fmt: skip


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, **options)  # type: ignore[call-overload, no-any-return]


def plant(bugs: list[Bug], folder: Path) -> None:
    """Rewrites the kernels in a copy of the tree with a switch for each bug."""
    of_file = defaultdict(list)
    for number, bug in enumerate(bugs):
        of_file[bug.file].append((number, bug))
    for file, numbered in of_file.items():
        path = folder / "csrc" / "cuda" / file
        text = path.read_text(encoding="utf-8")
        # Bugs at the same place go one into the other; otherwise from the end, so that places stay.
        of_place = defaultdict(list)
        for number, bug in numbered:
            of_place[bug.place(text), bug.old].append((number, bug))
        end = len(text) + 1
        for (start, old), there in sorted(of_place.items(), reverse=True):
            if start + len(old) > end:
                sys.exit(f"planted_bugs: {file}: two bugs overlap at {old!r}")
            end = start
            new = old
            for number, bug in there:
                switch = f"(::gumbel_ext::emulation::planted == {number})"
                if old not in new:
                    sys.exit(f"planted_bugs: {bug.what}: an earlier bug leaves nothing of {old!r}")
                new = new.replace(old, bug.new.replace("BUG", switch), 1)
            text = text[:start] + new + text[start + len(old) :]
        path.write_text(text, encoding="utf-8")


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
    programs = ("cuda", "binary", "concrete", "deterministic", "estimator")
    for name in programs:
        source = f"tests/cuda/test_{name}_kernels.cpp"
        commands.append([*flags, "-O1", "-fsanitize=thread", "-c", source])
    objects = [str(folder / (command[-1].replace("/", "-") + ".o")) for command in commands]
    shared = objects[: -len(programs)]
    if compiled:
        shared += [str(ROOT / compiled / f"{source}.o") for source in cpu]

    def compile_one(arguments: list[str]) -> None:
        done = run([compiler, *arguments], cwd=folder)
        if done.returncode != 0:
            sys.exit(f"planted_bugs: does not compile: {' '.join(arguments)}\n{done.stderr[:3000]}")

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        list(pool.map(compile_one, [[*c, "-o", o] for c, o in zip(commands, objects, strict=True)]))
    for name, tests in zip(programs, objects[-len(programs) :], strict=True):
        compile_one([*shared, tests, "-o", str(folder / name)])
    return {name: folder / name for name in programs}


def shows_in(bug: Bug) -> str:
    """The program whose tests a bug shows in."""
    if bug.file in (Z, E) or bug.what.startswith("first best"):
        return "deterministic"
    if bug.file in (F, Y, H) or bug.what.startswith("noise of a position"):
        return "estimator"
    if bug.file in (A, X, D, W):
        return "concrete"
    return "binary" if bug.file in (B, M) or bug.what.startswith("logistic") else "cuda"


# Where a bug in a file shows; the others show everywhere.
REGIMES = {S: "stream,split", C: "columns", Q: "topk"}


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
    bugs = [bug for bug in [*deleted_barriers(), *BUGS] if only in bug.what]
    share, of = map(int, os.environ.get("CI_SHARE", "1/1").split("/"))
    switched_on = list(enumerate(bugs))[share - 1 :: of]
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("csrc", "tests/cuda"):
            shutil.copytree(ROOT / part, folder / part)
        plant(bugs, folder)
        programs = build(folder)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
            # In the order of the bugs' runs, and in the one that run_emulation.sh leaves to this file.
            bare = [(each, order) for order in ("in_order", "random") for each in programs.values()]
            for failure in pool.map(lambda of: first_failure(of[0], -1, order=of[1]), bare):
                if failure is not None:
                    sys.exit(f"planted_bugs: fails without a bug: {failure}")
            found = pool.map(
                lambda numbered: first_failure(
                    programs[shows_in(numbered[1])], numbered[0], REGIMES.get(numbered[1].file, "")
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
