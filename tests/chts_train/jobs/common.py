"""What the checks of a job of several processes share: a small model, its training in one process, comparisons."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from chts_train import SparseLinear, SparsityConfig, TopologyEvolver, TopologySchedule, sparsify_
from chts_train.distributed import gathered

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
JOBS_DEVICE = os.environ.get("JOBS_DEVICE", "cpu")
DEVICE = torch.device("cuda", RANK) if JOBS_DEVICE == "cuda" else torch.device(JOBS_DEVICE)
BATCH, STEPS = 48, 8  # two equal parts for each of up to 8 ranks
SCHEDULE = TopologySchedule(total_steps=20, interval=3, stop_fraction=1.0, zeta=0.3, lr_ramp_steps=2)
# 20 rows over 2 ranks cut a 4x4 block, over 3 ranks also unevenly (7, 7, 6); 4 rows leave the third of 3 ranks without any.
SIZES = (12, 20, 4, 12)


def make(n: int = 2, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    first, second, third = (nn.Linear(a, b) for a, b in zip(SIZES[:-1], SIZES[1:], strict=True))
    model = nn.Sequential(first, nn.GELU(), second, nn.LayerNorm(4), third).double()
    model.to(DEVICE)
    sparsify_(model, SparsityConfig(n=n, seed=seed))
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randn(BATCH, SIZES[0], generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(DEVICE)


def train(model, optimizer, evolver, shares, steps=STEPS, start=0, network=None, clip=None, sync=None):
    """``shares``: batch -> the parts this process works on, each a mean of the loss over BATCH / len rows of the batch."""
    for step in range(start + 1, start + steps + 1):
        parts = shares(batch(step))
        for number, part in enumerate(parts, 1):
            loss = (model if network is None else network)(part).square().mean() / len(parts)
            if sync is not None:
                sync(number == len(parts), loss)
            else:
                loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if evolver._attached or evolver.step():
            optimizer.step()
        optimizer.zero_grad()


def mine(x: torch.Tensor) -> list[torch.Tensor]:
    return [x.chunk(WORLD)[RANK]]


def single(n=2, kind=torch.optim.Adam, passes=1, steps=STEPS, clip=None, **rule):
    """The same training in one process, whose passes are the ranks' shares in their order."""
    model = make(n)
    optimizer = kind(model.parameters(), lr=1e-2)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE, seed=7, verify=False, **rule)
    train(model, optimizer, evolver, lambda x: x.chunk(WORLD * passes), steps, clip=clip)
    return model, optimizer, evolver


def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for module in model:
        if isinstance(module, SparseLinear):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def close(a: torch.Tensor, b: torch.Tensor, what: str, exact: bool) -> None:
    a = gathered(a)
    assert a.shape == b.shape and a.dtype == b.dtype, what
    if exact and (DEVICE.type == "cpu" or not a.is_floating_point()):  # a GPU may add in another order
        assert torch.equal(a, b), f"{what}: {(a - b).abs().max()}"
    else:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=lambda text: f"{what}: {text}")


def same(ours, single_process, exact: bool) -> None:
    """Values, ids, moments, ages and figures of both."""
    (model, optimizer, evolver), (model1, optimizer1, evolver1) = ours, single_process
    named = dict(model.named_parameters())
    for name, parameter in model1.named_parameters():
        close(named[name], parameter, name, exact)
        for key, value in optimizer1.state[parameter].items():
            close(optimizer.state[named[name]][key], value, f"{name}.{key}", exact)
    for name, layer in evolver1.layers.items():
        close(evolver.layers[name].ids, layer.ids, f"{name}.ids", True)
        close(evolver.ages[name], evolver1.ages[name], f"{name} ages", True)
    assert (evolver.step_count, evolver.updates) == (evolver1.step_count, evolver1.updates) == (STEPS, 2)
    for row, row1 in zip(evolver.stats(), evolver1.stats(), strict=True):
        assert row.keys() == row1.keys()
        for key, value in row1.items():
            if isinstance(value, float) and DEVICE.type == "cuda":
                assert math.isclose(row[key], value, rel_tol=1e-9, abs_tol=1e-12), (row, row1)
            else:
                assert row[key] == value, (row, row1)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def hidden_group():
    """No process group for what runs inside."""
    from unittest import mock

    return mock.patch.object(dist, "is_initialized", lambda: False)


def count_calls(name):
    """How often ``torch.distributed.<name>`` was called since."""
    original, calls = getattr(dist, name), []

    def counting(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    setattr(dist, name, counting)

    def stop() -> int:
        setattr(dist, name, original)
        return len(calls)

    return stop
