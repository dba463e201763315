"""SparseWeight and what is derived from it: round trips, special numbers, transposition, operands kept in place."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chts_kernels import Operands, SparseWeight, pack, pack_operands_, pattern_table, random_ids, unpack
from chts_kernels.check import FLOATS
from chts_kernels.layout import ids_from_metadata, metadata_from_ids, metadata_shape
from chts_kernels.testing import assert_bitwise_equal, poison, random_tensor, random_weight, special_values

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
BOTH = pytest.mark.parametrize("n", (1, 2))
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda s: (4 * s[0], 4 * s[1]))


@st.composite
def weights(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> SparseWeight:
    """Any shape, any legal ids and any bits as values: NaN payloads, infinities, -0.0 and subnormals included."""
    n = draw(st.sampled_from((1, 2)))
    rows, columns = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ids = torch.randint(0, len(pattern_table(n)), (rows // 4, columns // 4), generator=generator, dtype=torch.uint8)
    dtype = draw(st.sampled_from(dtypes))
    size = dtype.itemsize * rows * columns // 4 * n
    values = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).view(rows, -1)
    special = special_values(dtype)
    place = torch.randint(0, values.numel(), (len(special),), generator=generator)
    values.view(-1)[place] = special
    return SparseWeight(ids, values, n)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(INTEGERS[x.dtype])


def dense_by_loops(w: SparseWeight) -> torch.Tensor:
    """W from the definition: the j-th value of row r of a block sits at the row's j-th active column."""
    rows, columns = w.shape
    dense = torch.zeros(rows, columns, dtype=w.dtype)
    masks = pattern_table(w.n).masks
    for row, group in itertools.product(range(rows), range(columns // 4)):
        active = masks[int(w.ids[row // 4, group])][row % 4].nonzero()[0]
        for j, column in enumerate(active):
            bits(dense)[row, 4 * group + int(column)] = bits(w.values)[row, w.n * group + j]
    return dense


# --- round trips


@SETTINGS
@given(weights())
def test_pack_and_unpack_move_bits(w: SparseWeight) -> None:
    dense = w.to_dense()
    assert_bitwise_equal(dense, dense_by_loops(w))
    assert_bitwise_equal(pack(dense, w.ids, w.n), w.values)
    assert_bitwise_equal(unpack(pack(dense, w.ids, w.n), w.ids, w.n), dense)


@SETTINGS
@given(weights())
def test_transpose(w: SparseWeight) -> None:
    transposed = w.T
    assert transposed.shape == w.shape[::-1] and transposed.n == w.n
    transposed.validate()
    assert_bitwise_equal(transposed.to_dense(), w.to_dense().t())
    assert_bitwise_equal(transposed.T.values, w.values)
    assert torch.equal(transposed.T.ids, w.ids)
    assert torch.equal(transposed.mask(), w.mask().t())


@SETTINGS
@given(weights())
def test_mask_is_the_patterns_and_has_n_of_4_both_ways(w: SparseWeight) -> None:
    mask = w.mask()
    blocks = mask.view(w.shape[0] // 4, 4, w.shape[1] // 4, 4).transpose(1, 2)
    assert torch.equal(blocks, pattern_table(w.n).tensor("masks")[w.ids.long()])
    assert (blocks.sum(2) == w.n).all() and (blocks.sum(3) == w.n).all()
    assert int(mask.sum()) == w.links == w.values.numel()


@SETTINGS
@given(weights())
def test_copies_carry_the_weight_and_drop_what_is_derived(w: SparseWeight) -> None:
    w.operands(torch.bfloat16)
    for other in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert_bitwise_equal(other.values, w.values)
        assert torch.equal(other.ids, w.ids) and other.n == w.n
        assert other.values.data_ptr() != w.values.data_ptr()
        assert other.nbytes == w.values.nbytes + w.ids.nbytes < w.nbytes
        other.operands(torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
@BOTH
def test_special_values_keep_their_place_and_bits(n: int, dtype: torch.dtype) -> None:
    """The policy: which element is a link is a fact of the pattern. -0.0, inf and NaN (payload too) are just values."""
    special = special_values(dtype)
    w = random_weight(8, 16, n, dtype)
    w.values.view(-1)[: len(special)] = special
    bits(w.values).view(-1)[0] = bits(torch.tensor([torch.nan], dtype=dtype))[0] | 1
    assert_bitwise_equal(pack(w.to_dense(), w.ids, n), w.values)
    assert int(w.mask().sum()) == w.links  # zeros are links as well
    absent = w.to_dense()[~w.mask()]
    assert_bitwise_equal(absent, torch.zeros_like(absent))  # +0, never -0


def test_from_dense_keeps_special_values() -> None:
    dense = random_tensor((4, 4)) * 0.01
    dense[0, 0], dense[1, 1], dense[2, 2], dense[3, 3] = float("nan"), -float("inf"), float("inf"), -0.0
    w = SparseWeight.from_dense(dense)
    mask = w.mask()
    assert mask[0, 0] and mask[1, 1] and mask[2, 2]
    assert_bitwise_equal(w.to_dense(), torch.where(mask, dense, 0.0))


@pytest.mark.parametrize("score", ("abs", "square"))
@BOTH
def test_from_dense_is_prune_and_pack(n: int, score: str) -> None:
    from chts_kernels import prune

    dense = random_tensor((24, 16), torch.bfloat16, seed=3)
    w = SparseWeight.from_dense(dense, n, score=score)
    assert torch.equal(w.ids, prune(dense, n, score))
    assert_bitwise_equal(w.to_dense(), torch.where(w.mask(), dense, 0.0))


def test_holds_its_tensors_without_copying() -> None:
    ids, values = random_ids(8, 8, seed=0), torch.nn.Parameter(torch.ones(8, 4))
    w = SparseWeight(ids, values)
    assert w.ids is ids and w.values is values
    with torch.no_grad():
        values.fill_(3.0)
    assert w.to_dense().sum() == 3.0 * w.links
    assert not w.to_dense().requires_grad and not w.T.values.requires_grad


# --- random


@BOTH
def test_random_is_uniform_over_the_patterns(n: int) -> None:
    count = len(pattern_table(n))
    draws = random_ids(1024, 1024, n, seed=5)
    frequency = torch.bincount(draws.flatten().long(), minlength=count).double()
    expected = draws.numel() / count
    assert len(frequency) == count
    assert ((frequency - expected) ** 2 / expected).sum() < count + 4 * (2 * count) ** 0.5


@BOTH
def test_random_depends_on_seed_and_layer_alone(n: int) -> None:
    first, again = (SparseWeight.random(16, 12, n, seed=1, layer=2, std=0.5) for _ in range(2))
    assert_bitwise_equal(first.values, again.values)
    assert torch.equal(first.ids, again.ids)
    for other in (SparseWeight.random(16, 12, n, seed=2, layer=2), SparseWeight.random(16, 12, n, seed=1, layer=3)):
        assert not torch.equal(first.ids, other.ids) and not torch.equal(first.values, other.values)
    assert torch.equal(random_ids(16, 12, n, seed=1, layer=2), first.ids)
    big = SparseWeight.random(256, 256, n, std=0.02, dtype=torch.float16)
    assert big.dtype == torch.float16 and abs(big.values.float().std() / 0.02 - 1) < 0.03


# --- facts about itself


@BOTH
def test_properties_and_repr(n: int) -> None:
    w = random_weight(8, 16, n, torch.bfloat16)
    assert w.shape == (8, 16) and w.links == 8 * 16 * n // 4 and w.dtype == torch.bfloat16
    assert w.device == torch.device("cpu")
    assert w.nbytes == w.links * 2 + 8
    assert repr(w) == f"SparseWeight(shape=(8, 16), n={n}, dtype=torch.bfloat16, device='cpu', nbytes={w.nbytes})"
    before = w.nbytes
    operands = w.operands(torch.bfloat16)
    assert w.nbytes == before + operands.nbytes


@BOTH
def test_validate_names_the_first_bad_block(n: int) -> None:
    w = random_weight(8, 16, n)
    w.validate()
    count = len(pattern_table(n))
    w.ids[1, 2], w.ids[1, 3] = count, 255
    message = rf"ids: must be pattern ids below {count} for n = {n}, got {count} at block \(1, 2\) and 1 more"
    with pytest.raises(ValueError, match=message):
        w.validate()


# --- operands


def widened_by_loops(dense: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The 2:4 operand [N, K/2] of a transposable matrix: each group's links; 1:4 sits in slot column & 1."""
    rows, columns = dense.shape
    operand = torch.zeros(rows, columns // 2, dtype=dense.dtype)
    for row, group in itertools.product(range(rows), range(columns // 4)):
        active = mask[row, 4 * group : 4 * group + 4].nonzero().flatten().tolist()
        for j, column in enumerate(active):
            slot = j if len(active) == 2 else column & 1
            operand[row, 2 * group + slot] = dense[row, 4 * group + column]
    return operand


def metadata_by_loops(ids: torch.Tensor, n: int) -> torch.Tensor:
    """Register order from its description: one int32 for every slab, step and thread."""
    slabs, steps, threads = metadata_shape(ids.shape[0] * 4, ids.shape[1] * 4)
    meta16 = pattern_table(n).meta16
    expected = torch.zeros(slabs, steps, threads, dtype=torch.int64)
    for slab, step, thread in itertools.product(range(slabs), range(steps), range(threads)):
        warp, lane = divmod(thread, 32)
        g, q = divmod(lane, 4)
        word = 0
        for high in (0, 1):
            row = 64 * slab + 16 * warp + g + 8 * high
            for i in range(4):
                group = 16 * step + 8 * (q // 2) + 4 * (q % 2) + i
                nibble = 0b0100
                if row // 4 < ids.shape[0] and group < ids.shape[1]:
                    nibble = int(meta16[int(ids[row // 4, group])]) >> 4 * (row % 4) & 0xF
                word |= nibble << 16 * high + 4 * i
        expected[slab, step, thread] = word
    return torch.where(expected >= 1 << 31, expected - (1 << 32), expected).to(torch.int32)


@pytest.mark.parametrize("shape", ((4, 4), (72, 136), (516, 64)))
@BOTH
def test_metadata_is_in_register_order(n: int, shape: tuple[int, int]) -> None:
    ids = random_ids(*shape, n, seed=2)
    meta = metadata_from_ids(ids, n)
    assert tuple(meta.shape) == metadata_shape(*shape) == (-(-shape[0] // 512) * 8, -(-shape[1] // 64), 128)
    assert meta.is_contiguous()
    assert_bitwise_equal(meta, metadata_by_loops(ids, n))


@SETTINGS
@given(shapes, st.integers(0, 2**32))
def test_metadata_inverse(shape: tuple[int, int], seed: int) -> None:
    ids = random_ids(*shape, 2, seed=seed)
    assert torch.equal(ids_from_metadata(metadata_from_ids(ids, 2), *shape, 2), ids)


def test_metadata_inverse_shows_damage_and_refuses_n1() -> None:
    ids = random_ids(8, 8, seed=0)
    meta = metadata_from_ids(ids, 2)
    meta[0, 0, 0] ^= 0b0011
    assert (ids_from_metadata(meta, 8, 8, 2) != ids).sum() == 1
    with pytest.raises(ValueError, match=r"n: must be 2 .*, got 1"):
        ids_from_metadata(meta, 8, 8, 1)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("master", (torch.float32, torch.bfloat16))
@BOTH
def test_operands_hold_w_and_its_transpose(n: int, master: torch.dtype, dtype: torch.dtype) -> None:
    w = random_weight(20, 72, n, master, seed=4)
    with poison():
        operands = w.operands(dtype)
    dense = w.to_dense().to(dtype)
    assert_bitwise_equal(operands.values, widened_by_loops(dense, w.mask()))
    assert_bitwise_equal(operands.values_t, widened_by_loops(dense.t(), w.mask().t()))
    assert_bitwise_equal(operands.meta, metadata_by_loops(w.ids, n))
    assert_bitwise_equal(operands.meta_t, metadata_by_loops(w.T.ids, n))
    shares = operands.values.data_ptr() == w.values.data_ptr()
    assert shares == (n == 2 and master == dtype)


def pointers(operands: Operands) -> list[int]:
    return [t.data_ptr() for t in (operands.values, operands.meta, operands.values_t, operands.meta_t)]


@pytest.mark.parametrize("master", (torch.float32, torch.bfloat16))
@BOTH
def test_operands_refresh_in_place_and_only_after_a_change(n: int, master: torch.dtype, monkeypatch) -> None:
    import chts_kernels.format as module

    packings = []
    real = module.PACK_OPERANDS_
    monkeypatch.setattr(module, "PACK_OPERANDS_", lambda *args, **kw: packings.append(1) or real(*args, **kw))
    w = random_weight(16, 24, n, master)
    first = w.operands(torch.bfloat16)
    places = pointers(first)

    def check_fresh(expected_packings: int) -> None:
        operands = w.operands(torch.bfloat16)
        assert operands is first and pointers(operands) == places
        assert len(packings) == expected_packings
        dense = w.to_dense().to(torch.bfloat16)
        assert_bitwise_equal(operands.values, widened_by_loops(dense, w.mask()))
        assert_bitwise_equal(operands.values_t, widened_by_loops(dense.t(), w.mask().t()))
        assert_bitwise_equal(operands.meta, metadata_from_ids(w.ids, n))
        assert_bitwise_equal(operands.meta_t, metadata_from_ids(w.T.ids, n))

    check_fresh(1)  # nothing changed
    check_fresh(1)
    w.values.mul_(2)
    check_fresh(2)
    w.ids.copy_(random_ids(16, 24, n, seed=9))
    check_fresh(3)
    w.values.data.add_(1)  # hidden from the version counter: the owner says so
    w.operands(torch.bfloat16).invalidate()
    check_fresh(4)


@BOTH
def test_operands_follow_another_dtype_and_other_tensors(n: int) -> None:
    w = random_weight(16, 24, n)
    operands = w.operands(torch.bfloat16)
    assert operands.values.dtype == torch.bfloat16
    assert w.operands(torch.float16).values_t.dtype == torch.float16
    back = w.operands(torch.bfloat16)
    assert_bitwise_equal(back.values_t, widened_by_loops(w.to_dense().t().bfloat16(), w.mask().t()))
    w.values = w.values.clone() + 1  # another tensor, same version
    assert_bitwise_equal(
        w.operands(torch.bfloat16).values_t, widened_by_loops(w.to_dense().t().bfloat16(), w.mask().t())
    )


@pytest.mark.parametrize("what", ("values", "ids"))
def test_operands_notice_a_tensor_that_took_the_memory_of_the_last(what: str) -> None:
    """The allocator hands the address of a freed tensor to its successor; both are at version 0."""
    w = random_weight(64, 64)
    for seed in range(20):
        setattr(w, what, None)
        setattr(w, what, getattr(random_weight(64, 64, seed=seed), what))
        operands = w.operands(torch.bfloat16)
        assert_bitwise_equal(operands.values, w.values.bfloat16())
        assert_bitwise_equal(operands.meta, metadata_from_ids(w.ids, 2))


def test_operands_own_memory_after_they_shared_the_values() -> None:
    """First the operand is the bf16 values themselves, then the master becomes float32: nothing may be written to them."""
    w = random_weight(8, 8, 2, torch.bfloat16)
    shared = w.values
    before = shared.clone()
    w.operands(torch.bfloat16)
    w.values = shared.float() * 3
    operands = w.operands(torch.bfloat16)
    assert_bitwise_equal(shared, before)
    assert_bitwise_equal(operands.values, w.values.bfloat16())


def test_operands_of_inference_tensors_are_always_repacked() -> None:
    with torch.inference_mode():
        w = random_weight(8, 8, 2)
        w.operands(torch.bfloat16)
        w.values.mul_(2)
        assert_bitwise_equal(w.operands(torch.bfloat16).values, w.values.bfloat16())


@BOTH
def test_pack_operands_into_given_memory(n: int) -> None:
    from chts_kernels.ops.pack import empty_operands

    w = random_weight(12, 8, n)
    with poison():
        operand, meta, operand_t, meta_t = empty_operands(12, 8, torch.float16, w.device)
    assert operand.isnan().all()
    pack_operands_(w.values, w.ids, n, operand, meta, operand_t, meta_t)
    assert_bitwise_equal(operand, widened_by_loops(w.to_dense().half(), w.mask()))
    pack_operands_(w.values, w.ids, n, None, meta, operand_t, meta_t)
    assert_bitwise_equal(operand_t, widened_by_loops(w.to_dense().half().t(), w.mask().t()))
