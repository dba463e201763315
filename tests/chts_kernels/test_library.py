"""The ops as torch sees them: opcheck of every one, torch.compile, and the choice between implementations."""

from __future__ import annotations

import copy

import pytest
import torch

from chts_kernels import SparseWeight, evolve, pack, prune, random_ids, regrow, remove, score, spmm
from chts_kernels.ops._library import REGISTRY, Op
from chts_kernels.ops.pack import empty_operands
from chts_kernels.testing import assert_bitwise_equal, random_tensor, random_weight

BOTH = pytest.mark.parametrize("n", (1, 2))


def samples(n: int) -> dict[str, list[tuple]]:
    """Arguments for every op, plain and strided."""
    w = random_weight(8, 12, n)
    x, dy = random_tensor((3, 12)), random_tensor((3, 8))
    dense = w.to_dense()
    operands = [torch.zeros_like(t) for t in empty_operands(8, 12, torch.bfloat16, w.device)]
    survivors = remove(w.values, w.ids, n, zeta=0.3)
    scores = score(survivors)
    strided = scores.t().contiguous().t()
    moments = [random_tensor(w.values.shape, seed=s) for s in (1, 2)]
    return {
        "prune": [(dense, n, "abs"), (dense.t(), n, "square")],
        "prune_pack_": [
            (dense, n, "abs", torch.zeros_like(w.ids), torch.zeros_like(w.values), *operands),
            (dense, n, "square", torch.zeros_like(w.ids), torch.zeros_like(w.values), None, None, None, None),
        ],
        "pack": [(dense, w.ids, n), (dense.t(), w.T.ids, n)],
        "unpack": [(w.values, w.ids, n), (w.values.t().contiguous().t(), w.ids, n)],
        "pack_operands_": [(w.values, w.ids, n, *operands), (w.values, w.ids, n, None, *operands[1:])],
        "spmm": [(x, w.values, w.ids, n, dy[0].clone(), None, None), (x[:0], w.values, w.ids, n, None, None, None)],
        "input_grad": [(dy, w.values, w.ids, n, None, None), (dy[:0], w.values, w.ids, n, None, None)],
        "weight_grad": [(dy, x, w.ids, n, torch.float32), (dy.bfloat16(), x.bfloat16(), w.ids, n, torch.float32)],
        "weight_grad_mvue": [
            (dy, x, w.ids, n, torch.float32, 1, 2, 3, None),
            (dy.bfloat16(), x.bfloat16(), w.ids, n, torch.float32, 1, 2, 3, torch.tensor([4])),
        ],
        "remove": [(w.values, w.ids, n, 0.1, 1.0, "soft", 1, 2, 3), (w.values, w.ids, n, 0.1, 1.0, "hard", 0, 0, 0)],
        "score": [(survivors, torch.float32), (survivors, torch.float64)],
        "regrow": [
            (scores, survivors, n, "soft", 1, 2, 3),
            (strided, survivors, n, "greedy", 0, 0, 0),
            (None, survivors, n, "random", 1, 2, 3),
        ],
        "adamw_": [adamw_arguments(w, moments, operands), adamw_arguments(w, [m.bfloat16() for m in moments], None)],
        "mask_operands_": [masked_arguments(dense, n, torch.bfloat16), masked_arguments(dense.t(), n, torch.float16)],
        "masked_out_decay_": [
            ([random_tensor((8, 12))], [dense], [w.ids], n, 0.5), ([random_tensor((12, 8))], [dense.t()], [w.T.ids], n, 0.0),
        ],
        "carry_over_": [(moments, w.ids, random_ids(8, 12, n, seed=9), n)],
    }


def adamw_arguments(w: SparseWeight, moments: list[torch.Tensor], operands: list[torch.Tensor] | None) -> tuple:
    tensors = ([t] for t in (w.values.clone(), random_tensor(w.values.shape), moments[0], moments[1].abs(), torch.ones(()), w.ids))
    written = ([operands[0]], [operands[2]]) if operands else ([], [])
    low = moments[0].dtype == torch.bfloat16
    rate, scale, found_inf = (torch.tensor(v) if low else None for v in (0.1, 2.0, 0.0))
    return *tensors, w.n, *written, [3], rate, 0.1, 0.9, 0.99, 1e-8, 0.1, False, scale, found_inf, 7 if low else None


def masked_arguments(dense: torch.Tensor, n: int, dtype: torch.dtype) -> tuple:
    rows, columns = dense.shape
    operand, *rest = (torch.zeros_like(t) for t in empty_operands(rows, columns, dtype, dense.device))
    ids, values = torch.zeros(rows // 4, columns // 4, dtype=torch.uint8), torch.zeros(rows, columns * n // 4, dtype=dtype)
    return [dense], n, [ids], [values], [operand] if n == 1 else [], *([t] for t in rest)


@pytest.mark.parametrize("name", sorted(REGISTRY))
@BOTH
def test_opcheck(name: str, n: int) -> None:
    for args in samples(n)[name]:
        report = torch.library.opcheck(REGISTRY[name].overload, args)
        assert set(report.values()) == {"SUCCESS"}, report


def test_every_op_is_registered_under_chts() -> None:
    assert set(samples(2)) == set(REGISTRY)
    for name, op in REGISTRY.items():
        assert op.overload is getattr(torch.ops.chts, name).default
        assert "reference" in op.names and "auto" in op.names


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_the_dispatcher_and_the_direct_call_agree(name: str) -> None:
    op = REGISTRY[name]
    for args in samples(2)[name]:
        direct, dispatched = copy.deepcopy(args), copy.deepcopy(args)
        results = op(*direct), op.overload(*dispatched)
        for a, b in (results, (direct, dispatched)):  # outputs, then arguments: some are written in place
            leaves = [torch.utils._pytree.tree_leaves(t) for t in (a, b)]
            for left, right in zip(*leaves, strict=True):
                if isinstance(left, torch.Tensor):
                    assert_bitwise_equal(left, right)


# --- torch.compile


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def run(function, x: torch.Tensor, w: SparseWeight, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    x, values = x.clone().requires_grad_(), w.values.clone().requires_grad_()
    bias = None if bias is None else bias.clone().requires_grad_()
    y = function(x, w.ids, values, bias)
    wanted = [x, values] if bias is None else [x, values, bias]
    return y, *torch.autograd.grad(y.square().sum(), wanted)


@pytest.mark.parametrize("with_bias", (True, False))
@BOTH
def test_compiled_spmm_is_eager_spmm(n: int, with_bias: bool) -> None:
    def layer(x, ids, values, bias):
        return spmm(torch.relu(x), SparseWeight(ids, values, n), bias) * 2

    w, x = random_weight(16, 24, n), random_tensor((2, 5, 24), seed=1)
    bias = random_tensor((16,), seed=2) if with_bias else None
    for got, expected in zip(run(compiled(layer), x, w, bias), run(layer, x, w, bias), strict=True):
        assert_bitwise_equal(got, expected)


def test_compiled_with_a_weight_object_and_any_number_of_tokens() -> None:
    w = random_weight(16, 24)
    w.values.requires_grad_()
    function = compiled(lambda x: spmm(x, w), dynamic=True)
    for tokens in (3, 7, 12):
        x = random_tensor((tokens, 24))
        assert_bitwise_equal(function(x), spmm(x, w))
        assert_bitwise_equal(*(torch.autograd.grad(f(x).square().sum(), w.values)[0]
                               for f in (function, lambda x: spmm(x, w))))  # fmt: skip


def test_compiled_with_a_named_implementation() -> None:
    w = random_weight(16, 24)
    w.values.requires_grad_()
    x = random_tensor((5, 24))
    y = compiled(lambda x: spmm(x, w, impl="reference"))(x)
    assert_bitwise_equal(y, spmm(x, w))
    y.sum().backward()
    assert torch.ops.chts.prune(w.to_dense(), 2, "abs", impl="reference").shape == (4, 6)


def test_compiled_under_autocast() -> None:
    w = random_weight(16, 24)

    def layer(x, ids, values, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return spmm(x, SparseWeight(ids, values), bias)

    x, bias = random_tensor((5, 24), seed=1), random_tensor((16,), seed=2)
    results = run(compiled(layer), x, w, bias)
    assert results[0].dtype == torch.bfloat16 and results[2].dtype == torch.float32
    for got, expected in zip(results, run(layer, x, w, bias), strict=True):
        assert_bitwise_equal(got, expected)


def test_the_graph_holds_the_ops_and_nothing_dense() -> None:
    """The compiler sees chts ops, not the reference's dense matrix."""
    seen: list[str] = []

    def record(module, _):
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda m, i: make_boxed_func(record(m, i)),
                           bw_compiler=lambda m, i: make_boxed_func(record(m, i)))  # fmt: skip
    torch._dynamo.reset()
    w = random_weight(16, 24)
    function = torch.compile(lambda x, ids, v, b: spmm(x, SparseWeight(ids, v), b), fullgraph=True, backend=backend)
    run(function, random_tensor((5, 24)), w, None)
    ops = [name for name in seen if name.startswith("chts")]
    assert ops == ["chts.spmm.default", "chts.input_grad.default", "chts.weight_grad.default"]
    assert not any("scatter" in name or name.startswith("aten.mm") for name in seen)


@BOTH
def test_a_compiled_graph_packs_once_for_both_passes(n: int, monkeypatch) -> None:
    """Where a kernel is going to read operands; here the reference, which ignores them."""
    from chts_kernels.ops import spmm as module

    packed: list[torch.Tensor] = []
    pack = module._packed
    w, x = random_weight(16, 24, n), random_tensor((5, 24)).half()
    w = SparseWeight(w.ids, w.values.half(), n)

    def layer(x, ids, values, bias):
        return spmm(x, SparseWeight(ids, values, n), bias)

    expected = run(layer, x, w, None)
    monkeypatch.setattr(module, "_reads_operands", lambda x, impl: True)
    monkeypatch.setattr(module, "_packed", lambda *args: packed.append(None) or pack(*args))  # traced: once in all
    for got, wanted in zip(run(compiled(layer), x, w, None), expected, strict=True):
        assert_bitwise_equal(got, wanted)
    assert len(packed) <= 1
    for got, wanted in zip(run(torch.compile(layer, fullgraph=True), x, w, None), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


@BOTH
def test_compiled_pruning_and_topology_ops(n: int) -> None:
    def update(values, ids):
        survivors = remove(values, ids, n, zeta=0.3, seed=5)
        return survivors, regrow(score(survivors), survivors, n, seed=5)

    w = random_weight(16, 24, n)
    for got, expected in zip(compiled(update)(w.values, w.ids), update(w.values, w.ids), strict=True):
        assert_bitwise_equal(got, expected)

    def project(dense):
        ids = prune(dense, n)
        return ids, pack(dense, ids, n)

    dense = random_tensor((8, 12))
    for got, expected in zip(compiled(project)(dense), project(dense), strict=True):
        assert_bitwise_equal(got, expected)


def test_fake_tensors_flow_through() -> None:
    with torch._subclasses.FakeTensorMode():
        w = SparseWeight(torch.empty(4, 6, dtype=torch.uint8), torch.empty(16, 12))
        assert spmm(torch.empty(2, 5, 24, dtype=torch.bfloat16), w).shape == (2, 5, 16)
        assert w.to_dense().shape == (16, 24)
        assert evolve(w).survivors.shape == (4, 6)


# --- choosing an implementation


@pytest.fixture(scope="module")
def toy():
    """An op of its own with two kernels: one that never runs here, one for even sizes."""
    op = Op("toy_for_tests(Tensor x) -> Tensor", lambda x: x + 1, lambda x: torch.empty_like(x))
    op.kernel("never", lambda x: "it needs a device of the year 2100")(lambda x: x + 100)
    op.kernel("even", lambda x: None if x.numel() % 2 == 0 else f"x has {x.numel()} elements, an odd number")(lambda x: x + 2)
    yield op
    del REGISTRY["toy_for_tests"]


def test_selection(toy: Op) -> None:
    even, odd = torch.zeros(2), torch.zeros(3)
    assert toy(even).tolist() == [2, 2]
    assert toy(odd).tolist() == [1, 1, 1]  # no kernel can: the reference
    assert toy(even, impl="even").tolist() == [2, 2]
    assert toy(even, impl="reference").tolist() == [1, 1]
    assert toy.names == ["auto", "reference", "never", "even"]
    assert toy.overload(even).tolist() == [2, 2] and toy.overload(even, impl="reference").tolist() == [1, 1]


def test_an_explicit_choice_that_cannot_run_says_why(toy: Op) -> None:
    with pytest.raises(RuntimeError, match="impl: 'never' cannot run chts.toy_for_tests here: it needs a device of the"):
        toy(torch.zeros(2), impl="never")
    with pytest.raises(RuntimeError, match="'even' cannot run chts.toy_for_tests here: x has 3 elements, an odd number"):
        toy(torch.zeros(3), impl="even")
    with pytest.raises(ValueError, match=r"impl: must be one of \['auto', 'reference', 'never', 'even'\], got 'fast'"):
        toy(torch.zeros(2), impl="fast")
