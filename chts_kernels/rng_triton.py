"""Triton twins of :mod:`chts_kernels.rng`: the same bits and, without fused multiply-add, the same floats.

Importing this module imports Triton: do it inside a launcher. Kernels that call these functions must be launched with
``enable_fp_fusion=False``: the law of :func:`chts_kernels.rng.log_float32` is a sequence of single float32 additions and
multiplications.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import rng

REMOVE = tl.constexpr(int(rng.Purpose.REMOVE))
REGROW = tl.constexpr(int(rng.Purpose.REGROW))
ROUND = tl.constexpr(int(rng.Purpose.ROUND))
_M0, _M1 = (tl.constexpr(m) for m in rng._MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in rng._WEYL)
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8 = (tl.constexpr(c) for c in rng.LOG_COEFFICIENTS)
_LN2_HIGH, _LN2_LOW = tl.constexpr(rng.LN2_HIGH), tl.constexpr(rng.LN2_LOW)
_SQRT_HALF_BITS = tl.constexpr(rng._SQRT_HALF_BITS)


@triton.jit
def random_words(group, layer, step, purpose: tl.constexpr, key0, key1):
    """Philox-4x32-10: the four uint32 words of the four neighbouring columns ``4 group`` to ``4 group + 3``.

    ``group``: uint32 tensor; ``layer``, ``step``, ``key0``, ``key1``: scalars of any 32- or 64-bit integer type. Products
    are taken in 64 bits, which is one instruction (mul.wide) for both halves.
    """
    c0 = group
    c1 = (group & 0) + layer.to(tl.uint32)
    c2 = (group & 0) + step.to(tl.uint32)
    c3 = (group & 0) + purpose
    k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, _W0, sanitize_overflow=False)
        k1 = tl.add(k1, _W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def uniform(bits):
    """float32 in [0, 1)."""
    return (bits >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def open_uniform(bits):
    """float32 in (0, 1)."""
    return ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * (2.0**-23)


@triton.jit
def log_float32(x):
    """Natural logarithm of non-negative float32; ln 0 = -inf, ln inf = ln NaN = inf."""
    tiny = x < 2.0**-126
    scaled = tl.where(tiny, x * (2.0**24), x)
    shifted = scaled.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    exponent = ((shifted >> 23) - tl.where(tiny, 24, 0)).to(tl.float32)
    m = ((shifted & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True)
    r = m - 1.0
    square = r * r
    y = r * _C0 + _C1
    y = y * r + _C2
    y = y * r + _C3
    y = y * r + _C4
    y = y * r + _C5
    y = y * r + _C6
    y = y * r + _C7
    y = y * r + _C8
    y = y * r * square
    y = y + exponent * _LN2_LOW
    y = y - square * 0.5
    result = r + y + exponent * _LN2_HIGH
    result = tl.where(x == 0.0, float("-inf"), result)
    return tl.where(x < float("inf"), result, float("inf"))


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise ``-ln(-ln U)``."""
    return -log_float32(-log_float32(open_uniform(bits)))
