"""Tile shapes and token splits of the sm_90 weight gradient: what is legal, and what a problem gets. Data and arithmetic only.

A CTA computes bm rows (output features) times bn columns (input features) of dW with two warpgroups; a third one loads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..spmm.sm90_config import RESERVED, SHARED_LIMIT

STEP = 64  # tokens of a K block: one stage
COUNTERS = 256  # split tiles of one call at most


@dataclass(frozen=True)
class DwConfig:
    """bm x bn tile; ``stages`` of 64 tokens in flight; ``group`` row tiles form a band that keeps dY in L2 while X streams
    by; ``cluster`` CTAs stacked along the rows share every X tile by multicast; ``lag``: warpgroup 1 starts a stage late."""

    bm: int
    bn: int
    stages: int = 4
    group: int = 16
    cluster: int = 1
    lag: bool = True

    @property
    def name(self) -> str:
        extra = f"c{self.cluster}" * (self.cluster > 1) + f"s{self.stages}g{self.group}" + "nolag" * (not self.lag)
        return f"{self.bm}x{self.bn}{extra}"

    @property
    def chunk(self) -> int:
        """Registers of one accumulator tensor: Triton's tensors are powers of two."""
        regs = self.bn // 2
        return min(128, regs & -regs)

    @property
    def barriers(self) -> int:
        """Offset of the barriers from ``global_smem``."""
        return RESERVED + self.stages * (self.bm + self.bn) * STEP * 2

    @property
    def shared_bytes(self) -> int:
        return self.barriers + 2 * self.stages * 8


def why_illegal(config: DwConfig, split: bool) -> str | None:
    """None when the kernel can be built for ``config``, else the rule that it breaks."""
    c = config
    rules = [
        (c.bm in (128, 256), "bm must be 128 or 256"),
        (c.bn in (64, 128, 192, 256), "bn must be 64, 128, 192 or 256"),
        (c.bm * c.bn <= 256 * 192, "at most 192 accumulators a thread fit beside selectors and addresses"),
        (c.cluster in (1, 2), "cluster must be 1 or 2"),
        (c.bn // 64 % c.cluster == 0, "each CTA of a cluster loads whole 64-column slabs of X"),
        (c.cluster == 1 or not split, "a split along tokens takes single CTAs"),
        (c.stages >= 2, "stages must be at least 2"),
        (c.group >= 1, "group must be positive"),
        (c.shared_bytes <= SHARED_LIMIT, f"shared memory {c.shared_bytes} must not exceed {SHARED_LIMIT}"),
    ]
    return next((rule for holds, rule in rules if not holds), None)


@dataclass(frozen=True)
class Work:
    """``ctas`` CTAs (clusters); the first ``split_tiles`` tiles are cut along tokens, evenly over all of them."""

    config: DwConfig
    ctas: int
    split_tiles: int


CONFIGS: dict[str, DwConfig] = {
    "128x256": DwConfig(128, 256),
    "256x128": DwConfig(256, 128),
    "128x192": DwConfig(128, 192, 5),
    "256x192": DwConfig(256, 192, 4, 8),
    "128x256c2": DwConfig(128, 256, 4, 8, cluster=2),
}
# Cost model, in units of one 64-token block of a 128x256 tile at full rate
EFFICIENCY = {"128x256": 1.0, "256x128": 0.95}
TILE_COST = 0.6  # start and epilogue of a tile
SPLIT_COST = 4.0  # writing, waiting for and adding partial tiles
UNEVEN_COST = 1.5  # a CTA that holds pieces of two tiles


def works(tokens: int, out_features: int, in_features: int, config: DwConfig, sms: int) -> list[tuple[float, Work]]:
    """(cost, work) of every way to divide one problem with one configuration, whole tiles first."""
    blocks = -(-tokens // STEP)
    tiles = -(-out_features // (config.bm * config.cluster)) * -(-in_features // config.bn)
    slots = sms // config.cluster
    area = config.bm * config.bn / (128 * 256)
    full, rest = divmod(tiles, slots)
    found = [((full + (rest > 0)) * (blocks * area + TILE_COST), Work(config, min(tiles, slots), 0))]
    if rest and config.cluster == 1 and rest <= COUNTERS and blocks > 1:
        per_tile = slots // rest  # CTAs of one tile when each holds a piece of one tile only
        for ctas in {slots} if full else {slots, rest * per_tile}:
            ctas = min(ctas, rest * blocks)
            if ctas > rest:
                uneven = UNEVEN_COST if ctas % rest else 0.0
                own = -(-rest * blocks // ctas) * area
                cost = full * (blocks * area + TILE_COST) + own + SPLIT_COST * area + uneven
                found.append((cost, Work(config, ctas, rest)))
    return found


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, out_features: int, in_features: int, sms: int) -> Work:
    """The division of one problem with the least predicted time."""
    every = [
        (cost / efficiency, work)
        for name, efficiency in EFFICIENCY.items()
        for cost, work in works(tokens, out_features, in_features, CONFIGS[name], sms)
    ]
    return min(every, key=lambda item: item[0])[1]
