"""What the adapters share: options by name, and the evolver for the optimizer that a trainer made."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..distributed import unwrapped
from ..linear import sparse_layers
from ..topology import TopologyEvolver, TopologySchedule

SCHEDULE = tuple(field.name for field in fields(TopologySchedule))
EVOLVER = tuple(
    name for name, p in inspect.signature(TopologyEvolver).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse at construction what would otherwise fail when training begins.

    Raises:
        TypeError: an option that neither the schedule nor the evolver has.
        ValueError: an option of the schedule that is out of range.
    """
    unknown = sorted(options.keys() - {*SCHEDULE, *EVOLVER})
    if unknown:
        raise TypeError(f"{unknown[0]}: must be one of {', '.join((*SCHEDULE, *EVOLVER))}, got an unknown option")
    TopologySchedule(**{"total_steps": 1} | {k: v for k, v in options.items() if k in SCHEDULE})


def build_evolver(
    model: nn.Module, optimizers: Iterable[Any], total_steps: float, options: Mapping[str, Any]
) -> TopologyEvolver:
    """An attached evolver for the one of ``optimizers`` that holds the sparse layers of ``model``.

    Args:
        model: sparsified; may be wrapped.
        optimizers: of torch, or wrappers that keep theirs in ``.optimizer`` (Accelerate's, Lightning's).
        total_steps: the trainer's number of optimizer steps, which an option of this name overrides.
        options: of :class:`TopologySchedule` and :class:`TopologyEvolver`.

    Raises:
        ValueError: when the trainer knows no number of steps and none is given, and what :class:`TopologyEvolver` raises.
    """
    schedule = {"total_steps": total_steps} | {k: v for k, v in options.items() if k in SCHEDULE}
    steps = schedule["total_steps"]
    if not 1 <= steps < float("inf"):
        raise ValueError(f"total_steps: must be given when the trainer does not know it, got {steps} from the trainer")
    schedule["total_steps"] = int(steps)
    found = [torch_optimizer(optimizer) for optimizer in optimizers]
    values = [id(layer.values) for layer in sparse_layers(unwrapped(model)).values()]
    holding = [o for o in found if any(id(p) in values for group in o.param_groups for p in group["params"])]
    evolver = TopologyEvolver(
        model,
        (holding or found)[0],
        TopologySchedule(**schedule),
        **{k: v for k, v in options.items() if k in EVOLVER},
    )
    return evolver.attach()


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside a trainer's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
