"""Tile shapes of the Ampere-class products (mma.sp and mma): what is legal, and which one a problem gets. Imports nothing.

A CTA computes bm rows of the left operand times bn columns; its warps stand in a wm x wn grid, each with bm/wm x bn/wn of the tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

RESERVED = 1024  # gluon_compat.RESERVED_SHARED: Triton's own shared memory
SHARED_LIMIT = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376}
"""Bytes that one CTA may have, by compute capability. Others get what all have."""
STEP = 64  # reduction columns in one stage of a sparse product; dense ones take half
KINDS = ("spmm", "weight_grad", "mvue")


def shared_limit(capability: int) -> int:
    """Bytes of shared memory of a CTA on compute capability ``capability`` (10 * major + minor)."""
    return SHARED_LIMIT.get(capability, min(SHARED_LIMIT.values()))


@dataclass(frozen=True)
class MmaConfig:
    """bm x bn tile of wm x wn warps; ``stages`` in the ring of shared memory; ``group`` row tiles form a band that keeps the left
    operand in L2 while the right one streams by; ``kind``: which product (left operand, right operand, instruction):

    - "spmm": compressed rows [bm, 32 values of 64], rows [bn, 64], mma.sp m16n8k32;
    - "weight_grad": columns of [32 tokens, bm], columns of [32 tokens, bn], mma m16n8k16;
    - "mvue": compressed rows [bm, 32 of 64 tokens], columns of [64 tokens, bn], mma.sp m16n8k32.
    """

    bm: int
    bn: int
    wm: int
    wn: int
    stages: int
    group: int = 8
    kind: str = "spmm"

    @property
    def name(self) -> str:
        return f"{self.bm}x{self.bn}w{self.wm}{self.wn}s{self.stages}g{self.group}"

    @property
    def threads(self) -> int:
        return 32 * self.wm * self.wn

    @property
    def mi(self) -> int:
        """m16 tiles of a warp."""
        return self.bm // self.wm // 16

    @property
    def ni(self) -> int:
        """n8 tiles of a warp."""
        return self.bn // self.wn // 8

    @property
    def sparse(self) -> bool:
        return self.kind != "weight_grad"

    @property
    def step(self) -> int:
        """Reduction columns of a stage: two instructions deep."""
        return STEP if self.sparse else STEP // 2

    @property
    def right_bytes(self) -> int:
        return self.bn * self.step * 2

    @property
    def left_bytes(self) -> int:
        return self.bm * 64

    @property
    def meta_bytes(self) -> int:
        return self.bm * 8 if self.sparse else 0

    @property
    def slot_bytes(self) -> int:
        """A stage: right tile, left tile, metadata words."""
        return self.right_bytes + self.left_bytes + self.meta_bytes

    @property
    def shared_bytes(self) -> int:
        return RESERVED + self.stages * self.slot_bytes

    @property
    def pass_tokens(self) -> int:
        """Columns that a warp transposes at a time in the epilogue: its buffer is its part of one free stage."""
        room = self.slot_bytes // (self.wm * self.wn) // (self.mi * 32)
        return next(p for p in (64, 32, 16, 8) if p <= min(room, self.ni * 8))


def why_illegal(config: MmaConfig, capability: int = 90) -> str | None:
    """None when the kernel can be built for ``config`` and run on ``capability``, else the rule that it breaks."""
    c = config
    rules = [
        (c.kind in KINDS, f"kind must be one of {KINDS}"),
        (c.bm in (64, 128, 256) and c.bn in (32, 64, 128, 256), "bm must be 64, 128 or 256 and bn 32, 64, 128 or 256"),
        (c.wm * c.wn in (4, 8) and c.bm % (32 * c.wm) == 0 and c.bn % (16 * c.wn) == 0, "4 or 8 warps of at least 32 x 16 must tile it"),
        (c.mi in (2, 4) and c.ni in (2, 4, 8), "a warp must have 32 or 64 rows and 16, 32 or 64 columns"),
        (c.kind == "spmm" or c.bn >= 64, "columns of [tokens, bn] take rows of at least 128 bytes"),
        (c.stages >= 2, "stages must be at least 2"),
        (c.group >= 1, "group must be positive"),
        (c.shared_bytes <= shared_limit(capability), f"shared memory {c.shared_bytes} must not exceed {shared_limit(capability)}"),
    ]
    return next((rule for holds, rule in rules if not holds), None)


CONFIGS: dict[str, MmaConfig] = {
    "256x128": MmaConfig(256, 128, 4, 2, 4, 8),
    "128x128": MmaConfig(128, 128, 2, 2, 3, 16),
    "128x128w8": MmaConfig(128, 128, 2, 4, 3, 16),
    "64x64": MmaConfig(64, 64, 2, 2, 4, 16),
}

# Time of a tile in microseconds on an H100: (per stage, and once), for a multiprocessor that holds as many CTAs as fit. Fitted to
# benchmarks/LOG.md; on other devices only their ratios matter.
COSTS: dict[str, tuple[float, float]] = {
    "256x128": (0.90, 2.4),
    "128x128": (0.47, 1.0),
    "128x128w8": (0.59, 1.0),
    "64x64": (0.20, 0.5),
}
ALONE = 1.4  # what a 4-warp CTA that has the multiprocessor to itself loses: nothing runs while it waits


def resident(config: MmaConfig, shared: int) -> int:
    """CTAs of a configuration that fit on a multiprocessor with `shared` bytes of shared memory, by that and by their registers."""
    registers = {32: 256, 16: 208}.get(config.mi * config.ni, 128)  # a thread's, by its m16n8 tiles: what ptxas uses, rounded up
    return max(1, min(shared // (config.shared_bytes + 1024), 65536 // (registers * config.threads)))


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, out_features: int, in_features: int, multiprocessors: int, capability: int) -> MmaConfig:
    """The configuration for one problem: the one of the shortest longest queue."""
    steps = -(-in_features // STEP)

    def cost(name: str) -> float:
        config, (step, once) = CONFIGS[name], COSTS[name]
        if why_illegal(config, capability):
            return float("inf")
        tiles = -(-out_features // config.bm) * -(-tokens // config.bn)
        slow = ALONE if config.threads == 128 and resident(config, shared_limit(capability) + 1024) == 1 else 1.0
        return -(-tiles // multiprocessors) * (steps * step * slow + once)

    return CONFIGS[min(COSTS, key=cost)]
