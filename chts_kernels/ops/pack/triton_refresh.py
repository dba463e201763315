"""The operands of the sparse tensor cores follow a topology update, for the blocks that changed alone (5 % of them).

What :mod:`.triton_pack` writes for a whole matrix, written for listed blocks: two values a row of either operand, and of
the metadata, whose words hold nibbles of eight blocks, the difference of old and new nibbles by exclusive or. So the result is
that of packing anew, whatever the order of the blocks, given operands that were up to date before the update.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._batch import BatchKernel
from .triton_pack import half_word


@triton.jit
def flip_nibble(meta_ptr, row, group, steps, flipped, mask):
    """Exclusive-or the metadata nibble of (row, group of four columns); the order is that of :mod:`chts_kernels.layout.metadata`."""
    within = row & 63
    word = ((row >> 6) * steps + (group >> 4)) * 128 + (within >> 4) * 32 + (within & 7) * 4 + (group >> 2 & 3)
    shift = (within >> 3 & 1) * 16 + (group & 3) * 4
    tl.atomic_xor(meta_ptr + word, flipped << shift, mask=mask & (flipped != 0), sem="relaxed")


@triton.jit
def pair_of(first, second):
    """Two half words as one word."""
    return first | second << 16


@triton.jit
def refresh_kernel(
    table_ptr, old_ids_ptr, list_ptr, counters_ptr, facts_ptr, mask16_ptr, operands_row, block_rows, block_columns, layers, programs,
    VALUE_TYPE: tl.constexpr, DTYPE: tl.constexpr, N_LINKS: tl.constexpr, COUNTERS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Rows of the table: 0 values, 1 new ids, and from ``operands_row`` on operand (0: the values are the operand), meta, operand_t,
    meta_t (0: nothing to refresh)."""
    b, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    blocks = block_rows * block_columns
    base = b.to(tl.int64) * blocks
    own_ptr = table_ptr + operands_row * layers + b
    operand_at, meta_at = tl.load(own_ptr), tl.load(own_ptr + layers)
    if meta_at == 0:
        return
    values_ptr = tl.load(table_ptr + b).to(tl.pointer_type(VALUE_TYPE))
    ids_ptr = tl.load(table_ptr + layers + b).to(tl.pointer_type(tl.uint8))
    meta_ptr = meta_at.to(tl.pointer_type(tl.int32))
    operand_t_ptr = tl.load(own_ptr + 2 * layers).to(tl.pointer_type(tl.uint32))
    meta_t_ptr = tl.load(own_ptr + 3 * layers).to(tl.pointer_type(tl.int32))
    steps, steps_t = (block_columns + 15) // 16, (block_rows + 15) // 16
    count = tl.load(counters_ptr + b * COUNTERS)
    start = program * BLOCKS
    while start < count:
        valid = start + tl.arange(0, BLOCKS) < count
        block = tl.load(list_ptr + base + start + tl.arange(0, BLOCKS), mask=valid, other=0)
        old = tl.load(old_ids_ptr + base + block, mask=valid, other=0).to(tl.int32)
        new = tl.load(ids_ptr + block, mask=valid, other=0).to(tl.int32)
        changed = valid & (old != new)
        i, j = block // block_columns, block % block_columns
        mask = tl.load(mask16_ptr + new, mask=changed, other=0)
        flipped = (tl.load(facts_ptr + old, mask=changed, other=0) ^ tl.load(facts_ptr + new, mask=changed, other=0)).to(tl.int32)
        rows = ()
        for r in tl.static_range(4):
            group = (i * 4 + r).to(tl.int64) * block_columns + j
            nibble = mask >> 4 * r & 15
            first = half_word(tl.load(values_ptr + group * N_LINKS, mask=changed, other=0.0), DTYPE)
            if N_LINKS == 2:
                second = half_word(tl.load(values_ptr + group * 2 + 1, mask=changed, other=0.0), DTYPE)
                pair = pair_of(first, second)
            else:  # the link of column c is in slot c & 1, the other slot is zero
                second = first
                pair = tl.where((nibble & 10) != 0, first << 16, first)
            if operand_at != 0:
                tl.store(operand_at.to(tl.pointer_type(tl.uint32)) + group, pair, mask=changed)
            flip_nibble(meta_ptr, i * 4 + r, j, steps, flipped >> 4 * r & 15, changed)
            rows = rows + ((nibble, nibble & -nibble, first, second),)
        for c in tl.static_range(4):
            first = (mask & 0).to(tl.uint32)
            second = first
            seen = mask & 0
            for r in tl.static_range(4):
                nibble, lowest, value, other = rows[r]
                here = (nibble & (1 << c)) != 0
                value = tl.where(lowest == (1 << c), value, other)
                if N_LINKS == 2:
                    first = tl.where(here & (seen == 0), value, first)
                    second = tl.where(here & (seen != 0), value, second)
                    seen += here.to(tl.int32)
                elif r % 2 == 0:
                    first = tl.where(here, value, first)
                else:
                    second = tl.where(here, value, second)
            row = j * 4 + c
            tl.store(operand_t_ptr + row.to(tl.int64) * block_rows + i, pair_of(first, second), mask=changed)
            flip_nibble(meta_t_ptr, row, i, steps_t, flipped >> (16 + 4 * c) & 15, changed)
        start += programs * BLOCKS


REFRESH = BatchKernel(refresh_kernel, 4)
