"""What outdates a derived operand: every way in which torch changes a tensor, counted or not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from chts_kernels import SparseWeight, freshness
from chts_kernels.cuda_driver import capture_id
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


# --- captures: what was derived in one counts as fresh until its end, and nowhere else ---------------------------------


@pytest.fixture
def capture(monkeypatch):
    """A stand-in for the capture under way: set ``capture[0]`` to its id, or None."""
    now = [None]
    monkeypatch.setattr(freshness, "_capture", lambda tensor: now[0])
    return now


def test_what_a_capture_derived_is_fresh_in_it_and_nowhere_else(capture):
    a, f = torch.zeros(4), Freshness()
    f.mark((a,))
    capture[0] = 7
    assert not f.holds((a,)), "a graph must derive for itself: its replays may find other tensors"
    f.mark((a,), "bf16")
    assert f.holds((a,), "bf16") and not f.holds((a,), "fp16")
    capture[0] = 8
    assert not f.holds((a,), "bf16")
    capture[0] = None
    assert not f.holds((a,), "bf16")
    f.mark((a,))
    assert not f.holds((a,)), "a replay may change the tensor and what was derived at any time"
    capture[0] = 7
    assert not f.holds((a,))


def test_a_backward_pass_reads_what_its_forward_pass_derived_after_a_capture_too(capture):
    a, f = torch.zeros(4), Freshness()
    capture[0] = 7
    f.mark((a,), "bf16")
    captured = f.stamp
    capture[0] = None
    assert not f.unchanged(captured, (a,), "bf16"), "its memory holds what the last replay wrote, if any"
    f.mark((a,), "bf16")
    first = f.stamp
    assert not f.holds((a,), "bf16")
    assert f.unchanged(first, (a,), "bf16") and not f.unchanged(first, (a,), "fp16") and not f.unchanged(None, (a,), "bf16")
    capture[0] = 8
    assert not f.unchanged(first, (a,), "bf16"), "a graph derives for itself"
    capture[0] = None
    a.add_(1)
    assert not f.unchanged(first, (a,), "bf16")
    f.mark((a,), "bf16")
    assert not f.unchanged(first, (a,), "bf16")
    second = f.stamp
    f.mark((a,), "bf16")
    assert f.unchanged(second, (a,), "bf16"), "derived again from the same tensors"
    f.invalidate()
    assert not f.unchanged(second, (a,), "bf16") and f.stamp is None and not f.unchanged(None, (a,), "bf16")


def test_a_captured_optimizer_step_outdates_for_good(capture, monkeypatch):
    """Its replays write the parameters and run no Python, whatever else was captured."""
    written, other = torch.nn.Parameter(torch.zeros(4)), torch.zeros(4)
    f, g = Freshness(), Freshness()
    f.mark((written, other))
    g.mark((other,))
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        capturing.setattr(torch.cuda, "is_initialized", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        capturing.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True, raising=False)
        freshness._outdate_all(torch.optim.SGD([written], lr=0.1))
    for item, tensors in ((f, (written, other)), (g, (other,))):
        assert not item.holds(tensors)
        item.mark(tensors)
        assert item.unchanged(item.stamp, tensors)
    assert not f.holds((written, other)) and g.holds((other,))


def test_changes_inside_a_capture_outdate(capture):
    parameter, f = torch.nn.Parameter(torch.zeros(4)), Freshness()
    capture[0] = 7
    f.mark((parameter,))
    with torch.no_grad():
        parameter.add_(1)
    assert not f.holds((parameter,))
    f.mark((parameter,))
    parameter.grad = torch.ones(4)
    torch.optim.SGD([parameter], lr=0.1, fused=True).step()
    assert not f.holds((parameter,))


class _Packs:
    """Counts the packings of operands."""

    def __init__(self, monkeypatch):
        import chts_kernels.format

        self.count, self.pack = 0, chts_kernels.format.PACK_OPERANDS_
        monkeypatch.setattr(chts_kernels.format, "PACK_OPERANDS_", self)

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.pack(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 2])
def test_a_captured_training_step_packs_once_a_step_and_accumulates(monkeypatch, steps):
    """Two micro-batches and an optimizer step, `steps` times in one graph, replayed three times, against eager."""

    def build():
        torch.manual_seed(3)
        layer = SparseLinear(64, 128, bias=False, device="cuda")
        return layer, torch.optim.Adam(layer.parameters(), lr=1e-2, fused=True, capturable=True)

    batches = [torch.randn(32, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def step(layer, optimizer):
        optimizer.zero_grad(set_to_none=False)
        for x in batches:
            layer(x.detach().requires_grad_()).float().square().mean().backward()
        optimizer.step()

    eager, optimizer = build()
    captured, captured_optimizer = build()
    captured.load_state_dict(eager.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in (captured, eager):
            layer.values.grad = torch.zeros_like(layer.values)
        step(captured, captured_optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    step(eager, optimizer)
    graph, packs = torch.cuda.CUDAGraph(), _Packs(monkeypatch)
    with torch.cuda.graph(graph):
        for _ in range(steps):
            step(captured, captured_optimizer)
    assert packs.count == steps
    for _ in range(3):
        graph.replay()
        for _ in range(steps):
            step(eager, optimizer)
    torch.testing.assert_close(captured.values, eager.values, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(captured(batches[0]), eager(batches[0]), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_an_eager_layer_packs_once_after_a_capture(monkeypatch):
    layer = SparseLinear(64, 128, bias=False, device="cuda")
    batches = [torch.randn(32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]

    def passes():
        outputs = [layer(x).float().square().sum() for x in batches]
        return [torch.autograd.grad(y, (x, layer.values)) for y, x in zip(outputs, batches, strict=True)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = passes()
    torch.cuda.current_stream().wait_stream(stream)
    graph, packs = torch.cuda.CUDAGraph(), _Packs(monkeypatch)
    with torch.cuda.graph(graph):
        passes()
    assert packs.count == 1
    for _ in range(2):
        y = layer(batches[0]).float().square().sum()
        graph.replay()  # of a graph that writes no parameter: allowed between the passes
        got = torch.autograd.grad(y, (batches[0], layer.values))
        assert all(map(torch.equal, got, expected[0]))
    assert packs.count == 3, "one for every forward pass, none for its backward pass"
    for got, wanted in zip(passes(), expected, strict=True):
        assert all(map(torch.equal, got, wanted))
    assert packs.count == 5


@pytest.mark.gpu
def test_replays_of_an_optimizer_step_alone_outdate():
    layer = SparseLinear(64, 64, bias=False, device="cuda")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True, capturable=True)
    x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    layer.values.grad = torch.randn_like(layer.values)
    with torch.no_grad():
        layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        with torch.no_grad():
            before = layer(x)
            graph.replay()
            after = layer(x)
            expected = torch.nn.functional.linear(x, layer.weight.to_dense().to(x.dtype))
        torch.testing.assert_close(after, expected, rtol=2e-2, atol=2e-2)
        assert not torch.equal(before, after)


@pytest.mark.gpu
def test_the_id_of_a_capture():
    stream = torch.cuda.Stream()
    seen = []
    for _ in range(2):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.zeros(1, device="cuda")
            seen += [capture_id(torch.cuda.current_stream().cuda_stream) for _ in range(2)]
    assert seen[0] == seen[1] != seen[2] == seen[3] and None not in seen
    assert capture_id(stream.cuda_stream) is None
