"""The short way of weight gradients and packings: on the CPU with a stand-in for the device and the launch, real look-ups and checks;
on a GPU against the long way."""

from __future__ import annotations

import threading

import pytest
import torch

from chts_kernels import cuda_driver, pack_operands_, random_ids, target, weight_grad, weight_grad_mvue
from chts_kernels.ops import _library, _triton
from chts_kernels.ops.pack import PACK_OPERANDS_, empty_operands, triton_pack
from chts_kernels.ops.weight_grad import WEIGHT_GRAD, WEIGHT_GRAD_MVUE, sm90_launch, sm90_mvue, sm90_wgmma, triton_mvue

BF16 = torch.bfloat16
CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch):
    """CPU tensors pass for those of CUDA device 0."""
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name, value in (("_cuda_getDevice", 0), ("_cuda_getCurrentRawStream", 7), ("_cuda_isCurrentStreamCapturing", False)):
        monkeypatch.setattr(torch._C, name, lambda *_, value=value: value, raising=False)
    monkeypatch.setattr(target, "why_not_kernel", lambda name, device: None)
    monkeypatch.setattr(_triton, "why_not_device", lambda device: None)
    monkeypatch.setattr(_library, "_empty_strided_cuda", torch._C._dynamo.guards._empty_strided_cpu)
    for op in (WEIGHT_GRAD, WEIGHT_GRAD_MVUE, PACK_OPERANDS_):
        monkeypatch.setattr(op, "_chosen", {})
        monkeypatch.setattr(op, "_routes", {})


@pytest.fixture
def launches(monkeypatch, device):
    """What Triton kernels were launched: (blocks, parameters)."""
    launched = []

    class Launch(threading.local):
        def __init__(self, kernel, blocks, fixed):
            self.blocks, self.values = blocks, [0] * 16
            for index, value in fixed:
                self.values[index] = value

        def run(self, stream):
            launched.append((self.blocks, tuple(self.values)))

    table = torch.zeros(256, dtype=torch.int64)
    monkeypatch.setattr(cuda_driver, "Launch", Launch)
    monkeypatch.setattr(triton_pack, "block_table", lambda n, device: table)
    monkeypatch.setattr(_triton.TritonKernel, "load", lambda *args: None)
    _triton.TritonKernel._plan.cache_clear()
    yield launched
    _triton.TritonKernel._plan.cache_clear()


class Plan:
    """Notes its launches instead of making them."""

    def __init__(self):
        self.calls = []

    def run(self, *addresses):
        self.calls.append(addresses)


@pytest.fixture
def gradients(monkeypatch, device):
    """(plans by (tokens, rows, columns, out dtype, sparse?), calls that went the long way)"""
    plans, long = {}, []

    def plan(tokens, rows, columns, n, dtype, out_dtype, accumulate, device, work, row_bytes):
        assert not accumulate and row_bytes == (0 if work.config.sparse else 2 * rows, 2 * columns)
        return plans.setdefault((tokens, rows, columns, out_dtype, work.config.sparse), Plan())

    def long_way(dy, x, ids, n, out_dtype, **draw):
        long.append(draw)
        return torch.zeros(dy.shape[1], x.shape[1] * n // 4, dtype=out_dtype)

    monkeypatch.setattr(sm90_launch, "plan", plan)
    monkeypatch.setattr(sm90_launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(sm90_wgmma, "weight_grad_sm90", long_way)
    monkeypatch.setattr(sm90_mvue, "weight_grad_mvue_sm90", long_way)
    return plans, long


def problem(tokens=8, rows=32, columns=48):
    ids = random_ids(rows, columns, seed=0)
    return torch.randn(tokens, rows).to(BF16), torch.randn(tokens, columns).to(BF16), ids


def test_the_second_gradient_takes_the_route(gradients):
    plans, long = gradients
    dy, x, ids = problem()
    for calls in (0, 1, 2):
        dw = weight_grad(dy, x, ids)
        assert dw.shape == (32, 24) and dw.dtype == BF16 and len(long) == 1
        assert len(plans[8, 32, 48, BF16, False].calls) == calls
    addresses = dy.data_ptr(), x.data_ptr(), ids.data_ptr(), dw.data_ptr()
    assert plans[8, 32, 48, BF16, False].calls[-1] == addresses
    for _ in range(2):
        assert weight_grad(dy, x, ids, out_dtype=torch.float32).dtype == torch.float32
    assert len(long) == 2 and len(plans[8, 32, 48, torch.float32, False].calls) == 1
    folded = weight_grad(dy.view(2, 4, 32), x.view(2, 4, 48), ids)  # is checked, then takes the route
    assert folded.shape == (32, 24) and len(long) == 2 and len(plans[8, 32, 48, BF16, False].calls) == 3


def test_the_second_estimate_takes_the_route(gradients, launches):
    plans, long = gradients
    dy, x, ids = problem()
    counter = torch.zeros((), dtype=torch.int64)
    for seed in (1, 2, 3):
        dw = weight_grad_mvue(dy, x, ids, seed=seed, layer=4, step=5, counter=counter)
    assert len(long) == 1 and len(plans[8, 32, 48, BF16, True].calls) == 2
    left, *_, meta = plans[8, 32, 48, BF16, True].calls[-1]
    triton_mvue.prune(dy, seed=3, layer=4, step=5, counter=counter)
    (_, second), third, by_long_way = launches
    assert third[1][:4] == (dy.data_ptr(), left, meta, counter.data_ptr()) and second[9] == 2
    assert third[0] == by_long_way[0] and third[1][3:] == by_long_way[1][3:]
    assert plans[8, 32, 48, BF16, True].calls[-1][1:4] == (x.data_ptr(), ids.data_ptr(), dw.data_ptr())
    weight_grad_mvue(dy, x, ids, seed=1)
    assert len(long) == 2, "without a counter it is another kind"
    for wrong in ({"seed": -1}, {"seed": 1 << 63}, {"seed": 0, "layer": 1 << 32}, {"seed": 0, "step": 1.0}):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]}: must be an integer"):
            weight_grad_mvue(dy, x, ids, **wrong)
    with pytest.raises(ValueError, match="counter: must have one element"):
        weight_grad_mvue(dy, x, ids, seed=1, counter=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="counter: must have dtype int64"):
        weight_grad_mvue(dy, x, ids, seed=1, counter=torch.zeros((), dtype=torch.int32))


def test_gradients_that_need_copies_or_another_way(gradients, monkeypatch):
    plans, long = gradients
    dy, x, ids = problem()
    weight_grad(dy, x, ids)
    others = [
        (dy, torch.randn(48, 8).to(BF16).t(), ids),
        (torch.randn(8 * 32 + 1).to(BF16)[1:].view(8, 32), x, ids),
        (dy, x, ids.t().contiguous().t()),
        (dy.half(), x.half(), ids),
        (dy[:4], x[:4], ids),
    ]
    for i, arguments in enumerate(others):
        weight_grad(*arguments)
        assert len(long) == 2 + i
    weight_grad(dy, x, ids, impl="wgmma_sp")
    weight_grad(dy, x, ids, impl="reference")
    assert len(long) == 7
    for arguments in (problem(8, 36, 48), problem(8, 32, 44)):  # rows that TMA cannot address
        for _ in range(2):
            weight_grad(*arguments)
    assert len(long) == 11
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch._C, "_cuda_getDevice", lambda: 1)
        weight_grad(dy, x, ids)
        assert len(long) == 12
    with monkeypatch.context() as traced:
        traced.setattr(_library, "_transforms", lambda: True)
        weight_grad(dy, x, ids)
        assert len(long) == 13
    assert plans[8, 32, 48, BF16, False].calls == []
    weight_grad(dy, x, ids)
    assert len(plans[8, 32, 48, BF16, False].calls) == 1


def test_errors_are_those_of_the_long_way(gradients):
    dy, x, ids = problem()
    weight_grad(dy, x, ids, 2), weight_grad(dy, x, random_ids(32, 48, 1, seed=0), 1)
    with pytest.raises(TypeError, match="dy: must be a torch.Tensor"):
        weight_grad(None, x, ids)
    with pytest.raises(TypeError, match="x: must be a torch.Tensor"):
        weight_grad(dy, [1.0], ids)
    with pytest.raises(TypeError, match="x: must have dtype bfloat16"):
        weight_grad(dy, x.half(), ids)
    with pytest.raises(ValueError, match="x: must have shape"):
        weight_grad(dy, x[:4], ids)
    with pytest.raises(TypeError, match="ids: must have dtype uint8"):
        weight_grad(dy, x, ids.int())
    for n in (True, 1.0, [2], 3):
        with pytest.raises(ValueError, match="n: must be 1"):
            weight_grad(dy, x, ids, n)
    for out_dtype in ([BF16], 0):
        with pytest.raises(ValueError, match="out_dtype: must be one of"):
            weight_grad(dy, x, ids, out_dtype=out_dtype)
    with pytest.raises(ValueError, match="impl: must be one of"):
        weight_grad(dy, x, ids, impl="nonsense")


def test_the_table_of_routes_is_bounded(gradients, monkeypatch):
    monkeypatch.setattr(_library, "ROUTES_LIMIT", 4)
    for tokens in range(1, 20):
        weight_grad(*problem(tokens))
        assert 0 < len(WEIGHT_GRAD._routes) <= 4


@pytest.mark.parametrize("shared", [False, True])
def test_a_packing_by_the_route_sets_what_the_long_way_sets(launches, shared):
    ids, other = random_ids(32, 64, seed=0), random_ids(32, 64, seed=1)
    values = torch.nn.Parameter(torch.randn(32, 32).to(BF16 if shared else torch.float32))
    mine, theirs = empty_operands(32, 64, BF16, CPU), empty_operands(32, 64, BF16, CPU)
    if shared:
        mine, theirs = (None, *mine[1:]), (None, *theirs[1:])
    assert pack_operands_(values, ids, 2, *mine) is None
    assert len(PACK_OPERANDS_._routes) == 1
    long = launches.pop()
    pack_operands_(values, ids, 2, *mine)
    assert launches == [long]
    pack_operands_(values, other, 2, *theirs)
    (blocks, parameters), (_, before) = launches.pop(), long
    assert blocks == long[0] and len(PACK_OPERANDS_._routes) == 1
    expected = [values, other, None, *theirs]
    for i, tensor in enumerate(expected):
        assert parameters[i] == (before[i] if i == 2 else 0 if tensor is None else tensor.data_ptr())
    assert parameters[7:] == before[7:]
    seen = []
    thread = threading.Thread(target=lambda: (pack_operands_(values, ids, 2, *mine), seen.extend(launches)))
    thread.start(), thread.join()
    assert seen[-1] == long


def test_packings_that_differ_are_checked(launches):
    ids, values = random_ids(32, 64, seed=0), torch.randn(32, 32)
    operands = empty_operands(32, 64, BF16, CPU)
    for _ in range(2):
        pack_operands_(values, ids, 2, *operands)
    operand, meta, operand_t, meta_t = operands
    with pytest.raises(ValueError, match="n: must be 1"):
        pack_operands_(values, ids, True, *operands)
    with pytest.raises(ValueError, match="values: must have shape"):
        pack_operands_(values[:16], ids, 2, *operands)
    with pytest.raises(TypeError, match="meta: must have dtype int32"):
        pack_operands_(values, ids, 2, operand, meta.long(), operand_t, meta_t)
    with pytest.raises(ValueError, match="operand_t: must have shape"):
        pack_operands_(values, ids, 2, operand, meta, operand_t.t(), meta_t)
    with pytest.raises(TypeError, match="operand: must have dtype bfloat16"):
        pack_operands_(values, ids, 2, operand.half(), meta, operand_t, meta_t)
    with pytest.raises(TypeError, match="meta_t: must be a torch.Tensor"):
        pack_operands_(values, ids, 2, operand, meta, operand_t, None)
    with pytest.raises(RuntimeError, match="operand must be contiguous"):
        pack_operands_(values, ids, 2, operand.t().contiguous().t(), meta, operand_t, meta_t, impl="triton")
    count = len(launches)
    odd = torch.randn(32 * 32 + 1)[1:].view(32, 32)  # is copied to a 16-byte boundary
    for _ in range(2):
        pack_operands_(odd, ids, 2, *operands)
    assert [launch[1][0] == odd.data_ptr() for launch in launches[count:]] == [False, False]
    assert len(PACK_OPERANDS_._routes) == 1


# --- on a GPU ----------------------------------------------------------------------------------------------------------


def _short_and_long(monkeypatch, op, call):
    """What a call by the route returns, in eager mode and in a graph, after the same call by the long way."""
    with monkeypatch.context() as long_way:
        long_way.setattr(op, "_routes", {})
        expected = call()
        made = list(op._routes.values())
        taken = []
        if made:
            kind = type(made[0])
            run = kind.__call__
            long_way.setattr(kind, "__call__", lambda self, *args: taken.append(1) or run(self, *args))
        results = [call(), call()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for tensor in captured:
            tensor.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        return expected, [*results, captured], len(taken)


def _needs_sm90():
    reason = target.why_not_kernel("wgmma_sp", torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 512, 512), (2048, 256, 512), (1, 64, 72), (100, 1376, 40), (33, 36, 20)], ids=str)
def test_gradients_by_the_route_are_those_of_the_long_way(monkeypatch, shape):
    _needs_sm90()
    tokens, rows, columns = shape
    dy = torch.randn(tokens, rows, device="cuda").to(BF16)
    x = torch.randn(tokens, columns, device="cuda").to(BF16)
    ids = random_ids(rows, columns, seed=1, device="cuda")
    counter = torch.full((), 3, dtype=torch.int64, device="cuda")
    draw = {"seed": (1 << 62) + (1 << 31) + 5, "layer": 1 << 31, "step": 9, "counter": counter}
    fits = rows % 8 == 0 == columns % 8
    for op, call in (
        (WEIGHT_GRAD, lambda: [weight_grad(dy, x, ids)]),
        (WEIGHT_GRAD, lambda: [weight_grad(dy, x, ids, out_dtype=torch.float32)]),
        (WEIGHT_GRAD_MVUE, lambda: [weight_grad_mvue(dy, x, ids, **draw)]),
        (WEIGHT_GRAD_MVUE, lambda: [weight_grad_mvue(dy, x, ids, seed=1, out_dtype=torch.float32)]),
    ):
        [expected], results, taken = _short_and_long(monkeypatch, op, call)
        assert taken == (3 if fits else 0)
        for [result] in results:
            assert torch.equal(result, expected) and result.dtype == expected.dtype and result.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("shape", [(512, 512), (64, 1376), (36, 20)], ids=str)
@pytest.mark.parametrize("master", [torch.float32, BF16], ids=str)
def test_packings_by_the_route_are_those_of_the_long_way(monkeypatch, n, shape, master):
    rows, columns = shape
    ids = random_ids(rows, columns, n, seed=1, device="cuda")
    values = torch.randn(rows, columns * n // 4, device="cuda").to(master)
    operands = empty_operands(rows, columns, BF16, values.device)

    def call(operand):
        out = [t.fill_(0) for t in (operand, *operands[1:]) if t is not None]
        pack_operands_(values, ids, n, operand, *operands[1:])
        return [t.clone() for t in out]

    for operand in {id(o): o for o in (operands[0], None if n == 2 and master == BF16 else operands[0])}.values():
        expected, results, taken = _short_and_long(monkeypatch, PACK_OPERANDS_, lambda operand=operand: call(operand))
        assert taken == 3
        for result in results:
            assert all(map(torch.equal, result, expected))
