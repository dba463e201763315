"""remove on a GPU: the exact k smallest keys of every layer of a batch, in one pass over the values, without a sort.

1. ``sample``: cheap keys (hardware logarithms, error below :func:`slack`) of up to 65536 links, scattered over the matrix, into a
   histogram of 4096 fixed-width bins. The last program to finish picks the bins [A, B] that hold the k-th smallest key, six
   standard deviations either way.
2. ``classify``: the one pass. Cheap keys decide nearly every link: below A it goes, above B it stays. What lies between, or too
   near an edge, is listed: about 2 % of the links.
3. ``exact``: the exact keys of the listed links, and their histogram, 4096 bins between A and B.
4. ``retry``: returns at once if the counts show that the k-th smallest key is in the window; else (one time in 10**8)
   lists every link.
5. ``resolve``: listed links in lower bins than the k-th go, those in its bin (about 50) are listed once more; the last
   program to finish removes the smallest of these by (key, index), exactly. More than 512 of them (ties by the thousand)
   go through an eight-bit radix selection on the 64-bit pair (key, index).

So samples and approximations choose where to look, never what is removed. Counters are integers and lists are sets:
neither the order of atomics nor a tile size can show in the result. Nothing leaves the device.

Bytes: values and ids once, survivors once, 28 bytes for 2 % of the links. What bounds the pass is arithmetic: ten Philox
rounds for every two links (n = 2) and three logarithms a link.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ... import rng_triton as noise
from ...patterns import BLOCK, pattern_table
from .._batch import BatchKernel, aligned, check_noise, interpreted, on_device, table, triton_type

BINS = tl.constexpr(4096)
HEAD = tl.constexpr(16)  # int32 words of state per layer, before its three histograms
LAYER_WORDS = tl.constexpr(16 + 3 * 4096)
WINDOW_A, WINDOW_B, SAMPLED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOWER, COUNT, BELOW = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)  # COUNT and BELOW: one 64-bit counter
EQUAL, RESOLVED = tl.constexpr(6), tl.constexpr(7)
SHORT_LIST = tl.constexpr(512)
LN2, LOG2_LN2 = tl.constexpr(0.6931471805599453), tl.constexpr(-0.5287663729448977)
BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)
TOO_LIKELY = tl.constexpr(0xFFC00000)  # words from here on: U so near 1 that its logarithm is not accurate
SAMPLE_LINKS = 32768
"""Most links that ``sample`` draws, of matrices of 2**24 links and more twice as many (the best of four at 2**23 and at 2.2e7 links)."""
TILE = 256
BLOCKS_PER_THREAD = 2  # of classify
PROGRAMS = 1056  # of exact, over all layers
GROUPS = 256  # rows of blocks per program of sample
RESOLVERS = 132  # programs of retry and resolve, over all layers


@triton.jit
def controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE: tl.constexpr):
    """(k, 1 / T, step), from the host or, for a captured graph, computed alike from device scalars (zeta, T, step)."""
    if FROM_DEVICE:
        k = (tl.load(schedule_ptr) * links.to(tl.float64)).to(tl.int64)
        inv_temperature = (1.0 / tl.load(schedule_ptr + 1)).to(tl.float32)
        step = tl.load(schedule_ptr + 2).to(tl.int64)
    return k.to(tl.int32), inv_temperature, step


@triton.jit
def bit_count(x):
    """Set bits of a 16-bit integer."""
    x = (x & 0x5555) + (x >> 1 & 0x5555)
    x = (x & 0x3333) + (x >> 2 & 0x3333)
    x = (x & 0x0F0F) + (x >> 4 & 0x0F0F)
    return (x & 0xFF) + (x >> 8)


@triton.jit
def link_bit(nibble, slot: tl.constexpr, N_LINKS: tl.constexpr):
    """The bit of link ``slot`` of a row whose active columns are the set bits of ``nibble``."""
    lowest = nibble & -nibble
    return lowest if slot == 0 else nibble ^ lowest


@triton.jit
def bit_column(bit):
    """The place of the one set bit of a nibble."""
    return (bit >> 1) - (bit >> 3)


@triton.jit
def word_of(words, bit):
    """The random word of the column whose bit is set."""
    w0, w1, w2, w3 = words
    return tl.where(bit < 4, tl.where(bit == 1, w0, w1), tl.where(bit == 4, w2, w3))


@triton.jit
def link_word(words, nibble, slot: tl.constexpr, N_LINKS: tl.constexpr):
    """The random word of link ``slot`` of a row whose active columns are the lowest four bits of ``nibble``."""
    w0, w1, w2, w3 = words
    if N_LINKS == 1:
        return word_of(words, nibble & 15)
    elif slot == 0:
        return tl.where((nibble & 1) != 0, w0, tl.where((nibble & 2) != 0, w1, w2))
    else:
        return tl.where((nibble & 8) != 0, w3, tl.where((nibble & 4) != 0, w2, w1))


@triton.jit
def load_links(links_ptr, valid, N_LINKS: tl.constexpr, PAIRED: tl.constexpr):
    """|values| of the links of a group of four columns, which begin at ``links_ptr``: a tuple of float32. With PAIRED two of them are
    loaded as one word (loaded as a row of two they would pass through shared memory)."""
    KIND: tl.constexpr = links_ptr.dtype.element_ty
    if N_LINKS == 1:
        return (tl.abs(tl.load(links_ptr, mask=valid, other=0.0)).to(tl.float32),)
    elif not PAIRED:
        first, second = tl.load(links_ptr, mask=valid, other=0.0), tl.load(links_ptr + 1, mask=valid, other=0.0)
        return tl.abs(first).to(tl.float32), tl.abs(second).to(tl.float32)
    else:
        BITS: tl.constexpr = KIND.primitive_bitwidth
        both = tl.load(links_ptr.to(tl.pointer_type(tl.core.get_int_dtype(2 * BITS, True))), mask=valid, other=0)
        half: tl.constexpr = tl.core.get_int_dtype(BITS, True)
        first, second = both.to(half).to(KIND, bitcast=True), (both >> BITS).to(half).to(KIND, bitcast=True)
        return tl.abs(first).to(tl.float32), tl.abs(second).to(tl.float32)


@triton.jit
def link_key(magnitude, bits, inv_temperature, SOFT: tl.constexpr):
    """float32 rank of a link; the smallest are removed (``rank_keys`` of the reference)."""
    if SOFT:
        return noise.log_float32(magnitude) + noise.gumbel(bits) * inv_temperature
    return tl.where(magnitude < float("inf"), magnitude, float("inf"))


@triton.jit
def key_scale(inv_temperature):
    """Keys times this spread over about [-32, 32) at every temperature."""
    return 1.0 / tl.maximum(inv_temperature, 1.0)


@triton.jit
def position(key, scale, SOFT: tl.constexpr):
    """31-bit integer that never falls when the key rises: fixed point over [-32, 32), or the bits of a magnitude."""
    if SOFT:
        return (tl.minimum(tl.maximum(key * scale + 32.0, 0.0), 63.99999) * (2.0**25)).to(tl.int32)
    return key.to(tl.int32, bitcast=True)


@triton.jit
def fine_bin(position_, a, b):
    """Which of the 4096 bins of the window [a, b]: -1 below it, 4096 above."""
    inside = (position_ - (a << 19) >> 7) // (b - a + 1)
    coarse = position_ >> 19
    return tl.where(coarse < a, -1, tl.where(coarse > b, 4096, inside))


@triton.jit
def cheap_log2(x, COMPILED: tl.constexpr):
    """lg2.approx on the device, which takes a subnormal for zero."""
    if COMPILED:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def cheap_key(magnitude, word, of_weight, of_noise, COMPILED: tl.constexpr):
    """The soft key times ``key_scale``, within :func:`slack` of it where the word is below TOO_LIKELY and the magnitude no subnormal;
    NaN for NaN."""
    # (word >> 9) + 1/2 in units of 2**-23, put together from bits: 1 + U - (1 - 2**-24)
    u = (word >> 9 | 0x3F800000).to(tl.float32, bitcast=True) - BELOW_ONE
    rarity = cheap_log2(-cheap_log2(u, COMPILED), COMPILED) + LOG2_LN2
    return cheap_log2(magnitude, COMPILED) * of_weight - rarity * of_noise


@triton.jit
def slack(inv_temperature, scale):
    """More than a cheap key, times ``scale``, can be off: lg2 is within 2**-22 (absolute near 1, else relative), so -lg2 U of
    U < 1 - 2**-10 within 2**-12.5, relative, and its logarithm within 1.8e-4."""
    return (inv_temperature * 2.5e-4 + 1.0e-4) * scale + 2.0e-5


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
    table_ptr, state_ptr, mask16_ptr, schedule_ptr, k, inv_temperature, step, key0, key1,
    block_columns, blocks, layers, samples, programs,
    VALUE_TYPE: tl.constexpr, N_LINKS: tl.constexpr, PATTERNS: tl.constexpr, SOFT: tl.constexpr,
    FROM_DEVICE: tl.constexpr, COMPILED: tl.constexpr, PAIRED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    b, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    values_ptr = tl.load(table_ptr + b).to(tl.pointer_type(VALUE_TYPE))
    ids_ptr = tl.load(table_ptr + layers + b).to(tl.pointer_type(tl.uint8))
    layer = tl.load(table_ptr + 2 * layers + b)
    state_ptr += b.to(tl.int64) * LAYER_WORDS
    links = blocks.to(tl.int64) * (4 * N_LINKS)
    k, inv_temperature, step = controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE)
    number = program * GROUPS + tl.arange(0, GROUPS)
    valid = number < samples * 4
    # Multiples of a prime modulo the number of blocks: distinct, and in step with no row or column structure.
    block = ((number >> 2).to(tl.int64) * 2654435761 % blocks).to(tl.int32)
    masks = block_masks(ids_ptr, mask16_ptr, block, valid, PATTERNS)
    row, j = block // block_columns * 4 + (number & 3), block % block_columns
    group = row.to(tl.int64) * block_columns + j
    nibble = masks >> ((number & 3) << 2) & 15
    links_of_group = load_links(values_ptr + group * N_LINKS, valid, N_LINKS, PAIRED)
    scale = key_scale(inv_temperature)
    if SOFT:
        words = noise.random_words(group.to(tl.uint32), layer, step, noise.REMOVE, key0, key1)
    for slot in tl.static_range(N_LINKS):
        magnitude = links_of_group[slot]
        if SOFT:
            word = link_word(words, nibble, slot, N_LINKS)
            key = cheap_key(magnitude, word, scale * LN2, scale * LN2 * inv_temperature, COMPILED)
            key = tl.where(key == key, key, float("inf"))
            bin_ = (tl.minimum(tl.maximum(key + 32.0, 0.0), 63.99999) * 64.0).to(tl.int32)
        else:
            bin_ = position(link_key(magnitude, 0, inv_temperature, SOFT), scale, SOFT) >> 19
        tl.atomic_add(state_ptr + HEAD + bin_, 1, mask=valid, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + SAMPLED, 1) == programs - 1:
        upto = tl.cumsum(tl.load(state_ptr + HEAD + tl.arange(0, BINS)), 0).to(tl.float32)
        drawn = (samples * 4 * N_LINKS).to(tl.float32)
        share = k.to(tl.float32) / links.to(tl.float32)
        margin = 6.0 * tl.sqrt(drawn * share * tl.maximum(1.0 - share, 0.0)) + 4.0
        first = tl.sum((upto <= share * drawn - margin).to(tl.int32))
        last = tl.sum((upto < share * drawn + margin).to(tl.int32))
        tl.store(state_ptr + WINDOW_A, tl.minimum(first, BINS - 1))
        tl.store(state_ptr + WINDOW_B, tl.minimum(last, BINS - 1))


@triton.jit
def classify_kernel(
    table_ptr, state_ptr, mask16_ptr, survivors_ptr, list_ptr, schedule_ptr, k, inv_temperature, step, key0, key1,
    block_columns, blocks, layers, programs,
    VALUE_TYPE: tl.constexpr, N_LINKS: tl.constexpr, PATTERNS: tl.constexpr, SOFT: tl.constexpr,
    FROM_DEVICE: tl.constexpr, COMPILED: tl.constexpr, PAIRED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    b, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    state_ptr += b.to(tl.int64) * LAYER_WORDS
    links = blocks.to(tl.int64) * (4 * N_LINKS)
    k, inv_temperature, step = controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE)
    values_ptr = tl.load(table_ptr + b).to(tl.pointer_type(VALUE_TYPE))
    ids_ptr = tl.load(table_ptr + layers + b).to(tl.pointer_type(tl.uint8))
    layer = tl.load(table_ptr + 2 * layers + b)
    first_bin, last_bin = tl.load(state_ptr + WINDOW_A), tl.load(state_ptr + WINDOW_B)
    scale = key_scale(inv_temperature)
    margin = slack(inv_temperature, scale)
    low = tl.where(first_bin == 0, float("-inf"), first_bin.to(tl.float32) * (1.0 / 64) - 32.0 - margin)
    high = tl.where(last_bin == BINS - 1, float("inf"), (last_bin + 1).to(tl.float32) * (1.0 / 64) - 32.0 + margin)
    of_weight, of_noise = scale * LN2, scale * LN2 * inv_temperature
    # A subnormal has the cheap key of zero. Where the rarest noise could lift one above ``low``, nothing goes by cheap keys.
    low = tl.where(low > (25.0 * inv_temperature - 126.0) * of_weight, low, float("-inf"))

    block = program * BLOCKS + tl.arange(0, BLOCKS)
    valid = block < blocks
    masks = tl.where(valid, block_masks(ids_ptr, mask16_ptr, block, valid, PATTERNS), 0)
    # Of the block's four rows of groups, the first; there are fewer than 2**31 groups.
    first_group = block // block_columns * (3 * block_columns) + block
    links_ptr = values_ptr + first_group.to(tl.int64) * N_LINKS
    gone = (masks & 0, masks & 0)
    open_ = (masks & 0, masks & 0)
    for r in tl.static_range(4):
        group = first_group + r * block_columns
        links_of_group = load_links(links_ptr + (block_columns * N_LINKS).to(tl.int64) * r, valid, N_LINKS, PAIRED)
        if SOFT:
            words = noise.random_words(group.to(tl.uint32), layer, step, noise.REMOVE, key0, key1)
        new_gone, new_open = (), ()
        for slot in tl.static_range(N_LINKS):
            magnitude = links_of_group[slot]
            if SOFT:
                word = link_word(words, masks >> 4 * r, slot, N_LINKS)
                key = cheap_key(magnitude, word, of_weight, of_noise, COMPILED)
                doubtful = word >= TOO_LIKELY
                removed = (key < low) & (doubtful == 0)
                listed = ((key > high) == 0) | doubtful  # NaN is listed: its exact key is inf, which the k-th may be
            else:
                bin_ = position(link_key(magnitude, 0, inv_temperature, SOFT), scale, SOFT) >> 19
                removed = bin_ < first_bin
                listed = bin_ <= last_bin
            new_gone = new_gone + (gone[slot] | tl.where(removed, 15 << 4 * r, 0),)
            new_open = new_open + (open_[slot] | tl.where(listed, 15 << 4 * r, 0),)
        gone, open_ = new_gone, new_open
    # No nibble of a pattern is empty, so nothing borrows: the lowest bit of every nibble is the first link of its row.
    first = masks & ~(masks - 0x1111)
    if N_LINKS == 2:
        dropped = gone[0] & first | gone[1] & (masks ^ first)
        doubted = (open_[0] & first | open_[1] & (masks ^ first)) & ~dropped
    else:
        dropped, doubted = gone[0] & masks, open_[0] & masks & ~gone[0]
    tl.store(survivors_ptr + b.to(tl.int64) * blocks + block, masks & ~dropped, mask=valid)
    count = bit_count(doubted)
    totals = tl.sum(count | bit_count(dropped) << 16)
    both = (totals & 0xFFFF).to(tl.int64) | (totals >> 16).to(tl.int64) << 32
    counter = (state_ptr + COUNT).to(tl.pointer_type(tl.int64))
    before = tl.atomic_add(counter, both, sem="relaxed").to(tl.int32)
    place = list_ptr + b.to(tl.int64) * links + before + tl.cumsum(count, 0) - count
    for r in tl.static_range(4):
        element = (first_group + r * block_columns) << 2  # the low 32 bits of the link's index
        left = doubted >> 4 * r & 15
        for _ in tl.static_range(N_LINKS):
            bit = left & -left
            tl.store(place, element + bit_column(bit), mask=left > 0)
            place += (left > 0).to(tl.int32)
            left ^= bit


@triton.jit
def exact_kernel(
    table_ptr, state_ptr, mask16_ptr, survivors_ptr, list_ptr, entries_ptr, schedule_ptr,
    k, inv_temperature, step, key0, key1, block_columns, blocks, layers, programs,
    VALUE_TYPE: tl.constexpr, N_LINKS: tl.constexpr, PATTERNS: tl.constexpr, SOFT: tl.constexpr,
    FROM_DEVICE: tl.constexpr, ALL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Exact keys of the listed links or, with ALL and where the window did not hold, of every link."""
    b, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    state_ptr += b.to(tl.int64) * LAYER_WORDS
    links = blocks.to(tl.int64) * (4 * N_LINKS)
    list_ptr += b.to(tl.int64) * links
    entries_ptr += b.to(tl.int64) * links
    survivors_ptr += b.to(tl.int64) * blocks
    k, inv_temperature, step = controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE)
    a, z, count = tl.load(state_ptr + WINDOW_A), tl.load(state_ptr + WINDOW_B), tl.load(state_ptr + COUNT)
    histogram_ptr = state_ptr + HEAD + BINS
    if ALL:
        if window_holds(state_ptr, k):
            return
        a, z, count = 0, BINS - 1, links.to(tl.int32)
        histogram_ptr += BINS
    values_ptr = tl.load(table_ptr + b).to(tl.pointer_type(VALUE_TYPE))
    ids_ptr = tl.load(table_ptr + layers + b).to(tl.pointer_type(tl.uint8))
    layer = tl.load(table_ptr + 2 * layers + b)
    scale = key_scale(inv_temperature)
    start = program * BLOCKS  # while, not range: numpy 2.4 broke run-time bounds in Triton 3.6's interpreter
    while start < count:
        offset = start + tl.arange(0, BLOCKS)
        valid = offset < count
        if ALL:
            row, rest = offset // (block_columns * N_LINKS), offset % (block_columns * N_LINKS)
            j, slot = rest // N_LINKS, rest % N_LINKS
            block = (row >> 2) * block_columns + j
            masks = block_masks(ids_ptr, mask16_ptr, block, valid, PATTERNS)
            nibble = masks >> ((row & 3) << 2) & 15
            bit = tl.where(slot == 0, nibble & -nibble, nibble & (nibble - 1))
            tl.store(survivors_ptr + block, masks, mask=valid & (rest % N_LINKS == 0) & ((row & 3) == 0))
        else:
            element = tl.load(list_ptr + offset, mask=valid, other=0).to(tl.uint32, bitcast=True)  # 64-bit divisions are slow
            row = (element // (4 * block_columns).to(tl.uint32)).to(tl.int32)
            column = (element - row.to(tl.uint32) * (4 * block_columns).to(tl.uint32)).to(tl.int32)
            j = column >> 2
            block = (row >> 2) * block_columns + j
            nibble = block_masks(ids_ptr, mask16_ptr, block, valid, PATTERNS) >> ((row & 3) << 2) & 15
            bit = tl.full(column.shape, 1, tl.int32) << (column & 3)
            slot = tl.where((nibble & (bit - 1)) != 0, 1, 0)
        group = row.to(tl.int64) * block_columns + j
        words = noise.random_words(group.to(tl.uint32), layer, step, noise.REMOVE, key0, key1)
        magnitude = tl.abs(tl.load(values_ptr + group * N_LINKS + slot, mask=valid, other=0.0)).to(tl.float32)
        key = link_key(magnitude, word_of(words, bit), inv_temperature, SOFT)
        tl.store(entries_ptr + offset, ordered(key, group * 4 + bit_column(bit)), mask=valid)
        bin_ = fine_bin(position(key, scale, SOFT), a, z)
        tl.atomic_add(histogram_ptr + bin_, 1, mask=valid & (bin_ >= 0) & (bin_ < BINS), sem="relaxed")
        if not ALL:
            lower = tl.sum((valid & (bin_ < 0)).to(tl.int32))
            if lower > 0:
                tl.atomic_add(state_ptr + LOWER, lower, sem="relaxed")
        start += programs * BLOCKS


@triton.jit
def window_holds(state_ptr, k):
    """Whether the k-th smallest key lies in the window: what goes for certain is no more than k, and with it no less."""
    certain = tl.load(state_ptr + BELOW) + tl.load(state_ptr + LOWER)
    inside = tl.sum(tl.load(state_ptr + HEAD + BINS + tl.arange(0, BINS)))
    return (certain <= k) & (k <= certain + inside)


@triton.jit
def drop(survivors_ptr, entry, block_columns, mask):
    """Clear the survivor bits of listed links."""
    element = entry & 0xFFFFFFFF
    row, column = element // (4 * block_columns), (element % (4 * block_columns)).to(tl.int32)
    block = (row >> 2) * block_columns + (column >> 2)
    bit = ((row & 3).to(tl.int32) << 2) + (column & 3)
    tl.atomic_and(survivors_ptr + block, ~(tl.full(bit.shape, 1, tl.int32) << bit), mask=mask, sem="relaxed")


@triton.jit
def resolve_kernel(
    state_ptr, survivors_ptr, entries_ptr, short_ptr, schedule_ptr, k, inv_temperature, step,
    block_columns, blocks, programs,
    N_LINKS: tl.constexpr, SOFT: tl.constexpr, FROM_DEVICE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    b, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    state_ptr += b.to(tl.int64) * LAYER_WORDS
    survivors_ptr += b.to(tl.int64) * blocks
    links = blocks.to(tl.int64) * (4 * N_LINKS)
    entries_ptr += b.to(tl.int64) * links
    short_ptr += b.to(tl.int64) * SHORT_LIST
    k, inv_temperature, step = controls(schedule_ptr, k, inv_temperature, step, links, FROM_DEVICE)
    scale = key_scale(inv_temperature)
    a, z, count = tl.load(state_ptr + WINDOW_A), tl.load(state_ptr + WINDOW_B), tl.load(state_ptr + COUNT)
    rank = k - tl.load(state_ptr + BELOW) - tl.load(state_ptr + LOWER)
    histogram_ptr = state_ptr + HEAD + BINS
    if not window_holds(state_ptr, k):
        a, z, count, rank = a & 0, z & 0 | BINS - 1, links.to(tl.int32), k
        histogram_ptr += BINS
    counts = tl.load(histogram_ptr + tl.arange(0, BINS))
    bin_of_k = tl.sum((tl.cumsum(counts, 0) < rank).to(tl.int32))
    bin_of_k = tl.where(rank > 0, bin_of_k, 0)
    # with nothing left to remove the k-th is in bin 0 and its rank there is 0: what lies below the window still goes
    equal_rank = rank - tl.sum(tl.where(tl.arange(0, BINS) < bin_of_k, counts, 0))
    start = program * BLOCKS
    while start < count:
        offset = start + tl.arange(0, BLOCKS)
        valid = offset < count
        entry = tl.load(entries_ptr + offset, mask=valid, other=0)
        bin_ = fine_bin(position(key_of(entry), scale, SOFT), a, z)
        drop(survivors_ptr, entry, block_columns, valid & (bin_ < bin_of_k))
        equal = (valid & (bin_ == bin_of_k)).to(tl.int32)
        found = tl.sum(equal)
        if found > 0:
            place = tl.atomic_add(state_ptr + EQUAL, found, sem="relaxed") + tl.cumsum(equal, 0) - equal
            tl.store(short_ptr + place, entry, mask=(equal > 0) & (place < SHORT_LIST))
        start += programs * BLOCKS
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + RESOLVED, 1) == programs - 1:
        number = tl.atomic_add(state_ptr + EQUAL, 0)  # not a load: this line was cached before others counted
        lane = tl.arange(0, SHORT_LIST)
        if number <= SHORT_LIST:
            entry = tl.load(short_ptr + lane, mask=lane < number, other=0)
            smaller = lane & 0
            chunk = number & 0
            while chunk < number:
                others = chunk + tl.arange(0, 16)
                rival = tl.load(short_ptr + others, mask=others < number, other=0x7FFFFFFFFFFFFFFF)
                smaller += tl.sum((rival[None, :] < entry[:, None]).to(tl.int32), 1)
                chunk += 16
            drop(survivors_ptr, entry, block_columns, (lane < number) & (smaller < equal_rank))
        else:
            # Eight-bit radix selection, most significant digit first, over the unsigned image of the entries.
            prefix = tl.zeros([], tl.uint64)
            remaining = equal_rank
            for digit in range(8):
                shift = tl.full([], 56, tl.uint64) - 8 * digit
                digits = tl.zeros([256], tl.int32)
                at = number & 0
                while at < count:
                    valid = at + lane < count
                    entry = tl.load(entries_ptr + at + lane, mask=valid, other=0)
                    inside = valid & (fine_bin(position(key_of(entry), scale, SOFT), a, z) == bin_of_k)
                    image = entry.to(tl.uint64, bitcast=True) ^ 0x8000000000000000
                    inside &= (image >> shift) >> 8 == prefix
                    digits += tl.histogram(((image >> shift) & 255).to(tl.int32), 256, mask=inside)
                    at += SHORT_LIST
                digit_of_k = tl.sum((tl.cumsum(digits, 0) < remaining).to(tl.int32))
                remaining -= tl.sum(tl.where(tl.arange(0, 256) < digit_of_k, digits, 0))
                prefix = prefix << 8 | digit_of_k.to(tl.uint64)
            at = number & 0
            while at < count:
                valid = at + lane < count
                entry = tl.load(entries_ptr + at + lane, mask=valid, other=0)
                inside = valid & (fine_bin(position(key_of(entry), scale, SOFT), a, z) == bin_of_k)
                image = entry.to(tl.uint64, bitcast=True) ^ 0x8000000000000000
                drop(survivors_ptr, entry, block_columns, inside & (image <= prefix) & (equal_rank > 0))
                at += SHORT_LIST


_NUMBERS = {"wide": ("k", "step", "key0", "key1"), "floats": ("inv_temperature",)}
SAMPLE = BatchKernel(sample_kernel, 8, **_NUMBERS | {"enable_fp_fusion": True})
CLASSIFY = BatchKernel(classify_kernel, 4, **_NUMBERS | {"enable_fp_fusion": True})  # no exact float in it
EXACT = BatchKernel(exact_kernel, 4, **_NUMBERS)
RESOLVE = BatchKernel(resolve_kernel, 8, **_NUMBERS)


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
        tile: blocks per program of the pass; the result does not depend on it.
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
    listed = torch.empty(batch, links, dtype=torch.int32, device=device)
    entries = torch.empty(batch, links, dtype=torch.int64, device=device)
    short = torch.empty(batch, SHORT_LIST.value, dtype=torch.int64, device=device)
    mask16 = patterns.tensor("mask16", device)
    few = {"N_LINKS": n, "SOFT": mode == "soft", "FROM_DEVICE": schedule is not None}
    kind = {"VALUE_TYPE": triton_type(values[0].dtype), "PATTERNS": len(patterns), **few}
    schedule = short if schedule is None else schedule
    numbers = int(zeta * links), 1.0 / temperature, step
    noisy = *numbers, seed & 0xFFFFFFFF, seed >> 32
    shape = block_columns, blocks, batch

    # A larger sample narrows the window: what it costs and what it saves balance at the power 2/3.
    most = SAMPLE_LINKS if links < 1 << 24 else 2 * SAMPLE_LINKS
    samples = min(blocks, max(1, min(most, int(2.35 * links ** (2 / 3))) // (BLOCK * n)))
    programs = triton.cdiv(samples * 4, GROUPS)
    size = values[0].element_size()
    paired = n == 2 and size <= 4 and all(v.data_ptr() % (2 * size) == 0 for v in values)
    cheap = {"COMPILED": not interpreted(), "PAIRED": paired}
    SAMPLE(programs * batch, pointers, state, mask16, schedule, *noisy, *shape, samples, programs, **kind, **cheap, GROUPS=GROUPS)
    programs = triton.cdiv(blocks, tile)
    CLASSIFY(
        programs * batch, pointers, state, mask16, survivors, listed, schedule, *noisy, *shape, programs,
        **kind, **cheap, BLOCKS=tile, num_warps=max(1, tile // 32 // BLOCKS_PER_THREAD),
    )  # fmt: skip
    lists = pointers, state, mask16, survivors, listed, entries, schedule
    for every, most in ((False, PROGRAMS), (True, RESOLVERS)):
        programs = max(1, min(most // batch, links // 4096))
        EXACT(programs * batch, *lists, *noisy, *shape, programs, **kind, ALL=every, BLOCKS=128)
    programs = max(1, min(RESOLVERS // batch, links // 16384))
    RESOLVE(
        programs * batch, state, survivors, entries, short, schedule, *numbers, block_columns, blocks, programs,
        **few, BLOCKS=512,
    )  # fmt: skip
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
        return remove_many([aligned(values)], [aligned(ids)], n, zeta, temperature, mode, seed, [layer], step)[0]
