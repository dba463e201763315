"""The sm_90 weight gradients on the device: the exact one against float64 and cuBLAS, MVUE against its reference on the same draws."""

from __future__ import annotations

import pytest
import torch

from chts_kernels import testing, weight_grad_mvue
from chts_kernels.format import random_ids
from chts_kernels.ops.pack.reference import pack
from chts_kernels.ops.weight_grad import mvue, sm90_launch
from chts_kernels.ops.weight_grad.sm90_config import CONFIGS
from chts_kernels.ops.weight_grad.sm90_mvue import weight_grad_mvue_sm90
from chts_kernels.ops.weight_grad.sm90_schedule import works
from chts_kernels.ops.weight_grad.sm90_wgmma import weight_grad_sm90, why_not
from chts_kernels.patterns import pattern_table

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DENSE = [name for name, config in CONFIGS.items() if not config.sparse]
SPARSE = [name for name, config in CONFIGS.items() if config.sparse]
UNEQUAL = [(1536, 1152, 2048), (600, 2304, 2304)]
DRAW = {"seed": 5, "layer": 1, "step": 9}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_sm90():
    reason = why_not(torch.device("cuda"), BF16)
    if reason is not None:
        pytest.skip(reason)


def problem(tokens, rows, columns, dtype=BF16, n=2, magnitude="normal"):
    dy = testing.random_tensor((tokens, rows), dtype, magnitude=magnitude, seed=tokens, device="cuda")
    x = testing.random_tensor((tokens, columns), dtype, magnitude=magnitude, seed=tokens + 1, device="cuda")
    return dy, x, random_ids(rows, columns, n, seed=3, device="cuda")


def check(result, dy, x, ids, n, before=None):
    """No worse than twice the error of the dense product in the input's dtype."""
    exact, baseline = pack(dy.double().t() @ x.double(), ids, n), pack(dy.t() @ x, ids, n)
    if before is not None:
        exact, baseline = exact + before.double(), baseline + before
    testing.assert_no_worse_than(result, exact, baseline)


def divisions(shape, name):
    return [work for _, work in works(*shape, CONFIGS[name], sm90_launch.multiprocessors(0))]


def test_whole_and_split_tiles():
    """512 x 512 at 1024 tokens is cut along tokens; 2048 x 2048 leaves CTAs without work when it is; of the last two shapes a CTA
    gets several pieces of unequal length."""
    for shape in [(512, 512, 512), (1000, 1096, 520), (1024, 2048, 2048), *UNEQUAL]:
        dy, x, ids = problem(*shape)
        for work in divisions(shape, "128x256"):
            for out_dtype in (FP32, BF16):
                with testing.poison():
                    result = weight_grad_sm90(dy, x, ids, 2, out_dtype=out_dtype, work=work)
                check(result, dy, x, ids, 2)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(256, 128, 256), (1000, 1096, 520), (17, 64, 64), (1, 8, 8), (4097, 516, 260)], ids=str)
def test_mvue_prunes_like_the_reference(shape, dtype):
    from chts_kernels.ops.weight_grad.sm90_wgmma import aligned_rows
    from chts_kernels.ops.weight_grad.triton_mvue import prune

    dy, _, _ = problem(*shape, dtype)
    with testing.poison():
        values, meta = prune(aligned_rows(dy), **DRAW)
    expected, nibbles = mvue.prune(dy, **DRAW)
    testing.assert_bitwise_equal(values[:, : expected.shape[1]], expected)
    assert not values[:, expected.shape[1] :].any() and torch.equal(meta, mvue.metadata(nibbles))


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("n", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_mvue_product(name, n):
    for shape in [(1000, 1096, 520), (4097, 516, 512), (17, 64, 64), (8192, 512, 512), *UNEQUAL]:
        dy, x, ids = problem(*shape, n=n)
        pruned = mvue.expand(*mvue.prune(dy, **DRAW), shape[0])
        for work in divisions(shape, name):
            with testing.poison():
                result = weight_grad_mvue_sm90(dy, x, ids, n, work=work, **DRAW)
            check(result, pruned, x, ids, n)
            assert torch.equal(result, weight_grad_mvue_sm90(dy, x, ids, n, work=work, **DRAW))


def test_mvue_is_unbiased_on_the_device():
    dy, x, ids = problem(512, 64, 64)
    exact = pack(dy.double().t() @ x.double(), ids, 2)
    draws = torch.stack([weight_grad_mvue_sm90(dy, x, ids, 2, seed=1, layer=0, step=step).double() for step in range(400)])
    deviation = (draws.mean(0) - exact) / (draws.std(0) / 400**0.5)
    assert deviation.abs().max() < 5.5 and deviation.square().mean().sqrt() < 1.15


@pytest.mark.parametrize(("n", "dtype", "out_dtype"), [(2, BF16, FP32), (1, FP16, FP32), (1, BF16, BF16), (2, FP16, FP16)])
def test_mvue_op_at_odd_sizes(n, dtype, out_dtype):
    for shape in [(0, 64, 32), (1, 64, 64), (17, 16, 16), (4097, 772, 260), (64, 20, 28), (33, 4, 4), (100, 1028, 516)]:
        dy, x, ids = problem(*shape, dtype, n)
        pruned = mvue.expand(*mvue.prune(dy, **DRAW), shape[0])
        with testing.poison():
            result = weight_grad_mvue(dy, x, ids, n, **DRAW, out_dtype=out_dtype, impl="wgmma_sp")
        assert result.dtype == out_dtype
        check(result, pruned, x, ids, n)


def test_mvue_of_strided_and_special_inputs():
    dy, x = problem(300, 640, 400)[:2]
    ids = random_ids(320, 264, 2, seed=3, device="cuda")
    wide = testing.random_tensor((300, 400), BF16, seed=2, device="cuda")
    dy[::2, 8:16], dy[5, 7], dy[6, 9] = 0, float("inf"), float("nan")
    for left, right in [(dy[:, :320], wide[:, 8:272]), (dy[:, 3:323], wide[:, 1:265]), (dy.t()[:320].t(), wide[:, :264]),
                        (dy[::3, 320:], wide[::3, :264])]:  # fmt: skip
        result = weight_grad_mvue(left, right, ids, **DRAW, out_dtype=FP32)
        pruned = mvue.expand(*mvue.prune(left, **DRAW), left.shape[0])
        exact = pack(pruned.double().t() @ right.double(), ids, 2)
        assert torch.equal(result.isfinite(), exact.isfinite())
        finite = exact.isfinite()
        testing.assert_no_worse_than(result[finite], exact[finite], exact[finite].to(BF16))


def test_mvue_a_hundred_runs_are_bit_equal():
    for shape in [(4096, 512, 512), (1000, 1096, 520)]:
        dy, x, ids = problem(*shape)
        for work in divisions(shape, SPARSE[0]):
            first = weight_grad_mvue_sm90(dy, x, ids, 2, work=work, **DRAW)
            out = torch.empty_like(first)
            different = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(100):
                out.fill_(float("nan"))
                weight_grad_mvue_sm90(dy, x, ids, 2, out, work=work, **DRAW)
                different += (out != first).sum()
            assert different.item() == 0


def test_mvue_replays_of_a_graph_draw_anew():
    dy, x, ids = problem(300, 128, 256)
    counter = torch.tensor(1 << 32, device="cuda") - 2  # wraps on the way
    expected = [weight_grad_mvue(dy, x, ids, seed=5, step=step % (1 << 32)) for step in range((1 << 32) - 2, (1 << 32) + 3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weight_grad_mvue(dy, x, ids, seed=5, counter=counter)
        counter.add_(1)
    for want in expected:
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("shape", [(1, 64, 64), (17, 16, 16), (4097, 768, 768), (64, 20, 28), (33, 4, 4), (100, 1028, 516)], ids=str)
def test_odd_sizes(shape):
    dy, x, ids = problem(*shape)
    with testing.poison():
        check(weight_grad_sm90(dy, x, ids, 2), dy, x, ids, 2)


def test_no_tokens():
    dy, x, ids = problem(0, 64, 32)
    before = torch.ones(64, 16, device="cuda")
    with testing.poison():
        assert torch.equal(weight_grad_sm90(dy, x, ids, 2), torch.zeros(64, 16, device="cuda"))
    assert torch.equal(weight_grad_sm90(dy, x, ids, 2, before.clone(), True), before)


def test_strided_and_misaligned_inputs():
    wide_dy, _, ids = problem(300, 640, 264)
    wide_x = testing.random_tensor((300, 400), BF16, seed=2, device="cuda")
    for dy, x in [(wide_dy[:, :640], wide_x[:, 8:272]), (wide_dy, wide_x[:, 1:265]), (wide_dy.t().contiguous().t(), wide_x[:, :264])]:
        check(weight_grad_sm90(dy, x, ids, 2), dy, x, ids, 2)
    dy, x = wide_dy[::3], wide_x[::3, :264]
    check(weight_grad_sm90(dy, x, ids, 2), dy, x, ids, 2)


@pytest.mark.parametrize("magnitude", ["wide", "cancelling", "integer"])
def test_magnitudes(magnitude):
    dy, x, ids = problem(513, 256, 512, magnitude=magnitude)
    result = weight_grad_sm90(dy, x, ids, 2)
    check(result, dy, x, ids, 2)
    if magnitude == "integer":
        testing.assert_bitwise_equal(result, pack(dy.double().t() @ x.double(), ids, 2).float())


def test_all_patterns_at_all_positions():
    """dY = 1 gives X itself: block (i, j) has id (7 i + 13 j + shift) % 90, so every id visits every place."""
    rows, columns = 128, 256
    i, j = torch.arange(rows // 4, device="cuda")[:, None], torch.arange(columns // 4, device="cuda")[None]
    x = testing.random_tensor((rows, columns), BF16, device="cuda")
    eye = torch.eye(rows, device="cuda", dtype=BF16)
    for n in (1, 2):
        count = len(pattern_table(n))
        for shift in range(count):
            ids = ((i * 7 + j * 13 + shift) % count).to(torch.uint8)
            for out_dtype in (FP32, BF16):
                result = weight_grad_sm90(eye, x, ids, n, out_dtype=out_dtype)
                assert torch.equal(result, pack(x, ids, n).to(out_dtype)), f"n {n}, shift {shift}, {out_dtype}"


def test_not_finite_inputs_reach_their_links_only():
    dy, x, ids = problem(200, 64, 64)
    dy[5, 7], x[9, 11] = float("inf"), float("nan")
    result, exact = weight_grad_sm90(dy, x, ids, 2), pack(dy.double().t() @ x.double(), ids, 2)
    assert torch.equal(result.isfinite(), exact.isfinite()) and torch.equal(result.isnan(), exact.isnan())


@pytest.mark.parametrize("shape", [(4096, 512, 512), (1000, 1096, 520)], ids=str)
def test_a_hundred_runs_are_bit_equal(shape):
    dy, x, ids = problem(*shape)
    for work in divisions(shape, "128x256"):
        first = weight_grad_sm90(dy, x, ids, 2, work=work)
        out = torch.empty_like(first)
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(100):
            out.fill_(float("nan"))
            weight_grad_sm90(dy, x, ids, 2, out, work=work)
            different += (out != first).sum()
        assert different.item() == 0


def test_streams_and_graphs_do_not_share_counters():
    shape = (4096, 512, 512)
    dy, x, ids = problem(*shape)
    work = next(w for w in divisions(shape, "128x256") if w.split)
    expected = weight_grad_sm90(dy, x, ids, 2, work=work)
    outs = [torch.empty_like(expected) for _ in range(3)]
    side, capture, graph = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=capture):
        weight_grad_sm90(dy, x, ids, 2, outs[2], work=work)
    torch.cuda.synchronize()
    for _ in range(20):
        for out in outs:
            out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(side):
            weight_grad_sm90(dy, x, ids, 2, outs[0], work=work)
        weight_grad_sm90(dy, x, ids, 2, outs[1], work=work)
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out in outs)
    assert not sm90_launch._COUNTERS[0].arena.any()  # every kernel leaves its counters at zero


def test_a_graph_sees_new_ids_and_gradients():
    dy, x, ids = problem(512, 256, 256)
    out = weight_grad_sm90(dy, x, ids, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight_grad_sm90(dy, x, ids, 2, out)
    dy.copy_(testing.random_tensor((512, 256), BF16, seed=77, device="cuda"))
    ids.copy_(random_ids(256, 256, 2, seed=78, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    check(out, dy, x, ids, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_every_configuration(name):
    for shape in [(1000, 1096, 520), (512, 512, 512), (1024, 2048, 2048), *UNEQUAL]:
        dy, x, ids = problem(*shape)
        for work in divisions(shape, name):
            with testing.poison():
                result = weight_grad_sm90(dy, x, ids, 2, work=work)
            check(result, dy, x, ids, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "dtype", "out_dtype", "accumulate", "columns"), [
    (1, BF16, BF16, True, 520), (1, BF16, FP32, False, 516), (2, FP16, FP16, False, 520), (2, FP16, FP32, True, 520),
    (2, BF16, BF16, False, 516), (1, FP16, FP16, False, 520),
])  # fmt: skip
def test_dtypes_patterns_accumulation(n, dtype, out_dtype, accumulate, columns):
    dy, x, ids = problem(1000, 1096, columns, dtype, n)
    before = testing.random_tensor((1096, columns * n // 4), out_dtype, seed=8, device="cuda")
    for work in divisions((1000, 1096, columns), "128x256")[:2]:
        out = before.clone() if accumulate else torch.full_like(before, float("nan"))
        result = weight_grad_sm90(dy, x, ids, n, out, accumulate, work=work)
        assert result is out
        check(out, dy, x, ids, n, before if accumulate else None)
