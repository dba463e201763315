"""The three products: bit identity, gradients, precision, shapes, autocast, and what torch.compile makes of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import chts_kernels.autograd as autograd_module
from chts_kernels import SparseWeight, input_grad, pack, spmm, weight_grad
from chts_kernels.check import FLOATS
from chts_kernels.testing import (
    MAGNITUDES,
    assert_bitwise_equal,
    assert_no_worse_than,
    poison,
    random_tensor,
    random_weight,
)

BOTH = pytest.mark.parametrize("n", (1, 2))
LOW = (torch.bfloat16, torch.float16)


def leaf(w: SparseWeight) -> SparseWeight:
    return SparseWeight(w.ids, w.values.clone().requires_grad_(), w.n)


# --- the identity test: every misplaced link shows with its coordinates


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ((4, 4), (36, 20), (64, 128)))
@BOTH
def test_spmm_of_the_identity_is_the_dense_matrix(n: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = random_weight(*shape, n, dtype, seed=3)
    rows, columns = shape
    with poison():
        assert_bitwise_equal(spmm(torch.eye(columns, dtype=dtype), w).t(), w.to_dense())
        assert_bitwise_equal(input_grad(torch.eye(rows, dtype=dtype), w), w.to_dense())


@pytest.mark.parametrize("dtype", FLOATS)
@BOTH
def test_weight_grad_of_the_identity_is_the_values(n: int, dtype: torch.dtype) -> None:
    w = random_weight(24, 24, n, dtype)
    dense = random_tensor((24, 24), dtype, seed=1)
    with poison():
        assert_bitwise_equal(weight_grad(dense.t().contiguous(), torch.eye(24, dtype=dtype), w.ids, n), pack(dense, w.ids, n))


# --- precision: against float64, and no worse than plain torch


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", (torch.float32, *LOW))
@BOTH
def test_no_worse_than_plain_torch(n: int, dtype: torch.dtype, magnitude: str) -> None:
    w = random_weight(48, 96, n, dtype, magnitude=magnitude, seed=1)
    x = random_tensor((40, 96), dtype, magnitude=magnitude, seed=2)
    dy = random_tensor((40, 48), dtype, magnitude=magnitude, seed=3)
    bias = random_tensor((48,), dtype, seed=4)
    dense = w.to_dense()
    exact = F.linear(x.double(), dense.double(), bias.double())
    assert_no_worse_than(spmm(x, w, bias), exact, F.linear(x, dense, bias))
    assert_no_worse_than(input_grad(dy, w), dy.double() @ dense.double(), dy @ dense)
    grad = pack(dy.double().t() @ x.double(), w.ids, n)
    assert_no_worse_than(weight_grad(dy, x, w.ids, n), grad, pack(dy.t() @ x, w.ids, n))


@pytest.mark.parametrize("dtype", LOW)
@BOTH
def test_weight_grad_in_float32_is_rounded_once(n: int, dtype: torch.dtype) -> None:
    w = random_weight(16, 32, n, dtype)
    x, dy = random_tensor((500, 32), dtype, seed=1), random_tensor((500, 16), dtype, seed=2)
    exact = pack(dy.double().t() @ x.double(), w.ids, n)
    got = weight_grad(dy, x, w.ids, n, out_dtype=torch.float32)
    assert got.dtype == torch.float32
    assert_no_worse_than(got, exact, pack(dy.float().t() @ x.float(), w.ids, n))


@BOTH
def test_integers_are_exact(n: int) -> None:
    w = random_weight(32, 64, n, torch.bfloat16, magnitude="integer")
    x = random_tensor((17, 64), torch.bfloat16, magnitude="integer", seed=5)
    dy = random_tensor((17, 32), torch.bfloat16, magnitude="integer", seed=6)
    dense = w.to_dense().double()
    assert_bitwise_equal(weight_grad(dy, x, w.ids, n, out_dtype=torch.float32),
                         pack(dy.double().t() @ x.double(), w.ids, n).float())  # fmt: skip
    assert_bitwise_equal(spmm(x, w), (x.double() @ dense.t()).bfloat16())
    assert_bitwise_equal(input_grad(dy, w), (dy.double() @ dense).bfloat16())


# --- gradients


@pytest.mark.parametrize("with_bias", (False, True))
@BOTH
def test_gradcheck(n: int, with_bias: bool) -> None:
    w = random_weight(8, 12, n, torch.float64)
    bias = random_tensor((8,), torch.float64, seed=2).requires_grad_() if with_bias else None
    x = random_tensor((2, 3, 12), torch.float64, seed=1).requires_grad_()
    values = w.values.clone().requires_grad_()

    def product(x: torch.Tensor, values: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        return spmm(x, SparseWeight(w.ids, values, n), *bias)

    assert torch.autograd.gradcheck(product, (x, values, *([bias] if with_bias else [])))


@BOTH
def test_gradients_are_those_of_the_masked_dense_layer(n: int) -> None:
    w = leaf(random_weight(16, 24, n, torch.float64))
    x = random_tensor((5, 24), torch.float64, seed=1).requires_grad_()
    bias = random_tensor((16,), torch.float64, seed=2).requires_grad_()
    dy = random_tensor((5, 16), torch.float64, seed=3)
    got = torch.autograd.grad(spmm(x, w, bias), (x, w.values, bias), dy)
    dense = w.to_dense().requires_grad_()
    expected = torch.autograd.grad(F.linear(x, dense, bias), (x, dense, bias), dy)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[2], expected[2])
    assert got[1].shape == w.values.shape  # at the links only, in the order of the values
    torch.testing.assert_close(got[1], pack(expected[1], w.ids, n))


class Calls:
    """Counts which backward products run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        for name, label in (("backward_input", "x"), ("WEIGHT_GRAD", "values")):
            real = getattr(autograd_module, name)
            monkeypatch.setattr(autograd_module, name, self.counted(real, label))

    def counted(self, real, label):
        def call(*args, **kwargs):
            self.made.append(label)
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("need", [(x, v, b) for x in (0, 1) for v in (0, 1) for b in (0, 1) if x or v or b])
def test_only_the_needed_gradients_are_computed(need: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    w = random_weight(8, 12)
    x, bias = random_tensor((3, 12)), random_tensor((8,))
    tensors = dict(zip(("x", "values", "bias"), (x, w.values, bias), strict=True))
    for wanted, tensor in zip(need, tensors.values(), strict=True):
        tensor.requires_grad_(bool(wanted))
    spmm(x, w, bias).sum().backward()
    assert calls.made == [name for name, wanted in zip(("x", "values"), need[:2], strict=True) if wanted]
    for wanted, tensor in zip(need, tensors.values(), strict=True):
        assert (tensor.grad is not None) == bool(wanted)


def test_the_input_is_not_kept_for_a_frozen_weight() -> None:
    w = random_weight(8, 12)
    x = random_tensor((3, 12)).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spmm(x, w)
    assert all(t.shape != x.shape for t in saved)


def test_no_graph_without_need() -> None:
    w = leaf(random_weight(8, 12))
    x = random_tensor((3, 12))
    assert spmm(x, w).requires_grad
    with torch.no_grad():
        assert not spmm(x, w).requires_grad
    with torch.inference_mode():
        assert_bitwise_equal(spmm(x, w), spmm(x, w))
    assert not input_grad(random_tensor((3, 8)), w).requires_grad
    assert not weight_grad(random_tensor((3, 8)), x, w.ids).requires_grad


@pytest.mark.parametrize("what", ("values", "ids"))
def test_changes_between_forward_and_backward_are_refused(what: str) -> None:
    """A topology update or an optimizer step inside a step would give the gradient of a matrix that no longer exists."""
    w = leaf(random_weight(8, 12))
    y = spmm(random_tensor((3, 12)), w).sum()
    with torch.no_grad():
        getattr(w, what).copy_(getattr(random_weight(8, 12, seed=9), what))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_second_derivatives_are_refused() -> None:
    w = leaf(random_weight(8, 12))
    (grad,) = torch.autograd.grad(spmm(random_tensor((3, 12)), w).square().sum(), w.values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradients_accumulate_and_hooks_and_checkpointing_work() -> None:
    from torch.utils.checkpoint import checkpoint

    w = leaf(random_weight(8, 12))
    x = random_tensor((3, 12)).requires_grad_()
    spmm(x, w).sum().backward()
    once = w.values.grad.clone()
    checkpoint(lambda x: spmm(x, w), x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(w.values.grad, 2 * once)


# --- shapes and strides


@pytest.mark.parametrize("leading", ((), (1,), (7,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 2)))
@BOTH
def test_leading_dimensions(n: int, leading: tuple[int, ...]) -> None:
    w = leaf(random_weight(8, 12, n))
    bias = random_tensor((8,)).requires_grad_()
    x = random_tensor((*leading, 12), seed=1).requires_grad_()
    dy = random_tensor((*leading, 8), seed=2)
    with poison():
        y = spmm(x, w, bias)
        dx, dvalues, dbias = torch.autograd.grad(y, (x, w.values, bias), dy)
    dense = w.to_dense()
    assert y.shape == (*leading, 8)
    torch.testing.assert_close(y, F.linear(x, dense, bias))
    torch.testing.assert_close(dx, dy @ dense)
    torch.testing.assert_close(dbias, dy.reshape(-1, 8).sum(0))
    torch.testing.assert_close(dvalues, pack(dy.reshape(-1, 8).t() @ x.detach().reshape(-1, 12), w.ids, n))
    torch.testing.assert_close(input_grad(dy, w), dx)
    torch.testing.assert_close(weight_grad(dy, x.detach(), w.ids, n), dvalues)


@BOTH
def test_any_strides(n: int) -> None:
    w = leaf(random_weight(8, 12, n, seed=4))
    x = random_tensor((12, 5, 3), seed=1).permute(2, 1, 0)
    dy = random_tensor((8, 3, 5), seed=2).permute(1, 2, 0)
    assert not x.is_contiguous() and not dy.is_contiguous()
    plain = torch.autograd.grad(spmm(x.contiguous(), w), w.values, dy.contiguous())[0]
    torch.testing.assert_close(spmm(x, w), spmm(x.contiguous(), w))
    torch.testing.assert_close(torch.autograd.grad(spmm(x, w), w.values, dy)[0], plain)
    torch.testing.assert_close(input_grad(dy, w), input_grad(dy.contiguous(), w))
    torch.testing.assert_close(weight_grad(dy, x, w.ids, n), plain)
    broadcast = torch.ones(()).expand(4, 12)
    torch.testing.assert_close(spmm(broadcast, w), w.to_dense().sum(1).expand(4, 8))


@BOTH
def test_values_of_any_strides(n: int) -> None:
    w = random_weight(8, 12, n)
    strided = SparseWeight(w.ids, w.values.t().contiguous().t(), n)
    assert not strided.values.is_contiguous()
    x = random_tensor((3, 12))
    assert_bitwise_equal(spmm(x, strided), spmm(x, w))
    assert_bitwise_equal(strided.T.values, w.T.values)
    for dtype in (torch.float32, torch.bfloat16):
        fresh, expected = strided.operands(dtype), w.operands(dtype)
        assert fresh.values.is_contiguous()  # what a kernel reads is never a strided view
        assert_bitwise_equal(fresh.values, expected.values)
        assert_bitwise_equal(fresh.values_t, expected.values_t)


# --- dtypes


@BOTH
def test_mixed_dtypes_compute_in_that_of_x(n: int) -> None:
    w = leaf(random_weight(8, 12, n))
    bias = random_tensor((8,)).requires_grad_()
    x = random_tensor((3, 12), torch.bfloat16).requires_grad_()
    y = spmm(x, w, bias)
    assert_bitwise_equal(y, F.linear(x, w.to_dense().bfloat16(), bias.bfloat16()))
    y.sum().backward()
    assert (x.grad.dtype, w.values.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", LOW)
@BOTH
def test_autocast(n: int, dtype: torch.dtype) -> None:
    w = leaf(random_weight(16, 24, n))
    bias = random_tensor((16,), seed=2).requires_grad_()
    x = random_tensor((5, 24), seed=1).requires_grad_()
    dy = random_tensor((5, 16), dtype, seed=3)
    with torch.autocast("cpu", dtype=dtype):
        y = spmm(x, w, bias)
    assert_bitwise_equal(y, spmm(x.to(dtype), w, bias))
    assert y.dtype == dtype
    dx, dvalues, dbias = torch.autograd.grad(y, (x, w.values, bias), dy)
    assert dx.dtype == dvalues.dtype == dbias.dtype == torch.float32
    # the weight gradient is not rounded to the compute dtype on its way
    exact = pack(dy.double().t() @ x.detach().to(dtype).double(), w.ids, n)
    assert_no_worse_than(dvalues, exact, pack(dy.float().t() @ x.detach().to(dtype).float(), w.ids, n))
    torch.testing.assert_close(dbias, dy.float().sum(0))


@BOTH
def test_autocast_does_not_reach_into_the_ops(n: int) -> None:
    """float64 stays float64, and the non-differentiable products compute in the dtype they are given."""
    w = random_weight(8, 12, n, torch.float64)
    x, dy = random_tensor((3, 12), torch.float64), random_tensor((3, 8), torch.float64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = spmm(x, w), input_grad(dy, w), weight_grad(dy, x, w.ids, n)
        single = input_grad(dy.float(), w)
    assert all(t.dtype == torch.float64 for t in got) and single.dtype == torch.float32
    assert_bitwise_equal(got[0], spmm(x, w))
    assert_bitwise_equal(got[2], weight_grad(dy, x, w.ids, n))


# --- selection


def test_naming_the_reference() -> None:
    w, x, dy = random_weight(8, 12), random_tensor((3, 12)), random_tensor((3, 8))
    assert_bitwise_equal(spmm(x, w, impl="reference"), spmm(x, w))
    assert_bitwise_equal(input_grad(dy, w, impl="reference"), input_grad(dy, w))
    assert_bitwise_equal(weight_grad(dy, x, w.ids, impl="reference"), weight_grad(dy, x, w.ids))


@BOTH
def test_repeated_runs_agree_bit_for_bit(n: int) -> None:
    w, x = random_weight(64, 64, n), random_tensor((32, 64))
    first = spmm(x, w)
    for _ in range(5):
        assert_bitwise_equal(spmm(x, w), first)
