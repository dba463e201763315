"""Checkpoints of a run folder: safetensors for tensors, JSON for everything else, safe against ``kill -9``.

::

    RUN/checkpoints/latest               the name of the newest checkpoint
    RUN/checkpoints/step-00000200/       (the last ``keep`` of them)
        checkpoint.json                  format, schema, step, config, pattern hashes, files with SHA-256
        model.safetensors                the model's state_dict: values, ids, dense parameters
        training.safetensors             optimizer moments, generator states, topology state

The law: a checkpoint folder is written under a temporary name, every file and the folder are fsynced, then it
is renamed, and only then does ``latest`` (itself replaced atomically) name it and are old ones deleted. A folder
that has its final name is never changed again. Hence at any instant ``latest`` names a complete checkpoint.

Reading checks everything before anything is loaded: sizes and SHA-256 of all files, schema version, pattern
table hashes, shapes, types and the range of the ids. Every failure is a :class:`CheckpointError`.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from chts_kernels.patterns import pattern_table

from .checkpoint_rules import CheckpointError, check_fit, check_layers, check_optimizer, sparse_layers
from .distributed import laid_out_like, whole_tree
from .storage import (
    fsync_file,
    join_tree,
    load_tensors,
    save_tensors,
    sha256_file,
    split_tree,
    usual_mode,
    write_text,
)

FORMAT = "chts-checkpoint"
SCHEMA = 1
"""Version of the layout; a reader refuses a newer one."""

FOLDER, LATEST, HEADER = "checkpoints", "latest", "checkpoint.json"
MODEL, TRAINING = "model.safetensors", "training.safetensors"
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


class Stateful(Protocol):
    """Anything with a ``state_dict`` of JSON values and tensors: scheduler, data, topology evolver."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read and verified, on the CPU; nothing of it is in any model yet."""

    path: Path
    step: int
    config: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    """Sparse layers: name -> {"n", "shape": [out_features, in_features]}."""
    model: dict[str, torch.Tensor]
    training: dict[str, Any]
    """"optimizer" (None when saved without one), "parts", "rng"."""


def rng_state() -> dict[str, Any]:
    """States of torch's default generators: the CPU's and every CUDA device's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": list(cuda)}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`rng_state` returned, for the devices that exist here."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, device)


def save_checkpoint(
    run: str | Path,
    *,
    step: int,
    config: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    parts: Mapping[str, Stateful] | None = None,
    keep: int = 2,
    write: bool = True,
) -> Path:
    """Write a checkpoint of ``run`` and make it the latest one.

    Tensors sharded over ranks (DTensors of ``fully_shard``) are gathered one at a time and stored whole: the checkpoint is that
    of a single process and is resumed on any number of them. Every rank must call this, all but one with ``write=False``.

    Args:
        run: the run folder (made when missing).
        step: optimizer steps done.
        config: JSON-able settings needed to build the model again.
        model: its ``state_dict()`` is stored.
        optimizer: its ``state_dict()`` is stored, moments as tensors.
        parts: further state by name (scheduler, data, evolver).
        keep: complete checkpoints to leave in the folder, at least 1.
        write: False: take part in gathering sharded tensors, write nothing.

    Returns:
        The checkpoint's folder; with ``write=False`` the folder of all of them.

    Raises:
        ValueError: ``keep`` or ``step`` out of range.
        OSError: the disk's own errors; the folder then holds what it held before.
    """
    if keep < 1:
        raise ValueError(f"keep: must be at least 1, got {keep}")
    if step < 0:
        raise ValueError(f"step: must be at least 0, got {step}")
    folder = Path(run) / FOLDER
    weights = whole_tree(model.state_dict())
    state = whole_tree(
        {
            "optimizer": optimizer.state_dict() if optimizer is not None else None,
            "parts": {name: part.state_dict() for name, part in (parts or {}).items()},
            "rng": rng_state(),
        }
    )
    if not write:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)

    tensors: dict[str, torch.Tensor] = {}
    training = split_tree(state, tensors, "training")
    layers = sparse_layers(model)
    used = sorted({layer["n"] for layer in layers.values()})
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".tmp-"))
    try:
        aliases = {
            MODEL: save_tensors(temporary / MODEL, weights),
            TRAINING: save_tensors(temporary / TRAINING, tensors),
        }
        header = {
            "format": FORMAT,
            "schema": SCHEMA,
            "step": step,
            "config": dict(config),
            "layers": layers,
            "pattern_tables": {str(n): pattern_table(n).hash for n in used},
            "torch": torch.__version__,
            "files": {
                name: {
                    "bytes": (temporary / name).stat().st_size,
                    "sha256": sha256_file(temporary / name),
                    "aliases": aliases[name],
                }
                for name in (MODEL, TRAINING)
            },
            "training": training,
        }
        write_text(temporary / HEADER, json.dumps(header))
        usual_mode(temporary)
        fsync_file(temporary)
        target = _free_name(folder, step)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_file(folder)
    write_text(folder / LATEST, target.name + "\n")
    for old in _complete(folder)[:-keep]:
        if old != target:
            _remove(old)
    return target


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` means: itself, or the latest one of the run folder ``path``.

    Raises:
        CheckpointError: when there is none.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(path, "exist (a run folder or a checkpoint folder)", "no such path")
    if not path.is_dir():
        raise CheckpointError(path, "be a run folder or a checkpoint folder", "a file")
    if (path / HEADER).is_file():
        return path
    folder = path if path.name == FOLDER else path / FOLDER
    if not folder.is_dir():
        raise CheckpointError(path, f"hold {HEADER} or {FOLDER}/", "neither")
    pointer = folder / LATEST
    if pointer.is_file():
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not _NAME.fullmatch(name) or not (folder / name / HEADER).is_file():
            raise CheckpointError(pointer, f"name a complete checkpoint{_others(folder)}", repr(name))
        return folder / name
    complete = _complete(folder)  # killed between the first rename and the first pointer
    if not complete:
        raise CheckpointError(folder, "hold a complete checkpoint", "none")
    return complete[-1]


def read_checkpoint(path: str | Path, training: bool = True) -> Checkpoint:
    """Read and verify a checkpoint (a run folder means its latest one).

    Args:
        path: run folder or checkpoint folder.
        training: also read optimizer and generator states; else :attr:`Checkpoint.training` is empty.

    Raises:
        CheckpointError: missing, truncated, altered, foreign or newer files, other pattern table, bad ids.
    """
    folder = find_checkpoint(path)
    header = read_header(folder)
    try:
        model = _read_tensors(folder, MODEL, header)
        check_layers(folder / HEADER, header, folder / MODEL, model)
        state = join_tree(header["training"], _read_tensors(folder, TRAINING, header)) if training else {}
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a header edited by hand
        raise CheckpointError(folder / HEADER, "be well formed", repr(error)) from error
    return Checkpoint(folder, header["step"], header["config"], header["layers"], model, state)


def read_header(folder: Path) -> dict[str, Any]:
    """The checked ``checkpoint.json`` of a checkpoint folder (format, schema, fields; not the tensors)."""
    folder = Path(folder)
    file = folder / HEADER
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(file, "exist", f"no such file{_others(folder.parent, folder)}") from None
    except ValueError as error:
        size = file.stat().st_size
        rule = f"be complete JSON{_others(folder.parent, folder)}"
        raise CheckpointError(file, rule, f"{size} bytes: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise CheckpointError(file, f'have "format": "{FORMAT}"', repr(found))
    schema = header.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or not 1 <= schema <= SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        advice = "; a newer version of this package wrote it" if newer else ""
        raise CheckpointError(file, f"have a schema version from 1 to {SCHEMA}", f"{schema!r}{advice}")
    for key in ("step", "config", "layers", "pattern_tables", "files", "training"):
        kind = int if key == "step" else dict
        if not isinstance(header.get(key), kind):
            raise CheckpointError(file, f'have "{key}" ({kind.__name__})', repr(header.get(key)))
    return header


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    parts: Mapping[str, Stateful] | None = None,
    rng: bool = False,
) -> None:
    """Load a checkpoint into live objects, all or nothing.

    Args:
        checkpoint: from :func:`read_checkpoint`, with ``training=True`` for the arguments below.
        model, optimizer, parts: built as they were when it was saved; ``parts`` by the same names. They may be sharded
            (``fully_shard``), over any number of ranks: each takes its rows.
        rng: also put back torch's generators.

    Raises:
        CheckpointError: the checkpoint does not fit; then no object has changed.
    """
    parts = parts or {}
    check_fit(checkpoint.path / MODEL, checkpoint.layers, checkpoint.model, model)
    state = checkpoint.training.get("optimizer")
    if optimizer is not None:
        check_optimizer(checkpoint.path / TRAINING, state, optimizer)
    saved = checkpoint.training.get("parts", {})
    for name in parts:
        if name not in saved:
            raise CheckpointError(checkpoint.path / HEADER, f'hold the state of "{name}"', sorted(saved))
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    done: list[str] = []
    try:
        for name, part in parts.items():
            done.append(name)
            part.load_state_dict(copy.deepcopy(saved[name]))
    except Exception as error:
        for name in done:
            parts[name].load_state_dict(before[name])
        rule = f'hold a fitting state of "{done[-1]}"'
        raise CheckpointError(checkpoint.path / HEADER, rule, error) from error
    here = model.state_dict()
    model.load_state_dict({name: laid_out_like(tensor, here[name]) for name, tensor in checkpoint.model.items()})
    if optimizer is not None:
        optimizer.load_state_dict(_laid_out(state, optimizer))
    if rng:
        set_rng_state(checkpoint.training["rng"])


def _laid_out(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state whose tensors are laid out as the parameters that ``optimizer`` has."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [index for group in state["param_groups"] for index in group["params"]]
    own = {
        index: {
            key: laid_out_like(value, parameter) if isinstance(value, torch.Tensor) and value.dim() else value
            for key, value in state["state"][index].items()
        }
        for index, parameter in zip(order, parameters, strict=True)
        if index in state["state"]
    }
    return {**state, "state": own}


def _read_tensors(folder: Path, name: str, header: dict[str, Any]) -> dict[str, torch.Tensor]:
    file, facts = folder / name, header["files"].get(name)
    if not isinstance(facts, dict):
        raise CheckpointError(folder / HEADER, f'list "{name}" under "files"', sorted(header["files"]))
    hint = _others(folder.parent, folder)
    if not file.is_file():
        raise CheckpointError(file, f"exist{hint}", "no such file")
    size = file.stat().st_size
    if size != facts["bytes"]:
        raise CheckpointError(file, f"have {facts['bytes']} bytes{hint}", f"{size} (truncated or replaced)")
    digest = sha256_file(file)
    if digest != facts["sha256"]:
        rule = f"have SHA-256 {facts['sha256'][:16]}...{hint}"
        raise CheckpointError(file, rule, f"{digest[:16]}... (altered)")
    try:
        return load_tensors(file, facts.get("aliases"))
    except ImportError:
        raise
    except Exception as error:  # safetensors raises its own type, not exported in all versions
        raise CheckpointError(file, f"be a safetensors file{hint}", error) from None


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first by time of writing: a run may have gone back to an earlier step."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / HEADER).is_file()]
    return sorted(found, key=lambda p: ((p / HEADER).stat().st_mtime_ns, _order(p)))


def _order(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    return int(match[1]), int(match[2] or 0)


def _free_name(folder: Path, step: int) -> Path:
    """``step-N``, or ``step-N.1`` and so on where that is taken: a checkpoint is never changed."""
    name, revision = f"step-{step:08d}", 0
    while (target := folder / (f"{name}.{revision}" if revision else name)).exists():
        revision += 1
    return target


def _remove(path: Path) -> None:
    """Delete a checkpoint so that it is never seen half deleted."""
    doomed = path.with_name(f".tmp-old-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Delete what a killed writer left behind."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _others(folder: Path, broken: Path | None = None) -> str:
    """A hint that names the other complete checkpoints, for error messages."""
    names = [p.name for p in _complete(folder) if p != broken]
    return f" (also there: {', '.join(reversed(names))})" if names else ""
