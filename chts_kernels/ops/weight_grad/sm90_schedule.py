"""Which CTA does what: the lists of pieces that the sm_90 weight gradient works through. Host arithmetic, no device.

A *piece* is a tile and a range of its K blocks (64 tokens each). Whole tiles are dealt in waves. What does not fill a wave is
cut along tokens, so that all CTAs get the same number of blocks and, as far as possible, all work on the same tokens at the
same time: rows of dY and X are then fetched once for many tiles. (A plain cut of one long line of blocks into equal parts puts
every CTA at a different token: measured 1.5-2x slower.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .sm90_config import CONFIGS, STEP, DwConfig

COUNTERS = 256  # counters of split tiles that one call has
SHORTEST = 4  # blocks: a shorter piece costs more than the balance it brings
# Cost model, in units of one 64-token block of a 128x256 tile (0.55-0.7 us on an H100); fitted to the measurements in
# benchmarks/LOG.md. Clusters lose 2-3 us wherever tiles are cut. The exact product gains nothing from them; the sparse one, which
# asks for X at up to twice the rate, gains up to 20 % where CTAs have many waves to drift apart and loses 2-5 % at four waves.
TILE_COST = 1.0  # epilogue of a whole tile
PIECE_COST = 5.0  # writing a partial tile, waiting for the other contributors, adding
TAIL_MARGIN = 1.05  # cutting the last wave must promise this: it takes a workspace and disturbs the other tiles' shared reading
EFFICIENCY = {"128x256": 1.0, "256x128": 0.98, "128x192": 0.95}
SPARSE_EFFICIENCY = {"sparse128x256": 2.0, "sparse128x256c2x": 2.15}
CLUSTER_WAVES = 8  # fewer whole waves take no clusters; measured: 4 waves lose, 13 win


@dataclass(frozen=True)
class Work:
    """A configuration, the number of CTAs (in a clustered configuration: clusters, below too), may tiles be cut along tokens."""

    config: DwConfig
    ctas: int
    split: bool


Piece = tuple[int, int, int]  # tile, first block, end


def share(tiles: list[int], start: float, end: float, ctas: list[int], found: dict[int, list[Piece]]) -> None:
    """Deal blocks [start, end) of every tile to the CTAs in equal parts, like Euclid's algorithm.

    With at least as many CTAs as tiles, each tile gets the same number of CTAs, a CTA's part of the tokens each, from the
    first token on; what is left of the tiles goes to the CTAs that are left. With fewer, each CTA takes as many tiles
    as it can whole, and what is left of the CTAs' time goes to the tiles that are left. No piece is shorter than SHORTEST.
    """
    if not tiles or not ctas or round(end) <= round(start):
        return
    part = len(tiles) * (end - start) / len(ctas)
    if len(ctas) >= len(tiles):
        each = len(ctas) // len(tiles)
        rest = ctas[each * len(tiles) :]
        if end - start - each * part < SHORTEST or part < SHORTEST:
            part, rest = (end - start) / each, []
        for i in range(each):
            low, high = round(start + i * part), round(start + (i + 1) * part)
            for j, tile in enumerate(tiles):
                if high > low:
                    found[ctas[i * len(tiles) + j]].append((tile, low, high))
        share(tiles, start + each * part, end, rest, found)
    else:
        each = len(tiles) // len(ctas)
        for i in range(each):
            for j, cta in enumerate(ctas):
                found[cta].append((tiles[i * len(ctas) + j], round(start), round(end)))
        share(tiles[each * len(ctas) :], start, end, ctas, found)


@functools.lru_cache(maxsize=256)
def pieces(tiles: int, blocks: int, ctas: int, split: bool) -> list[list[Piece]]:
    """The pieces of every CTA, in the order in which it does them."""
    waves = tiles // ctas if split else -(-tiles // ctas)
    found: dict[int, list[Piece]] = {cta: [] for cta in range(ctas)}
    for tile in range(min(tiles, waves * ctas)):
        found[tile % ctas].append((tile, 0, blocks))
    if split:
        share(list(range(waves * ctas, tiles)), 0, blocks, list(range(ctas)), found)
    return [found[cta] for cta in range(ctas)]


def position(tile: int, tiles_m: int, tiles_n: int, group: int) -> tuple[int, int]:
    """Row and column of the tile-th tile: column by column inside bands of ``group`` row tiles."""
    band, r = divmod(tile, group * tiles_n)
    size = min(tiles_m - band * group, group)
    return band * group + r % size, r // size


def table(tiles_m: int, tiles_n: int, blocks: int, work: Work) -> tuple[np.ndarray, np.ndarray, int]:
    """The lists in the kernel's format: pieces int32 [count, 8] (row tile, column tile, first block, blocks; slot or -1, first slot
    of the tile, its contributors, its counter); starts int32 [ctas, 8] (the first half of the CTA's first piece; its
    index and that of the piece after the last; -, -); number of slots."""
    lists = pieces(tiles_m * tiles_n, blocks, work.ctas, work.split)
    parts: dict[int, list[tuple[int, int]]] = {}  # split tile -> (first block, CTA), in token order
    for cta, own in enumerate(lists):
        for tile, low, high in own:
            if (low, high) != (0, blocks):
                parts.setdefault(tile, []).append((low, cta))
    slots, slot_of, first_of = 0, {}, {}
    for tile in sorted(parts):
        first_of[tile] = slots
        for low, cta in sorted(parts[tile]):
            slot_of[tile, low, cta] = slots
            slots += 1
    counter_of = {tile: i for i, tile in enumerate(sorted(parts))}
    starts: list[tuple[int, ...]] = []
    rows: list[tuple[int, ...]] = []
    for cta, own in enumerate(lists):
        first = len(rows)
        for tile, low, high in own:
            m, n = position(tile, tiles_m, tiles_n, work.config.group)
            slot = slot_of.get((tile, low, cta), -1)
            rows.append((m, n, low, high - low, slot, first_of.get(tile, 0), len(parts.get(tile, ())), counter_of.get(tile, 0)))
        head = rows[first][:4] if own else (0, 0, 0, 0)
        starts.append((*head, first, len(rows), 0, 0))
    return np.array(starts, np.int32), np.array(rows, np.int32).reshape(-1, 8), slots


def waves(out_features: int, in_features: int, config: DwConfig, sms: int) -> int:
    """Waves that all CTAs take part in."""
    return -(-out_features // config.rows) * -(-in_features // config.columns) // (sms // config.cluster)


def works(tokens: int, out_features: int, in_features: int, config: DwConfig, sms: int) -> list[tuple[float, Work]]:
    """(cost, work) of the ways to divide one problem with one configuration: whole tiles; cut over all CTAs; cut over the
    largest number of CTAs that gives every tile the same number."""
    blocks = -(-tokens // STEP)
    tiles = -(-out_features // config.rows) * -(-in_features // config.columns)
    slots = sms // config.cluster
    found = [Work(config, min(tiles, slots), False)]
    full, rest = divmod(tiles, slots)
    if rest and rest * config.cluster <= COUNTERS and blocks > 1:
        for ctas in {slots} if full else {slots, rest * (slots // rest)}:
            ctas = min(ctas, rest * blocks)
            if ctas > rest:
                found.append(Work(config, ctas, True))
    area = config.bm * config.bn / (128 * 256)
    scale = 2 if config.sparse else 1  # a sparse block takes half the time, its epilogue the same
    costs = []
    for work in found:
        lists = pieces(tiles, blocks, work.ctas, work.split)
        ends = {blocks: TILE_COST * scale}
        longest = max(sum(high - low + ends.get(high - low, PIECE_COST * scale) for _, low, high in own) for own in lists)
        costs.append(longest * area * (TAIL_MARGIN if work.split and full else 1.0))
    return list(zip(costs, found, strict=True))


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, out_features: int, in_features: int, sms: int, sparse: bool = False) -> Work:
    """The division of one problem with the least predicted time."""
    every = [
        (cost / efficiency, work)
        for name, efficiency in (SPARSE_EFFICIENCY if sparse else EFFICIENCY).items()
        for cost, work in works(tokens, out_features, in_features, CONFIGS[name], sms)
        if work.config.cluster == 1 or waves(out_features, in_features, work.config, sms) >= CLUSTER_WAVES
    ]
    return min(every, key=lambda item: item[0])[1]
