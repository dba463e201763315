"""Measuring the providers of one case against each other: interleaved rounds, two regimes, a budget of seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import gate
from benchmarks.results import spread_note
from benchmarks.timing import CpuTimer, CudaTimer, Prepared, Variant, first_line


class DeviceLost(RuntimeError):
    """The device answers no more: this process cannot go on, the next one can."""


@dataclass(frozen=True)
class Plan:
    """How long each provider of a case is measured. Times in seconds."""

    sustain_s: float = 0.3
    short_s: float = 0.1
    rounds: int = 2
    bursts: int = 5
    pause_s: float = 0.12
    eager_s: float = 0.05

    def scaled(self, effort: float) -> Plan:
        """The same with less of everything; ``effort`` in (0, 1]. Pauses stay: they make the burst."""
        return Plan(
            sustain_s=max(0.04, self.sustain_s * effort),
            short_s=max(0.015, self.short_s * effort),
            rounds=self.rounds if effort > 0.5 else 1,
            bursts=max(1, round(self.bursts * effort)),
            pause_s=self.pause_s,
            eager_s=max(0.01, self.eager_s * effort),
        )

    def seconds(self, large: bool, providers: int) -> float:
        """What measuring a case takes, without preparing it."""
        one = self.rounds * (self.sustain_s if large else self.short_s) + self.eager_s
        return providers * (one + (self.bursts * (self.pause_s + 0.01) if large else 0.0))


FULL = Plan()
QUICK_EFFORT = 0.2
LEAST_EFFORT = 0.1
FINALISTS = 4
"""How many of a provider's variants get a second look before one is chosen."""


@dataclass
class Entry:
    """A provider on a case: the variant to time, then its figures or its error."""

    provider: str
    variant: Variant
    notes: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    prepared: Prepared | None = None
    samples: list[float] = field(default_factory=list)
    bursts: list[float] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)


def measure(
    entries: list[Entry],
    check: Callable[[dict[str, torch.Tensor]], str | None],
    clock: CpuTimer | CudaTimer,
    plan: Plan,
    *,
    large: bool = False,
    host_only: bool = False,
    before: Callable[[str], None] = lambda provider: None,
) -> None:
    """Fill ``values`` (gpu_ms, burst_ms, eager_ms, peak_bytes), ``notes`` or ``error`` of every entry.

    Args:
        check: the gate; what a captured graph wrote goes through it too.
        large: long-running and power-limited: sustained and burst figures.
        host_only: measure nothing but the host's time per call.
        before: called with the provider's name before its code runs.
    """

    def each(step: Callable[[Entry], None], turn: int = 0) -> None:
        # Every other turn goes backwards: a place in the order is worth a few per cent to a hot card.
        for entry in entries[:: -1 if turn % 2 else 1]:
            if entry.error is None:
                before(entry.provider)
                guarded(entry, step, clock)

    if host_only:

        def host(entry: Entry) -> None:
            entry.values["eager_ms"] = clock.eager(entry.variant, 4 * plan.eager_s, host_only=True)

        each(host)
        return

    def prepare(entry: Entry) -> None:
        entry.values["peak_bytes"] = clock.peak_bytes(entry.variant)
        entry.values["eager_ms"] = clock.eager(entry.variant, plan.eager_s)
        entry.prepared = clock.prepare(entry.variant)
        entry.notes += entry.prepared.remarks
        if entry.prepared.outputs is not None and entry.variant.restore is None:
            _check_replay(entry, check, clock)

    each(prepare)
    seconds = plan.sustain_s if large else plan.short_s

    def sustain(entry: Entry) -> None:
        # A call longer than the stretch is still timed three times; cheap calls stop at the stretch.
        samples, mhz = clock.stretch(entry.prepared, seconds)
        # The first third belongs to the regime of whoever ran before.
        entry.samples += samples[len(samples) // 3 :] if large else samples
        entry.clocks += [mhz] if mhz is not None else []

    for turn in range(plan.rounds):
        each(sustain, turn)

    if large and clock.bursts:

        def burst(entry: Entry) -> None:
            entry.bursts.append(clock.burst(entry.prepared, plan.pause_s))

        for turn in range(plan.bursts):
            each(burst, turn)

    for entry in entries:
        if entry.error is None:
            _summarise(entry, seconds, large)
        entry.prepared = None


def guarded(entry: Entry, step: Callable[[Entry], None], clock: CpuTimer | CudaTimer) -> None:
    """Run ``step``; an exception becomes the entry's error.

    Raises:
        DeviceLost: when the device does not answer afterwards.
    """
    try:
        step(entry)
    except gate.GateError as error:
        entry.error = f"wrong result: {error}"
    except Exception as error:
        entry.error = first_line(error)
        still_there(clock, error)


def still_there(clock: CpuTimer | CudaTimer, error: BaseException) -> None:
    """Raise DeviceLost when ``error`` took the device with it."""
    try:
        clock.synchronize()
    except Exception as lost:
        raise DeviceLost(first_line(error)) from lost


def pick(variants: list[Variant], clock: CpuTimer | CudaTimer) -> tuple[Variant, dict[str, float]]:
    """The fastest of several variants by short trials, and every trial's ms per call by label."""
    if len(variants) == 1:
        return variants[0], {}
    by_label = {variant.label: variant for variant in variants}
    trials: dict[str, float] = {}

    def attempt(label: str) -> float | None:
        try:
            return clock.trial(by_label[label])
        except Exception as error:
            still_there(clock, error)
            return None

    for label in by_label:
        ms = attempt(label)
        if ms is not None:
            trials[label] = ms
    if not trials:
        return variants[0], {}
    for label in sorted(trials, key=trials.__getitem__)[:FINALISTS]:
        again = [attempt(label) for _ in range(4)]
        trials[label] = statistics.median([trials[label], *(ms for ms in again if ms is not None)])
    best = min(sorted(trials, key=trials.__getitem__)[:FINALISTS], key=trials.__getitem__)
    return by_label[best], trials


def _check_replay(entry: Entry, check: Callable[[dict[str, torch.Tensor]], str | None], clock: Any) -> None:
    """The gate on what the very replay that is timed writes, into memory that held NaN before.

    Calls that change their inputs are gated eagerly only, from restored inputs.
    """
    outputs = entry.prepared.outputs[0]
    tensors = [t for t in (outputs if isinstance(outputs, tuple | list) else (outputs,)) if torch.is_tensor(t)]
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
    entry.prepared.run()
    clock.synchronize()
    check(entry.variant.canon(entry.prepared.outputs[0]))


def _summarise(entry: Entry, seconds: float, large: bool) -> None:
    samples = sorted(entry.samples)
    p20, p80 = (samples[round(q * (len(samples) - 1))] for q in (0.2, 0.8))
    entry.values["gpu_ms"] = statistics.median(samples)
    entry.notes.insert(0, spread_note(p20, p80))
    if entry.bursts:
        entry.values["burst_ms"] = statistics.median(entry.bursts)
    if large:
        entry.notes.append(f"sustained {seconds:.2f} s a round")
    if entry.clocks:
        entry.notes.append(f"{statistics.median(entry.clocks) / 1e3:.2f} GHz")


class Budget:
    """How much effort the cases to come can have, from the seconds that are left and what earlier cases took.

    A case costs a preparation (data, float64 results, compilation, search over algorithms), learnt by suite from the cases
    already run, and its measurement, which scales with effort. The clock runs from ``start`` (``time.perf_counter``): a
    process that has already spent seconds on importing torch says so.
    """

    FIRST_GUESS = {"linear": 1.0, "model": 8.0, "topology": 1.5, "prune": 1.0, "pack": 0.7, "optimizer": 0.7, "host": 1.0}

    def __init__(
        self, seconds: float | None, effort: float = 1.0, plan: Plan = FULL, start: float | None = None
    ) -> None:
        self.seconds, self.most, self.plan = seconds, effort, plan
        self.start = time.perf_counter() if start is None else start
        self._preparation: dict[str, list[float]] = {}

    @property
    def left(self) -> float | None:
        return None if self.seconds is None else self.seconds - (time.perf_counter() - self.start)

    def preparation(self, suite: str) -> float:
        seen = self._preparation.get(suite)
        return statistics.fmean(seen[-6:]) if seen else self.FIRST_GUESS[suite]

    def learn(self, suite: str, case_s: float, measured_s: float) -> None:
        self._preparation.setdefault(suite, []).append(max(0.0, case_s - measured_s))

    def next(self, pending: list[tuple[str, bool, int]]) -> Plan | None:
        """The plan for the first of ``pending`` (suite, large, providers), or None when there is no time for it."""
        if self.left is None:
            return self.plan.scaled(self.most) if self.most < 1 else self.plan
        least = self.plan.scaled(LEAST_EFFORT)
        suite, large, providers = pending[0]
        if self.left < self.preparation(suite) + least.seconds(large, providers):
            return None
        fixed = sum(self.preparation(s) for s, _, _ in pending)
        wish = sum(self.plan.seconds(large, providers) for _, large, providers in pending)
        effort = min(self.most, max(LEAST_EFFORT, (self.left - fixed) / max(wish, 1e-9)))
        return self.plan.scaled(effort) if effort < 1 else self.plan
