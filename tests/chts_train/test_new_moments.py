"""Second moments of new links, estimated from the links around them."""

from __future__ import annotations

import pytest
import torch

from chts_kernels import SparseWeight
from chts_train import SparseLinear, TopologyEvolver, TopologySchedule
from chts_train.new_moments import estimate_

SCHEDULE = TopologySchedule(total_steps=20, interval=2, stop_fraction=1.0, zeta=0.5, lr_ramp_steps=0)


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_the_estimate_is_row_times_column_over_the_mean(n, dtype):
    layer = SparseLinear(24, 16, n=n)

    def dense(links: torch.Tensor) -> torch.Tensor:
        return SparseWeight(layer.ids, links.double(), n).to_dense()

    moment = torch.rand(layer.values.shape).to(dtype)
    ages = (torch.rand(moment.shape) > 0.15).to(torch.uint8)
    new = ages == 0
    moment[new] = 0
    before, old = moment.clone(), dense(ages)
    estimate_(layer, ages, [moment], "layer")
    assert torch.equal(moment[~new], before[~new])
    rows, columns = (dense(before).sum(axis) / old.sum(axis) for axis in (1, 0))
    expected = rows[:, None] * columns / (before.double().sum() / old.sum())
    found = dense(moment)[dense(new) > 0]
    torch.testing.assert_close(found, expected[dense(new) > 0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


def test_rows_and_columns_of_new_links_alone_get_the_mean():
    layer = SparseLinear(8, 8, n=1)
    ages = torch.ones(8, 2, dtype=torch.uint8)
    ages[3] = 0
    moment = torch.where(ages > 0, 2.0, 0.0)
    estimate_(layer, ages, [moment], "layer")
    assert torch.equal(moment, torch.full_like(moment, 2.0))
    ages[:] = 0
    moment = torch.zeros(8, 2)
    estimate_(layer, ages, [moment], "layer")
    assert torch.equal(moment, torch.zeros(8, 2))  # nothing to estimate from


@pytest.mark.parametrize("removal", ("soft", "moves"))
def test_an_update_estimates_what_is_new_and_nothing_else(removal):
    def train(new_moments):
        torch.manual_seed(0)
        layer = SparseLinear(32, 16)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2, amsgrad=True)
        regrowth = "random" if removal == "moves" else "soft"
        evolver = TopologyEvolver(layer, optimizer, SCHEDULE, removal=removal, regrowth=regrowth, new_moments=new_moments)
        for step in range(2):
            layer(torch.randn(8, 32)).square().sum().backward()
            if step == 1:
                before = optimizer.state[layer.values]["exp_avg_sq"].clone()
            if evolver.step():
                optimizer.step()
        return layer, optimizer.state[layer.values], evolver, before

    layer, state, evolver, before = train("estimated")
    _, plain, _, _ = train("zero")
    new = evolver.ages[""] == 0
    assert 0 < new.sum() < new.numel()
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(state[key][~new], plain[key][~new]) and (plain[key][new] == 0).all()
        assert (state[key][new] > 0).all() and state[key][new].max() < 50 * before.mean()
    assert (state["exp_avg"][new] == 0).all() and (layer.values[new] == 0).all()


def test_what_does_not_fit_is_refused():
    layer = SparseLinear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"new_moments: must be one of \['zero', 'estimated'\], got 'mean'"):
        TopologyEvolver(layer, optimizer, SCHEDULE, new_moments="mean")
    evolver = TopologyEvolver(layer, optimizer, SCHEDULE, new_moments="estimated")
    layer(torch.randn(2, 8)).sum().backward()
    assert evolver.step()
    optimizer.step()
    ids = layer.ids.clone()
    with pytest.raises(ValueError, match="new_moments: must be 'zero' with an optimizer that keeps no means .* got 'estimated' with SGD"):
        evolver.step()
    assert torch.equal(layer.ids, ids) and evolver.step_count == 1
    state = evolver.state_dict()
    other = TopologyEvolver(layer, optimizer, SCHEDULE)
    with pytest.raises(ValueError, match="new_moments: must be this evolver's 'zero', got 'estimated' in the state"):
        other.load_state_dict(state)
    del state["new_moments"]
    other.load_state_dict(state)  # of before there was a choice
    assert other.step_count == 1
