"""Counted memory against the tensors that are there, and the promise of the README."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chts_train import FusedAdamW, SparseLinear, SparsityConfig, sparsify_
from chts_train.cli import main
from chts_train.configs import preset
from chts_train.memory import sparse_memory, weight_memory


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize(("dtype", "moments"), [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)])
def test_counted_is_what_is_there(n, dtype, moments):
    layer = SparseLinear(36, 72, bias=False, n=n, dtype=dtype)
    optimizer = FusedAdamW(layer.parameters(), model=nn.Sequential(layer), moment_dtype=moments)
    layer.weight.operands(torch.bfloat16)
    layer.values.grad = torch.zeros_like(layer.values)
    optimizer.step()
    operands = layer.weight.operands(torch.bfloat16)
    counted, _ = sparse_memory([layer], moment_dtype=moments)
    shared = layer.values.nbytes if operands.values.data_ptr() == layer.values.data_ptr() else 0
    assert counted.parameters == layer.values.nbytes and counted.gradients == layer.values.grad.nbytes
    assert counted.optimizer == sum(optimizer.state[layer.values][key].nbytes for key in ("exp_avg", "exp_avg_sq"))
    assert counted.operands == operands.nbytes - shared and counted.ids == layer.ids.nbytes


@pytest.mark.parametrize("name", ("60m", "130m", "1b", "vit-base"))
@pytest.mark.parametrize(
    ("keep", "moments", "most"), [(True, None, 0.58), (False, None, 0.45), (True, torch.bfloat16, 0.47), (False, torch.bfloat16, 0.34)]
)
def test_models_need_a_fraction_of_dense_mixed_precision(name, keep, moments, most):
    with torch.device("meta"):
        model = preset(name).build_model()
    sparsify_(model, SparsityConfig(keep_operands=keep))
    sparse, dense = sparse_memory(model, moment_dtype=moments)
    assert sparse.total <= most * dense.total
    assert dense.total == 18 * sum(16 * layer.ids.numel() for layer in model.modules() if isinstance(layer, SparseLinear))


def test_a_layer_that_keeps_no_operands_computes_the_same():
    layers = [SparseLinear(32, 64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].keep_operands = False
    x = torch.randn(5, 32)
    for layer in layers:
        layer(x).square().sum().backward()
    assert torch.equal(layers[0].values.grad, layers[1].values.grad)
    assert layers[1].weight.operands(torch.bfloat16) is not layers[1].weight.operands(torch.bfloat16)
    assert layers[1]._operands.nbytes == 0


def test_the_command_line_shows_a_preset(capsys):
    assert main(["info", "60m"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("training the sparse-able weights of 60m") and lines[1].split()[:2] == ["parameters", "gradients"]
    assert [line.split()[-1] for line in lines[2:4]] == ["1.000", "0.574"]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="model: must have at least one SparseLinear, got none"):
        sparse_memory(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="out_features"):
        weight_memory(6, 8)
