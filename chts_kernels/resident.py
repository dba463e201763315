"""Resident operands: kept up to date by whoever writes the weight, and read without a look at its version.

A compiled or captured pass runs no Python: it cannot tell whether operands are those of today's weight and so packs them anew
every time. Resident operands turn that around. Everything here and in :mod:`chts_train` that writes values or ids writes the
operands with them, into the same memory; passes read that memory. Whatever Python still runs (eager passes, optimizer steps)
looks at the versions as before, and finds writes that nobody followed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from .format import Operands
from .freshness import Freshness, _key

STALE = (
    "operands: must be up to date where they are resident, but values or ids were written by something that does not follow with "
    "the operands (it is FusedAdamW with this model, TopologyEvolver, evolve, load_state_dict and .to that do). Call "
    "chts_train.refresh_operands_(model) after such writes: compiled and captured passes between the write and that call read the "
    "operands of before. (DistributedDataParallel writes ids in every forward pass unless built with broadcast_buffers=False.)"
)


class _Followed(Freshness):
    """A Freshness that survives captures and other optimizers: whoever writes the tensors writes what is derived from them, in
    replays too."""

    __slots__ = ()

    def holds(self, tensors: tuple[torch.Tensor, ...], *settings: object) -> bool:
        key = self._key
        return key is not None and key == _key(tensors, settings)

    def mark(self, tensors: tuple[torch.Tensor, ...], *settings: object) -> None:
        self._key, self._capture, self._lasts = _key(tensors, settings), None, True
        self._storages = tuple(StorageWeakRef(t.untyped_storage()) for t in tensors)


class FollowedParameter(_Followed):
    """Whether what a hook of an optimizer derives from a parameter after every step is up to date.

    The hook says so with :func:`followed_in_step`; a step of another optimizer that has the parameter outdates it.
    """

    __slots__ = ("owner",)

    def __init__(self, owner: torch.Tensor) -> None:
        super().__init__()
        self.owner = owner
        _watch(self)


def followed_in_step(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """To be called by a hook after ``optimizer.step``, which has brought up to date what is derived from these parameters."""
    optimizer.__dict__.setdefault(_FOLLOWED, set()).update(id(p) for p in parameters)


class ResidentOperands(Operands):
    """The operands of one weight in one compute dtype, packed when made.

    Args:
        values, ids, n: the weight's, as in :class:`chts_kernels.SparseWeight`.
        dtype: bfloat16 or float16.

    Raises:
        RuntimeError: inside a CUDA graph capture, which would own the memory; for tensors made in inference mode, whose writes
            cannot be noticed.
    """

    __slots__ = ("__weakref__", "owner")
    resident = True

    def __init__(self, values: torch.Tensor, ids: torch.Tensor, n: int, dtype: torch.dtype) -> None:
        if values.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("operands: must be made resident outside of CUDA graph captures, got one under way")
        for name, tensor in (("values", values), ("ids", ids)):
            if tensor.is_inference():
                raise RuntimeError(f"{name}: must not be made in inference mode where operands are resident, got an inference tensor")
        super().__init__()
        self._freshness = _Followed()
        self.pack(values, ids, n, dtype)
        _watch(self)

    @property
    def dtype(self) -> torch.dtype:
        """What the products compute in."""
        return self.values_t.dtype

    def refresh(self, values: torch.Tensor, ids: torch.Tensor, n: int, dtype: torch.dtype) -> None:
        """Check that the operands are those of ``values`` and ``ids``: an eager pass is about to read them.

        Raises:
            RuntimeError: they are not, or of another dtype; the message says what to do.
        """
        if self._freshness.holds((values, ids), dtype):
            return
        if dtype != self.dtype:
            raise RuntimeError(
                f"operands: are resident in {self.dtype} for this weight, got {dtype} to compute in; make them resident in that dtype, "
                "or resident no more, with chts_train.make_operands_resident_"
            )
        raise RuntimeError(STALE)

    def follow(self, values: torch.Tensor, ids: torch.Tensor, n: int) -> None:
        """Pack where a writer has left them behind: in place, unless the weight moved to another device."""
        if not self.fresh(values, ids):
            self.pack(values, ids, n, self.dtype)

    def pack(self, values: torch.Tensor, ids: torch.Tensor, n: int, dtype: torch.dtype) -> None:
        """Pack, fresh or not."""
        own = self.values
        super().pack(values, ids, n, dtype)
        if self._shared and own is not None and own.data_ptr() == self.values.data_ptr() and own.dtype == dtype:
            self.values = own  # the same object, for those who hold it
        self.owner = values
        for tensor in (self.values, self.meta, self.values_t, self.meta_t):
            # As parameters are to torch.compile: a graph reads their memory, and its own CUDA graphs take no copies of them.
            torch._dynamo.mark_static_address(tensor)


_ALIVE: weakref.WeakSet[ResidentOperands | FollowedParameter] = weakref.WeakSet()
_FOLLOWED = "_chts_followed_in_step"
_HOOKED = False


def _watch(item: ResidentOperands | FollowedParameter) -> None:
    global _HOOKED
    _ALIVE.add(item)
    if not _HOOKED:
        register_optimizer_step_post_hook(_outdate)
        _HOOKED = True


def _outdate(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Fused optimizers write parameters without counting. Those that do not follow with what is derived have outdated it."""
    followed = optimizer.__dict__.pop(_FOLLOWED, ())
    if not _ALIVE:
        return
    follows = getattr(optimizer, "follows_with_operands", lambda p: False)
    written = {id(p) for group in optimizer.param_groups for p in group["params"] if not (follows(p) or id(p) in followed)}
    for item in list(_ALIVE):
        if id(item.owner) in written:
            item.invalidate()
