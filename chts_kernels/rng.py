"""Counter-based noise: Philox-4x32-10 keyed by a seed and indexed by matrix element, never by tile, launch or device.

The counter is ``(group, layer, step, purpose)`` and the key ``(seed & 0xffffffff, seed >> 32)``. Four neighbouring
columns of a row form a group, ``group = (row * K + column) // 4``; the four output words belong to its four columns. So
the noise of an element depends on (seed, layer, step, purpose, row, column, K) alone: a run replays from its seed and
every rank of a data-parallel job draws the same bits without communication.

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Everything after the bits is
float32 arithmetic in a fixed order of single additions and multiplications (:func:`log_float32`), so that a kernel
compiled without fused multiply-add draws the same floats.
"""

from __future__ import annotations

import enum

import torch

from . import check

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
_ROUNDS = 10


class Purpose(enum.IntEnum):
    """Last counter word: what the noise is drawn for. Values are part of the replay contract: never renumber."""

    REMOVE = 0
    REGROW = 1
    INIT = 2
    MVUE = 3
    ROUND = 4


def philox(counter: tuple[torch.Tensor | int, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox-4x32-10.

    Args:
        counter: four 32-bit words, each an int64 tensor or an int; they broadcast against each other.
        key: two 32-bit words.

    Returns:
        Four int64 tensors holding values in [0, 2**32).
    """
    # Ints stay ints until they meet a tensor: a tensor made from one would have the host wait for the device.
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # mod 2**64: the wrap of int64 keeps all the bits
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, p1 & _MASK32, ((p0 >> 32) & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return tuple(torch.as_tensor(c) for c in (c0, c1, c2, c3))


def random_bits(
    rows: int, columns: int, *, seed: int, layer: int, step: int, purpose: Purpose, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """32 random bits for every element of a [rows, columns] matrix, as int64 in [0, 2**32).

    Raises:
        ValueError: when ``columns`` is not a multiple of 4, ``seed`` (63 bits: operator schemas hold signed integers),
            ``layer`` or ``step`` (32 bits) is out of range, or the matrix has more than 2**34 elements.
    """
    check.require(columns % 4 == 0, "columns", "be a multiple of 4", columns)
    check.require(rows * columns <= 1 << 34, "rows * columns", "be at most 2**34", rows * columns)
    check.unsigned(seed, "seed", 63)
    check.unsigned(layer, "layer", 32)
    check.unsigned(step, "step", 32)
    group = torch.arange(rows * columns // 4, device=device)
    words = philox((group, layer, step, int(purpose)), (seed & _MASK32, seed >> 32))
    return torch.stack(words, dim=-1).view(rows, columns)


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1) with 24 random bits: ``(bits >> 8) * 2**-24``, exact."""
    return (bits >> 8).to(torch.float32) * 2.0**-24


def open_uniform(bits: torch.Tensor) -> torch.Tensor:
    """float32 in (0, 1), symmetric about 1/2, with 23 random bits: ``((bits >> 9) + 1/2) * 2**-23``, exact."""
    return ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23


# Minimax polynomial of (ln(1 + r) - r + r**2 / 2) / r**3 on [sqrt(1/2) - 1, sqrt(2) - 1], highest power first, and ln 2
# split so that exponent * LN2_HIGH is exact (S. Moshier's Cephes library, logf).
LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
_SQRT_HALF_BITS = 0x3F3504F3  # the float32 just under sqrt(1/2)


def log_float32(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of float32 ``x`` within 2 ulp, bit-reproducible on every device.

    ``x < 0`` is not allowed. ln 0 = -inf, ln inf = inf, ln NaN = inf (a diverged weight must rank as the largest so that
    it stays visible, rather than be removed quietly).
    """
    tiny = x < 2.0**-126
    scaled = torch.where(tiny, x * 2.0**24, x)
    bits = scaled.view(torch.int32)
    # x = 2**exponent * m with m in [sqrt(1/2), sqrt(2)): moving the split point to sqrt(1/2) by integer arithmetic.
    shifted = bits - _SQRT_HALF_BITS
    exponent = ((shifted >> 23) - 24 * tiny).to(torch.float32)
    m = ((shifted & 0x7FFFFF) + _SQRT_HALF_BITS).view(torch.float32)
    r = m - 1.0
    square = r * r
    y = torch.full_like(r, LOG_COEFFICIENTS[0])
    for coefficient in LOG_COEFFICIENTS[1:]:
        y = y * r + coefficient
    y = y * r * square
    y = y + exponent * LN2_LOW
    y = y - square * 0.5
    result = r + y + exponent * LN2_HIGH
    result = torch.where(x == 0, -torch.inf, result)
    return torch.where(x < torch.inf, result, torch.inf)


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise ``G = -ln(-ln U)`` in float32. ``exp(G / T) = (-ln U)**(-1/T)`` is Frechet noise of shape T."""
    return -log_float32(-log_float32(open_uniform(bits)))
