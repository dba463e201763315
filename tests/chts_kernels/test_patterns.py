"""The pattern tables against brute force that shares no code with them."""

from __future__ import annotations

import hashlib
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from chts_kernels import pattern_table
from chts_kernels.patterns import ILLEGAL_ID

COUNTS = {1: 24, 2: 90}
HASHES = {
    1: "52717f7beaac1232eac5e460351bf2465b11eff6ca304226e14765febeed5b46",
    2: "ed71c4754273b259c526988424e2d1382cac571b448d4da80a026f7aa6ea6681",
}
BOTH = pytest.mark.parametrize("n", (1, 2))


def all_patterns(n: int) -> list[tuple[int, ...]]:
    """Row-major 16-tuples in lexicographic order, filtered from all 2**16."""
    legal = []
    for bits in itertools.product((0, 1), repeat=16):
        rows = [bits[4 * r : 4 * r + 4] for r in range(4)]
        if all(sum(row) == n for row in rows) and all(sum(column) == n for column in zip(*rows, strict=True)):
            legal.append(bits)
    return legal


def mask16(bits: tuple[int, ...]) -> int:
    return sum(bit << place for place, bit in enumerate(bits))


def transpose(bits: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(bits[4 * r + c] for c in range(4) for r in range(4))


@pytest.fixture(scope="module", params=(1, 2))
def case(request: pytest.FixtureRequest):
    return request.param, pattern_table(request.param), all_patterns(request.param)


def test_enumeration_is_all_legal_patterns_in_lexicographic_order(case) -> None:
    n, table, legal = case
    assert len(table) == len(legal) == COUNTS[n]
    assert legal == sorted(legal)
    assert [tuple(m.flatten().astype(int)) for m in table.masks] == legal
    assert table.mask16.tolist() == [mask16(bits) for bits in legal]
    assert table.n == n


def test_n2_patterns_are_72_eight_cycles_and_18_pairs_of_four_cycles() -> None:
    components = []
    for mask in pattern_table(2).masks:
        parent = list(range(8))  # rows 0-3, columns 4-7

        def find(node: int, parent: list[int] = parent) -> int:
            while parent[node] != node:
                node = parent[node]
            return node

        for r, c in zip(*np.nonzero(mask), strict=True):
            parent[find(int(r))] = find(4 + int(c))
        components.append(len({find(node) for node in range(8)}))
    assert components.count(1) == 72
    assert components.count(2) == 18


def test_id_from_mask_knows_every_16_bit_mask(case) -> None:
    _, table, legal = case
    expected = np.full(1 << 16, ILLEGAL_ID)
    for index, bits in enumerate(legal):
        expected[mask16(bits)] = index
    assert np.array_equal(table.id_from_mask, expected)


def test_transpose_id(case) -> None:
    n, table, legal = case
    assert table.transpose_id.tolist() == [legal.index(transpose(bits)) for bits in legal]
    fixed = int((table.transpose_id == np.arange(len(table))).sum())
    assert fixed == {1: 10, 2: 18}[n]  # n = 1: the involutions of four elements


def test_complement_id() -> None:
    legal = all_patterns(2)
    complements = [legal.index(tuple(1 - bit for bit in bits)) for bits in legal]
    assert pattern_table(2).complement_id.tolist() == complements
    assert all(a != b for a, b in enumerate(complements))
    assert pattern_table(1).complement_id is None


def test_columns(case) -> None:
    n, table, legal = case
    for index, bits in enumerate(legal):
        for r in range(4):
            assert table.columns[index, r].tolist() == [c for c in range(4) if bits[4 * r + c]]
    assert table.columns.shape == (COUNTS[n], 4, n)


def test_slot_maps(case) -> None:
    n, table, legal = case
    for index, bits in enumerate(legal):
        row_order = [(r, c) for r in range(4) for c in range(4) if bits[4 * r + c]]
        column_order = [(r, c) for c in range(4) for r in range(4) if bits[4 * r + c]]
        to = table.to_transposed_slot[index].tolist()
        assert to == [column_order.index(link) for link in row_order]
        assert [table.from_transposed_slot[index][slot] for slot in to] == list(range(4 * n))
        # the slot grammar of the docstring: r * n + j and c * n + i
        assert all(to[slot] // n == c for slot, (_, c) in enumerate(row_order))
        # a transposed block's map is the inverse
        assert table.to_transposed_slot[table.transpose_id[index]].tolist() == table.from_transposed_slot[index].tolist()


def test_metadata_nibbles(case) -> None:
    n, table, legal = case
    for index, bits in enumerate(legal):
        for r in range(4):
            nibble = int(table.meta16[index]) >> 4 * r & 0xF
            first, second = nibble & 3, nibble >> 2
            active = [c for c in range(4) if bits[4 * r + c]]
            assert first < second
            if n == 2:
                assert [first, second] == active
            else:
                (column,) = active
                assert {first, second} == {column, column ^ 1}
                assert (first, second)[column & 1] == column


def test_completions_counts_the_patterns_that_contain_a_mask(case) -> None:
    _, table, legal = case
    masks = [mask16(bits) for bits in legal]
    every = np.arange(1 << 16)
    expected = np.zeros(1 << 16, dtype=int)
    for mask in masks:
        expected += (every & mask) == every
    assert np.array_equal(table.completions, expected)


ORACLE = {
    2: (
        [Fraction(1), Fraction(51, 35), Fraction(13, 5), Fraction(907, 175), Fraction(75, 7), Fraction(155, 7),
         Fraction(45), Fraction(90)],
        [Fraction(0), Fraction(16, 35), Fraction(6, 7), Fraction(174, 175), Fraction(1), Fraction(1), Fraction(1),
         Fraction(1)],
    ),
    1: ([Fraction(1), Fraction(2), Fraction(6), Fraction(24)], [Fraction(0), Fraction(1), Fraction(1), Fraction(1)]),
}  # fmt: skip


def completions_after_removal(n: int, k: int) -> list[int]:
    """Over every pattern and every k of its links removed: how many patterns hold all the survivors (Python sets)."""
    patterns = [frozenset(place for place, bit in enumerate(bits) if bit) for bits in all_patterns(n)]
    return [
        sum(survivors <= other for other in patterns)
        for pattern in patterns
        for survivors in map(frozenset, itertools.combinations(sorted(pattern), 4 * n - k))
    ]


@pytest.mark.parametrize(("n", "k"), [(n, k) for n in (2, 1) for k in range(1, 4 * n + 1)])
def test_completions_oracle(n: int, k: int) -> None:
    """The table of ALGORITHM section 3, exactly."""
    counts = completions_after_removal(n, k)
    means, shares = ORACLE[n]
    assert Fraction(sum(counts), len(counts)) == means[k - 1]
    assert Fraction(sum(count > 1 for count in counts), len(counts)) == shares[k - 1]


@pytest.mark.parametrize(
    ("n", "expected"), [(2, {0.1: 0.1014, 0.2: 0.3161, 0.3: 0.5467}), (1, {0.1: 0.0523, 0.2: 0.1808, 0.3: 0.3483})]
)
def test_share_of_blocks_that_can_change_under_independent_removal(n: int, expected: dict[float, float]) -> None:
    table = pattern_table(n)
    for zeta, share in expected.items():
        total = 0.0
        for mask in table.mask16.tolist():
            links = [place for place in range(16) if mask >> place & 1]
            for kept in range(1 << len(links)):
                survivors = sum(1 << place for i, place in enumerate(links) if kept >> i & 1)
                k = len(links) - kept.bit_count()
                probability = zeta**k * (1 - zeta) ** (len(links) - k)
                total += probability * (table.completions[survivors] > 1) / len(table)
        assert round(total, 4) == share


def test_hash_is_pinned() -> None:
    """Stored ids are meaningless under another enumeration: these literals never change."""
    for n, expected in HASHES.items():
        assert pattern_table(n).hash == expected
        content = bytes([n]) + b"".join(mask16(bits).to_bytes(2, "little") for bits in all_patterns(n))
        assert hashlib.sha256(content).hexdigest() == expected


@BOTH
def test_tensor_gives_every_table_once(n: int) -> None:
    table = pattern_table(n)
    for name in ("masks", "mask16", "id_from_mask", "transpose_id", "columns", "to_transposed_slot",
                 "from_transposed_slot", "meta16", "completions"):  # fmt: skip
        tensor = table.tensor(name)
        assert np.array_equal(tensor.numpy(), getattr(table, name)), name
        assert tensor is table.tensor(name, "cpu")
    assert table.tensor("mask16").dtype == torch.int32
    assert pattern_table(n) is table


@BOTH
def test_tensor_made_under_a_fake_mode_is_real(n: int) -> None:
    from chts_kernels.patterns import _table_tensor

    _table_tensor.cache_clear()
    with torch._subclasses.FakeTensorMode():
        tensor = pattern_table(n).tensor("mask16")
    assert type(tensor) is torch.Tensor
    assert tensor.tolist() == pattern_table(n).mask16.tolist()


@pytest.mark.parametrize("n", (0, 3, 4, "2", None))
def test_other_n_is_refused(n: object) -> None:
    with pytest.raises(ValueError, match=r"n: must be 1 \(1:4\) or 2 \(2:4\), got"):
        pattern_table(n)


def test_unknown_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name: must be one of \[.*'mask16'.*\] for n = 2, got 'mask'"):
        pattern_table(2).tensor("mask")
    with pytest.raises(ValueError, match="'complement_id'"):
        pattern_table(1).tensor("complement_id")
