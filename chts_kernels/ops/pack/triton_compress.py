"""pack and unpack in Triton: a dense matrix to its values at the links and back, bits unchanged.

A thread owns one 4x4 block. Elements travel as integers of their size, so that no payload of a NaN is touched.
Traffic: the dense matrix, N K n / 4 values and N K / 16 ids, once each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...patterns import BLOCK
from .. import _triton
from .triton_pack import block_table, join_four, split_four


@triton.jit
def _place(block_rows, block_columns, programs_k, LANES_N: tl.constexpr, LANES_K: tl.constexpr):
    """(block row, block column, whether the block exists) of every thread."""
    lane = tl.arange(0, LANES_N * LANES_K)
    row = tl.program_id(0) // programs_k * LANES_N + lane // LANES_K
    column = tl.program_id(0) % programs_k * LANES_K + lane % LANES_K
    return row, column, (row < block_rows) & (column < block_columns)


@triton.jit
def pick(x, index):
    """``x[index]`` of a tuple of 4."""
    odd = (index & 1) != 0
    return tl.where((index & 2) != 0, tl.where(odd, x[3], x[2]), tl.where(odd, x[1], x[0]))


@triton.jit
def link_column(facts, R: tl.constexpr, J: tl.constexpr, LINKS: tl.constexpr):
    """The column of link J of row R, from the block's entry of :func:`block_table`."""
    if LINKS == 2:
        return (facts >> (4 * R + 2 * J)).to(tl.int32) & 3
    else:
        return (facts >> (48 + 4 * R)).to(tl.int32) & 3


@triton.jit
def pack_kernel(dense_ptr, ids_ptr, table_ptr, values_ptr, block_rows, block_columns, programs_k,
                BITS: tl.constexpr, LINKS: tl.constexpr, LANES_N: tl.constexpr, LANES_K: tl.constexpr):  # fmt: skip
    KIND: tl.constexpr = tl.pointer_type(tl.uint16 if BITS == 16 else tl.uint32)
    row, column, inside = _place(block_rows, block_columns, programs_k, LANES_N, LANES_K)
    ids = tl.load(ids_ptr + row.to(tl.int64) * block_columns + column, mask=inside, other=0)
    facts = tl.load(table_ptr + ids.to(tl.int32))
    for r in tl.static_range(4):
        group = (4 * row + r).to(tl.int64) * block_columns + column
        x = split_four(tl.load(dense_ptr.to(KIND) + 4 * group[:, None] + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0))
        first = pick(x, link_column(facts, r, 0, LINKS))
        if LINKS == 2:
            pair = tl.join(first, pick(x, link_column(facts, r, 1, LINKS)))
            tl.store(values_ptr.to(KIND) + 2 * group[:, None] + tl.arange(0, 2)[None, :], pair, mask=inside[:, None])
        else:
            tl.store(values_ptr.to(KIND) + group, first, mask=inside)


@triton.jit
def unpack_kernel(values_ptr, ids_ptr, table_ptr, dense_ptr, block_rows, block_columns, programs_k,
                  BITS: tl.constexpr, LINKS: tl.constexpr, LANES_N: tl.constexpr, LANES_K: tl.constexpr):  # fmt: skip
    KIND: tl.constexpr = tl.pointer_type(tl.uint16 if BITS == 16 else tl.uint32)
    row, column, inside = _place(block_rows, block_columns, programs_k, LANES_N, LANES_K)
    ids = tl.load(ids_ptr + row.to(tl.int64) * block_columns + column, mask=inside, other=0)
    facts = tl.load(table_ptr + ids.to(tl.int32))
    for r in tl.static_range(4):
        group = (4 * row + r).to(tl.int64) * block_columns + column
        if LINKS == 2:
            pair = tl.load(values_ptr.to(KIND) + 2 * group[:, None] + tl.arange(0, 2)[None, :], mask=inside[:, None], other=0)
            first, second = tl.split(pair)
        else:
            first = tl.load(values_ptr.to(KIND) + group, mask=inside, other=0)
        at = link_column(facts, r, 0, LINKS)
        x = ()
        for c in tl.static_range(4):
            element = tl.where(at == c, first, tl.zeros_like(first))
            if LINKS == 2:
                element = tl.where(link_column(facts, r, 1, LINKS) == c, second, element)
            x = x + (element,)
        tl.store(dense_ptr.to(KIND) + 4 * group[:, None] + tl.arange(0, 4)[None, :], join_four(x), mask=inside[:, None])


PACK = _triton.TritonKernel(pack_kernel)
UNPACK = _triton.TritonKernel(unpack_kernel)


def lanes(block_columns: int) -> tuple[int, int]:
    """(LANES_N, LANES_K) of a program of 128 threads."""
    lanes_k = 128 if block_columns > 64 else 32 if block_columns > 8 else 8
    return 128 // lanes_k, lanes_k


def _launch(kernel: _triton.TritonKernel, source: torch.Tensor, ids: torch.Tensor, n: int, out: torch.Tensor) -> torch.Tensor:
    block_rows, block_columns = ids.shape
    lanes_n, lanes_k = lanes(block_columns)
    programs_k = -(-block_columns // lanes_k)
    constants = (("BITS", 8 * source.element_size()), ("LINKS", n), ("LANES_N", lanes_n), ("LANES_K", lanes_k))
    arguments = (_triton.readable(source), _triton.readable(ids), block_table(n, ids.device), out,
                 block_rows, block_columns, programs_k)  # fmt: skip
    kernel.launch(-(-block_rows // lanes_n) * programs_k, arguments, constants, 4)
    return out


def pack(dense: torch.Tensor, ids: torch.Tensor, n: int) -> torch.Tensor:
    return _launch(PACK, dense, ids, n, dense.new_empty(dense.shape[0], ids.shape[1] * n))


def unpack(values: torch.Tensor, ids: torch.Tensor, n: int) -> torch.Tensor:
    return _launch(UNPACK, values, ids, n, values.new_empty(values.shape[0], ids.shape[1] * BLOCK))
