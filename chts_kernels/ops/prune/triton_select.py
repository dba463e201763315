"""The exact best pattern of a 4x4 block, in registers: Triton device functions shared by every kernel that selects.

A pattern of 2:4 is a choice of two columns in every row: choice 0 to 5 in the lexicographic order of the row tuples, so
that choice ``5 - a`` is the complement of choice ``a``. The columns of rows 0 and 1, (a, b), leave to rows 2 and 3 only

* (5 - b, 5 - a) and (5 - a, 5 - b): the two columns that a and b left free, in either order (one order when a == b), or
* when b == 5 - a, any (c, 5 - c): six.

Rounding is monotone, so the best sum under (a, b) is ``(row0[a] + row1[b]) + max over those of (row2[c] + row3[d])``: the
maxima are shared and 36 sums decide instead of 90. Ids ascend with (a, b, c), so the lowest id of the largest *rounded* sum,
which is the reference's rule, is the first a, then the first b, then the first c that attains it. For that the last
comparisons are made on rounded sums again, never on the half sums. 1:4 is the same with single columns: choice a is column
3 - a, (a, b) leave two columns, in two orders.

Sums are additions only, ``(row0 + row1) + (row2 + row3)``, each row's scores left to right, as in the reference.
"""

import triton
import triton.language as tl

LARGEST_SCORE = tl.constexpr(2.0**120)  # reference.LARGEST_SCORE: what inf, NaN and anything larger count as


@triton.jit
def score_of(x, SQUARE: tl.constexpr):
    """float32 score of a float32 element: |x| or x * x, at most LARGEST_SCORE (NaN too: this minimum drops a NaN)."""
    magnitude = tl.abs(x)
    if SQUARE:
        magnitude = magnitude * magnitude
    return tl.where(magnitude < LARGEST_SCORE, magnitude, LARGEST_SCORE)


@triton.jit
def best_pattern(x, required, LINKS: tl.constexpr, REQUIRED: tl.constexpr):
    """int32 pattern id of the largest sum of scores; the lowest id wins a tie.

    ``x``: 16 float32 tensors, row-major, not negative, not NaN. With REQUIRED, patterns that miss a link of the int32 bit masks
    ``required`` (bit 4 r + c) are out of the question; at least one pattern must be left.
    """
    if LINKS == 2:
        return _best_of_90(x, required, REQUIRED)
    else:
        return _best_of_24(x, required, REQUIRED)


@triton.jit
def _largest(x):
    """The largest of a tuple of float32 tensors >= 0 or -inf: such floats order like their bits, except that -inf and -inf need
    not be told apart, and of integers Hopper takes the largest of three in one instruction."""
    largest = x[0].to(tl.int32, bitcast=True)
    for i in tl.static_range(1, len(x)):
        largest = tl.maximum(largest, x[i].to(tl.int32, bitcast=True))
    return largest.to(tl.float32, bitcast=True)


@triton.jit
def _allow(total, required, ROW: tl.constexpr, COLUMNS: tl.constexpr, REQUIRED: tl.constexpr):
    """The score of a row's choice, -inf when it misses a required link of the row."""
    if REQUIRED:
        return tl.where((required & ((15 ^ COLUMNS) << (4 * ROW))) == 0, total, float("-inf"))
    else:
        return total


@triton.jit
def _row_of_two(x, required, ROW: tl.constexpr, REQUIRED: tl.constexpr):
    """Scores of the choices 0011, 0101, 0110, 1001, 1010, 1100 of a row."""
    x0, x1, x2, x3 = x[4 * ROW], x[4 * ROW + 1], x[4 * ROW + 2], x[4 * ROW + 3]
    return (
        _allow(x2 + x3, required, ROW, 0b1100, REQUIRED),
        _allow(x1 + x3, required, ROW, 0b1010, REQUIRED),
        _allow(x1 + x2, required, ROW, 0b0110, REQUIRED),
        _allow(x0 + x3, required, ROW, 0b1001, REQUIRED),
        _allow(x0 + x2, required, ROW, 0b0101, REQUIRED),
        _allow(x0 + x1, required, ROW, 0b0011, REQUIRED),
    )


@triton.jit
def _row_of_one(x, required, ROW: tl.constexpr, REQUIRED: tl.constexpr):
    """Scores of the choices 0001, 0010, 0100, 1000 of a row."""
    return (
        _allow(x[4 * ROW + 3], required, ROW, 0b1000, REQUIRED),
        _allow(x[4 * ROW + 2], required, ROW, 0b0100, REQUIRED),
        _allow(x[4 * ROW + 1], required, ROW, 0b0010, REQUIRED),
        _allow(x[4 * ROW], required, ROW, 0b0001, REQUIRED),
    )


@triton.jit
def _pick(x, index):
    """``x[index]`` of a tuple of 4 or 6 for a tensor of indices."""
    odd = (index & 1) != 0
    picked = tl.where((index & 2) != 0, tl.where(odd, x[3], x[2]), tl.where(odd, x[1], x[0]))
    if len(x) == 6:
        picked = tl.where(index >= 4, tl.where(odd, x[5], x[4]), picked)
    return picked


@triton.jit
def _first_above(totals, row_score, CHOICE: tl.constexpr, best, index, score, sums):
    """Keep the running (best, index, score of row 0, totals) or, where one of ``totals`` exceeds best, replace them."""
    largest = _largest((best,) + totals)
    better = largest != best
    index = tl.where(better, CHOICE, index)
    score = tl.where(better, row_score, score)
    kept = ()
    for b in tl.static_range(len(totals)):
        kept = kept + (tl.where(better, totals[b], sums[b]),)
    return largest, index, score, kept


@triton.jit
def _first_equal(sums, row, best):
    """Index of the first of ``sums`` that equals ``best`` (one does), and the element of ``row`` at that index."""
    LAST: tl.constexpr = len(sums) - 1
    index = tl.full(best.shape, LAST, tl.int32)
    score = row[LAST]
    for step in tl.static_range(LAST):
        hit = sums[LAST - 1 - step] == best
        index = tl.where(hit, LAST - 1 - step, index)
        score = tl.where(hit, row[LAST - 1 - step], score)
    return index, score


@triton.jit
def _best_of_90(x, required, REQUIRED: tl.constexpr):
    row0 = _row_of_two(x, required, 0, REQUIRED)
    row1 = _row_of_two(x, required, 1, REQUIRED)
    row2 = _row_of_two(x, required, 2, REQUIRED)
    row3 = _row_of_two(x, required, 3, REQUIRED)
    complements = ()
    for c in tl.static_range(6):
        complements = complements + (row2[c] + row3[5 - c],)
    any_complement = _largest(complements)

    # Rows 0 and 1: the first a that attains the largest sum, with the six sums of that a over b; then the first b.
    for a in tl.static_range(6):
        totals = ()
        for b in tl.static_range(6):
            if a + b == 5:
                rest = any_complement
            elif a == b:
                rest = row2[5 - a] + row3[5 - a]
            else:
                rest = _largest((row2[5 - a] + row3[5 - b], row2[5 - b] + row3[5 - a]))
            totals = totals + ((row0[a] + row1[b]) + rest,)
        if a == 0:
            best = _largest(totals)
            index_a = tl.zeros_like(best).to(tl.int32)
            score_a = row0[0]
            sums = totals
        else:
            best, index_a, score_a, sums = _first_above(totals, row0[a], a, best, index_a, score_a, sums)
    index_b, score_b = _first_equal(sums, row1, best)

    # Rows 2 and 3: the first completion that attains the same rounded sum.
    upper = score_a + score_b
    left = 5 - index_a
    right = 5 - index_b
    low, high = tl.minimum(left, right), tl.maximum(left, right)
    option = tl.where(upper + (_pick(row2, low) + _pick(row3, high)) == best, 0, 1)
    of_six = tl.full(best.shape, 5, tl.int32)
    for step in tl.static_range(5):
        of_six = tl.where(upper + complements[4 - step] == best, 4 - step, of_six)
    option = tl.where(index_a == right, of_six, option)

    # Patterns before (a, b): 15 for every a; under an a, 2 for every b, but 1 for b == a and 6 for b == 5 - a.
    before = 15 * index_a + 2 * index_b - (index_b > index_a).to(tl.int32) + 4 * (index_b > left).to(tl.int32)
    return before + option


@triton.jit
def _other_two(row2, row3, A: tl.constexpr, B: tl.constexpr):
    """The better order of the two columns that are neither A nor B."""
    C: tl.constexpr = 0 if A * B > 0 else (1 if A + B > 1 else 2)
    D: tl.constexpr = 6 - A - B - C
    return _largest((row2[C] + row3[D], row2[D] + row3[C]))


@triton.jit
def _best_of_24(x, required, REQUIRED: tl.constexpr):
    row0 = _row_of_one(x, required, 0, REQUIRED)
    row1 = _row_of_one(x, required, 1, REQUIRED)
    row2 = _row_of_one(x, required, 2, REQUIRED)
    row3 = _row_of_one(x, required, 3, REQUIRED)

    # As above; b counts the three choices that a leaves to row 1, and (c, d), c < d, are the two that are left then.
    for a in tl.static_range(4):
        totals = ()
        others = ()
        for b in tl.static_range(4):
            if b != a:
                rest = _other_two(row2, row3, a, b)
                totals = totals + ((row0[a] + row1[b]) + rest,)
                others = others + (row1[b],)
        if a == 0:
            best = _largest(totals)
            index_a = tl.zeros_like(best).to(tl.int32)
            score_a = row0[0]
            sums = totals
            left = others
        else:
            before = best
            best, index_a, score_a, sums = _first_above(totals, row0[a], a, best, index_a, score_a, sums)
            kept = ()
            for b in tl.static_range(3):
                kept = kept + (tl.where(best != before, others[b], left[b]),)
            left = kept
    rank_b, score_b = _first_equal(sums, left, best)

    index_b = rank_b + (rank_b >= index_a).to(tl.int32)
    low = tl.where((index_a != 0) & (index_b != 0), 0, tl.where(index_a + index_b != 1, 1, 2))
    high = 6 - index_a - index_b - low
    is_first = (score_a + score_b) + (_pick(row2, low) + _pick(row3, high)) == best
    return 6 * index_a + 2 * rank_b + tl.where(is_first, 0, 1)
