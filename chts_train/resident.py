"""Resident operands of a model: what compiled and captured passes read instead of packing in every forward pass.

::

    optimizer = FusedAdamW(model.parameters(), lr, model=model, capturable=True, resident_operands=torch.bfloat16)
    model = torch.compile(model)            # or a CUDA graph around the step, or both
    ...                                     # train, evolve, load state dicts: operands follow by themselves
    with torch.no_grad():
        model.layer.values.clamp_(-1, 1)    # a write of your own
    refresh_operands_(model)                # says so

Who writes the values or ids of a sparse layer and follows with the operands: :class:`FusedAdamW` with this model,
:class:`TopologyEvolver` and ``chts_kernels.evolve``, ``load_state_dict`` (and so checkpoints, also after
``torch.distributed.checkpoint`` has read them), ``reset_parameters``, ``.to()``. All of it in place: captured graphs stay valid.
"""

from __future__ import annotations

import torch
from torch import nn

from .distributed import unwrapped
from .linear import SparseLinear, sparse_layers


def make_operands_resident_(model: nn.Module, dtype: torch.dtype | None = torch.bfloat16) -> int:
    """Have compiled and captured passes read the operands of every sparse layer without packing; operands are packed at once.

    It takes a training loop all of whose writers follow with the operands (this module's text lists them); ``FusedAdamW(...,
    resident_operands=dtype)`` calls it. Eager passes, optimizer steps and topology updates look at the versions of values and ids, and
    raise where another writer was at work. Before compiling or capturing: graphs made earlier go on packing.

    Args:
        model: with sparse layers, already on its device, wrapped by DDP (``broadcast_buffers=False``) if it is to be. Layers of
            ``impl = "reference"`` read no operands and are left out.
        dtype: that products compute in: bfloat16 or float16 under autocast, or of 16-bit values. Passes in another dtype pack when
            compiled, and raise when eager. None: resident no more.

    Returns:
        The number of layers whose operands are resident now.

    Raises:
        ValueError: no sparse layer; one with ``keep_operands = False``, managed by FSDP, on the meta device, or with the values of
            another one; another dtype. Then nothing was changed.
        RuntimeError: inside a CUDA graph capture.
    """
    layers = _layers(model, "make resident")
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if dtype is not None and (other := owners.setdefault(id(layer.values), name)) != name:
            raise ValueError(f"model: must have values of its own in every layer, got {other}.values is {name}.values")
    before = {name: layer._operands for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            try:
                layer.resident_operands = dtype if layer.impl != "reference" else None
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    except Exception:
        for name, operands in before.items():
            layers[name]._operands = operands
        raise
    return sum(layer.resident_operands is not None for layer in layers.values())


@torch.no_grad()
def refresh_operands_(model: nn.Module) -> None:
    """Derive the resident operands of every sparse layer anew, in place: to be called after writes to values or ids that no writer of
    this package made (a foreign optimizer, a kernel, ``.data``). Layers without resident operands need no such call.

    Nothing waits for the device; inside a CUDA graph capture it is captured.

    Raises:
        ValueError: no sparse layer.
    """
    for layer in _layers(model, "refresh").values():
        layer._refresh_resident()


def _layers(model: nn.Module, purpose: str) -> dict[str, SparseLinear]:
    layers = sparse_layers(unwrapped(model))
    if not layers:
        raise ValueError(f"model: must have at least one SparseLinear to {purpose}, got none; call sparsify_ first")
    return layers
