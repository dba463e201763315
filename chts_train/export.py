"""Trained models for other programs: dense safetensors, and torch's own semi-structured sparse tensors.

The compressed file format is :mod:`chts_train.packed`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chts_kernels import unpack

from .baselines import STELinear
from .distributed import gathered
from .linear import SparseLinear, _replace
from .loading import load_run
from .methods import get_method
from .runs import RunError
from .storage import replacing, save_tensors, without_aliases, write_json

WEIGHTS, PACKED, CONFIG, TOKENIZER = "model.safetensors", "packed.safetensors", "config.json", "tokenizer.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    files: list[Path]
    parameters: int
    zeros: int
    """Weights that are exactly zero."""


def export_run(
    path: str | Path, out: str | Path, *, dtype: str | None = None, packed: bool = False, force: bool = False
) -> Exported:
    """Write a run's model as a folder of dense weights, or packed.

    ``model.safetensors`` has the names and shapes of the plain model (``preset.build_model().load_state_dict`` takes it)
    with zeros where there are no links. ``config.json`` holds the model's sizes; for a Llama they are spelled so that
    ``transformers.AutoModelForCausalLM.from_pretrained(out)`` loads the folder. A tokenizer file comes along.

    Args:
        path: run folder (its latest checkpoint) or checkpoint folder.
        out: folder to write (made when missing).
        dtype: "float32", "bfloat16", "float16"; None keeps what was trained.
        packed: write :func:`chts_train.packed.export_packed`'s file instead.
        force: replace an earlier export.

    Raises:
        CheckpointError: nothing usable at ``path``.
        RunError: ``out`` has an export of this kind already.
        ValueError: unknown ``dtype``, or ``packed`` for a model without sparse layers.
    """
    check_target(out, PACKED if packed else WEIGHTS, dtype, force)  # before anything is read
    model, config, checkpoint = load_run(path)
    method = get_method(config.method)
    dense = method.form_after(config, checkpoint.step) == "dense"
    facts = {"method": config.method, "n": None if dense else method.n, "step": checkpoint.step}
    if packed:
        from .packed import export_packed

        done = export_packed(model if dtype is None else model.to(DTYPES[dtype]), out, force=force, facts=facts)
    else:
        done = export_dense(model, out, dtype=dtype, force=force, facts=facts)
    if config.data.tokenizer and Path(config.data.tokenizer).is_file():
        shutil.copyfile(config.data.tokenizer, Path(out) / TOKENIZER)
        done.files.append(Path(out) / TOKENIZER)
    return done


def export_dense(
    model: nn.Module,
    out: str | Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model's weights, dense, and its sizes; the model stays as it is.

    ``model.safetensors`` has the names of the model before :func:`chts_train.sparsify_`; ``config.json`` is what
    ``transformers`` and vLLM read, when the model is this package's Llama or one of transformers' own. Tied weights are stored once.

    Args:
        model: sparse or not, on any device; of a model that FSDP has sharded, every rank takes part and rank 0 writes.
        out, dtype, force: see :func:`export_run`.
        facts: entries under "chts" in ``config.json``.

    Raises:
        RunError: ``out`` has an export already.
        ValueError: unknown ``dtype``.
    """
    out = check_target(out, WEIGHTS, dtype, force)
    tensors, _ = without_aliases(dense_state_dict(model))
    if dtype is not None:
        tensors = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in tensors.items()}
    done = Exported([], sum(t.numel() for t in tensors.values()), sum(int((t == 0).sum()) for t in tensors.values()))
    if not writes_files():
        return done
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / WEIGHTS) as temporary:
        save_tensors(temporary, tensors)
    done.files.append(out / WEIGHTS)
    sizes = model_sizes(model)
    if sizes is not None:
        kind = next(t.dtype for t in tensors.values() if t.is_floating_point())
        write_json(out / CONFIG, sizes | {"torch_dtype": str(kind).removeprefix("torch."), "chts": dict(facts or {})})
        done.files.append(out / CONFIG)
    return done


def dense_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the model before :func:`chts_train.sparsify_`: [N, K] weights, +0 where there are no links.

    Sharded tensors (FSDP2) are gathered one after the other: every rank must take part, and gets all of them.
    """
    modules = model.named_modules(remove_duplicate=False)  # a layer that is used twice has two names
    sparse = {name: m for name, m in modules if isinstance(m, SparseLinear | STELinear)}
    dense: dict[nn.Module, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        layer = sparse.get(owner)
        if isinstance(layer, SparseLinear) and leaf in ("values", "ids"):
            if layer not in dense:
                dense[layer] = unpack(gathered(layer.values.detach(), layer.ids.device), layer.ids, layer.n)
            tensors[f"{owner}.weight"] = dense[layer]
        elif isinstance(layer, STELinear) and leaf == "weight":
            tensors[name] = layer.to_linear().weight.detach()
        else:
            tensors[name] = gathered(tensor)
    return tensors


def model_sizes(model: nn.Module) -> dict[str, Any] | None:
    """The content of ``config.json`` for this model, or None when it does not know its sizes."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_hf"):
        return config.to_hf()
    if hasattr(config, "to_diff_dict"):  # transformers: what differs from the defaults, as save_pretrained writes it
        return config.to_diff_dict() | {"architectures": [type(model).__name__], "model_type": config.model_type}
    return asdict(config) if is_dataclass(config) else None


def writes_files() -> bool:
    """Whether this process is the one that writes: rank 0, or the only one."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def to_semi_structured_(model: nn.Module, backend: str = "cusparselt", *, dtype: torch.dtype | None = None) -> int:
    """Turn the sparse layers of ``model`` into ``nn.Linear`` over torch's ``SparseSemiStructuredTensor``, in place.

    For inference by torch's own kernels: no gradients, no evolution. 1:4 layers are 2:4 layers too.

    Args:
        model: on a CUDA device.
        backend: "cusparselt" (compute capability 8.x and 9.0) or "cutlass" (torch tests it on 8.x only).
        dtype: of the converted weights and biases, which must be the inputs'; None keeps theirs. bfloat16, float16 or float32.

    Returns:
        The number of converted layers.

    Raises:
        ValueError: no sparse layer, an unknown backend, or a layer whose device, dtype or sizes the backend does not take; the
            message names the layer and the rule.
        RuntimeError: torch cannot run the backend on this device; the message has its reason. Whatever is raised, the model is as
            it was.
    """
    import torch.sparse.semi_structured as torch_sparse

    kinds = {"cutlass": "SparseSemiStructuredTensorCUTLASS", "cusparselt": "SparseSemiStructuredTensorCUSPARSELT"}
    if backend not in kinds:
        raise ValueError(f"backend: must be one of {list(kinds)}, got {backend!r}")
    kind = getattr(torch_sparse, kinds[backend])
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    if not layers:
        raise ValueError("model: must have at least one SparseLinear, got none")
    for name, layer in layers.items():
        _check_semi_structured(name, layer, backend, kind._DTYPE_SHAPE_CONSTRAINTS, dtype or layer.values.dtype)
    converted: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        linear = layer.to_linear().requires_grad_(False).to(dtype)
        x = linear.weight.new_zeros(64, layer.in_features)
        try:
            linear.weight = nn.Parameter(kind.from_dense(linear.weight.detach()), requires_grad=False)
            if not converted:  # torch refuses a device only when it multiplies
                linear(x)
        except RuntimeError as error:
            where = torch.cuda.get_device_name(x.device)
            raise RuntimeError(f"backend: {backend!r} cannot run on {where} here: {error}") from error
        converted[layer] = linear
    _replace(model, converted)
    return len(converted)


def _check_semi_structured(
    name: str, layer: SparseLinear, backend: str, limits: Mapping[torch.dtype, Any], dtype: torch.dtype
) -> None:
    if dtype not in limits or not dtype.is_floating_point:
        kinds = ", ".join(str(d).removeprefix("torch.") for d in limits if d.is_floating_point)
        raise ValueError(f"dtype: must be one of {kinds} for the {backend} backend, got {dtype} for {name}")
    rows, columns = limits[dtype].sparse_min_rows, limits[dtype].sparse_min_cols
    if layer.out_features % rows or layer.in_features % columns:
        raise ValueError(
            f"model: must have sizes (out_features, in_features) divisible by ({rows}, {columns}) for the {backend} backend in "
            f"{str(dtype).removeprefix('torch.')}, got {(layer.out_features, layer.in_features)} for {name}"
        )
    if not layer.values.is_cuda:
        raise ValueError(f"model: must be on a CUDA device for the {backend} backend, got {name} on {layer.values.device}")


def check_target(out: str | Path, file: str, dtype: str | None, force: bool) -> Path:
    """The folder to write ``file`` into, when the options allow it."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}")
    out = Path(out)
    if (out / file).exists() and not force and writes_files():
        raise RunError(f"--out {out}: must not have a {file} yet; --force replaces it")
    return out
