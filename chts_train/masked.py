"""Resident masks: those of all :class:`chts_train.STELinear` layers, found in one go after every optimizer step.

::

    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    attach_srste_decay(model, optimizer)
    make_masks_resident_(model, optimizer)
    model = torch.compile(model)            # or a CUDA graph around the step, or both
    ...                                     # train, load state dicts: masks follow by themselves
    with torch.no_grad():
        model.layer.weight.clamp_(-1, 1)    # a write of your own
    refresh_masks_(model)                   # says so

Otherwise every layer looks for its mask in every pass that is compiled or captured, which cannot tell whether the weight has changed.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from chts_kernels.resident import followed_in_step

from .baselines import STELinear, refresh_resident
from .distributed import is_dtensor


def make_masks_resident_(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.bfloat16) -> RemovableHandle:
    """Have the passes of every :class:`STELinear` read masks and operands that are brought up to date after each step of ``optimizer``.

    On a GPU that takes two launches for all layers together, and 2.3 bytes (1:4: 2.8) per weight. Before compiling or capturing: graphs
    made earlier go on searching. Eager passes look at the weights' versions, and search again where somebody else wrote; compiled and
    captured ones read what is there (:func:`refresh_masks_`). Passes that compute in another dtype search for themselves.

    Args:
        model: with layers on their device.
        optimizer: that trains them.
        dtype: that products compute in: bfloat16 or float16, under autocast or of 16-bit weights.

    Returns:
        A handle whose ``remove()`` detaches the optimizer; masks are then out of date after its next step.

    Raises:
        ValueError: no such layer, a sharded one or one on the meta device, or another dtype. Then nothing was changed.
        RuntimeError: inside a CUDA graph capture.
    """
    layers = _layers(model)
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: must be torch.bfloat16 or torch.float16, got {dtype!r}")
    for name, layer in layers.items():
        if is_dtensor(layer.weight) or layer.weight.is_meta:
            where = "the meta device" if layer.weight.is_meta else "several processes"
            raise ValueError(f"{name}.weight: must be whole and on its device to have a resident mask, got one on {where}")
    if any(layer.weight.is_cuda for layer in layers.values()) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("model: must get resident masks outside of CUDA graph captures, got one under way")
    peers = list(layers.values())
    for layer in peers:
        layer.resident_mask = dtype
        layer._resident_peers = peers

    def follow(optimizer: torch.optim.Optimizer, *_: object) -> None:
        refresh_resident(peers)
        followed_in_step(optimizer, [layer.weight for layer in peers])

    return optimizer.register_step_post_hook(follow)


def refresh_masks_(model: nn.Module) -> None:
    """Find the resident masks of every :class:`STELinear` anew, in place: to be called after writes to weights that are neither the
    optimizer's nor ``load_state_dict``'s. Nothing waits for the device; inside a CUDA graph capture it is captured.

    Raises:
        ValueError: no such layer.
    """
    refresh_resident(_layers(model).values())


def _layers(model: nn.Module) -> dict[str, STELinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, STELinear)}
    if not layers:
        raise ValueError("model: must have at least one STELinear, got none; call sparsify_ with kind='ste' first")
    return layers
