"""torch.distributed.checkpoint from one world size to the next."""

from __future__ import annotations

import torch

from chts_train import TopologyEvolver

from .common import FOLDER, SCHEDULE, WORLD, close, make, mine, shard, single, train

BEFORE = {2: 1, 3: 2, 4: 2, 8: 4}
"""World size -> that of the job which wrote the checkpoint it reads."""


def _states(model, optimizer, evolver) -> dict:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "evolver": evolver.state_dict(),
    }


def _go_on(before: str, after: str, wrap) -> None:
    """Read one checkpoint, take 4 steps, write the next; compare with a single process that was never interrupted."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    model = wrap(make(seed=9))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE, seed=7).attach()
    state = _states(model, optimizer, evolver)
    assert evolver.step_count == 0  # the step that filled the optimizer's state did not count
    dcp.load(state, checkpoint_id=FOLDER / before, no_dist=WORLD == 1)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    evolver.load_state_dict(state["evolver"])
    done = evolver.step_count
    assert done >= 4 and done % 4 == 0
    train(model, optimizer, evolver, mine, steps=4, start=done)
    dcp.save(_states(model, optimizer, evolver), checkpoint_id=FOLDER / after, no_dist=WORLD == 1)
    model1, optimizer1, evolver1 = single(steps=done + 4)
    for name, layer in evolver1.layers.items():
        close(evolver.layers[name].ids, layer.ids, f"{name}.ids", True)
        close(evolver.layers[name].values, layer.values, f"{name}.values", False)
        close(evolver.ages[name], evolver1.ages[name], f"{name} ages", True)
        moment = optimizer.state[evolver.layers[name].values]["exp_avg_sq"]
        close(moment, optimizer1.state[layer.values]["exp_avg_sq"], f"{name} moments", False)
    assert evolver.updates == evolver1.updates == (done + 4) // 3


def check_checkpoint_of_another_world_size():
    """Uninterrupted in one process, and here: the first steps on fewer ranks, their torch.distributed.checkpoint read back."""
    _go_on(f"dcp-{BEFORE[WORLD]}", f"dcp-{WORLD}", shard)


def first_checkpoint() -> None:
    """What world size 2 reads: one process, no process group."""
    import torch.distributed.checkpoint as dcp

    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE, seed=7)
    train(model, optimizer, evolver, lambda x: [x], steps=4)
    dcp.save(_states(model, optimizer, evolver), checkpoint_id=FOLDER / "dcp-1", no_dist=True)


def back_on_one() -> None:
    """One process without a group goes on from what 2 ranks wrote."""
    _go_on("dcp-2", "dcp-back", lambda model: model)
