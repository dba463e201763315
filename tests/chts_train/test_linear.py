"""SparseLinear as a drop-in nn.Linear, and the conversion of models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from chts_kernels import SparseWeight
from chts_train import SparseLinear, SparsityConfig, STELinear, densify_, sparse_layers, sparsify_


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_match_the_dense_layer(n, bias):
    layer = SparseLinear(16, 24, bias=bias, n=n, dtype=torch.float64)
    dense = layer.to_linear()
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    dx, x.grad = x.grad, None
    expected = dense(x)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, x.grad)
    at_links = dense.weight.grad[layer.weight.mask()].view(24, -1)
    torch.testing.assert_close(layer.values.grad, at_links)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_gradcheck():
    layer = SparseLinear(8, 12, dtype=torch.float64)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.values, layer.bias))


def test_looks_like_nn_linear():
    layer = SparseLinear(16, 24, n=1, dtype=torch.bfloat16)
    assert (layer.in_features, layer.out_features, layer.bias.shape) == (16, 24, (24,))
    assert repr(layer) == "SparseLinear(in_features=16, out_features=24, bias=True, n=1)"
    assert set(layer.state_dict()) == {"values", "ids", "bias"}
    assert {name for name, _ in layer.named_parameters()} == {"values", "bias"}
    assert isinstance(layer.weight, SparseWeight) and layer.weight.dtype == torch.bfloat16
    bound = 16**-0.5
    assert layer.values.abs().max() <= bound and layer.values.float().std() > bound / 3


def test_initialisation_follows_manual_seed():
    torch.manual_seed(7)
    first = SparseLinear(32, 32)
    torch.manual_seed(7)
    again, other = SparseLinear(32, 32), SparseLinear(32, 32)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.values, again.values)
    assert not torch.equal(first.ids, other.ids)


@pytest.mark.parametrize("init", ["magnitude", "random"])
def test_from_linear_keeps_weights_at_links_and_flags(init):
    linear = nn.Linear(16, 8).to(torch.float64).eval()
    linear.weight.requires_grad_(False)
    layer = SparseLinear.from_linear(linear, 2, init=init, seed=1)
    assert torch.equal(layer.weight.to_dense(), linear.weight * layer.weight.mask())
    assert not layer.values.requires_grad and layer.bias.requires_grad and not layer.training
    assert layer.bias is not linear.bias and torch.equal(layer.bias, linear.bias)
    back = layer.to_linear()
    assert torch.equal(back.weight, layer.weight.to_dense()) and not back.weight.requires_grad and not back.training


def test_deepcopy_pickle_and_dtype_changes():
    layer = SparseLinear(16, 16)
    layer.weight.operands(torch.bfloat16)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.values, layer.values) and torch.equal(twin.ids, layer.ids)
        assert twin.weight.operands(torch.bfloat16).values is not layer.weight.operands(torch.bfloat16).values
    half = layer.to(torch.bfloat16)
    assert half.values.dtype == torch.bfloat16 and half.ids.dtype == torch.uint8
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    assert half(x).dtype == torch.bfloat16


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients():
    layer = SparseLinear(16, 8)
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.values.grad.dtype == layer.bias.grad.dtype == x.grad.dtype == torch.float32


def test_state_dict_round_trip_and_refusals():
    layer, other = SparseLinear(16, 16), SparseLinear(16, 16)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.ids, layer.ids)
    x = torch.randn(2, 16)
    assert torch.equal(layer(x), other(x))
    state = layer.state_dict()
    state["ids"] = torch.full_like(state["ids"], 90)
    with pytest.raises(RuntimeError, match="ids: must be pattern ids below 90 for n = 2, got 90"):
        other.load_state_dict(state)
    state["ids"] = state["ids"].int()
    with pytest.raises(RuntimeError, match="ids: must have dtype uint8, got torch.int32"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        SparseLinear(16, 16, n=1).load_state_dict(layer.state_dict())


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.up = nn.Linear(16, 32)
        self.odd = nn.Linear(32, 30)
        self.down = nn.Linear(30, 16)
        self.mix = self.up  # the same module in two places
        self.attention = nn.MultiheadAttention(16, 2)
        self.tied = nn.Linear(16, 12, bias=False)
        self.tied.weight = self.embed.weight
        self.lm_head = nn.Linear(16, 12)


def test_sparsify_replaces_and_says_what_it_left():
    model = _Block()
    records = {r.name: r for r in sparsify_(model)}
    assert isinstance(model.up, SparseLinear) and model.mix is model.up
    assert records["up"].action == "sparse" and records["up"].reason == "32 x 16 to 2:4"
    assert records["odd"].reason == "sizes 30 x 32 are not both divisible by 4"
    assert records["down"].reason == "sizes 16 x 30 are not both divisible by 4"
    assert records["attention.out_proj"].reason == "NonDynamicallyQuantizableLinear is a subclass of nn.Linear"
    assert records["tied"].reason == "its weight is shared with another module"
    assert records["lm_head"].reason == "output head"
    assert list(sparse_layers(model)) == ["up"]
    assert densify_(model) == 1
    assert type(model.up) is nn.Linear and model.mix is model.up


def test_sparsify_filter_replaces_the_head_rule():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)})
    records = sparsify_(model, SparsityConfig(n=1), lambda name, module: name == "lm_head")
    assert [(r.name, r.action, r.reason) for r in records] == [
        ("a", "skipped", "filter_fn said no"),
        ("lm_head", "sparse", "8 x 8 to 1:4"),
    ]


def test_sparsify_is_reproducible_and_gives_layers_different_patterns():
    def build(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        sparsify_(model, SparsityConfig(seed=seed))
        return [layer.ids for layer in sparse_layers(model).values()]

    first, again, other = build(1), build(1), build(2)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_sparsify_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="model: must contain the layers to replace, got a bare nn.Linear"):
        sparsify_(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="can be made sparse, got none .0: sizes 3 x 8 are not both divisible by 4"):
        sparsify_(nn.Sequential(nn.Linear(8, 3)))
    with pytest.raises(ValueError, match="it has no nn.Linear"):
        sparsify_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="n: must be one of .1, 2., got 3"):
        SparsityConfig(n=3)
    with pytest.raises(ValueError, match="srste_lambda: must not be negative, got -1"):
        SparsityConfig(srste_lambda=-1)
    with pytest.raises(ValueError, match="init: must be 'magnitude' or 'random', got 'best'"):
        SparseLinear.from_linear(nn.Linear(8, 8), init="best")


def test_sparsify_ste():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsify_(model, SparsityConfig(kind="ste", n=1))
    assert all(isinstance(m, STELinear) and m.n == 1 for m in model)
    densify_(model)
    assert all(type(m) is nn.Linear and int((m.weight != 0).sum()) == 64 for m in model)


def test_frozen_layer_computes_no_weight_gradient():
    layer = SparseLinear(8, 8)
    layer.values.requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.values.grad is None and x.grad is not None and layer.bias.grad is not None


def test_memory_of_a_60m_model_is_at_most_058_of_dense():
    """Parameters + gradients + Adam state of the sparse-able layers of Llama-60M, measured from the tensors."""
    shapes = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]  # one of eight equal layers
    dense = nn.ModuleList(nn.Linear(k, n, bias=False) for n, k in shapes)
    sparse = copy.deepcopy(dense)
    sparsify_(sparse)
    sizes = []
    for model in (dense, sparse):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.Adam(model.parameters())
        optimizer.step()
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        tensors += [v for state in optimizer.state.values() for v in state.values()]
        sizes.append(sum(t.nbytes for t in tensors))
    assert sizes[1] <= 0.58 * sizes[0]
