"""adamw_ in Triton: all layers in one launch, every number read once and written once, both operands on the way.

A thread owns 8 rows of W and, of each, two neighbouring links: 2 x (2 / n) blocks. Two numbers are one word of 64 or 32 bits, and what
the 8 rows leave in a column is one 64-bit word of the transposed operand, so no data moves between threads, and all tensors are of one
dimension and one layout: a kernel of [threads, 4] vectors had Triton's layout passes at work for 7 to 14 seconds.

The four rows of a block are loaded before anything of them is stored: the compiler cannot know that the tensors do not overlap, and
would wait for every row in turn. A program's pieces are 256 bytes of a row and 64 of a column of W: with 32 of a column an
earlier kernel took 26 % longer.

Traffic per link with float32 masters and moments: 16 bytes read, 12 written, 2 for each operand, 1/8 of ids (n = 2).
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from ... import rng_triton as noise
from .._batch import BatchKernel, aligned, interpreted, on_device, triton_type
from .._layers import BLOCK_COLUMNS, BLOCK_ROWS, FIRST_OWN, MOST_LAYERS, entry, layer_of, room, tables
from ..pack.triton_pack import block_table, half_word, transposed_word

VALUES, EXP_AVG, EXP_AVG_SQ, IDS, STEP, LAYER, OPERAND, OPERAND_T = map(tl.constexpr, range(FIRST_OWN, FIRST_OWN + 8))
"""Columns of the table (:mod:`chts_kernels.ops._layers`); the addresses of gradients change from step to step."""


@triton.jit
def load_pair(address, index, inside, second, KIND: tl.constexpr, VECTOR: tl.constexpr):
    """Numbers ``index`` and ``index + 1`` of an array of KIND as float32, 0 where not ``inside`` (the other: not ``second``). VECTOR:
    the index is even."""
    BITS: tl.constexpr = KIND.primitive_bitwidth
    HALF: tl.constexpr = tl.core.get_int_dtype(BITS, False)
    if VECTOR:
        both = tl.load(address.to(tl.pointer_type(tl.core.get_int_dtype(2 * BITS, False))) + (index >> 1), mask=inside, other=0)
        low, high = both.to(HALF), (both >> BITS).to(HALF)
    else:
        at = address.to(tl.pointer_type(HALF)) + index
        low, high = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=second, other=0)
    return low.to(KIND, bitcast=True).to(tl.float32), high.to(KIND, bitcast=True).to(tl.float32)


@triton.jit
def store_pair(address, index, low, high, inside, second, VECTOR: tl.constexpr):
    """The counterpart of :func:`load_pair`, for numbers or words that have the type of the array."""
    BITS: tl.constexpr = low.dtype.primitive_bitwidth
    HALF: tl.constexpr = tl.core.get_int_dtype(BITS, False)
    low, high = low.to(HALF, bitcast=True), high.to(HALF, bitcast=True)
    if VECTOR:
        WHOLE: tl.constexpr = tl.core.get_int_dtype(2 * BITS, False)
        both = low.to(WHOLE) | high.to(WHOLE) << BITS
        tl.store(address.to(tl.pointer_type(WHOLE)) + (index >> 1), both, mask=inside)
    else:
        at = address.to(tl.pointer_type(HALF)) + index
        tl.store(at, low, mask=inside)
        tl.store(at + 1, high, mask=second)


@triton.jit
def operand_words(p0, p1, facts, R: tl.constexpr, LINKS: tl.constexpr, DTYPE: tl.constexpr):
    """Row R of a block row, two links [threads], as 2:4 pairs: a tuple of one word for n = 2, of two for n = 1."""
    low, high = half_word(p0, DTYPE), half_word(p1, DTYPE)
    if LINKS == 2:
        return (low | high << 16,)
    else:
        column0, column1 = (facts[0] >> (48 + 4 * R)).to(tl.uint32), (facts[1] >> (48 + 4 * R)).to(tl.uint32)
        return low << ((column0 & 1) << 4), high << ((column1 & 1) << 4)


@triton.jit
def two_words(low, high):
    return low.to(tl.uint64) | high.to(tl.uint64) << 32


@triton.jit
def one_minus_power(base_bits, exponent):
    """``1 - base**exponent`` in float64, for a base given by its bits and an exponent below 2**24: 24 squarings."""
    base = base_bits.to(tl.int64).to(tl.float64, bitcast=True)
    power = base * 0.0 + 1.0
    for bit in range(24):
        power = tl.where((exponent >> bit & 1) != 0, power * base, power)
        base = base * base
    return 1.0 - power


@triton.jit
def rounding_bits(index, layer, step, seed, VECTOR: tl.constexpr):
    """uint32 random bits of links ``index`` and ``index + 1`` (int64), which are of one group of four where the index is even."""
    words = noise.random_words((index >> 2).to(tl.uint32), layer, step, noise.ROUND, seed, seed >> 32)
    if VECTOR:
        upper = (index & 2) != 0
        return tl.where(upper, words[2], words[0]), tl.where(upper, words[3], words[1])
    else:
        after = index + 1
        others = noise.random_words((after >> 2).to(tl.uint32), layer, step, noise.ROUND, seed, seed >> 32)
        return one_of_four(words, index), one_of_four(others, after)


@triton.jit
def one_of_four(words, index):
    odd = (index & 1) != 0
    return tl.where((index & 2) != 0, tl.where(odd, words[3], words[2]), tl.where(odd, words[1], words[0]))


@triton.jit
def round_stochastically(x, bits):
    """float32 to a neighbour in bfloat16, unbiased for ``bits`` uniform on 0, ..., 65535; inf and NaN stay."""
    word = x.to(tl.uint32, bitcast=True)
    finite = (word & 0x7F800000) != 0x7F800000
    word = tl.where(finite, word + bits, word | ((word & 0xFFFF) != 0).to(tl.uint32) << 22)
    return (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def stepped(p, g, m, v, rule, SCALED: tl.constexpr, MAXIMIZE: tl.constexpr):
    """New p, m and v in float32, and the gradient without its scale."""
    scale, keep, step_size, unbias, rest1, beta2, rest2, eps = rule
    if SCALED:
        g = g / scale
    along = -g if MAXIMIZE else g
    m = m + rest1 * (along - m)
    v = beta2 * v + rest2 * along * along
    return p * keep - step_size * m / (tl.sqrt(v) * unbias + eps), g, m, v


@triton.jit
def adamw_kernel(
    table_ptr, grads_ptr, patterns_ptr, lr_ptr, scale_ptr, inf_ptr,
    lr, beta1_bits, beta2_bits, rest1, beta2, rest2, eps, weight_decay, seed,
    VALUE: tl.constexpr, MOMENT: tl.constexpr, DTYPE: tl.constexpr, GRAD: tl.constexpr, LINKS: tl.constexpr, LAYERS: tl.constexpr,
    HAS_OPERAND: tl.constexpr, HAS_OPERAND_T: tl.constexpr, LR_TENSOR: tl.constexpr, SCALED: tl.constexpr, MAY_SKIP: tl.constexpr,
    MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr, VECTOR_N: tl.constexpr, VECTOR_K: tl.constexpr,
    LANES_N: tl.constexpr, LANES_K: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = 2 // LINKS  # blocks side by side of a thread
    pid = tl.program_id(0)
    b, program = layer_of(table_ptr, pid, LAYERS)
    block_rows = entry(table_ptr, BLOCK_ROWS, b, LAYERS).to(tl.int32)
    block_columns = entry(table_ptr, BLOCK_COLUMNS, b, LAYERS).to(tl.int32)
    p_ptr, g_ptr = entry(table_ptr, VALUES, b, LAYERS), tl.load(grads_ptr + b)
    m_ptr, v_ptr = entry(table_ptr, EXP_AVG, b, LAYERS), entry(table_ptr, EXP_AVG_SQ, b, LAYERS)

    programs_k = (block_columns + COLUMNS * LANES_K - 1) // (COLUMNS * LANES_K)
    lane = tl.arange(0, LANES_N * LANES_K)
    warp, thread = lane // 32, lane % 32  # a warp is 4 (along N) x 8: whole memory sectors both ways
    tile_n = program // programs_k * LANES_N + warp // (LANES_K // 8) * 4 + thread // 8
    tile_k = program % programs_k * LANES_K + warp % (LANES_K // 8) * 8 + thread % 8
    count_n = block_rows - 2 * tile_n  # blocks of the thread inside the matrix
    count_k = block_columns - COLUMNS * tile_k
    if MAY_SKIP:
        count_n = tl.where(tl.load(inf_ptr) == 0, count_n, 0)  # then nothing is read or written
    inside_k, second_k = count_k > 0, count_k * LINKS > 1
    seed = seed.to(tl.int64)  # the interpreter passes small numbers as 32 bits

    row_links = block_columns * LINKS
    first = (8 * tile_n).to(tl.int64) * row_links + 2 * tile_k
    WRITES: tl.constexpr = HAS_OPERAND or HAS_OPERAND_T
    facts = ()
    if WRITES:
        at = entry(table_ptr, IDS, b, LAYERS).to(tl.pointer_type(tl.uint8)) + (2 * tile_n).to(tl.int64) * block_columns + COLUMNS * tile_k
        for i in tl.static_range(2):
            row = ()
            for j in tl.static_range(COLUMNS):
                one = tl.load(at + i * block_columns + j, mask=(count_n > i) & (count_k > j), other=255).to(tl.uint32)
                row = row + (tl.load(patterns_ptr + one),)
            facts = facts + (row,)

    step = tl.load(entry(table_ptr, STEP, b, LAYERS).to(tl.pointer_type(tl.float32))).to(tl.int32)
    if LR_TENSOR:
        lr = tl.load(lr_ptr).to(tl.float32)
    step_size = (lr / one_minus_power(beta1_bits, step)).to(tl.float32)
    unbias = (1.0 / tl.sqrt(one_minus_power(beta2_bits, step).to(tl.float32))).to(tl.float32)
    keep = 1.0 - lr * weight_decay
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr).to(tl.float32)

    rule = scale, keep, step_size, unbias, rest1, beta2, rest2, eps
    words = ()
    for i in tl.static_range(2):
        inside, second = (count_n > i) & inside_k, (count_n > i) & second_k
        ps, gs, ms, vs = (), (), (), ()
        for r in tl.static_range(4):
            index = first + (4 * i + r) * row_links
            ps = ps + (load_pair(p_ptr, index, inside, second, VALUE, VECTOR_K),)
            gs = gs + (load_pair(g_ptr, index, inside, second, GRAD, VECTOR_K),)
            ms = ms + (load_pair(m_ptr, index, inside, second, MOMENT, VECTOR_K),)
            vs = vs + (load_pair(v_ptr, index, inside, second, MOMENT, VECTOR_K),)
        for r in tl.static_range(4):
            index = first + (4 * i + r) * row_links
            p0, g0, m0, v0 = stepped(ps[r][0], gs[r][0], ms[r][0], vs[r][0], rule, SCALED, MAXIMIZE)
            p1, g1, m1, v1 = stepped(ps[r][1], gs[r][1], ms[r][1], vs[r][1], rule, SCALED, MAXIMIZE)
            if SCALED:
                store_pair(g_ptr, index, g0.to(GRAD), g1.to(GRAD), inside, second, VECTOR_K)
            p0, p1 = p0.to(VALUE), p1.to(VALUE)
            store_pair(p_ptr, index, p0, p1, inside, second, VECTOR_K)
            if STOCHASTIC:
                bits0, bits1 = rounding_bits(index, entry(table_ptr, LAYER, b, LAYERS), step, seed, VECTOR_K)
                m0, m1 = round_stochastically(m0, bits0 & 0xFFFF), round_stochastically(m1, bits1 & 0xFFFF)
                v0, v1 = round_stochastically(v0, bits0 >> 16), round_stochastically(v1, bits1 >> 16)
            else:
                m0, m1, v0, v1 = m0.to(MOMENT), m1.to(MOMENT), v0.to(MOMENT), v1.to(MOMENT)
            store_pair(m_ptr, index, m0, m1, inside, second, VECTOR_K)
            store_pair(v_ptr, index, v0, v1, inside, second, VECTOR_K)
            if WRITES:
                words = words + (operand_words(p0, p1, facts[i], r, LINKS, DTYPE),)
            if HAS_OPERAND:
                at = (8 * tile_n + 4 * i + r).to(tl.int64) * block_columns + COLUMNS * tile_k
                operand_ptr = entry(table_ptr, OPERAND, b, LAYERS)
                if LINKS == 2:
                    tl.store(operand_ptr.to(tl.pointer_type(tl.uint32)) + at, words[4 * i + r][0], mask=inside)
                else:
                    store_pair(operand_ptr, at, words[4 * i + r][0], words[4 * i + r][1], inside, second, VECTOR_K)

    if HAS_OPERAND_T:
        operand_t_ptr = entry(table_ptr, OPERAND_T, b, LAYERS)
        at = (4 * COLUMNS * tile_k).to(tl.int64) * block_rows + 2 * tile_n
        for j in tl.static_range(COLUMNS):
            low0, high0 = two_words(words[0][j], words[1][j]), two_words(words[2][j], words[3][j])
            low1, high1 = two_words(words[4][j], words[5][j]), two_words(words[6][j], words[7][j])
            inside, second = (count_n > 0) & (count_k > j), (count_n > 1) & (count_k > j)
            for c in tl.static_range(4):
                upper = transposed_word(low0, high0, facts[0][j], c, LINKS)
                lower = transposed_word(low1, high1, facts[1][j], c, LINKS)
                store_pair(operand_t_ptr, at + (4 * j + c) * block_rows, upper, lower, inside, second, VECTOR_N)


ADAMW = BatchKernel(
    adamw_kernel, 8, wide=("beta1_bits", "beta2_bits", "seed"), floats=("lr", "rest1", "beta2", "rest2", "eps", "weight_decay"),
    enable_fp_fusion=True,
)  # fmt: skip


def lanes() -> tuple[int, int]:
    """(LANES_N, LANES_K) of a program, multiples of 4 and 8."""
    return (16, 16) if interpreted() else (8, 32)  # the interpreter pays per program, not per element


def adamw_(
    values, grads, exp_avgs, exp_avg_sqs, steps, ids, n, operands, operands_t, layers, lr_tensor, lr, beta1, beta2, eps, weight_decay,
    maximize, grad_scale, found_inf, seed,
) -> None:  # fmt: skip
    """The op; arguments as in the reference."""
    if n == 2 and operands and all(o.data_ptr() == p.data_ptr() for o, p in zip(operands, values, strict=True)):
        operands = []  # the values are the operand
    everything = [values, grads, exp_avgs, exp_avg_sqs, steps, ids, operands, operands_t, layers]
    # Layers whose rows begin on word boundaries go together, the others too.
    groups: dict[tuple[bool, bool], list[int]] = {}
    for i, of_layer in enumerate(ids):
        groups.setdefault((of_layer.shape[0] % 2 == 0, of_layer.shape[1] * n % 2 == 0), []).append(i)
    with on_device(values[0]):
        for vectors, members in groups.items():
            for start in range(0, len(members), MOST_LAYERS):
                some = members[start : start + MOST_LAYERS]
                chosen = [[entries[i] for i in some] if entries else [] for entries in everything]
                _launch(*chosen, n, vectors, lr_tensor, lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, seed)
    written = [*values, *exp_avgs, *exp_avg_sqs, *operands, *operands_t]
    torch.autograd.graph.increment_version(written)  # a kernel's writes are invisible to the version counters


def _launch(
    values, grads, exp_avgs, exp_avg_sqs, steps, ids, operands, operands_t, layers, n, vectors, lr_tensor, lr, beta1, beta2, eps,
    weight_decay, maximize, grad_scale, found_inf, seed,
) -> None:  # fmt: skip
    device = values[0].device
    lanes_n, lanes_k = lanes()
    width = 2 // n * lanes_k
    counts = [-(-i.shape[0] // (2 * lanes_n)) * -(-i.shape[1] // width) for i in ids]
    readable = [aligned(g) for g in grads]
    if len({t.dtype for t in readable}) > 1:
        readable = [g.to(values[0].dtype) for g in readable]
    columns = values, exp_avgs, exp_avg_sqs, ids, steps, layers, operands, operands_t
    found = tables(counts, ids, columns, readable)
    dummy = found[0]
    compute = (operands_t or operands or values)[0].dtype
    ADAMW(
        sum(counts), *found, block_table(n, device), *(dummy if t is None else t for t in (lr_tensor, grad_scale, found_inf)),
        lr, _double_bits(beta1), _double_bits(beta2), 1 - beta1, beta2, 1 - beta2, eps, float(weight_decay), seed or 0,
        VALUE=triton_type(values[0].dtype), MOMENT=triton_type(exp_avgs[0].dtype), DTYPE=triton_type(compute),
        GRAD=triton_type(readable[0].dtype), LINKS=n, LAYERS=room(len(values)), HAS_OPERAND=bool(operands),
        HAS_OPERAND_T=bool(operands_t), LR_TENSOR=lr_tensor is not None, SCALED=grad_scale is not None, MAY_SKIP=found_inf is not None,
        MAXIMIZE=maximize, STOCHASTIC=seed is not None, VECTOR_N=vectors[0], VECTOR_K=vectors[1], LANES_N=lanes_n, LANES_K=lanes_k,
    )  # fmt: skip
    if grad_scale is not None:
        for given, used in zip(grads, readable, strict=True):
            if given is not used:
                given.copy_(used)


def _double_bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]
