"""The least that a case can cost: floating-point operations and bytes, from its shape alone.

Operations are dense-equivalent (2 T N K for a product, whatever is sparse), so that rates of sparse and dense providers
compare; a sparse product may therefore exceed the dense roof, up to twofold. Bytes count every input once and every output
once, in the compressed form: values N K / 2 (N K / 4 for 1:4), ids one byte per 16 weights, metadata two.
"""

from __future__ import annotations

from benchmarks.cases import Case

ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
LARGE_FLOP = 6e10
"""From here on a product runs long and hot enough for the power limit to set its clock: it is measured in two regimes."""


def flops(case: Case) -> float | None:
    """Dense-equivalent floating-point operations; None where counting them says nothing."""
    d = case.dims
    if "model" in d:
        return None
    if case.suite in ("linear", "host") and "tokens" in d and case.op in _PRODUCTS:
        return 2.0 * d["tokens"] * d["out"] * d["in"] * _PRODUCTS[case.op]
    if case.suite == "topology" and case.op == "score":
        return 4.0 * d["out"] * d["in"] * (d["out"] + d["in"])  # P and W M for rows, the same for columns
    return None


def least_bytes(case: Case, *, dense_weight: bool = False) -> float | None:
    """Bytes that must cross device memory; None where counting them says nothing (models, whole updates)."""
    d = case.dims
    if "model" in d:
        return None
    weights, item = d["out"] * d["in"], ITEM[case.dtype]
    links = weights * case.n / 4
    ids = weights / 16
    operand = weights / 2 * item + weights / 8  # 2:4 values and metadata; 1:4 is widened to 2:4
    if case.suite in ("linear", "host") and case.op in _PRODUCTS:
        x, y = d["tokens"] * d["in"] * item, d["tokens"] * d["out"] * item
        weight = weights * item if dense_weight else operand
        if case.op.startswith("weight_grad"):
            return x + y + (weights * item if dense_weight else links * item + ids)
        return (x + y + weight) * _PRODUCTS[case.op]
    table = {
        "prune": weights * item + ids,
        "prune14": weights * item + ids,
        "prune_pack": weights * item + ids + links * item + 2 * operand - weights / 2 * item,
        "pack": weights * item + ids + links * item,
        "pack_operands": links * 4 + ids + 2 * operand,
        "pack_operands_shared": links * item + ids + 2 * operand - weights / 2 * item,
        "remove": links * 4 + ids + 4 * ids,
        "score": 4 * ids + weights * 4,
        "regrow": weights * 4 + 4 * ids + ids,
        "carry_over": 3 * 2 * links * 4 + 2 * ids,
        "adam": 28 * weights if dense_weight else (28 + 2 * 2) * links + ids,  # 2-byte operands both ways
    }
    return table.get(case.op)


def touched_bytes(case: Case) -> float | None:
    """Bytes that one call of a rotation has to itself at least; None where nothing is rotated (host times, models)."""
    if case.suite in ("host", "model"):
        return None
    if case.op.startswith("update") and "out" in case.dims:
        return 3 * 4 * case.dims["out"] * case.dims["in"] * case.n / 4  # values and two moments
    return least_bytes(case)


def is_large(case: Case) -> bool:
    """Whether the case gets burst and sustained figures."""
    d = case.dims
    if case.suite != "linear":
        return False
    return 2.0 * d["tokens"] * d["out"] * d["in"] >= LARGE_FLOP


_PRODUCTS = {"forward": 1, "input_grad": 1, "weight_grad": 1, "weight_grad_mvue": 1, "layer": 3, "layer_mvue": 3}
