"""The sparse products of sm_90 and of Ampere-class tensor cores on the device, against dense products in float64 and torch's own
low-precision ones."""

from __future__ import annotations

import functools
import threading

import pytest
import torch

from chts_kernels import cuda_driver, testing
from chts_kernels.format import SparseWeight
from chts_kernels.ops.spmm import mma_config, mma_launch, sm90_wgmma_sp
from chts_kernels.ops.spmm.mma_sp import spmm_mma
from chts_kernels.ops.spmm.mma_sp import why_not as why_not_mma
from chts_kernels.ops.spmm.sm90_config import CONFIGS
from chts_kernels.ops.spmm.sm90_wgmma_sp import spmm_sm90, why_not
from chts_kernels.patterns import pattern_table

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


PRODUCTS = {"wgmma_sp": (spmm_sm90, why_not), "mma_sp": (spmm_mma, why_not_mma)}


def skip_without(impl):
    reason = PRODUCTS[impl][1](torch.device("cuda"), BF16)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=PRODUCTS)
def product(request):
    """The entry point of one family of kernels."""
    skip_without(request.param)
    return PRODUCTS[request.param][0]


def configured(impl, name):
    """The entry point with the configuration `name` of a family."""
    skip_without(impl)
    config = (CONFIGS if impl == "wgmma_sp" else mma_config.CONFIGS)[name]
    if impl == "mma_sp" and (reason := mma_config.why_illegal(config, mma_launch.capability_of(0))):
        pytest.skip(reason)
    return functools.partial(PRODUCTS[impl][0], config=config)


pytestmark = pytest.mark.gpu


def problem(tokens, rows, columns, dtype=BF16, *, n=2, magnitude="normal", seed=0):
    """x, dense W, and the forward and transposed operands."""
    weight = testing.random_weight(rows, columns, n, dtype, magnitude=magnitude, seed=seed, device="cuda")
    x = testing.random_tensor((tokens, columns), dtype, magnitude=magnitude, seed=seed + 2, device="cuda")
    return x, weight, weight.to_dense(), weight.operands(dtype)


def check(y, x, dense, bias=None):
    exact = x.double() @ dense.double().t() + (0 if bias is None else bias.double())
    baseline = torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    testing.assert_no_worse_than(y, exact, baseline)


# Every combination compiles a kernel of its own: all configurations run in bf16, one of each kind in all dtypes.
KINDS = [("wgmma_sp", name) for name in ("128x256", "256x192", "256x192c2", "64x64")]
KINDS += [("mma_sp", name) for name in ("256x128", "64x64")]
EVERY = [*(("wgmma_sp", name) for name in CONFIGS), *(("mma_sp", name) for name in mma_config.CONFIGS)]


@pytest.mark.parametrize(("impl", "name", "dtype"), [*((*c, BF16) for c in EVERY), *((*c, FP16) for c in KINDS)], ids=str)
def test_identity_returns_the_weight_bit_for_bit(impl, name, dtype):
    product = configured(impl, name)
    _, weight, dense, op = problem(1, 272, 720, dtype)
    eye = torch.eye(720, device="cuda", dtype=dtype)
    with testing.poison():
        y = product(eye, op.values, op.meta, 272)
        back = product(torch.eye(272, device="cuda", dtype=dtype), op.values_t, op.meta_t, 720)
    testing.assert_bitwise_equal(y.t() + 0.0, dense + 0.0)     # -0 times 1 plus +0 is +0
    testing.assert_bitwise_equal(back + 0.0, dense + 0.0)


def test_all_patterns_at_all_positions(product):
    """Block (i, j) has id (i * 7 + j * 13 + shift) % 90: over 90 shifts every id visits every place of a 64 x 64 slab."""
    rows, columns = 256, 192
    i, j = torch.arange(rows // 4, device="cuda")[:, None], torch.arange(columns // 4, device="cuda")[None]
    eye = torch.eye(columns, device="cuda", dtype=BF16)
    values = torch.arange(1, rows * columns // 2 + 1, device="cuda").remainder(255).add(1).view(rows, columns // 2).to(BF16)
    for shift in range(len(pattern_table(2))):
        weight = SparseWeight(((i * 7 + j * 13 + shift) % 90).to(torch.uint8), values, 2)
        op = weight.operands(BF16)
        assert torch.equal(product(eye, op.values, op.meta, rows).t(), weight.to_dense()), f"shift {shift}"


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 64), (17, 16, 16), (4097, 768, 768), (1000, 1096, 512), (513, 528, 1376), (64, 20, 28),
                                   (33, 4, 4), (100, 1028, 516), (256, 4096, 4096)], ids=str)
def test_products_and_their_transposes(product, shape, dtype, n):
    tokens, rows, columns = shape
    x, _, dense, op = problem(*shape, dtype, n=n)
    with testing.poison():
        check(product(x, op.values, op.meta, rows), x, dense)
        dy = testing.random_tensor((tokens, rows), dtype, seed=9, device="cuda")
        check(product(dy, op.values_t, op.meta_t, columns), dy, dense.t())


@pytest.mark.parametrize(("impl", "name"), EVERY)
@pytest.mark.parametrize("shape", [(1, 64, 64), (700, 1100, 396), (777, 1024, 4096), (3000, 2000, 208)], ids=str)
def test_every_configuration(impl, name, shape):
    product = configured(impl, name)
    x, _, dense, op = problem(*shape)
    with testing.poison():
        check(product(x, op.values, op.meta, shape[1]), x, dense)


@pytest.mark.parametrize(("impl", "name"), KINDS)
@pytest.mark.parametrize(("dtype", "bias_dtype"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)], ids=str)
def test_bias(impl, name, dtype, bias_dtype):
    product = configured(impl, name)
    x, _, dense, op = problem(515, 524, 400, dtype)
    bias = testing.random_tensor((524,), bias_dtype, seed=5, device="cuda")
    check(product(x, op.values, op.meta, 524, bias), x, dense, bias)


def test_no_tokens_and_leading_dimensions(product):
    x, _, dense, op = problem(24, 96, 128)
    assert product(x[:0], op.values, op.meta, 96).shape == (0, 96)
    assert product(x.view(2, 3, 4, 128), op.values, op.meta, 96).shape == (2, 3, 4, 96)
    check(product(x.view(2, 3, 4, 128), op.values, op.meta, 96).view(24, 96), x, dense)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],                                                   # every second row
        lambda x: x.t().contiguous().t(),                                   # column-major
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],                    # wide rows
        lambda x: torch.cat([x[:, :3], x], 1)[:, 3:],                       # rows off the 16-byte grid
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),  # a pointer off the grid
        lambda x: x[:1].expand(40, -1),                                     # stride 0
        lambda x: x[5:6],
    ],
)
def test_strided_inputs(product, view):
    x, _, dense, op = problem(200, 272, 208)
    x = view(x)
    check(product(x, op.values, op.meta, 272), x, dense)


def test_output_argument(product):
    x, _, dense, op = problem(100, 264, 128)
    wide = torch.full((100, 300), float("nan"), device="cuda", dtype=BF16)
    for out in (wide[:, :264], wide[:, 4:268], torch.full((264, 100), float("nan"), device="cuda", dtype=BF16).t()):
        assert product(x, op.values, op.meta, 264, out=out) is out
        check(out, x, dense)
    assert wide[:, 268:].isnan().all()
    with pytest.raises(ValueError, match="out: must have shape"):
        product(x, op.values, op.meta, 264, out=wide)


@pytest.mark.parametrize("magnitude", testing.MAGNITUDES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_magnitudes(product, magnitude, dtype):
    x, _, dense, op = problem(130, 144, 320, dtype, magnitude=magnitude)
    check(product(x, op.values, op.meta, 144), x, dense)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny(product, scale):
    x, _, dense, op = problem(130, 144, 320)
    x = x * scale
    check(product(x, op.values, op.meta, 144), x, dense)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_inf_and_nan_reach_exactly_the_linked_outputs(product, bad):
    x, weight, dense, op = problem(70, 96, 144)
    mask = SparseWeight(weight.ids, torch.ones_like(weight.values), 2).to_dense() != 0
    places = [(0, 0), (3, 5), (69, 143), (31, 64)]
    for t, k in places:
        x[t, k] = bad
    y = product(x, op.values, op.meta, 96)
    touched = torch.zeros(70, 96, dtype=torch.bool, device="cuda")
    for t, k in places:
        touched[t] |= mask[:, k]
    assert torch.equal(~y.isfinite(), touched)


def test_repeats_are_bit_equal(product):
    x, _, _, op = problem(2048, 1376, 1376)
    first = product(x, op.values, op.meta, 1376)
    for _ in range(100):
        assert torch.equal(product(x, op.values, op.meta, 1376), first)


def test_cuda_graph_replays_with_new_inputs(product):
    x, _, dense, op = problem(300, 512, 256)
    y = torch.empty(300, 512, device="cuda", dtype=BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):             # kernels are compiled and loaded before the capture
        product(product(x, op.values, op.meta, 512, out=y), op.values_t, op.meta_t, 256)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product(x, op.values, op.meta, 512, out=y)
        z = product(y, op.values_t, op.meta_t, 256)
    for seed in (20, 21):
        x.copy_(testing.random_tensor((300, 256), BF16, seed=seed, device="cuda"))
        y.fill_(float("nan"))
        graph.replay()
        check(y, x, dense)
        check(z, y, dense.t())


def test_current_stream_is_used(product):
    x, _, dense, op = problem(4096, 512, 512)
    product(x, op.values, op.meta, 512)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    late = torch.empty_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)           # the product must wait for this stream's copy
        late.copy_(x)
        y = product(late, op.values, op.meta, 512)
    stream.synchronize()
    check(y, x, dense)


def test_threads_share_kernels(product):
    x, _, dense, op = problem(512, 512, 512)
    expected = product(x, op.values, op.meta, 512)
    wrong = []

    def work(seed):
        mine = x.roll(seed, 0).contiguous()
        for _ in range(50):
            if not torch.equal(product(mine, op.values, op.meta, 512), expected.roll(seed, 0)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_map_cache_is_bounded(monkeypatch):
    skip_without("wgmma_sp")
    monkeypatch.setattr(cuda_driver.TensorMaps, "limit", 8)
    x, _, dense, op = problem(64, 64, 64)
    outs = [spmm_sm90(x, op.values, op.meta, 64) for _ in range(20)]
    plan = list(sm90_wgmma_sp._PLANS.values())[-1]
    assert all(0 < len(maps) <= 8 for maps in plan.maps)
    for y in outs:
        check(y, x, dense)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_devices_in_one_process(product):
    x, weight, dense, op = problem(300, 256, 256)
    first = product(x, op.values, op.meta, 256)
    second = product(x.to("cuda:1"), op.values.to("cuda:1"), op.meta.to("cuda:1"), 256)
    assert second.device.index == 1 and torch.equal(second.cpu(), first.cpu())
