"""A run in words: what is about to run, how it ended, what to do next."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .linear import sparse_layers
from .progress import count, duration
from .runs import SUMMARY, size_of
from .storage import write_json

if TYPE_CHECKING:
    from .trainer import Outcome, Trainer

FIGURES = {"val_ppl": "perplexity {:.4g}", "val_accuracy": "accuracy {:.2%}"}


def spell(figures: dict[str, float]) -> str:
    """The figures of an evaluation: loss, and perplexity or accuracy."""
    parts = [form.format(figures[key]) for key, form in FIGURES.items() if key in figures]
    return ", ".join([f"loss {figures['val_loss']:.4f}", *parts])


def describe(trainer: Trainer) -> list[str]:
    """What is about to run, in a few lines."""
    config, method = trainer.config, trainer.method
    size = f"{count(trainer.dense_parameters)} parameters"
    if sparse_layers(trainer.model):
        size += f", {count(sum(p.numel() for p in trainer.model.parameters()))} stored"
    if trainer.records:
        made = sum(record.action != "skipped" for record in trainer.records)
        size += f"; {made} linear layers {method.n}:4 ({method.description})"
    on_gpu = trainer.device.type == "cuda"
    place = torch.cuda.get_device_name(trainer.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    if trainer.processes.kind != "single":
        place += f", {trainer.processes.size} processes ({trainer.processes.kind})"
    precision = "bf16 compute over fp32 masters" if trainer.precision == "bf16" else trainer.precision
    passes = f" in {trainer.passes} passes" if trainer.passes > 1 else ""
    lines = [
        f"{config.method} on {config.name}: {size}",
        trainer.task.data.describe(),
        f"{config.total_steps:,} steps of {config.batch_size} {trainer.task.items}{passes}; {place}, {precision}",
        f"run folder {trainer.run}",
    ]
    if trainer.form == "dense" != method.kind:
        lines.append(f"dense for {config.dense_steps:,} steps, then pruned to {method.n}:4")
    if config.ste_window:
        start, end = config.ste_steps
        lines.append(f"dense weights and masks that follow them from step {start:,} to {end:,}, compressed ones before and after")
    last = math.floor(config.stop_fraction * config.total_steps)
    if trainer.evolver is not None and config.interval > last:
        lines.append(
            f"note: the topology never changes: updates come every {config.interval} steps, the last possible one at "
            f"{last}; lower --interval"
        )
    return lines


def verdict(trainer: Trainer, outcome: Outcome) -> str:
    """The result of a finished run in one line, beside what a model without context reaches."""
    words = trainer.task.verdict(outcome.figures, trainer.baseline)
    return f"{words} after {outcome.step:,} steps, {duration(trainer.counters.seconds)} of training"


def summarise(trainer: Trainer, figures: dict[str, float]) -> None:
    """Write summary.json of a finished run."""
    config, counters = trainer.config, trainer.counters
    facts: dict[str, Any] = {"method": config.method, "preset": config.name, "seed": config.seed, "step": counters.step}
    facts |= {trainer.task.unit: counters.seen, "seconds": round(counters.seconds, 3)}
    if trainer.device.type == "cuda":
        facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
    write_json(trainer.run / SUMMARY, facts | figures | trainer.baseline)


def contents(run: Path) -> list[str]:
    """What is in a run folder, one line per entry."""
    lines = []
    for path in sorted(run.iterdir()):
        if path.name.startswith("."):
            continue
        inside = sorted(p.stem for p in path.glob("[!.]*") if p.suffix == ".png" or p.is_dir()) if path.is_dir() else []
        name = path.name + "/" * path.is_dir()
        lines.append(f"  {name:15} {count(size_of(path)):>6}B   {', '.join(inside)}".rstrip())
    return lines


def next_steps(run: Path, *, finished: bool) -> list[str]:
    """The commands that go on from a run folder."""
    name = shlex.quote(str(run))
    commands = {
        "resume": f"chts pretrain --resume {name}",
        "evaluate": f"chts eval {name}",
        "plot": f"chts plot {name}",
        "export": f"chts export {name}",
    }
    notes = {"resume": "after an interruption: this run is complete" if finished else "goes on where it stopped"}
    width = max(map(len, commands.values()))
    return [
        f"  {what:9} {command:{width}}   {f'({notes[what]})' if what in notes else ''}".rstrip()
        for what, command in commands.items()
    ]
