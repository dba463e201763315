"""Tile shapes of the sm_90 sparse product: what is legal, and which one a problem gets. Plain data and arithmetic: imports nothing.

A CTA computes bm rows of W (output features) times bn tokens. One or two warpgroups multiply, 64 or 128 rows each; a further one loads.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass

RESERVED = 1024             # gluon_compat.RESERVED_SHARED: Triton's own shared memory
SHARED_LIMIT = 232448       # 227 KB, what one CTA may have on compute capability 9.0
STEP = 64                   # columns of W in one pipeline stage
UNROLL = 4                  # steps whose metadata is fetched together


@dataclass(frozen=True)
class Sm90Config:
    """bm x bn tile; `stages` of 64 columns in flight; `group` row tiles (cluster * bm rows each) form a band that keeps W in L2 while
    tokens stream by; `cluster` CTAs stacked along the rows share every X tile by multicast; each warpgroup stores an m64 block at a time,
    in passes of `y_tokens` tokens (0: bn) through `y_buffers` buffers; `hints` are the L2 policies of W, X and Y: n(ormal),
    evict f(irst), evict l(ast)."""

    bm: int
    bn: int
    stages: int = 4
    group: int = 16
    cluster: int = 1
    y_tokens: int = 0
    y_buffers: int = 1
    hints: str = "nnn"

    @property
    def name(self) -> str:
        extra = f"c{self.cluster}" * (self.cluster > 1) + f"s{self.stages}" + f"g{self.group}" + f"y{self.y_tokens}" * (self.y_tokens > 0)
        return f"{self.bm}x{self.bn}{extra}" + f"b{self.y_buffers}" * (self.y_buffers > 1) + self.hints * (self.hints != "nnn")

    @property
    def warpgroups(self) -> int:
        return 1 if self.bm == 64 else 2

    @property
    def blocks(self) -> int:
        """m64 blocks of a warpgroup."""
        return self.bm // (64 * self.warpgroups)

    @property
    def store_tokens(self) -> int:
        return self.y_tokens or self.bn

    @property
    def chunk(self) -> int:
        """Registers of one accumulator tensor: Triton's tensors are powers of two. A single block needs an even number of them."""
        regs = self.bn // 4 * self.blocks
        return min(128, regs & -regs)

    @property
    def stage_bytes(self) -> int:
        return self.bm * STEP + self.bn * STEP * 2

    @property
    def store_offset(self) -> int:
        """Offset from `global_smem` of the first warpgroup's output buffers."""
        return RESERVED + self.stages * self.stage_bytes

    @property
    def barrier_offset(self) -> int:
        return self.store_offset + self.warpgroups * self.y_buffers * self.store_tokens * 128

    @property
    def shared_bytes(self) -> int:
        return self.barrier_offset + 2 * self.stages * 8


def why_illegal(config: Sm90Config) -> str | None:
    """None when the kernel can be built for `config`, else the rule that it breaks."""
    c = config
    rules = [
        (c.bm in (64, 128, 256), "bm must be 64, 128 or 256"),
        (c.bn % 16 == 0 and 16 <= c.bn <= 256, "bn must be a multiple of 16 up to 256 (wgmma's n; the epilogue stores 16 tokens at once)"),
        (c.blocks * c.bn <= 384, "at most 192 accumulators a thread fit beside the addresses and metadata"),
        (c.cluster in (1, 2), "cluster must be 1 or 2"),
        (c.bn // c.cluster % 8 == 0, "each CTA of a cluster loads whole 8-row swizzle atoms of X"),
        (c.bm * c.cluster <= 512, "metadata is padded to 512 rows"),
        (c.stages >= UNROLL, f"stages must be at least {UNROLL}: two blocks go over a group of steps one after the other"),
        (c.group >= 1, "group must be positive"),
        (c.bn % c.store_tokens == 0 and c.store_tokens % 16 == 0, "y_tokens must divide bn and be a multiple of 16"),
        (c.y_buffers >= 1, "y_buffers must be positive"),
        (len(c.hints) == 3 and set(c.hints) <= set("nfl"), "hints must be three of n, f, l"),
        (c.shared_bytes <= SHARED_LIMIT, f"shared memory {c.shared_bytes} must not exceed {SHARED_LIMIT}"),
    ]
    return next((rule for holds, rule in rules if not holds), None)


# Measured on one H100: microseconds... (filled from .gpu/spmm; see benchmarks/LOG.md)
CONFIGS: dict[str, Sm90Config] = {
    "128x256": Sm90Config(128, 256, 4, 16),
    "256x192": Sm90Config(256, 192, 4, 8),
    "256x192c2": Sm90Config(256, 192, 4, 4, cluster=2),
    "128x192": Sm90Config(128, 192, 5, 16),
    "128x128": Sm90Config(128, 128, 6, 16),
    "128x64": Sm90Config(128, 64, 8, 16),
    "64x64": Sm90Config(64, 64, 8, 16),
}
EFFICIENCY = {"128x256": 1.0, "128x192": 0.86, "256x192": 1.02, "128x128": 0.7, "128x64": 0.45, "64x64": 0.3}


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, out_features: int, in_features: int, multiprocessors: int) -> Sm90Config:
    """The configuration for one problem: least tile area in the longest queue of any multiprocessor, weighted by measured throughput."""
    def cost(name: str) -> float:
        c = CONFIGS[name]
        tiles = -(-out_features // c.bm) * -(-tokens // c.bn)
        return -(-tiles // multiprocessors) * c.bm * c.bn / EFFICIENCY[name]

    best = min(EFFICIENCY, key=cost)
    return CONFIGS["256x192c2" if best == "256x192" and in_features >= 4096 else best]
