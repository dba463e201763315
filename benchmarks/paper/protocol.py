"""What is trained: the arms of every table and figure, and the config of each arm at a scale.

A *group* is a set of arms with one model, data and length: "llama" and "vit" train from scratch, "llama-retrain" and
"vit-retrain" start from the group's dense arm of the same seed, pruned by magnitude. "llama-ticket" and "llama-redrawn" take no more
from that dense arm than the patterns of its largest weights: values start where the dense arm's started, or from other draws.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chts_train.configs import DataConfig, RunConfig, preset
from chts_train.methods import METHODS, get_method
from chts_train.retrain import retrain_config

ROOT = Path(__file__).parent.parent.parent
SCALES = ("tiny", "reduced")
SEEDS = (0, 1, 2)
"""Of every row of the tables."""
GROUPS = ("llama", "vit")
"""The two models; each has its group of re-trainings."""
RETRAIN, TICKET, REDRAWN = "-retrain", "-ticket", "-redrawn"
LAMBDAS = (6e-5, 2e-4, 6e-4)
"""What SR-STE's decay is tuned over (ALGORITHM section 5)."""
TUNING_SEED = 0

# In the order in which they run: what decides most comes first, should time run out.
_PRETRAIN = ("dense", "chts24", "random-regrow", "static", "srste24", "ste24")
_PRETRAIN14 = ("chts14", "random-regrow14", "static14", "srste14", "ste14")
# Beyond the paper: patterns that masked dense weights learn in the middle of a run; patterns chosen by weights that trained densely for a
# while; whole patterns that move, by the gradient and by chance (the control). Their schedules are in Method.settings.
_BEYOND = ("ste-window24", "dense-start24", "rigl24", "random-moves")
_BEYOND14 = ("ste-window14", "dense-start14", "rigl14", "random-moves14")
_RETRAIN = ("dense", "nvidia", "random-regrow", "chts24")
_LATE = ("random-regrow14", "ste14", "random-moves14")
"""After all seeds of a table's other methods."""
TABLES: Mapping[int, Mapping[str, Sequence[str]]] = {
    1: {"llama": (*_PRETRAIN, *_BEYOND, *_PRETRAIN14, *_BEYOND14)},
    2: {"llama": ("greedy", "soft-regrow", "chts24")},
    3: {"vit": ("dense",), f"vit{RETRAIN}": _RETRAIN, "llama": ("dense",), f"llama{RETRAIN}": _RETRAIN},
    4: {"llama": ("dense", "static", "static14"), f"llama{TICKET}": ("static", "static14"), f"llama{REDRAWN}": ("static", "static14")},
}
"""Table -> group -> methods. In a re-training group "dense" is the dense model trained on for as long, unpruned."""
FIGURES = {2: 1, 3: 2, 4: 2}
"""Figure -> the table whose runs it is drawn from."""

_LLAMA_TINY = {
    "model": {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    "data": {"max_bytes": 60_000}, "total_steps": 24, "batch_size": 4, "micro_batch": 4, "seq_len": 32,
    "warmup_steps": 4, "lr": 1e-2, "eval_interval": 12, "eval_tokens": 256, "interval": 6, "lr_ramp_steps": 1,
}  # fmt: skip
_VIT_TINY = {
    "model": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "total_steps": 24, "batch_size": 16, "micro_batch": 16, "warmup_steps": 4, "eval_interval": 12, "eval_tokens": 64,
    "interval": 6, "lr_ramp_steps": 1,
}  # fmt: skip
# 131,072 targets while it trains; the last evaluation takes twenty times that, which is the whole held-out split.
_LLAMA_REDUCED = {
    "total_steps": 4000, "batch_size": 64, "micro_batch": 64, "seq_len": 256, "warmup_steps": 400, "eval_interval": 500,
    "eval_tokens": 131_072,
}  # fmt: skip
# 20 epochs of 50,000 images, 2 of them warm-up.
_VIT_REDUCED = {
    "total_steps": 3900, "batch_size": 256, "micro_batch": 256, "warmup_steps": 390, "eval_interval": 390,
}  # fmt: skip
_CHANGES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "tiny": {"llama": _LLAMA_TINY, "vit": _VIT_TINY, "llama-retrain": {"total_steps": 12, "warmup_steps": 2}, "vit-retrain": {}},
    "reduced": {
        "llama": _LLAMA_REDUCED,
        "vit": _VIT_REDUCED,
        # All held-out targets each time: the dense and the pruned model are measured once, before the first step.
        "llama-retrain": {"total_steps": 2000, "warmup_steps": 200, "lr": 5e-4, "eval_tokens": None},
        "vit-retrain": {},
    },
}
_PRESETS = {"llama": "60m", "vit": "vit-small"}


@dataclass(frozen=True)
class Arm:
    """One training run of a table: group, method and seed; decay is SR-STE's lambda; changes are config fields with other values than
    the table's protocol has."""

    group: str
    method: str
    seed: int
    decay: float | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Arm:
        """The arm of a result file's row."""
        changes = tuple(sorted((key, hashable(value)) for key, value in row.get("changes", {}).items()))
        return cls(row["group"], row["method"], row["seed"], row["srste_lambda"], changes)

    @property
    def name(self) -> str:
        """The method, with the decay and the changes where there are any."""
        name = self.method if self.decay is None else f"{self.method}@{self.decay:g}"
        spelled = (value if isinstance(value, str) else json.dumps(value, separators=(",", ":")) for _, value in self.changes)
        return name + "".join(f"+{key}={text}" for (key, _), text in zip(self.changes, spelled, strict=True))

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}/s{self.seed}"

    @property
    def needs(self) -> Arm | None:
        """The dense arm that a re-training starts from, or a ticket's patterns come from."""
        base = base_of(self.group)
        return Arm(base, "dense", self.seed) if base != self.group else None


@dataclass(frozen=True)
class Places:
    """The data at hand: paths, or the names of what every machine has. ``find`` looks; workers are told."""

    text: str | tuple[str, ...] = "stdlib"
    images: str = "digits"

    @classmethod
    def find(cls, folder: str | Path | None, scale: str) -> Places:
        """The books pack and the CIFAR-10 JPEG copy where they are, their fallbacks otherwise.

        Args:
            folder: where to look; default ``runs/data`` in the repository. At the scale "tiny" nothing is looked for unless a
                folder is given: it has to be the same everywhere.
            scale: of the experiments.

        Raises:
            FileNotFoundError: when ``folder`` is given and does not exist.
        """
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"--data {folder}: must be an existing folder")
        text: str | tuple[str, ...] = "stdlib"
        images = "digits"
        place = Path(folder) if folder is not None else ROOT / "runs/data"
        if folder is not None or scale != "tiny":
            train, val = (sorted(place.glob(f"books_bpe16k_{part}*.u16*")) for part in ("train", "val"))
            if train and val:
                text = (str(train[0].resolve()), str(val[0].resolve()))
            if (place / "cifar10_jpeg.npz").is_file():
                images = str((place / "cifar10_jpeg.npz").resolve())
        return cls(text, images)


def hashable(value: Any) -> Any:
    """A JSON value with tuples for lists."""
    return tuple(hashable(item) for item in value) if isinstance(value, list) else value


def base_of(group: str) -> str:
    """The group whose dense arm a group's arms start from; else the group itself."""
    for suffix in (RETRAIN, TICKET, REDRAWN):
        group = group.removesuffix(suffix)
    return group


def method_name(name: str) -> str:
    """A method's name; "static24" and the like mean the 2:4 method that is written without the number.

    Raises:
        ValueError: there is no such method.
    """
    short = name.removesuffix("24")
    return short if name not in METHODS and short in METHODS else get_method(name).name


def urgency(arm: Arm) -> tuple[bool, int, bool]:
    """Less comes first within a table: what decides most, should time run out. Seed by seed, of each 2:4 before 1:4."""
    method = get_method(arm.method)
    return arm.method in _LATE, arm.seed, method.kind != "dense" and method.n == 1


def arms_of(
    table: int, seeds: Sequence[int], tuned: Mapping[str, float | None], only: Sequence[str] = (), models: Sequence[str] = GROUPS,
    changes: tuple[tuple[str, Any], ...] = (),
) -> list[Arm]:
    """The arms of a table that can be named now, seed by seed.

    Args:
        table: 1, 2 or 3.
        seeds: of the rows.
        tuned: SR-STE method -> decay, once the tuning runs are done; before that only those are listed.
        only: methods, instead of the table's; also ones that the table does not have by default.
        models: of :data:`GROUPS`; the others' arms are left out.
        changes: of every arm; not of the dense ones that others start from.
    """
    found: dict[str, Arm] = {}
    for seed in seeds:
        for group, methods in TABLES[table].items():
            if base_of(group) not in models:
                continue
            # Re-training takes no STE methods, and its base group trains nothing but the dense model.
            free = tuple(only) if base_of(group) != group or len(methods) > 1 else methods
            for method in free if only else methods:
                made = [replace(arm, changes=changes) for arm in _arms(group, method, seed, tuned)]
                found |= {arm.key: arm for arm in made}
    return list(found.values())


def _arms(group: str, method: str, seed: int, tuned: Mapping[str, float | None]) -> list[Arm]:
    known = get_method(method)
    if group.endswith(RETRAIN) and known.kind == "ste":
        return []
    if group.endswith((TICKET, REDRAWN)) and known.kind != "sparse":
        return []
    if known.kind != "ste" or not known.srste_lambda:
        return [Arm(group, method, seed)]
    tuning = [Arm(group, method, TUNING_SEED, decay) for decay in LAMBDAS]
    best = tuned.get(method)
    return tuning + ([Arm(group, method, seed, best)] if best is not None else [])


def config_of(arm: Arm, scale: str, places: Places) -> RunConfig:
    """The config of an arm, not yet fitted to its data.

    Raises:
        ValueError: an unknown scale or group.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: must be one of {', '.join(SCALES)}, got {scale!r}")
    group = base_of(arm.group)
    if group not in _PRESETS:
        raise ValueError(f"group: must be one of {', '.join(_CHANGES[scale])}, got {arm.group!r}")
    base = preset(_PRESETS[group])
    values = base.to_dict()
    changes = dict(_CHANGES[scale][group])
    for part in ("model", "data"):
        changes[part] = values[part] | changes.get(part, {})
    base = RunConfig.from_dict(values | changes)
    base = replace(base, data=_data(base.data, group, places))
    if arm.group.endswith(RETRAIN):
        base = retrain_config(base, **_CHANGES[scale][arm.group])
    own = dict(get_method(arm.method).settings)
    if scale == "tiny":  # 24 steps: updates come when the others' do
        own = {key: value for key, value in own.items() if key not in ("interval", "stop_fraction")}
    own |= dict(arm.changes)
    values = base.to_dict() | own | {"method": arm.method, "seed": arm.seed, "srste_lambda": arm.decay, "name": arm.group}
    return RunConfig.from_dict(values)


def _data(data: DataConfig, group: str, places: Places) -> DataConfig:
    if group == "vit":
        return replace(data, spec=places.images, augment=places.images != "digits")
    # The pack's tokenizer has 16,384 entries; the arrays alone would not tell.
    return replace(data, spec=places.text, vocab=16_384 if isinstance(places.text, tuple) else None)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What rows of one group have in common: the config without the arm's own fields, data by file name only."""
    values = config.to_dict()
    for own in ("method", "seed", "srste_lambda", "name"):
        del values[own]
    for field, default in (("dense_fraction", 0.0), ("new_moments", "zero"), ("ste_window", None)):
        if values[field] == default:
            del values[field]  # rows from before it existed are of the same protocol
    spec = values["data"]["spec"]
    # Unpacked or not, it is the same data.
    values["data"]["spec"] = [Path(s).name.removesuffix(".xz") for s in ([spec] if isinstance(spec, str) else spec)]
    return values


@functools.cache
def fingerprint(arm: Arm, scale: str, places: Places) -> str:
    """Twelve hex digits that change with anything that decides what the arm computes (but for the source code)."""
    parts = [(a.key, settings_of(config_of(a, scale, places))) for a in (arm, arm.needs) if a is not None]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def protocol_of(table: int, scale: str, places: Places, models: Sequence[str] = GROUPS) -> dict[str, Any]:
    """The settings of a table's groups (those of ``models``), as its result file states them."""
    wanted = [group for group in TABLES[table] if base_of(group) in models]
    groups = {group: settings_of(config_of(Arm(group, "chts24", 0), scale, places)) for group in wanted}
    return {"scale": scale, "srste_lambdas": list(LAMBDAS), "tuning_seed": TUNING_SEED, "groups": groups}
