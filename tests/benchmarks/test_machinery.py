"""The parts that need a GPU, on stand-ins: CUDA timing, the search over cuSPARSELt's algorithms, the supervising parent."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import problems, supervise
from benchmarks.cases import select
from benchmarks.cost import touched_bytes
from benchmarks.measure import Entry, Plan, measure, pick
from benchmarks.precompile import first_call, precompile, tasks
from benchmarks.providers import cusparselt
from benchmarks.timing import CudaTimer, Variant

PLAN = Plan(0.01, 0.01, 2, 2, 0.001, 0.01)


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at - self.at)


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None: ...


class FakeGraph:
    """``replay`` runs what the test calls the captured work."""

    work = staticmethod(lambda: None)

    def replay(self) -> None:
        type(self).work()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def context(*args: object, **options: object):
        yield

    nothing = lambda *args, **options: None  # noqa: E731
    for name, stand_in in {
        "Event": FakeEvent, "Stream": FakeStream, "current_stream": FakeStream, "stream": context, "graph": context,
        "CUDAGraph": FakeGraph, "synchronize": nothing, "_sleep": nothing, "reset_peak_memory_stats": nothing,
        "memory_allocated": lambda: 1000, "max_memory_allocated": lambda: 3000, "clock_rate": lambda: 1400,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)


def test_cuda_measurement_fills_every_figure(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = torch.randn(64), torch.empty(64)

    def call() -> torch.Tensor:
        return target.copy_(source)

    def work() -> None:
        time.sleep(2e-4)
        call()

    monkeypatch.setattr(FakeGraph, "work", staticmethod(work))
    checked = []

    def check(outputs: dict[str, torch.Tensor]) -> None:
        checked.append(bool(outputs["y"].isnan().any()))

    entries = [Entry(name, Variant([call, call, call], lambda out: {"y": out})) for name in ("a", "b")]
    seen = []
    measure(entries, check, CudaTimer(), PLAN, large=True, before=seen.append)
    for entry in entries:
        assert entry.error is None
        assert entry.values.keys() == {"gpu_ms", "burst_ms", "eager_ms", "peak_bytes"}
        assert entry.values["peak_bytes"] == 2000 and 0 < entry.values["gpu_ms"] < 5
        assert entry.notes[0].startswith("p20-p80 ") and "1.40 GHz" in entry.notes
    assert checked == [False, False], "the replay is gated, and it wrote over the NaN"
    assert seen[:2] == ["a", "b"] and seen[4:6] == ["b", "a"], "every other turn goes backwards"


def test_a_replay_that_leaves_the_poison_is_a_wrong_result(fake_cuda: None) -> None:
    from benchmarks.gate import GateError

    target = torch.zeros(8)

    def check(outputs: dict[str, torch.Tensor]) -> None:
        if outputs["y"].isnan().any():
            raise GateError("y: NaN")

    entry = Entry("a", Variant([lambda: target], lambda out: {"y": out}))
    measure([entry], check, CudaTimer(), PLAN)
    assert entry.error == "wrong result: y: NaN"


def test_what_cannot_be_captured_is_timed_call_by_call(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuse(*args: object, **options: object):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    entry = Entry("a", Variant([lambda: torch.ones(4)], lambda out: {"y": out}))
    measure([entry], lambda outputs: None, CudaTimer(), PLAN)
    assert entry.error is None and entry.values["gpu_ms"] > 0
    assert "not captured in a graph (RuntimeError: operation not permitted when stream is capturing)" in entry.notes


def test_host_time_alone(fake_cuda: None) -> None:
    entry = Entry("a", Variant([lambda: None], dict, eager=[lambda: time.sleep(1e-4)]))
    measure([entry], lambda outputs: None, CudaTimer(), PLAN, host_only=True)
    assert set(entry.values) == {"eager_ms"} and 0.05 < entry.values["eager_ms"] < 20


def test_every_accepted_algorithm_id_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def product(a, b, *, transpose_result, alg_id):
        tried.append(alg_id)
        if alg_id in (2, 3) or alg_id > 5:
            raise RuntimeError("invalid value")

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert cusparselt.accepted_ids(torch.zeros(1), torch.zeros(1), True) == [0, 1, 4, 5]
    assert tried[-1] == 5 + cusparselt.REFUSED


def test_close_variants_are_captured_and_timed_in_turns(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = {"a": 1.0, "b": 1.1, "c": 2.0, "d": 1.2, "e": 1.25}
    finals = {"a": 1.0, "b": 0.8, "d": 0.9, "e": 1.1}
    clock, seen = CudaTimer(), []
    monkeypatch.setattr(clock, "trial", lambda variant: looks[variant.label])
    monkeypatch.setattr(clock, "prepare", lambda variant, calls: variant)

    def stretch(variant: Variant, seconds: float) -> tuple[list[float], None]:
        seen.append(variant.label)
        return [finals[variant.label]], None

    monkeypatch.setattr(clock, "stretch", stretch)
    best, trials = pick([Variant([], dict, label=label) for label in looks], clock)
    assert best.label == "b" and trials == looks | finals
    assert seen == ["a", "b", "d", "e", "e", "d", "b", "a"], "the slow one is out, and the turns go both ways"


def test_kernels_are_compiled_ahead_in_other_processes() -> None:
    cases = select(["linear.forward", "linear.weight_grad", "pack.pack", "topology.remove", "model"], ["tiny"])
    wanted, said = tasks(cases), []
    assert len(wanted) == 2 * 2 + 1 + 1 + 2 * 2, "of what depends on no shape one is enough"
    assert precompile(cases, "auto", 2, say=said.append) > 0
    assert said[-1].startswith(f"kernels of {len(wanted)} of {len(wanted)} cases compiled ahead")
    assert precompile(cases, "auto", 0) == precompile(cases[:1], "auto", 2) == 0.0
    assert precompile(cases, "auto", 2, limit_s=0.0, say=said.append) < 10 and "kernels of 0 of" in said[-1]
    assert first_call((cases[0], "auto")) is None
    assert "impl" in first_call((cases[0], "no such"))


def test_sets_exceed_three_times_the_cache_or_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "l2_bytes", lambda: 50 << 20)
    device = torch.device("cuda")
    for case in select(["linear", "pack", "prune", "topology", "optimizer"]):
        sets = problems.sets_for(case, device)
        size = touched_bytes(case)
        enough = size is None or sets * size >= 3 * (50 << 20)
        assert enough == (problems.rotation_note(case, sets) == "")
        assert enough or sets in (problems.MOST_SETS, problems.MOST_TOPOLOGY_SETS), case.id
        assert enough or case.suite != "linear", case.id


def test_structures_for_cusparselt_are_aligned() -> None:
    import ctypes

    from benchmarks.providers.cusparselt_prune import STRUCT_BYTES, _opaque

    for _ in range(4):
        memory = _opaque()
        assert ctypes.addressof(memory) % 64 == 0 and len(memory) == STRUCT_BYTES


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("import sys; sys.exit(3)", ""),
        (f"import sys; sys.exit({supervise.LOST})", "lost its device"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was ended by signal 11"),
        ("import time; time.sleep(60)", "hung for 1 s and was killed"),
    ],
)
def test_the_parent_sees_how_a_worker_ended(program: str, how: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert supervise._watch([sys.executable, "-c", program], dict(os.environ), marker, hang_s=1.0)[1] == how


def test_a_crash_is_followed_by_another_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([(-11, "was ended by signal 11"), (0, "")])
    commands = []

    def watch(command: list[str], environment: dict[str, str], marker: Path, hang_s: float) -> tuple[int, str]:
        commands.append((command, environment[supervise.EARLIER]))
        return next(ends)

    monkeypatch.setattr(supervise, "_watch", watch)
    assert supervise.supervise(["--fresh", "--suite", "pack"], 100.0) == 0
    assert "--fresh" in commands[0][0] and "--fresh" not in commands[1][0]
    assert [how for _, how in commands] == ["", "was ended by signal 11"]
    assert "--budget" in commands[1][0]
