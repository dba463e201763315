"""The command line: run (the default), compare two result files, report into README.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import supervise
from benchmarks.cases import DTYPES, LINEAR_SETS, MODELS, OPS

DESCRIPTION = """\
Benchmarks of chts against dense cuBLAS, cuSPARSELt, torch's 2:4 path and eager torch, all gated against float64 on the
tensors that are timed. Results go to benchmarks/results/<gpu>.json after every case; a second run continues there.

  python -m benchmarks                                 the figures of record (about ten minutes on an H100)
  python -m benchmarks --quick                         a bit of everything in 150 seconds
  python -m benchmarks --suite linear --shapes S,L     the products, with geometric means and targets
  python -m benchmarks --suite topology                updates against Algorithm 1 in eager torch
  python -m benchmarks compare OLD.json NEW.json       regressions
  python -m benchmarks merge A.json B.json --out C.json   parts of one measurement into one file
  python -m benchmarks report                          tables on screen, in README.md, and plots, from the result files
"""
QUICK_SECONDS = 150.0
START = time.perf_counter()
"""When this process began, nearly: torch is not imported yet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else "run"
    rest = arguments[1:] if arguments and arguments[0] == command else arguments
    try:
        return COMMANDS[command](rest)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        extra = '; pip install ".[bench]"' if isinstance(error, ModuleNotFoundError) else ""
        print(f"benchmarks: {error}{extra}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Of ``run``."""
    p = argparse.ArgumentParser(
        "python -m benchmarks", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = ", ".join([*LINEAR_SETS, *(m for m in MODELS if m not in LINEAR_SETS), "all"])
    p.add_argument("--suite", type=_list, default=[], help=f"of {', '.join(OPS)}; or one operation: linear.forward")
    p.add_argument("--shapes", type=_list, default=[], help=f"of {sets}; or TOKENSxOUTxIN, or OUTxIN")
    p.add_argument("--dtype", type=_list, default=[], help=f"of {', '.join(DTYPES)} (default bf16)")
    p.add_argument("--impl", default="auto", help="implementation of our operations (default auto)")
    p.add_argument("--provider", type=_list, default=[], help="only these: chts, cublas, ...; what is added later is not interleaved")
    p.add_argument("--quick", action="store_true", help=f"few shapes, short rounds, {QUICK_SECONDS:g} s")
    p.add_argument("--budget", type=float, metavar="SECONDS", help="time per case adapts; what is left is resumed later")
    p.add_argument("--out", help="result file (.json) or folder; default benchmarks/results")
    p.add_argument("--fresh", action="store_true", help="start the result file anew")
    p.add_argument("--retry", action="store_true", help="measure the cases again in which something failed")
    p.add_argument("--jobs", type=int, metavar="N", help="processes that compile kernels ahead (default one a core; 0: none)")
    p.add_argument("--no-plots", action="store_true", help="no PNG files")
    return p


def _run(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if not supervise.is_worker() and supervise.has_gpu():
        budget = options.budget or (QUICK_SECONDS if options.quick else None)
        return supervise.supervise(arguments, budget)
    from benchmarks.session import run_session

    return run_session(options, QUICK_SECONDS, START)


def _compare(arguments: Sequence[str]) -> int:
    p = argparse.ArgumentParser("python -m benchmarks compare", description="Exit status 1 where B lost against A.")
    p.add_argument("a", metavar="A.json", type=Path)
    p.add_argument("b", metavar="B.json", type=Path)
    p.add_argument("--threshold", type=float, default=5.0, help="per cent that count as a change (default 5)")
    p.add_argument("--absolute", action="store_true", help="compare times instead of speed-ups over cuBLAS or eager")
    options = p.parse_args(arguments)
    from benchmarks.compare import compare
    from benchmarks.console import Screen
    from benchmarks.results import Results

    tables, lost = compare(Results.load(options.a), Results.load(options.b), options.threshold, options.absolute)
    screen = Screen()
    for table in tables:
        screen.table(table)
    return 1 if lost else 0


def _merge(arguments: Sequence[str]) -> int:
    p = argparse.ArgumentParser(
        "python -m benchmarks merge", description="One file from several of one card model, driver and kernels; later rows win."
    )
    p.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    p.add_argument("--out", required=True, type=Path)
    options = p.parse_args(arguments)
    from benchmarks.results import Results

    whole, *others = [Results.load(path) for path in options.files]
    for other in others:
        whole.add(other)
    whole.path = options.out
    whole.save()
    return 0


def _report(arguments: Sequence[str]) -> int:
    p = argparse.ArgumentParser("python -m benchmarks report", description="Tables and plots from result files.")
    p.add_argument("files", nargs="*", type=Path, help="shown on screen only; default: the committed files, into README.md")
    p.add_argument("--check", action="store_true", help="change nothing; exit status 1 when README.md is out of date")
    p.add_argument("--no-plots", action="store_true", help="no PNG files")
    options = p.parse_args(arguments)
    from benchmarks import report
    from benchmarks.console import Screen
    from benchmarks.results import Results
    from benchmarks.view import View

    screen = Screen()
    files = options.files or report.committed()
    if options.check:
        stale = report.stale()
        for document in stale:
            screen.say(f"{document}: its tables are not what the result files say; run `python -m benchmarks report`")
        return 1 if stale else 0
    if not files:
        screen.say("no result files yet: run `python -m benchmarks` on a GPU first")
    for path in files:
        results = Results.load(path)
        for table in report.part("all", View(results)):
            screen.table(table)
        if not options.no_plots:
            from benchmarks.plots import draw

            for plot in draw(results, path.parent, path.stem):
                screen.say(f"plot: {plot}")
    if not options.files:
        for document in report.write(files):
            screen.say(f"updated: {document}")
    return 0


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


COMMANDS = {"run": _run, "compare": _compare, "merge": _merge, "report": _report}
