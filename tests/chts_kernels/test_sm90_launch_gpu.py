"""How the sm_90 sparse product is launched on the device: overlapping launches, the short way of eager calls, their host time."""

from __future__ import annotations

import itertools
import statistics
import time

import pytest
import torch

from chts_kernels import testing
from chts_kernels.format import SparseWeight, random_ids
from chts_kernels.ops import _library
from chts_kernels.ops import spmm as ops
from chts_kernels.ops.spmm import route
from chts_kernels.ops.spmm.sm90_config import CONFIGS
from chts_kernels.ops.spmm.sm90_wgmma_sp import spmm_sm90, why_not

BF16 = torch.bfloat16
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_sm90():
    reason = why_not(torch.device("cuda"), BF16)
    if reason is not None:
        pytest.skip(reason)


def weight(rows, columns, dtype=BF16):
    values = testing.random_tensor((rows, columns // 2), dtype, seed=2, device="cuda") / columns**0.5
    return SparseWeight(random_ids(rows, columns, seed=1, device="cuda"), values)


@pytest.mark.parametrize(("tokens", "name"), [(300, "128x96"), (300, "64x64"), (1000, "256x192c2"), (4096, "128x256"), (33, "64x16")])
def test_launches_that_overlap_wait_for_each_other(tokens, name):
    """Each product reads what the one ahead wrote, eagerly and in a graph; small problems start before the one ahead has ended."""
    w = weight(512, 512)
    op, buffers = w.operands(BF16), [testing.random_tensor((tokens, 512), BF16, seed=3, device="cuda")]
    for _ in range(12):
        buffers.append(spmm_sm90(buffers[-1], op.values, op.meta, 512))
        torch.cuda.synchronize()
    exact = buffers[-2].double() @ w.to_dense().double().t()
    testing.assert_no_worse_than(buffers[-1], exact, torch.nn.functional.linear(buffers[-2], w.to_dense()))
    mine = [torch.zeros_like(b) for b in buffers]

    def run():
        mine[0].copy_(buffers[0])
        for x, y in itertools.pairwise(mine):
            spmm_sm90(x, op.values, op.meta, 512, out=y, config=CONFIGS[name])

    run()
    assert all(map(torch.equal, mine, buffers))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        for buffer in mine:
            buffer.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, mine, buffers))


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("leading", [(24,), (2, 3, 4)], ids=str)
def test_the_short_way_gives_what_the_long_one_gives(monkeypatch, leading, dtype):
    """Forward, dX, dW and the bias's gradient; masters in the compute dtype, whose values are the operand, and in float32."""
    w = weight(96, 128, dtype)
    bias = testing.random_tensor((96,), BF16, seed=7, device="cuda").requires_grad_()
    x = testing.random_tensor((*leading, 128), BF16, seed=4, device="cuda").requires_grad_()
    dy = testing.random_tensor((*leading, 96), BF16, seed=5, device="cuda")
    w.values.requires_grad_()

    def step():
        y = ops.spmm(x, w, bias)
        return y, *torch.autograd.grad(y, (x, w.values, bias), dy), ops.input_grad(dy, w)

    with monkeypatch.context() as long_way:
        long_way.setattr(route, "find", lambda *args: None)
        long_way.setattr(_library.Op, "route", lambda *args, **kwargs: None)
        expected = step()
    taken = []
    product = route.Route.product
    monkeypatch.setattr(route.Route, "product", lambda self, *args: taken.append(self) or product(self, *args))
    for _ in range(2):
        for got, wanted in zip(step(), expected, strict=True):
            assert torch.equal(got, wanted) and got.shape == wanted.shape
    assert len(taken) == 6
    with torch.no_grad():
        w.values.mul_(2)
        y = ops.spmm(x, w)
        x64, dense = x.double(), w.to_dense().to(BF16)
    testing.assert_no_worse_than(y, x64 @ dense.double().t(), torch.nn.functional.linear(x, dense))


def test_values_that_begin_anywhere():
    flat = testing.random_tensor((64 * 32 + 1,), BF16, device="cuda")
    w = SparseWeight(random_ids(64, 64, seed=1, device="cuda"), flat[1:].view(64, 32))
    x = testing.random_tensor((40, 64), BF16, device="cuda")
    with torch.no_grad():
        first = ops.spmm(x, w)
        assert torch.equal(ops.spmm(x, w), first)
    testing.assert_no_worse_than(first, x.double() @ w.to_dense().double().t(), torch.nn.functional.linear(x, w.to_dense()))


@pytest.mark.slow
def test_host_time_of_a_call_is_near_that_of_a_dense_one():
    """A guard against regressions, not the figure: the share of a busy machine decides the absolute time."""
    w, x = weight(256, 256), testing.random_tensor((64, 256), BF16, device="cuda")
    w.values.requires_grad_()
    dense = w.to_dense().detach().requires_grad_()

    def host(call):
        times = []
        for _ in range(9):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    sparse = lambda: ops.spmm(x, w)  # noqa: E731
    linear = lambda: torch.nn.functional.linear(x, dense)  # noqa: E731
    host(sparse), host(linear)
    assert host(sparse) < 2 * host(linear)
