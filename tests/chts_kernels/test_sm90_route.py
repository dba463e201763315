"""The short way of an eager product, on the CPU: a stand-in for the device and the launch, real look-ups, checks and autograd."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from chts_kernels import SparseWeight, input_grad, spmm, target
from chts_kernels.ops import _library
from chts_kernels.ops import spmm as ops
from chts_kernels.ops.spmm import route, sm90_wgmma_sp
from chts_train.distributed import GatheredWeight

BF16 = torch.bfloat16


class Plan:
    """Notes its launches instead of making them."""

    def __init__(self, key):
        self.key, self.calls = key, []

    def run(self, *addresses):
        self.calls.append(addresses)


@pytest.fixture
def plans(monkeypatch):
    """CPU tensors pass for those of CUDA device 0; {(T, N, K, dtype, bias dtype): Plan} of the routes made."""
    made = {}

    def plan(tokens, rows, columns, dtype, bias, device, row_bytes, config):
        assert row_bytes == (columns, 2 * columns, 2 * rows)
        return made.setdefault((tokens, rows, columns, dtype, bias), Plan((tokens, rows, columns)))

    def long_way(x, operand, meta, rows, bias=None):
        return torch.zeros(x.shape[0], rows, dtype=x.dtype)

    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(target, "why_not_kernel", lambda name, device: None)
    monkeypatch.setattr(target, "has_sparse_tensor_core_kernel", lambda index: True)
    monkeypatch.setattr(sm90_wgmma_sp, "plan", plan)
    monkeypatch.setattr(sm90_wgmma_sp, "spmm_sm90", long_way)
    monkeypatch.setattr(route, "_ROUTES", {})
    monkeypatch.setattr(_library, "_empty_strided_cuda", torch._C._dynamo.guards._empty_strided_cpu)
    for op in (ops.SPMM, ops.INPUT_GRAD):
        monkeypatch.setattr(op, "_chosen", {})
    ops._product.cache_clear()
    yield made
    ops._product.cache_clear()


def weight(rows=32, columns=48):
    w = SparseWeight.random(rows, columns, dtype=BF16)
    w.values.requires_grad_()
    return w


def launches(plans):
    return {key[:3]: len(plan.calls) for key, plan in plans.items()}


def test_the_backward_pass_of_a_weight_that_keeps_no_operands_takes_the_route(plans, monkeypatch):
    import chts_kernels.autograd as autograd

    monkeypatch.setattr(autograd, "WEIGHT_GRAD", lambda dy, x, ids, n, dtype, impl: dy.new_zeros(32, 24))
    kept = weight()
    w, x = GatheredWeight.over(kept.ids, kept.values, kept.n), torch.randn(5, 48).to(BF16).requires_grad_()
    for calls in (0, 1, 2):
        spmm(x, w).backward(torch.ones(5, 32, dtype=BF16))
        assert launches(plans) == {(5, 32, 48): 0, (5, 48, 32): calls}
    assert w._operands.nbytes == 0


@pytest.mark.parametrize("leading", [(5,), (2, 3), (1, 2, 2)])
def test_the_second_call_takes_the_route(plans, leading):
    w, x = weight(), torch.randn(*leading, 48).to(BF16)
    tokens = x.numel() // 48
    for calls in (0, 1, 2):
        y = spmm(x, w)
        assert y.shape == (*leading, 32) and y.is_contiguous() and y.dtype == BF16 and y.requires_grad
        assert launches(plans) == {(tokens, 32, 48): calls}
    values, x_at, y_at, meta, bias, stream = plans[tokens, 32, 48, BF16, None].calls[-1]
    operands = w.operands(BF16)
    expected = (operands.values.data_ptr(), x.data_ptr(), y.data_ptr(), operands.meta.data_ptr())
    assert (values, x_at, y_at, meta, bias, stream) == (*expected, 0, 7)
    with torch.no_grad():
        assert not spmm(x, w).requires_grad
    dy = torch.randn_like(y)
    for calls in (0, 1):
        assert input_grad(dy, w).shape == x.shape
        assert launches(plans)[tokens, 48, 32] == calls
    assert plans[tokens, 48, 32, BF16, None].calls[-1][0] == operands.values_t.data_ptr()


def test_gradients_flow_through_the_route(plans, monkeypatch):
    import chts_kernels.autograd as autograd

    monkeypatch.setattr(autograd, "WEIGHT_GRAD", lambda dy, x, ids, n, dtype, impl: dy.new_full((32, 24), x.shape[0]))
    w, x, bias = weight(), torch.randn(2, 3, 48).to(BF16).requires_grad_(), torch.zeros(32, requires_grad=True)
    for _ in range(3):
        x.grad = w.values.grad = bias.grad = None
        spmm(x, w, bias).backward(torch.ones(2, 3, 32, dtype=BF16))
        assert x.grad.shape == x.shape and (w.values.grad == 6).all() and (bias.grad == 6).all()
    assert launches(plans) == {(6, 32, 48): 2, (6, 48, 32): 2}
    with torch.no_grad():
        y = spmm(x, w, bias)
        w.values.add_(1)
    assert not y.requires_grad
    y = spmm(x, w, bias)
    with torch.no_grad():
        w.values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("leading", [(6,), (2, 3)])
def test_a_checkpointed_first_pass_is_repeated_by_the_route(plans, monkeypatch, leading):
    import chts_kernels.autograd as autograd

    monkeypatch.setattr(autograd, "WEIGHT_GRAD", lambda dy, x, ids, n, dtype, impl: dy.new_zeros(32, 24))
    w, x = weight(), torch.randn(*leading, 48).to(BF16).requires_grad_()
    y = checkpoint(lambda x: spmm(x, w), x, use_reentrant=False, preserve_rng_state=False)
    y.backward(torch.ones_like(y))  # torch compares shapes and dtypes of what both passes save
    assert launches(plans) == {(6, 32, 48): 1, (6, 48, 32): 0} and x.grad.shape == x.shape


def test_operands_are_refreshed_on_the_way(plans, monkeypatch):
    import chts_kernels.format

    packs = []
    monkeypatch.setattr(chts_kernels.format, "PACK_OPERANDS_", lambda *args: packs.append(args))
    w, x = weight(), torch.randn(4, 48).to(BF16)
    for _ in range(4):
        spmm(x, w)
    assert len(packs) == 1
    with torch.no_grad():
        w.values.mul_(2)
    spmm(x, w)
    assert len(packs) == 2 and launches(plans) == {(4, 32, 48): 4}


def call(x, w, bias=None, **options):
    with torch.no_grad():
        return spmm(x, w, bias, **options)


def test_what_the_route_does_not_serve_goes_the_long_way(plans, monkeypatch):
    w, x, bias = weight(), torch.randn(4, 48).to(BF16), torch.zeros(64)[::2]
    call(x, w), call(x, w)
    call(torch.randn(48, 4).to(BF16).t(), w)                                # strides
    call(torch.randn(4 * 48 + 1).to(BF16)[1:].view(4, 48), w)               # off the 16-byte grid
    call(x, w, impl="reference")
    call(x.half(), w)                                                       # another kind of call
    call(torch.nn.Parameter(x, requires_grad=False), w)
    with monkeypatch.context() as autocast:
        autocast.setattr(route, "_is_autocast_enabled", lambda kind: True)
        autocast.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
        assert route.find(x, w, None, "auto", False) is None
        autocast.setattr(torch, "get_autocast_dtype", lambda kind: BF16)
        assert route.find(x, w, None, "auto", False) is not None
    for _ in range(2):
        call(x, w, bias)                                                    # not contiguous
    assert len(plans[4, 32, 48, BF16, None].calls) == 1
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    call(x, w)
    assert len(plans[4, 32, 48, BF16, None].calls) == 1


def test_sizes_that_need_copies_leave_no_route(plans):
    call(torch.randn(4, 40).to(BF16), weight(32, 40))       # rows of values of 40 bytes
    call(torch.randn(4, 48).to(BF16), weight(36, 48))       # rows of y of 72 bytes
    call(torch.randn(0, 48).to(BF16), weight())
    assert not plans and not route._ROUTES


def test_errors_are_those_of_the_long_way(plans):
    w, x = weight(), torch.randn(4, 48).to(BF16)
    call(x, w), call(x, w)
    with pytest.raises(ValueError, match="x: must have 48"):
        call(x[:, :32], w)
    with pytest.raises(TypeError, match="x: must be a torch.Tensor"):
        call([1.0], w)
    with pytest.raises(TypeError, match="w: must be a SparseWeight"):
        call(x, torch.zeros(32, 48))
    with pytest.raises(ValueError, match="bias: must have shape"):
        call(x, w, torch.zeros(31))
    with pytest.raises(ValueError, match="impl: must be one of"):
        call(x, w, impl="nonsense")


def test_the_table_of_routes_is_bounded(plans, monkeypatch):
    monkeypatch.setattr(route, "ROUTES_LIMIT", 4)
    w = weight()
    for tokens in range(1, 20):
        call(torch.randn(tokens, 48).to(BF16), w)
        assert 0 < len(route._ROUTES) <= 4


@pytest.mark.parametrize("grad", (True, False))
def test_forward_mode_is_refused_with_and_without_a_route(plans, grad):
    w, x = weight(), torch.randn(5, 48).to(BF16)
    w.values.requires_grad_(grad)
    for _ in range(2):  # the second time there is a route
        with forward_ad.dual_level(), torch.set_grad_enabled(grad):
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError):
                spmm(dual, w)
        assert spmm(x, w).shape == (5, 32)
