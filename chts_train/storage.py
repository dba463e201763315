"""Durable files and trees of tensors: what :mod:`chts_train.checkpoint` is built from.

*Durable*: a file or folder appears under its name only when all of its bytes are on disk, so a reader never
sees half of one, whatever killed the writer. *Tree*: nested dicts, lists, tuples, numbers, strings, None and
tensors, i.e. any ``state_dict()``; :func:`split_tree` turns it into JSON plus named tensors and
:func:`join_tree` is its inverse.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .extras import require

_TENSOR, _DICT, _TUPLE = "$tensor", "$dict", "$tuple"


def fsync_file(path: Path) -> None:
    """Force the bytes of ``path`` (a file, or a folder's entries) to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def usual_mode(path: Path) -> None:
    """Give ``path`` the permissions of an ordinary new file or folder; temporary ones start private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit it takes the name ``path``, its bytes on disk.

    On an exception the temporary file is removed and ``path`` is as before.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        usual_mode(temporary)
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_file(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically and durably."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically and durably; floats keep every bit."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def split_tree(tree: Any, tensors: dict[str, torch.Tensor], prefix: str) -> Any:
    """JSON form of ``tree``; its tensors are put into ``tensors`` under names that start with ``prefix``.

    Dicts whose keys are not all strings (an optimizer's ``state``) and tuples keep their kind.

    Raises:
        TypeError: when the tree holds something that is neither JSON nor a tensor; the message has its place.
    """
    if isinstance(tree, torch.Tensor):
        tensors[prefix] = tree.detach()
        return {_TENSOR: prefix}
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in tree):
            return {key: split_tree(value, tensors, f"{prefix}.{key}") for key, value in tree.items()}
        return {_DICT: [[key, split_tree(value, tensors, f"{prefix}.{key}")] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        items = [split_tree(value, tensors, f"{prefix}.{i}") for i, value in enumerate(tree)]
        return items if isinstance(tree, list) else {_TUPLE: items}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    kinds = "JSON (dict, list, tuple, number, str, None) or a tensor"
    raise TypeError(f"{prefix}: must be {kinds}, got {type(tree)}")


def join_tree(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of :func:`split_tree`.

    Raises:
        KeyError: when a tensor that the tree names is not in ``tensors``.
    """
    if isinstance(tree, list):
        return [join_tree(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _DICT in tree:
        return {key: join_tree(value, tensors) for key, value in tree[_DICT]}
    if _TUPLE in tree:
        return tuple(join_tree(value, tensors) for value in tree[_TUPLE])
    return {key: join_tree(value, tensors) for key, value in tree.items()}


def without_aliases(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors without those that are another one under a second name (tied weights), and alias name -> stored name."""
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            stored[name] = tensor
    return stored, aliases


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write a safetensors file (not atomic: for use inside a folder that is renamed when complete).

    Tensors that share memory (tied weights) are stored once. ``metadata`` goes into the file's header.

    Returns:
        Alias name -> stored name, for :func:`load_tensors`.
    """
    save_file = require("safetensors.torch", "saving checkpoints").save_file
    stored, aliases = without_aliases(tensors)
    for name, tensor in stored.items():
        tensor = tensor.cpu().contiguous()
        # A view into a larger storage would be refused by safetensors, or drag the whole storage along.
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        stored[name] = tensor if whole else tensor.clone()
    save_file(stored, path, metadata={"format": "pt", **(metadata or {})})
    usual_mode(path)
    fsync_file(path)
    return aliases


def load_tensors(path: Path, aliases: Mapping[str, str] | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file to CPU tensors, with the aliases of :func:`save_tensors` filled in."""
    load_file = require("safetensors.torch", "reading checkpoints").load_file
    tensors = load_file(path)
    return tensors | {name: tensors[target] for name, target in (aliases or {}).items()}
