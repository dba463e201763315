"""What a checkpoint must satisfy, apart from its files: pattern tables, ids, and the fit to a live model.

Every failure is a :class:`CheckpointError` with file, rule and value, raised before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chts_kernels.patterns import pattern_table


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message has the file, the rule it breaks and what was found."""

    def __init__(self, path: str | Path, rule: str, found: object) -> None:
        super().__init__(f"{path}: must {rule}, got {found}")


def sparse_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> {"n", "shape"} of the modules that store pattern ids."""
    found = {}
    for name, module in model.named_modules():
        ids = getattr(module, "ids", None)
        if isinstance(ids, torch.Tensor) and hasattr(module, "n"):
            found[name] = {"n": int(module.n), "shape": [4 * ids.shape[0], 4 * ids.shape[1]]}
    return found


def check_layers(
    header_file: Path, header: dict[str, Any], model_file: Path, model: Mapping[str, torch.Tensor]
) -> None:
    """Pattern table hashes, and type, shape and range of all ids."""
    for n, found in header["pattern_tables"].items():
        expected = pattern_table(int(n)).hash if n in ("1", "2") else None
        if found != expected:
            rule = f"be written with this package's pattern table for n = {n}"
            hashes = f"hash {str(found)[:16]}..., not {str(expected)[:16]}..."
            raise CheckpointError(header_file, rule, hashes)
    for name, layer in header["layers"].items():
        n = layer["n"]
        if str(n) not in header["pattern_tables"]:
            rule = f"have the pattern table hash of n = {n} (layer {name})"
            raise CheckpointError(header_file, rule, "none")
        ids, shape = model.get(f"{name}.ids"), [size // 4 for size in layer["shape"]]
        if ids is None or ids.dtype != torch.uint8 or list(ids.shape) != shape:
            found = "nothing" if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise CheckpointError(model_file, f"hold {name}.ids as uint8 {shape}", found)
        count = len(pattern_table(n))
        if ids.numel() and (largest := int(ids.max())) >= count:
            place = (ids == largest).nonzero()[0].tolist()
            rule = f"have {name}.ids below {count} (n = {n})"
            raise CheckpointError(model_file, rule, f"{largest} at {place}")


def check_fit(
    file: Path, stored_layers: Mapping[str, Any], stored: Mapping[str, torch.Tensor], model: nn.Module
) -> None:
    """``file`` holds exactly the tensors of ``model``, shape by shape, type by type, layer by layer."""
    here = model.state_dict()
    missing = sorted(here.keys() - stored.keys())
    extra = sorted(stored.keys() - here.keys())
    if missing or extra:
        raise CheckpointError(
            file, "hold exactly the model's tensors", f"missing {_few(missing)}, unexpected {_few(extra)}"
        )
    for name, tensor in here.items():
        found = stored[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise CheckpointError(
                file,
                f"hold {name} as {tensor.dtype} {list(tensor.shape)}",
                f"{found.dtype} {list(found.shape)}",
            )
    layers = sparse_layers(model)
    for name in sorted(layers.keys() | stored_layers.keys()):
        if layers.get(name) != stored_layers.get(name):
            raise CheckpointError(file, f"have {name} as {layers.get(name)}", stored_layers.get(name))


def check_optimizer(file: Path, state: Any, optimizer: torch.optim.Optimizer) -> None:
    """``state`` has the groups of ``optimizer`` and, per parameter, scalars or tensors of its shape."""
    if not isinstance(state, dict):
        raise CheckpointError(file, "hold an optimizer state", state)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in state["param_groups"]]
    if sizes != saved:
        raise CheckpointError(file, f"hold optimizer groups of {sizes} parameters", saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for group in state["param_groups"] for i in group["params"]]
    for index, parameter in zip(order, parameters, strict=True):
        for key, value in state["state"].get(index, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                rule = f"hold optimizer state {index}.{key} as {list(parameter.shape)}"
                raise CheckpointError(file, rule, list(value.shape))


def _few(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
