"""carry_over_ on a GPU: one program per tile of blocks moves every tensor of link data, in place.

A link's number is copied as bits, so any dtype of 1, 2, 4 or 8 bytes is one case per size. A block is read and written by
one thread alone, and only where its id changed: at zeta = 0.1 that is 5.5 % of the blocks, about a fifth of the memory
sectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...patterns import pattern_table
from .._batch import on_device, table
from ..remove.triton_remove import link_column

TILE = 256
MANY = 8
"""Tensors moved by one launch: the kernel is unrolled over them."""


@triton.jit
def move_block(base_ptr, i, j, block_columns, old_mask, new_mask, changed, N_LINKS: tl.constexpr):
    """Permute the links of blocks (i, j) of one tensor from the old masks to the new ones, where ``changed``."""
    for r in tl.static_range(4):
        row_ptr = base_ptr + ((i * 4 + r).to(tl.int64) * block_columns + j) * N_LINKS
        old, new = old_mask >> 4 * r & 15, new_mask >> 4 * r & 15
        if N_LINKS == 1:
            first = tl.load(row_ptr, mask=changed, other=0)
            tl.store(row_ptr, tl.where(old == new, first, 0), mask=changed)
        else:
            first = tl.load(row_ptr, mask=changed, other=0)
            second = tl.load(row_ptr + 1, mask=changed, other=0)
            old0, old1 = link_column(old, 0, 2), link_column(old, 1, 2)
            new0, new1 = link_column(new, 0, 2), link_column(new, 1, 2)
            tl.store(row_ptr, tl.where(new0 == old0, first, tl.where(new0 == old1, second, 0)), mask=changed)
            tl.store(row_ptr + 1, tl.where(new1 == old1, second, tl.where(new1 == old0, first, 0)), mask=changed)


@triton.jit
def carry_over_kernel(
    tensors_ptr, old_ids_ptr, new_ids_ptr, mask16_ptr, block_columns, blocks,
    SIZES: tl.constexpr, N_LINKS: tl.constexpr, PATTERNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    old = tl.load(old_ids_ptr + block, mask=block < blocks, other=0).to(tl.int32)
    new = tl.load(new_ids_ptr + block, mask=block < blocks, other=0).to(tl.int32)
    changed = old != new
    if tl.max(changed.to(tl.int32), 0) == 0:
        return
    old_mask = tl.load(mask16_ptr + old, mask=changed & (old < PATTERNS), other=0)
    new_mask = tl.load(mask16_ptr + new, mask=changed & (new < PATTERNS), other=0)
    i, j = block // block_columns, block % block_columns
    for index in tl.static_range(len(SIZES)):
        base_ptr = tl.load(tensors_ptr + index).to(tl.pointer_type(tl.core.get_int_dtype(SIZES[index], True)))
        move_block(base_ptr, i, j, block_columns, old_mask, new_mask, changed, N_LINKS)


def bits(tensor: torch.Tensor) -> int:
    return tensor.element_size() * 8


def carry_over_(tensors: Sequence[torch.Tensor], old_ids: torch.Tensor, new_ids: torch.Tensor, n: int) -> None:
    """The op; arguments as in the reference."""
    patterns = pattern_table(n)
    mask16 = patterns.tensor("mask16", old_ids.device)
    old_ids, new_ids = old_ids.contiguous(), new_ids.contiguous()
    blocks = old_ids.numel()
    with on_device(old_ids):
        for start in range(0, len(tensors), MANY):
            some = tensors[start : start + MANY]
            pointers = table([[t.data_ptr() for t in some]], old_ids.device)
            carry_over_kernel[(triton.cdiv(blocks, TILE),)](
                pointers, old_ids, new_ids, mask16, old_ids.shape[1], blocks,
                SIZES=tuple(bits(t) for t in some), N_LINKS=n, PATTERNS=len(patterns), BLOCKS=TILE, num_warps=4,
            )  # fmt: skip
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)  # a kernel's writes are invisible to the version counter
