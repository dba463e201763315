"""An optimizer's state while weights change their form: compressed, dense and masked in every pass, or dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from chts_kernels import pack, unpack

from .distributed import is_dtensor
from .linear import SparseLinear, sparse_layers
from .new_moments import SECOND_MOMENTS, link_states, spread


@torch.no_grad()
def dense_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state by name of the parameter, as if all weights were dense.

    What is kept per link of a :class:`SparseLinear` goes to the link's place in the dense weight (the name ends in ``.weight`` then).
    Elsewhere it is 0, second moments are the estimates of :func:`chts_train.new_moments.spread`. Tensors that stay as they are are not
    copied.

    Args:
        model: with its values whole, not sharded; not wrapped.
        optimizer: that trains it.

    Raises:
        TypeError: when the optimizer keeps something of a sparse layer that is neither a number nor in the shape of its values.
        NotImplementedError: for sharded values.
    """
    states = {}
    for name, dense, parameter, layer in _parameters(model):
        state = optimizer.state.get(parameter)
        if not state:
            continue
        links = link_states(optimizer, name, parameter) if layer is not None else {}
        states[dense] = {
            key: value if key not in links else (spread if key in SECOND_MOMENTS else unpack)(value, layer.ids, layer.n)
            for key, value in state.items()
        }
    return states


@torch.no_grad()
def load_dense_states_(model: nn.Module, optimizer: torch.optim.Optimizer, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Give an optimizer what :func:`dense_states` took from another one; of sparse layers what lies at their links.

    Raises:
        ValueError: when a name in ``states`` is no parameter's, or a shape not that of a sparse layer's weight; then nothing was changed.
        NotImplementedError: for sharded values.
    """
    named = {dense: (parameter, layer) for _, dense, parameter, layer in _parameters(model)}
    unknown = sorted(states.keys() - named.keys())
    if unknown:
        raise ValueError(f"states: must be of this model's parameters, got {len(unknown)} others, the first {unknown[0]!r}")
    loaded: dict[nn.Parameter, dict[str, Any]] = {}
    for name, state in states.items():
        parameter, layer = named[name]
        shape = parameter.shape if layer is None else (layer.out_features, layer.in_features)
        loaded[parameter] = dict(state)
        for key, value in state.items() if layer is not None else ():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                if value.shape != shape:
                    raise ValueError(
                        f"states[{name!r}][{key!r}]: must have the weight's shape {tuple(shape)}, got {tuple(value.shape)}"
                    )
                loaded[parameter][key] = pack(value, layer.ids, layer.n)
    optimizer.state.update(loaded)


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter, SparseLinear | None]]:
    """Name, name when dense, parameter, and the sparse layer whose values it is."""
    layers = {f"{name}.values": (f"{name}.weight", layer) for name, layer in sparse_layers(model).items()}
    for name, parameter in model.named_parameters():
        dense, layer = layers.get(name, (name, None))
        if layer is not None and is_dtensor(parameter):
            raise NotImplementedError(f"{name}: must be whole, got sharded values")
        yield name, dense, parameter, layer
