"""An optimizer's state while weights change their form: compressed, dense and masked in every pass, or dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from chts_kernels import pack, unpack

from .linear import sparse_layers
from .new_moments import SECOND_MOMENTS, spread


@torch.no_grad()
def dense_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state by name of the parameter, as if all weights were dense.

    What is kept per link of a :class:`SparseLinear` goes to the link's place in the dense weight (the name ends in ``.weight`` then).
    Elsewhere it is 0, second moments are the estimates of :func:`chts_train.new_moments.spread`. Tensors that stay as they are are not
    copied.

    Args:
        model: with its values whole, not sharded.
        optimizer: that trains it.
    """
    layers = {f"{name}.values": (f"{name}.weight", layer) for name, layer in sparse_layers(model).items()}
    states = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        dense, layer = layers.get(name, (name, None))
        states[dense] = {
            key: value
            if layer is None or not _is_like(value, parameter)
            else (spread if key in SECOND_MOMENTS else unpack)(value, layer.ids, layer.n)
            for key, value in state.items()
        }
    return states


@torch.no_grad()
def load_dense_states_(model: nn.Module, optimizer: torch.optim.Optimizer, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Give an optimizer what :func:`dense_states` took from another one; of sparse layers what lies at their links."""
    layers = {f"{name}.values": (f"{name}.weight", layer) for name, layer in sparse_layers(model).items()}
    for name, parameter in model.named_parameters():
        dense, layer = layers.get(name, (name, None))
        if dense not in states:
            continue
        shape = parameter.shape if layer is None else (layer.out_features, layer.in_features)
        optimizer.state[parameter] = {
            key: pack(value, layer.ids, layer.n)
            if layer is not None and isinstance(value, torch.Tensor) and value.shape == shape
            else value
            for key, value in states[dense].items()
        }


def _is_like(value: Any, parameter: torch.Tensor) -> bool:
    """Whether an entry of the optimizer's state has a number for every element of a parameter."""
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape
