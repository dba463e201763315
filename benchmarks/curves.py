"""Loss curves of one training run on one GPU and on several, at the same global batch.

::

    python -m benchmarks.curves --models 60m,1b --world 2                                  # whole Llamas of `chts pretrain`
    python -m benchmarks.curves --models tiny --world 2 --device cpu --steps 6 --interval 2   # tries the script itself

Each model trains with CHTs24 four times: alone; alone with other micro-batches, which is the same mathematics in another order of
summation and so the noise that any change of hardware brings; under DDP; under FSDP2. Where there are several processes they
compare checksums of all pattern ids after every update, and the run ends with an error when ranks differ. Every run starts from
the same seed and sees the same batches: only rounding can part them.

A row (op "curve") has in its ``note`` the held-out loss at the end and, against the run alone, the mean and the largest difference
of the losses of all steps, and the largest difference of an update's turnover. ``gpu_ms`` stays empty: steps are not timed here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.distributed import open_results, spell
from benchmarks.paper.arms import unpacked
from benchmarks.paper.protocol import ROOT, Places
from benchmarks.results import Row
from chts_train.configs import PRESETS, RunConfig, preset
from chts_train.metrics import METRICS, read_metrics
from chts_train.parallel import joined, leave_at_once
from chts_train.settings import COMPILE, Settings
from chts_train.trainer import Trainer

KINDS = ("single", "reordered", "ddp", "fsdp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; "worker" is what it starts for each run."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    worker = arguments[:1] == ["worker"]
    parser = _parser()
    options = parser.parse_args(arguments[worker:])
    for model in options.models.split(","):
        if model not in PRESETS:
            parser.error(f"--models: must be of {', '.join(PRESETS)}, got {model!r}")
    if options.world < 2 or options.batch % options.world:
        parser.error(f"--world: must be at least 2 and divide --batch {options.batch}, got {options.world}")
    if worker:
        return _train(options)
    cuda = options.device != "cpu" and torch.cuda.is_available()
    if cuda and torch.cuda.device_count() < options.world:
        parser.error(f"--world: must be at most the {torch.cuda.device_count()} GPUs of this host, got {options.world}")
    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep: must not exist yet, got {options.keep}")
    results = open_results(options.out)
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            if options.text is None:
                options.text = json.dumps(unpacked(Places.find(options.data, "reduced"), home).text)
            for kinds in (("single", "reordered"), ("ddp",), ("fsdp",)):  # the first two side by side, a GPU each
                _start(options, model, kinds, home, cuda)
            curves = {kind: list(read_metrics(home / kind / METRICS)) for kind in KINDS}
            rows = [_row(options, model, kind, curves, cuda) for kind in KINDS]
            results.replace(rows)
            results.save()
            if options.keep is not None:
                for kind in KINDS:
                    shutil.copytree(home / kind, options.keep / f"{model}-{kind}")
            if not isinstance(json.loads(options.text), str):
                options.text = None  # unpacked into the folder that goes now
        for row in rows:
            print(f"{model:6} {row.shape['kind']:9} {row.note}", flush=True)
    print(f"results: {results.path}", flush=True)
    return 0


def differences(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How far two logs of one run (the lines of metrics.jsonl) are apart.

    Returns:
        ``mean_difference`` and ``largest_difference`` of the training losses (nats), ``largest_turnover_difference``, ``updates``.

    Raises:
        AssertionError: they have other steps or updates.
    """
    logs = [{kind: {r["step"]: r for r in log if r["kind"] == kind} for kind in ("train", "update")} for log in (ours, theirs)]
    for kind in ("train", "update"):
        steps = [sorted(log[kind]) for log in logs]
        if steps[0] != steps[1]:
            raise AssertionError(f"{kind} lines: must be of the same steps, got {steps[0]} and {steps[1]}")
    a, b = logs
    loss = [abs(a["train"][step]["loss"] - b["train"][step]["loss"]) for step in a["train"]]
    turnover = [abs(a["update"][step]["turnover"] - b["update"][step]["turnover"]) for step in a["update"]]
    return {
        "mean_difference": statistics.fmean(loss), "largest_difference": max(loss),
        "largest_turnover_difference": max(turnover, default=0.0), "updates": len(turnover),
    }  # fmt: skip


def config_of(options: argparse.Namespace, model: str, kind: str) -> RunConfig:
    """The run: a preset shortened to ``--steps``, with the same global batch for every kind."""
    base, share = preset(model), options.batch // options.world
    text = json.loads(options.text)
    spec = text if isinstance(text, str) else tuple(text)
    data = replace(base.data, spec=spec, vocab=None if isinstance(spec, str) else 16_384)
    return replace(
        base, data=data, total_steps=options.steps, batch_size=options.batch, interval=options.interval,
        micro_batch=options.batch if kind == "reordered" else share, warmup_steps=max(1, options.steps // 10),
        eval_interval=options.steps, eval_tokens=4096,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m benchmarks.curves", description=__doc__.splitlines()[0])
    p.add_argument("--models", default="60m", help="comma-separated presets of `chts pretrain`")
    p.add_argument("--world", type=int, default=2, help="processes of the runs under DDP and FSDP2")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--interval", type=int, default=20, help="steps between topology updates")
    p.add_argument("--batch", type=int, default=64, help="sequences of a step, of all processes together")
    p.add_argument("--data", type=Path, help="folder with the books pack; default runs/data, else the standard library's text")
    p.add_argument("--compile", default="blocks", choices=COMPILE[1:3], help="of all runs: off or blocks")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--keep", type=Path, help="a new folder for the runs' logs, which are otherwise thrown away")
    p.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/distributed/<gpu>.json")
    for name in ("text", "into", "kind"):
        p.add_argument(f"--{name}", help=argparse.SUPPRESS)  # told to workers
    return p


def _start(options: argparse.Namespace, model: str, kinds: Sequence[str], home: Path, cuda: bool) -> None:
    """Train the runs of these kinds side by side.

    Raises:
        RuntimeError: one failed; with the end of what it printed.
    """
    jobs: dict[str, subprocess.Popen[bytes]] = {}
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    with contextlib.ExitStack() as files:
        for place, kind in enumerate(kinds):
            (home / kind).mkdir()
            several = kind in ("ddp", "fsdp")
            start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(options.world), "-m"] if several else []
            settings = {
                "models": model, "kind": kind, "into": home / kind, "text": options.text, "device": options.device,
                **{key: getattr(options, key) for key in ("world", "steps", "interval", "batch", "compile")},
            }  # fmt: skip
            command = [f"--{key}={value}" for key, value in settings.items()]
            threads = str(max(1, (os.cpu_count() or 1) // max(len(kinds), options.world if several else 1)))
            more = {} if several or not cuda else {"CUDA_VISIBLE_DEVICES": devices[place] if devices else str(place)}
            log = files.enter_context(open(home / f"{kind}.log", "wb"))
            jobs[kind] = subprocess.Popen(
                [sys.executable, "-m", *start, "benchmarks.curves", "worker", *command], cwd=ROOT, stdout=log,
                stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": threads, **more},
            )  # fmt: skip
        try:
            for kind, job in jobs.items():
                if job.wait():
                    text = (home / f"{kind}.log").read_text(errors="replace")
                    raise RuntimeError(f"{model}, {kind}: must end with status 0, got {job.returncode}: {text[-3000:]}")
        finally:
            for job in jobs.values():
                job.terminate()
                job.wait()


def _train(options: argparse.Namespace) -> int:
    """One run in this process: alone, or as one of those that ``torchrun`` started."""
    several = options.kind in ("ddp", "fsdp")
    with joined(options.device):
        settings = Settings(
            device=options.device, log_interval=1, quiet=True, compile=options.compile, checkpoints=False,
            parallel=options.kind if several else "auto",
        )  # fmt: skip
        Trainer(config_of(options, options.models, options.kind), options.into, settings).train()
    leave_at_once(0)
    return 0


def _row(
    options: argparse.Namespace, model: str, kind: str, curves: Mapping[str, Sequence[Mapping[str, Any]]], cuda: bool
) -> Row:
    facts = {} if kind == "single" else differences(curves[kind], curves["single"])
    facts["val_loss"] = next(line["val_loss"] for line in reversed(curves[kind]) if line["kind"] == "eval")
    world = options.world if kind in ("ddp", "fsdp") else 1
    text = json.loads(options.text)
    data = text if isinstance(text, str) else ", ".join(Path(name).name for name in text)
    settings = f"{options.steps} steps of {options.batch} sequences, updates every {options.interval}, {data}"
    note = f"world {world}, {kind}; {settings}" + ", blocks compiled" * (options.compile == "blocks")
    shape = {"model": model, "kind": kind, "world": world}
    dtype = "bf16" if cuda else "fp32"  # what "auto" is for a preset's precision
    return Row("distributed", "curve", shape, dtype, "chts", "auto", note=f"{note}; {spell(facts)}")


if __name__ == "__main__":
    sys.exit(main())
