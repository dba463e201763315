"""The Ampere-class weight gradient dW = dY^T X at the links: a persistent Gluon kernel around mma (exact) or mma.sp (MVUE).

Exact: both operands are read by columns from [tokens, features], ldmatrix.trans turns them. MVUE: the left operand is dY^T, compressed 2:4
along tokens in rows, with metadata. Stages, ring and pipeline are those of ../spmm/mma_kernel.py; the epilogue needs no shared memory.

Tokens may be cut into `splits` parts of `part` stages: each part of a tile is an item of its own, and writes its sums to its own layer of
`out`, which is then added up in order (mma_launch.py). Items run part by part, so that CTAs at work at the same time read the same tokens.
"""

from __future__ import annotations

from ...gluon_compat import gl, gluon
from ..spmm.mma_kernel import fragment_offsets, tile_of, zeros_by_shared
from ..spmm.mma_ptx import copies_of, fetch, first_fragments, multiply, split
from .mma_links import store_links


@gluon.jit
def _place(item, left_ptr, right_ptr, meta_ptr, left_stride, right_stride, n_rows, n_columns, tokens, steps, part, num_m, num_n,
           BM: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr, SPARSE: gl.constexpr, GROUP: gl.constexpr):
    """Where an item begins: addresses of its first stage, metadata address, what is left of the matrices, its number of stages."""
    tiles = num_m * num_n
    layer = item // tiles
    pm, pn = tile_of(item % tiles, num_m, num_n, GROUP)
    first = layer * part
    token = first.to(gl.int64) * STEP
    right = right_ptr + token * right_stride + pn * (BN * 2)
    if SPARSE:
        left = left_ptr + pm.to(gl.int64) * BM * left_stride + first * 64
    else:
        left = left_ptr + token * left_stride + pm * (BM * 2)
    meta = meta_ptr + (pm.to(gl.int64) * (BM // 64) * steps + first) * 512
    return (left, right, meta, n_rows - pm * BM, n_columns - pn * BN, tokens - first * STEP, gl.minimum(part, steps - first))


@gluon.jit
def chts_weight_grad_mma(left_ptr, right_ptr, meta_ptr, ids_ptr, table_ptr, out_ptr, left_stride, right_stride, n_rows, n_columns, tokens,
                         num_m, num_n, splits, part, C: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, MI: gl.constexpr,
                         NI: gl.constexpr, WM: gl.constexpr, THREADS: gl.constexpr, STAGES: gl.constexpr, SLOT: gl.constexpr,
                         STEP: gl.constexpr, SPARSE: gl.constexpr, GROUP: gl.constexpr, ACCS: gl.constexpr, FRAGMENTS: gl.constexpr,
                         NL: gl.constexpr, OUT: gl.constexpr, OUT_SIZE: gl.constexpr, ACCUMULATE: gl.constexpr, DTYPE: gl.constexpr,
                         SOURCE: gl.constexpr):
    """All pointers to bytes, strides in bytes. C: the MmaConfig, of which the integers are copies; SOURCE: as in chts_spmm_mma."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [THREADS // 32, 1], [1, 0])
    tid = gl.expand_dims(gl.arange(0, THREADS, gl.SliceLayout(1, L)), 1)
    if SPARSE:
        at = fragment_offsets(tid, 64, False, BN * 2, 32, MI, NI, WM, BN * STEP * 2, BN * STEP * 2 + BM * 64)
    else:
        at = fragment_offsets(tid, BM * 2, True, BN * 2, 16, MI, NI, WM, BN * STEP * 2, 0)
    like = zeros_by_shared(THREADS, L)
    zero = gl.zeros([THREADS, 4], gl.float32, L)
    steps = (tokens + STEP - 1) // STEP
    items = num_m * num_n * splits
    left_step = left_stride * 0 + 64 if SPARSE else left_stride * STEP
    right_step = right_stride * STEP
    start = gl.program_id(0)
    stride = gl.num_programs(0)
    ahead = start
    left, right, meta, rows, columns, depth, stages = _place(ahead, left_ptr, right_ptr, meta_ptr, left_stride, right_stride, n_rows,
                                                             n_columns, tokens, steps, part, num_m, num_n, BM, BN, STEP, SPARSE, GROUP)
    for s in gl.static_range(STAGES - 1):
        if SPARSE:
            fetch(like, (left, right, meta, left_stride, right_stride, steps * 512, rows, columns, depth, s * SLOT, tid), C)
        else:
            fetch(like, (left, right, left_stride, right_stride, rows, columns, depth, s * SLOT, tid), C)
        left += left_step
        right += right_step
        meta += 512
        depth -= STEP
        stages -= 1
        if stages == 0:
            ahead += stride
            left, right, meta, rows, columns, depth, stages = _place(
                gl.minimum(ahead, items - 1), left_ptr, right_ptr, meta_ptr, left_stride, right_stride, n_rows, n_columns, tokens, steps,
                part, num_m, num_n, BM, BN, STEP, SPARSE, GROUP)
            rows = gl.where(ahead < items, rows, 0)
            columns = gl.where(ahead < items, columns, 0)
    slot = 0
    free = (STAGES - 1) * SLOT
    loaded = first_fragments(like, at, slot, C)
    fragments = split(loaded, 0, FRAGMENTS)
    words = like
    if SPARSE:
        words = split(loaded, FRAGMENTS, 1)[0]
    for item in range(start, items, stride):
        accs = copies_of(zero, ACCS)
        tiles = num_m * num_n
        layer = item // tiles
        for _step in range(gl.minimum(part, steps - layer * part)):
            if SPARSE:
                done = multiply(accs, fragments, words, at, slot, 0, C, DTYPE,
                                (left, right, meta, left_stride, right_stride, steps * 512, rows, columns, depth, free, tid))
            else:
                done = multiply(accs, fragments, words, at, slot, 0, C, DTYPE,
                                (left, right, left_stride, right_stride, rows, columns, depth, free, tid))
            left += left_step
            right += right_step
            meta += 512
            depth -= STEP
            stages -= 1
            if stages == 0:
                ahead += stride
                left, right, meta, rows, columns, depth, stages = _place(
                    gl.minimum(ahead, items - 1), left_ptr, right_ptr, meta_ptr, left_stride, right_stride, n_rows, n_columns, tokens,
                    steps, part, num_m, num_n, BM, BN, STEP, SPARSE, GROUP)
                rows = gl.where(ahead < items, rows, 0)
                columns = gl.where(ahead < items, columns, 0)
            free = slot
            slot = gl.where(slot == (STAGES - 1) * SLOT, 0, slot + SLOT)
            done = multiply(split(done, 0, ACCS), split(done, ACCS, FRAGMENTS), words, at, slot, 1, C, DTYPE)
            accs = split(done, 0, ACCS)
            fragments = split(done, ACCS, FRAGMENTS)
            if SPARSE:
                words = split(done, ACCS + FRAGMENTS, 1)[0]
        tm, tn = tile_of(item % tiles, num_m, num_n, GROUP)
        out = out_ptr + layer.to(gl.int64) * n_rows * (n_columns // 4 * (NL * OUT_SIZE))
        store_links(accs, out, ids_ptr, table_ptr, n_rows, n_columns, tm * BM, tn * BN, tid, C, NL, OUT, ACCUMULATE)
