"""Optimizers by name and the learning-rate schedule of ALGORITHM section 6: linear warm-up, then cosine.

The fused AdamW of sparse layers is :class:`chts_train.FusedAdamW`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .adamw import FusedAdamW
from .linear import sparse_layers

OPTIMIZERS = ("adam", "adamw", "sgd")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with weight decay, and without it.

    No decay, as in DeiT: parameters of fewer than 2 dimensions (biases, norms) and those that the model's
    ``no_weight_decay()`` names. Without weight decay there is one group, in model order. Sparse values have 2
    dimensions and decay; a decayed link that is 0 stays 0.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": [p for _, p in named], "weight_decay": 0.0}]
    exempt = getattr(model, "no_weight_decay", set)()
    plain = [p for name, p in named if p.dim() < 2 or name in exempt]
    decayed = [p for name, p in named if not (p.dim() < 2 or name in exempt)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    resident_operands: torch.dtype | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of ``model``; build it after ``sparsify_``.

    Args:
        name: "adam" (weight decay through the gradient), "adamw" (decoupled) or "sgd" (with momentum). Sparse layers on a
            GPU get :class:`FusedAdamW` for "adamw", and for "adam" without weight decay, where both are the same rule.
        model: float32 masters; compute in bf16 comes from autocast.
        lr: peak learning rate, positive.
        betas, eps: of Adam and AdamW.
        weight_decay: see :func:`parameter_groups`.
        momentum: of SGD.
        resident_operands: of :class:`FusedAdamW` where that is what it becomes; nothing elsewhere.

    Raises:
        ValueError: unknown name, or a learning rate or weight decay out of range.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: must be one of {list(OPTIMIZERS)}, got {name!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: must be positive and finite, got {lr}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay: must not be negative, got {weight_decay}")
    groups = parameter_groups(model, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    # Fused on CUDA: one kernel for all parameters. On the CPU the default keeps results independent of threads.
    fused = all(p.is_cuda and p.is_floating_point() for group in groups for p in group["params"])
    if fused and sparse_layers(model) and (name == "adamw" or weight_decay == 0):  # without decay both rules are one
        return FusedAdamW(groups, lr=lr, betas=tuple(betas), eps=eps, model=model, resident_operands=resident_operands)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=tuple(betas), eps=eps, fused=fused or None)


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Factor on the peak learning rate for the step after ``step`` finished ones.

    Warm-up: ``(step + 1) / warmup_steps``, so that the first step is not wasted on a rate of 0. Then half a cosine
    from 1 down to ``min_lr_ratio`` at ``total_steps``, constant after it.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(1, total_steps - warmup_steps), 1.0)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def make_scheduler(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_steps: int, min_lr_ratio: float = 0.1
) -> LambdaLR:
    """Linear warm-up and cosine as a torch scheduler; step it after every optimizer step, skipped ones included.

    Each rate is computed from the step alone, not from the rate before it: a resumed run has the same bits.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps: must be at least 1, got {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps: must be in [0, total_steps = {total_steps}], got {warmup_steps}")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio: must be in [0, 1], got {min_lr_ratio}")

    def factor(step: int) -> float:
        return lr_factor(step, total_steps=total_steps, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)

    return LambdaLR(optimizer, factor)
