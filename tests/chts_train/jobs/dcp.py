"""torch.distributed.checkpoint from one world size to the next."""

from __future__ import annotations

import torch

from chts_train import TopologyEvolver

from .common import FOLDER, SCHEDULE, WORLD, close, make, mine, shard, single, train


def check_checkpoint_of_another_world_size():
    """Uninterrupted in one process, and here: the first steps on fewer ranks, their torch.distributed.checkpoint read back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    before = FOLDER / f"dcp-{WORLD - 1}"
    model = shard(make(seed=9))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE, seed=7).attach()
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "evolver": evolver.state_dict(),
    }
    assert evolver.step_count == 0  # the step that filled the optimizer's state did not count
    dcp.load(state, checkpoint_id=before)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    evolver.load_state_dict(state["evolver"])
    done = WORLD * 4 - 4
    assert evolver.step_count == done
    train(model, optimizer, evolver, mine, steps=4, start=done)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "evolver": evolver.state_dict(),
    }
    dcp.save(state, checkpoint_id=FOLDER / f"dcp-{WORLD}")
    model1, optimizer1, evolver1 = single(steps=done + 4)
    for name, layer in evolver1.layers.items():
        close(evolver.layers[name].ids, layer.ids, f"{name}.ids", True)
        close(evolver.layers[name].values, layer.values, f"{name}.values", False)
        close(evolver.ages[name], evolver1.ages[name], f"{name} ages", True)
        moment = optimizer.state[evolver.layers[name].values]["exp_avg_sq"]
        close(moment, optimizer1.state[layer.values]["exp_avg_sq"], f"{name} moments", False)
    assert evolver.updates == evolver1.updates == (done + 4) // 3


def first_checkpoint() -> None:
    """What world size 2 reads: one process, no process group."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE, seed=7)
    train(model, optimizer, evolver, lambda x: [x], steps=4)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "evolver": evolver.state_dict(),
    }
    dcp.save(state, checkpoint_id=FOLDER / "dcp-1", no_dist=True)
