"""MVUE pruning of dY^T in Triton: the law and the random numbers of mvue.py, bit for bit, in one pass.

A program takes 64 output features and STEPS * 64 tokens of dY [T, N], chooses two of every four tokens of each feature, and writes
the compressed transpose and its metadata in the register order of ``wgmma.sp`` (:mod:`chts_kernels.layout.metadata`).

Traffic: 2 bytes read and 1.25 written per element of dY. One Philox call serves four groups of four.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...layout import metadata_shape
from ...layout.metadata import PADDING_NIBBLE
from ...rng import Purpose
from ...rng_triton import random_words
from .. import _triton
from .mvue import LEAST

STEPS = 1
_PADDING = tl.constexpr(PADDING_NIBBLE)
_LEAST = tl.constexpr(LEAST)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_tokens(dy_ptr, row_stride, token, feature, tokens, features):
    """float32 [groups, 64] of one token of each group."""
    inside = (token < tokens)[:, None] & (feature < features)[None, :]
    return tl.load(dy_ptr + token.to(tl.int64)[:, None] * row_stride + feature[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _group_bits(feature0, group, groups, seed_low, seed_high, layer, step, PURPOSE: tl.constexpr, GROUPS: tl.constexpr):
    """uint32 [GROUPS, 64]: word r of block (feature // 4, group) for feature 4 i + r."""
    rows = (feature0 // 4 + tl.arange(0, 16)).to(tl.uint32)
    block = rows[None, :] * groups.to(tl.uint32) + group.to(tl.uint32)[:, None]
    w0, w1, w2, w3 = random_words(block, layer, step, PURPOSE, seed_low, seed_high)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (GROUPS, 64))


@triton.jit
def _rounded(h, bits, BF16: tl.constexpr):
    """h stochastically rounded to bfloat16 or float16, as float32."""
    word = h.to(tl.uint32, bitcast=True)
    if BF16:
        raised = tl.minimum(word + (((bits & 0xFF) << 8) | 0x80), 0x7F800000) & 0xFFFF0000
        return raised.to(tl.float32, bitcast=True)
    else:
        raised = tl.minimum(word + (((bits & 0xFF) << 5) | 0x10), 0x7F800000) & 0xFFFFE000
        return tl.where(word < 0x38800000, h, raised.to(tl.float32, bitcast=True))  # below float16's smallest normal


@triton.jit
def _kept(y, h, dtype: tl.constexpr):
    """sign(y) max(|y|, h)"""
    magnitude = tl.maximum(tl.abs(y), h, propagate_nan=tl.PropagateNan.ALL).to(tl.uint32, bitcast=True)
    return ((y.to(tl.uint32, bitcast=True) & 0x80000000) | magnitude).to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def mvue_prune_kernel(
    dy_ptr, values_ptr, meta_ptr, counter_ptr, row_eighths, tokens, feature_quarters, steps, groups, seed_low, seed_high, layer, step,
    feature_tiles, PURPOSE: tl.constexpr, STEPS: tl.constexpr, BF16: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """groups = ceil(tokens / 4); steps = ceil(tokens / 64); values [features, 32 * steps]; feature_tiles covers the padded rows;
    COUNTED: the word at counter_ptr is added to step. Row stride and features come divided, so that the compiler knows what
    divides them and loads vectors."""
    row_stride = row_eighths.to(tl.int64) * 8
    features = feature_quarters * 4
    GROUPS: tl.constexpr = STEPS * 16
    feature0 = tl.program_id(0) % feature_tiles * 64
    step0 = tl.program_id(0) // feature_tiles * STEPS
    feature = feature0 + tl.arange(0, 64)
    group = step0 * 16 + tl.arange(0, GROUPS)
    y0 = _load_tokens(dy_ptr, row_stride, 4 * group, feature, tokens, features)
    y1 = _load_tokens(dy_ptr, row_stride, 4 * group + 1, feature, tokens, features)
    y2 = _load_tokens(dy_ptr, row_stride, 4 * group + 2, feature, tokens, features)
    y3 = _load_tokens(dy_ptr, row_stride, 4 * group + 3, feature, tokens, features)
    if COUNTED:
        step += tl.load(counter_ptr).to(tl.int32)
    bits = _group_bits(feature0, group, groups, seed_low, seed_high, layer, step, PURPOSE, GROUPS)

    a0, a1, a2, a3 = tl.abs(y0), tl.abs(y1), tl.abs(y2), tl.abs(y3)
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
    scale = _rounded(h, bits, BF16)
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    v0 = _kept(tl.where(past1, y2, tl.where(past0, y1, y0)), scale, dtype)
    v1 = _kept(tl.where(beyond2, y3, tl.where(beyond1, y2, y1)), scale, dtype)

    values = tl.reshape(tl.permute(tl.join(v0, v1), (1, 0, 2)), (64, 2 * GROUPS))
    place = step0 * 32 + tl.arange(0, 2 * GROUPS)
    at = feature.to(tl.int64)[:, None] * (steps * 32) + place[None, :]
    tl.store(values_ptr + at, values, mask=(feature < features)[:, None] & (place < steps * 32)[None, :])

    real = (feature < features)[None, :] & (group < groups)[:, None]
    pair = past0.to(tl.int32) + past1.to(tl.int32) + tl.where(beyond1, 8, 4) + tl.where(beyond2, 4, 0)
    nibble = tl.where(real, pair, _PADDING)
    quarter = tl.arange(0, 4)
    half = tl.sum(tl.reshape(nibble, (GROUPS // 4, 4, 64)) << (4 * quarter)[None, :, None], axis=1)
    # features are (warp 4, row half 2, g 8); 16-token pieces are (step, q 4)
    both = tl.reshape(half, (GROUPS // 4, 4, 2, 8)) << (16 * tl.arange(0, 2))[None, None, :, None]
    words = tl.reshape(tl.sum(both, axis=2), (STEPS, 4, 32))
    own_step = step0 + tl.arange(0, STEPS)
    lane = tl.arange(0, 32)
    to = (feature0 // 64 * steps + own_step)[:, None, None] * 128 + (lane * 4)[None, None, :] + quarter[None, :, None]
    tl.store(meta_ptr + to, words, mask=((own_step < steps)[:, None, None] & (lane >= 0)[None, None, :]) & (quarter >= 0)[None, :, None])


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
    tokens, features = dy.shape
    slabs, steps, threads = metadata_shape(features, tokens)
    values = torch.empty(features, 32 * steps, dtype=dy.dtype, device=dy.device)
    meta = torch.empty(slabs, steps, threads, dtype=torch.int32, device=dy.device)
    signed = [word - (1 << 32) if word >= 1 << 31 else word for word in (seed & 0xFFFFFFFF, seed >> 32, layer, step)]
    rows = dy.stride(0) // 8 if tokens > 1 else 0
    arguments = (dy, values, meta, counter, rows, tokens, features // 4, steps, -(-tokens // 4), *signed, slabs)
    constants = (("PURPOSE", int(Purpose.MVUE)), ("STEPS", STEPS), ("BF16", dy.dtype == torch.bfloat16))
    PRUNE.launch(slabs * -(-steps // STEPS), arguments, (*constants, ("COUNTED", counter is not None)), 4)
    return values, meta
