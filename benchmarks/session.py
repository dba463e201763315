"""One run in one process: open or resume the result file, measure the roofs, run the cases, show the tables."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks import environment, precompile, report, supervise
from benchmarks.cases import Case, select
from benchmarks.console import Screen
from benchmarks.measure import FULL, QUICK_EFFORT, Budget, DeviceLost
from benchmarks.results import ASKED, DIED, Results, Row, resolve_path
from benchmarks.roofs import measure_roofs
from benchmarks.runner import Options, run
from benchmarks.view import View

TAIL_S = 3.0
"""Tables and plots at the end of a run."""


def run_session(arguments: argparse.Namespace, quick_seconds: float, start: float) -> int:
    """Everything behind ``python -m benchmarks``; returns the exit status. The budget's clock runs from ``start``.

    Raises:
        ValueError: when an argument does not fit, or the result file was measured on something else.
    """
    screen = Screen()
    device = environment.device()
    effort = QUICK_EFFORT if arguments.quick else 1.0
    seconds = arguments.budget or (quick_seconds if arguments.quick else None)
    budget = Budget(None if seconds is None else max(0.0, seconds - TAIL_S), effort, FULL, start, bool(arguments.shapes))
    shapes = arguments.shapes
    if device.type == "cpu" and not shapes:
        screen.say("no CUDA device: tiny shapes through the reference implementations, to try the suite itself")
        shapes = ["tiny"]
        budget = Budget(budget.seconds, 0.05, FULL, start)
    cases = select(arguments.suite, shapes, arguments.dtype, quick=arguments.quick)
    twin = device.type == "cpu" or arguments.impl.startswith("mma") or environment.capability() != (9, 0)
    options = Options(arguments.impl, arguments.provider, quick=arguments.quick, twin=twin)

    results, captured = _open(arguments, screen)
    marker = supervise.Marker()
    _bury(results, marker, options, screen)
    options.dead = {(r.case.id, r.provider) for r in results.rows if r.error and r.error.startswith(DIED)}
    todo = [case for case in cases if not results.has(case, options.providers(case), options.impl)]
    screen.say(f"{captured['gpu']}: {len(todo)} cases to measure, {len(cases) - len(todo)} already in {results.path}")
    left: list[Case] = []
    if todo:
        spent = {"start": time.perf_counter() - start}
        spent["compile"] = 0.0
        if not ((options.only and "chts" not in options.only) or supervise.earlier_end()):  # that may have ended the last process
            spent["compile"] = precompile.precompile(todo, options.impl, precompile.jobs(arguments.jobs), say=screen.say)
        before = time.perf_counter()
        roofs = measure_roofs(device, 0.3 * effort)
        spent["roofs"] = time.perf_counter() - before
        session = environment.session(roofs)
        results.environment.setdefault("sessions", []).append(session)
        if roofs:
            rates = f"{roofs['copy_bytes_per_s'] / 1e12:.2f} TB/s copied, {roofs['gemm_flop_per_s'] / 1e12:.0f} TFLOP/s dense"
            screen.say(f"roofs of this machine: {rates} ({roofs['gemm_burst_flop_per_s'] / 1e12:.0f} in a burst)")
        done, count = 0, len(options.jobs(todo, results, split=budget.seconds is not None and not options.quick))

        def finished(case: Case, rows: list[Row], seconds: float) -> None:
            nonlocal done
            done += 1
            spent[case.suite] = spent.get(case.suite, 0.0) + seconds
            session["seconds"] = {name: round(value, 1) for name, value in spent.items()}
            screen.case(done, count, case, rows, seconds, time.perf_counter() - start)

        try:
            left = run(
                todo, results, device, budget, options,
                running=lambda case, provider: marker.write(case.id, provider), report=finished,
            )  # fmt: skip
        except DeviceLost as lost:
            screen.say(f"the device stopped answering: {lost}", "bold red")
            return supervise.LOST
        marker.clear()
        session["after"] = environment.state()
        results.save()
        screen.say("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in spent.items()))
    _show(results, cases, screen)
    if not arguments.no_plots and results.rows:
        _plots(results, screen)
    if left:
        jobs = options.jobs(left, results, split=True)
        seconds = sum(budget.need(job.work, FULL) for job in jobs)
        screen.say(
            f"{len(left)} cases were left for lack of time (about {seconds:.0f} s at full length); the same command goes on "
            f"with them", "bold yellow",
        )  # fmt: skip
    screen.say(f"results: {results.path}")
    return 0


def _open(arguments: argparse.Namespace, screen: Screen) -> tuple[Results, dict]:
    captured = environment.capture()
    path = resolve_path(arguments.out, captured["gpu"], quick=arguments.quick)
    if arguments.fresh or not path.exists():
        return Results(captured, [], path), captured
    results = Results.load(path)
    reason = results.mismatch(captured)
    if reason:
        raise ValueError(f"{path} was measured on something else: {reason}. --fresh starts it anew, --out names another")
    if arguments.retry:
        screen.say(f"{results.drop_errors()} rows whose measurement failed will be measured again")
    if not results.rows:
        results.environment = captured
    return results, captured


def _bury(results: Results, marker: supervise.Marker, options: Options, screen: Screen) -> None:
    """Give the provider that ended an earlier process its row."""
    how, found = supervise.earlier_end(), marker.read()
    marker.clear()
    if how is None or found is None:
        return
    case_id, provider = found
    if not provider:
        return
    suite, op, shape, dtype = case_id.split("/")
    case = next((c for c in select([f"{suite}.{op}"], [shape], [dtype]) if c.id == case_id), None)
    if case is None:
        return
    ours = provider == "chts" and options.impl != "auto"
    row = Row.of(
        case, provider, impl=options.impl if ours else None, error=f"{DIED}: it {how}", note=ASKED if ours else ""
    )  # fmt: skip
    results.replace([row])
    results.save()
    screen.say(f"{case_id}: {provider} was running when the process before this one {how}", "bold red")


def _show(results: Results, cases: list[Case], screen: Screen) -> None:
    """The tables of the suites that were asked for; the targets with them."""
    view = View(results)
    for name in dict.fromkeys(["targets", *(case.suite for case in cases)]):
        for table in report.part(name, view):
            screen.table(table)


def _plots(results: Results, screen: Screen) -> None:
    from benchmarks.plots import draw

    path: Path = results.path
    try:
        for plot in draw(results, path.parent, path.stem):
            screen.say(f"plot: {plot}")
    except ModuleNotFoundError as error:
        screen.say(f"no plots: {error}")
