"""What a training run is made of: frozen dataclasses, and the presets by name.

::

    config = preset("60m", method="chts24", batch_size=128)
    data = config.load_data()
    config = config.fit(data)            # vocabulary (or image size, channels, classes) of the data
    model = config.build_model()
    config == RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from .models import Llama, LlamaConfig, ViT, ViTConfig
from .new_moments import NEW_MOMENTS

if TYPE_CHECKING:
    from .data import ImageData, TextData

TASKS = ("text", "image")
OPTIMIZERS = ("adam", "adamw", "sgd")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class DataConfig:
    """Which data; the arguments of :func:`chts_train.data.load_text` and :func:`chts_train.data.load_images`.

    spec: text: "stdlib", files, folders, token arrays or a Hugging Face name; images: "digits", an npz, a folder or a
    torchvision name. tokenizer, vocab, end_of_text, max_bytes: text only. image_size, augment: images only.
    val_fraction: held out where the data has no split of its own. seed: order and split, not the batches.
    """

    spec: str | tuple[str, ...] = "stdlib"
    tokenizer: str | None = None
    vocab: int | None = None
    end_of_text: int | str | None = None
    max_bytes: int | None = None
    image_size: int | None = None
    augment: bool = False
    val_fraction: float = 0.05
    seed: int = 42


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes.

    Steps are optimizer steps; sizes count sequences or images.

    task: "text" or "image"; model is a LlamaConfig or a ViTConfig accordingly.
    method: a name in ``chts_train.METHODS``. dense_fraction: train densely for that share of the steps, then prune by magnitude (or by
    chance, with init "random") and go on sparsely with the optimizer's state; only for methods with compressed weights.
    ste_window: two shares of the steps; between them such a method learns its topology: weights are dense, masked to the best patterns in
    every forward pass, with straight-through gradients and SR-STE's decay (srste_lambda); then they are compressed again.
    init: another initial topology than the method's, "random" or "magnitude" (re-training).
    srste_lambda: another decay than the default of the SR-STE methods and of ste_window.
    total_steps, batch_size, micro_batch: a step takes batch_size sequences in batch_size / micro_batch passes.
    seq_len: tokens per sequence (images: not used).
    lr, min_lr_ratio, warmup_steps: linear warm-up to lr, then cosine to min_lr_ratio * lr at the end.
    optimizer, betas, eps, weight_decay: "adam", "adamw" or "sgd".
    precision: "fp32", "bf16" (autocast over fp32 masters), or "auto": bf16 on a GPU that has it, else fp32.
    impl: implementation of the sparse layers: "auto", "reference" or a kernel's name (``chts info`` lists them).
    weight_grad: of the sparse layers: "exact", or "mvue24", an unbiased random estimate on sparse tensor cores.
    seed: initial weights, batches and topology.
    eval_interval: steps between evaluations. eval_tokens: targets (images: images) of one evaluation, None for all.
    zeta, zeta_end, interval, t_start, t_end, stop_fraction, lr_ramp_steps: of the TopologySchedule; new_moments: of the TopologyEvolver;
    only for methods that evolve.

    Raises ValueError naming the field, its rule and the value; TypeError when a value has another type.
    """

    name: str = "custom"
    task: str = "text"
    model: LlamaConfig | ViTConfig = field(default_factory=LlamaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: str = "chts24"
    init: str | None = None
    srste_lambda: float | None = None

    total_steps: int = 10_000
    batch_size: int = 256
    micro_batch: int = 64
    seq_len: int = 256

    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 1000
    optimizer: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    precision: str = "auto"
    impl: str = "auto"
    weight_grad: str = "exact"
    seed: int = 0
    eval_interval: int = 500
    eval_tokens: int | None = None

    zeta: float = 0.1
    zeta_end: float | None = None
    interval: int = 100
    t_start: float = 1.0
    t_end: float = 9.0
    stop_fraction: float = 0.75
    lr_ramp_steps: int = 10
    new_moments: str = "zero"
    dense_fraction: float = 0.0
    ste_window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for part, prefix in (
            (self, ""),
            (self.data, "data."),
            (self.model, "model."),
        ):  # self first: it checks the rest
            _check_types(type(part), {item.name: getattr(part, item.name) for item in fields(part)}, prefix)
        kind = LlamaConfig if self.task == "text" else ViTConfig
        rules = {
            "task": (self.task in TASKS, f"one of {', '.join(TASKS)}"),
            "model": (isinstance(self.model, kind), f"a {kind.__name__} for task {self.task!r}"),
            "method": (bool(self.method), "a method's name"),
            "init": (self.init in (None, "random", "magnitude"), "random, magnitude or None"),
            "srste_lambda": (self.srste_lambda is None or 0 < self.srste_lambda < math.inf, "positive or None"),
            "total_steps": (self.total_steps >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "micro_batch": (
                self.micro_batch >= 1 and self.batch_size % self.micro_batch == 0,
                f"at least 1 and a divisor of batch_size={self.batch_size}",
            ),
            "seq_len": (self.seq_len >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "positive and finite"),
            "min_lr_ratio": (0 <= self.min_lr_ratio <= 1, "in [0, 1]"),
            "warmup_steps": (0 <= self.warmup_steps <= self.total_steps, f"in [0, total_steps={self.total_steps}]"),
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            "eps": (self.eps > 0, "positive"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            "precision": (self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            "impl": (bool(self.impl), "an implementation's name"),
            "weight_grad": (self.weight_grad in ("exact", "mvue24"), "exact or mvue24"),
            "seed": (self.seed >= 0, "at least 0"),
            "eval_interval": (self.eval_interval >= 1, "at least 1"),
            "eval_tokens": (self.eval_tokens is None or self.eval_tokens >= 1, "at least 1 or None"),
            "zeta": (0 <= self.zeta <= 1, "in [0, 1]"),
            "zeta_end": (self.zeta_end is None or 0 <= self.zeta_end <= 1, "in [0, 1] or None"),
            "interval": (self.interval >= 1, "at least 1"),
            "t_start": (0 < self.t_start < math.inf, "positive and finite"),
            "t_end": (0 < self.t_end < math.inf, "positive and finite"),
            "stop_fraction": (0 <= self.stop_fraction <= 1, "in [0, 1]"),
            "lr_ramp_steps": (self.lr_ramp_steps >= 0, "at least 0"),
            "new_moments": (self.new_moments in NEW_MOMENTS, f"one of {', '.join(NEW_MOMENTS)}"),
            "dense_fraction": (0 <= self.dense_fraction < 1, "in [0, 1)"),
            "ste_window": (
                self.ste_window is None or self.dense_fraction <= self.ste_window[0] < self.ste_window[1] < 1,
                f"None, or two rising numbers in [dense_fraction={self.dense_fraction:g}, 1)",
            ),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")
        start, end = self.ste_steps
        if self.ste_window and start >= end:
            raise ValueError(f"ste_window must hold a step of total_steps={self.total_steps}, got {self.ste_window!r}")
        if isinstance(self.model, LlamaConfig) and self.seq_len > self.model.max_position_embeddings:
            raise ValueError(
                f"seq_len must be at most model.max_position_embeddings={self.model.max_position_embeddings}, "
                f"got {self.seq_len}"
            )

    @property
    def accumulation(self) -> int:
        """Forward and backward passes of one optimizer step."""
        return self.batch_size // self.micro_batch

    @property
    def dense_steps(self) -> int:
        """Steps before the weights are pruned and compressed."""
        return round(self.dense_fraction * self.total_steps)

    @property
    def ste_steps(self) -> tuple[int, int]:
        """Steps before and until the end of ``ste_window``; (0, 0) without one."""
        start, end = self.ste_window or (0, 0)
        return round(start * self.total_steps), min(round(end * self.total_steps), self.total_steps - 1)

    def form_of(self, step: int) -> str:
        """Of a method with compressed weights: what step ``step``, counted from 0, trains: "dense", "ste" or "sparse" weights."""
        if step < self.dense_steps:
            return "dense"
        start, end = self.ste_steps
        return "ste" if start <= step < end else "sparse"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_dict` is the inverse."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The config that :meth:`to_dict` gave; missing fields take their defaults.

        Raises ValueError for an unknown field, with the nearest known one; else as the constructor does.
        """
        values = _known(cls, values, "")
        kind = LlamaConfig if values.get("task", "text") == "text" else ViTConfig
        for name, part in (("model", kind), ("data", DataConfig)):
            if isinstance(values.get(name), Mapping):
                known = _known(part, values[name], f"{name}.")
                _check_types(part, known, f"{name}.")  # before the part's own rules compare a string with a number
                values[name] = part(**known)
        if "model" not in values:
            values["model"] = kind()
        return cls(**values)

    def load_data(self) -> TextData | ImageData:
        """Read the data; raises what :func:`chts_train.data.load_text` and ``load_images`` raise."""
        from .data import load_images, load_text

        data = self.data
        if self.task == "image":
            if not isinstance(data.spec, str):
                raise ValueError(f"data.spec must be one file, folder or name for images, got {data.spec!r}")
            return load_images(data.spec, data.image_size, data.seed, val_fraction=data.val_fraction)
        return load_text(
            data.spec,
            vocab=data.vocab,
            tokenizer=data.tokenizer,
            seed=data.seed,
            max_bytes=data.max_bytes,
            val_fraction=data.val_fraction,
            end_of_text=data.end_of_text,
        )

    def fit(self, data: TextData | ImageData) -> RunConfig:
        """This config with a model for ``data``: its vocabulary, or its image size, channels and classes."""
        if isinstance(self.model, LlamaConfig):
            return replace(self, model=self.model.fit(vocab_size=data.vocab_size))
        model = self.model.fit(image_size=data.image_size, in_channels=data.channels, num_classes=data.num_classes)
        return replace(self, model=model)

    def build_model(self) -> nn.Module:
        """The dense model, initialised from torch's global generator (seed it before)."""
        return Llama(self.model) if isinstance(self.model, LlamaConfig) else ViT(self.model)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _known(kind: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """``values`` with lists as tuples; ValueError when a key is no field of ``kind``."""
    known = [item.name for item in fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown field {prefix}{key}; {hint}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _check_types(kind: type, values: Mapping[str, Any], prefix: str) -> None:
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if not _is_a(value, hints[name]):
            raise TypeError(f"{prefix}{name} must be {_spell(hints[name])}, got {value!r}")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation of this file: plain classes, unions and tuples. An int passes for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(_is_a(item, argument) for item, argument in zip(value, arguments, strict=True))
        )
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _llama(
    name: str, hidden: int, intermediate: int, layers: int, heads: int, vocab: int = 32000, **training: Any
) -> RunConfig:
    model = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return RunConfig(name=name, model=model, **training)


def _vit(name: str, width: int, heads: int, drop_path: float, **training: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "task": "image",
        "model": ViTConfig(embed_dim=width, num_heads=heads, drop_path=drop_path, label_smoothing=0.1),
        "data": DataConfig(spec="digits", augment=True, val_fraction=0.1),
        "total_steps": 500_400,  # 100 epochs of ImageNet's 1,281,167 images
        "batch_size": 256,
        "micro_batch": 256,
        "warmup_steps": 25_020,  # 5 epochs
        "eval_interval": 5004,
        "lr": 5e-4,
        "min_lr_ratio": 0.02,  # DeiT ends at 1e-5
        "optimizer": "adamw",
        "weight_decay": 0.05,
        "t_end": 3.0,
    }
    return RunConfig(name=name, **(settings | training))


PRESETS: Mapping[str, RunConfig] = types.MappingProxyType(
    {
        config.name: config
        for config in (
            # Bytes of the standard library on 2 CPU cores in a few minutes: short, so it updates every 25 steps.
            _llama(
                "tiny", 128, 344, 4, 4, vocab=257, seq_len=128, batch_size=16, micro_batch=16, total_steps=600, warmup_steps=60,
                lr=3e-3, eval_interval=100, eval_tokens=65_536, interval=25, lr_ramp_steps=3,
            ),
            _llama("20m", 256, 688, 4, 4, eval_tokens=1_000_000),
            _llama("60m", 512, 1376, 8, 8, eval_tokens=1_000_000),
            _llama("130m", 768, 2048, 12, 12, eval_tokens=1_000_000),
            # The lineage's 1B has 5461, which is no multiple of 4: 43 * 128 is the next size that kernels like.
            _llama("1b", 2048, 5504, 24, 32, micro_batch=16, lr=5e-4, eval_tokens=1_000_000),
            # Digits on 2 CPU cores in a few minutes; with other data raise total_steps and augment.
            _vit(
                "vit-tiny", 192, 3, 0.0, data=DataConfig(spec="digits", val_fraction=0.1), batch_size=32, micro_batch=32,
                total_steps=400, warmup_steps=40, eval_interval=100, interval=25, lr_ramp_steps=3,
            ),
            _vit("vit-small", 384, 6, 0.1),
            _vit("vit-base", 768, 12, 0.1),
        )
    }
)  # fmt: skip


def preset(name: str, **changes: Any) -> RunConfig:
    """The preset of that name with some fields changed. Raises ValueError, listing them, when there is none."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return RunConfig.from_dict(PRESETS[name].to_dict() | changes) if changes else PRESETS[name]
