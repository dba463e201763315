"""From command-line options to a RunConfig."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .configs import RunConfig
from .methods import METHODS

# Option -> field of RunConfig, dotted for its parts.
FIELDS = {
    "method": "method",
    "tokenizer": "data.tokenizer",
    "vocab_size": "data.vocab",
    "max_bytes": "data.max_bytes",
    "data": "data.spec",
    "seed": "seed",
    "steps": "total_steps",
    "batch_size": "batch_size",
    "micro_batch": "micro_batch",
    "seq_len": "seq_len",
    "lr": "lr",
    "warmup_steps": "warmup_steps",
    "min_lr_ratio": "min_lr_ratio",
    "optimizer": "optimizer",
    "weight_decay": "weight_decay",
    "precision": "precision",
    "eval_interval": "eval_interval",
    "eval_tokens": "eval_tokens",
    "zeta": "zeta",
    "zeta_end": "zeta_end",
    "interval": "interval",
    "stop_fraction": "stop_fraction",
    "t_start": "t_start",
    "t_end": "t_end",
    "lr_ramp_steps": "lr_ramp_steps",
    "srste_lambda": "srste_lambda",
}


def configure(options: argparse.Namespace, base: RunConfig) -> RunConfig:
    """``base`` with the options that were given, and then ``--set``.

    Some fields follow others unless they are given themselves: the warm-up keeps its share of the steps, the micro-batch
    becomes the largest divisor of a new batch size that is at most the old micro-batch, and a method brings its ``settings``.

    Raises:
        ValueError, TypeError: unknown fields and values out of range; the message names the field.
    """
    changes = _given(options)
    if "data.spec" in changes:
        changes["data.spec"] = data_spec(changes["data.spec"])
    if "data.tokenizer" in changes:
        changes["data.tokenizer"] = _absolute(changes["data.tokenizer"])
    for text in options.set:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError(f"--set: must be KEY=VALUE, got {text!r}")
        changes[key.strip()] = _value(value)
    steps, batch = changes.get("total_steps"), changes.get("batch_size")
    if "warmup_steps" not in changes and _positive(steps):
        changes["warmup_steps"] = min(steps, round(base.warmup_steps * steps / base.total_steps))
    if "micro_batch" not in changes and _positive(batch):
        changes["micro_batch"] = next(m for m in range(min(batch, base.micro_batch), 0, -1) if batch % m == 0)
    values = base.to_dict()
    if str(changes.get("method")) in METHODS:  # an unknown one is refused where the run starts
        values |= METHODS[changes["method"]].settings
    for key, value in changes.items():
        part, _, name = key.rpartition(".")
        if part not in ("", "model", "data"):
            raise ValueError(f"--set: must name a field of the config, of model or of data, got {key!r}")
        (values[part] if part else values)[name] = value
    return RunConfig.from_dict(values)


def check_resume(options: argparse.Namespace) -> None:
    """A resumed run keeps its settings.

    Raises:
        ValueError: naming the first option that would change them.
    """
    changed = [f"--{name.replace('_', '-')}" for name in FIELDS if getattr(options, name) is not None]
    changed = ["--preset"] * (options.preset is not None) + changed + ["--set"] * bool(options.set)
    if changed:
        raise ValueError(f"{changed[0]}: must not be given with --resume; the run goes on with the settings it has")


def data_spec(given: list[str]) -> str | list[str]:
    """``--data`` as the config keeps it: paths absolute, so that a run can be resumed from another folder."""
    paths = [_absolute(item) for item in given]
    return paths[0] if len(paths) == 1 else paths


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {field: getattr(options, name) for name, field in FIELDS.items() if getattr(options, name) is not None}


def _absolute(item: str) -> str:
    path = Path(item).expanduser()
    return str(path.resolve()) if item not in ("stdlib", "digits") and path.exists() else item


def _value(text: str) -> Any:
    """JSON where it is JSON (numbers, true, null, lists), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
