"""remove on a GPU: the exact k smallest keys of every layer of a batch, in one pass over the values, without a sort.

1. ``sample``: exact keys of up to 65536 links, scattered over the matrix, into a histogram of 4096 fixed-width bins.
2. ``window``: the bins [A, B] that hold the k-th smallest key, six standard deviations wide on either side.
3. ``classify``: the one pass. Every link's key is computed; below A it is removed, above B it survives, in between it goes
   on a list of candidates (about 1 % of the links) and into a second histogram, 4096 bins between A and B. The count below
   A decides whether the k-th smallest key really is in the window. If not (one time in 10**8, or when masses of
   equal keys fill one bin), a second launch of this kernel, which otherwise returns at once, takes the side it is on.
4. ``resolve``: candidates in lower bins than the k-th are removed, those in its bin (about 50) are listed.
5. ``finish``: of these, the smallest by (key, index), exactly. One program; more than 1024 of them (ties by the
   thousand) go through an eight-bit radix selection on the 64-bit pair (key, index).

So the sample chooses where to look, never what is removed. Counters are integers, lists are sets: neither the order of
atomics nor the tile size can show in the result. Everything stays on the device.

Bytes: values and ids once, survivors once; candidates 16 bytes for 1 % of the links.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ... import rng_triton as noise
from ...patterns import BLOCK, pattern_table
from .._batch import check_noise, on_device, table, triton_type

BINS = tl.constexpr(4096)
STATE = tl.constexpr(16)  # int32 words of state per layer, before its three histograms
LAYER_WORDS = tl.constexpr(16 + 3 * 4096)
WINDOW_A, WINDOW_B = tl.constexpr(0), tl.constexpr(1)
BELOW, COUNT = tl.constexpr(2), tl.constexpr(3)  # of the window; + 2: of the second attempt
EQUAL, EQUAL_RANK, BIN_OF_K = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
SHORT_LIST = tl.constexpr(1024)
SAMPLE_LINKS = 65536
TILE = 256
PROGRAMS = 64  # of resolve, per layer


@triton.jit
def controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE: tl.constexpr):
    """(k, 1 / T, step), from the host or, for a captured graph, computed alike from device scalars (zeta, T, step)."""
    if FROM_DEVICE:
        k = (tl.load(schedule_ptr) * links.to(tl.float64)).to(tl.int64)
        inv_temperature = (1.0 / tl.load(schedule_ptr + 1)).to(tl.float32)
        step = tl.load(schedule_ptr + 2).to(tl.int64)
    return k.to(tl.int32), inv_temperature, step


@triton.jit
def link_bits(words, nibble, slot: tl.constexpr, N_LINKS: tl.constexpr):
    """The random word of link ``slot`` of a row whose active columns are the set bits of ``nibble``."""
    w0, w1, w2, w3 = words
    if N_LINKS == 1:
        return tl.where((nibble & 1) != 0, w0, tl.where((nibble & 2) != 0, w1, tl.where((nibble & 4) != 0, w2, w3)))
    if slot == 0:
        return tl.where((nibble & 1) != 0, w0, tl.where((nibble & 2) != 0, w1, w2))
    return tl.where((nibble & 8) != 0, w3, tl.where((nibble & 4) != 0, w2, w1))


@triton.jit
def link_column(nibble, slot: tl.constexpr, N_LINKS: tl.constexpr):
    """The column of link ``slot`` of a row."""
    if N_LINKS == 1:
        return tl.where((nibble & 1) != 0, 0, tl.where((nibble & 2) != 0, 1, tl.where((nibble & 4) != 0, 2, 3)))
    if slot == 0:
        return tl.where((nibble & 1) != 0, 0, tl.where((nibble & 2) != 0, 1, 2))
    return tl.where((nibble & 8) != 0, 3, tl.where((nibble & 4) != 0, 2, 1))


@triton.jit
def link_key(value, bits, inv_temperature, SOFT: tl.constexpr):
    """float32 rank of a link; the smallest are removed (``rank_keys`` of the reference)."""
    magnitude = tl.abs(value).to(tl.float32)
    if SOFT:
        return noise.log_float32(magnitude) + noise.gumbel(bits) * inv_temperature
    return tl.where(magnitude < float("inf"), magnitude, float("inf"))


@triton.jit
def position(key, SOFT: tl.constexpr):
    """31-bit integer that never falls when the key rises: fixed point over [-32, 32), or the bits of a magnitude."""
    if SOFT:
        return (tl.minimum(tl.maximum(key + 32.0, 0.0), 63.99999) * (2.0**25)).to(tl.int32)
    return key.to(tl.int32, bitcast=True)


@triton.jit
def fine_bin(position_, a, b):
    """Which of the 4096 bins of the window [a, b]."""
    return (position_ - (a << 19) >> 7) // (b - a + 1)


@triton.jit
def ordered(key, element):
    """int64 that sorts like (key, index of the element in the matrix); -0.0 == 0.0."""
    bits = key.to(tl.int32, bitcast=True)
    bits = tl.where(key == 0.0, 0, bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32 | element


@triton.jit
def key_of(entry):
    signed = (entry >> 32).to(tl.int32)
    return (signed ^ ((signed >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def block_masks(ids_ptr, mask16_ptr, block, valid, PATTERNS: tl.constexpr):
    """int32 masks of the blocks' patterns."""
    ids = tl.load(ids_ptr + block, mask=valid, other=0).to(tl.int32)
    return tl.load(mask16_ptr + ids, mask=ids < PATTERNS, other=0)


@triton.jit
def sample_kernel(
    table_ptr, state_ptr, mask16_ptr, schedule_ptr,
    k: tl.int64, inv_temperature: tl.float32, step: tl.int64, key0: tl.int64, key1: tl.int64,
    block_columns, blocks, layers, samples,
    VALUE_TYPE: tl.constexpr, N_LINKS: tl.constexpr, PATTERNS: tl.constexpr, SOFT: tl.constexpr,
    FROM_DEVICE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    values_ptr = tl.load(table_ptr + b).to(tl.pointer_type(VALUE_TYPE))
    ids_ptr = tl.load(table_ptr + layers + b).to(tl.pointer_type(tl.uint8))
    layer = tl.load(table_ptr + 2 * layers + b)
    histogram_ptr = state_ptr + b.to(tl.int64) * LAYER_WORDS + STATE
    links = blocks.to(tl.int64) * (4 * N_LINKS)
    k, inv_temperature, step = controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE)
    number = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    valid = number < samples
    # Multiples of a prime modulo the number of blocks: distinct, and in step with no row or column structure.
    block = (number.to(tl.int64) * 2654435761 % blocks).to(tl.int32)
    masks = block_masks(ids_ptr, mask16_ptr, block, valid, PATTERNS)
    i, j = block // block_columns, block % block_columns
    for r in tl.static_range(4):
        group = (i * 4 + r).to(tl.int64) * block_columns + j
        nibble = masks >> 4 * r & 15
        words = noise.random_words(group.to(tl.uint32), layer, step, noise.REMOVE, key0, key1)
        for slot in tl.static_range(N_LINKS):
            value = tl.load(values_ptr + group * N_LINKS + slot, mask=valid, other=0.0)
            key = link_key(value, link_bits(words, nibble, slot, N_LINKS), inv_temperature, SOFT)
            tl.atomic_add(histogram_ptr + (position(key, SOFT) >> 19), 1, mask=valid, sem="relaxed")


@triton.jit
def window_kernel(
    state_ptr, schedule_ptr, k: tl.int64, inv_temperature: tl.float32, step: tl.int64, blocks, samples,
    N_LINKS: tl.constexpr, FROM_DEVICE: tl.constexpr,
):  # fmt: skip
    state_ptr += tl.program_id(0).to(tl.int64) * LAYER_WORDS
    links = blocks.to(tl.int64) * (4 * N_LINKS)
    k, inv_temperature, step = controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE)
    upto = tl.cumsum(tl.load(state_ptr + STATE + tl.arange(0, BINS)), 0).to(tl.float32)
    drawn = (samples * 4 * N_LINKS).to(tl.float32)
    share = k.to(tl.float32) / links.to(tl.float32)
    rank = share * drawn
    margin = 6.0 * tl.sqrt(drawn * share * tl.maximum(1.0 - share, 0.0)) + 4.0
    first = tl.sum((upto <= rank - margin).to(tl.int32))
    last = tl.sum((upto < rank + margin).to(tl.int32))
    tl.store(state_ptr + WINDOW_A, tl.minimum(first, BINS - 1))
    tl.store(state_ptr + WINDOW_B, tl.minimum(last, BINS - 1))


@triton.jit
def chosen_window(state_ptr, k):
    """(held, a, b, below, count, attempt): the window with the k-th smallest key, and what was counted for it."""
    a, b = tl.load(state_ptr + WINDOW_A), tl.load(state_ptr + WINDOW_B)
    below, count = tl.load(state_ptr + BELOW), tl.load(state_ptr + COUNT)
    held = (below <= k) & (k <= below + count)
    attempt = 0
    if not held:
        attempt = 1
        under = k < below
        a, b = tl.where(under, 0, b + 1), tl.where(under, a - 1, BINS - 1)
        below, count = tl.load(state_ptr + BELOW + 2), tl.load(state_ptr + COUNT + 2)
    return held, a, b, below, count, attempt


@triton.jit
def classify_kernel(
    table_ptr, state_ptr, mask16_ptr, survivors_ptr, list_ptr, schedule_ptr,
    k: tl.int64, inv_temperature: tl.float32, step: tl.int64, key0: tl.int64, key1: tl.int64,
    block_columns, blocks, layers,
    VALUE_TYPE: tl.constexpr, N_LINKS: tl.constexpr, PATTERNS: tl.constexpr, SOFT: tl.constexpr,
    FROM_DEVICE: tl.constexpr, AGAIN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    number_of_layer = tl.program_id(1)
    state_ptr += number_of_layer.to(tl.int64) * LAYER_WORDS
    links = blocks.to(tl.int64) * (4 * N_LINKS)
    k, inv_temperature, step = controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE)
    if AGAIN:
        held, a, b, _, _, _ = chosen_window(state_ptr, k)
        if held:
            return
    else:
        a, b = tl.load(state_ptr + WINDOW_A), tl.load(state_ptr + WINDOW_B)
    values_ptr = tl.load(table_ptr + number_of_layer).to(tl.pointer_type(VALUE_TYPE))
    ids_ptr = tl.load(table_ptr + layers + number_of_layer).to(tl.pointer_type(tl.uint8))
    layer = tl.load(table_ptr + 2 * layers + number_of_layer)
    survivors_ptr += number_of_layer.to(tl.int64) * blocks
    list_ptr += number_of_layer.to(tl.int64) * links
    histogram_ptr = state_ptr + STATE + (2 * BINS if AGAIN else BINS)

    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    valid = block < blocks
    masks = block_masks(ids_ptr, mask16_ptr, block, valid, PATTERNS)
    i, j = block // block_columns, block % block_columns
    kept = masks & 0
    below = masks & 0
    waiting = masks & 0
    keys = ()
    elements = ()
    candidates = ()
    for r in tl.static_range(4):
        group = (i * 4 + r).to(tl.int64) * block_columns + j
        nibble = masks >> 4 * r & 15
        words = noise.random_words(group.to(tl.uint32), layer, step, noise.REMOVE, key0, key1)
        for slot in tl.static_range(N_LINKS):
            value = tl.load(values_ptr + group * N_LINKS + slot, mask=valid, other=0.0)
            key = link_key(value, link_bits(words, nibble, slot, N_LINKS), inv_temperature, SOFT)
            column = link_column(nibble, slot, N_LINKS)
            bin_ = position(key, SOFT) >> 19
            removed = valid & (bin_ < a)
            candidate = valid & (bin_ >= a) & (bin_ <= b)
            kept |= tl.where(removed, 0, 1 << (4 * r + column))
            below += removed.to(tl.int32)
            waiting += candidate.to(tl.int32)
            keys = keys + (key,)
            elements = elements + (group * 4 + column,)
            candidates = candidates + (candidate,)
    tl.store(survivors_ptr + block, kept, mask=valid)
    offset: tl.constexpr = 2 if AGAIN else 0
    tl.atomic_add(state_ptr + BELOW + offset, tl.sum(below), sem="relaxed")
    base = tl.atomic_add(state_ptr + COUNT + offset, tl.sum(waiting), sem="relaxed")
    place = base + tl.cumsum(waiting, 0) - waiting
    for index in tl.static_range(4 * N_LINKS):
        key, candidate = keys[index], candidates[index]
        tl.store(list_ptr + place, ordered(key, elements[index]), mask=candidate)
        tl.atomic_add(histogram_ptr + fine_bin(position(key, SOFT), a, b), 1, mask=candidate, sem="relaxed")
        place += candidate.to(tl.int32)


@triton.jit
def drop(survivors_ptr, entry, block_columns, mask):
    """Clear the survivor bits of listed links."""
    element = entry & 0xFFFFFFFF
    row, column = element // (4 * block_columns), (element % (4 * block_columns)).to(tl.int32)
    block = (row >> 2) * block_columns + (column >> 2)
    bit = ((row & 3).to(tl.int32) << 2) + (column & 3)
    tl.atomic_and(survivors_ptr + block, ~(1 << bit), mask=mask, sem="relaxed")


@triton.jit
def resolve_kernel(
    state_ptr, survivors_ptr, list_ptr, short_ptr, schedule_ptr, k: tl.int64, inv_temperature: tl.float32, step: tl.int64,
    block_columns, blocks,
    N_LINKS: tl.constexpr, SOFT: tl.constexpr, FROM_DEVICE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    b_layer = tl.program_id(1).to(tl.int64)
    state_ptr += b_layer * LAYER_WORDS
    survivors_ptr += b_layer * blocks
    links = blocks.to(tl.int64) * (4 * N_LINKS)
    list_ptr += b_layer * links
    short_ptr += b_layer * SHORT_LIST
    k, inv_temperature, step = controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE)
    held, a, b, below, count, attempt = chosen_window(state_ptr, k)
    counts = tl.load(state_ptr + STATE + BINS * (1 + attempt) + tl.arange(0, BINS))
    upto = tl.cumsum(counts, 0)
    rank = k - below
    bin_of_k = tl.sum((upto < rank).to(tl.int32))
    bin_of_k = tl.where(rank > 0, bin_of_k, -1)
    equal_rank = rank - tl.sum(tl.where(tl.arange(0, BINS) < bin_of_k, counts, 0))
    if tl.program_id(0) == 0:
        tl.store(state_ptr + EQUAL_RANK, equal_rank)
        tl.store(state_ptr + BIN_OF_K, bin_of_k)
    start = tl.program_id(0) * BLOCKS  # while, not range: numpy 2.4 broke run-time bounds in Triton 3.6's interpreter
    while start < count:
        offset = start + tl.arange(0, BLOCKS)
        valid = offset < count
        entry = tl.load(list_ptr + offset, mask=valid, other=0)
        bin_ = fine_bin(position(key_of(entry), SOFT), a, b)
        drop(survivors_ptr, entry, block_columns, valid & (bin_ < bin_of_k))
        equal = (valid & (bin_ == bin_of_k)).to(tl.int32)
        found = tl.sum(equal)
        if found > 0:
            place = tl.atomic_add(state_ptr + EQUAL, found, sem="relaxed") + tl.cumsum(equal, 0) - equal
            tl.store(short_ptr + place, entry, mask=(equal > 0) & (place < SHORT_LIST))
        start += tl.num_programs(0) * BLOCKS


@triton.jit
def finish_kernel(
    state_ptr, survivors_ptr, list_ptr, short_ptr, schedule_ptr, k: tl.int64, inv_temperature: tl.float32, step: tl.int64,
    block_columns, blocks,
    N_LINKS: tl.constexpr, SOFT: tl.constexpr, FROM_DEVICE: tl.constexpr,
):  # fmt: skip
    b_layer = tl.program_id(0).to(tl.int64)
    state_ptr += b_layer * LAYER_WORDS
    survivors_ptr += b_layer * blocks
    links = blocks.to(tl.int64) * (4 * N_LINKS)
    list_ptr += b_layer * links
    short_ptr += b_layer * SHORT_LIST
    removals, _, _ = controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE)
    equal_rank = tl.load(state_ptr + EQUAL_RANK)
    bin_of_k = tl.load(state_ptr + BIN_OF_K)
    if bin_of_k >= 0:
        number = tl.load(state_ptr + EQUAL)
        lane = tl.arange(0, SHORT_LIST)
        if number <= SHORT_LIST:
            entry = tl.load(short_ptr + lane, mask=lane < number, other=0)
            smaller = lane & 0
            other = number & 0
            while other < number:
                smaller += (tl.load(short_ptr + other) < entry).to(tl.int32)
                other += 1
            drop(survivors_ptr, entry, block_columns, (lane < number) & (smaller < equal_rank))
        else:
            # Eight-bit radix selection, most significant digit first, over the unsigned image of the entries.
            held, a, b, below, count, attempt = chosen_window(state_ptr, removals)
            prefix = tl.zeros([], tl.uint64)
            for digit in range(8):
                shift = tl.full([], 56, tl.uint64) - 8 * digit
                counts = tl.zeros([256], tl.int32)
                start = count & 0
                while start < count:
                    valid = start + lane < count
                    entry = tl.load(list_ptr + start + lane, mask=valid, other=0)
                    inside = valid & (fine_bin(position(key_of(entry), SOFT), a, b) == bin_of_k)
                    image = entry.to(tl.uint64, bitcast=True) ^ 0x8000000000000000
                    inside &= (image >> shift) >> 8 == prefix
                    counts += tl.histogram(((image >> shift) & 255).to(tl.int32), 256, mask=inside)
                    start += SHORT_LIST
                upto = tl.cumsum(counts, 0)
                bin_ = tl.sum((upto < equal_rank).to(tl.int32))
                equal_rank -= tl.sum(tl.where(tl.arange(0, 256) < bin_, counts, 0))
                prefix = prefix << 8 | bin_.to(tl.uint64)
            start = count & 0
            while start < count:
                valid = start + lane < count
                entry = tl.load(list_ptr + start + lane, mask=valid, other=0)
                inside = valid & (fine_bin(position(key_of(entry), SOFT), a, b) == bin_of_k)
                image = entry.to(tl.uint64, bitcast=True) ^ 0x8000000000000000
                drop(survivors_ptr, entry, block_columns, inside & (image <= prefix))
                start += SHORT_LIST


def remove_many(
    values: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    n: int,
    zeta: float,
    temperature: float,
    mode: str,
    seed: int,
    layers: Sequence[int],
    step: int,
    *,
    schedule: torch.Tensor | None = None,
    pointers: torch.Tensor | None = None,
    tile: int = TILE,
) -> torch.Tensor:
    """Survivors int32 [B, N/4, K/4] of B layers of one shape and dtype, contiguous; arguments as in the reference.

    Args:
        schedule: float64 device tensor (zeta, temperature, step) that overrides the three numbers, so that a captured
            graph follows a schedule.
        pointers: int64 [>= 3, B]: addresses of values, addresses of ids, layer numbers; made here when absent.
        tile: blocks per program; the result does not depend on it.
    """
    device = ids[0].device
    block_rows, block_columns = ids[0].shape
    blocks = block_rows * block_columns
    batch = len(values)
    if pointers is None:
        pointers = table([[v.data_ptr() for v in values], [i.data_ptr() for i in ids], list(layers)], device)
    patterns = pattern_table(n)
    links = blocks * BLOCK * n
    state = torch.zeros(batch, LAYER_WORDS.value, dtype=torch.int32, device=device)
    survivors = torch.empty(batch, block_rows, block_columns, dtype=torch.int32, device=device)
    candidates = torch.empty(batch, links, dtype=torch.int64, device=device)
    short = torch.empty(batch, SHORT_LIST.value, dtype=torch.int64, device=device)
    mask16 = patterns.tensor("mask16", device)
    from_device = schedule is not None
    schedule = state if schedule is None else schedule
    key = seed & 0xFFFFFFFF, seed >> 32
    numbers = int(zeta * links), 1.0 / temperature, step
    soft = mode == "soft"
    kind = dict(
        VALUE_TYPE=triton_type(values[0].dtype), N_LINKS=n, PATTERNS=len(patterns), SOFT=soft, FROM_DEVICE=from_device,
        enable_fp_fusion=False,
    )  # fmt: skip
    few = dict(N_LINKS=n, FROM_DEVICE=from_device, enable_fp_fusion=False)
    samples = min(blocks, SAMPLE_LINKS // (BLOCK * n))
    sample_kernel[(triton.cdiv(samples, 64), batch)](
        pointers, state, mask16, schedule, *numbers, *key, block_columns, blocks, batch, samples,
        **kind, BLOCKS=64, num_warps=2,
    )  # fmt: skip
    window_kernel[(batch,)](state, schedule, *numbers, blocks, samples, **few, num_warps=8)
    for again in (False, True):
        classify_kernel[(triton.cdiv(blocks, tile), batch)](
            pointers, state, mask16, survivors, candidates, schedule, *numbers, *key, block_columns, blocks, batch,
            **kind, AGAIN=again, BLOCKS=tile, num_warps=max(1, min(4, tile // 32)),
        )  # fmt: skip
    lists = state, survivors, candidates, short, schedule, *numbers, block_columns, blocks
    programs = max(1, min(PROGRAMS, links // 16384))
    resolve_kernel[(programs, batch)](*lists, **few, SOFT=soft, BLOCKS=512, num_warps=8)
    finish_kernel[(batch,)](*lists, **few, SOFT=soft, num_warps=8)
    return survivors


def remove(
    values: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    zeta: float,
    temperature: float,
    mode: str,
    seed: int,
    layer: int,
    step: int,
) -> torch.Tensor:
    """The op: a batch of one."""
    check_noise(seed, [layer], step)
    with on_device(ids):
        return remove_many([values.contiguous()], [ids.contiguous()], n, zeta, temperature, mode, seed, [layer], step)[0]
