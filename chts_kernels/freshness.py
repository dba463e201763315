"""Whether something derived from tensors is still up to date, without reading the tensors.

torch counts in-place operations in a tensor's version, and that is nearly enough. What it misses, and what is done here:

- fused optimizers write parameters without counting. Any step of any ``torch.optim.Optimizer`` outdates everything, but for
  what the step itself derived anew (:func:`derived_in_step`);
- a replay of a captured CUDA graph runs no Python, and may write tensors without counting. What was derived inside a capture
  counts as fresh for the rest of that capture only (replays keep its order), and after it nothing ever does outside of one;
- a tensor that replaces a freed one often gets its address, with the same version: storages are told apart by identity;
- tensors made in inference mode have no version: they are never fresh;
- writing through ``.data`` or from a foreign kernel outside of an optimizer: :meth:`Freshness.invalidate` is the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from .cuda_driver import capture_id


class Freshness:
    """Remembers the state of a few tensors at the time something was derived from them."""

    __slots__ = ("__weakref__", "_capture", "_captured", "_key", "_storages")

    def __init__(self) -> None:
        self._captured = False
        self.invalidate()

    def invalidate(self) -> None:
        """Count as outdated until the next :meth:`mark`."""
        self._key: list | None = None
        self._capture: int | None = None
        self._storages: tuple[StorageWeakRef, ...] = ()

    def holds(self, tensors: tuple[torch.Tensor, ...], *settings: object) -> bool:
        """Whether ``tensors`` and ``settings`` are what they were at the last :meth:`mark`."""
        key = self._key
        return key is not None and key == _key(tensors, settings) and _capture(tensors[0]) == self._capture

    def mark(self, tensors: tuple[torch.Tensor, ...], *settings: object) -> None:
        """Something was derived from ``tensors`` under ``settings`` just now."""
        capture = _capture(tensors[0])
        self._captured |= capture is not None
        if (self._captured and capture is None) or any(t.is_inference() for t in tensors):
            self.invalidate()
            return
        self._key, self._capture = _key(tensors, settings), capture
        # A storage's own address cannot be given to another one while a weak reference is held.
        self._storages = tuple(StorageWeakRef(t.untyped_storage()) for t in tensors)
        _watch(self)


def _key(tensors: tuple[torch.Tensor, ...], settings: tuple[object, ...]) -> list | None:
    """None for tensors without a version. Stands in every eager call: a list that grows is the cheapest."""
    key = [settings]
    try:
        for t in tensors:
            key += t.untyped_storage()._cdata, t.data_ptr(), t._version
    except RuntimeError:
        if any(t.is_inference() for t in tensors):
            return None
        raise
    return key


def _capture(tensor: torch.Tensor) -> int | None:
    """The id of the capture under way on the current stream of the tensor's device; None when there is none."""
    if not tensor.is_cuda or not torch.cuda.is_current_stream_capturing():
        return None
    return capture_id(torch.cuda.current_stream(tensor.device).cuda_stream)


_WATCHED: weakref.WeakSet[Freshness] = weakref.WeakSet()
_HOOKED = False


def _watch(item: Freshness) -> None:
    global _HOOKED
    _WATCHED.add(item)
    if not _HOOKED:
        register_optimizer_step_post_hook(_outdate_all)
        _HOOKED = True


def derived_in_step(optimizer: torch.optim.Optimizer, items: Iterable[Freshness]) -> None:
    """To be called inside ``optimizer.step``: ``items`` were derived (and marked) by this step, whose end leaves them fresh."""
    optimizer.__dict__[_DERIVED] = set(items)


_DERIVED = "_chts_derived_in_step"


def _outdate_all(optimizer: torch.optim.Optimizer, *_: object) -> None:
    derived = optimizer.__dict__.pop(_DERIVED, ())
    for item in list(_WATCHED):
        if item not in derived:
            item.invalidate()
