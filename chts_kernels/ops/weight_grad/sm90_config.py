"""Tile shapes of the sm_90 weight gradient: what is legal. Plain data; sm90_schedule.py decides which one a problem gets.

A CTA computes bm rows (output features) times bn columns (input features) of dW with two warpgroups; a third one loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..spmm.sm90_config import RESERVED, SHARED_LIMIT

STEP = 64  # tokens of a K block: one stage


@dataclass(frozen=True)
class DwConfig:
    """bm x bn tile; ``stages`` of 64 tokens in flight; ``group`` row tiles (of clusters) form a band that keeps dY in L2 while X
    streams by; ``cluster`` CTAs load their common operand ``share`` once, by multicast: "x" for neighbours along the rows, "dy"
    along the columns; ``lag``: warpgroup 1 starts a stage late; ``stamp``: profile (see `stamp` in sm90_ptx.py); ``sparse``: the
    MVUE product, whose left operand is compressed."""

    bm: int
    bn: int
    stages: int = 4
    group: int = 16
    cluster: int = 1
    share: str = "x"
    lag: bool = True
    stamp: bool = False
    sparse: bool = False

    @property
    def name(self) -> str:
        extra = f"c{self.cluster}{self.share}" * (self.cluster > 1) + f"s{self.stages}g{self.group}" + "nolag" * (not self.lag)
        return f"{'sparse' * self.sparse}{self.bm}x{self.bn}{extra}"

    @property
    def rows(self) -> int:
        """Rows of dW that a cluster computes."""
        return self.bm * (self.cluster if self.share == "x" else 1)

    @property
    def columns(self) -> int:
        """Columns of dW that a cluster computes."""
        return self.bn * (self.cluster if self.share == "dy" else 1)

    @property
    def chunk(self) -> int:
        """Registers of one accumulator tensor: Triton's tensors are powers of two."""
        regs = self.bn // 2
        return min(128, regs & -regs)

    @property
    def stage_bytes(self) -> int:
        return (self.bm // (2 if self.sparse else 1) + self.bn) * STEP * 2

    @property
    def selectors(self) -> int:
        """Offset of the selectors from ``global_smem``: two bytes for every four columns of a row of the tile."""
        return RESERVED + self.stages * self.stage_bytes

    @property
    def barriers(self) -> int:
        """Offset of the barriers."""
        return self.selectors + self.bm * self.bn // 2

    @property
    def shared_bytes(self) -> int:
        return self.barriers + (2 * self.stages + 2) * 8


def why_illegal(config: DwConfig) -> str | None:
    """None when the kernel can be built for ``config``, else the rule that it breaks."""
    c = config
    rules = [
        (c.bm in (128, 256), "bm must be 128 or 256"),
        (c.bn in (64, 128, 192, 256), "bn must be 64, 128, 192 or 256"),
        (c.bm * c.bn <= 256 * 128, "at most 128 accumulators a thread: the epilogue needs the other registers"),
        (c.cluster in (1, 2), "cluster must be 1 or 2"),
        (c.share in ("x", "dy"), 'share must be "x" or "dy"'),
        ((c.bn if c.share == "x" else c.bm) // 64 % c.cluster == 0, "each CTA of a cluster loads whole 64-column slabs"),
        (not c.sparse or (c.bm == 128 and c.share == "x"), "the sparse product takes 128 rows and shares x"),
        (c.stages >= 2, "stages must be at least 2"),
        (c.group >= 1, "group must be positive"),
        (c.shared_bytes <= SHARED_LIMIT, f"shared memory {c.shared_bytes} must not exceed {SHARED_LIMIT}"),
    ]
    return next((rule for holds, rule in rules if not holds), None)


CONFIGS: dict[str, DwConfig] = {
    "128x256": DwConfig(128, 256),
    "256x128": DwConfig(256, 128),
    "128x192": DwConfig(128, 192, 5),
    "128x256c2x": DwConfig(128, 256, 4, 8, cluster=2),
    "128x256c2dy": DwConfig(128, 256, 4, 16, cluster=2, share="dy"),
    "256x128c2x": DwConfig(256, 128, 4, 8, cluster=2),
    "sparse128x256": DwConfig(128, 256, 5, sparse=True),
    "sparse128x256c2x": DwConfig(128, 256, 5, 8, cluster=2, sparse=True),
}
