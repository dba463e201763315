"""Which tile configuration an Ampere-class weight gradient gets, and how many parts its tokens are cut into. Arithmetic only."""

from __future__ import annotations

import functools

from ..spmm.mma_config import ALONE, MmaConfig, resident, shared_limit, why_illegal

CONFIGS: dict[str, MmaConfig] = {
    "256x128": MmaConfig(256, 128, 4, 2, 4, 8, "weight_grad"),
    "128x128": MmaConfig(128, 128, 2, 2, 4, 8, "weight_grad"),
    "mvue256x128": MmaConfig(256, 128, 4, 2, 4, 8, "mvue"),
    "mvue128x128w8": MmaConfig(128, 128, 2, 4, 3, 8, "mvue"),
}

# Time of a tile in microseconds on an H100: (per stage, and once), for a multiprocessor that holds as many CTAs as fit. Fitted to
# benchmarks/LOG.md; on other devices only their ratios matter.
COSTS: dict[str, tuple[float, float]] = {
    "256x128": (0.61, 4.0),
    "128x128": (0.34, 2.0),
    "mvue256x128": (0.94, 4.0),
    "mvue128x128w8": (0.57, 2.0),
}
LAYERS = (4.0, 1.5e6)  # adding up the parts: microseconds once, and bytes a microsecond, written and read
MAX_SPLITS = 32


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, rows: int, columns: int, multiprocessors: int, capability: int, kind: str) -> tuple[MmaConfig, int]:
    """The configuration for one problem and the number of parts that its tokens are cut into: the shortest longest queue, plus what
    adding up the parts takes. ``kind``: "weight_grad" or "mvue"."""
    candidates = [
        (name, splits)
        for name, config in CONFIGS.items()
        if config.kind == kind and why_illegal(config, capability) is None
        for splits in range(1, min(MAX_SPLITS, -(-tokens // (4 * config.step))) + 1)
    ]

    def cost(candidate: tuple[str, int]) -> float:
        name, splits = candidate
        config, (step, once) = CONFIGS[name], COSTS[name]
        tiles = -(-rows // config.bm) * -(-columns // config.bn)
        slow = ALONE if config.threads == 128 and resident(config, shared_limit(capability) + 1024) == 1 else 1.0
        steps = -(-tokens // config.step)
        stages = -(-steps // splits)
        queue = -(-tiles * splits // multiprocessors) * (stages * step * slow + once)
        return queue + (LAYERS[0] + splits * rows * columns * 4 / LAYERS[1] if splits > 1 else 0)

    name, splits = min(candidates, key=cost)
    return CONFIGS[name], splits
