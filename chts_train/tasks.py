"""The two kinds of training: next tokens of a text, classes of images. All that the trainer does not share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .configs import RunConfig
from .data import ImageBatches, ImageData, TextBatches, TextData
from .data.batches import IGNORE_INDEX
from .parallel import Processes

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class TextTask:
    """Language modelling; progress is counted in targets, quality in perplexity (exp of nats per target)."""

    config: RunConfig
    data: TextData
    unit = "tokens"
    items = "sequences"

    def batches(self) -> TextBatches:
        """Endless training batches (tokens, targets), int64 [batch_size, seq_len] each."""
        return TextBatches(self.data.train, self.config.seq_len, self.config.batch_size, self.config.seed)

    def held_out(self, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over held-out data in micro-batches, over about ``limit`` targets."""
        return TextBatches.eval_batches(self.data.val, self.config.seq_len, self.config.micro_batch, limit)

    def count(self, targets: Tensor) -> int:
        """What a batch's mean loss is a mean of: targets that are no padding."""
        return int((targets != IGNORE_INDEX).sum())

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor, count: int) -> dict[str, Tensor]:
        """Sums over one held-out batch."""
        return {"loss": model(inputs, targets).double() * count}

    def train_figures(self, loss: float) -> dict[str, float]:
        """What a training line of the log has besides the loss."""
        return {"ppl": perplexity(loss)}

    def eval_figures(self, sums: dict[str, float], count: int) -> dict[str, float]:
        """The figures of an evaluation."""
        loss = sums["loss"] / count
        return {"val_loss": loss, "val_ppl": perplexity(loss), "val_tokens": count}

    def baseline(self) -> dict[str, float]:
        """What a model without any context reaches on held-out data."""
        return {"unigram_ppl": self.data.unigram_perplexity()}

    def verdict(self, figures: dict[str, float], baseline: dict[str, float]) -> str:
        """An evaluation in words, beside the baseline."""
        return (
            f"held-out perplexity {figures['val_ppl']:.4g} over {figures['val_tokens']:,} tokens "
            f"(unigram model: {baseline['unigram_ppl']:.4g})"
        )


@dataclass(frozen=True)
class ImageTask:
    """Classification; progress is counted in images, quality in the share of right answers."""

    config: RunConfig
    data: ImageData
    unit = "images"
    items = "images"

    def batches(self) -> ImageBatches:
        """Endless training batches (images, labels): float32 [batch_size, C, S, S], int64 [batch_size]."""
        config = self.config
        return ImageBatches(self.data.train, config.batch_size, config.seed, augment=config.data.augment)

    def held_out(self, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over held-out images in micro-batches, over ``limit`` images."""
        return ImageBatches.eval_batches(self.data.val, self.config.micro_batch, limit)

    def count(self, targets: Tensor) -> int:
        """Images of a batch."""
        return len(targets)

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor, count: int) -> dict[str, Tensor]:
        """Sums over one held-out batch."""
        logits = model(inputs).float()
        right = (logits.argmax(-1) == targets).sum()
        return {"loss": nn.functional.cross_entropy(logits, targets, reduction="sum").double(), "right": right.double()}

    def train_figures(self, loss: float) -> dict[str, float]:
        """What a training line of the log has besides the loss: nothing."""
        return {}

    def eval_figures(self, sums: dict[str, float], count: int) -> dict[str, float]:
        """The figures of an evaluation."""
        return {"val_loss": sums["loss"] / count, "val_accuracy": sums["right"] / count, "val_images": count}

    def baseline(self) -> dict[str, float]:
        """The share of held-out images that are of the most frequent training class."""
        frequent = torch.bincount(self.data.train.labels).argmax()
        return {"majority_accuracy": float((self.data.val.labels == frequent).double().mean())}

    def verdict(self, figures: dict[str, float], baseline: dict[str, float]) -> str:
        """An evaluation in words, beside the baseline."""
        return (
            f"held-out accuracy {figures['val_accuracy']:.2%} over {figures['val_images']:,} images "
            f"(most frequent class: {baseline['majority_accuracy']:.2%})"
        )


Task = TextTask | ImageTask


def make_task(config: RunConfig, data: TextData | ImageData) -> Task:
    """The task of a config, on data that its model fits.

    Raises:
        ValueError: when the data's vocabulary, or its images and classes, are not the model's.
    """
    if isinstance(data, TextData):
        if data.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"data {data.name}: must have a vocabulary of at most the model's {config.model.vocab_size}, "
                f"got {data.vocab_size}"
            )
        return TextTask(config, data)
    model = config.model
    here = (data.image_size, data.channels, data.num_classes)
    if here != (model.image_size, model.in_channels, model.num_classes):
        sizes = f"({model.image_size}, {model.in_channels}, {model.num_classes})"
        raise ValueError(f"data {data.name}: must have (image size, channels, classes) = {sizes}, got {here}")
    return ImageTask(config, data)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    *,
    device: torch.device,
    autocast: Context,
    limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
) -> dict[str, float] | None:
    """The figures of ``model`` on held-out data, or None when ``stop`` said so in between.

    Draws no random numbers, so a run is the same whether and when it is evaluated. Sums are float64 on the
    device, read once at the end. Of several ``processes`` each takes every R-th batch; all get the figures of the whole.
    """
    processes = processes or Processes()
    training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    total = 0
    try:
        held_out = iter(task.held_out(limit))
        while turn := list(itertools.islice(held_out, processes.size)):
            if stop():
                return None
            total += sum(task.count(targets) for _, targets in turn)
            # At the end some have no batch: they take part, since a sharded model needs all of them, and count for nothing.
            inputs, targets = turn[min(processes.rank, len(turn) - 1)]
            with autocast():
                batch = task.losses(model, inputs.to(device), targets.to(device), task.count(targets))
            if processes.rank >= len(turn):
                batch = {key: torch.zeros_like(value) for key, value in batch.items()}
            sums = {key: sums[key] + value if sums else value for key, value in batch.items()}
    finally:
        model.train(training)
    return task.eval_figures({key: processes.sum_(value).item() for key, value in sums.items()}, total)
