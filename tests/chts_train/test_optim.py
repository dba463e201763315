"""Optimizers by name and the learning-rate schedule."""

import math

import pytest
import torch
from torch import nn

from chts_train.optim import make_optimizer, make_scheduler, parameter_groups


def rates(steps, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    scheduler = make_scheduler(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warm_up_then_cosine():
    found = rates(121, total_steps=110, warmup_steps=10, min_lr_ratio=0.1)
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert found[10] == pytest.approx(2.0)
    assert found[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[35] == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))
    assert found[110:] == pytest.approx([0.2] * 11)


def test_no_warm_up_and_only_warm_up():
    assert rates(2, total_steps=1, warmup_steps=0, min_lr_ratio=0.0) == [2.0, 0.0]
    assert rates(4, total_steps=4, warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"total_steps": 0, "warmup_steps": 0}, "total_steps: must be at least 1, got 0"),
        ({"total_steps": 5, "warmup_steps": 6}, r"warmup_steps: must be in \[0, total_steps = 5\], got 6"),
        ({"total_steps": 5, "warmup_steps": 0, "min_lr_ratio": 2}, r"min_lr_ratio: must be in \[0, 1\], got 2"),
    ],
)
def test_schedule_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        rates(1, **options)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.token = nn.Linear(4, 4), nn.LayerNorm(4), nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    def no_weight_decay(self):
        return {"token"}


def test_parameter_groups():
    model = Model()
    decayed, plain = parameter_groups(model, 0.05)
    assert [p.shape for p in decayed["params"]] == [(4, 4)] and decayed["weight_decay"] == 0.05
    assert len(plain["params"]) == 4 and plain["weight_decay"] == 0.0
    (only,) = parameter_groups(model, 0.0)
    assert len(only["params"]) == 5


@pytest.mark.parametrize("name, kind", [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")])
def test_optimizers_by_name(name, kind):
    optimizer = make_optimizer(name, Model(), lr=0.1, weight_decay=0.1)
    assert type(optimizer).__name__ == kind and len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("lion", {"lr": 0.1}, r"optimizer: must be one of \['adam', 'adamw', 'sgd'\], got 'lion'"),
        ("adam", {"lr": 0.0}, "lr: must be positive and finite, got 0.0"),
        ("adam", {"lr": 0.1, "weight_decay": -1}, "weight_decay: must not be negative, got -1"),
    ],
)
def test_optimizer_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, Model(), **options)
