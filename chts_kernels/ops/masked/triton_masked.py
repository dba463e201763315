"""mask_operands_ and masked_out_decay_ in Triton: all layers of a model in one launch each, or two.

The search is that of :mod:`chts_kernels.ops.prune.triton_prune`, the packing that of :mod:`chts_kernels.ops.pack.triton_pack`; a program
finds its layer in a table of pointers (:mod:`chts_kernels.ops._layers`). One layer's launches are short (a small model's 512 x 512
layers are 64 programs of four warps): what they cost is mostly their number.

Traffic per element of W: the search reads it and writes n / 2 bytes of values and 1 / 16 of ids for 16-bit computing, the packing reads
those and writes a byte of each operand and 1 / 4 of metadata; the decay reads W and the gradient, and writes the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._batch import BatchKernel, aligned, on_device, triton_type
from .._layers import BLOCK_COLUMNS, BLOCK_ROWS, FIRST_OWN, MOST_LAYERS, entry, layer_of, room, tables
from ..pack import triton_pack
from ..pack.triton_compress import link_column
from ..pack.triton_pack import block_table, half_word, pack_tiles
from ..prune.triton_prune import as_float, best_of_block, link_of_row, load_rows, pairs_of, place_of

IDS, WEIGHT, VALUES = map(tl.constexpr, range(FIRST_OWN, FIRST_OWN + 3))
"""Columns of the tables of the search and of the decay."""
PROGRAMS_K, OPERAND, META, OPERAND_T, META_T = map(tl.constexpr, range(FIRST_OWN + 3, FIRST_OWN + 8))
"""Further ones of the packing's, which has no use for WEIGHT."""
ALIGNED = tl.constexpr(16)


@triton.jit
def pointer(table_ptr, column: tl.constexpr, layer, LAYERS: tl.constexpr, KIND: tl.constexpr):
    """A layer's tensor of elements KIND, on a 16-byte boundary."""
    return tl.multiple_of(entry(table_ptr, column, layer, LAYERS).to(tl.pointer_type(KIND)), ALIGNED)


@triton.jit
def blocks_of(table_ptr, LAYERS: tl.constexpr, LANES_N: tl.constexpr, LANES_K: tl.constexpr):
    """The program's layer, its block_columns, and of every thread what :func:`place_of` says of one block."""
    layer, program = layer_of(table_ptr, tl.program_id(0), LAYERS)
    block_rows = entry(table_ptr, BLOCK_ROWS, layer, LAYERS).to(tl.int32)
    block_columns = entry(table_ptr, BLOCK_COLUMNS, layer, LAYERS).to(tl.int32)
    programs_k = (block_columns + LANES_K - 1) // LANES_K
    block, group, inside = place_of(program, program + 1, programs_k, block_rows, block_columns, 1, LANES_N, LANES_K)
    return layer, block_columns, block, group, inside


@triton.jit
def half_of(bits, MASTER: tl.constexpr, DTYPE: tl.constexpr):
    """The bits of an element of MASTER, as those of the 16-bit DTYPE."""
    if MASTER == DTYPE:
        return bits
    else:
        return half_word(as_float(bits, MASTER), DTYPE)


@triton.jit
def search_kernel(
    table_ptr, patterns_ptr,
    MASTER: tl.constexpr, DTYPE: tl.constexpr, LINKS: tl.constexpr, LAYERS: tl.constexpr, LANES_N: tl.constexpr, LANES_K: tl.constexpr,
):  # fmt: skip
    """Ids and values: a thread takes one block."""
    layer, block_columns, block, group, inside = blocks_of(table_ptr, LAYERS, LANES_N, LANES_K)
    x = load_rows(pointer(table_ptr, WEIGHT, layer, LAYERS, MASTER), group, inside, block_columns, 1)
    rows = (pairs_of(x[0], 1), pairs_of(x[1], 1), pairs_of(x[2], 1), pairs_of(x[3], 1))
    best = best_of_block(rows, 0, MASTER, False, LINKS)
    tl.store(pointer(table_ptr, IDS, layer, LAYERS, tl.uint8) + block, best.to(tl.uint8), mask=inside)
    facts = tl.load(patterns_ptr + best)
    values_ptr = pointer(table_ptr, VALUES, layer, LAYERS, tl.uint32 if LINKS == 2 else tl.uint16)
    for r in tl.static_range(4):
        first = link_of_row(rows[r][0], rows[r][1], link_column(facts, r, 0, LINKS))
        word = half_of(first, MASTER, DTYPE)
        at = group + r * block_columns
        if LINKS == 1:
            tl.store(values_ptr + at, word.to(tl.uint16), mask=inside)
        else:
            second = link_of_row(rows[r][0], rows[r][1], link_column(facts, r, 1, LINKS))
            word = word | half_of(second, MASTER, DTYPE) << 16
            tl.store(values_ptr + at, word, mask=inside)


@triton.jit
def pack_kernel(
    table_ptr, patterns_ptr,
    DTYPE: tl.constexpr, LINKS: tl.constexpr, LAYERS: tl.constexpr, VECTOR_N: tl.constexpr, VECTOR_K: tl.constexpr,
    LANES_N: tl.constexpr, LANES_K: tl.constexpr,
):  # fmt: skip
    """The operands of what the search wrote."""
    layer, program = layer_of(table_ptr, tl.program_id(0), LAYERS)
    pack_tiles(
        pointer(table_ptr, VALUES, layer, LAYERS, DTYPE), pointer(table_ptr, IDS, layer, LAYERS, tl.uint8), patterns_ptr,
        pointer(table_ptr, OPERAND, layer, LAYERS, DTYPE), pointer(table_ptr, META, layer, LAYERS, tl.int32),
        pointer(table_ptr, OPERAND_T, layer, LAYERS, DTYPE), pointer(table_ptr, META_T, layer, LAYERS, tl.int32),
        program, entry(table_ptr, BLOCK_ROWS, layer, LAYERS).to(tl.int32), entry(table_ptr, BLOCK_COLUMNS, layer, LAYERS).to(tl.int32),
        entry(table_ptr, PROGRAMS_K, layer, LAYERS).to(tl.int32), LINKS, LINKS == 1, VECTOR_N, VECTOR_K, LANES_N, LANES_K,
    )  # fmt: skip


@triton.jit
def decay_kernel(
    table_ptr, grads_ptr, patterns_ptr, decay,
    MASTER: tl.constexpr, GRAD: tl.constexpr, LINKS: tl.constexpr, LAYERS: tl.constexpr, LANES_N: tl.constexpr, LANES_K: tl.constexpr,
):  # fmt: skip
    """A thread takes one block, each row of it a vector."""
    layer, block_columns, block, group, inside = blocks_of(table_ptr, LAYERS, LANES_N, LANES_K)
    facts = tl.load(patterns_ptr + tl.load(pointer(table_ptr, IDS, layer, LAYERS, tl.uint8) + block, mask=inside, other=0).to(tl.int32))
    weight_ptr = pointer(table_ptr, WEIGHT, layer, LAYERS, MASTER)
    grad_ptr = tl.multiple_of(tl.load(grads_ptr + layer).to(tl.pointer_type(GRAD)), ALIGNED)
    columns = tl.arange(0, 4)[None, :]
    for r in tl.static_range(4):
        at = 4 * (group + r * block_columns)[:, None] + columns
        linked = columns == link_column(facts, r, 0, LINKS)[:, None]
        if LINKS == 2:
            linked = linked | (columns == link_column(facts, r, 1, LINKS)[:, None])
        w = tl.load(weight_ptr + at, mask=inside[:, None], other=0).to(tl.float32)
        g = tl.load(grad_ptr + at, mask=inside[:, None], other=0)
        tl.store(grad_ptr + at, tl.where(linked, g, (g.to(tl.float32) + decay * w).to(GRAD)), mask=inside[:, None])


SEARCH = BatchKernel(search_kernel, 4)
PACK = BatchKernel(pack_kernel, 1)
DECAY = BatchKernel(decay_kernel, 4, floats=("decay",))
LANES = (4, 32)
"""(LANES_N, LANES_K) of a program of the search and of the decay."""


def _programs(ids: torch.Tensor) -> int:
    return -(-ids.shape[0] // LANES[0]) * -(-ids.shape[1] // LANES[1])


def _parts(*lists: list[torch.Tensor]) -> list[list[list[torch.Tensor]]]:
    """The lists (some empty), cut where a table is full."""
    count = max(map(len, lists))
    return [[entries[at : at + MOST_LAYERS] for entries in lists] for at in range(0, count, MOST_LAYERS)]


def mask_operands_(weights, n, ids, values, operands, metas, operands_t, metas_t) -> None:
    """The op; arguments as in the reference."""
    patterns, written = block_table(n, ids[0].device), [*ids, *values, *operands, *metas, *operands_t, *metas_t]
    weights = [aligned(w) for w in weights]
    with on_device(ids[0]):
        for some_weights, some_ids, some_values in _parts(weights, ids, values):
            counts = [_programs(i) for i in some_ids]
            fixed, _ = tables(counts, some_ids, (some_ids, some_weights, some_values))
            SEARCH(
                sum(counts), fixed, patterns, MASTER=triton_type(weights[0].dtype), DTYPE=triton_type(values[0].dtype), LINKS=n,
                LAYERS=room(len(counts)), LANES_N=LANES[0], LANES_K=LANES[1],
            )  # fmt: skip
        # Layers whose rows are whole vectors go together, the others too.
        groups: dict[tuple[bool, bool], list[int]] = {}
        for i, of_layer in enumerate(ids):
            groups.setdefault((of_layer.shape[0] % 4 == 0, of_layer.shape[1] % 4 == 0), []).append(i)
        lanes_n, lanes_k = triton_pack.lanes()
        for vectors, members in groups.items():
            chosen = [[entries[i] for i in members] if entries else [] for entries in (ids, values, operands, metas, operands_t, metas_t)]
            for some_ids, some_values, *rest in _parts(*chosen):
                tiling = [triton_pack.tiling(*i.shape, lanes_n, lanes_k) for i in some_ids]
                counts = [programs for programs, _ in tiling]
                fixed, _ = tables(counts, some_ids, (some_ids, (), some_values, [along_k for _, along_k in tiling], *rest))
                PACK(
                    sum(counts), fixed, patterns, num_warps=lanes_n * lanes_k // 32, DTYPE=triton_type(values[0].dtype), LINKS=n,
                    LAYERS=room(len(counts)), VECTOR_N=vectors[0], VECTOR_K=vectors[1], LANES_N=lanes_n, LANES_K=lanes_k,
                )  # fmt: skip
    torch.autograd.graph.increment_version(written)  # a kernel's writes are invisible to the version counters


def masked_out_decay_(grads, weights, ids, n, decay) -> None:
    """The op; arguments as in the reference."""
    weights, readable = [aligned(w) for w in weights], [aligned(g) for g in grads]
    with on_device(ids[0]):
        for some_grads, some_weights, some_ids in _parts(readable, weights, ids):
            counts = [_programs(i) for i in some_ids]
            fixed, moving = tables(counts, some_ids, (some_ids, some_weights), some_grads)
            DECAY(
                sum(counts), fixed, moving, block_table(n, ids[0].device), decay, MASTER=triton_type(weights[0].dtype),
                GRAD=triton_type(grads[0].dtype), LINKS=n, LAYERS=room(len(counts)), LANES_N=LANES[0], LANES_K=LANES[1],
            )  # fmt: skip
    for given, used in zip(grads, readable, strict=True):
        if given is not used:
            given.copy_(used)
    torch.autograd.graph.increment_version(grads)
