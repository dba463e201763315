"""DistributedDataParallel: one training, and ranks that differ."""

from __future__ import annotations

import torch
from torch import nn

from chts_train import TopologyEvolver
from chts_train.distributed import TopologyMismatch
from chts_train.parallel import Processes

from .common import DEVICE, RANK, SCHEDULE, STEPS, WORLD, batch, count_calls, ddp, make, mine, same, single, train


def check_ddp_is_a_single_process():
    for n, attached, rule in ((2, True, {}), (1, False, {}), (2, False, {"new_moments": "estimated"})):
        model = make(n)
        network = ddp(model)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        evolver = TopologyEvolver(network, optimizer, SCHEDULE, seed=7, **rule)
        if attached:
            evolver.attach()
        sent = count_calls("all_gather")
        train(model, optimizer, evolver, mine, network=network)
        assert sent() == 3, sent()  # before the first step, and after each of the two updates
        same((model, optimizer, evolver), single(n, **rule), exact=WORLD == 2)


def check_ddp_accumulates_and_clips():
    model = make()
    network = ddp(model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    evolver = TopologyEvolver(network, optimizer, SCHEDULE, seed=7).attach()

    for step in range(1, STEPS + 1):
        parts = batch(step).chunk(WORLD)[RANK].chunk(2)
        with network.no_sync():
            (network(parts[0]).square().mean() / 2).backward()
        (network(parts[1]).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    same((model, optimizer, evolver), single(kind=torch.optim.AdamW, passes=2, clip=0.05), exact=False)


def check_ddp_grows_by_the_gradient_of_all_ranks():
    rule = {"removal": "moves", "regrowth": "gradient"}
    for n in (2, 1):
        model = make(n)
        network = ddp(model)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        evolver = TopologyEvolver(network, optimizer, SCHEDULE, seed=7, **rule)
        train(model, optimizer, evolver, mine, network=network)
        same((model, optimizer, evolver), single(n, **rule), exact=WORLD == 2)


def check_ddp_gives_every_rank_the_first_ones_patterns():
    model = make(seed=RANK)
    network = ddp(model)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), make(seed=0).buffers(), strict=True))
    network(batch(1)).sum().backward()
    # Two forward passes before a backward pass. By default torch before 2.13 writes buffers again in both, and autograd refuses what
    # it saved of them, of any module.
    network = Processes(RANK, WORLD, "ddp").wrap(model, DEVICE)
    (network(batch(1)).sum() + network(batch(2)).sum()).backward()


def check_a_rank_that_differs_is_named():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE, seed=7)
    for _ in range(2):
        evolver.step()
    if RANK == WORLD - 1:
        model[4].ids[0, 0] = (model[4].ids[0, 0] + 1) % 90
        with torch.no_grad():
            model[4].values.mul_(-1)
    try:
        evolver.step()
        evolver.state_dict()  # waits for the figures of a GPU
    except TopologyMismatch as error:
        text = str(error)
        assert f"after the update at step 3, got others in '4' (rank {WORLD - 1})" in text, text
        assert "'0'" not in text and "'2'" not in text, text
    else:
        raise AssertionError("not noticed")
    odd = [str(rank) for rank in range(WORLD) if rank % 2]
    others = f"rank{'s' * (len(odd) > 1)} {', '.join(odd)}"
    other = make(seed=RANK % 2)
    evolver = TopologyEvolver(other, torch.optim.SGD(other.parameters(), lr=0.1), SCHEDULE)
    try:
        evolver.step()
        evolver.state_dict()
    except TopologyMismatch as error:
        assert "before the first step" in str(error) and f"({others})" in str(error), error
    else:
        raise AssertionError("not noticed")
    sent = count_calls("all_gather")
    evolver = TopologyEvolver(other, torch.optim.SGD(other.parameters(), lr=0.1), SCHEDULE, verify=False)
    assert [evolver.step() for _ in range(3)] == [True, True, False] and sent() == 0


def check_compiled_ddp():
    model = make()
    network = torch.compile(ddp(model), backend="aot_eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    evolver = TopologyEvolver(network, optimizer, SCHEDULE, seed=7)
    assert list(evolver.layers) == ["0", "2", "4"]
    train(model, optimizer, evolver, mine, network=network)
    same((model, optimizer, evolver), single(), exact=WORLD == 2)
