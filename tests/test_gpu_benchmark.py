"""The benchmarks on a GPU, rehearsed without one: what they measure, write and show."""

import json
import math
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"


@contextmanager
def imported_benchmarks():
    """The benchmarks can be imported; what they set for their process is undone."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from benchmarks import compiled, device, race

        patch.setattr(compiled, "_OPTIONS", dict(compiled._OPTIONS))
        for module in (device, race):
            patch.setattr(module, "CALLS_IN_A_GRAPH", 2)
        patch.setattr(device, "CALLS_IN_A_ROW", 2)
        yield patch
    torch.set_num_threads(threads)


@pytest.fixture
def benchmarks():
    with imported_benchmarks():
        yield


# --- the regimes ---


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory):
    """plan.cpp as a program."""
    program = tmp_path_factory.mktemp("plan") / "plan_of"
    sources = [str(ROOT / "tests" / "cuda" / "plan_of.cpp"), str(CUDA / "plan.cpp")]
    command = [get_cxx_compiler(), "-std=c++17", "-O0", f"-I{CUDA}", *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def regime_name(op, dtype, plan):
    """The name in tests/cuda/check_binary.py of the kernel that a plan is launched with."""
    regime, team, groups, _ = plan
    at_once = 1 if dtype == "float64" else 2
    lanes = f"{team} lane{'s' * (team > 1)} a row" if team < 32 else "a warp a row"
    lanes = lanes if team <= 32 else f"{team} threads a row"
    held = f"{groups} group{'s' * (groups > 1)} held"
    if regime == 0 and op in ("hard", "index"):
        return f"{lanes}, {at_once if team > 32 or (team == 32 and groups > 1) else 1} at a time"
    return {
        0: f"{lanes}, {held}",
        1: f"a cluster of {team} threads a block a row, {held}",
        2: "streamed",
        3: "split",
        4: f"columns, {team} warp{'s' * (team > 1)}",
    }[regime]


@pytest.mark.parametrize("multiprocessors", [32, 108, 132])
def test_shapes_run_in_the_regimes_that_they_stand_for(benchmarks, plan_of, multiprocessors):
    from benchmarks.cases.core.regimes import KERNELS_OF, regimes

    ops = ["soft", "log soft", "hard", "index", "backward", "backward, recomputed"]
    types = ["float64", "float32", "bfloat16", "float16"]
    asked, lines = [], []
    for kernels in KERNELS_OF.items():
        for regime in regimes(kernels[0]):
            asked.append((kernels[1], regime))
            outer, classes, inner = (*regime.shape, 1)[:3]
            numbers = (ops.index(kernels[1]), types.index(regime.dtype), outer, classes, inner)
            lines.append(" ".join(map(str, (*numbers, multiprocessors, 1))))
    done = subprocess.run(
        [plan_of], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    plans = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(plans) == len(asked)
    wrong = [
        (op, regime, regime_name(op, regime.dtype, plan))
        for (op, regime), plan in zip(asked, plans, strict=True)
        if regime_name(op, regime.dtype, plan) != regime.name
    ]
    assert wrong == []


def test_every_kernel_of_the_table_has_a_shape(benchmarks):
    from benchmarks.cases.core.regimes import KERNELS_OF, regimes

    counts = ROOT / "tests" / "cuda" / "instructions_per_element.json"
    known = json.loads(counts.read_text(encoding="utf-8"))["instructions"]
    for op, kernels in KERNELS_OF.items():
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            compiled = {name.partition(", first")[0].partition(", second")[0]
                        for name in known[f"{kernels}, {dtype}"]}  # fmt: skip
            assert {r.name for r in regimes(op) if r.dtype == dtype} == compiled


# --- the core's cases ---


def rehearse(suite, tmp_path, *options, device=None):
    """Exit status and JSON of a rehearsal."""
    from benchmarks import run

    output = tmp_path / "rehearsal.json"
    arguments = [suite, "--device", "rehearsal", "--output", str(output), *options]
    return run.main(arguments, device), json.loads(output.read_text(encoding="utf-8"))


def test_a_rehearsal_measures_every_kind_of_case(benchmarks, tmp_path, monkeypatch):
    from benchmarks.cases.core import gpu

    kinds = {(case.group, case.variant): case for case in gpu.all_cases()}
    monkeypatch.setattr(gpu, "all_cases", lambda: list(kinds.values()))
    status, document = rehearse("core", tmp_path, "--no-compile")
    assert status == 0
    assert document["rehearsal"]
    assert document["complete"]
    assert not document["skipped"]
    measured = {(row["group"], row["variant"]) for row in document["rows"]}
    assert measured == {kind for kind in kinds if kind[0] != "memory"}
    for row in document["rows"]:
        assert math.prod(row["shape"]) <= 4096
        assert row["microseconds_per_call"]["median"] > 0
    [ours] = [row for row in document["memory_rows"] if row["contender"] == "gumbel_ext"]
    output_and_gradient = 2 * getattr(torch, ours["dtype"]).itemsize
    assert output_and_gradient <= ours["allocator_peak_bytes_per_element"] < output_and_gradient + 1


def test_compiled_contenders_are_rehearsed(benchmarks, tmp_path):
    options = ("--cases", "shapes/hard-backward/float16/16384x1024")
    status, document = rehearse("core", tmp_path, *options)
    assert status == 0
    contenders = [row["contender"] for row in document["rows"]]
    assert contenders == [
        "gumbel_ext",
        "F.gumbel_softmax",
        "torch.compile(F.gumbel_softmax)",
        "F.softmax",
        "Tensor.copy_",
    ]


@pytest.mark.parametrize("error", [RuntimeError("no such graph"), torch.OutOfMemoryError("full")])
def test_a_contender_that_fails_is_left_out_and_said_so(benchmarks, tmp_path, error):
    from benchmarks.device import Rehearsal

    class NoGraphs(Rehearsal):
        def graph_of(self, call, calls):
            graphs.append(call)
            if len(graphs) == 2:  # the second contender of the first case
                raise error
            return super().graph_of(call, calls)

    graphs = []
    pattern = "launches/hard*/20x10/*graph"
    device = NoGraphs()
    options = ("--no-compile", "--cases", pattern)
    status, document = rehearse("core", tmp_path, *options, device=device)
    assert status == 1
    left_out = [(skip["contender"], skip["reason"]) for skip in document["skipped"]]
    assert left_out == [("F.gumbel_softmax", str(error))]
    first = [row["contender"] for row in document["rows"] if row["op"] == "hard forward"]
    assert first == ["gumbel_ext", "F.softmax"]
    assert any(row["op"] == "hard forward+backward" for row in document["rows"])


def test_a_case_that_fails_is_left_out_and_the_others_are_measured(
    benchmarks, tmp_path, monkeypatch
):
    from benchmarks.cases import core
    from benchmarks.device import Rehearsal

    check = core.check

    def refuse_bfloat16(case, inputs, function):
        if case.dtype == "bfloat16":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
        check(case, inputs, function)

    monkeypatch.setattr(core, "check", refuse_bfloat16)
    options = ("--cases", "shapes/index/*x1024*", "--no-compile")
    status, document = rehearse("core", tmp_path, *options, device=Rehearsal())
    assert status == 1
    assert [skip["reason"] for skip in document["skipped"]] == ["CUDA out of memory. Tried"]
    assert {row["dtype"] for row in document["rows"]} == {"float16", "float32", "float64"}


def test_regimes_of_clusters_are_left_out_where_there_are_none(benchmarks, tmp_path):
    from benchmarks.device import Rehearsal

    class Older(Rehearsal):
        def describe(self):
            return {**super().describe(), "compute_capability": "8.0"}

    options = ("--no-compile", "--cases", "regimes/*soft-forward/float16")
    status, document = rehearse("core", tmp_path, *options, device=Older())
    assert status == 0
    assert len(document["skipped"]) == 2
    assert all("9.0" in skip["reason"] for skip in document["skipped"])
    measured = {row["workload"] for row in document["rows"]}
    assert "streamed" in measured
    assert not any("cluster" in name for name in measured)


def test_a_lost_gpu_ends_the_run_with_what_was_measured(benchmarks, tmp_path, monkeypatch):
    from benchmarks.cases import core
    from benchmarks.device import Rehearsal

    class Lost(Rehearsal):
        lost = False

        def synchronize(self):
            if self.lost:
                raise RuntimeError("unspecified launch failure")

    device, cases = Lost(), []
    check = core.check

    def lose_at_the_third(case, inputs, function):
        cases.append(case)
        device.lost = len(cases) == 3
        check(case, inputs, function)

    monkeypatch.setattr(core, "check", lose_at_the_third)
    options = ("--cases", "launches/index", "--no-compile")
    status, document = rehearse("core", tmp_path, *options, device=device)
    assert status == 130
    assert not document["complete"]
    assert len({row["case"] for row in document["rows"]}) == 2


def test_a_rehearsal_is_never_written_under_the_name_of_a_result(benchmarks, tmp_path, capsys):
    from benchmarks import run

    options = ["--device", "rehearsal", "--output", str(tmp_path / "b.json")]
    with pytest.raises(SystemExit) as stopped:
        run.main(["core", *options])
    assert stopped.value.code == 2
    assert "must be named so" in capsys.readouterr().err


# --- the family's cases ---


@pytest.fixture(scope="module")
def family_rehearsal(tmp_path_factory):
    """JSON of one case of each kind of each page."""
    with imported_benchmarks() as patch:
        from benchmarks import run
        from benchmarks.cases import family

        def first_of_each_kind(rows):
            kinds = {(case.page, case.called, case.memory): case for case in reversed(every(rows))}
            return list(kinds.values())

        every = family.gpu_cases
        patch.setattr(family, "gpu_cases", first_of_each_kind)
        output = tmp_path_factory.mktemp("family") / "rehearsal.json"
        options = ["--device", "rehearsal", "--no-compile", "--output", str(output)]
        assert run.main(["family", *options]) == 0
    return output


def marked_pages():
    texts = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}
    return {page for page, text in texts.items() if "<!-- begin family: " in text}


def test_a_rehearsal_measures_every_page_of_the_family(family_rehearsal):
    document = json.loads(family_rehearsal.read_text(encoding="utf-8"))
    assert document["complete"]
    assert {row["page"] for row in document["rows"]} == marked_pages()
    assert {row["called"] for row in document["rows"]} == {"", "one by one", "in a graph"}
    assert any("share_of_copy_bandwidth" in row for row in document["rows"])
    assert any("kernels_per_call" in row for row in document["rows"])
    weighed = {row["page"] for row in document["rows"] if "allocator_peak_bytes" in row}
    assert weighed == {"codebook"}


def test_contenders_are_made_on_the_device_and_do_not_wait_for_it(benchmarks, monkeypatch):
    """Tensors on "meta" refuse others, and to be read from the host."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    from benchmarks.cases import family

    kinds = {
        (case.page, case.op, case.variant, case.dtype, case.called): case
        for case in family.gpu_cases(lambda rows: rows)
    }
    failed = {}
    with family.unvalidated():
        for kind, case in kinds.items():
            for name, call in case.contenders("meta")[0].items():
                try:
                    call(0)
                except RuntimeError as error:
                    failed[(*kind, name)] = str(error)
    assert not failed


def test_the_family_goes_on_without_a_contender_that_fails(benchmarks, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "multinomial", full)
    options = ("--no-compile", "--cases", "gumbel-max/gumbel_topk/float32/2x64")
    status, document = rehearse("family", tmp_path, *options)
    assert status == 1
    assert document["skipped"] == [
        {
            "case": "gumbel-max/gumbel_topk/float32/2x64/k-=-8",
            "contender": "torch.multinomial",
            "reason": "CUDA out of memory.",
        }
    ]
    contenders = [row["contender"] for row in document["rows"]]
    assert contenders == ["gumbel_ext", "topk(l + g)", "Tensor.copy_"]


# --- the pages ---


NOT_YET = "not yet measured"


@pytest.fixture
def pages(benchmarks, tmp_path):
    """A copy of README.md and docs/*.md, and a function that makes it anew from results."""
    from benchmarks import pages

    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy(page, docs)

    def run(*options, docs=docs, pictures=False):
        with pytest.MonkeyPatch.context() as patch:
            if not pictures:
                patch.setattr(pages, "draw", lambda *results: None)
            return pages.main(["--docs", str(docs), *map(str, options)])

    run.folder = docs
    return run


@pytest.fixture(scope="module")
def whole_rehearsal(tmp_path_factory):
    """JSON of all of the core's cases, as small as they can be; what compiles runs as it is."""
    with imported_benchmarks() as patch:
        from benchmarks import device, run
        from benchmarks.cases.core import case, gpu
        from benchmarks.timing import Budget

        patch.setattr(device.Rehearsal, "full", Budget(0, 1, 1))
        patch.setattr(gpu, "MOST_REHEARSED", 64)
        patch.setattr(gpu, "MOST_CLASSES_REHEARSED", 16)
        patch.setattr(case, "MOST_INPUTS", 2)
        patch.setattr(device.Rehearsal, "started", lambda self, call, calls: calls)
        patch.setattr(torch, "compile", lambda function, **options: function)
        output = tmp_path_factory.mktemp("whole") / "rehearsal.json"
        assert run.main(["core", "--device", "rehearsal", "--output", str(output)]) == 0
    return output


@pytest.fixture
def rehearsal(whole_rehearsal, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copy(whole_rehearsal, tmp_path))


def test_one_result_fills_every_cell(pages, rehearsal):
    texts = {name: (pages.folder / name).read_text(encoding="utf-8") for name in GPU_PAGES}
    assert all(NOT_YET in text or "not measured" in text for text in texts.values())
    assert pages(rehearsal, pictures=True) == 0
    for name in GPU_PAGES:
        text = (pages.folder / name).read_text(encoding="utf-8")
        assert NOT_YET not in text
        assert "left out" not in text
        assert "rehearsal without a GPU" in text
    assert (pages.folder / "gpu-speed.png").read_bytes().startswith(b"\x89PNG")
    assert (pages.folder / "gpu-memory.png").read_bytes().startswith(b"\x89PNG")
    readme = (pages.folder / "../README.md").read_text(encoding="utf-8")
    assert "](docs/gpu-speed.png)" in readme
    assert pages(rehearsal, "--check") == 0


GPU_PAGES = ("benchmarks.md", "kernels-cuda.md", "kernels-cuda-table.md", "../README.md")


def test_a_cell_shows_the_number_of_its_case(pages, rehearsal):
    document = json.loads(rehearsal.read_text(encoding="utf-8"))
    for row in document["rows"]:
        regime = (row["group"], row["workload"], row["dtype"], row["op"], row["contender"])
        if regime == ("regimes", "split", "float16", "soft backward", "gumbel_ext"):
            row["share_of_copy_bandwidth"]["median"] = 7.77
        case = (row["group"], row["asked_shape"], row["dtype"], row["op"], row["contender"])
        if case == ("shapes", [8192, 65536], "float16", "index", "Tensor.copy_"):
            row["time_over_baseline"] = dict.fromkeys(("median", "p25", "p75", "min"), 6.66)
    rehearsal.write_text(json.dumps(document), encoding="utf-8")
    assert pages(rehearsal) == 0
    table = (pages.folder / "kernels-cuda-table.md").read_text(encoding="utf-8")
    shown = [line for line in table.splitlines() if line.endswith("| 7.77 |")]
    assert [line.split("|")[1:3] for line in shown] == [
        [" split, first pass ", " float16 "],
        [" split, second pass ", " float16 "],
    ]
    of_backward = table.split("## backward\n")[1].split("## ")[0]
    assert all(line in of_backward for line in shown)
    page = (pages.folder / "benchmarks.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if "| 6.66x |" in line]
    assert line.startswith("| index | float16 | `Tensor.copy_` | ≥ 0.85x its speed |")
    assert line.split("|")[5:12].index(" 6.66x ") == 5


def test_what_a_cut_run_left_out_is_said(pages, rehearsal):
    document = json.loads(rehearsal.read_text(encoding="utf-8"))
    document["rows"] = [row for row in document["rows"] if row["op"] != "hard forward"]
    document["memory_rows"] = []
    rehearsal.write_text(json.dumps(document), encoding="utf-8")
    assert pages(rehearsal) == 0
    for name in GPU_PAGES[:3]:
        text = (pages.folder / name).read_text(encoding="utf-8")
        assert NOT_YET not in text
        assert "left out" in text


def test_a_result_of_the_cpu_alone_leaves_the_gpus_pages_alone(pages, rehearsal):
    assert pages(rehearsal) == 0
    before = {path: path.read_bytes() for path in pages.folder.glob("*.md")}
    assert pages(ROOT / "benchmarks" / "results" / "cpu-avx2.json") == 0
    assert {path: path.read_bytes() for path in pages.folder.glob("*.md")} == before


def test_the_projects_pages_are_what_the_results_say(pages, capsys):
    assert pages("--check", docs=ROOT / "docs") == 0, capsys.readouterr().err


def test_a_rehearsal_is_kept_out_of_the_projects_pages(pages, rehearsal, capsys):
    for docs in (ROOT / "docs", ROOT / "docs" / "figures"):
        assert pages(rehearsal, "--check", docs=docs) == 2  # which would write nothing even so
        assert "a rehearsal is not for" in capsys.readouterr().err


def test_the_familys_pages_show_a_gpu_under_the_cpu(family_rehearsal, pages):
    before = {page: (pages.folder / f"{page}.md").read_text() for page in marked_pages()}
    assert all(f"On a GPU: {NOT_YET}." in text for text in before.values())
    assert pages(family_rehearsal) == 0
    document = json.loads(family_rehearsal.read_text(encoding="utf-8"))
    for page, text in before.items():
        made = (pages.folder / f"{page}.md").read_text(encoding="utf-8")
        assert NOT_YET not in made
        start, end = text.split(f"On a GPU: {NOT_YET}.")
        assert made.startswith(start)
        assert made.endswith(end)
        table = made.removeprefix(start).removesuffix(end)
        rows = [row for row in document["rows"] if row["page"] == page]
        shown = [row for row in rows if row["contender"] != "Tensor.copy_"]
        assert table.count("\n| ") == len(shown) + 1  # and the ruler
        assert "rehearsal without a GPU" in table
    assert pages(family_rehearsal, "--check") == 0
    assert pages("--check") == 1  # without the rehearsal: not yet measured


def test_pages_that_are_missing_are_made(family_rehearsal, rehearsal, pages, tmp_path):
    made = tmp_path / "out"
    assert pages(family_rehearsal, rehearsal, docs=made) == 0
    assert {page.stem for page in made.glob("*.md")} == marked_pages() | {"benchmarks"}
    assert "| gumbel_topk" in (made / "gumbel-max.md").read_text(encoding="utf-8")


def test_a_page_of_the_project_without_a_place_for_its_table_is_an_error(
    pages, monkeypatch, capsys
):
    from benchmarks import pages as module

    regions = {"other": lambda result: "", **module.CPU_REGIONS}
    monkeypatch.setattr(module, "CPU_REGIONS", regions)
    assert pages("--check", docs=ROOT / "docs") == 2
    assert "benchmarks.md: the page must have the lines <!-- begin other" in capsys.readouterr().err


def test_a_rehearsal_is_kept_out_of_the_familys_pages(family_rehearsal, pages, capsys):
    assert pages(family_rehearsal, "--check", docs=ROOT / "docs") == 2
    assert "a rehearsal is not for" in capsys.readouterr().err
