"""Every suite's code path on the CPU with tiny shapes, the result file, and resuming."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import cli, environment, providers, runner
from benchmarks.cases import OPS, select
from benchmarks.cli import main
from benchmarks.gate import GateError
from benchmarks.measure import Budget, DeviceLost, Plan, Work
from benchmarks.results import DIED, Results, Row
from benchmarks.timing import Variant

pytest.importorskip("rich")

KEYS = [
    "suite", "op", "shape", "dtype", "provider", "impl", "gpu_ms", "burst_ms", "eager_ms", "peak_bytes", "error", "note",
]  # fmt: skip
FAST = Plan(0.0, 0.0, 1, 1, 0.0, 0.0)
ROOT = Path(__file__).parents[2]
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's code path; `python -m benchmarks` tries the GPU's")


@pytest.fixture(scope="module", autouse=True)
def same_kernels() -> Iterator[None]:
    """The sources may be edited while the tests run; a run would then refuse the file of the one before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "kernel_hash", lambda: "0123456789abcdef")
        yield


@pytest.fixture(scope="module", autouse=True)
def just_started() -> Iterator[None]:
    """A run's time is counted from the start of its process; other tests have had this one for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "START", time.perf_counter())
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a whole run over every suite."""
    path = tmp_path_factory.mktemp("benchmarks") / "cpu.json"
    if not torch.cuda.is_available():
        assert main(["--out", str(path), "--shapes", "tiny", "--quick", "--no-plots"]) == 0
    return path


@cpu_only
def test_every_suite_and_operation_has_rows_of_the_schema(finished: Path) -> None:
    content = json.loads(finished.read_text())
    assert list(content) == ["environment", "rows"]
    assert {(row["suite"], row["op"]) for row in content["rows"]} == {(s, op) for s, ops in OPS.items() for op in ops}
    assert [f.name for f in fields(Row)] == KEYS
    for row in content["rows"]:
        assert list(row) == KEYS
        measured = row["eager_ms"] if row["suite"] == "host" else row["gpu_ms"]
        assert (measured is None) == (row["error"] is not None), row
    for key in ("gpu", "torch", "triton", "cuda", "cusparselt", "driver", "commit", "kernel_hash", "sessions"):
        assert key in content["environment"]


@cpu_only
def test_ours_runs_everywhere_and_competitors_say_why_they_cannot(finished: Path) -> None:
    rows = Results.load(finished).rows
    ours = [row for row in rows if row.provider == "chts"]
    assert not [row for row in ours if row.error]
    reasons = {row.provider: row.error for row in rows if row.error and row.provider != "chts"}
    assert reasons.keys() >= {"cusparselt", "torch24"} and all("needs a CUDA device" in r for r in reasons.values())
    assert all(row.spread is not None for row in rows if row.gpu_ms is not None)


@cpu_only
def test_a_second_run_measures_nothing_again_and_another_implementation_adds_rows(
    finished: Path, capsys: pytest.CaptureFixture
) -> None:
    before = finished.read_text()
    assert main(["--out", str(finished), "--shapes", "tiny", "--suite", "linear.forward", "--no-plots"]) == 0
    assert "0 cases to measure, 2 already in" in capsys.readouterr().out
    assert Results.load(finished).rows == Results.load(finished).rows and finished.read_text().count("\n") == before.count("\n")
    arguments = ["--out", str(finished), "--shapes", "tiny", "--suite", "linear.forward", "--impl", "reference", "--no-plots"]
    assert main(arguments) == 0
    forward = [r for r in Results.load(finished).rows if r.op == "forward" and r.suite == "linear" and r.provider == "chts"]
    assert len(forward) == 4 and sum("asked for by --impl" in row.note for row in forward) == 2


@cpu_only
def test_a_file_of_other_kernels_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = Results.load(finished)
    results.environment["kernel_hash"] = "other"
    results.path = tmp_path / "other.json"
    results.save()
    assert main(["--out", str(results.path), "--shapes", "tiny", "--suite", "pack.pack"]) == 2
    assert "kernel_hash is 'other'" in capsys.readouterr().err


def test_an_unknown_name_is_an_error_with_the_choices(capsys: pytest.CaptureFixture) -> None:
    for arguments, text in (
        (["--suite", "nothing"], "suite: must be one of"),
        (["--suite", "linear.nothing"], "linear.forward"),
        (["--shapes", "4096"], "shapes: must be of"),
        (["--dtype", "fp8"], "dtype: must be one of"),
    ):
        with pytest.raises(ValueError, match=text.replace(".", r"\.")):
            select(*[[arguments[1]] if arguments[0] == f"--{n}" else [] for n in ("suite", "shapes", "dtype")])
    assert main(["compare", "missing.json", "missing.json"]) == 2


def test_shapes_reach_the_suites_that_they_fit() -> None:
    assert {c.suite for c in select(shapes=["4096x4096"])} == {"prune", "pack", "topology", "optimizer", "host"}
    sixty = select(["linear.forward", "topology", "model"], ["llama-60m"])
    assert [(c.op, c.dims) for c in sixty if c.suite == "model"] == [(op, {"model": "llama-60m"}) for op in OPS["model"]]
    assert {"model": "llama-60m"} in [c.dims for c in sixty if c.suite == "topology" and c.op == "update"]
    assert len(select(["linear.forward"], ["S", "L"])) == 12
    assert len(select(["linear.forward"], ["S", "S"], ["bf16", "fp16"])) == 12


def _run(monkeypatch: pytest.MonkeyPatch, build, check=None) -> list[Row]:
    """Run one tiny case in which ``build`` stands for cublas; returns its rows."""
    real = providers.builder
    monkeypatch.setattr(providers, "builder", lambda name: build if name == "cublas" else real(name))
    results = Results()
    budget = Budget(None, plan=FAST)
    cases = select(["linear.forward"], ["48x32x64"])
    assert runner.run(cases, results, torch.device("cpu"), budget, runner.Options(only=("chts", "cublas"))) == []
    return results.rows


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(problem, impl):
        return [Variant([lambda: problem.exact("y").baseline * 1.1], lambda out: {"y": out})]

    ours, wrong = _run(monkeypatch, build)
    assert ours.error is None and ours.gpu_ms is not None
    assert wrong.gpu_ms is None and wrong.error.startswith("wrong result: y: the largest error is")


def test_of_several_variants_the_fastest_right_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    def build(problem, impl):
        y = problem.exact("y").baseline

        def slow():
            time.sleep(0.003)
            return y

        def broken():
            raise RuntimeError("not on this shape\nsecond line")

        calls = {"slow": slow, "right": lambda: y, "wrong": lambda: -y, "broken": broken}
        return [Variant([call], lambda out: {"y": out}, label=label) for label, call in calls.items()]

    row = _run(monkeypatch, build)[1]
    assert row.error is None and "; right; best of 4 variants, 2 of them wrong; trials slow" in row.note
    assert row.gpu_ms < 1


def test_a_crash_of_a_provider_is_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(problem, impl):
        raise KeyError("boom")

    ours, broken = _run(monkeypatch, build)
    assert ours.error is None and broken.error == "KeyError: 'boom'"


def test_a_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(problem, impl):
        def call():
            monkeypatch.setattr("benchmarks.timing.CpuTimer.synchronize", _lost)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return [Variant([call], lambda out: {"y": out})]

    def _lost(self) -> None:
        raise RuntimeError("CUDA error: sticky")

    with pytest.raises(DeviceLost, match="illegal memory access"):
        _run(monkeypatch, build)


def test_the_provider_that_ended_a_process_gets_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the CPU's code path")
    marker = tmp_path / "marker"
    marker.write_text("pack/pack/32x64/bf16\nchts\n")
    monkeypatch.setenv("CHTS_BENCHMARK_MARKER", str(marker))
    monkeypatch.setenv("CHTS_BENCHMARK_EARLIER", "was ended by signal 11")
    path = tmp_path / "x.json"
    assert main(["--out", str(path), "--shapes", "tiny", "--suite", "pack.pack", "--no-plots"]) == 0
    rows = {(r.case.id, r.provider): r for r in Results.load(path).rows}
    assert rows["pack/pack/32x64/bf16", "chts"].error == f"{DIED}: it was ended by signal 11"
    assert rows["pack/pack/36x20/bf16", "chts"].error is None
    assert main(["--out", str(path), "--shapes", "tiny", "--suite", "pack.pack", "--no-plots", "--retry"]) == 0
    assert all(row.error is None for row in Results.load(path).rows if row.provider == "chts")


def test_no_budget_leaves_cases_for_later() -> None:
    cases = select(["linear.forward"], ["tiny"])
    left = runner.run(cases, Results(), torch.device("cpu"), Budget(0.0), runner.Options())
    assert left == cases


def test_a_budget_is_shared_by_the_cases_to_come() -> None:
    large = Work("linear", "forward", True, 4)
    budget = Budget(100.0)
    plenty = budget.next([large])
    scarce = budget.next([large] * 60)
    assert plenty == Plan() and scarce.rounds < plenty.rounds and scarce.short_s < plenty.short_s
    assert scarce.sustain_s == plenty.sustain_s, "fewer stretches, but long enough to settle"
    budget.learn(large, 60.0, 1.0)
    assert budget.next([large] * 60).short_s <= scarce.short_s
    assert budget.preparation(Work("linear", "layer", True, 4)) == 59.0, "another operation of the suite is the best guess"
    assert Budget(20.0).next([Work("model", "step", False, 2)]) is not None
    assert Budget(2.0).next([Work("model", "step", False, 2)]) is None


def test_every_suite_gets_rows_when_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    budget = Budget(30.0)

    def case(job, *arguments) -> list[Row]:
        now[0] += 2.0
        return [Row.of(job.case, name, gpu_ms=1.0) for name in job.names]

    monkeypatch.setattr(runner, "_case", case)
    cases = select(["linear", "prune", "topology", "host"], ["S", "4096x4096"])
    results = Results()
    left = runner.run(cases, results, torch.device("cpu"), budget, runner.Options())
    suites = [row.suite for row in results.rows if row.provider == "chts"]
    assert set(suites) == {"linear", "prune", "topology", "host"} and suites.count("linear") > suites.count("host")
    assert now[0] <= 30.0 and 12 <= len(suites) < len(cases) and left
    assert left == [c for c in cases if c in left], "what is left keeps its order"


def test_the_most_wanted_comes_first_and_the_slow_providers_last() -> None:
    cases = select()
    assert {c.op for c in cases[:36]} == {"forward", "input_grad", "weight_grad"} and cases[0].dims["tokens"] == 2048
    assert cases[36].suite == "topology" and cases[-1].suite == "linear" and cases[-1].dims["tokens"] == 4096
    jobs = runner.Options(twin=False).jobs(cases, Results(), split=True)
    late = [index for index, job in enumerate(jobs) if job.apart]
    assert late == list(range(len(jobs) - len(late), len(jobs))) and "compile" in jobs[-1].names
    assert not any(set(job.names) & set(runner.LATE) for job in jobs if not job.apart and job.case.suite == "linear")
    assert not any("mma_twin" in job.names for job in jobs)
    whole = runner.Options(twin=False).jobs(cases, Results(), split=False)
    assert [job.case for job in whole] == cases
    done = Results(rows=[Row.of(job.case, name) for job in jobs[:5] for name in job.names])
    assert runner.Options(twin=False).jobs(cases, done, split=True) == jobs[5:], "what has its rows is not done again"


def test_the_gate_refuses_nan_and_wrong_shapes() -> None:
    from benchmarks.gate import Reference, no_worse_than

    exact = torch.randn(8, 8, dtype=torch.float64)
    low = exact.bfloat16()
    reference = Reference(exact, low)
    no_worse_than(low, reference, "y")
    with pytest.raises(GateError, match="nan"):
        no_worse_than(torch.full_like(low, torch.nan), reference, "y")
    with pytest.raises(GateError, match="root-mean-square"):
        no_worse_than(exact + 0.05, Reference(exact, exact + torch.eye(8) * 0.05), "y")
    with pytest.raises(GateError, match="shape"):
        no_worse_than(low[:4], reference, "y")


def test_pytest_benchmark_groups(tmp_path: Path) -> None:
    if importlib.util.find_spec("pytest_benchmark") is None:
        pytest.skip('pytest-benchmark is not installed: pip install ".[bench]"')
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["--suite", "linear.forward,pack.pack", "--shapes", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'linear/forward/48x32x64/bf16': 2 tests" in done.stdout
