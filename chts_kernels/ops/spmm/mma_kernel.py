"""The Ampere-class sparse product Y[T, N] = X[T, K] W[N, K]^T: a persistent Gluon kernel around mma.sp (compute capability 8.0 and up).

The sparse operand is the left one, so a tile is Y^T = W X^T. A CTA walks over its tiles as over one long line of stages: copies run
`STAGES - 1` stages ahead, into the next tile too, so that its loads cover this tile's epilogue, which borrows the one stage that is
neither read nor filled. Within a stage there are two instructions' depths; while one multiplies, ldmatrix loads the other's fragments.
"""

from __future__ import annotations

from ...gluon_compat import gl, gluon
from .mma_ptx import copies_of, fetch, first_fragments, multiply, split
from .mma_store import store_tile


@gluon.jit
def tile_of(t, num_m, num_n, GROUP: gl.constexpr):
    """Tile t -> (row tile, column tile): column by column inside bands of GROUP row tiles."""
    width = GROUP * num_n
    band = t // width
    size = gl.minimum(num_m - band * GROUP, GROUP)
    r = t % width
    return band * GROUP + r % size, r // size


@gluon.jit
def zeros_by_shared(THREADS: gl.constexpr, L: gl.constexpr):
    """int32 zeros [threads, 4] that have been in shared memory: Triton declares `global_smem` where it allocates something itself."""
    S: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    V: gl.constexpr = gl.SliceLayout(1, L)
    through = gl.allocate_shared_memory(gl.int32, [THREADS], S, gl.zeros([THREADS], gl.int32, V)).load(V)
    return gl.expand_dims(through, 1) + gl.zeros([THREADS, 4], gl.int32, L)


@gluon.jit
def fragment_offsets(tid, A_ROW: gl.constexpr, A_TRANS: gl.constexpr, B_ROW: gl.constexpr, B_TRANS: gl.constexpr, MI: gl.constexpr,
                     NI: gl.constexpr, WM: gl.constexpr, LEFT: gl.constexpr, WORDS: gl.constexpr):
    """A thread's offsets in a stage: of its row of the first 8x8 matrices of A and of B, and of its metadata word.

    A_ROW, B_ROW: bytes of a row of the tile. Matrices of an x4 load, eight lanes each, in the order of the fragment's registers:
    A (rows 0-7, 8-15) x (k 0-7, 8-15); B, k by k: of one n8, or dense (k 0-7, 8-15) x (two n8)."""
    lane = tid % 32
    wm = tid // 32 % WM
    wn = tid // 32 // WM
    if A_TRANS:
        token = lane % 8 + lane // 16 * 8
        a = token * A_ROW + (((wm * MI * 2 + lane // 8 % 2) ^ (lane % 8)) * 16)
    else:
        a = (wm * MI * 16 + lane % 16) * A_ROW + ((lane // 16) ^ (lane // 2 % 4)) * 16
    if B_TRANS == 32:                   # 32 tokens of one n8
        b = lane * B_ROW + (((wn * NI) ^ (lane % 8)) * 16)
    elif B_TRANS == 16:                 # 16 tokens of two
        b = lane % 16 * B_ROW + (((wn * NI + lane // 16) ^ (lane % 8)) * 16)
    else:
        b = (wn * NI * 8 + lane % 8) * B_ROW + ((lane // 8) ^ (lane % 8)) * 16
    return a + LEFT, b, WORDS + wm * MI * 128 + lane * 4


@gluon.jit
def chts_spmm_mma(w_ptr, x_ptr, meta_ptr, bias_ptr, y_ptr, w_stride, x_stride, y_stride, n_out, tokens, in_features, num_m, num_n,
                  C: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, MI: gl.constexpr, NI: gl.constexpr, WM: gl.constexpr,
                  THREADS: gl.constexpr, STAGES: gl.constexpr, SLOT: gl.constexpr, GROUP: gl.constexpr, ACCS: gl.constexpr,
                  FRAGMENTS: gl.constexpr, BIAS: gl.constexpr, BIAS_SIZE: gl.constexpr, DTYPE: gl.constexpr, SOURCE: gl.constexpr):
    """All pointers to bytes, strides in bytes. C: the MmaConfig, of which the integers are copies. SOURCE only names the inline PTX this
    was built from: Triton's cache key does not see the builtins' code."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [THREADS // 32, 1], [1, 0])
    tid = gl.expand_dims(gl.arange(0, THREADS, gl.SliceLayout(1, L)), 1)
    at = fragment_offsets(tid, 64, False, 128, 0, MI, NI, WM, BN * 128, BN * 128 + BM * 64)
    like = zeros_by_shared(THREADS, L)
    zero = gl.zeros([THREADS, 4], gl.float32, L)
    steps = (in_features + 63) // 64
    meta_stride = steps * 512
    tiles = num_m * num_n
    start = gl.program_id(0)
    stride = gl.num_programs(0)
    # the copies' place: tile, stage, and what they address there
    ahead = start
    k = 0
    pm, pn = tile_of(ahead, num_m, num_n, GROUP)
    w = w_ptr + pm.to(gl.int64) * BM * w_stride
    x = x_ptr + pn.to(gl.int64) * BN * x_stride
    meta = meta_ptr + pm.to(gl.int64) * (BM // 64) * meta_stride
    rows = n_out - pm * BM
    columns = tokens - pn * BN
    for s in gl.static_range(STAGES - 1):
        fetch(like, (w, x, meta, w_stride, x_stride, meta_stride, rows, columns, in_features - k * 64, s * SLOT, tid), C)
        k += 1
        w += 64
        x += 128
        meta += 512
        if k == steps:
            k = 0
            ahead += stride
            pm, pn = tile_of(gl.minimum(ahead, tiles - 1), num_m, num_n, GROUP)
            w = w_ptr + pm.to(gl.int64) * BM * w_stride
            x = x_ptr + pn.to(gl.int64) * BN * x_stride
            meta = meta_ptr + pm.to(gl.int64) * (BM // 64) * meta_stride
            rows = gl.where(ahead < tiles, n_out - pm * BM, 0)
            columns = gl.where(ahead < tiles, tokens - pn * BN, 0)
    slot = 0
    free = (STAGES - 1) * SLOT
    loaded = first_fragments(like, at, slot, C)
    fragments = split(loaded, 0, FRAGMENTS)
    words = split(loaded, FRAGMENTS, 1)[0]
    for t in range(start, tiles, stride):
        accs = copies_of(zero, ACCS)
        for _step in range(steps):
            done = multiply(accs, fragments, words, at, slot, 0, C, DTYPE,
                            (w, x, meta, w_stride, x_stride, meta_stride, rows, columns, in_features - k * 64, free, tid))
            k += 1
            w += 64
            x += 128
            meta += 512
            if k == steps:
                k = 0
                ahead += stride
                pm, pn = tile_of(gl.minimum(ahead, tiles - 1), num_m, num_n, GROUP)
                w = w_ptr + pm.to(gl.int64) * BM * w_stride
                x = x_ptr + pn.to(gl.int64) * BN * x_stride
                meta = meta_ptr + pm.to(gl.int64) * (BM // 64) * meta_stride
                rows = gl.where(ahead < tiles, n_out - pm * BM, 0)
                columns = gl.where(ahead < tiles, tokens - pn * BN, 0)
            free = slot
            slot = gl.where(slot == (STAGES - 1) * SLOT, 0, slot + SLOT)
            done = multiply(split(done, 0, ACCS), split(done, ACCS, FRAGMENTS), words, at, slot, 1, C, DTYPE)
            accs = split(done, 0, ACCS)
            fragments = split(done, ACCS, FRAGMENTS)
            words = split(done, ACCS + FRAGMENTS, 1)[0]
        tm, tn = tile_of(t, num_m, num_n, GROUP)
        y = y_ptr + tn.to(gl.int64) * BN * y_stride + tm * (BM * 2)
        store_tile(accs, free, y, y_stride, n_out - tm * BM, tokens - tn * BN, bias_ptr + tm * (BM * BIAS_SIZE), tid, C, DTYPE, BIAS)
