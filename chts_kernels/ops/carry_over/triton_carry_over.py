"""carry_over_ on a GPU: one program per tile of blocks moves every tensor of link data, in place.

A link's number is copied as bits, so any dtype of 1, 2, 4 or 8 bytes is one case per size. A block is read and written by
one thread alone, and only where its id changed: at zeta = 0.1 that is 5.5 % of the blocks, about a fifth of the memory
sectors. All loads come before all stores: the compiler cannot know that the tensors do not overlap, and would wait for every
row in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...patterns import pattern_table
from .._batch import BatchKernel, aligned, on_device, table
from ..remove.triton_remove import link_bit

TILE = 128
MANY = 4
"""Tensors moved by one launch: the kernel is unrolled over them, and holds a block of each in registers."""


@triton.jit
def load_block(base_ptr, i, j, block_columns, changed, N_LINKS: tl.constexpr):
    """The 4 n numbers of blocks (i, j) of a tensor, where ``changed``."""
    numbers = ()
    for r in tl.static_range(4):
        row_ptr = base_ptr + ((i * 4 + r).to(tl.int64) * block_columns + j) * N_LINKS
        for slot in tl.static_range(N_LINKS):
            numbers = numbers + (tl.load(row_ptr + slot, mask=changed, other=0),)
    return numbers


@triton.jit
def store_block(base_ptr, i, j, block_columns, numbers, old_mask, new_mask, changed, N_LINKS: tl.constexpr):
    """What :func:`load_block` read, permuted from the old masks to the new ones; new links get 0."""
    for r in tl.static_range(4):
        row_ptr = base_ptr + ((i * 4 + r).to(tl.int64) * block_columns + j) * N_LINKS
        old, new = old_mask >> 4 * r & 15, new_mask >> 4 * r & 15
        if N_LINKS == 1:
            tl.store(row_ptr, tl.where(old == new, numbers[r], 0), mask=changed)
        else:
            first, second = numbers[2 * r], numbers[2 * r + 1]
            old0, old1 = link_bit(old, 0, 2), link_bit(old, 1, 2)
            new0, new1 = link_bit(new, 0, 2), link_bit(new, 1, 2)
            tl.store(row_ptr, tl.where(new0 == old0, first, tl.where(new0 == old1, second, 0)), mask=changed)
            tl.store(row_ptr + 1, tl.where(new1 == old1, second, tl.where(new1 == old0, first, 0)), mask=changed)


@triton.jit
def tensor_pointer(table_ptr, index: tl.constexpr, row, column, layers, SIZES: tl.constexpr):
    """Entry (row, column) of a table as a pointer to integers of SIZES[index] bits."""
    return tl.load(table_ptr + row * layers + column).to(tl.pointer_type(tl.core.get_int_dtype(SIZES[index], True)))


@triton.jit
def carry_over_kernel(
    tensors_ptr, old_ids_ptr, new_ids_ptr, mask16_ptr, block_columns, blocks,
    SIZES: tl.constexpr, N_LINKS: tl.constexpr, PATTERNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    old = tl.load(old_ids_ptr + block, mask=block < blocks, other=0).to(tl.int32)
    new = tl.load(new_ids_ptr + block, mask=block < blocks, other=0).to(tl.int32)
    changed = old != new
    i, j = block // block_columns, block % block_columns
    numbers = ()
    for index in tl.static_range(len(SIZES)):
        base_ptr = tensor_pointer(tensors_ptr, index, index, 0, 1, SIZES)
        numbers = numbers + (load_block(base_ptr, i, j, block_columns, changed, N_LINKS),)
    old_mask = tl.load(mask16_ptr + old, mask=changed & (old < PATTERNS), other=0)
    new_mask = tl.load(mask16_ptr + new, mask=changed & (new < PATTERNS), other=0)
    for index in tl.static_range(len(SIZES)):
        base_ptr = tensor_pointer(tensors_ptr, index, index, 0, 1, SIZES)
        store_block(base_ptr, i, j, block_columns, numbers[index], old_mask, new_mask, changed, N_LINKS)


CARRY_OVER = BatchKernel(carry_over_kernel, 4)


def bits(tensor: torch.Tensor) -> int:
    return tensor.element_size() * 8


def carry_over_(tensors: Sequence[torch.Tensor], old_ids: torch.Tensor, new_ids: torch.Tensor, n: int) -> None:
    """The op; arguments as in the reference."""
    patterns = pattern_table(n)
    mask16 = patterns.tensor("mask16", old_ids.device)
    old_ids, new_ids = aligned(old_ids), aligned(new_ids)
    blocks = old_ids.numel()
    with on_device(old_ids):
        for start in range(0, len(tensors), MANY):
            some = tensors[start : start + MANY]
            pointers = table([[t.data_ptr() for t in some]], old_ids.device)
            CARRY_OVER(
                triton.cdiv(blocks, TILE), pointers, old_ids, new_ids, mask16, old_ids.shape[1], blocks,
                SIZES=tuple(bits(t) for t in some), N_LINKS=n, PATTERNS=len(patterns), BLOCKS=TILE,
            )  # fmt: skip
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)  # a kernel's writes are invisible to the version counter
