"""The command line: run arms (the default), ``report``, ``merge``, ``flops``; ``worker`` is what a run starts for each arm."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
The paper's experiments at the scale that one GPU allows. An invocation trains for --minutes and stops at checkpoints; the
next one goes on. Finished arms accumulate in benchmarks/results/paper/table<N>.json.

  python -m benchmarks.paper --table 1 --jobs 4          every arm of table 1 on seeds 0, 1, 2, four at a time
  python -m benchmarks.paper --table 2 --figure 3 4      the ablation; runs that table 1 has made are taken from there
  python -m benchmarks.paper --table 1 --arms dense chts24 --seeds 0
  python -m benchmarks.paper --table 1 --arms chts24 --set lr_ramp_steps=0       another setting beside the table's
  python -m benchmarks.paper report                      tables, report.md, figures; --scale tiny for tests' results
  python -m benchmarks.paper merge FOLDER ...            take the rows of other --out folders (other GPUs, other machines)
  python -m benchmarks.paper flops                       Appendix J
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 1 when an arm failed, 2 for a wrong call."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else "run"
    rest = arguments[1:] if arguments and arguments[0] == command else arguments
    try:
        return COMMANDS[command](rest)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"benchmarks.paper: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Of ``run``."""
    from benchmarks.paper.protocol import FIGURES, GROUPS, SEEDS, TABLES
    from benchmarks.paper.results import FOLDER

    p = argparse.ArgumentParser(
        "python -m benchmarks.paper", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--table", type=int, nargs="+", default=[], choices=list(TABLES), help="train what these tables show")
    p.add_argument("--figure", type=int, nargs="+", default=[], choices=list(FIGURES), help="likewise; then draw them")
    p.add_argument("--minutes", type=float, default=9.0, help="stop after so long, start-up included (default 9)")
    p.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    p.add_argument("--arms", nargs="+", default=[], metavar="METHOD", help="only these methods (also others than the table's)")
    p.add_argument("--model", nargs="+", default=list(GROUPS), choices=GROUPS, help="only what trains these (default both)")
    p.add_argument("--jobs", type=int, default=1, help="arms that share the GPU, a process each (default 1; 0: in this process)")
    p.add_argument("--out", type=Path, default=FOLDER, help="folder of the result files (default benchmarks/results/paper)")
    _shared(p)
    return p


def _shared(p: argparse.ArgumentParser) -> None:
    from benchmarks.paper.protocol import SCALES
    from chts_train.settings import COMPILE

    p.add_argument("--compile", default="auto", choices=COMPILE, help="of the training (chts pretrain --help); default auto: CUDA graphs")
    p.add_argument("--whole-arms", action="store_true", help="begin no arm that may not fit into the time left, and save no checkpoints: "
                   "for machines whose disks do not stay")  # fmt: skip
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other values for fields of the arms' configs; such arms have "
                   "rows of their own, and names like chts24+lr_ramp_steps=0")  # fmt: skip
    p.add_argument("--scale", choices=SCALES, default="reduced")
    p.add_argument("--runs", type=Path, default=Path("runs/paper"), help="folder of the run folders (default runs/paper)")
    p.add_argument("--data", type=Path, help="folder with the books pack and cifar10_jpeg.npz; default runs/data")


def _run(arguments: Sequence[str]) -> int:
    start = time.monotonic()  # torch is not imported yet: nearly when the process began
    options = parser().parse_args(arguments)
    from benchmarks import environment
    from benchmarks.paper import schedule
    from benchmarks.paper.arms import unpacked
    from benchmarks.paper.protocol import FIGURES, TABLES, Places, method_name, protocol_of
    from benchmarks.paper.results import Paper, path_of

    tables = sorted({*options.table, *(FIGURES[figure] for figure in options.figure)})
    if not tables:
        raise ValueError("--table or --figure: must name at least one")
    if options.jobs < 0 or options.minutes <= 0:
        raise ValueError(f"--jobs must be at least 0 and --minutes positive, got {options.jobs} and {options.minutes:g}")
    places = Places.find(options.data, options.scale)
    text = places.text if isinstance(places.text, str) else ", ".join(Path(name).name for name in places.text)
    print(f"data: {text}; images: {Path(places.images).name}", flush=True)
    home = options.runs.resolve()
    facts = environment.capture()
    files = []
    for table in tables:
        path = path_of(options.out, table, options.scale)
        files.append(Paper.open(path, table, protocol_of(table, options.scale, places, options.model)))
        files[-1].environment = facts
    plan = schedule.Plan(
        files, options.seeds, [method_name(name) for name in options.arms], options.scale, places,
        unpacked(places, home), home,
        {key: facts.get(key) for key in ("gpu", "commit", "kernel_hash", "torch")},
        lambda text: print(f"{time.monotonic() - start:6.1f} s  {text}", flush=True), compile=options.compile, whole=options.whole_arms,
        models=options.model, changes=_changes(options.set),
    )  # fmt: skip
    for table in TABLES:  # also runs that another table has made
        if (path := path_of(options.out, table, options.scale)).exists():
            plan.learn(Paper.load(path).rows)
    failed = schedule.run(plan, start + 60 * options.minutes, options.jobs, options.data)
    for line in failed:
        print(line, file=sys.stderr)
    left = plan.left()
    print(f"{left} arm(s) left; call again to go on" if left else "complete", flush=True)
    if options.figure:
        from benchmarks.paper.figures import draw

        for file in draw(options.out, options.scale, options.figure):
            print(f"plot: {file}")
    return 1 if failed else 0


def _changes(texts: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """KEY=VALUE as pairs sorted by key; values are JSON where they are JSON, else text.

    Raises:
        ValueError: not of that form, a field that arms set themselves, or one within another.
    """
    from benchmarks.paper.protocol import hashable

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier() or key in ("method", "seed", "srste_lambda", "name", "model", "data", "task"):
            raise ValueError(f"--set: must be KEY=VALUE with a field of the config that arms do not set themselves, got {text!r}")
        try:
            found[key] = hashable(json.loads(value))
        except ValueError:
            found[key] = value
    return tuple(sorted(found.items()))


def _worker(arguments: Sequence[str]) -> int:
    p = argparse.ArgumentParser("python -m benchmarks.paper worker")
    p.add_argument("--group", required=True)
    p.add_argument("--method", required=True)
    p.add_argument("--seed", type=int, required=True)
    p.add_argument("--decay", type=float)
    _shared(p)
    options = p.parse_args(arguments)
    from benchmarks.paper.arms import train_arm, unpacked
    from benchmarks.paper.protocol import Arm, Places

    places = Places.find(options.data, options.scale)
    arm = Arm(options.group, options.method, options.seed, options.decay, _changes(options.set))
    train_arm(arm, options.scale, unpacked(places, options.runs), options.runs, compile=options.compile, whole=options.whole_arms)
    return 0


def _report(arguments: Sequence[str]) -> int:
    from benchmarks.paper.protocol import SCALES
    from benchmarks.paper.results import FOLDER

    p = argparse.ArgumentParser("python -m benchmarks.paper report", description="Tables on screen, report.md and figures.")
    p.add_argument("--out", type=Path, default=FOLDER, help="folder of the result files, and of what is written")
    p.add_argument("--scale", choices=SCALES, default="reduced")
    p.add_argument("--no-plots", action="store_true", help="no PNG files")
    options = p.parse_args(arguments)
    from benchmarks.paper.report import write

    return write(options.out, options.scale, plots=not options.no_plots)


def _merge(arguments: Sequence[str]) -> int:
    from benchmarks.paper.protocol import SCALES, TABLES
    from benchmarks.paper.results import FOLDER, Paper, path_of

    p = argparse.ArgumentParser("python -m benchmarks.paper merge", description="Take the rows of result files in other folders.")
    p.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="with table1.json and so on")
    p.add_argument("--out", type=Path, default=FOLDER, help="folder of the result files that grow")
    p.add_argument("--scale", choices=SCALES, default="reduced")
    options = p.parse_args(arguments)
    found = [(n, folder) for folder in options.folders for n in TABLES if path_of(folder, n, options.scale).exists()]
    if not found:
        raise FileNotFoundError(f"FOLDER: must hold result files such as {path_of(Path(), 1, options.scale)}, got {options.folders}")
    others = [(number, Paper.load(path_of(folder, number, options.scale))) for number, folder in found]
    files: dict[int, Paper] = {}
    for number, other in others:  # all are opened, and refused, before any is written
        held = files.get(number)
        if held is None:
            held = files[number] = Paper.open(path_of(options.out, number, options.scale), number, other.protocol)
        held.take(other)
    for number, file in files.items():
        file.save()
        print(f"{file.path}: {len(file.rows)} rows (table {number})")
    return 0


def _flops(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser("python -m benchmarks.paper flops", description="Appendix J.").parse_args(arguments)
    from benchmarks.console import Screen
    from benchmarks.paper.flops import tables

    for table in tables():
        Screen().table(table)
    return 0


COMMANDS = {"run": _run, "report": _report, "merge": _merge, "flops": _flops, "worker": _worker}

if __name__ == "__main__":
    sys.exit(main())
