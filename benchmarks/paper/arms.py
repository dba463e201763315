"""Running one arm through the library's own trainer, and reading what it left in its run folder."""

from __future__ import annotations

import contextlib
import functools
import lzma
import os
import shutil
import signal
import statistics
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.protocol import REDRAWN, TICKET, Arm, Places, config_of, fingerprint
from chts_kernels import pack, prune
from chts_train import sparse_layers
from chts_train.checkpoint import FOLDER, LATEST
from chts_train.configs import DataConfig, RunConfig
from chts_train.interrupt import GracefulStop
from chts_train.loading import load_dense
from chts_train.methods import get_method
from chts_train.metrics import METRICS, UPDATES, read_metrics
from chts_train.models import LlamaConfig, ViTConfig
from chts_train.runs import SUMMARY, new_run, read_json
from chts_train.settings import Settings
from chts_train.storage import replacing
from chts_train.trainer import Trainer

UPDATE_KEYS = ("turnover", "zeta", "T", "noise_changed_blocks", "score_mean", "score_var", "score_var_survivors")
REDRAW_SEED = 1000
"""Added to an arm's seed where its values are drawn anew."""
_WINDOW = 10  # steps between lines of the log: the update's cost is read off windows with and without one


def folder_of(arm: Arm, scale: str, places: Places, home: Path) -> Path:
    """The arm's run folder; another protocol has another folder."""
    return home / scale / f"{arm.key.replace('/', '-')}-{fingerprint(arm, scale, places)[:8]}"


def is_finished(folder: Path) -> bool:
    return (folder / SUMMARY).is_file()


def has_checkpoint(folder: Path) -> bool:
    return (folder / FOLDER / LATEST).is_file()


def unpacked(places: Places, home: Path) -> Places:
    """Places whose text is memory-mapped: every worker would otherwise decompress it for itself."""
    if isinstance(places.text, str):
        return places
    paths = []
    for path in map(Path, places.text):
        if path.suffix == ".xz":
            plain = home / "data" / path.stem
            plain.parent.mkdir(parents=True, exist_ok=True)
            if not plain.is_file():
                with replacing(plain) as temporary, lzma.open(path) as packed, open(temporary, "wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 22)
            path = plain
        paths.append(str(path.resolve()))
    return Places(tuple(paths), places.images)


def train_arm(
    arm: Arm, scale: str, places: Places, home: Path, seconds: float | None = None, *, compile: str = "auto", whole: bool = False
) -> bool:
    """Start the arm, or go on from its checkpoint; True when it is finished.

    SIGTERM, or ``seconds`` from now, lets the step finish, saves a checkpoint and returns False. ``compile``: see
    :class:`Settings`. ``whole``: without checkpoints, but for the last one of a dense model, which re-training starts from.

    Raises:
        RuntimeError: ``seconds`` given outside of the main thread, where no signal can be handled.
        ValueError, TrainingError: what :class:`Trainer` raises.
    """
    folder = folder_of(arm, scale, places, home)
    steps = config_of(arm, scale, places).total_steps
    settings = Settings(
        log_interval=_WINDOW, save_interval=steps if whole else 1000, keep=1, quiet=True, compile=compile,
        checkpoints=not whole or arm.method == "dense",
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of the arm before, in this process
    with GracefulStop() as stop, _alarm(seconds):
        if has_checkpoint(folder):
            trainer = Trainer.resume(folder, settings)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # it ended before its first checkpoint
            trainer = _new(arm, scale, places, home, folder, settings)
        return stop.signal is None and trainer.train().finished


def _new(arm: Arm, scale: str, places: Places, home: Path, folder: Path, settings: Settings) -> Trainer:
    config = config_of(arm, scale, places)
    data = _data(config.task, config.data)
    if arm.needs is None:
        return Trainer(config, new_run(arm.key, folder), settings, data=data)
    weights, _, origin = load_dense(folder_of(arm.needs, scale, places, home))
    if arm.group.endswith((TICKET, REDRAWN)):
        trainer = Trainer(config, new_run(arm.key, folder), settings, origin={"patterns": origin}, data=data)
        take_patterns_(trainer, weights, redraw=arm.group.endswith(REDRAWN))
        return trainer
    return Trainer(config, new_run(arm.key, folder), settings, weights=weights, origin=origin, data=data)


@torch.no_grad()
def take_patterns_(trainer: Trainer, weights: Mapping[str, Tensor], *, redraw: bool) -> None:
    """Give a model that has not trained yet the patterns of other dense weights' largest magnitudes.

    Args:
        trainer: before its first step.
        weights: the trained dense model's state_dict.
        redraw: values from other draws of the initial distribution; else those that the dense model of the trainer's seed started with
            (a lottery ticket: Frankle and Carbin, 2019).
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(trainer.config.seed + (REDRAW_SEED if redraw else 0))
        first = trainer.config.build_model().state_dict()
    for name, layer in sparse_layers(trainer.model).items():
        device = layer.ids.device
        layer.ids.copy_(prune(weights[f"{name}.weight"].to(device).float(), layer.n))
        layer.values.copy_(pack(first[f"{name}.weight"].to(device), layer.ids, layer.n))
        layer.follow_with_operands()


@functools.lru_cache(maxsize=2)
def _data(task: str, data: DataConfig) -> Any:
    """Decoding images takes longer than preparing anything else, and the next arm of this process needs the same ones."""
    model = LlamaConfig() if task == "text" else ViTConfig()
    return RunConfig(task=task, model=model, data=data).load_data()


@contextlib.contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """SIGTERM to this process after ``seconds``."""
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a time limit must be set in the main thread, got another one")
    timer = threading.Timer(max(0.0, seconds), os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def collect(arm: Arm, scale: str, places: Places, home: Path) -> dict[str, Any]:
    """The row of a finished arm, from its run folder: figures, and the curves that the plots need.

    Raises:
        RunError, ValueError: a missing or damaged file.
    """
    folder = folder_of(arm, scale, places, home)
    summary = read_json(folder / SUMMARY)
    lines = list(read_metrics(folder / METRICS))
    updates = [line for line in lines if line["kind"] == "update"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    method = get_method(arm.method)
    row: dict[str, Any] = {
        "key": arm.key, "fingerprint": fingerprint(arm, scale, places), "group": arm.group, "arm": arm.name,
        "method": arm.method, "n": None if method.kind == "dense" else method.n, "seed": arm.seed, "srste_lambda": arm.decay,
        "steps": summary["step"], "tokens": summary.get("tokens"), "images": summary.get("images"),
        "seconds": summary["seconds"], "peak_memory_bytes": summary.get("peak_memory_bytes"),
        "figures": {key: value for key, value in summary.items() if key.startswith("val_")},
        "baseline": {key: summary[key] for key in ("unigram_ppl", "majority_accuracy") if key in summary},
        "start": {key: line[key] for line in lines if line["kind"] == "start" for key in ("device", "precision")},
        "turnover": _turnover(updates), "time": _time(lines), "curves": _curves(evaluations, updates),
        "layers": _layers(folder / UPDATES),
    }  # fmt: skip
    if arm.changes:
        row["changes"] = dict(arm.changes)
    dense = [line for line in lines if line["kind"] == "dense"]
    if dense:  # a re-training: the model before pruning, and right after it
        row["before"] = {"dense": _figures(dense[0]), "pruned": _figures(evaluations[0])}
    return row


def forget(folder: Path) -> None:
    """Free the disk of a finished arm's checkpoints."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _figures(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.startswith("val_")}


def _turnover(updates: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not updates:
        return None
    values = [line["turnover"] for line in updates]
    return {"updates": len(values), "first": values[0], "last": values[-1], "mean": statistics.fmean(values)}


def _curves(evaluations: list[dict[str, Any]], updates: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = ("val_loss", "val_ppl", "val_accuracy")
    curves = {key: [[line["step"], line[key]] for line in evaluations if key in line] for key in kinds}
    curves |= {key: [[line["step"], line[key]] for line in updates if key in line] for key in UPDATE_KEYS}
    return {key: points for key, points in curves.items() if points}


def _layers(path: Path) -> dict[str, list[float]]:
    """Turnover of every update by kind of layer (q_proj, ..., fc2)."""
    kinds: dict[str, list[float]] = {}
    for line in read_metrics(path) if path.is_file() else ():
        sums: dict[str, list[int]] = {}
        for layer in line["layers"]:
            total = sums.setdefault(layer["name"].rpartition(".")[2], [0, 0])
            total[0] += layer["replaced"]
            total[1] += layer["links"]
        for kind, (replaced, links) in sums.items():
            kinds.setdefault(kind, []).append(replaced / links)
    return kinds


def _time(lines: list[dict[str, Any]]) -> dict[str, float | None]:
    """Milliseconds of a step, and what a topology update adds: medians over the log's windows without and with one.

    The update's figure includes that no optimizer step was made. Meaningful only where no other arm shared the device.
    """
    updates = {line["step"] for line in lines if line["kind"] == "update"}
    plain: list[float] = []
    mixed: list[float] = []
    train = [line for line in lines if line["kind"] == "train"]
    for before, after in zip(train, train[1:], strict=False):
        steps = after["step"] - before["step"]
        taken = 1e3 * (after["seconds"] - before["seconds"])
        if steps != _WINDOW or taken <= 0:  # the last one, or one that a resumption cut
            continue
        inside = sum(before["step"] < step <= after["step"] for step in updates)
        if inside <= 1:
            (mixed if inside else plain).append(taken)
    step = statistics.median(plain) / _WINDOW if plain else None
    update = statistics.median(mixed) - _WINDOW * step if mixed and step is not None else None
    return {"step_ms": step, "update_ms": update}
