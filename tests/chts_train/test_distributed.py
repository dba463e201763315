"""Jobs of 2, 3, 4 and 8 gloo processes, each started once; and what needs no second process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chts_kernels import carry_over_, random_ids
from chts_train import SparseLinear, TopologyEvolver, TopologySchedule, sparsify_
from chts_train.distributed import (
    RankCheck,
    TopologyMismatch,
    carry_over_rows_,
    checksums,
    gathered,
    laid_out_like,
    must_agree,
    plain_name,
    unwrapped,
    whole_tree,
)
from tests.chts_train.jobs.launch import NAMES, read, require_ok, start

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

WORLDS = 2, 3, 4, 8
SOME = ("check_ddp_is_a_single_process", "check_a_rank_that_differs_is_named", "check_fsdp_is_a_single_process",
        "check_gathered_together", "check_checkpoint_of_another_world_size", "check_trainer_is_a_single_process")  # fmt: skip
"""What 4 and 8 processes run, which have most to do with starting."""


def names_of(world: int) -> list[str]:
    """Compiling takes most of the time, and a third process adds nothing to it."""
    if world >= 4:
        return list(SOME)
    return [name for name in NAMES if world == 2 or "compiled" not in name]


CASES = [(world, name) for world in WORLDS for name in names_of(world)] + [(1, "back_on_one")]


@pytest.fixture(scope="session")
def jobs(tmp_path_factory, text_folder):
    """{world: [results of every rank]}. The jobs hand their distributed checkpoint on: 1 -> 2 -> 3 processes, 2 -> 4 -> 8, and 2 -> 1."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "text").symlink_to(text_folder)
    start(folder, 1, ["first_checkpoint"])
    results = {}
    for world in WORLDS:
        start(folder, world, names_of(world))
        results[world] = read(folder, world)
    start(folder, 1, ["back_on_one"])
    results[1] = read(folder, 1)
    return results


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world", "name"), CASES)
def test_in_a_job(jobs, world, name):
    require_ok(jobs[world], [name])


# --- without other processes


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("matrices", (1, 3))
def test_rows_of_a_shard_move_as_they_do_in_the_whole(n, matrices):
    ids = [[random_ids(20, 12, n, seed=seed, layer=layer) for layer in range(matrices)] for seed in (1, 2)]
    layers = [
        [torch.randn(20, 3 * n), torch.randint(0, 255, (20, 3 * n), dtype=torch.uint8), torch.randn(20, 3 * n).bfloat16()]
        for _ in range(matrices)
    ]
    expected = [[t.clone() for t in tensors] for tensors in layers]
    for tensors, old, new in zip(expected, *ids, strict=True):
        carry_over_(tensors, old, new, n)
    for cuts in ((0, 7, 14, 20), (0, 10, 20), (0, 4, 20), (0, 20), (0, 1, 2, 19, 20), (0, 0, 20, 20)):
        shards = [[[t[a:b].clone() for t in tensors] for tensors in layers] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        for start_row, shard in zip(cuts, shards, strict=False):
            carry_over_rows_(shard, *ids, n, start_row)
        for layer, tensors in enumerate(expected):
            for index, whole in enumerate(tensors):
                assert torch.equal(torch.cat([shard[layer][index] for shard in shards]), whole), cuts
    carry_over_rows_([], [], [], n, 0)


def checksum(ids: torch.Tensor) -> int:
    return checksums([ids]).item()


def test_checksums_tell_ids_and_places_apart():
    ids = random_ids(40, 20, seed=0)
    seen = {checksum(ids)}
    assert checksum(ids.clone()) in seen and checksum(ids.view(5, 10)) in seen
    for place in range(ids.numel()):
        other = ids.clone().flatten()
        other[place] = (other[place] + 1) % 90
        seen.add(checksum(other))
    assert len(seen) == 1 + ids.numel()
    assert checksum(ids.flatten().roll(1)) not in seen and checksum(ids.t().contiguous()) not in seen
    part = ids.flatten()[3:]  # an address that is no multiple of 8
    assert checksum(part) == checksum(part.clone())
    assert len({checksum(torch.full((count,), 5, dtype=torch.uint8)) for count in (7, 8, 9)}) == 3


@pytest.mark.parametrize("chunk", (1, 70, 1 << 20))
def test_checksums_of_many_layers_name_the_one_that_differs(monkeypatch, chunk):
    monkeypatch.setattr("chts_train.distributed.CHUNK", chunk)
    layers = [random_ids(4 * rows, 4 * columns, seed=rows) for rows, columns in ((3, 5), (1, 1), (8, 8), (3, 5), (2, 9))]
    sums = checksums(layers)
    assert sums.shape == (5,) and torch.equal(checksums([layer.clone() for layer in layers]), sums)
    for place, layer in enumerate(layers):
        for block in range(0, layer.numel(), 7):
            others = [other.clone() for other in layers]
            others[place].view(-1)[block] += 1
            assert (checksums(others) != sums).nonzero().flatten().tolist() == [place]


def test_the_message_names_layers_and_the_minority():
    check = RankCheck()
    sums = torch.tensor([[1, 5, 9], [1, 6, 9], [1, 5, 8], [1, 5, 7]])
    check._pending = (["a", "model.b", "c"], "after the update at step 4", sums, None)
    with pytest.raises(TopologyMismatch) as info:
        check.finish()
    assert "after the update at step 4, got others in 'model.b' (rank 1), 'c' (ranks 2, 3);" in str(info.value)
    check.finish()  # said once
    check._pending = (["a"], "", torch.ones(3, 1), None)
    check.poll()
    assert check._pending is None


def test_one_process_compares_nothing():
    assert not must_agree()
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify_(model)
    evolver = TopologyEvolver(model, torch.optim.SGD(model.parameters(), lr=0.1), TopologySchedule(4, interval=1))
    assert evolver.step() is False


def test_wrappers_do_not_change_names():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    sparsify_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1].compile(backend="aot_eager")
    network = torch.compile(nn.DataParallel(model), backend="aot_eager")
    assert unwrapped(network) is model
    assert plain_name("layers.0._orig_mod.mlp._checkpoint_wrapped_module.up") == "layers.0.mlp.up"
    assert list(TopologyEvolver(network, optimizer, TopologySchedule(4)).layers) == ["0", "1.0"]
    model[1] = torch.compile(model[1], backend="aot_eager")
    assert list(TopologyEvolver(model, optimizer, TopologySchedule(4)).layers) == ["0", "1.0"]


def test_whole_tensors_pass_through():
    tensor = torch.ones(3)
    assert gathered(tensor) is tensor and laid_out_like(tensor, torch.zeros(3)) is tensor
    tree = {"a": [tensor, 1], "b": ("x", None)}
    assert whole_tree(tree) == tree


def test_a_layer_gets_its_pattern_with_its_memory():
    layer = SparseLinear(12, 8, n=1, device="meta")
    assert layer.ids.is_meta and layer.values.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    layer.weight.validate()
    assert layer(torch.randn(2, 12)).isfinite().all()
    assert torch.equal(layer.ids, random_ids(8, 12, 1, seed=layer._origin[0]))
    with pytest.raises(ValueError, match="init: must be 'random' for a layer on the meta device, got 'magnitude'"):
        SparseLinear.from_linear(nn.Linear(8, 8, device="meta"))
