"""The loop over cases: build, gate, measure, write. Whatever goes wrong with one provider becomes its row."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks import providers
from benchmarks.cases import Case
from benchmarks.cost import is_large
from benchmarks.measure import Budget, Entry, Plan, guarded, measure, pick, still_there
from benchmarks.problems import Problem, make
from benchmarks.results import ASKED, NOT_OFFERED, Results, Row
from benchmarks.timing import CpuTimer, CudaTimer, first_line, timer


@dataclass
class Options:
    """What a command line decides. ``dead``: (case id, provider) that ended an earlier process."""

    impl: str = "auto"
    only: Sequence[str] = ()
    dead: set[tuple[str, str]] = field(default_factory=set)
    quick: bool = False

    def providers(self, case: Case) -> list[str]:
        names = [name for name in providers.names(case) if not self.only or name in self.only]
        # Compilation takes tens of seconds: full runs only, or when it is asked for.
        return [name for name in names if name != "compile" or not self.quick or name in self.only]


def run(
    cases: Sequence[Case],
    results: Results,
    device: torch.device,
    budget: Budget,
    options: Options,
    *,
    running: Callable[[Case, str], None] = lambda case, provider: None,
    report: Callable[[Case, list[Row]], None] = lambda case, rows: None,
) -> list[Case]:
    """Measure ``cases`` and keep their rows, saving after each.

    Args:
        running: told which provider's code is about to run, so that somebody can tell who ended the process.
        report: told a case's rows when it is finished.

    Returns:
        The cases for which there was no time.

    Raises:
        DeviceLost: when the device stopped answering; the rows of finished cases are safe.
    """
    clock = timer(device)
    for index, case in enumerate(cases):
        pending = [(c.suite, is_large(c), len(options.providers(c))) for c in cases[index:]]
        plan = budget.next(pending)
        if plan is None:
            return list(cases[index:])
        start = time.perf_counter()
        rows = _case(case, device, clock, plan, options, running)
        budget.learn(case.suite, time.perf_counter() - start, plan.seconds(*pending[0][1:]))
        results.replace(rows)
        results.save()
        report(case, rows)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # captured graphs hold pools that nothing else can use
    return []


def _case(
    case: Case,
    device: torch.device,
    clock: CpuTimer | CudaTimer,
    plan: Plan,
    options: Options,
    running: Callable[[Case, str], None],
) -> list[Row]:
    names = [name for name in options.providers(case) if (case.id, name) not in options.dead]
    note = ASKED if options.impl != "auto" else ""
    try:
        running(case, "")
        problem = make(case, device)
    except Exception as error:
        still_there(clock, error)
        reason = f"the inputs could not be made: {first_line(error)}"
        return [_row(case, name, options.impl, error=reason, note=note) for name in names]
    rows: dict[str, Row] = {}
    entries: list[Entry] = []
    for name in names:
        running(case, name)
        try:
            found = prepare(problem, name, clock, options.impl)
        except providers.Unavailable as reason:
            offered = "; ".join(filter(None, [NOT_OFFERED, note]))
            rows[name] = _row(case, name, options.impl, error=str(reason), note=offered)
            continue
        if isinstance(found, str):
            rows[name] = _row(case, name, options.impl, error=found, note=note)
        else:
            entries.append(found)

    def before(provider: str) -> None:
        running(case, provider)

    measure(
        entries, problem.check, clock, plan, large=is_large(case), host_only=case.suite == "host", before=before
    )  # fmt: skip
    for entry in entries:
        notes = "; ".join(filter(None, [*entry.notes, note if entry.provider == "chts" else ""]))
        values = {} if entry.error else entry.values
        asked = options.impl if entry.provider == "chts" and note else None
        impl = asked or entry.variant.impl
        rows[entry.provider] = Row.of(case, entry.provider, impl=impl, error=entry.error, note=notes, **values)
    return [rows[name] for name in names]


def _row(case: Case, provider: str, impl: str, *, error: str, note: str) -> Row:
    if provider != "chts":
        note = note.removesuffix(ASKED).removesuffix("; ")
    return Row.of(case, provider, impl=impl if ASKED in note else None, error=error, note=note)


def prepare(problem: Problem, name: str, clock: CpuTimer | CudaTimer, impl: str) -> Entry | str:
    """The provider's fastest right variant, ready to be measured, or why there is none.

    Raises:
        Unavailable: when the provider does not offer this at all.
    """
    try:
        variants = providers.builder(name)(problem, impl)
    except providers.Unavailable:
        raise
    except Exception as error:
        still_there(clock, error)
        return first_line(error)
    right, remarks, wrong = [], {}, []
    for variant in variants:
        attempt = Entry(name, variant)

        def gated(entry: Entry) -> None:
            if entry.variant.restore is not None:
                entry.variant.restore()
            output = entry.variant.calls[0]()
            clock.synchronize()
            remarks[entry.variant.label] = problem.check(entry.variant.canon(output))

        guarded(attempt, gated, clock)
        if attempt.error is None:
            right.append(variant)
        else:
            wrong.append((variant.label, attempt.error))
    if not right:
        if len(wrong) == 1:
            return wrong[0][1]
        return f"none of {len(wrong)} variants: " + "; ".join(f"{label}: {error}" for label, error in wrong[:3])
    best, trials = pick(right, clock)
    entry = Entry(name, best, [remark for remark in (best.label, remarks.get(best.label)) if remark])
    if len(variants) > 1:
        entry.notes.append(f"best of {len(variants)} variants" + (f", {len(wrong)} of them wrong" if wrong else ""))
    if 1 < len(trials) <= 3:
        entry.notes.append("trials " + ", ".join(f"{label} {ms:.4g} ms" for label, ms in trials.items()))
    return entry
