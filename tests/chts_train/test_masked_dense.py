"""Compressed training equals masked-dense training, step by step and through topology updates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from chts_kernels import evolve, unpack
from chts_kernels.format import SparseWeight
from chts_train import SparsityConfig, TopologyEvolver, TopologySchedule, sparse_layers, sparsify_

SCHEDULE = TopologySchedule(total_steps=24, interval=4, zeta=0.3, t_end=3.0, lr_ramp_steps=2)
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}


def _model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 24, bias=False), nn.GELU(), nn.Linear(24, 8)).to(dtype)


class MaskedDense:
    """The same training with dense weights, dense moments and explicit masks: what compression must not change."""

    def __init__(self, dense: nn.Module, sparse: nn.Module, make_optimizer) -> None:
        self.model = copy.deepcopy(dense)
        self.layers = sparse_layers(sparse)
        self.modules = {name: self.model.get_submodule(name) for name in self.layers}
        self.ids = {name: layer.ids.clone() for name, layer in self.layers.items()}
        for name, module in self.modules.items():
            module.weight.data *= self.mask(name)
        self.optimizer = make_optimizer(self.model.parameters())

    def mask(self, name: str) -> torch.Tensor:
        ids, n = self.ids[name], self.layers[name].n
        return unpack(torch.ones(ids.shape[0] * 4, ids.shape[1] * n, dtype=torch.float64), ids, n)

    def mask_gradients(self) -> None:
        for name, module in self.modules.items():
            module.weight.grad *= self.mask(name)

    def update(self, step: int) -> None:
        """The same topology decision, made from the dense weights; links that left lose weight and moments."""
        for index, (name, module) in enumerate(self.modules.items()):
            n = self.layers[name].n
            ids = self.ids[name].clone()
            compressed = SparseWeight(ids, _gather(module.weight.detach(), ids, n), n)
            evolve(compressed, zeta=SCHEDULE.zeta, temperature=SCHEDULE.temperature(step), seed=5, layer=index, step=step)
            stays = self.mask(name)
            self.ids[name] = ids
            stays *= self.mask(name)
            state = self.optimizer.state[module.weight]
            for tensor in [module.weight.data, *(v for v in state.values() if v.shape == module.weight.shape)]:
                tensor *= stays


def _gather(dense: torch.Tensor, ids: torch.Tensor, n: int) -> torch.Tensor:
    mask = unpack(torch.ones(ids.shape[0] * 4, ids.shape[1] * n), ids, n).bool()
    return dense[mask].view(dense.shape[0], -1)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_compressed_training_equals_masked_dense_training(name, n, dtype, tolerance):
    dense = _model(dtype)
    sparse = copy.deepcopy(dense)
    sparsify_(sparse, SparsityConfig(n=n, seed=3))
    optimizer = OPTIMIZERS[name](sparse.parameters())
    evolver = TopologyEvolver(sparse, optimizer, SCHEDULE, seed=5)
    mirror = MaskedDense(dense, sparse, OPTIMIZERS[name])
    assert sparse_layers(sparse).keys() == {"0", "2", "4"}

    updates = 0
    for step in range(1, SCHEDULE.total_steps + 1):
        x = torch.randn(20, 16, dtype=dtype)
        target = torch.randn(20, 8, dtype=dtype)
        losses = []
        for model in (sparse, mirror.model):
            model.zero_grad()
            losses.append(nn.functional.mse_loss(model(x), target))
            losses[-1].backward()
        assert torch.allclose(*losses, rtol=tolerance, atol=tolerance)
        mirror.mask_gradients()
        if evolver.step():
            optimizer.step()
            scale = SCHEDULE.lr_scale(step)
            for group in mirror.optimizer.param_groups:
                group["lr"] = 1e-2 * scale
            mirror.optimizer.step()
            for key in mirror.modules:  # NAdam and AdamW leave masked weights at zero; make it plain
                assert not mirror.modules[key].weight[mirror.mask(key) == 0].any()
        else:
            updates += 1
            mirror.update(step)
        for key, layer in mirror.layers.items():
            module = mirror.modules[key]
            assert torch.equal(layer.ids, mirror.ids[key])
            torch.testing.assert_close(layer.weight.to_dense(), module.weight, rtol=tolerance, atol=tolerance)
            dense_state = mirror.optimizer.state[module.weight]
            for entry, moment in optimizer.state[layer.values].items():
                if moment.shape == layer.values.shape:
                    expected = _gather(dense_state[entry], layer.ids, n)
                    torch.testing.assert_close(moment, expected, rtol=tolerance, atol=tolerance)
    assert updates == 4  # steps 4, 8, 12, 16: 20 lies beyond 0.75 * 24
