"""Clocks. On CUDA: graph replays between events for device time, loops of eager calls for host time; on the CPU: a loop.

A *variant* is one way to do a case's work: a list of calls, one per set of inputs. Sets are rotated, and together they are
larger than three times the second-level cache, so that no call finds its inputs there. Every timer has the same methods;
:mod:`benchmarks.measure` interleaves the providers.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.environment import sm_clock_mhz

GRAPH_MS = 1.0
"""A replay should last this long: launch gaps and the clock's resolution are then below one per cent."""
GRAPH_CALLS = 256
BURST_CALLS = 10
SPIN_CYCLES_PER_MS = 2_000_000
SPIN_CYCLES = SPIN_CYCLES_PER_MS // 10
"""About 0.1 ms of waiting on the device, under which the host queues what is to be timed."""
MOST_SPIN_MS = 50.0
AHEAD_S = 0.1
"""How much work the host may queue ahead, in seconds."""


@dataclass
class Variant:
    """One way of computing a case.

    ``calls``: one function per set of inputs, returning whatever tensors it made. ``canon``: from what a call returned to
    the named tensors that the problem's gate knows. ``eager``: the same work through the public interface, which is what a
    user's host pays for; default ``calls``. ``capture``: False for calls that no CUDA graph can hold. ``restore``: puts
    inputs that the calls change back; run before the gate looks at a result. ``resident``: bytes that belong to this
    variant between calls (its model, its optimizer state) and count towards its memory.
    """

    calls: Sequence[Callable[[], Any]]
    canon: Callable[[Any], dict[str, torch.Tensor]]
    label: str = ""
    impl: str | None = None
    eager: Sequence[Callable[[], Any]] | None = None
    capture: bool = True
    restore: Callable[[], None] | None = None
    resident: Callable[[], int] = lambda: 0


@dataclass
class Prepared:
    """A variant ready to be timed: ``run`` queues ``calls`` calls, each taking about ``ms``.

    ``outputs``: what the last calls on every set returned, set 0 first, where the next ``run`` will write again.
    """

    run: Callable[[], Any]
    calls: int
    ms: float
    outputs: deque[Any] | None = None
    remarks: list[str] = field(default_factory=list)


class CpuTimer:
    """Wall clock; device time and eager time are the same thing."""

    bursts = False

    def prepare(self, variant: Variant, calls: int | None = None) -> Prepared:
        seconds = []
        for call in variant.calls:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)

        def run() -> None:
            for call in variant.calls:
                call()

        return Prepared(run, len(variant.calls), 1e3 * statistics.median(seconds))

    def trial(self, variant: Variant) -> float:
        return self.prepare(variant).ms

    def stretch(self, prepared: Prepared, seconds: float) -> tuple[list[float], float | None]:
        samples, end = [], time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            start = time.perf_counter()
            prepared.run()
            samples.append(1e3 * (time.perf_counter() - start) / prepared.calls)
        return samples, None

    def eager(self, variant: Variant, seconds: float, *, host_only: bool = False) -> float:
        calls = variant.eager or variant.calls
        samples, end = [], time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            start = time.perf_counter()
            for call in calls:
                call()
            samples.append(1e3 * (time.perf_counter() - start) / len(calls))
        return statistics.median(samples)

    def peak_bytes(self, variant: Variant) -> int | None:
        variant.calls[0]()
        return None

    def synchronize(self) -> None: ...


class CudaTimer:
    """CUDA events and graphs on the current device."""

    bursts = True

    def __init__(self) -> None:
        self._side = torch.cuda.Stream()  # one for all captures: libraries keep a workspace for every stream they see

    def prepare(self, variant: Variant, calls: int | None = None) -> Prepared:
        """Capture enough calls to fill :data:`GRAPH_MS`, or about ``calls`` of them.

        A variant that cannot be captured is timed call by call, and the remark says why.
        """
        remarks, sets = [], len(variant.calls)
        if variant.capture:
            try:
                prepared = self._capture(variant, -(-(calls or 1) // sets) * sets)
                prepared.ms = self._time(prepared, 3)
                wanted = min(GRAPH_CALLS, max(1, round(GRAPH_MS / max(prepared.ms, 1e-4))))
                if calls is None and wanted >= 2 * sets:
                    prepared = self._capture(variant, -(-wanted // sets) * sets)
                    prepared.ms = self._time(prepared, 3)
                return prepared
            except Exception as error:
                self.synchronize()  # raises when the device is lost: then this is no question of capturing
                remarks.append(f"not captured in a graph ({first_line(error)})")
        else:
            remarks.append("not captured in a graph")
        kept: deque[Any] = deque(maxlen=sets)
        count = -(-(calls or 1) // sets)

        def run() -> None:
            for _ in range(count):
                for call in variant.calls:
                    kept.append(call())

        prepared = Prepared(run, count * sets, 0.0, kept, remarks)
        run()
        prepared.ms = self._time(prepared, 2)
        return prepared

    def trial(self, variant: Variant) -> float:
        """Ms per call, roughly: to choose between variants, not to report. Cheaper than capturing each of them."""
        calls = variant.calls
        calls[0]()
        torch.cuda.synchronize()
        start = time.perf_counter()
        calls[-1]()
        host_ms = 1e3 * (time.perf_counter() - start)
        count = max(3, min(len(calls), 8))
        # The device waits until the host has queued everything, whatever that costs.
        torch.cuda._sleep(int(SPIN_CYCLES_PER_MS * min(MOST_SPIN_MS, 0.1 + 1.5 * host_ms * count)))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for i in range(count):
            calls[i % len(calls)]()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / count

    def _capture(self, variant: Variant, count: int) -> Prepared:
        sets = len(variant.calls)
        side = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up where capturing happens: lazy initialisation must not be captured
            for call in (*variant.calls, variant.calls[0]):  # all of them: an optimizer makes its state in its first step
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        kept: deque[Any] = deque(maxlen=sets)  # outputs rotate as inputs do; older ones give their memory back
        with torch.cuda.graph(graph, stream=side):
            for i in range(count):
                kept.append(variant.calls[i % sets]())
        prepared = Prepared(graph.replay, count, 0.0, kept)
        graph.replay()
        torch.cuda.synchronize()
        return prepared

    def _time(self, prepared: Prepared, replays: int) -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(SPIN_CYCLES)
        events[0].record()
        for _ in range(replays):
            prepared.run()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / (replays * prepared.calls)

    def stretch(self, prepared: Prepared, seconds: float) -> tuple[list[float], float | None]:
        """Back-to-back replays for ``seconds``: ms per call of each, and the clock (MHz) while the last ones ran."""
        replay_ms = max(prepared.ms * prepared.calls, 1e-3)
        count = max(3, round(1e3 * seconds / replay_ms))
        ahead = max(2, round(1e3 * AHEAD_S / replay_ms))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        torch.cuda._sleep(SPIN_CYCLES)
        events[0].record()
        for i in range(count):
            prepared.run()
            events[i + 1].record()
            if i >= ahead:
                events[i + 1 - ahead].synchronize()
        clock = sm_clock_mhz()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / prepared.calls for a, b in zip(events, events[1:], strict=False)], clock

    def burst(self, prepared: Prepared, pause_s: float) -> float:
        """Ms per call of about ten calls after the device idled for ``pause_s``."""
        torch.cuda.synchronize()
        time.sleep(pause_s)
        return self._time(prepared, -(-BURST_CALLS // prepared.calls))

    def eager(self, variant: Variant, seconds: float, *, host_only: bool = False) -> float:
        """Wall time per eager call, the device waited for at the end of each batch (``host_only``: not waited for)."""
        calls = variant.eager or variant.calls
        for call in calls:
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls[:2]:
            call()
        each_ms = 1e3 * (time.perf_counter() - start) / len(calls[:2])
        torch.cuda.synchronize()
        # A batch lasts about 5 ms, and has no more calls than fit the launch queue: a full queue makes the host wait.
        batch = max(1, min(100, round(5 / max(each_ms, 1e-3))))
        samples, end = [], time.perf_counter() + seconds
        while len(samples) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            for i in range(batch):
                calls[i % len(calls)]()
            middle = time.perf_counter()
            torch.cuda.synchronize()
            stop = middle if host_only else time.perf_counter()
            samples.append(1e3 * (stop - start) / batch)
        return statistics.median(samples)

    def peak_bytes(self, variant: Variant) -> int:
        """Device memory that one call adds at its worst moment, what it returns included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, resident = torch.cuda.memory_allocated(), variant.resident()
        output = variant.calls[0]()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del output
        return peak + resident

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def timer(device: torch.device) -> CpuTimer | CudaTimer:
    return CudaTimer() if device.type == "cuda" else CpuTimer()


def first_line(error: BaseException) -> str:
    """The exception's type and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
