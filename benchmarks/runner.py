"""The loop over cases: build, gate, measure, write. Whatever goes wrong with one provider becomes its row."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks import providers
from benchmarks.cases import COMPILED, Case
from benchmarks.cost import is_large
from benchmarks.measure import FEW, Budget, Entry, Plan, Work, guarded, measure, pick, still_there
from benchmarks.problems import Problem, make, rotation_note
from benchmarks.results import APART, ASKED, NOT_OFFERED, Results, Row, trials_note
from benchmarks.timing import CpuTimer, CudaTimer, first_line, timer

LATE = ("torch24", "compile", "chts_compile")
"""Long to prepare, and less asked for than the others."""
COMPILING, COMPILING_S = ("compile", "chts_compile"), 25.0


@dataclass(frozen=True)
class Job:
    """A case and those of its providers that are measured together."""

    case: Case
    names: list[str]
    apart: bool = False

    @property
    def work(self) -> Work:
        guess = COMPILING_S if set(COMPILING) & set(self.names) else None
        return Work(self.case.suite, self.case.op, is_large(self.case), len(self.names), self.apart, guess)


@dataclass
class Options:
    """What a command line decides. ``dead``: (case id, provider) that ended an earlier process."""

    impl: str = "auto"
    only: Sequence[str] = ()
    dead: set[tuple[str, str]] = field(default_factory=set)
    quick: bool = False
    twin: bool = True

    def providers(self, case: Case) -> list[str]:
        """Who takes part: without being asked, what compiles only where :data:`COMPILED` says, and the twin if ``twin``."""
        names = [name for name in providers.names(case) if not self.only or name in self.only]
        d = case.dims
        compiled = not self.quick and (d.get("model") or (d.get("tokens"), d.get("out"), d.get("in"))) in COMPILED
        takes_part = {**dict.fromkeys(COMPILING, compiled), "mma_twin": self.twin}
        return [name for name in names if takes_part.get(name, True) or name in self.only]

    def jobs(self, cases: Sequence[Case], results: Results, *, split: bool) -> list[Job]:
        """What is to do, in order: every case with its providers, as far as there are no rows yet.

        ``split``, for when time may run out: the :data:`LATE` providers of products and models come after everything else.
        """
        early, late = [], []
        for case in cases:
            names = self.providers(case)
            behind = [n for n in names if split and n in LATE and case.suite in ("linear", "model") and not self.only]
            early.append(Job(case, [n for n in names if n not in behind]))
            late.append(Job(case, behind, apart=True))
        late.sort(key=lambda job: "compile" in job.names)
        return [job for job in (*early, *late) if job.names and not results.has(job.case, job.names, self.impl)]


def run(
    cases: Sequence[Case],
    results: Results,
    device: torch.device,
    budget: Budget,
    options: Options,
    *,
    running: Callable[[Case, str], None] = lambda case, provider: None,
    report: Callable[[Case, list[Row], float], None] = lambda case, rows, seconds: None,
) -> list[Case]:
    """Measure ``cases`` and keep their rows, saving after each.

    Args:
        running: told which provider's code is about to run, so that somebody can tell who ended the process.
        report: told a case's rows, and the seconds it took, when it is finished.

    Returns:
        The cases for which there was no time, or not for all of their providers.

    Raises:
        DeviceLost: when the device stopped answering; the rows of finished cases are safe.
    """
    clock = timer(device)
    todo = options.jobs(cases, results, split=budget.seconds is not None and not options.quick)
    for last in (False, True):  # what a suite had no time left for is tried again after all suites
        waiting: list[Job] = []
        works = [job.work for job in todo]
        for index, (job, work) in enumerate(zip(todo, works, strict=True)):
            plan = budget.next(works[index:], last=last)
            if plan is None:
                waiting.append(job)
                continue
            start, case = time.perf_counter(), job.case
            rows = _case(job, device, clock, plan, options, running)
            results.replace(rows)
            results.save()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()  # captured graphs hold pools that nothing else can use
            seconds = time.perf_counter() - start
            budget.learn(work, seconds, plan.seconds(work.large, work.providers))
            report(case, rows, seconds)
        todo = waiting
    return list(dict.fromkeys(job.case for job in todo))


def _case(
    job: Job,
    device: torch.device,
    clock: CpuTimer | CudaTimer,
    plan: Plan,
    options: Options,
    running: Callable[[Case, str], None],
) -> list[Row]:
    case = job.case
    names = [name for name in job.names if (case.id, name) not in options.dead]
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
    rotation = rotation_note(case, problem.sets)
    for entry in entries:
        notes = "; ".join(filter(None, [*entry.notes, rotation, APART if job.apart else "", note if entry.provider == "chts" else ""]))
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
    if 1 < len(trials) <= FEW:
        entry.notes.append(trials_note(trials))
    return entry
