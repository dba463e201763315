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
from .. import _triton

STEPS = 2
_PADDING = tl.constexpr(PADDING_NIBBLE)


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
    c0 = rows[None, :] * groups.to(tl.uint32) + group.to(tl.uint32)[:, None]
    c1 = tl.zeros_like(c0) + layer.to(tl.uint32)
    c2 = tl.zeros_like(c0) + step.to(tl.uint32)
    c3 = tl.full(c0.shape, PURPOSE, tl.uint32)
    w0, w1, w2, w3 = tl.random.philox_impl(c0, c1, c2, c3, seed_low.to(tl.uint32), seed_high.to(tl.uint32))
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (GROUPS, 64))


@triton.jit
def _kept(y, h, bits, BF16: tl.constexpr):
    """sign(y) max(|y|, h), stochastically rounded to bfloat16 or float16; zero stays zero."""
    magnitude = tl.maximum(tl.abs(y), h, propagate_nan=tl.PropagateNan.ALL)
    sign = y.to(tl.uint32, bitcast=True) & 0x80000000
    value = tl.where(y == 0.0, y, (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True))
    if BF16:
        raised = (value.to(tl.uint32, bitcast=True) + ((bits & 0xFF) << 8) + 0x80) & 0xFFFF0000
        return tl.where(value != value, value, raised.to(tl.float32, bitcast=True)).to(tl.bfloat16)
    else:
        raised = (value.to(tl.uint32, bitcast=True) + ((bits & 0xFF) << 5) + 0x10) & 0xFFFFE000
        exempt = (value != value) | (tl.abs(value) < 0.00006103515625)  # float16's smallest normal
        return tl.where(exempt, value, raised.to(tl.float32, bitcast=True)).to(tl.float16)


@triton.jit
def mvue_prune_kernel(
    dy_ptr, values_ptr, meta_ptr, row_eighths, tokens, feature_quarters, steps, groups, seed_low, seed_high, layer, step, feature_tiles,
    PURPOSE: tl.constexpr, STEPS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """groups = ceil(tokens / 4); steps = ceil(tokens / 64); values [features, 32 * steps]; feature_tiles covers the padded rows.
    Row stride and features come divided, so that the compiler knows what divides them and loads vectors."""
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
    bits = _group_bits(feature0, group, groups, seed_low, seed_high, layer, step, PURPOSE, GROUPS)

    a0, a1, a2, a3 = tl.abs(y0), tl.abs(y1), tl.abs(y2), tl.abs(y3)
    s01 = a0 + a1
    s23 = a2 + a3
    b0 = _smaller(a0, a1 + s23)
    c2 = b0 + _smaller(a1, a0 + s23)
    b2 = _smaller(a2, a3 + s01)
    c3 = c2 + b2
    h = (c2 + (b2 + _smaller(a3, a2 + s01))) * 0.5
    low = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 * h
    high = low + h
    first = (b0 <= low).to(tl.int32) + (c2 <= low).to(tl.int32) + (c3 <= low).to(tl.int32)
    second = (b0 <= high).to(tl.int32) + (c2 <= high).to(tl.int32) + (c3 <= high).to(tl.int32)
    lone = tl.where(s01 > 0, 0, 2)
    nothing = h == 0
    first = tl.where(nothing, lone, tl.minimum(first, tl.where(first == second, 2, first)))
    second = tl.where(nothing, lone + 1, tl.maximum(second, first + 1))
    v0 = _kept(tl.where(first == 0, y0, tl.where(first == 1, y1, y2)), h, bits, BF16)
    v1 = _kept(tl.where(second == 1, y1, tl.where(second == 2, y2, y3)), h, bits, BF16)

    values = tl.reshape(tl.permute(tl.join(v0, v1), (1, 0, 2)), (64, 2 * GROUPS))
    place = step0 * 32 + tl.arange(0, 2 * GROUPS)
    at = feature.to(tl.int64)[:, None] * (steps * 32) + place[None, :]
    tl.store(values_ptr + at, values, mask=(feature < features)[:, None] & (place < steps * 32)[None, :])

    real = (feature < features)[None, :] & (group < groups)[:, None]
    nibble = tl.where(real, first | second << 2, _PADDING)
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


def prune(dy: torch.Tensor, *, seed: int, layer: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """dY^T pruned 2:4 along tokens (see mvue.py).

    Args:
        dy: [T, N] bfloat16 or float16, N divisible by 4, T > 0; rows contiguous, starting on 16-byte boundaries.
        seed, layer, step: what the noise is drawn for (63, 32, 32 bits).

    Returns:
        values [N, 32 * ceil(T/64)] in the dtype of dy, zeros where there is no token;
        metadata, int32 of ``metadata_shape(N, T)``.
    """
    tokens, features = dy.shape
    slabs, steps, threads = metadata_shape(features, tokens)
    values = torch.empty(features, 32 * steps, dtype=dy.dtype, device=dy.device)
    meta = torch.empty(slabs, steps, threads, dtype=torch.int32, device=dy.device)
    signed = [word - (1 << 32) if word >= 1 << 31 else word for word in (seed & 0xFFFFFFFF, seed >> 32, layer, step)]
    arguments = (dy, values, meta, dy.stride(0) // 8 if tokens > 1 else 0, tokens, features // 4, steps, -(-tokens // 4), *signed, slabs)
    constants = (("PURPOSE", int(Purpose.MVUE)), ("STEPS", STEPS), ("BF16", dy.dtype == torch.bfloat16))
    PRUNE.launch(slabs * -(-steps // STEPS), arguments, constants, 4)
    return values, meta
