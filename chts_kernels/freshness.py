"""Whether something derived from tensors is still up to date, without reading the tensors.

torch counts in-place operations in a tensor's version, and that is nearly enough. What it misses, and what is done here:

- fused optimizers write parameters without counting. Any step of any ``torch.optim.Optimizer`` outdates everything, but for
  what the step itself derived anew (:func:`derived_in_step`);
- a replay of a captured CUDA graph runs no Python, and may write tensors without counting. What was derived inside a capture
  counts as fresh for the rest of that capture only (replays keep its order), and after it nothing ever does outside of one, but
  within one autograd node: what its forward pass derived, or found fresh, serves its backward pass (:meth:`Freshness.unchanged`).
  A replay in between that writes the tensors breaks autograd's own rule that nothing needed by a backward pass is changed; one
  that does not rewrites what was derived with the same bits, if at all;
- what a captured optimizer step writes, its replays write: what is derived from such a parameter lasts no longer than that;
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

    __slots__ = ("__weakref__", "_capture", "_captured", "_key", "_lasts", "_storages", "_watched")

    def __init__(self) -> None:
        self._captured = self._watched = False
        self._storages: tuple[StorageWeakRef, ...] = ()
        self.invalidate()

    def invalidate(self) -> None:
        """Count as outdated until the next :meth:`mark`."""
        self._key: list | None = None
        self._capture: int | None = None
        self._lasts = False

    @property
    def stamp(self) -> object | None:
        """The state of the tensors at the last :meth:`mark`; None when that counts no more."""
        return self._key

    def holds(self, tensors: tuple[torch.Tensor, ...], *settings: object) -> bool:
        """Whether ``tensors`` and ``settings`` are what they were at the last :meth:`mark`."""
        key = self._key
        return self._lasts and key == _key(tensors, settings) and _capture(tensors[0]) == self._capture

    def unchanged(self, stamp: object | None, tensors: tuple[torch.Tensor, ...], *settings: object) -> bool:
        """Whether they are what they were at the mark of that ``stamp`` and at the last one. For the backward pass of the autograd
        node whose forward pass saved the tensors and the stamp: what is there was derived then, or since."""
        key = self._key
        return key is not None and key == stamp and key == _key(tensors, settings) and _capture(tensors[0]) == self._capture

    def mark(self, tensors: tuple[torch.Tensor, ...], *settings: object) -> None:
        """Something was derived from ``tensors`` under ``settings`` just now."""
        key = _key(tensors, settings)
        if key is None:
            self.invalidate()
            return
        self._key, self._capture = key, _capture(tensors[0])
        if [storage.cdata for storage in self._storages] != key[1::3]:
            # A storage's own address cannot be given to another one while a weak reference is held.
            self._storages = tuple(StorageWeakRef(t.untyped_storage()) for t in tensors)
        self._captured |= self._capture is not None or not _WRITTEN_BY_REPLAYS.isdisjoint(self._storages)
        self._lasts = self._capture is not None or not self._captured
        if not self._watched:
            _watch(self)
            self._watched = True


def _key(tensors: tuple[torch.Tensor, ...], settings: tuple[object, ...]) -> list | None:
    """The settings, and of every tensor the storage, the address and the version; None for tensors without a version. Stands in
    every eager call, nearly always for two tensors: those without a loop, at half the time."""
    try:
        if len(tensors) == 2:
            a, b = tensors
            return [settings, a.untyped_storage()._cdata, a.data_ptr(), a._version, b.untyped_storage()._cdata, b.data_ptr(), b._version]
        key = [settings]
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
_WRITTEN_BY_REPLAYS: set[StorageWeakRef] = set()  # of parameters that an optimizer's captured step writes
_PLAIN = (torch.Tensor, torch.nn.Parameter)  # what has a storage of its own
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
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        for group in optimizer.param_groups:
            _WRITTEN_BY_REPLAYS.update(StorageWeakRef(p.untyped_storage()) for p in group["params"] if p.is_cuda and type(p) in _PLAIN)
    for item in list(_WATCHED):
        if item not in derived:
            item.invalidate()
