"""MVUE: unbiased 2:4 pruning of the output gradient along tokens, so that dW = dY^T X runs on sparse tensor cores.

Law. Four tokens of one output feature form a group with magnitudes a_0..a_3. Two of them are kept, at random, and scaled so
that every element keeps its expectation. Element i is kept with probability p_i and then holds y_i / p_i, so its variance
is a_i^2 (1 / p_i - 1); the sum over the group is least, for sum p_i = 2 and p_i <= 1, when

    p_i = min(a_i, r_i) / h,    r_i = sum of the other three,    h = sum_j min(a_j, r_j) / 2

(p is proportional to the magnitude, except that one that outweighs the other three is kept for certain and they share the
second place). So a kept element simply becomes sign(y_i) max(a_i, h). Which two: with b_i = min(a_i, r_i) laid end to end
on [0, 2 h), those hit by the two points u h and u h + h, u uniform in [0, 1) (systematic sampling): no b_i exceeds h, so the
points hit two different elements, each with probability b_i / h.

Sources: Chmiel, Hubara, Banner, Soudry, "Minimum Variance Unbiased N:M Sparsity for the Neural Gradients", ICLR 2023 (the
criterion; p proportional to the magnitudes); Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024 (its use for
dW, with a sequential sampler of somewhat larger variance). Any sampler with these p has the least variance; this one
needs a single random number and no division.

Randomness: counter (block, layer, step, purpose MVUE), block = (feature // 4) * ceil(T / 4) + token group; word r of the four
serves feature 4 i + r: its upper 24 bits are u, its lower 8 round h to 16 bits stochastically, so that rounding adds no
bias either. A zero is kept, as zero, only where fewer than two others are there; or else, once in 2**22 draws, by a rounding
error, as h. All float32 arithmetic is a fixed order of single operations: the kernel (triton_mvue.py) draws the same bits.
"""

from __future__ import annotations

import torch

from ... import check
from ...layout import metadata_shape
from ...layout.metadata import PADDING_NIBBLE
from ...rng import Purpose, philox
from . import reference

GROUP = 4
WORD = 0xFFFFFFFF
LEAST = 2.0**-148
"""Added to the sum of the others: an element that stands alone then has a share, the whole of h = 2**-149, which rounds to 0."""
DTYPES = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Of dy, with the mantissa bits of float32 that each lacks."""


def probabilities(magnitudes: torch.Tensor) -> torch.Tensor:
    """The optimal inclusion probabilities of groups [..., 4], in the dtype of ``magnitudes``; they sum to 2 (to less where
    fewer than two elements are not zero)."""
    others = magnitudes.sum(-1, keepdim=True) - magnitudes
    clipped = torch.minimum(magnitudes, others)
    half = clipped.sum(-1, keepdim=True) / 2
    dominant = (half == 0) & (magnitudes > 0)
    return torch.where(dominant, 1.0, torch.where(half > 0, clipped / half, 0.0))


def group_bits(
    features: int,
    tokens: int,
    *,
    seed: int,
    layer: int,
    step: int,
    counter: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """One 32-bit word for every group: int64 [N, ceil(T/4)]."""
    check.unsigned(seed, "seed", 63)
    check.unsigned(layer, "layer", 32)
    check.unsigned(step, "step", 32)
    groups = -(-tokens // GROUP)
    block = torch.arange(features // 4 * groups, device=device) & WORD
    now = step if counter is None else (counter.reshape(()) + step) & WORD
    words = torch.stack(philox((block, layer, now, int(Purpose.MVUE)), (seed & WORD, seed >> 32)), dim=-1)
    return words.view(features // 4, groups, 4).transpose(1, 2).reshape(features, groups)


def choose_two(y: torch.Tensor, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which two elements of each group stay, and the scale.

    Args:
        y: float32 [..., 4].
        bits: int64 [...], 32 random bits each.

    Returns:
        first, second: int64 [...], first < second; h: float32 [...].
    """
    a0, a1, a2, a3 = y.abs().unbind(-1)
    s01, s23 = a0 + a1 + LEAST, a2 + a3 + LEAST
    b0, b1 = torch.minimum(a0, a1 + s23), torch.minimum(a1, a0 + s23)
    b2, b3 = torch.minimum(a2, a3 + s01), torch.minimum(a3, a2 + s01)
    c2 = b0 + b1
    c3 = c2 + b2
    h = (c2 + (b2 + b3)) * 0.5
    low = (bits >> 8).to(torch.float32) * (h * 2.0**-24)
    high = low + h
    # The upper point lies beyond b0 and the lower one before c3, and no element holds both: rounding, too, must leave it so.
    past0, past1 = b0 <= low, c2 <= low
    beyond1, beyond2 = (c2 <= high) | past0, (c3 <= high) | past1
    return past0.long() + past1.long(), 1 + beyond1.long() + beyond2.long(), h


def round_stochastically(value: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32, not negative, to values of ``dtype``: up with the probability of the dropped fraction, in steps of 1/256.

    float16's subnormals are left to the conversion, which rounds to nearest; infinity stays, NaN becomes infinity.

    Args:
        value: float32.
        bits: int64 of the same shape; the lower 8 count.

    Returns:
        float32.
    """
    dropped = DTYPES[dtype]
    if dropped == 0:
        return torch.where(value < 2.0**-148, 0.0, value)  # h of an element that stands alone
    noise = (bits & 0xFF) << (dropped - 8) | 1 << (dropped - 9)
    raised = (value.view(torch.int32).long() + noise).clamp(max=0x7F800000) & -(1 << dropped)
    rounded = raised.to(torch.int32).view(torch.float32)
    return torch.where(value < 2.0**-14, value, rounded) if dtype == torch.float16 else rounded


def prune(
    dy: torch.Tensor, *, seed: int, layer: int, step: int, counter: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dY^T pruned 2:4 along tokens.

    Args:
        dy: [T, N] bfloat16, float16 or float32, N divisible by 4.
        seed, layer, step: what the noise is drawn for (63, 32, 32 bits).
        counter: int64 with one element on the device of dy, added to ``step``; read, not changed.

    Returns:
        values [N, 2 * ceil(T/4)] in the dtype of dy: the two kept elements of every four tokens, ascending;
        nibbles uint8 [N, ceil(T/4)]: their places, first | second << 2.

    Raises:
        ValueError, TypeError: when dy does not fit.
    """
    check.floating(dy, "dy", tuple(DTYPES))
    check.require(dy.dim() == 2 and dy.shape[1] % 4 == 0, "dy", "have shape [T, N], N divisible by 4", tuple(dy.shape))
    tokens, features = dy.shape
    groups = -(-tokens // GROUP)
    y = dy.new_zeros(features, groups * GROUP, dtype=torch.float32)
    y[:, :tokens] = dy.t()
    y = y.view(features, groups, GROUP)
    bits = group_bits(features, tokens, seed=seed, layer=layer, step=step, counter=counter, device=dy.device)
    first, second, h = choose_two(y, bits)
    places = torch.stack([first, second], -1)
    kept, scale = y.gather(-1, places), round_stochastically(h, bits, dy.dtype)[..., None]
    # |y| is a value of the dtype, so that rounding h does not carry it past |y|: rounding the greater of the two is the same.
    values = torch.maximum(kept.abs(), scale).copysign(kept).to(dy.dtype)
    return values.reshape(features, groups * 2), (first | second << 2).to(torch.uint8)


def expand(values: torch.Tensor, nibbles: torch.Tensor, tokens: int) -> torch.Tensor:
    """The inverse of the compression in :func:`prune`: dense [T, N]."""
    features, groups = nibbles.shape
    places = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    dense = values.new_zeros(features, groups, GROUP)
    dense.scatter_(-1, places, values.view(features, groups, 2))
    return dense.view(features, groups * GROUP)[:, :tokens].t()


def metadata(nibbles: torch.Tensor) -> torch.Tensor:
    """Nibbles uint8 [N, groups] in the register order of wgmma.sp: int32 of ``metadata_shape(N, 4 * groups)``."""
    features, groups = nibbles.shape
    slabs, steps, threads = metadata_shape(features, groups * GROUP)
    padded = torch.full((slabs * 64, steps * 16), PADDING_NIBBLE, dtype=torch.int64, device=nibbles.device)
    padded[:features, :groups] = nibbles.long()
    halves = (padded.view(slabs * 64, steps * 4, 4) << torch.arange(0, 16, 4, device=nibbles.device)).sum(-1)
    x = halves.view(slabs, 4, 2, 8, steps, 2, 2)
    words = (x[:, :, 0] | x[:, :, 1] << 16).permute(0, 3, 1, 2, 4, 5).reshape(slabs, steps, threads)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def weight_grad_mvue(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    out_dtype: torch.dtype,
    seed: int,
    layer: int,
    step: int,
    counter: torch.Tensor | None,
) -> torch.Tensor:
    """An unbiased estimate of the weight gradient: the product with dY^T pruned by :func:`prune`, gathered at the links.

    Args and result as :func:`chts_kernels.ops.weight_grad.reference.weight_grad`, and seed, layer, step, counter of :func:`prune`.
    """
    values, nibbles = prune(dy, seed=seed, layer=layer, step=step, counter=counter)
    return reference.weight_grad(expand(values, nibbles, dy.shape[0]), x, ids, n, out_dtype)
