"""Tile shapes of the sm_90 weight gradient: what is legal. Plain data; sm90_schedule.py decides which one a problem gets.

A CTA computes bm rows (output features) times bn columns (input features) of dW with two warpgroups; a third one loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..spmm.sm90_config import RESERVED, SHARED_LIMIT

STEP = 64  # tokens of a K block: one stage


@dataclass(frozen=True)
class DwConfig:
    """bm x bn tile; ``stages`` of 64 tokens in flight; ``group`` row tiles form a band that keeps dY in L2 while X streams
    by; ``cluster`` CTAs stacked along the rows share every X tile by multicast; ``lag``: warpgroup 1 starts a stage late;
    ``stamp``: profile (see `stamp` in sm90_ptx.py)."""

    bm: int
    bn: int
    stages: int = 4
    group: int = 16
    cluster: int = 1
    lag: bool = True
    stamp: bool = False

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
    def selectors(self) -> int:
        """Offset of the selectors from ``global_smem``: two bytes for every link pair of the tile."""
        return RESERVED + self.stages * (self.bm + self.bn) * STEP * 2

    @property
    def barriers(self) -> int:
        """Offset of the barriers."""
        return self.selectors + self.bm * self.bn // 2

    @property
    def shared_bytes(self) -> int:
        return self.barriers + (2 * self.stages + 2) * 8


def why_illegal(config: DwConfig, split: bool) -> str | None:
    """None when the kernel can be built for ``config``, else the rule that it breaks."""
    c = config
    rules = [
        (c.bm in (128, 256), "bm must be 128 or 256"),
        (c.bn in (64, 128, 192, 256), "bn must be 64, 128, 192 or 256"),
        (c.bm * c.bn <= 256 * 128, "at most 128 accumulators a thread: the epilogue needs the other registers"),
        (c.cluster in (1, 2), "cluster must be 1 or 2"),
        (c.bn // 64 % c.cluster == 0, "each CTA of a cluster loads whole 64-column slabs of X"),
        (c.cluster == 1 or not split, "a split along tokens takes single CTAs"),
        (c.stages >= 2, "stages must be at least 2"),
        (c.group >= 1, "group must be positive"),
        (c.shared_bytes <= SHARED_LIMIT, f"shared memory {c.shared_bytes} must not exceed {SHARED_LIMIT}"),
    ]
    return next((rule for holds, rule in rules if not holds), None)


CONFIGS: dict[str, DwConfig] = {
    "128x256": DwConfig(128, 256),
    "256x128": DwConfig(256, 128),
    "128x192": DwConfig(128, 192, 5),
    "128x256c2": DwConfig(128, 256, 4, 8, cluster=2),
}
