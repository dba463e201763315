"""The whole topology update of a batch of layers of one shape, in about a dozen launches and no host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .format import Operands, SparseWeight
from .ops._batch import BatchKernel, compile_all, on_device, recording, table
from .ops.carry_over.triton_carry_over import bits
from .ops.pack import _why_not_pack_operands as why_not_pack
from .ops.regrow.triton_regrow import regrow_many
from .ops.remove.triton_remove import block_masks, remove_many
from .ops.score.triton_score import (
    Raw,
    digits_for,
    mirrored,
    raw_score,
    score_raw,
    strips_for,
    weight_range,
    workspace_bytes,
)
from .patterns import pattern_table

WORKSPACE_BYTES = 1 << 30
"""Layers of one shape are batched up to this much memory (one layer at least, which alone takes 0.6 GB at 14336 x 4096). It is what a
model of a billion weights needs to keep the host ahead of the device, free between the passes, and out of reach of smaller models."""
PARTIALS = 64


@triton.jit
def moments_kernel(
    sums_ptr, degrees_ptr, state_ptr, survivors_ptr, ids_ptr, mask16_ptr, partials_ptr,
    block_columns, blocks, rows_padded, columns_padded, programs,
    PATTERNS: tl.constexpr, QMAX: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sums of scores and squared scores over the links of ``ids`` and over the survivors, in float64."""
    b, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    base = b.to(tl.int64) * blocks
    origin, unit = weight_range(state_ptr, b, blocks // block_columns * 4, block_columns * 4, QMAX)
    sums_ptr += b.to(tl.int64) * rows_padded * columns_padded
    degrees_ptr += b.to(tl.int64) * (rows_padded + columns_padded)
    before = tl.zeros([BLOCKS], tl.float64)
    before2, after, after2 = before, before, before
    start = program * BLOCKS
    while start < blocks:
        block = start + tl.arange(0, BLOCKS)
        valid = block < blocks
        links = block_masks(ids_ptr + base, mask16_ptr, block, valid, PATTERNS)
        kept = tl.load(survivors_ptr + base + block, mask=valid, other=0)
        i, j = block // block_columns, block % block_columns
        for r in tl.static_range(4):
            row_degree = tl.load(degrees_ptr + i * 4 + r, mask=valid, other=0)
            place = sums_ptr + (i * 4 + r).to(tl.int64) * columns_padded + j * 4
            for c in tl.static_range(4):
                column_degree = tl.load(degrees_ptr + rows_padded + j * 4 + c, mask=valid, other=0)
                own = kept >> (4 * r + c) & 1
                sums = tl.load(place + c, mask=valid, other=0)
                score = raw_score(sums, row_degree, column_degree, own, origin, unit, QMAX).to(tl.float64)
                old = tl.where((valid & ((links >> (4 * r + c) & 1) != 0)), score, 0.0)
                new = tl.where((valid & (own != 0)), score, 0.0)
                before += old
                before2 += old * old
                after += new
                after2 += new * new
        start += programs * BLOCKS
    out_ptr = partials_ptr + tl.program_id(0) * 4
    tl.store(out_ptr, tl.sum(before))
    tl.store(out_ptr + 1, tl.sum(before2))
    tl.store(out_ptr + 2, tl.sum(after))
    tl.store(out_ptr + 3, tl.sum(after2))


MOMENTS = BatchKernel(moments_kernel, 4)
_compiled: set[tuple] = set()


def batches(weights: Sequence[SparseWeight], moments: Sequence[Sequence[torch.Tensor]]) -> list[list[int]]:
    """Indices of weights that can share launches and fit :data:`WORKSPACE_BYTES`."""
    groups: dict[tuple, list[int]] = {}
    for index, w in enumerate(weights):
        key = (w.shape, w.n, w.values.dtype, w.values.device, tuple(bits(m) for m in moments[index]))
        groups.setdefault(key, []).append(index)
    chunks = []
    for (shape, n, *_), members in groups.items():
        links = shape[0] * shape[1] * n // 4
        size = max(1, WORKSPACE_BYTES // max(workspace_bytes(*shape), 12 * links))
        chunks += [members[start : start + size] for start in range(0, len(members), size)]
    return chunks


def evolve_batch(
    weights: Sequence[SparseWeight],
    layers: Sequence[int],
    moments: Sequence[Sequence[torch.Tensor]],
    *,
    zeta: float,
    temperature: float,
    removal: str,
    regrowth: str,
    seed: int,
    step: int,
    stats: bool,
    schedule: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor] | None]:
    """(old ids [B, ..], survivors [B, ..], stats with [B] tensors) of layers of one shape; ids, values, moments in place, and the
    operands of those weights whose operands are up to date."""
    arguments = weights, layers, moments
    options = zeta, temperature, removal, regrowth, seed, step, stats, schedule
    first = weights[0]
    sizes = tuple(bits(m) for m in moments[0])
    refresh = [_to_refresh(w) for w in weights]
    dtype = next((o.values_t.dtype for o in refresh if o is not None), None)
    refresh = [o if o is not None and o.values_t.dtype == dtype else None for o in refresh]
    options += (refresh if any(refresh) else None,)
    digits = digits_for(*first.shape)
    kind = first.device, first.n, first.dtype, sizes, removal, regrowth, stats, schedule is None, digits
    kind += (dtype if any(refresh) else None, mirrored(*first.shape, digits), strips_for(*first.shape, len(weights), digits))
    with on_device(first.ids):
        if first.ids.is_cuda and kind not in _compiled:
            with recording() as requests:
                _launch(*arguments, *options)
            compile_all(requests)
            _compiled.add(kind)
        result = _launch(*arguments, *options)
    for w, of_weight in zip(weights, moments, strict=True):
        for tensor in (w.ids, w.values, *of_weight):
            torch.autograd.graph.increment_version(tensor)
    for w, operands in zip(weights, refresh, strict=True):
        if operands is not None:
            operands.mark(w.values, w.ids)
    return result


def _to_refresh(w: SparseWeight) -> Operands | None:
    """The weight's operands if they are up to date and such as the kernel of a whole packing would write."""
    o = w._operands
    if not o.fresh(w.values, w.ids):
        return None
    operand = None if o.shares(w.values) else o.values
    return o if why_not_pack(w.values, w.ids, w.n, operand, o.meta, o.values_t, o.meta_t) is None else None


def _launch(
    weights: Sequence[SparseWeight],
    layers: Sequence[int],
    moments: Sequence[Sequence[torch.Tensor]],
    zeta: float,
    temperature: float,
    removal: str,
    regrowth: str,
    seed: int,
    step: int,
    stats: bool,
    schedule: torch.Tensor | None,
    refresh: Sequence[Operands | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor] | None]:
    n, device = weights[0].n, weights[0].device
    values, ids = [w.values.detach() for w in weights], [w.ids for w in weights]
    rows = [[v.data_ptr() for v in values], [i.data_ptr() for i in ids], list(layers)]
    rows += [[m[index].data_ptr() for m in moments] for index in range(len(moments[0]))]
    following = None
    if refresh is not None:
        own = [o and (None if o.shares(v) else o.values, o.meta, o.values_t, o.meta_t) for o, v in zip(refresh, values, strict=True)]
        dtype = next(o.values_t.dtype for o in refresh if o is not None)
        following = values[0].dtype, dtype, len(rows)
        rows += [[0 if o is None or o[index] is None else o[index].data_ptr() for o in own] for index in range(4)]
    pointers = table(rows, device)
    survivors = remove_many(
        values, ids, n, zeta, temperature, removal, seed, layers, step, schedule=schedule, pointers=pointers
    )
    scores = score_raw(survivors) if regrowth != "random" or stats else None
    old_ids, counters = regrow_many(
        scores, survivors, n, regrowth, seed, pointers, step,
        sizes=[bits(values[0]), *(bits(m) for m in moments[0])], in_place=True, stats=stats, schedule=schedule,
        refresh=following,
    )  # fmt: skip
    if not stats:
        return old_ids, survivors, None
    links = values[0].numel()
    removed = int(zeta * links) if schedule is None else (schedule[0] * links).floor()
    return old_ids, survivors, _stats(scores, survivors, old_ids, counters, n, links - removed)


def _stats(
    scores: Raw,
    survivors: torch.Tensor,
    old_ids: torch.Tensor,
    counters: torch.Tensor,
    n: int,
    kept: int | torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The figures of :func:`chts_kernels.evolve.evolution_stats`, [B] each."""
    device = survivors.device
    layers, block_rows, block_columns = survivors.shape
    blocks = block_rows * block_columns
    patterns = pattern_table(n)
    partials = torch.empty(layers, PARTIALS, 4, dtype=torch.float64, device=device)
    MOMENTS(
        PARTIALS * layers, scores.sums, scores.degrees, scores.state, survivors, old_ids, patterns.tensor("mask16", device),
        partials, block_columns, blocks, scores.rows_padded, scores.columns_padded, PARTIALS,
        PATTERNS=len(patterns), QMAX=scores.qmax, BLOCKS=128,
    )  # fmt: skip
    before, before2, after, after2 = partials.sum(1).unbind(1)
    links = blocks * 4 * n
    choice, replaced, noise_changed, _ = counters.double().unbind(1)
    mean, mean_kept = before / links, after / kept
    return {
        "can_change_blocks": choice,
        "replaced": replaced,
        "turnover": replaced / links,
        "noise_changed_blocks": noise_changed / blocks,
        "score_mean": mean,
        "score_var": before2 / links - mean * mean,
        "score_mean_survivors": mean_kept,
        "score_var_survivors": after2 / kept - mean_kept * mean_kept,
    }
