"""Tile shapes of the sm_90 sparse product: what is legal, and which one a problem gets. Plain data and arithmetic: imports nothing.

A CTA computes bm rows of W (output features) times bn tokens. One or two warpgroups multiply, 64 or 128 rows each; a further one loads.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass

RESERVED = 1024             # gluon_compat.RESERVED_SHARED: Triton's own shared memory
SHARED_LIMIT = 232448       # 227 KB, what one CTA may have on compute capability 9.0
STEP = 64                   # columns of W in one pipeline stage


@dataclass(frozen=True)
class Sm90Config:
    """bm x bn tile; `stages` of 64 columns in flight; `group` row tiles (cluster * bm rows each) form a band that keeps W in L2 while
    tokens stream by; `cluster` CTAs stacked along the rows share every X tile by multicast; the output leaves in passes of `y_tokens`
    (0: bn) tokens; `hints` are the L2 policies of W, X and Y: n(ormal), evict f(irst), evict l(ast); metadata is fetched `ahead`
    groups of four steps before its use."""

    bm: int
    bn: int
    stages: int = 4
    group: int = 16
    cluster: int = 1
    y_tokens: int = 0
    hints: str = "nnn"
    ahead: int = 1

    @property
    def name(self) -> str:
        extras = (f"c{self.cluster}" * (self.cluster > 1), f"s{self.stages}", f"g{self.group}", f"y{self.y_tokens}" * (self.y_tokens > 0),
                  self.hints * (self.hints != "nnn"), f"a{self.ahead}" * (self.ahead > 1))
        return f"{self.bm}x{self.bn}" + "".join(extras)

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
        """Registers of one accumulator tensor: Triton's tensors are powers of two."""
        regs = self.bn // 2
        return min(128, regs & -regs)

    @property
    def stage_bytes(self) -> int:
        return self.bm * STEP + self.bn * STEP * 2

    @property
    def store_offset(self) -> int:
        """Offset from `global_smem` of the first warpgroup's output buffer."""
        return RESERVED + self.stages * self.stage_bytes

    @property
    def barrier_offset(self) -> int:
        return self.store_offset + self.warpgroups * self.store_tokens * 128

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
        (c.stages >= 2, "stages must be at least 2"),
        (c.group >= 1, "group must be positive"),
        (1 <= c.ahead <= 4, "ahead must be 1 to 4"),
        (c.bn % c.store_tokens == 0 and c.store_tokens % 16 == 0, "y_tokens must divide bn and be a multiple of 16"),
        (len(c.hints) == 3 and set(c.hints) <= set("nfl"), "hints must be three of n, f, l"),
        (c.shared_bytes <= SHARED_LIMIT, f"shared memory {c.shared_bytes} must not exceed {SHARED_LIMIT}"),
    ]
    return next((rule for holds, rule in rules if not holds), None)


CONFIGS: dict[str, Sm90Config] = {
    "128x256": Sm90Config(128, 256, 4, 16),
    "128x256s5": Sm90Config(128, 256, 5, 16, y_tokens=64),
    "128x256s5x": Sm90Config(128, 256, 5, 16, y_tokens=64, hints="lfn"),
    "256x192": Sm90Config(256, 192, 4, 8),
    "256x192c2": Sm90Config(256, 192, 4, 4, cluster=2),
    "256x144": Sm90Config(256, 144, 5, 8),
    "256x144x": Sm90Config(256, 144, 5, 8, hints="lfn"),
    "128x192": Sm90Config(128, 192, 5, 16),
    "128x128": Sm90Config(128, 128, 6, 16),
    "128x96": Sm90Config(128, 96, 8, 16),
    "128x80": Sm90Config(128, 80, 8, 16),
    "128x64": Sm90Config(128, 64, 8, 16),
    "64x128": Sm90Config(64, 128, 8, 16, ahead=3),
    "64x64": Sm90Config(64, 64, 8, 16, ahead=3),
    "64x32": Sm90Config(64, 32, 16, 16, ahead=3),
    "64x16": Sm90Config(64, 16, 24, 16, ahead=3),
}

# (tokens, out, in) on an H100 of 132 multiprocessors: the fastest of all configurations, graph replays and, for the large ones, back
# to back under the power limit (benchmarks/LOG.md). A name ending in x evicts X first: Y stays in L2 for whoever reads it next.
MEASURED: dict[tuple[int, int, int], str] = {
    (16384, 512, 512): "128x256",
    (16384, 1376, 512): "256x192",
    (16384, 512, 1376): "128x256s5x",
    (12608, 768, 768): "256x144x",
    (12608, 3072, 768): "256x144",
    (12608, 768, 3072): "256x144",
    (2048, 4096, 4096): "128x256",
    (8192, 4096, 4096): "128x256",
    (8192, 14336, 4096): "256x192",
    (8192, 4096, 14336): "128x256",
    (8192, 8192, 8192): "256x192c2",
    (16384, 8192, 8192): "256x192c2",
    (2048, 768, 768): "128x96",
}

# Multiprocessor cycles of a tile: (per 64-column step, and once), fitted to those measurements; for every other problem. From 128x128
# down: least squares over 13 problems of at most three waves, which it gives the fastest of the eight tiles or one within 3 %.
CYCLES: dict[str, tuple[int, int]] = {
    "128x256": (690, 4300),
    "256x192": (915, 7800),
    "256x144": (810, 4600),
    "128x192": (655, 1900),
    "128x128": (404, 3476),
    "128x96": (448, 2001),
    "128x80": (403, 2114),
    "128x64": (399, 1757),
    "64x128": (309, 1599),
    "64x64": (241, 1123),
    "64x32": (250, 768),
    "64x16": (184, 1310),
}


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, out_features: int, in_features: int, multiprocessors: int) -> Sm90Config:
    """The configuration for one problem: the measured one, else the one of the shortest longest queue, in cycles."""
    measured = MEASURED.get((tokens, out_features, in_features)) if multiprocessors == 132 else None
    if measured is not None:
        return CONFIGS[measured]
    steps = -(-in_features // STEP)

    def cost(name: str) -> int:
        config, (step, once) = CONFIGS[name], CYCLES[name]
        tiles = -(-out_features // config.bm) * -(-tokens // config.bn)
        return -(-tiles // multiprocessors) * (steps * step + once)

    return CONFIGS[min(CYCLES, key=cost)]
