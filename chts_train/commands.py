"""What the commands of ``chts`` do. Each takes parsed options and returns an exit code; errors are raised."""

from __future__ import annotations

import argparse
import json
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from .checkpoint import find_checkpoint, read_checkpoint
from .cli_config import check_resume, configure, data_spec
from .configs import PRESETS, preset
from .export import export_run
from .loading import load_dense, load_run, run_config
from .memory import preset_memory
from .metrics import METRICS, read_metrics
from .parallel import joined
from .plots import plot_runs
from .progress import count
from .report import contents, describe, next_steps, spell, verdict
from .retrain import retrain_config, start_retraining
from .runs import PLOTS, size_of, starting_run
from .settings import Settings, resolve_device, resolve_precision
from .tasks import evaluate, make_task
from .trainer import Trainer


def pretrain(options: argparse.Namespace) -> int:
    """``chts pretrain``"""
    settings = _settings(options)
    with joined(options.device):
        if options.resume is not None:
            check_resume(options)
            if options.out is None:
                return _train(Trainer.resume(options.resume, settings))
            with starting_run("", options.out) as run:
                trainer = Trainer.resume(options.resume, settings, run=run)
            return _train(trainer)
        config = configure(options, preset(options.preset or "tiny"))
        with starting_run(f"{config.name}-{config.method}-s{config.seed}", options.out) as run:
            trainer = Trainer(config, run, settings)
        return _train(trainer)


def retrain(options: argparse.Namespace) -> int:
    """``chts retrain``"""
    settings = _settings(options)
    base = preset(options.preset) if options.preset is not None else None
    with joined(options.device):
        weights, dense, origin = load_dense(options.dense, base)
        config = configure(options, retrain_config(dense))
        return _train(start_retraining(weights, config, origin, out=options.out, settings=settings))


def _settings(options: argparse.Namespace) -> Settings:
    _threads(options)
    return Settings(
        device=options.device,
        log_interval=options.log_interval,
        save_interval=options.save_interval,
        keep=options.keep,
        quiet=options.quiet,
        parallel=options.parallel,
        compile=options.compile,
    )


def _threads(options: argparse.Namespace) -> None:
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads: must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)


def _train(trainer: Trainer) -> int:
    """Train, and say what happened and what can be done next."""
    if not trainer.processes.main:
        return trainer.train().exit_code
    print("\n".join(describe(trainer)), flush=True)
    outcome = trainer.train()
    run = trainer.run
    if not outcome.finished:
        name = signal.Signals(outcome.exit_code - 128).name
        total = trainer.config.total_steps
        print(f"\n{name}: stopped after step {outcome.step:,} of {total:,}, saved {outcome.checkpoint}")
        print("\n".join(["next:", *next_steps(run, finished=False)]))
        return outcome.exit_code
    print(f"\n{verdict(trainer, outcome)}")
    try:
        plot_runs([run], run / PLOTS)
    except ImportError as error:
        print(f"no plots: {error}")
    print("\n".join([f"saved in {run}:", *contents(run), "next:", *next_steps(run, finished=True)]))
    return 0


def eval(options: argparse.Namespace) -> int:  # noqa: A001 - the command's name
    """``chts eval``"""
    _threads(options)
    model, config, checkpoint = load_run(options.run)
    device = resolve_device(options.device)
    if options.data is not None:
        spec = data_spec(options.data)
        spec = tuple(spec) if isinstance(spec, list) else spec
        config = replace(config, data=replace(config.data, spec=spec, vocab=getattr(config.model, "vocab_size", None)))
    config = replace(config, precision=options.precision or config.precision)
    task = make_task(config, config.load_data())
    bf16 = resolve_precision(config.precision, device) == "bf16"
    figures = evaluate(
        task,
        model.to(device),
        device=device,
        autocast=lambda: torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext(),
        limit=options.max_tokens,
    )
    baseline = task.baseline()
    if options.json:
        print(json.dumps({"checkpoint": str(checkpoint.path), "step": checkpoint.step, **figures, **baseline}))
    else:
        print(f"{checkpoint.path}: {config.method} on {config.name}, step {checkpoint.step:,}")
        print(task.data.describe())
        print(f"{task.verdict(figures, baseline)}, loss {figures['val_loss']:.4f}")
    return 0


def export(options: argparse.Namespace) -> int:
    """``chts export``"""
    out = Path(options.out) if options.out is not None else _home(find_checkpoint(options.run)) / "export"
    done = export_run(options.run, out, dtype=options.dtype, packed=options.packed, force=options.force)
    for file in done.files:
        print(f"{file}  {count(size_of(file))}B")
    print(f"{done.parameters:,} parameters, {done.zeros:,} of them zero")
    return 0


def plot(options: argparse.Namespace) -> int:
    """``chts plot``"""
    alone = Path(options.runs[0])
    default = (alone if alone.is_dir() else alone.parent) / PLOTS if len(options.runs) == 1 else Path(PLOTS)
    for file in plot_runs(options.runs, options.out or default):
        print(file)
    return 0


def info(options: argparse.Namespace) -> int:
    """``chts info``"""
    if options.run is None:
        from chts_kernels import capability_report

        print(capability_report())
        return 0
    if options.run in PRESETS and not Path(options.run).exists():
        print(preset_memory(options.run))
        return 0
    checkpoint = read_checkpoint(options.run)
    config = run_config(checkpoint)
    print(f"{checkpoint.path}: verified, step {checkpoint.step:,} of {config.total_steps:,}")
    print(f"{config.method} on {config.name}, seed {config.seed}, data {config.data.spec}")
    if checkpoint.config.get("origin"):
        print("from " + ", ".join(f"{key} {value}" for key, value in checkpoint.config["origin"].items()))
    stored = sum(t.numel() for t in checkpoint.model.values() if t.is_floating_point())
    blocks = sum(t.numel() for name, t in checkpoint.model.items() if name.endswith(".ids"))
    print(f"{stored:,} stored parameters, {blocks:,} blocks in {len(checkpoint.layers)} sparse layers")
    for name, layer in checkpoint.layers.items():
        rows, columns = layer["shape"]
        print(f"  {name:40} {rows} x {columns}  {layer['n']}:4  {rows * columns * layer['n'] // 4:,} links")
    for file in sorted(checkpoint.path.iterdir()):
        print(f"  {file.name:40} {count(size_of(file))}B")
    log = _home(checkpoint.path) / METRICS
    if log.is_file():
        evaluations = [row for row in read_metrics(log) if row["kind"] == "eval"]
        if evaluations:
            print(f"held-out {spell(evaluations[-1])} at step {evaluations[-1]['step']:,}")
    return 0


def _home(checkpoint: Path) -> Path:
    """The run folder of a checkpoint folder."""
    return checkpoint.parent.parent
