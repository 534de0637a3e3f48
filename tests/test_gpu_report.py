"""The report of a GPU, without one: how it shares its time out, and what it makes of its stages."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.cpu_only(reason="the report's own program")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import report

    return report


def test_time_is_shared_out_and_what_is_left_goes_to_the_others(report):
    now = [0.0]
    schedule = report.Schedule(570, report.STAGES, lambda: now[0])
    assert schedule.room("build") == 2 * (570 * 120 // 560)
    now[0] = 60
    assert schedule.room("checks") == 510 * 200 // 440
    now[0] = 565
    assert schedule.room("plots") == 0
    alone = report.Schedule(570, ["bench"], lambda: now[0])
    assert alone.room("bench") == 420
    assert [part.name for part in alone.parts] == ["bench"]
    assert schedule.plan().startswith("plan: build 122 s, checks 203 s, bench 111 s, family 61 s, ")


SLOW = "import time\nprint('3 passed in 1.0', flush=True)\ntime.sleep(60)"


@pytest.mark.parametrize(
    ("code", "limit", "options", "outcome", "detail"),
    [
        ("print('== 3 passed in 1.0 ==')", 60, {}, "ok", "3 passed in 1.0"),
        ("print('1 failed in 1.0'); exit(1)", 60, {}, "FAILED", "1 failed in 1.0 (exit 1)"),
        ("exit(3)", 60, {}, "FAILED", " (exit 3)"),
        ("print('no counters'); exit(1)", 60, {"excuse": "no counters"}, "skipped", "no counters"),
        (SLOW, 2, {}, "FAILED", "cut after 2 s; 3 passed in 1.0"),
        (SLOW, 2, {"unharmed": "^3 passed"}, "cut", "cut after 2 s; 3 passed in 1.0"),
        (SLOW, 2, {"unharmed": "^3 passed", "failed": True}, "FAILED", "cut after 2 s; 3 passed"),
        (f"print('FAILED test_a')\n{SLOW}", 2, {"unharmed": "^3 passed"}, "FAILED", "cut after"),
        ("print('3 passed in 1.0')", 60, {"failed": True}, "FAILED", "3 passed in 1.0 (exit 0)"),
    ],
)
def test_how_a_stage_ended(report, tmp_path, code, limit, options, outcome, detail):
    stage = report.Stage("tests", tmp_path / "tests.log", limit)
    started = time.monotonic()
    stage.start([sys.executable, "-c", code], {})
    stage.judge(report.COUNTS, **options)
    assert time.monotonic() - started < 30
    assert stage.outcome == outcome
    assert stage.detail.startswith(detail)


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_cuda" name="test_a[1]"><properties>
<property name="choices" value="10"/>
<property name="choices that differ from the CPU's" value="1"/></properties></testcase>
<testcase classname="tests.test_cuda" name="test_a[2]"><properties>
<property name="choices" value="30"/></properties></testcase>
<testcase classname="tests.test_cuda" name="test_b"><skipped message="no  GPU"/></testcase>
<testcase classname="tests.test_cuda" name="test_c"><failure/></testcase>
</testsuite></testsuites>"""


def test_what_tests_counted(report, tmp_path):
    (tmp_path / "tests.xml").write_text(JUNIT)
    found = report.tests_of(tmp_path / "tests.xml")
    assert found["counts"] == {"passed": 2, "skipped": 1, "failure": 1}
    assert found["failed"] == ["tests.test_cuda::test_c"]
    assert found["skipped"] == [{"reason": "no GPU", "tests": 1}]
    assert report.near_ties({"tests": found}) == {"choices": 40, "differ": 1, "share": 1 / 40}


def run(out, *options):
    command = [sys.executable, "-m", "benchmarks.report", "--rehearse", "--out", str(out), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_stages_that_cannot_run_are_skipped_with_a_reason(tmp_path):
    process = run(tmp_path, "--only", "kernels,sanitizers,ncu,plots")
    assert process.wait() == 0, process.stdout.read()
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["rehearsal"], written["ended"]) == (True, True)
    outcomes = {stage["stage"]: stage["outcome"] for stage in written["stages"]}
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    sanitizers = [f"{tool}-{half}" for tool in tools for half in (1, 2)]
    assert outcomes == dict.fromkeys(["kernels", *sanitizers, "ncu", "plots"], "skipped")
    assert "nothing was measured" in (tmp_path / "summary.txt").read_text()
    names = {"report.json", "summary.txt", "log.txt", "rest.tar.gz"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_interrupted_run_leaves_what_it_has(tmp_path):
    process = run(tmp_path, "--only", "bench")
    for line in process.stdout:
        if line.startswith("-- bench: at most"):
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    [stage] = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert (stage["stage"], stage["outcome"]) == ("bench", "FAILED")
    assert stage["detail"] == "the run was interrupted"


def test_words_that_mean_nothing_are_refused(report, tmp_path, capsys):
    for options, error in (
        (["--only", "build,walk"], "no stage is named walk"),
        (["--seconds", "0"], "must be a positive number, got 0"),
        (["--prebuilt", str(tmp_path)], "there is no _C*.so"),
    ):
        with pytest.raises(SystemExit):
            report.parse_arguments(options)
        assert error in capsys.readouterr().err


def test_what_is_started_where_there_is_a_gpu(report, tmp_path, monkeypatch):
    """All tests run, those about CUDA once under every tool, and what is built is for this GPU."""
    started = {}

    def start(run, name, limit, command, **environment):
        started[name] = ([str(word) for word in command], environment)
        stage = run.stages[name] = report.Stage(name, tmp_path / "log", limit, "ok")
        stage.log.touch()

    monkeypatch.setattr(report.Report, "start", start)
    monkeypatch.setattr(report.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(report, "built", dict)
    monkeypatch.setattr(report, "missing", lambda *modules: [])
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    (out / "bench.json").write_text("{}")
    arguments = report.parse_arguments([])
    schedule = report.Schedule(arguments.seconds, arguments.only)
    run = report.Report(arguments, schedule, work, out, "Some GPU", "9.0", {})
    report.measure(run)
    assert started["build"][1]["TORCH_CUDA_ARCH_LIST"] == "9.0"
    about_cuda = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_cuda*.py")}
    assert about_cuda < set(started["tests"][0])
    ignored = {word.partition("=")[2] for word in started["suite"][0] if "--ignore" in word}
    assert ignored == about_cuda
    for tool in report.SANITIZERS:
        halves = [set(started[f"{tool}-{half}"][0]) & about_cuda for half in (1, 2)]
        assert halves[0] | halves[1] == about_cuda
        assert not halves[0] & halves[1]
        assert started[f"{tool}-1"][0][:3] == ["compute-sanitizer", "--tool", tool]
    for stage, suite in (("bench", "core"), ("family", "family")):
        command = started[stage][0]
        assert command[1:6] == ["-m", "benchmarks.run", suite, "--device", "cuda"]
        assert command[-1] == str(out / f"{stage}.json")
        seconds = int(command[command.index("--seconds") + 1])
        assert 0 < seconds <= run.stages[stage].limit - 20
    assert started["ncu"][0][0] == "ncu"
    assert str(out / "bench.json") in started["plots"][0]


def test_errors_in_kernels_of_this_package_fail_a_sanitizer(report, tmp_path):
    def ended(lines, code=0):
        stage = report.Stage("memcheck-1", tmp_path / "log", 60)
        text = "\n".join([*lines, "== 3 passed in 1.0 ==", "========= ERROR SUMMARY: 1 error"])
        stage.start([sys.executable, "-c", f"print({text!r}); exit({code})"], {})
        run = type("Run", (), {"said": lambda self, stage: None})()
        report.finish_sanitizer(run, stage)
        return stage.outcome, stage.detail

    assert ended([]) == ("ok", "0 errors in kernels of gumbel_ext; ERROR SUMMARY: 1 error")
    outcome, detail = ended(["=========     at gumbel_ext::kernel(int)"])
    assert outcome == "FAILED"
    assert detail.startswith("1 errors in kernels of gumbel_ext")
    assert ended(["Device not supported"], 1)[0] == "skipped"
