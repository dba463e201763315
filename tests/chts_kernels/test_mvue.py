"""The MVUE estimator against its law: unbiased, the least variance, exactly two of four; and its Triton twin, bit for bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from chts_kernels.format import random_ids
from chts_kernels.layout import metadata_from_ids
from chts_kernels.ops import _triton
from chts_kernels.ops.pack.reference import pack
from chts_kernels.ops.weight_grad import mvue

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INTERPRETED = _triton.interpreting()
DRAW = {"seed": (1 << 62) + (1 << 31) + 12345, "layer": 7, "step": 3}


def gradient(tokens, features, dtype=FP32, seed=0):
    """Heavy tails and zeros: groups with one dominant element, with one element (in every place), with none."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(tokens, features, generator=generator) * torch.randn(tokens, features, generator=generator).exp()
    y[torch.rand(tokens, features, generator=generator) < 0.15] = 0
    y[: tokens // 4, 0] = 0
    y[0:1, 1], y[1:4, 1] = 2, 0
    for place in range(4):  # alone in its group
        y[4:8, place] = 0
        y[4 + place : 5 + place, place] = -3
    return y.to(dtype)


@pytest.mark.parametrize("shape", [(64, 8), (17, 4), (1, 12), (130, 72)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_two_of_every_four_tokens_stay(shape, dtype):
    dy = gradient(*shape, dtype)
    values, nibbles = mvue.prune(dy, **DRAW)
    assert values.dtype == dtype and values.shape == (shape[1], 2 * nibbles.shape[1])
    assert ((nibbles & 3) < (nibbles >> 2)).all()
    dense = mvue.expand(values, nibbles, shape[0])
    assert (dense.sign() * (dense != 0) == dy.sign() * (dense != 0)).all()  # signs stay, zeros stay zero
    assert dense.shape == dy.shape and dense.isfinite().all()


def test_probabilities_are_optimal():
    """They sum to 2, none exceeds 1, and no other choice of four probabilities has less variance."""
    magnitudes = gradient(400, 4, torch.float64).abs().t().reshape(-1, 4)
    p = mvue.probabilities(magnitudes)
    nonzero = (magnitudes > 0).sum(-1)
    torch.testing.assert_close(p.sum(-1), nonzero.clamp(max=2).double())
    assert (p <= 1).all() and ((p > 0) == (magnitudes > 0)).all()
    full = magnitudes[nonzero == 4]
    best = (full**2 / p[nonzero == 4]).sum(-1)
    for seed in range(200):  # perturbed inside the feasible set
        generator = torch.Generator().manual_seed(seed)
        other = (p[nonzero == 4] * torch.rand(full.shape, generator=generator, dtype=torch.float64).mul(0.6).add(0.7)).clamp(max=1)
        other = other * (2 / other.sum(-1, keepdim=True))
        feasible = (other <= 1).all(-1)
        assert ((full**2 / other).sum(-1) >= best - 1e-9 * best)[feasible].all()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_unbiased_with_the_least_variance(dtype):
    """Mean and variance over 3000 draws against the law, rounding to 16 bits included."""
    draws = 3000
    dy = gradient(32, 8, dtype)
    y = dy.double()
    total, squares = torch.zeros_like(y), torch.zeros_like(y)
    for step in range(draws):
        estimate = mvue.expand(*mvue.prune(dy, seed=1, layer=0, step=step), 32).double()
        total += estimate
        squares += (estimate - y) ** 2
    p = mvue.probabilities(y.abs().t().reshape(8, 8, 4)).reshape(8, 32).t()
    variance = torch.where(y == 0, 0.0, y**2 * (1 / p.clamp(min=1e-9) - 1))
    deviation = (total / draws - y) / ((variance + (y * 2**-9) ** 2) / draws).sqrt().clamp(min=1e-12)
    often = p * draws > 20  # elements kept often enough for a normal approximation
    assert deviation[often & (y != 0)].abs().max() < 5
    assert (squares.sum() / draws / variance.sum() - 1).abs() < 0.03
    certain = (p == 1) & (y != 0)
    assert certain.any() and (squares[certain] == 0).all()  # kept for certain means kept exactly


def test_weight_gradient_is_unbiased():
    dy, x, ids = gradient(64, 16, BF16), torch.randn(64, 32).to(BF16), random_ids(16, 32, 2, seed=0)
    exact = pack(dy.double().t() @ x.double(), ids, 2)
    draws = torch.stack([mvue.weight_grad_mvue(dy, x, ids, 2, FP32, 3, 0, step, None).double() for step in range(600)])
    deviation = (draws.mean(0) - exact) / (draws.std(0) / 600**0.5)
    assert deviation.abs().max() < 5 and deviation.square().mean().sqrt() < 1.2


def test_draws_depend_on_every_word_and_not_on_the_number_of_features():
    dy = gradient(64, 16, BF16)
    first = mvue.prune(dy, **DRAW)
    for changed in ({"seed": 1}, {"layer": 8}, {"step": 4}):
        assert not torch.equal(mvue.prune(dy, **(DRAW | changed))[1], first[1])
    again, fewer = mvue.prune(dy, **DRAW), mvue.prune(dy[:, :8].contiguous(), **DRAW)
    assert torch.equal(again[0], first[0]) and torch.equal(fewer[1], first[1][:8])


def test_rounding_is_unbiased_and_keeps_what_fits():
    value = torch.tensor([1.0, 1.0 + 2**-9, 3.14159, 1e-30, 6e4, 2**-20]).repeat_interleave(256)
    bits = torch.arange(256).repeat(6)
    for dtype in (BF16, FP16):
        rounded = mvue.round_stochastically(value, bits, dtype).to(dtype).double().view(6, 256).mean(1)
        exact = value.double().view(6, 256)[:, 0]
        step = exact.abs() * torch.finfo(dtype).eps / 256
        assert ((rounded - exact).abs() <= step + (2**-25 if dtype == FP16 else 0)).all()
    special = torch.tensor([float("nan"), float("inf"), 3.4e38, 0.0, 2.0**-149])
    for dtype in (BF16, FP16):
        kept = mvue.round_stochastically(special, torch.full((5,), 255), dtype).to(dtype)
        assert kept[:3].isinf().all() and not kept[3:].any()


def test_not_finite_gradients_stay_visible():
    dy = gradient(16, 8, BF16)
    dy[2, 3], dy[9, 5] = float("nan"), float("inf")
    dense = mvue.expand(*mvue.prune(dy, **DRAW), 16)
    assert not dense[0:4, 3].isfinite().all() and dense[8:12, 5].isinf().any()
    dy[0:2, 3] = dy[8, 5] = dy[10:12, 5] = 0  # also beside zeros, which are kept with them
    dense = mvue.expand(*mvue.prune(dy, **DRAW), 16)
    assert not dense[0:4, 3].isfinite().all() and dense[8:12, 5].isinf().any()


def test_metadata_is_in_register_order():
    """A weight whose patterns are its ids has the same nibbles whichever way they are made."""
    ids = random_ids(72, 132, 2, seed=4)
    from chts_kernels.patterns import pattern_table

    meta16 = pattern_table(2).tensor("meta16")[ids.long()]
    nibbles = (meta16[:, None, :] >> torch.arange(0, 16, 4)[None, :, None] & 15).flatten(0, 1).to(torch.uint8)
    assert torch.equal(mvue.metadata(nibbles), metadata_from_ids(ids, 2))


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="dy"):
        mvue.prune(torch.zeros(4, 4, dtype=torch.int32), **DRAW)
    with pytest.raises(ValueError, match="N divisible by 4"):
        mvue.prune(torch.zeros(4, 6), **DRAW)
    with pytest.raises(ValueError, match="seed"):
        mvue.prune(torch.zeros(4, 4), seed=-1, layer=0, step=0)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreting process")
def test_triton_twin_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_twin_on_the_cpu"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("bf16", [True, False])
def test_twin_compiles_to_vectors_without_spills(bf16, capability):
    pytest.importorskip("triton")
    from chts_kernels.gluon_compat import ptxas_log
    from chts_kernels.ops.weight_grad import triton_mvue

    kind = "*bf16" if bf16 else "*fp16"
    constants = (("PURPOSE", 3), ("BF16", bf16), ("COUNTED", True))
    compiled = triton_mvue.PRUNE.compile((kind, kind, "*i32", "*i64", *["i32"] * 10), constants, 4, capability)
    ptx = compiled.asm["ptx"]
    log = ptxas_log(ptx, re.search(r"\.target (sm_\w+)", ptx).group(1))
    assert re.findall(r"(\d+) bytes spill", log) == ["0", "0"], log
    assert compiled.metadata.shared <= 8192  # the values on their way, and nothing else of size
    # a thread reads four features of 16 tokens; what it writes are 16 bytes each; Philox draws once for four groups
    assert len(re.findall(r"ld\.global\S*\.v2\.b32", ptx)) == 16 and len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == 4
    assert len(re.findall(r"mul\.wide\.u32", ptx)) <= 4 * 20 + 8 and "fma" not in ptx


@pytest.mark.skipif(not INTERPRETED, reason="runs under TRITON_INTERPRET=1")
@pytest.mark.parametrize("shape", [(64, 8), (130, 72), (17, 8)], ids=str)
def test_twin_on_the_cpu(shape):
    from chts_kernels.ops.weight_grad import triton_mvue

    dy = gradient(*shape, FP16)
    values, meta = triton_mvue.prune(dy, **DRAW)
    expected, nibbles = mvue.prune(dy, **DRAW)
    assert torch.equal(values[:, : expected.shape[1]].view(torch.int16), expected.view(torch.int16))
    assert not values[:, expected.shape[1] :].any()
    assert torch.equal(meta, mvue.metadata(nibbles))
