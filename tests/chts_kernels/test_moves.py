"""Moves of whole patterns: legal, within the budget, the best ones by brute force, the same however they are asked for."""

from __future__ import annotations

import math

import pytest
import torch

from chts_kernels import choose_moves, pattern_table, random_ids, unpack

SHAPES = [(4, 4), (8, 32), (64, 20)]


def _inputs(n, rows, columns, matrices=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([random_ids(rows, columns, n, seed=seed, layer=i) for i in range(matrices)])
    values = torch.randn(matrices, rows, columns * n // 4, generator=generator)
    return values, ids, torch.rand(matrices, rows, columns, generator=generator)


def _replaced(old, new, n):
    """Links of ``new`` that ``old`` lacks, by block."""
    masks = torch.from_numpy(pattern_table(n).masks).flatten(1)
    return (masks[new.long()] & ~masks[old.long()]).sum(-1)


def _by_hand(values, ids, n, growth, zeta):
    """One matrix, block by block in Python and float64."""
    masks = pattern_table(n).masks
    ones = unpack(torch.ones_like(values), ids, n).bool()
    kept = unpack(values, ids, n).abs().double()
    saliency = torch.where(ones, kept / kept[ones].mean(), growth.double() / growth[~ones].double().mean())
    proposals = []
    for place, id in enumerate(ids.flatten().tolist()):
        i, j = divmod(place, ids.shape[1])
        block = saliency[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].numpy()
        best = max(
            ((block[mask].sum() - block[masks[id]].sum()) / (mask & ~masks[id]).sum(), -other)
            for other, mask in enumerate(masks)
            if other != id
        )
        proposals.append((best[0], place, -best[1]))
    new, left = ids.flatten().clone(), int(zeta * values.numel())
    for _, place, other in sorted(proposals, key=lambda p: (-p[0], p[1])):
        left -= int((masks[other] & ~masks[int(new[place])]).sum())
        if left < 0:
            break
        new[place] = other
    return new.view_as(ids)


@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeta", [0.05, 0.2, 1.0])
def test_best_moves_by_brute_force(n, shape, zeta):
    values, ids, growth = _inputs(n, *shape)
    new = choose_moves(values, ids, n, growth, zeta=zeta, layers=(0, 1))
    for case in zip(values, ids, growth, new, strict=True):
        assert torch.equal(case[3], _by_hand(*case[:2], n, case[2], zeta))


@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize("temperature", [math.inf, 2.0])
@pytest.mark.parametrize("kind", ["gradient", "noisy", "random"])
def test_legal_and_within_the_budget(n, temperature, kind):
    values, ids, growth = _inputs(n, 96, 64, matrices=3)
    rule = {"temperature": temperature, "growth_noise": kind == "noisy", "layers": (0, 1, 2), "seed": 3}
    growth = None if kind == "random" else growth
    for zeta in (0.0, 0.001, 0.1, 0.15):
        new = choose_moves(values, ids, n, growth, zeta=zeta, **rule)
        assert new.dtype == torch.uint8 and new.shape == ids.shape and int(new.max()) < len(pattern_table(n))
        replaced = _replaced(ids, new, n).flatten(1).sum(1)
        budget = int(zeta * values[0].numel())
        assert bool((replaced <= budget).all()) and bool((replaced > budget - 4 * n).all()), (zeta, replaced)
    assert torch.equal(choose_moves(values, ids, n, growth, zeta=0.0, **rule), ids)
    everywhere = choose_moves(values, ids, n, growth, zeta=1.0, **rule)
    assert bool((everywhere != ids).all())  # a budget that covers every block's proposal moves every block


@pytest.mark.parametrize("n", [2, 1])
def test_each_matrix_is_on_its_own_and_noise_belongs_to_seed_layer_and_step(n):
    values, ids, _ = _inputs(n, 32, 48, matrices=3)
    rule = {"zeta": 0.1, "temperature": 2.0, "seed": 5, "step": 7}
    together = choose_moves(values, ids, n, layers=(4, 9, 2), **rule)
    for i, layer in enumerate((4, 9, 2)):
        assert torch.equal(together[i], choose_moves(values[i : i + 1], ids[i : i + 1], n, layers=[layer], **rule)[0])
    assert torch.equal(together, choose_moves(values, ids, n, layers=(4, 9, 2), **rule))
    for other in ({"seed": 6}, {"step": 8}, {"layers": (4, 9, 3)}):
        changed = choose_moves(values, ids, n, **{"layers": (4, 9, 2), **rule, **other})
        assert not torch.equal(changed, together)


@pytest.mark.parametrize("n", [2, 1])
def test_ties_go_to_the_lowest_id_and_the_first_place(n):
    ids = torch.full((1, 6, 5), len(pattern_table(n)) - 1, dtype=torch.uint8)
    values, growth = torch.ones(1, 24, 5 * n), torch.zeros(1, 24, 20)
    new = choose_moves(values, ids, n, growth, zeta=0.3)
    moved = (new != ids).flatten()
    assert bool(moved.any()) and moved.tolist() == sorted(moved.tolist(), reverse=True)  # a prefix of the blocks
    assert new.flatten()[moved].tolist() == [0] * int(moved.sum())  # every pattern costs 1 per link


def test_what_is_small_goes_and_what_promises_much_comes():
    values, ids, growth = _inputs(2, 64, 64, matrices=1)
    growth = torch.zeros_like(growth)
    ones = unpack(torch.ones_like(values[0]), ids[0], 2).bool()
    wanted = torch.zeros_like(ones)
    wanted[::8, ::8] = True
    growth[0][wanted] = 1e3
    new = choose_moves(values, ids, 2, growth, zeta=0.05)
    after = unpack(torch.ones_like(values[0]), new[0], 2).bool()
    assert bool(after[wanted & ~ones].all())
    lost = unpack(values[0], ids[0], 2)[ones & ~after].abs()
    assert lost.mean() < 0.8 * values.abs().mean()


def test_diverged_numbers_stay_in_sight():
    values, ids, growth = _inputs(2, 16, 16, matrices=1)
    values[0, 3, 2], values[0, 9, 1], growth[0, 5, 5] = math.nan, -math.inf, math.inf
    new = choose_moves(values, ids, 2, growth, zeta=0.2)
    before = unpack(values[0], ids[0], 2)
    after = unpack(torch.ones_like(values[0]), new[0], 2).bool()
    assert bool(after[~before.isfinite()].all())


def test_half_precision_values_and_zeros():
    values, ids, growth = _inputs(2, 16, 32)
    same = choose_moves(values.bfloat16(), ids, 2, growth, zeta=0.1, layers=(0, 1))
    assert torch.equal(same, choose_moves(values.bfloat16().float(), ids, 2, growth, zeta=0.1, layers=(0, 1)))
    zeros = choose_moves(torch.zeros_like(values), ids, 2, torch.zeros_like(growth), zeta=0.1, layers=(0, 1))
    assert 0 < int(_replaced(ids, zeros, 2).sum()) <= 2 * int(0.1 * values[0].numel())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n": 3}, "n: must be 1 "),
        ({"ids": torch.zeros(4, 4, dtype=torch.uint8)}, r"ids: must have 3 dimensions \[L, N/4, K/4\], got \(4, 4\)"),
        ({"values": torch.zeros(2, 16, 4)}, r"values: must have shape \(2, 16, 8\), got \(2, 16, 4\)"),
        ({"growth": torch.zeros(2, 16, 8)}, r"growth: must have shape \(2, 16, 16\), got \(2, 16, 8\)"),
        ({"zeta": 1.5}, r"zeta: must be in \[0, 1\].*got 1.5"),
        ({"temperature": 0.0}, "temperature: must be at least"),
        ({"growth_weight": -1.0}, "growth_weight: must not be negative, got -1"),
        ({"layers": (0,)}, "layers: must have 2 entries, one for each matrix, got 1"),
        ({"seed": -1}, "seed: must be an integer"),
    ],
)
def test_refuses(change, message):
    values, ids, growth = _inputs(2, 16, 16)
    arguments = {"values": values, "ids": ids, "n": 2, "growth": growth, "layers": (0, 1), **change}
    with pytest.raises(ValueError, match=message):
        choose_moves(**arguments)
