"""What outdates a derived operand: every way in which torch changes a tensor, counted or not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from chts_kernels import SparseWeight
from chts_kernels.freshness import Freshness
from chts_train import SparseLinear, STELinear


def test_mark_holds_until_a_tensor_or_a_setting_changes():
    a, b = torch.zeros(4), torch.zeros(4)
    f = Freshness()
    assert not f.holds((a, b), 1)
    f.mark((a, b), 1)
    assert f.holds((a, b), 1) and not f.holds((a, b), 2) and not f.holds((b, a), 1)
    b.add_(1)
    assert not f.holds((a, b), 1)
    f.mark((a, b), 1)
    f.invalidate()
    assert not f.holds((a, b), 1)


def test_a_tensor_at_a_freed_address_is_another_tensor():
    f = Freshness()
    hits = 0
    for _ in range(50):
        a = torch.zeros(1000)
        hits += f.holds((a,))
        f.mark((a,))
        del a
    assert hits == 0


def test_inference_tensors_are_never_fresh():
    with torch.inference_mode():
        a = torch.zeros(4)
    f = Freshness()
    f.mark((a,))
    assert not f.holds((a,))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_every_optimizer_outdates_operands_and_masks(kind, options):
    torch.manual_seed(0)
    sparse, ste = SparseLinear(16, 16), STELinear(16, 16)
    optimizer = kind([*sparse.parameters(), *ste.parameters()], lr=0.5, **options)
    for _ in range(3):
        operands = sparse.weight.operands(torch.float16)
        assert torch.equal(operands.values, sparse.values.detach().half())
        best = SparseWeight.from_dense(ste.weight.detach()).mask()
        assert torch.equal(ste.mask().bool(), best)
        for parameter in (*sparse.parameters(), *ste.parameters()):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert torch.equal(sparse.weight.operands(torch.float16).values, sparse.values.detach().half())
    assert torch.equal(ste.mask().bool(), SparseWeight.from_dense(ste.weight.detach()).mask())


def test_ste_layers_copy_and_pickle():
    layer = STELinear(16, 16)
    layer.mask()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.mask(), layer.mask()) and twin.n == 2
        with torch.no_grad():
            twin.weight.copy_(torch.randn(16, 16))
        assert not torch.equal(twin.mask(), layer.mask())


@pytest.mark.gpu
def test_a_replayed_capture_does_not_leave_stale_operands_behind():
    layer = SparseLinear(64, 64, bias=False, device="cuda")
    x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        layer(x)
        layer.values.mul_(1.0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = layer(x)
        layer.values.mul_(2.0)  # an optimizer step inside the graph: it moves no version counter when replayed
    for _ in range(3):
        before = layer.values.detach().clone()
        graph.replay()
        torch.testing.assert_close(layer.values.detach(), before * 2)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), captured * 2, rtol=2e-2, atol=2e-2)
