"""Packed models: one safetensors file with ids and values instead of dense weights, bit for bit what was trained.

Schema 1 (the README has it for readers in other languages). Tensors: for every sparse layer L ``L.ids`` uint8 [N/4, K/4] and
``L.values`` [N, K*n/4]; everything else under its own name. The file's metadata has under ``chts`` a JSON object:
``schema`` 1; ``layers`` {L: {"n": 1 or 2, "shape": [N, K]}}; ``pattern_tables`` {"n": SHA-256 of the table that numbers the
patterns}; ``aliases`` {name: stored name} of tied weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chts_kernels.patterns import pattern_table

from .baselines import STELinear
from .checkpoint_rules import CheckpointError, check_fit, check_layers
from .checkpoint_rules import sparse_layers as layers_with_ids
from .distributed import gathered
from .export import CONFIG, PACKED, Exported, check_target, model_sizes, writes_files
from .extras import require
from .linear import SparseLinear, _replace
from .storage import load_tensors, replacing, save_tensors, without_aliases, write_json

SCHEMA = 1


def export_packed(
    model: nn.Module, out: str | Path, *, force: bool = False, facts: Mapping[str, Any] | None = None
) -> Exported:
    """Write ``packed.safetensors`` and ``config.json`` (the sizes, where the model knows them) into the folder ``out``.

    Args:
        model: with sparse layers, on any device; of a model that FSDP has sharded, every rank takes part and rank 0 writes.
        out: folder to write (made when missing).
        force: replace an earlier export.
        facts: more entries under "chts" in ``config.json``.

    Raises:
        RunError: ``out`` has a packed export already.
        ValueError: no sparse layer, or one that is masked in its forward pass (STE) and so has no pattern ids.
    """
    out = check_target(out, PACKED, None, force)
    layers = layers_with_ids(model)
    masked = [name for name, module in model.named_modules() if isinstance(module, STELinear)]
    if masked or not layers:
        found = f"{masked[0]} with dense weights that are masked" if masked else "none; a dense export has everything"
        raise ValueError(f"model: must have sparse layers with pattern ids, and only these, to be packed, got {found}")
    tensors, aliases = without_aliases({name: gathered(t) for name, t in model.state_dict().items()})
    header = {
        "schema": SCHEMA,
        "layers": layers,
        "pattern_tables": {str(n): pattern_table(n).hash for n in sorted({layer["n"] for layer in layers.values()})},
        "aliases": aliases,
    }
    done = Exported([], sum(t.numel() for t in tensors.values()), sum(int((t == 0).sum()) for t in tensors.values()))
    if not writes_files():
        return done
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / PACKED) as temporary:
        save_tensors(temporary, tensors, {"chts": json.dumps(header)})
    done.files.append(out / PACKED)
    sizes = model_sizes(model)
    if sizes is not None:
        write_json(out / CONFIG, sizes | {"chts": {"packed": SCHEMA, **(facts or {})}})
        done.files.append(out / CONFIG)
    return done


def read_packed(path: str | Path) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """The file, its header and its tensors (CPU), checked: schema, pattern tables, types, shapes and range of all ids.

    Args:
        path: the file, or the folder it is in.

    Raises:
        CheckpointError: anything that is not as it must be; the message has the file and the rule.
    """
    file = Path(path)
    file = file / PACKED if file.is_dir() else file
    safetensors = require("safetensors", "reading packed models")
    if not file.is_file():
        raise CheckpointError(file, "exist", "no such file")
    try:
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except Exception as error:  # safetensors' own type, not exported in all versions
        raise CheckpointError(file, "be a safetensors file", error) from None
    if "chts" not in metadata:
        raise CheckpointError(file, "have metadata under 'chts', as packed models do", sorted(metadata))
    header = json.loads(metadata["chts"])
    if header.get("schema") != SCHEMA:
        raise CheckpointError(file, f"have schema {SCHEMA}, the one this version reads", header.get("schema"))
    tensors = load_tensors(file, header["aliases"])
    check_layers(file, header, file, tensors)
    return file, header, tensors


def load_packed(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A model out of a packed file, with the bits that were saved.

    Args:
        path: the file, or the folder it is in.
        model: a plain or sparsified model of these sizes and dtypes, changed in place: the layers that the file has as sparse become
            :class:`chts_train.SparseLinear` where they are not yet. Build its optimizer afterwards. None: this package's own Llama
            or ViT, built from the ``config.json`` beside the file.

    Raises:
        CheckpointError: an unusable file, or one that does not fit ``model``, which then stays as it was.
        ValueError: without ``model``, a ``config.json`` that is not of this package's models.
    """
    file, header, tensors = read_packed(path)
    if model is None:
        from .pretrained import build_from_config

        with torch.device("meta"):
            model = build_from_config(file.parent)
            _make_sparse(file, model, header["layers"])
        missing = model.load_state_dict(tensors, strict=False, assign=True)
        if missing.missing_keys or missing.unexpected_keys:
            found = f"missing {missing.missing_keys[:3]}, unexpected {missing.unexpected_keys[:3]}"
            raise CheckpointError(file, f"hold exactly the tensors of {CONFIG}'s model", found)
        return model
    replaced = _make_sparse(file, model, header["layers"])
    try:
        check_fit(file, header["layers"], tensors, model)
    except CheckpointError:
        _replace(model, {fresh: module for module, fresh in replaced.items()})
        raise
    model.load_state_dict(tensors)
    return model


def _make_sparse(file: Path, model: nn.Module, layers: dict[str, Any]) -> dict[nn.Module, nn.Module]:
    """Put empty sparse layers where the file has sparse ones and the model has not; returns what replaced what."""
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear | SparseLinear) or [module.out_features, module.in_features] != layer["shape"]:
            found = "nothing" if module is None else f"{type(module).__name__}({module.extra_repr()})"
            raise CheckpointError(file, f"fit the model: {name} a linear layer of {layer['shape']}", found)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        module = modules[name]
        if isinstance(module, SparseLinear) and module.n == layer["n"]:
            continue
        kept = next(module.parameters(recurse=False))
        rows, columns = layer["shape"]
        fresh = SparseLinear(columns, rows, module.bias is not None, layer["n"], device=kept.device, dtype=kept.dtype)
        replaced[module] = fresh.train(module.training)
    _replace(model, replaced)
    return replaced
