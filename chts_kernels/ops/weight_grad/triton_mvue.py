"""MVUE pruning of dY^T in Triton: the law and the random numbers of mvue.py, bit for bit, in one pass.

A program takes 64 output features and 128 tokens of dY [T, N], chooses two of every four tokens of each feature, and writes the
compressed transpose and its metadata in the register order of ``wgmma.sp`` (:mod:`chts_kernels.layout.metadata`). A thread owns
four features and 16 tokens: the four words of a Philox call serve its four features, and the 16 bits of metadata of a feature
never leave it. Only the finished values go through shared memory, so that rows of the result are written in lines of 128 bytes.

Traffic: 2 bytes read and 1.25 written per element of dY.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...layout import metadata_shape
from ...layout.metadata import PADDING_NIBBLE
from ...rng import Purpose
from ...rng_triton import random_words
from .. import _triton
from .._library import empty
from .mvue import LEAST

STEPS = 2
"""64-token steps of a program."""
_STEPS = tl.constexpr(STEPS)
_PADDING = tl.constexpr(PADDING_NIBBLE * 0x1111)
_LEAST = tl.constexpr(LEAST)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_features(pairs_ptr, inside):
    """The bits of features 0 and 1, and 2 and 3, of every thread: two tensors of pairs, the lower feature in the lower half."""
    pairs = tl.load(pairs_ptr, mask=inside, other=0)
    return tl.split(tl.reshape(pairs, (pairs.shape[0], pairs.shape[1] // 2, 2)))


@triton.jit
def _magnitude(pair, UPPER: tl.constexpr, BF16: tl.constexpr):
    """float32 magnitude of one element of a pair. bfloat16 by integer operations: of a conversion's operand the compiler would take
    the magnitude first, at an instruction more."""
    if BF16:
        return ((pair & 0x7FFF0000) if UPPER else ((pair & 0x7FFF) << 16)).to(tl.float32, bitcast=True)
    else:
        return tl.abs((pair >> (16 * UPPER)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32))


@triton.jit
def _raised(h, bits, BF16: tl.constexpr):
    """float32 whose truncation to bfloat16 is h stochastically rounded; for float16, h stochastically rounded."""
    word = h.to(tl.uint32, bitcast=True)
    if BF16:
        return tl.minimum(word + (((bits & 0xFF) << 8) | 0x80), 0x7F800000).to(tl.float32, bitcast=True)
    else:
        raised = tl.minimum(word + (((bits & 0xFF) << 5) | 0x10), 0x7F800000) & 0xFFFFE000
        return tl.where(word < 0x38800000, h, raised.to(tl.float32, bitcast=True))  # below float16's smallest normal


@triton.jit
def _kept(pair, h, UPPER: tl.constexpr, BF16: tl.constexpr):
    """The bits of sign(y) max(|y|, h) as 16-bit integer, y an element of a pair."""
    magnitude = tl.maximum(_magnitude(pair, UPPER, BF16), h, propagate_nan=tl.PropagateNan.ALL)
    if BF16:
        # |y| has no bits below the upper half, so that truncating the larger of it and the raised h is truncating h
        signed = (magnitude.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) | ((pair if UPPER else (pair << 16)) & 0x80000000)
        return (signed >> 16).to(tl.uint16)
    else:
        bits = magnitude.to(tl.float16).to(tl.uint16, bitcast=True)
        return bits | ((pair >> (16 * UPPER)).to(tl.uint16) & 0x8000)


@triton.jit
def _choose(p0, p1, p2, p3, bits, UPPER: tl.constexpr, BF16: tl.constexpr):
    """What is kept of one element of the pairs of four tokens: two 16-bit values, and their nibble as int32."""
    a0, a1 = _magnitude(p0, UPPER, BF16), _magnitude(p1, UPPER, BF16)
    a2, a3 = _magnitude(p2, UPPER, BF16), _magnitude(p3, UPPER, BF16)
    s01 = a0 + a1 + _LEAST
    s23 = a2 + a3 + _LEAST
    b0 = _smaller(a0, a1 + s23)
    c2 = b0 + _smaller(a1, a0 + s23)
    b2 = _smaller(a2, a3 + s01)
    c3 = c2 + b2
    h = (c2 + (b2 + _smaller(a3, a2 + s01))) * 0.5
    low = (bits >> 8).to(tl.int32).to(tl.float32) * (h * 5.9604644775390625e-08)
    high = low + h
    past0, past1 = b0 <= low, c2 <= low
    beyond1, beyond2 = (c2 <= high) | past0, (c3 <= high) | past1
    # past1 implies past0, and beyond2 beyond1: sums of what is not negative do not fall
    first = tl.where(past1, p2, tl.where(past0, p1, p0))
    second = tl.where(beyond2, p3, tl.where(beyond1, p2, p1))
    nibble = tl.where(past1, 2, tl.where(past0, 1, 0)) + tl.where(beyond2, 12, tl.where(beyond1, 8, 4))
    scale = _raised(h, bits, BF16)
    return _kept(first, scale, UPPER, BF16), _kept(second, scale, UPPER, BF16), nibble


@triton.jit
def _join4(x):
    """Four tensors as one, along two last dimensions of 2, which are one of 4."""
    return tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))


@triton.jit
def mvue_prune_kernel(
    dy_ptr, values_ptr, meta_ptr, counter_ptr, row_eighths, tokens, feature_quarters, steps, groups, seed_low, seed_high, layer, step,
    feature_tiles, PURPOSE: tl.constexpr, BF16: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """groups = ceil(tokens / 4); steps = ceil(tokens / 64); values [features, 32 * steps]; feature_tiles covers the padded rows;
    COUNTED: the word at counter_ptr is added to step. Row stride and features come divided, so that the compiler knows what
    divides them and loads vectors."""
    PIECES: tl.constexpr = 4 * _STEPS  # of 16 tokens
    tile = tl.program_id(0) % feature_tiles
    step0 = tl.program_id(0) // feature_tiles * _STEPS
    piece = step0 * 4 + tl.arange(0, PIECES)
    quarter = tile * 16 + tl.arange(0, 16)  # of four features
    if COUNTED:
        step += tl.load(counter_ptr).to(tl.int32)

    row_pairs = row_eighths.to(tl.int64) * 4
    pair = tile * 32 + tl.arange(0, 32)
    pairs_ptr = dy_ptr.to(tl.pointer_type(tl.uint32)) + (piece.to(tl.int64) * 16)[:, None] * row_pairs + pair[None, :]
    within = (pair < feature_quarters * 2)[None, :]
    rows = ()
    for t in tl.static_range(16):
        rows = rows + (_load_features(pairs_ptr + t * row_pairs, within & (piece * 16 + t < tokens)[:, None]),)

    values = ()
    halves = ()
    words = ()
    for j in tl.static_range(4):
        block = quarter.to(tl.uint32)[None, :] * groups.to(tl.uint32) + (piece * 4 + j).to(tl.uint32)[:, None]
        words = words + (random_words(block, layer, step, PURPOSE, seed_low, seed_high),)
    for f in tl.static_range(4):
        half = tl.zeros((PIECES, 16), tl.int32)
        own = ()
        for j in tl.static_range(4):
            kept0, kept1, nibble = _choose(
                rows[4 * j][f // 2], rows[4 * j + 1][f // 2], rows[4 * j + 2][f // 2], rows[4 * j + 3][f // 2], words[j][f],
                f % 2 == 1, BF16,
            )  # fmt: skip
            own = own + (tl.join(kept0, kept1),)
            half += nibble << (4 * j)
        values = values + (_join4(own),)
        halves = halves + (half,)

    # [piece, quarter, place in a group 2, group 4, feature of a quarter] to [feature, place]
    every = tl.permute(tl.reshape(_join4(values), (PIECES, 16, 2, 4, 4)), (1, 4, 0, 3, 2))
    feature = tile * 64 + tl.arange(0, 64)
    place = step0 * 32 + tl.arange(0, 32 * _STEPS)
    at = feature.to(tl.int64)[:, None] * (steps * 32) + place[None, :]
    inside = (feature < feature_quarters * 4)[:, None] & (place < steps * 32)[None, :]
    tl.store(values_ptr.to(tl.pointer_type(tl.uint16)) + at, tl.reshape(every, (64, 32 * _STEPS)), mask=inside)

    # nibbles that are there: of the first groups of a piece, of real features
    real = tl.minimum(tl.maximum(groups - piece * 4, 0), 4)
    mask = tl.where((quarter < feature_quarters)[None, :], ((1 << (4 * real)) - 1)[:, None], 0)
    up = (quarter // 2 % 2 * 16)[None, :]  # features are (warp 4, row half 2, quarter of a row group 2, feature of a quarter 4)
    both = ()
    for f in tl.static_range(4):
        half = ((halves[f] & mask) | (_PADDING & ~mask)) << up
        both = both + (tl.sum(tl.reshape(half, (PIECES, 4, 2, 2)), axis=2),)
    lanes = tl.reshape(_join4(both), (_STEPS, 4, 32))
    own_step = step0 + tl.arange(0, _STEPS)
    to = (tile * steps + own_step)[:, None, None] * 128 + (tl.arange(0, 32) * 4)[None, None, :] + tl.arange(0, 4)[None, :, None]
    tl.store(meta_ptr + to, lanes, mask=(own_step < steps)[:, None, None] & (to >= 0))


PRUNE = _triton.TritonKernel(mvue_prune_kernel)


def prune(
    dy: torch.Tensor, *, seed: int, layer: int, step: int, counter: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dY^T pruned 2:4 along tokens (see mvue.py).

    Args:
        dy: [T, N] bfloat16 or float16, N divisible by 4, T > 0; rows contiguous, starting on 16-byte boundaries.
        seed, layer, step: what the noise is drawn for (63, 32, 32 bits).
        counter: int64 with one element on the device of dy, added to ``step``.

    Returns:
        values [N, 32 * ceil(T/64)] in the dtype of dy, zeros where there is no token;
        metadata, int32 of ``metadata_shape(N, T)``.
    """
    values_shape, meta_shape = _shapes(dy)
    values = torch.empty(values_shape, dtype=dy.dtype, device=dy.device)
    meta = torch.empty(meta_shape, dtype=torch.int32, device=dy.device)
    PRUNE.launch(*_launch(dy, values, meta, seed, layer, step, counter))
    return values, meta


class Pruning:
    """:func:`prune` of contiguous gradients like ``dy``, prepared (:mod:`chts_kernels.ops._library`); with or without a counter."""

    __slots__ = ("device", "launch", "meta", "values")

    def __init__(self, dy: torch.Tensor, counter: torch.Tensor | None) -> None:
        (rows, columns), (slabs, steps, threads) = _shapes(dy)
        self.values = (rows, columns), (columns, 1), dy.dtype
        self.meta = (slabs, steps, threads), (steps * threads, threads, 1), torch.int32
        self.device = dy.get_device()
        self.launch = PRUNE.prepare(*_launch(dy, empty(*self.values), empty(*self.meta), 0, 0, 0, counter))

    def __call__(
        self, dy: torch.Tensor, seed: int, layer: int, step: int, counter: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, meta = empty(*self.values), empty(*self.meta)
        launch = self.launch
        at = launch.values
        at[0], at[1], at[2], at[3] = dy.data_ptr(), values.data_ptr(), meta.data_ptr(), 0 if counter is None else counter.data_ptr()
        at[9], at[10], at[11], at[12] = seed & 0xFFFFFFFF, seed >> 32, layer, step
        launch.run(torch._C._cuda_getCurrentRawStream(self.device))
        return values, meta


def _shapes(dy: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Of the values and the metadata."""
    tokens, features = dy.shape
    slabs, steps, threads = metadata_shape(features, tokens)
    return (features, 32 * steps), (slabs, steps, threads)


def _launch(
    dy: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, seed: int, layer: int, step: int, counter: torch.Tensor | None
) -> tuple[int, tuple[Any, ...], tuple[tuple[str, Any], ...], int]:
    """The arguments of :meth:`TritonKernel.launch`."""
    tokens, features = dy.shape
    slabs, steps, _ = meta.shape
    signed = [word - (1 << 32) if word >= 1 << 31 else word for word in (seed & 0xFFFFFFFF, seed >> 32, layer, step)]
    rows = dy.stride(0) // 8 if tokens > 1 else 0
    arguments = (dy, values, meta, counter, rows, tokens, features // 4, steps, -(-tokens // 4), *signed, slabs)
    constants = (("PURPOSE", int(Purpose.MVUE)), ("BF16", dy.dtype == torch.bfloat16), ("COUNTED", counter is not None))
    return slabs * -(-steps // STEPS), arguments, constants, 4
