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
    bursts: int = 3
    pause_s: float = 0.06
    eager_s: float = 0.05

    def scaled(self, effort: float) -> Plan:
        """The same with less of everything; ``effort`` in (0, 1].

        Sustained stretches get fewer before they get shorter: a card takes 0.1 s to settle after the provider before, which
        drew another power, and in that time favours whoever draws more. Pauses stay: they make the burst.
        """
        return Plan(
            sustain_s=max(0.04, self.sustain_s * min(1.0, effort / LEAST_EFFORT)),
            short_s=max(0.015, self.short_s * effort),
            rounds=max(1, round(self.rounds * effort)),
            bursts=max(1, round(self.bursts * effort + 0.5)),
            pause_s=self.pause_s,
            eager_s=max(0.01, self.eager_s * effort),
        )

    def seconds(self, large: bool, providers: int) -> float:
        """What measuring a case takes, without preparing it."""
        one = self.rounds * (self.sustain_s if large else self.short_s) + self.eager_s
        return providers * (one + (self.bursts * (self.pause_s + 0.01) if large else 0.0))


FULL = Plan()
QUICK_EFFORT = 0.2
LEAST_EFFORT = 0.4
"""Rather fewer cases than worse figures."""
FINALISTS, CLOSE, FINAL_S = 4, 1.3, 0.02
"""How many of a provider's variants, within which factor of the best, are captured and timed in turns before one is chosen."""
FEW = 3
"""So few variants are all finalists; the row's note tells each one's time."""


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
    """The fastest of several variants, and every trial's ms per call by label.

    A short look at each; the best few are then captured and timed as they will be in the end, in turns.
    """
    if len(variants) == 1:
        return variants[0], {}
    by_label = {variant.label: variant for variant in variants}

    def attempt(step: Callable[[], Any]) -> Any | None:
        try:
            return step()
        except Exception as error:
            still_there(clock, error)
            return None

    looks = {label: attempt(lambda v=v: clock.trial(v)) for label, v in by_label.items()}
    trials = {label: ms for label, ms in looks.items() if ms is not None}
    if not trials:
        return variants[0], {}
    finalists = sorted(trials, key=trials.__getitem__)[:FINALISTS]
    if len(trials) > FEW:
        finalists = [label for label in finalists if trials[label] <= CLOSE * trials[finalists[0]]]
    if len(finalists) > 1:
        ready = {label: attempt(lambda v=by_label[label]: clock.prepare(v, 1)) for label in finalists}
        samples: dict[str, list[float]] = {label: [] for label in finalists if ready[label] is not None}
        for turn in range(2):
            for label in list(samples)[:: -1 if turn else 1]:
                samples[label] += (attempt(lambda p=ready[label]: clock.stretch(p, FINAL_S)) or ([], None))[0]
        trials |= {label: statistics.median(found) for label, found in samples.items() if found}
    return by_label[min(finalists, key=trials.__getitem__)], trials


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


@dataclass(frozen=True)
class Work:
    """What a budget has to know about a case."""

    suite: str
    op: str
    large: bool
    providers: int
    apart: bool = False
    """With the slow providers of :data:`benchmarks.runner.LATE` alone."""
    guess_s: float | None = None
    """What preparing it may take, where :data:`Budget.FIRST_GUESS` does not know."""


class Budget:
    """How much effort the cases to come can have, from the seconds that are left and what earlier cases took.

    A case costs a preparation (data, float64 results, compilation, search over algorithms), learnt from cases of its kind
    that have run, and its measurement, which scales with effort. Where even the least effort does not fit, then with ``shares``
    every suite gets its share of what is left when it begins, and its later cases wait until all suites had their turn; without,
    cases come in their order as far as the time goes. The clock runs from ``start`` (``time.perf_counter``): a process that has
    already spent seconds on importing torch says so.
    """

    FIRST_GUESS = {"linear": 1.0, "model": 15.0, "topology": 1.5, "prune": 1.0, "pack": 0.7, "optimizer": 0.7, "host": 1.0}
    """Seconds."""

    def __init__(
        self, seconds: float | None, effort: float = 1.0, plan: Plan = FULL, start: float | None = None, shares: bool = True
    ) -> None:
        self.seconds, self.most, self.plan, self.shares = seconds, effort, plan, shares
        self.start = time.perf_counter() if start is None else start
        self._preparation: dict[tuple[str, ...], list[float]] = {}
        self._suite: str | None = None
        self._until: float | None = None
        """When the share of the suite that runs is used up, in seconds that are left then; None: it need not end early."""

    @property
    def left(self) -> float | None:
        return None if self.seconds is None else self.seconds - (time.perf_counter() - self.start)

    def preparation(self, work: Work) -> float:
        """Seconds: the mean of the same operation at the same scale, else of the suite, else a guess."""
        for key in self._keys(work):
            if key in self._preparation:
                return statistics.fmean(self._preparation[key][-6:])
        return self.FIRST_GUESS[work.suite] if work.guess_s is None else work.guess_s

    def learn(self, work: Work, case_s: float, measured_s: float) -> None:
        """A case took ``case_s`` in all, of which ``measured_s`` were planned for measuring."""
        for key in self._keys(work):
            self._preparation.setdefault(key, []).append(max(0.0, case_s - measured_s))

    @staticmethod
    def _keys(work: Work) -> list[tuple[str, ...]]:
        """What is learnt from a case, the closest first."""
        kind = f"{work.apart} {work.guess_s}"
        return [(work.suite, work.op, str(work.large), kind), (work.suite, kind)]

    def need(self, work: Work, plan: Plan) -> float:
        return self.preparation(work) + plan.seconds(work.large, work.providers)

    def next(self, pending: list[Work], *, last: bool = False) -> Plan | None:
        """The plan for the first of ``pending``, or None: there is no time for it, or (unless ``last``) not now."""
        if self.left is None:
            return self.plan.scaled(self.most) if self.most < 1 else self.plan
        first, least = pending[0], self.plan.scaled(min(self.most, LEAST_EFFORT))
        if self.left < self.need(first, least) or (self.shares and not last and self._waits(pending, least)):
            return None
        fixed = sum(self.preparation(work) for work in pending)
        wish = sum(self.plan.seconds(work.large, work.providers) for work in pending)
        effort = min(self.most, max(LEAST_EFFORT, (self.left - fixed) / max(wish, 1e-9)))
        return self.plan.scaled(effort) if effort < 1 else self.plan

    def _waits(self, pending: list[Work], least: Plan) -> bool:
        """Whether the first of ``pending`` goes beyond its suite's share; a suite's first case never does."""
        first = pending[0]
        if first.suite != self._suite:
            total = sum(self.need(work, least) for work in pending)
            mine = sum(self.need(work, least) for work in pending if work.suite == first.suite)
            self._suite, self._until = first.suite, None if total <= self.left else self.left * (1 - mine / total)
            return False
        return self._until is not None and self.left - self.need(first, least) < self._until
