"""Dense checkpoints of the Hugging Face kind as sparse models: the start of re-training (ALGORITHM section 4)."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_rules import CheckpointError, check_fit
from .linear import FilterFn, SparsityConfig, sparsify_
from .models import Llama, LlamaConfig, ViT, ViTConfig
from .packed import PACKED, load_packed
from .storage import load_tensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def from_pretrained(
    source: str | Path | nn.Module,
    config: SparsityConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    filter_fn: FilterFn | None = None,
) -> nn.Module:
    """A sparse model with the weights of a dense one; by default every block keeps its exact best pattern by magnitude.

    Args:
        source: a model, made sparse in place and returned: any of transformers' works, say
            ``LlamaForCausalLM.from_pretrained(...)``. Or a folder: an export of this package (dense or packed), or a Hugging Face
            checkpoint of a Llama or ViT with ``config.json`` and safetensors (one file or several), which becomes this package's model.
            Folders hold files; nothing is downloaded.
        config: default ``SparsityConfig(init="magnitude")``. Not for packed exports, whose patterns are those of the file.
        dtype: of the parameters of a folder's model; float32 masters by default. A packed export keeps its own.
        filter_fn: of :func:`chts_train.sparsify_`.

    Raises:
        CheckpointError: files that are missing, or weights that are not those of ``config.json``'s model.
        ValueError: a kind of model that this package does not have (grouped-query attention, scaled rotary positions, ...); the
            message names the setting. transformers' own class takes such a model: pass that.
    """
    if isinstance(source, nn.Module):
        sparsify_(source, config or SparsityConfig(init="magnitude"), filter_fn)
        return source
    folder = Path(source)
    if (folder / PACKED).is_file() and not (folder / WEIGHTS).is_file():
        if config is not None or filter_fn is not None:
            raise ValueError(f"config: must be None for {folder / PACKED}, which has its own patterns, got {config or filter_fn}")
        return load_packed(folder)
    with torch.device("meta"):
        model = build_from_config(folder)
    stored = _read(folder)
    weights = {name: t.to(dtype) for name, t in _our_names(model, stored).items()}
    check_fit(folder, {}, weights, model.to(dtype))
    model.load_state_dict(weights, assign=True)
    sparsify_(model, config or SparsityConfig(init="magnitude"), filter_fn)
    return model


def build_from_config(folder: Path) -> Llama | ViT:
    """This package's model of the sizes in ``folder/config.json``, with initial weights.

    Raises:
        CheckpointError: no such file, or not JSON.
        ValueError: a model that this package does not have; the message names the setting.
    """
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(file, "exist", "no such file") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(file, "be JSON", error) from None
    kind = values.get("model_type")
    if kind == "llama":
        return Llama(_llama(file, values))
    if kind == "vit":
        return ViT(_vit(file, values))
    known = {field.name for field in fields(ViTConfig)}
    if kind is None and known <= values.keys():  # an export of this package's own
        return ViT(ViTConfig(**{name: values[name] for name in known}))
    raise ValueError(f"{file}: model_type must be 'llama' or 'vit', got {kind!r}; {_USE_THEIRS}")


_USE_THEIRS = "load it with transformers and pass the model instead of the folder"


def _require(file: Path, values: dict[str, Any], **expected: Any) -> None:
    """Settings that this package's model has only one of; a missing entry means transformers' default, which is that one."""
    for name, value in expected.items():
        if values.get(name, value) not in (value, None):
            raise ValueError(f"{file}: {name} must be {value!r} for this package's model, got {values[name]!r}; {_USE_THEIRS}")


def _llama(file: Path, values: dict[str, Any]) -> LlamaConfig:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    heads = values["num_attention_heads"]
    _require(
        file, values, num_key_value_heads=heads, head_dim=values["hidden_size"] // heads, hidden_act="silu",
        attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
    )  # fmt: skip
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{file}: rope_type must be 'default' for this package's model, got {kind!r}; {_USE_THEIRS}")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    sizes = {field.name: values[field.name] for field in fields(LlamaConfig) if field.name in values}
    return LlamaConfig(**sizes | ({} if theta is None else {"rope_theta": theta}))


def _vit(file: Path, values: dict[str, Any]) -> ViTConfig:
    _require(file, values, hidden_act="gelu", qkv_bias=True)
    labels = values.get("num_labels") or len(values.get("id2label") or range(2))
    return ViTConfig(
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        in_channels=values.get("num_channels", 3),
        num_classes=labels,
        embed_dim=values["hidden_size"],
        depth=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        mlp_ratio=values["intermediate_size"] / values["hidden_size"],
        layer_norm_eps=values.get("layer_norm_eps", 1e-12),
    )


def _read(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return load_tensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise CheckpointError(folder, f"hold {WEIGHTS} or {INDEX}", "neither")
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    stored: dict[str, Tensor] = {}
    for part in sorted(set(names.values())):
        if not (folder / part).is_file():
            raise CheckpointError(folder / part, f"exist, as {INDEX} says", "no such file")
        stored |= load_tensors(folder / part)
    return stored


_VIT_NAMES = {
    r"(?:vit\.)?embeddings\.cls_token": "cls_token",
    r"(?:vit\.)?embeddings\.position_embeddings": "pos_embed",
    r"(?:vit\.)?embeddings\.patch_embeddings\.projection\.(\w+)": r"patch_embed.proj.\1",
    r"(?:vit\.)?encoder\.layer\.(\d+)\.layernorm_before\.(\w+)": r"blocks.\1.norm1.\2",
    r"(?:vit\.)?encoder\.layer\.(\d+)\.layernorm_after\.(\w+)": r"blocks.\1.norm2.\2",
    r"(?:vit\.)?encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)": r"blocks.\1.attn.\2.\3",
    r"(?:vit\.)?encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)": r"blocks.\1.attn.proj.\2",
    r"(?:vit\.)?encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)": r"blocks.\1.mlp.fc1.\2",
    r"(?:vit\.)?encoder\.layer\.(\d+)\.output\.dense\.(\w+)": r"blocks.\1.mlp.fc2.\2",
    r"(?:vit\.)?layernorm\.(\w+)": r"norm.\1",
    r"classifier\.(\w+)": r"head.\1",
}
"""Hugging Face's stored names of a ViT -> timm's, which are ours; query, key and value then become one matrix."""


def _our_names(model: Llama | ViT, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(model, Llama):
        return {name: t for name, t in stored.items() if not name.endswith("rotary_emb.inv_freq")}  # older files
    named: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        matches = (re.fullmatch(pattern, name) for pattern in _VIT_NAMES)
        found = next(((m, to) for m, to in zip(matches, _VIT_NAMES.values(), strict=True) if m), None)
        named[name if found is None else found[0].expand(found[1])] = tensor
    for name in [name for name in named if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in named for part in parts):
            named[name.replace("query", "qkv")] = torch.cat([named.pop(part) for part in parts])
    return named
