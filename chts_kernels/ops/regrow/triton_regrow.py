"""regrow on a GPU: most blocks have no choice, so list the ones that have and search only those.

1. ``list``: look every block's survivors up in a table of 65536 entries: the lowest pattern that contains them, and whether
   there is another. The first is the answer where there is no other (90 % of the blocks at zeta = 0.1); the rest go on a list.
2. ``select``: one thread per listed block: 16 scores times their noise, all patterns that contain the survivors, the largest
   sum in the order of :func:`chts_kernels.ops.prune.reference.best_pattern`.
3. ``move``, in a whole update: carry the values and moments of the listed blocks whose id changed.
4. ``refresh``, where operands of the sparse tensor cores were up to date: update them for the same blocks
   (:mod:`chts_kernels.ops.pack.triton_refresh`).

Bytes: survivors and ids of all blocks, scores of the listed ones.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from ... import rng_triton as noise
from ...lasting import to_device
from ...patterns import BLOCK, pattern_table
from .._batch import BatchKernel, aligned, check_noise, on_device, table, triton_type
from ..carry_over.triton_carry_over import load_block, store_block, tensor_pointer
from ..pack.triton_pack import block_table
from ..pack.triton_refresh import REFRESH
from ..prune.triton_select import best_pattern as best_of_positive
from ..remove.triton_remove import bit_count
from ..score.triton_score import Raw, raw_score, weight_range

TILE = 512
PROGRAMS = 1024  # of select, over all layers
COUNTERS = tl.constexpr(4)
LISTED, REPLACED, NOISE_CHANGED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SOFT, GREEDY, RANDOM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MODES = {"soft": 0, "greedy": 1, "random": 2}


def _rows_of(n: int) -> tuple[int, ...]:
    """Per pattern and row the number of the row's choice of columns, choices in lexicographic order of the columns."""
    choices = list(itertools.combinations(range(BLOCK), n))
    return tuple(choices.index(tuple(row)) for pattern in pattern_table(n).columns.tolist() for row in pattern)


MASKS1 = tl.constexpr(tuple(int(m) for m in pattern_table(1).mask16))
MASKS2 = tl.constexpr(tuple(int(m) for m in pattern_table(2).mask16))
ROWS1, ROWS2 = tl.constexpr(_rows_of(1)), tl.constexpr(_rows_of(2))


@functools.cache
def completion_table(n: int, device: torch.device) -> torch.Tensor:
    """int16 [65536]: the lowest id that contains the links of a mask, + 256 where more than one does."""
    patterns = pattern_table(n)
    masks = np.arange(1 << 16)
    first = np.zeros(1 << 16, dtype=np.int16)
    for index in reversed(range(len(patterns))):
        first[(masks & ~int(patterns.mask16[index])) == 0] = index
    return to_device(first + 256 * (patterns.completions > 1).astype(np.int16), device)


@triton.jit
def list_kernel(
    survivors_ptr, completion_ptr, table_ptr, ids_ptr, list_ptr, counters_ptr, blocks, layers, programs,
    COPY_IDS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Ids of blocks without choice, the list of the others. COPY_IDS: ``ids`` receives the old ids of the table's layers
    instead (a block without choice keeps the id it has)."""
    b, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    base = b.to(tl.int64) * blocks
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    valid = block < blocks
    links = tl.load(survivors_ptr + base + block, mask=valid, other=0)
    entry = tl.load(completion_ptr + (links & 0xFFFF), mask=valid, other=0).to(tl.int32)
    if COPY_IDS:
        old_ids_ptr = tl.load(table_ptr + layers + b).to(tl.pointer_type(tl.uint8))
        tl.store(ids_ptr + base + block, tl.load(old_ids_ptr + block, mask=valid, other=0), mask=valid)
    else:
        tl.store(ids_ptr + base + block, entry.to(tl.uint8), mask=valid)
    open_ = entry >> 8
    found = tl.sum(open_)
    if found > 0:
        place = tl.atomic_add(counters_ptr + b * COUNTERS + LISTED, found, sem="relaxed") + tl.cumsum(open_, 0) - open_
        tl.store(list_ptr + base + place, block, mask=open_ > 0)


@triton.jit
def row_sums(a, b, c, d, N_LINKS: tl.constexpr):
    """The sums of every choice of columns, choices in lexicographic order."""
    if N_LINKS == 1:
        return (a, b, c, d)
    else:
        return (a + b, a + c, a + d, b + c, b + d, c + d)


@triton.jit
def best_pattern(x, links, N_LINKS: tl.constexpr, POSITIVE: tl.constexpr):
    """Id of the largest sum of the 16 scores ``x`` among the patterns that contain ``links``; the lowest id wins a tie. POSITIVE: no
    score is negative, and a third of the sums decides (:mod:`chts_kernels.ops.prune.triton_select`)."""
    if POSITIVE:
        return best_of_positive(x, links, N_LINKS, True)
    else:
        return best_of_any(x, links, N_LINKS)


@triton.jit
def best_of_any(x, links, N_LINKS: tl.constexpr):
    rows = ()
    for r in tl.static_range(4):
        rows = rows + (row_sums(x[4 * r], x[4 * r + 1], x[4 * r + 2], x[4 * r + 3], N_LINKS),)
    best = tl.full(links.shape, float("-inf"), rows[0][0].dtype)
    best_id = links & 0
    PATTERNS: tl.constexpr = 90 if N_LINKS == 2 else 24
    for p in tl.static_range(PATTERNS):
        if N_LINKS == 2:
            total = (rows[0][ROWS2[4 * p]] + rows[1][ROWS2[4 * p + 1]]) + (rows[2][ROWS2[4 * p + 2]] + rows[3][ROWS2[4 * p + 3]])
            missing = links & (0xFFFF ^ MASKS2[p])
        else:
            total = (rows[0][ROWS1[4 * p]] + rows[1][ROWS1[4 * p + 1]]) + (rows[2][ROWS1[4 * p + 2]] + rows[3][ROWS1[4 * p + 3]])
            missing = links & (0xFFFF ^ MASKS1[p])
        better = (missing == 0) & (total > best)
        best = tl.where(better, total, best)
        best_id = tl.where(better, p, best_id)
    return best_id


@triton.jit
def select_kernel(
    scores_ptr, degrees_ptr, state_ptr, survivors_ptr, table_ptr, ids_ptr, list_ptr, counters_ptr, schedule_ptr,
    step, key0, key1, block_columns, blocks, layers, rows_padded, columns_padded, programs,
    N_LINKS: tl.constexpr, MODE: tl.constexpr, RAW: tl.constexpr, QMAX: tl.constexpr, IN_PLACE: tl.constexpr,
    STATS: tl.constexpr, FROM_DEVICE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The best pattern of every listed block, written to ``ids``, or with IN_PLACE to the ids of the table's layers. RAW:
    ``scores`` are the integer sums of the score kernels, turned into scores here."""
    b, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    base = b.to(tl.int64) * blocks
    if FROM_DEVICE:
        step = tl.load(schedule_ptr + 2).to(tl.int64)
    layer = tl.load(table_ptr + 2 * layers + b)
    count = tl.load(counters_ptr + b * COUNTERS + LISTED)
    if IN_PLACE:
        ids_ptr = tl.load(table_ptr + layers + b).to(tl.pointer_type(tl.uint8))
    else:
        ids_ptr += base
    if RAW:
        origin, unit = weight_range(state_ptr, b, blocks // block_columns * 4, block_columns * 4, QMAX)
        scores_ptr += b.to(tl.int64) * rows_padded * columns_padded
        degrees_ptr += b.to(tl.int64) * (rows_padded + columns_padded)
    else:
        scores_ptr += base * 16
    noise_changed = 0
    start = program * BLOCKS
    while start < count:
        valid = start + tl.arange(0, BLOCKS) < count
        block = tl.load(list_ptr + base + start + tl.arange(0, BLOCKS), mask=valid, other=0)
        links = tl.load(survivors_ptr + base + block, mask=valid, other=0)
        i, j = block // block_columns, block % block_columns
        if RAW:
            column_ptr = (degrees_ptr + rows_padded + j * 4).to(tl.pointer_type(tl.int64))
            low, high = tl.load(column_ptr, mask=valid, other=0), tl.load(column_ptr + 1, mask=valid, other=0)
            d0, d1, d2, d3 = low.to(tl.int32), (low >> 32).to(tl.int32), high.to(tl.int32), (high >> 32).to(tl.int32)
        noisy = ()
        plain = ()
        for r in tl.static_range(4):
            group = (i * 4 + r).to(tl.int64) * block_columns + j
            if MODE != RANDOM or STATS:
                place = scores_ptr + ((i * 4 + r).to(tl.int64) * columns_padded + j * 4 if RAW else group * 4)
                if RAW:  # two sums are one word
                    pair_ptr = place.to(tl.pointer_type(tl.int64))
                    low, high = tl.load(pair_ptr, mask=valid, other=0), tl.load(pair_ptr + 1, mask=valid, other=0)
                    s0, s1, s2, s3 = low.to(tl.int32), (low >> 32).to(tl.int32), high.to(tl.int32), (high >> 32).to(tl.int32)
                else:
                    s0, s1 = tl.load(place, mask=valid, other=0), tl.load(place + 1, mask=valid, other=0)
                    s2, s3 = tl.load(place + 2, mask=valid, other=0), tl.load(place + 3, mask=valid, other=0)
                if RAW:
                    row_degree = tl.load(degrees_ptr + i * 4 + r, mask=valid, other=0)
                    s0 = raw_score(s0, row_degree, d0, links >> 4 * r & 1, origin, unit, QMAX)
                    s1 = raw_score(s1, row_degree, d1, links >> 4 * r + 1 & 1, origin, unit, QMAX)
                    s2 = raw_score(s2, row_degree, d2, links >> 4 * r + 2 & 1, origin, unit, QMAX)
                    s3 = raw_score(s3, row_degree, d3, links >> 4 * r + 3 & 1, origin, unit, QMAX)
                if STATS:
                    plain = plain + (s0, s1, s2, s3)
            if MODE != GREEDY:
                w0, w1, w2, w3 = noise.random_words(group.to(tl.uint32), layer, step, noise.REGROW, key0, key1)
                u0, u1, u2, u3 = noise.uniform(w0), noise.uniform(w1), noise.uniform(w2), noise.uniform(w3)
                if MODE == SOFT:
                    s0, s1, s2, s3 = s0 * u0, s1 * u1, s2 * u2, s3 * u3
                else:
                    s0, s1, s2, s3 = u0, u1, u2, u3
            noisy = noisy + (s0, s1, s2, s3)
        new = best_pattern(noisy, links, N_LINKS, RAW or MODE == RANDOM)
        if STATS:
            noise_changed += tl.sum((valid & (new != best_pattern(plain, links, N_LINKS, RAW))).to(tl.int32))
        tl.store(ids_ptr + block, new.to(tl.uint8), mask=valid)
        start += programs * BLOCKS
    if STATS:
        tl.atomic_add(counters_ptr + b * COUNTERS + NOISE_CHANGED, noise_changed, sem="relaxed")


@triton.jit
def move_kernel(
    table_ptr, old_ids_ptr, list_ptr, counters_ptr, mask16_ptr, block_columns, blocks, layers, programs,
    SIZES: tl.constexpr, N_LINKS: tl.constexpr, PATTERNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Carry values (row 0 of the table) and moments (rows 3 and up), SIZES bits each, of the listed blocks from the old ids
    to those of the table's layers; count the links that are new."""
    b, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    base = b.to(tl.int64) * blocks
    new_ids_ptr = tl.load(table_ptr + layers + b).to(tl.pointer_type(tl.uint8))
    count = tl.load(counters_ptr + b * COUNTERS + LISTED)
    replaced = 0
    start = program * BLOCKS
    while start < count:
        valid = start + tl.arange(0, BLOCKS) < count
        block = tl.load(list_ptr + base + start + tl.arange(0, BLOCKS), mask=valid, other=0)
        old = tl.load(old_ids_ptr + base + block, mask=valid, other=0).to(tl.int32)
        new = tl.load(new_ids_ptr + block, mask=valid, other=0).to(tl.int32)
        changed = old != new
        i, j = block // block_columns, block % block_columns
        numbers = ()
        for index in tl.static_range(len(SIZES)):
            base_ptr = tensor_pointer(table_ptr, index, 0 if index == 0 else index + 2, b, layers, SIZES)
            numbers = numbers + (load_block(base_ptr, i, j, block_columns, changed, N_LINKS),)
        old_mask = tl.load(mask16_ptr + old, mask=changed & (old < PATTERNS), other=0)
        new_mask = tl.load(mask16_ptr + new, mask=changed, other=0)
        replaced += tl.sum(bit_count(new_mask & ~old_mask))
        for index in tl.static_range(len(SIZES)):
            base_ptr = tensor_pointer(table_ptr, index, 0 if index == 0 else index + 2, b, layers, SIZES)
            store_block(base_ptr, i, j, block_columns, numbers[index], old_mask, new_mask, changed, N_LINKS)
        start += programs * BLOCKS
    tl.atomic_add(counters_ptr + b * COUNTERS + REPLACED, replaced, sem="relaxed")


LIST = BatchKernel(list_kernel, 4)
SELECT = BatchKernel(select_kernel, 4, wide=("step", "key0", "key1"))
MOVE = BatchKernel(move_kernel, 4)


def regrow_many(
    scores: torch.Tensor | Raw | None,
    survivors: torch.Tensor,
    n: int,
    mode: str,
    seed: int,
    pointers: torch.Tensor,
    step: int,
    *,
    sizes: Sequence[int] = (),
    in_place: bool = False,
    stats: bool = False,
    schedule: torch.Tensor | None = None,
    block: int = 128,
    refresh: tuple[torch.dtype, torch.dtype, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, counters) of B layers of one shape.

    Args:
        scores: [B, N, K], the sums they are made of, or None in mode "random"; survivors: int32 [B, N/4, K/4]; both contiguous.
        pointers: int64 [>= 3, B]; row 2 holds the layer numbers. With ``in_place`` rows 0 and 1 hold the addresses of values
            and ids, further rows those of moments.
        sizes: with ``in_place``, bits per element of the values and of every moment.
        in_place: update ids, values and moments behind ``pointers``; the ids returned are then the old ones.
        stats: also search without noise and count the blocks that differ.
        schedule: float64 device tensor (zeta, temperature, step) that overrides ``step``.
        refresh: with ``in_place``, (dtype of the values, dtype of the operands, row of ``pointers`` from which on the addresses of
            operand, meta, operand_t and meta_t stand): update the operands.

    Returns:
        ids: uint8 [B, N/4, K/4]. counters: int32 [B, 4]: blocks with a choice, links that are new (``in_place``), blocks that
        the noise changed (``stats``), 0.
    """
    device = survivors.device
    layers, block_rows, block_columns = survivors.shape
    blocks = block_rows * block_columns
    patterns = pattern_table(n)
    ids = torch.empty(survivors.shape, dtype=torch.uint8, device=device)
    listed = torch.empty(survivors.shape, dtype=torch.int32, device=device)
    counters = torch.zeros(layers, COUNTERS.value, dtype=torch.int32, device=device)
    shape = block_columns, blocks, layers
    programs = triton.cdiv(blocks, TILE)
    LIST(
        programs * layers, survivors, completion_table(n, device), pointers, ids, listed, counters, blocks, layers, programs,
        COPY_IDS=in_place, BLOCKS=TILE,
    )  # fmt: skip
    programs, warps = max(1, min(triton.cdiv(blocks, block), PROGRAMS // layers)), max(1, block // 32)
    raw = isinstance(scores, Raw)
    padded = (scores.rows_padded, scores.columns_padded) if raw else (0, 0)
    source = (scores.sums, scores.degrees, scores.state) if raw else (counters if scores is None else scores, counters, counters)
    SELECT(
        programs * layers, *source, survivors, pointers, ids, listed, counters, pointers if schedule is None else schedule,
        step, seed & 0xFFFFFFFF, seed >> 32, *shape, *padded, programs,
        N_LINKS=n, MODE=MODES[mode], RAW=raw, QMAX=scores.qmax if raw else 1.0, IN_PLACE=in_place,
        STATS=stats and mode != "greedy", FROM_DEVICE=schedule is not None, BLOCKS=block, num_warps=warps,
    )  # fmt: skip
    if in_place:
        MOVE(
            programs * layers, pointers, ids, listed, counters, patterns.tensor("mask16", device), *shape, programs,
            SIZES=tuple(sizes), N_LINKS=n, PATTERNS=len(patterns), BLOCKS=block, num_warps=warps,
        )  # fmt: skip
    if refresh is not None:
        values_dtype, dtype, row = refresh
        REFRESH(
            programs * layers, pointers, ids, listed, counters, block_table(n, device), patterns.tensor("mask16", device), row,
            block_rows, block_columns, layers, programs, VALUE_TYPE=triton_type(values_dtype), DTYPE=triton_type(dtype),
            N_LINKS=n, COUNTERS=COUNTERS.value, BLOCKS=block, num_warps=warps,
        )  # fmt: skip
    return ids, counters


def regrow(
    scores: torch.Tensor | None, survivors: torch.Tensor, n: int, mode: str, seed: int, layer: int, step: int
) -> torch.Tensor:
    """The op: a batch of one."""
    check_noise(seed, [layer], step)
    with on_device(survivors):
        pointers = table([[0], [0], [layer]], survivors.device)
        scores = None if scores is None else aligned(scores)[None]
        return regrow_many(scores, aligned(survivors)[None], n, mode, seed, pointers, step)[0][0]
