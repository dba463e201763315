"""A trained model as dense weights with zeros, under the names of the plain model."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .linear import densify_
from .loading import load_run
from .methods import get_method
from .models import LlamaConfig
from .runs import RunError
from .storage import replacing, save_tensors, write_json

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What :func:`export_run` wrote."""

    files: list[Path]
    parameters: int
    zeros: int
    """Weights that are exactly zero."""


def export_run(path: str | Path, out: str | Path, *, dtype: str | None = None, force: bool = False) -> Exported:
    """Write a run's model as a folder of dense weights.

    ``model.safetensors`` has the names and shapes of the plain model (``preset.build_model().load_state_dict`` takes it)
    with zeros where there are no links. ``config.json`` holds the model's sizes; for a Llama they are spelled so that
    ``transformers.AutoModelForCausalLM.from_pretrained(out)`` loads the folder. A tokenizer file comes along.

    Args:
        path: run folder (its latest checkpoint) or checkpoint folder.
        out: folder to write (made when missing).
        dtype: "float32", "bfloat16", "float16"; None keeps what was trained.
        force: replace an earlier export.

    Raises:
        CheckpointError: nothing usable at ``path``.
        RunError: ``out`` has an export already.
        ValueError: unknown ``dtype``.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}")
    out = Path(out)
    if (out / WEIGHTS).exists() and not force:
        raise RunError(f"--out {out}: must not have a {WEIGHTS} yet; --force replaces it")
    model, config, checkpoint = load_run(path)
    densify_(model)
    tensors = model.state_dict()
    if dtype is not None:
        tensors = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / WEIGHTS) as temporary:
        save_tensors(temporary, tensors)
    sizes = config.model.to_hf() if isinstance(config.model, LlamaConfig) else asdict(config.model)
    kind = next(t.dtype for t in tensors.values() if t.is_floating_point())
    method = get_method(config.method)
    facts = {"method": config.method, "n": None if method.kind == "dense" else method.n, "step": checkpoint.step}
    write_json(out / CONFIG, sizes | {"torch_dtype": str(kind).removeprefix("torch."), "chts": facts})
    files = [out / WEIGHTS, out / CONFIG]
    if config.data.tokenizer and Path(config.data.tokenizer).is_file():
        shutil.copyfile(config.data.tokenizer, out / TOKENIZER)
        files.append(out / TOKENIZER)
    zeros = sum(int((t == 0).sum()) for t in tensors.values())
    return Exported(files, sum(t.numel() for t in tensors.values()), zeros)
