"""Every argument error of the public functions, by its whole message: the argument, the rule, the value."""

from __future__ import annotations

import pytest
import torch

import chts_kernels
from chts_kernels import (
    SparseWeight,
    carry_over_,
    evolve,
    evolve_many,
    input_grad,
    pack,
    pack_operands_,
    prune,
    random_ids,
    regrow,
    remove,
    score,
    spmm,
    unpack,
    weight_grad,
)
from chts_kernels.ops.pack import empty_operands
from chts_kernels.testing import random_tensor, random_weight

W = random_weight(8, 12)  # ids [2, 3], values [8, 6]
IDS, VALUES, DENSE = W.ids, W.values, W.to_dense()
X, DY = random_tensor((5, 12)), random_tensor((5, 8))
SURVIVORS = remove(VALUES, IDS)
SCORES = score(SURVIVORS)
OPERANDS = empty_operands(8, 12, torch.bfloat16, W.device)
META = torch.device("meta")

FLOATS = "have dtype float32, bfloat16, float16, float64"
N = "n: must be 1 (1:4) or 2 (2:4), got "
IDS_DTYPE = "ids: must have dtype uint8, got torch.int64"
IDS_2D = "ids: must have 2 dimensions [out_features/4, in_features/4], got (2,)"
IDS_EMPTY = "ids: must not be empty, got (0, 3)"
VALUES_SHAPE = "values: must have shape (8, 6) = [4 * ids.shape[0], 2 * ids.shape[1]] for n = 2, got (8, 3)"
VALUES_DEVICE = "ids: must be on the device of values (meta), got cpu"
DENSE_2D = "dense: must have 2 dimensions [out_features, in_features], got (12,)"


def dense_cases(name: str, call) -> list[tuple]:
    """The errors of a dense [N, K] argument."""
    return [
        (f"{name}-type", lambda: call([1.0]), TypeError, "dense: must be a torch.Tensor, got list"),
        (f"{name}-dtype", lambda: call(DENSE.int()), TypeError, f"dense: must {FLOATS}, got torch.int32"),
        (f"{name}-dimensions", lambda: call(DENSE[0]), ValueError, DENSE_2D),
        (f"{name}-rows", lambda: call(DENSE[:6]), ValueError,
         "dense: must have both sizes positive and divisible by 4, got (6, 12)"),
        (f"{name}-columns", lambda: call(DENSE[:, :10]), ValueError,
         "dense: must have both sizes positive and divisible by 4, got (8, 10)"),
        (f"{name}-empty", lambda: call(DENSE[:0]), ValueError,
         "dense: must have both sizes positive and divisible by 4, got (0, 12)"),
    ]  # fmt: skip


def ids_cases(name: str, call) -> list[tuple]:
    """The errors of an argument ``ids``."""
    return [
        (f"{name}-ids-type", lambda: call([[0]]), TypeError, "ids: must be a torch.Tensor, got list"),
        (f"{name}-ids-dtype", lambda: call(IDS.long()), TypeError, IDS_DTYPE),
        (f"{name}-ids-dimensions", lambda: call(IDS[:, 0]), ValueError, IDS_2D),
        (f"{name}-ids-empty", lambda: call(IDS[:0]), ValueError, IDS_EMPTY),
    ]


def values_cases(name: str, call) -> list[tuple]:
    """The errors of ``values`` next to good ids."""
    return [
        (f"{name}-values-type", lambda: call(3), TypeError, "values: must be a torch.Tensor, got int"),
        (f"{name}-values-dtype", lambda: call(VALUES.to(torch.float8_e4m3fn)), TypeError,
         f"values: must {FLOATS}, got torch.float8_e4m3fn"),
        (f"{name}-values-shape", lambda: call(VALUES[:, :3]), ValueError, VALUES_SHAPE),
        (f"{name}-values-device", lambda: call(VALUES.to(META)), ValueError, VALUES_DEVICE),
    ]  # fmt: skip


def n_cases(name: str, call) -> list[tuple]:
    return [(f"{name}-n={n!r}", lambda n=n: call(n), ValueError, f"{N}{n!r}") for n in (0, 3, True, 2.0, "2", None)]


def survivors_cases(name: str, call) -> list[tuple]:
    return [
        (f"{name}-survivors-type", lambda: call(None), TypeError, "survivors: must be a torch.Tensor, got NoneType"),
        (f"{name}-survivors-dtype", lambda: call(SURVIVORS.long()), TypeError,
         "survivors: must have dtype int32, got torch.int64"),
        (f"{name}-survivors-dimensions", lambda: call(SURVIVORS[0]), ValueError,
         "survivors: must have 2 dimensions [N/4, K/4], got (3,)"),
    ]  # fmt: skip


def key_cases(name: str, call) -> list[tuple]:
    """seed, layer and step of whatever draws noise."""
    return [
        (f"{name}-seed", lambda: call(seed=-1), ValueError, "seed: must be an integer in [0, 2**63), got -1"),
        (f"{name}-seed-float", lambda: call(seed=0.5), ValueError, "seed: must be an integer in [0, 2**63), got 0.5"),
        (f"{name}-layer", lambda: call(layer=1 << 32), ValueError,
         "layer: must be an integer in [0, 2**32), got 4294967296"),
        (f"{name}-step", lambda: call(step=-5), ValueError, "step: must be an integer in [0, 2**32), got -5"),
    ]  # fmt: skip


def operand_cases() -> list[tuple]:
    def call(place: int, tensor: torch.Tensor | None):
        operands = list(OPERANDS)
        operands[place] = tensor
        return lambda: pack_operands_(VALUES, IDS, 2, *operands)

    operand, meta, operand_t, meta_t = OPERANDS
    return [
        ("pack_operands_-operand-shape", call(0, operand[:, :3]), ValueError,
         "operand: must have shape (8, 6), got (8, 3)"),
        ("pack_operands_-operand-dtype", call(0, operand.half()), TypeError,
         "operand: must have dtype bfloat16, got torch.float16"),
        ("pack_operands_-meta-shape", call(1, meta[:1]), ValueError,
         "meta: must have shape (8, 1, 128), got (1, 1, 128)"),
        ("pack_operands_-meta-dtype", call(1, meta.long()), TypeError,
         "meta: must have dtype int32, got torch.int64"),
        ("pack_operands_-operand_t-shape", call(2, operand), ValueError,
         "operand_t: must have shape (12, 4), got (8, 6)"),
        ("pack_operands_-operand_t-dtype", call(2, operand_t.int()), TypeError,
         f"operand_t: must {FLOATS}, got torch.int32"),
        ("pack_operands_-operand_t-none", call(2, None), TypeError, "operand_t: must be a torch.Tensor, got NoneType"),
        ("pack_operands_-meta_t-device", call(3, meta_t.to(META)), ValueError,
         "meta_t: must be on the device of ids (cpu), got meta"),
    ]  # fmt: skip


SIZES = "(out_features, in_features): must have both sizes positive and divisible by 4, got "

CASES: list[tuple] = [
    # SparseWeight
    *ids_cases("SparseWeight", lambda ids: SparseWeight(ids, VALUES)),
    *values_cases("SparseWeight", lambda values: SparseWeight(IDS, values)),
    *n_cases("SparseWeight", lambda n: SparseWeight(IDS, VALUES, n)),
    ("SparseWeight-ids-strides", lambda: SparseWeight(IDS.t().contiguous().t(), VALUES), ValueError,
     "ids: must be contiguous, got strides (1, 2)"),
    ("SparseWeight-values-of-another-n", lambda: SparseWeight(IDS, VALUES, 1), ValueError,
     "values: must have shape (8, 3) = [4 * ids.shape[0], 1 * ids.shape[1]] for n = 1, got (8, 6)"),
    *dense_cases("SparseWeight.from_dense", SparseWeight.from_dense),
    *n_cases("SparseWeight.from_dense", lambda n: SparseWeight.from_dense(DENSE, n)),
    ("SparseWeight.from_dense-score", lambda: SparseWeight.from_dense(DENSE, score="magnitude"), ValueError,
     "score: must be one of ['abs', 'square'], got 'magnitude'"),
    *n_cases("SparseWeight.random", lambda n: SparseWeight.random(8, 12, n)),
    ("SparseWeight.random-sizes", lambda: SparseWeight.random(8, 10), ValueError, f"{SIZES}(8, 10)"),
    ("SparseWeight.random-dtype", lambda: SparseWeight.random(8, 12, dtype=torch.int32), TypeError,
     f"values: must {FLOATS}, got torch.int32"),
    ("SparseWeight.random-seed", lambda: SparseWeight.random(8, 12, seed=-1), ValueError,
     "seed: must be an integer in [0, 2**63), got -1"),
    # random_ids
    *n_cases("random_ids", lambda n: random_ids(8, 12, n, seed=0)),
    ("random_ids-rows", lambda: random_ids(6, 12, seed=0), ValueError, f"{SIZES}(6, 12)"),
    ("random_ids-zero", lambda: random_ids(0, 12, seed=0), ValueError, f"{SIZES}(0, 12)"),
    ("random_ids-negative", lambda: random_ids(8, -4, seed=0), ValueError, f"{SIZES}(8, -4)"),
    ("random_ids-seed", lambda: random_ids(8, 12, seed=1 << 63), ValueError,
     "seed: must be an integer in [0, 2**63), got 9223372036854775808"),
    ("random_ids-layer", lambda: random_ids(8, 12, seed=0, layer=-1), ValueError,
     "layer: must be an integer in [0, 2**32), got -1"),
    # prune
    *dense_cases("prune", prune),
    *n_cases("prune", lambda n: prune(DENSE, n)),
    ("prune-score", lambda: prune(DENSE, 2, "l2"), ValueError, "score: must be one of ['abs', 'square'], got 'l2'"),
    # pack, unpack, pack_operands_
    *dense_cases("pack", lambda dense: pack(dense, IDS)),
    *ids_cases("pack", lambda ids: pack(DENSE, ids)),
    *n_cases("pack", lambda n: pack(DENSE, IDS, n)),
    ("pack-ids-shape", lambda: pack(DENSE, IDS.t()), ValueError,
     "ids: must have shape (2, 3) = dense.shape / 4, got (3, 2)"),
    ("pack-device", lambda: pack(DENSE, IDS.to(META)), ValueError,
     "ids: must be on the device of dense (cpu), got meta"),
    *values_cases("unpack", lambda values: unpack(values, IDS)),
    *ids_cases("unpack", lambda ids: unpack(VALUES, ids)),
    *n_cases("unpack", lambda n: unpack(VALUES, IDS, n)),
    *values_cases("pack_operands_", lambda values: pack_operands_(values, IDS, 2, *OPERANDS)),
    *ids_cases("pack_operands_", lambda ids: pack_operands_(VALUES, ids, 2, *OPERANDS)),
    *n_cases("pack_operands_", lambda n: pack_operands_(VALUES, IDS, n, *OPERANDS)),
    *operand_cases(),
    # spmm, input_grad, weight_grad
    ("spmm-w", lambda: spmm(X, VALUES), TypeError, "w: must be a SparseWeight, got Tensor"),
    ("spmm-x-type", lambda: spmm(1.0, W), TypeError, "x: must be a torch.Tensor, got float"),
    ("spmm-x-dtype", lambda: spmm(X.long(), W), TypeError, f"x: must {FLOATS}, got torch.int64"),
    ("spmm-x-columns", lambda: spmm(DY, W), ValueError, "x: must have 12 = in_features columns, got (5, 8)"),
    ("spmm-x-scalar", lambda: spmm(torch.tensor(1.0), W), ValueError, "x: must have 12 = in_features columns, got ()"),
    ("spmm-bias-shape", lambda: spmm(X, W, torch.zeros(12)), ValueError,
     "bias: must have shape (8,) = (out_features,), got (12,)"),
    ("spmm-bias-dtype", lambda: spmm(X, W, torch.zeros(8, dtype=torch.int8)), TypeError,
     f"bias: must {FLOATS}, got torch.int8"),
    ("spmm-bias-type", lambda: spmm(X, W, True), TypeError, "bias: must be a torch.Tensor, got bool"),
    ("spmm-values-device", lambda: spmm(X.to(META), W), ValueError,
     "values: must be on the device of x (meta), got cpu"),
    ("spmm-bias-device", lambda: spmm(X, W, torch.zeros(8, device=META)), ValueError,
     "bias: must be on the device of x (cpu), got meta"),
    ("input_grad-w", lambda: input_grad(DY, DENSE), TypeError, "w: must be a SparseWeight, got Tensor"),
    ("input_grad-dy-type", lambda: input_grad(None, W), TypeError, "dy: must be a torch.Tensor, got NoneType"),
    ("input_grad-dy-dtype", lambda: input_grad(DY.long(), W), TypeError, f"dy: must {FLOATS}, got torch.int64"),
    ("input_grad-dy-columns", lambda: input_grad(X, W), ValueError, "dy: must have 8 = out_features columns, got (5, 12)"),
    ("input_grad-dy-scalar", lambda: input_grad(torch.tensor(1.0), W), ValueError,
     "dy: must have 8 = out_features columns, got ()"),
    ("input_grad-device", lambda: input_grad(DY.to(META), W), ValueError,
     "values: must be on the device of dy (meta), got cpu"),
    *ids_cases("weight_grad", lambda ids: weight_grad(DY, X, ids)),
    *n_cases("weight_grad", lambda n: weight_grad(DY, X, IDS, n)),
    ("weight_grad-dy-type", lambda: weight_grad(0, X, IDS), TypeError, "dy: must be a torch.Tensor, got int"),
    ("weight_grad-dy-dtype", lambda: weight_grad(DY.int(), X, IDS), TypeError, f"dy: must {FLOATS}, got torch.int32"),
    ("weight_grad-dy-columns", lambda: weight_grad(X, X, IDS), ValueError,
     "dy: must have 8 = 4 * ids.shape[0] columns, got (5, 12)"),
    ("weight_grad-dy-scalar", lambda: weight_grad(torch.tensor(1.0), X, IDS), ValueError,
     "dy: must have 8 = 4 * ids.shape[0] columns, got ()"),
    ("weight_grad-x-type", lambda: weight_grad(DY, None, IDS), TypeError, "x: must be a torch.Tensor, got NoneType"),
    ("weight_grad-x-dtype", lambda: weight_grad(DY, X.bfloat16(), IDS), TypeError,
     "x: must have dtype float32, got torch.bfloat16"),
    ("weight_grad-x-columns", lambda: weight_grad(DY, DY, IDS), ValueError,
     "x: must have shape (5, 12) to match dy and ids, got (5, 8)"),
    ("weight_grad-x-tokens", lambda: weight_grad(DY, X[:4], IDS), ValueError,
     "x: must have shape (5, 12) to match dy and ids, got (4, 12)"),
    ("weight_grad-x-leading", lambda: weight_grad(DY, X[None], IDS), ValueError,
     "x: must have shape (5, 12) to match dy and ids, got (1, 5, 12)"),
    ("weight_grad-device", lambda: weight_grad(DY, X.to(META), IDS), ValueError,
     "x: must be on the device of dy (cpu), got meta"),
    ("weight_grad-out_dtype", lambda: weight_grad(DY, X, IDS, out_dtype=torch.int32), ValueError,
     "out_dtype: must be one of [torch.float32, torch.bfloat16, torch.float16, torch.float64], got torch.int32"),
    # remove
    *values_cases("remove", lambda values: remove(values, IDS)),
    *ids_cases("remove", lambda ids: remove(VALUES, ids)),
    *n_cases("remove", lambda n: remove(VALUES, IDS, n)),
    *key_cases("remove", lambda **key: remove(VALUES, IDS, **key)),
    ("remove-zeta", lambda: remove(VALUES, IDS, zeta=1.5), ValueError,
     "zeta: must be in [0, 1] (a fraction of the active links), got 1.5"),
    ("remove-zeta-negative", lambda: remove(VALUES, IDS, zeta=-0.1), ValueError,
     "zeta: must be in [0, 1] (a fraction of the active links), got -0.1"),
    ("remove-zeta-nan", lambda: remove(VALUES, IDS, zeta=float("nan")), ValueError,
     "zeta: must be in [0, 1] (a fraction of the active links), got nan"),
    ("remove-temperature", lambda: remove(VALUES, IDS, temperature=0.0), ValueError,
     "temperature: must be at least 1e-30, got 0.0"),
    ("remove-temperature-nan", lambda: remove(VALUES, IDS, temperature=float("nan")), ValueError,
     "temperature: must be at least 1e-30, got nan"),
    ("remove-mode", lambda: remove(VALUES, IDS, mode="firm"), ValueError,
     "mode: must be one of ['soft', 'hard'], got 'firm'"),
    # score, regrow
    *survivors_cases("score", score),
    ("score-dtype", lambda: score(SURVIVORS, dtype=torch.bfloat16), ValueError,
     "dtype: must be one of [torch.float32, torch.float64], got torch.bfloat16"),
    *survivors_cases("regrow", lambda survivors: regrow(SCORES, survivors)),
    *n_cases("regrow", lambda n: regrow(SCORES, SURVIVORS, n)),
    *key_cases("regrow", lambda **key: regrow(SCORES, SURVIVORS, **key)),
    ("regrow-mode", lambda: regrow(SCORES, SURVIVORS, mode="hard"), ValueError,
     "mode: must be one of ['soft', 'greedy', 'random'], got 'hard'"),
    ("regrow-scores-missing", lambda: regrow(None, SURVIVORS, mode="greedy"), ValueError,
     "scores: must be given in mode 'greedy', got None"),
    ("regrow-scores-dtype", lambda: regrow(SCORES.half(), SURVIVORS), TypeError,
     "scores: must have dtype float32, float64, got torch.float16"),
    ("regrow-scores-shape", lambda: regrow(SCORES.t(), SURVIVORS), ValueError,
     "scores: must have shape (8, 12), got (12, 8)"),
    ("regrow-scores-device", lambda: regrow(SCORES.to(META), SURVIVORS), ValueError,
     "scores: must be on the device of survivors (cpu), got meta"),
    # carry_over_
    *n_cases("carry_over_", lambda n: carry_over_([VALUES], IDS, IDS, n)),
    ("carry_over_-old_ids-dtype", lambda: carry_over_([VALUES], IDS.int(), IDS), TypeError,
     "old_ids: must have dtype uint8, got torch.int32"),
    ("carry_over_-new_ids-dimensions", lambda: carry_over_([VALUES], IDS, IDS[0]), ValueError,
     "new_ids: must have 2 dimensions [out_features/4, in_features/4], got (3,)"),
    ("carry_over_-new_ids-shape", lambda: carry_over_([VALUES], IDS, IDS.t()), ValueError,
     "new_ids: must have the shape of old_ids (2, 3), got (3, 2)"),
    ("carry_over_-new_ids-device", lambda: carry_over_([VALUES], IDS, IDS.to(META)), ValueError,
     "new_ids: must be on the device of old_ids (cpu), got meta"),
    ("carry_over_-tensors-type", lambda: carry_over_([VALUES.clone(), 3], IDS, IDS), TypeError,
     "tensors[1]: must be a torch.Tensor, got int"),
    ("carry_over_-tensors-shape", lambda: carry_over_([VALUES.clone(), VALUES[:4]], IDS, IDS), ValueError,
     "tensors[1]: must have shape (8, 6), got (4, 6)"),
    ("carry_over_-tensors-device", lambda: carry_over_([VALUES.to(META)], IDS, IDS), ValueError,
     "ids: must be on the device of tensors[0] (meta), got cpu"),
    # evolve
    ("evolve-w", lambda: evolve(VALUES), TypeError, "w: must be a SparseWeight, got Tensor"),
    *key_cases("evolve", lambda **key: evolve(W, **key)),
    ("evolve-zeta", lambda: evolve(W, zeta=2), ValueError,
     "zeta: must be in [0, 1] (a fraction of the active links), got 2"),
    ("evolve-temperature", lambda: evolve(W, temperature=-1), ValueError, "temperature: must be at least 1e-30, got -1"),
    ("evolve-removal", lambda: evolve(W, removal="greedy"), ValueError,
     "removal: must be one of ['soft', 'hard'], got 'greedy'"),
    ("evolve-regrowth", lambda: evolve(W, regrowth="hard"), ValueError,
     "regrowth: must be one of ['soft', 'greedy', 'random'], got 'hard'"),
    ("evolve-moments", lambda: evolve(W, moments=[VALUES.clone(), DENSE]), ValueError,
     "moments[1]: must have shape (8, 6), got (8, 12)"),
    ("evolve-moments-type", lambda: evolve(W, moments=[None]), TypeError,
     "moments[0]: must be a torch.Tensor, got NoneType"),
    # evolve_many: what it adds to evolve
    ("evolve_many-zeta", lambda: evolve_many([W], zeta=-1), ValueError,
     "zeta: must be in [0, 1] (a fraction of the active links), got -1"),
    ("evolve_many-layers", lambda: evolve_many([W], layers=[0, 1]), ValueError,
     "layers: must have 1 entries = len(weights), got 2"),
    ("evolve_many-layer", lambda: evolve_many([W], layers=[-1]), ValueError,
     "layer: must be an integer in [0, 2**32), got -1"),
    ("evolve_many-moments", lambda: evolve_many([W], moments=[]), ValueError,
     "moments: must have 1 entries = len(weights), got 0"),
    ("evolve_many-schedule-type", lambda: evolve_many([W], schedule=[0.1, 1.0, 0]), TypeError,
     "schedule: must be a torch.Tensor, got list"),
    ("evolve_many-schedule-dtype", lambda: evolve_many([W], schedule=torch.zeros(3)), TypeError,
     "schedule: must have dtype float64, got torch.float32"),
    ("evolve_many-schedule-shape", lambda: evolve_many([W], schedule=torch.zeros(4, dtype=torch.float64)), ValueError,
     "schedule: must have shape (3,), got (4,)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*case, id=name) for name, *case in CASES])
def test_message(call, error: type[Exception], message: str) -> None:
    before = [t.clone() for t in (IDS, VALUES)]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
    assert torch.equal(IDS, before[0]) and torch.equal(VALUES, before[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda impl: SparseWeight.from_dense(DENSE, impl=impl),
        lambda impl: prune(DENSE, impl=impl),
        lambda impl: pack(DENSE, IDS, impl=impl),
        lambda impl: unpack(VALUES, IDS, impl=impl),
        lambda impl: pack_operands_(VALUES, IDS, 2, *OPERANDS, impl=impl),
        lambda impl: spmm(X, W, impl=impl),
        lambda impl: input_grad(DY, W, impl=impl),
        lambda impl: weight_grad(DY, X, IDS, impl=impl),
        lambda impl: remove(VALUES, IDS, impl=impl),
        lambda impl: score(SURVIVORS, impl=impl),
        lambda impl: regrow(SCORES, SURVIVORS, impl=impl),
        lambda impl: carry_over_([VALUES], IDS, IDS, impl=impl),
        lambda impl: evolve(W, impl=impl),
        lambda impl: evolve_many([W], impl=impl),
    ],
)
def test_unknown_implementation(call) -> None:
    with pytest.raises(ValueError, match=r"^impl: must be one of \['auto', .*'reference'.*\], got 'fastest'$"):
        call("fastest")


def test_every_public_function_is_covered() -> None:
    covered = {name.split("-")[0].split(".")[0] for name, *_ in CASES}
    elsewhere = {
        "pattern_table",  # test_patterns
        "Mvue24",  # test_weight_grad_mvue
        "weight_grad_mvue",  # test_weight_grad_mvue
        "adamw_",  # test_adamw
        "mask_operands_", "masked_out_decay_",  # test_masked
        "choose_moves",  # test_moves
        "capability_report",  # takes no argument
        "Evolution", "Operands", "PatternTable",  # made by the package
    }  # fmt: skip
    public = {name for name in chts_kernels.__all__ if callable(getattr(chts_kernels, name))}
    assert public - elsewhere == covered
