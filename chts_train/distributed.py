"""What sparse layers and the evolver need to know of ``torch.distributed``: sharded values, and topologies that agree.

Noise is a function of (seed, layer, step), so ranks that hold equal values compute equal topologies without a message. Under
FSDP2 (``fully_shard``) values and moments are sharded along dim 0, ids are a replicated buffer: an update gathers
the values of a few layers at a time, every rank computes the new ids, and each moves its own rows. Rows of a shard need not be
multiples of 4.

Collectives are those of torch alone (``DTensor.full_tensor``, ``all_gather_into_tensor``, ...); this module imports none of
``torch.distributed``'s packages before the user does.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from chts_kernels import Operands, SparseWeight, carry_over_
from chts_kernels.lasting import to_device
from chts_kernels.ops._batch import aligned
from chts_kernels.patterns import BLOCK

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""Path components that torch.compile and activation checkpointing put into the names of what they wrap."""
CHUNK = 64 << 20
"""Bytes of ids that are hashed at a time, in temporaries of several times their size."""


class TopologyMismatch(RuntimeError):
    """Ranks that train one model hold different pattern ids."""


class GatheredWeight(SparseWeight):
    """The weight of a layer managed by FSDP: its operands are derived anew for every product and kept by nobody.

    What is derived from gathered values must not outlive them, or a rank would hold the whole model again; and FSDP refills
    gathered values without moving their version counter, so nothing kept could be told fresh from stale.
    """

    __slots__ = ()

    @classmethod
    def over(cls, ids: torch.Tensor, values: torch.Tensor, n: int) -> GatheredWeight:
        """The weight over a layer's tensors, unchecked."""
        return cls.view(ids, values, n, _NONE_KEPT)

    def operands(self, dtype: torch.dtype, stamp: object | None = None) -> Operands:
        """What a sparse tensor-core kernel of this compute dtype reads; nothing served before, so ``stamp`` is not looked at."""
        fresh = Operands()
        fresh.refresh(self.values, self.ids, self.n, dtype)
        return fresh


_NONE_KEPT = Operands()


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def plain_name(name: str) -> str:
    """A qualified name without the components that wrappers added: the same whether a block is compiled or not."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def reshard(model: nn.Module) -> None:
    """Have every FSDP2 module of ``model`` hold its sharded parameters, as optimizer and evolver do; free when it does."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is not None:
        for module in model.modules():
            if isinstance(module, kind):
                module.reshard()


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """All of a tensor on this rank: a DTensor is gathered (every rank must take part), others are returned as they are.

    Args:
        tensor: any tensor.
        device: gather there; parameters offloaded to the CPU travel through the mesh's own device.
    """
    if not is_dtensor(tensor):
        return tensor if device is None else tensor.to(device)
    tensor = tensor.detach()
    if device is not None and tensor.to_local().device != device:
        tensor = type(tensor).from_local(
            tensor.to_local().to(device), tensor.device_mesh, tensor.placements, run_check=False,
            shape=tensor.shape, stride=tensor.stride(),
        )  # fmt: skip
    return tensor.full_tensor()


def laid_out_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``tensor``, whole on every rank or a DTensor, in the layout of ``like`` (a DTensor's mesh and placements, or whole)."""
    if not is_dtensor(like):
        return gathered(tensor)
    if is_dtensor(tensor) and tensor.placements == like.placements and tensor.device_mesh == like.device_mesh:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    whole = gathered(tensor).to(like.to_local().device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # None: no communication


def whole_tree(tree: Any) -> Any:
    """A ``state_dict`` with its DTensors gathered, one at a time and straight to the CPU; every rank must take part.

    The result is that of a single process. Ranks other than 0 get the same structure with empty tensors in those places.
    """
    if is_dtensor(tree):
        whole = gathered(tree)
        return whole.cpu() if torch.distributed.get_rank() == 0 else whole.new_empty(0, device="cpu")
    if isinstance(tree, Mapping):
        return {key: whole_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole_tree(value) for value in tree)
    return tree


def first_row(values: torch.Tensor, name: str = "values") -> int:
    """The row of the whole tensor that this rank's shard of a DTensor begins with.

    Raises:
        NotImplementedError: when it is not sharded along dim 0 of one mesh dimension (and replicated over the others).
    """
    axis = _sharded_axis(values, name)
    if axis is None:
        return 0
    mesh = values.device_mesh
    return min(mesh.get_local_rank(axis) * -(-len(values) // mesh.size(axis)), len(values))


def _sharded_axis(values: torch.Tensor, name: str) -> int | None:
    """The mesh dimension over which a DTensor's rows are divided, as ``torch.chunk`` divides; None where every rank holds all."""
    from torch.distributed.tensor import Replicate, Shard

    sharded = [axis for axis, p in enumerate(values.placements) if not isinstance(p, Replicate)]
    if len(sharded) > 1 or any(type(values.placements[axis]) is not Shard or values.placements[axis].dim != 0 for axis in sharded):
        raise NotImplementedError(
            f"{name}: must be sharded along dim 0 of one mesh dimension, as fully_shard does by default, got placements "
            f"{tuple(values.placements)}"
        )
    return sharded[0] if sharded else None


def mesh_group(values: torch.Tensor) -> Any:
    """The process group over which a DTensor's rows are divided; None where every rank holds all of them."""
    axis = _sharded_axis(values, "values")
    return None if axis is None else values.device_mesh.get_group(axis)


@torch.no_grad()
def gathered_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """All of every DTensor on this rank, like :func:`gathered`, in one message for those of a mesh and dtype; copies, always.

    Tensors of one shape are copied together, into the message and out of it: the number of launches is that of the shapes.

    Args:
        tensors: DTensors [N, ...] that :func:`first_row` takes, in the same order on every rank.
        device: gather there.
    """
    whole: list[torch.Tensor] = [torch.empty(0)] * len(tensors)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device_mesh, tensor.placements, tensor.dtype, tensor.shape), []).append(place)
    messages: dict[tuple[Any, int | None, torch.dtype], list[list[int]]] = {}
    for (mesh, _, dtype, _), places in kinds.items():
        axis = _sharded_axis(tensors[places[0]], f"tensors[{places[0]}]")
        messages.setdefault((mesh, axis, dtype), []).append(places)
    for (mesh, axis, dtype), groups in messages.items():
        if axis is None:
            for place in (place for places in groups for place in places):
                whole[place] = tensors[place].to_local().to(device, copy=True)
            continue
        size = mesh.size(axis)
        # A rank's rows of all tensors of a shape; the last ranks may have fewer.
        slots = [(len(places), -(-tensors[places[0]].shape[0] // size), *tensors[places[0]].shape[1:]) for places in groups]
        lengths = [math.prod(slot) for slot in slots]
        mine = torch.empty(sum(lengths), dtype=dtype, device=device)
        for own, slot, places in zip(mine.split(lengths), slots, groups, strict=True):
            parts = [tensors[place].to_local() for place in places]
            rows, own = len(parts[0]), own.view(slot)
            if rows:
                torch._foreach_copy_(list(own[:, :rows].unbind()), parts)
            own[:, rows:].zero_()
        all_of_them = torch.empty(size, len(mine), dtype=dtype, device=device)
        torch.distributed.all_gather_into_tensor(all_of_them.view(-1), mine, group=mesh.get_group(axis))
        for columns, slot, places in zip(all_of_them.split(lengths, 1), slots, groups, strict=True):
            together = columns.view(size, *slot).transpose(0, 1).flatten(1, 2)
            for place, one in zip(places, together.unbind(), strict=True):
                whole[place] = aligned(one[: tensors[place].shape[0]])
    return whole


def sums(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The sum of every tensor's elements as 0-dim int64; of DTensors over all shards, in one message for those of a mesh.

    Args:
        tensors: of integers, in the same order on every rank.
        device: where DTensors' sums are added up.
    """
    own = [(t.to_local() if is_dtensor(t) else t).sum(dtype=torch.int64) for t in tensors]
    groups: dict[tuple[Any, int], list[int]] = {}
    for place, tensor in enumerate(tensors):
        axis = _sharded_axis(tensor, f"tensors[{place}]") if is_dtensor(tensor) else None
        if axis is not None:
            groups.setdefault((tensor.device_mesh, axis), []).append(place)
    for (mesh, axis), places in groups.items():
        total = torch.stack([own[place] for place in places]).to(device)
        torch.distributed.all_reduce(total, group=mesh.get_group(axis))
        for place, number in zip(places, total.unbind(), strict=True):
            own[place] = number
    return own


def carry_over_rows_(
    layers: Sequence[Sequence[torch.Tensor]], old_ids: Sequence[torch.Tensor], new_ids: Sequence[torch.Tensor], n: int, start: int, *,
    impl: str = "auto",
) -> None:  # fmt: skip
    """:func:`chts_kernels.carry_over_` of rows ``start``, ``start + 1``, ... of the link data of matrices of one shape, in place.

    A row of compressed values depends on the ids of its own row of blocks alone, so a shard may begin and end inside a block. The
    matrices move together, through a copy of them all (two, where a shard cuts a block): a few launches instead of a few for each.

    Args:
        layers: of each matrix its tensors [rows, K*n/4], any dtype; rows may be 0. All have the same rows, and tensors of the same dtypes
            in the same order.
        old_ids, new_ids: of each uint8 [N/4, K/4], of the whole matrix.
        n: links per row of a 4x4 block.
        start: the row of the matrices that the tensors begin with.
    """
    rows = layers[0][0].shape[0] if layers and layers[0] else 0
    if not rows:
        return
    device = layers[0][0].device
    blocks = slice(start // BLOCK, -(-(start + rows) // BLOCK))
    above, below = start - blocks.start * BLOCK, blocks.stop * BLOCK - start - rows
    old, new = (torch.cat([one[blocks] for one in ids]).to(device) for ids in (old_ids, new_ids))
    if len(layers) == 1 and not above and not below:
        carry_over_(layers[0], old, new, n, impl=impl)
        return
    columns = [list(column) for column in zip(*layers, strict=True)]
    together = [torch.stack(column) for column in columns]
    padded = [F.pad(t, (0, 0, above, below)) if above or below else t for t in together]
    carry_over_([t.view(-1, t.shape[-1]) for t in padded], old, new, n, impl=impl)
    for column, moved in zip(columns, padded, strict=True):
        torch._foreach_copy_(column, list(moved[:, above : above + rows].unbind()))


def checksums(ids: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64 [len(ids)] on the device of the first: hashes of uint8 ids, their places and lengths; nothing waits for the device.

    A handful of launches for :data:`CHUNK` bytes of ids, however many tensors they are in.
    """
    device = ids[0].device
    groups: dict[torch.device, list[list[int]]] = {}
    for place, tensor in enumerate(ids):
        chunks = groups.setdefault(tensor.device, [[]])
        if sum(ids[other].numel() for other in chunks[-1]) >= CHUNK:
            chunks.append([])
        chunks[-1].append(place)
    found = torch.empty(len(ids), dtype=torch.int64, device=device)
    for chunk in (chunk for chunks in groups.values() for chunk in chunks):
        flat = [ids[place].flatten() for place in chunk]
        words = torch.cat([part if part.numel() % 8 == 0 else F.pad(part, (0, -part.numel() % 8)) for part in flat]).view(torch.int64)
        # Multiply and shift twice (the finaliser of SplitMix64) on word + place; sums wrap, and so do their differences.
        mixed = words + torch.arange(1, words.numel() + 1, device=words.device)
        for factor in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
            mixed = (mixed ^ (mixed >> 30)) * factor
        before = F.pad((mixed ^ (mixed >> 31)).cumsum(0), (1, 0))
        bounds = _bounds(tuple(-(-part.numel() // 8) for part in flat), words.device)
        sums = before[bounds[1:]] - before[bounds[:-1]]
        if len(chunk) == len(ids):
            return sums
        found[_positions(tuple(chunk), device)] = sums.to(device)
    return found


@functools.cache
def _bounds(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return to_device(np.cumsum((0, *lengths)), device)


@functools.cache
def _positions(places: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return to_device(np.array(places), device)


class RankCheck:
    """Compares the ids of all ranks: 8 bytes a layer and rank, gathered after each update.

    On a GPU the result is looked at when it has arrived, at one of the next steps: nothing waits for the device.

    Args:
        group: the ranks that must agree, default all of them.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._pending: tuple[list[str], str, torch.Tensor, torch.cuda.Event | None] | None = None

    def start(self, ids: Mapping[str, torch.Tensor], when: str) -> None:
        """Gather the checksums; every rank of the group must call it.

        Raises:
            TopologyMismatch: as :meth:`finish` does, on CPUs right away.
        """
        self.finish()
        distributed = torch.distributed
        device = _device_of_group(self.group, next(iter(ids.values())).device)
        mine = checksums(list(ids.values())).to(device)
        parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, mine, group=self.group)
        sums, event = torch.stack(parts), None
        if sums.is_cuda:
            host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            host.copy_(sums, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            sums = host
        self._pending = list(ids), when, sums, event
        self.poll()

    def poll(self) -> None:
        """Look at the last result if it is there already."""
        if self._pending is not None and (self._pending[3] is None or self._pending[3].query()):
            self.finish()

    def finish(self) -> None:
        """Look at the last result, waiting for it.

        Raises:
            TopologyMismatch: naming the layers, and for each the ranks that differ from most others.
        """
        if self._pending is None:
            return
        (names, when, sums, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        wrong = {}
        for name, column in zip(names, sums.t().tolist(), strict=True):
            usual = max(column, key=column.count)  # the lowest rank's, when groups are equally large
            ranks = [rank for rank, value in enumerate(column) if value != usual]
            if ranks:
                wrong[name] = f"{name!r} (rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))})"
        if wrong:
            raise TopologyMismatch(
                f"ids: must be the same on every rank {when}, got others in {', '.join(wrong.values())}; give every rank "
                "the same seeds before sparsify_ and the same evolver, and keep their values in step (DDP, FSDP)"
            )


def must_agree(group: Any = None) -> bool:
    """Whether there is more than one rank to compare."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1


def _device_of_group(group: Any, device: torch.device) -> torch.device:
    """``device``, unless the group's backend cannot work there."""
    backend = torch.distributed.get_backend(group)
    if backend == "nccl" and device.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" else device
