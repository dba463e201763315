"""The weight gradients of Ampere-class tensor cores on the device: the cases of the sm_90 ones, whose problems and tolerance they share."""

from __future__ import annotations

import pytest
import torch

from chts_kernels import testing, weight_grad, weight_grad_mvue
from chts_kernels.format import random_ids
from chts_kernels.ops.pack.reference import pack
from chts_kernels.ops.spmm.mma_config import why_illegal
from chts_kernels.ops.spmm.mma_launch import capability_of
from chts_kernels.ops.spmm.mma_sp import why_not
from chts_kernels.ops.weight_grad import mvue
from chts_kernels.ops.weight_grad.mma_schedule import CONFIGS
from chts_kernels.ops.weight_grad.mma_weight_grad import weight_grad_mma, weight_grad_mvue_mma
from chts_kernels.patterns import pattern_table
from tests.chts_kernels.test_sm90_weight_grad_gpu import BF16, DRAW, FP16, FP32, check, problem

pytestmark = pytest.mark.gpu
EXACT = [name for name, config in CONFIGS.items() if config.kind == "weight_grad"]
SPARSE = [name for name, config in CONFIGS.items() if config.kind == "mvue"]


@pytest.fixture(autouse=True)
def _needs_mma():
    reason = why_not(torch.device("cuda"), BF16)
    if reason is not None:
        pytest.skip(reason)


def config(name):
    reason = why_illegal(CONFIGS[name], capability_of(0))
    if reason is not None:
        pytest.skip(reason)
    return CONFIGS[name]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("splits", [1, 3])
def test_every_configuration_whole_and_cut(name, splits):
    for shape in [(512, 512, 512), (1000, 1096, 520), (33, 4, 4)]:
        dy, x, ids = problem(*shape)
        for out_dtype in (FP32, BF16):
            with testing.poison():
                result = weight_grad_mma(dy, x, ids, 2, out_dtype=out_dtype, work=(config(name), splits))
            check(result, dy, x, ids, 2)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("splits", [1, 3])
def test_every_mvue_configuration_whole_and_cut(name, splits):
    for shape in [(1000, 1096, 520), (517, 516, 512), (17, 64, 64)]:
        dy, x, ids = problem(*shape)
        pruned = mvue.expand(*mvue.prune(dy, **DRAW), shape[0])
        with testing.poison():
            result = weight_grad_mvue_mma(dy, x, ids, 2, work=(config(name), splits), **DRAW)
        check(result, pruned, x, ids, 2)


@pytest.mark.parametrize(("n", "dtype", "out_dtype"), [(2, BF16, FP32), (1, FP16, FP32), (1, BF16, BF16), (2, FP16, FP16)])
def test_odd_sizes_through_the_ops(n, dtype, out_dtype):
    for shape in [(0, 64, 32), (1, 64, 64), (17, 16, 16), (4097, 772, 260), (64, 20, 28), (33, 4, 4), (100, 1028, 516)]:
        dy, x, ids = problem(*shape, dtype, n)
        with testing.poison():
            exact = weight_grad(dy, x, ids, n, out_dtype=out_dtype, impl="mma_sp")
            estimate = weight_grad_mvue(dy, x, ids, n, **DRAW, out_dtype=out_dtype, impl="mma_sp")
        assert exact.dtype == estimate.dtype == out_dtype
        check(exact, dy, x, ids, n)
        check(estimate, mvue.expand(*mvue.prune(dy, **DRAW), shape[0]), x, ids, n)


@pytest.mark.parametrize(("n", "dtype", "out_dtype"), [(1, BF16, BF16), (2, FP16, FP32), (2, BF16, BF16), (1, FP16, FP32)])
@pytest.mark.parametrize("splits", [1, 4])
def test_accumulation(n, dtype, out_dtype, splits):
    dy, x, ids = problem(1000, 1096, 520, dtype, n)
    before = testing.random_tensor((1096, 520 * n // 4), out_dtype, seed=8, device="cuda")
    out = before.clone()
    assert weight_grad_mma(dy, x, ids, n, out, True, work=(config(EXACT[0]), splits)) is out
    check(out, dy, x, ids, n, before)
    pruned = mvue.expand(*mvue.prune(dy, **DRAW), 1000)
    out = before.clone()
    check(weight_grad_mvue_mma(dy, x, ids, n, out, True, work=(config(SPARSE[0]), splits), **DRAW), pruned, x, ids, n, before)


def test_no_tokens():
    dy, x, ids = problem(0, 64, 32)
    before = torch.ones(64, 16, device="cuda")
    with testing.poison():
        assert torch.equal(weight_grad_mma(dy, x, ids, 2), torch.zeros(64, 16, device="cuda"))
    assert torch.equal(weight_grad_mma(dy, x, ids, 2, before.clone(), True), before)


def test_strided_and_misaligned_inputs():
    wide_dy, _, ids = problem(300, 640, 264)
    wide_x = testing.random_tensor((300, 400), BF16, seed=2, device="cuda")
    for dy, x in [(wide_dy, wide_x[:, 8:272]), (wide_dy, wide_x[:, 1:265]), (wide_dy.t().contiguous().t(), wide_x[:, :264]),
                  (wide_dy[::3], wide_x[::3, :264])]:  # fmt: skip
        check(weight_grad_mma(dy, x, ids, 2), dy, x, ids, 2)


@pytest.mark.parametrize("magnitude", ["wide", "cancelling", "integer"])
def test_magnitudes(magnitude):
    dy, x, ids = problem(513, 256, 512, magnitude=magnitude)
    result = weight_grad_mma(dy, x, ids, 2)
    check(result, dy, x, ids, 2)
    if magnitude == "integer":
        testing.assert_bitwise_equal(result, pack(dy.double().t() @ x.double(), ids, 2).float())


def test_all_patterns_at_all_positions():
    """dY = 1 gives X itself: block (i, j) has id (7 i + 13 j + shift) % count, so every id visits every place."""
    rows, columns = 256, 256
    i, j = torch.arange(rows // 4, device="cuda")[:, None], torch.arange(columns // 4, device="cuda")[None]
    x = testing.random_tensor((rows, columns), BF16, device="cuda")
    eye = torch.eye(rows, device="cuda", dtype=BF16)
    for n in (1, 2):
        count = len(pattern_table(n))
        for shift in range(count):
            ids = ((i * 7 + j * 13 + shift) % count).to(torch.uint8)
            for out_dtype in (FP32, BF16):
                result = weight_grad_mma(eye, x, ids, n, out_dtype=out_dtype, work=(config(EXACT[0]), 1))
                assert torch.equal(result, pack(x, ids, n).to(out_dtype)), f"n {n}, shift {shift}, {out_dtype}"


def test_not_finite_inputs_reach_their_links_only():
    dy, x, ids = problem(200, 64, 64)
    dy[5, 7], x[9, 11] = float("inf"), float("nan")
    result, exact = weight_grad_mma(dy, x, ids, 2), pack(dy.double().t() @ x.double(), ids, 2)
    assert torch.equal(result.isfinite(), exact.isfinite()) and torch.equal(result.isnan(), exact.isnan())


@pytest.mark.parametrize("splits", [1, 8])
def test_a_hundred_runs_are_bit_equal(splits):
    dy, x, ids = problem(4096, 512, 520)
    work, sparse_work = (config(EXACT[0]), splits), (config(SPARSE[0]), splits)
    first = weight_grad_mma(dy, x, ids, 2, work=work), weight_grad_mvue_mma(dy, x, ids, 2, work=sparse_work, **DRAW)
    outs = [torch.empty_like(t) for t in first]
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        for out in outs:
            out.fill_(float("nan"))
        weight_grad_mma(dy, x, ids, 2, outs[0], work=work)
        weight_grad_mvue_mma(dy, x, ids, 2, outs[1], work=sparse_work, **DRAW)
        different += sum((out != f).sum() for out, f in zip(outs, first, strict=True))
    assert different.item() == 0


def test_a_graph_sees_new_ids_and_gradients():
    dy, x, ids = problem(4096, 256, 256)
    out = weight_grad_mma(dy, x, ids, 2, work=(config(EXACT[0]), 4))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight_grad_mma(dy, x, ids, 2, out, work=(config(EXACT[0]), 4))
    dy.copy_(testing.random_tensor((4096, 256), BF16, seed=77, device="cuda"))
    ids.copy_(random_ids(256, 256, 2, seed=78, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    check(out, dy, x, ids, 2)
