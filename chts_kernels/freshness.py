"""Whether something derived from tensors is still up to date, without reading the tensors.

torch counts in-place operations in a tensor's version, and that is nearly enough. What it misses, and what is done here:

- fused optimizers write parameters without counting. Any step of any ``torch.optim.Optimizer`` outdates everything;
- a replay of a captured CUDA graph runs no Python. What was derived inside a capture never counts as fresh outside of it,
  and is always derived again inside;
- a tensor that replaces a freed one often gets its address, with the same version: storages are told apart by identity;
- tensors made in inference mode have no version: they are never fresh;
- writing through ``.data`` or from a foreign kernel outside of an optimizer: :meth:`Freshness.invalidate` is the way.
"""

from __future__ import annotations

import weakref

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook


class Freshness:
    """Remembers the state of a few tensors at the time something was derived from them."""

    __slots__ = ("__weakref__", "_captured", "_key", "_storages")

    def __init__(self) -> None:
        self._captured = False
        self.invalidate()

    def invalidate(self) -> None:
        """Count as outdated until the next :meth:`mark`."""
        self._key: tuple | None = None
        self._storages: tuple[StorageWeakRef, ...] = ()

    def holds(self, tensors: tuple[torch.Tensor, ...], *settings: object) -> bool:
        """Whether ``tensors`` and ``settings`` are what they were at the last :meth:`mark`."""
        return self._key is not None and self._key == _key(tensors, settings) and not _capturing(tensors[0])

    def mark(self, tensors: tuple[torch.Tensor, ...], *settings: object) -> None:
        """Something was derived from ``tensors`` under ``settings`` just now."""
        self._captured |= _capturing(tensors[0])
        if self._captured or any(t.is_inference() for t in tensors):
            self.invalidate()
            return
        self._key = _key(tensors, settings)
        # A storage's own address cannot be given to another one while a weak reference is held.
        self._storages = tuple(StorageWeakRef(t.untyped_storage()) for t in tensors)
        _watch(self)


def _key(tensors: tuple[torch.Tensor, ...], settings: tuple[object, ...]) -> tuple:
    return settings, *((t.untyped_storage()._cdata, t.data_ptr(), t._version) for t in tensors if not t.is_inference())


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


_WATCHED: weakref.WeakSet[Freshness] = weakref.WeakSet()
_HOOKED = False


def _watch(item: Freshness) -> None:
    global _HOOKED
    _WATCHED.add(item)
    if not _HOOKED:
        register_optimizer_step_post_hook(_outdate_all)
        _HOOKED = True


def _outdate_all(*_: object) -> None:
    for item in list(_WATCHED):
        item.invalidate()
