"""mask_operands_ and masked_out_decay_: the references against prune, pack and plain arithmetic, the kernels against the references.

Kernel tests run twice, as in test_triton_pack_prune.py: ``cpu`` cases inside a process started with TRITON_INTERPRET=1, ``cuda``
cases where there is a device.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from chts_kernels import pack, pack_operands_, prune, testing, unpack
from chts_kernels.ops import _triton
from chts_kernels.ops.masked import MASK_OPERANDS_, MASKED_OUT_DECAY_, mask_operands_, masked_out_decay_
from chts_kernels.ops.pack import empty_operands
from tests.chts_kernels.ptx_machine import Machine, Memory

triton = pytest.importorskip("triton")
tl = triton.language
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INTERPRETED = _triton.interpreting()
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs under TRITON_INTERPRET=1"))
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="interpreting")])
ON_DEVICES = pytest.mark.parametrize("device", [CPU, CUDA])
BOTH = pytest.mark.parametrize("n", (1, 2))
SHAPES = [(64, 48), (4, 4), (12, 80), (64, 20), (68, 132)]
"""Rows of whole vectors both ways, one block, one way, the other way, neither."""


class Layers:
    """Weights of a few shapes, and poisoned outputs for them."""

    def __init__(self, n, *, device="cpu", master=FP32, compute=FP16, shapes=SHAPES):
        self.n, device = n, torch.device(device)
        special = testing.special_values(compute).float()
        self.weights, self.outputs = [], []
        with testing.poison():
            for seed, shape in enumerate(shapes):
                w = testing.random_tensor(shape, FP32, seed=seed)
                w.view(-1)[:: 7 + seed] = special[torch.arange(w.view(-1)[:: 7 + seed].numel()) % len(special)]
                # Representable in both dtypes for the interpreter, which does not round.
                self.weights.append((w.to(compute) if INTERPRETED else w).to(device, master))
                operand, *rest = empty_operands(*shape, compute, device)
                ids = torch.empty(shape[0] // 4, shape[1] // 4, dtype=torch.uint8, device=device)
                values = torch.empty(shape[0], shape[1] * n // 4, dtype=compute, device=device)
                self.outputs.append((ids, values, operand, *rest))

    def lists(self):
        ids, values, operands, *rest = (list(column) for column in zip(*self.outputs, strict=True))
        return ids, values, operands if self.n == 1 else [], *rest

    def run(self, impl):
        mask_operands_(self.weights, self.n, *self.lists(), impl=impl)
        return self

    def written(self):
        return [t for tensors in self.lists() for t in tensors]


@BOTH
def test_the_reference_is_prune_and_pack(n):
    layers = Layers(n, compute=BF16).run("reference")
    for weight, (ids, values, operand, *rest) in zip(layers.weights, layers.outputs, strict=True):
        testing.assert_bitwise_equal(ids, prune(weight, n))
        testing.assert_bitwise_equal(values, pack(weight, ids, n).to(BF16))
        expected = empty_operands(*weight.shape, BF16, weight.device)
        pack_operands_(values, ids, n, *expected, impl="reference")
        for got, wanted in zip((values if n == 2 else operand, *rest), expected, strict=True):
            testing.assert_bitwise_equal(got, wanted)


@BOTH
def test_the_decay_is_of_what_no_link_holds(n):
    weights = [testing.random_tensor(s, FP64, seed=i) for i, s in enumerate(SHAPES)]
    grads = [testing.random_tensor(s, FP64, seed=9 + i) for i, s in enumerate(SHAPES)]
    ids, before = [prune(w, n) for w in weights], [g.clone() for g in grads]
    masked_out_decay_(grads, weights, ids, n, 0.25)
    for grad, old, weight, of_layer in zip(grads, before, weights, ids, strict=True):
        masked = unpack(pack(weight, of_layer, n), of_layer, n)
        torch.testing.assert_close(grad, old + 0.25 * (weight - masked), rtol=1e-15, atol=0)
        testing.assert_bitwise_equal(grad[masked != 0], old[masked != 0])


def test_errors_name_the_argument():
    def call(change, n=2):
        layers = Layers(n)
        names = "ids", "values", "operands", "metas", "operands_t", "metas_t"
        named = dict(zip(names, layers.lists(), strict=True)) | change(layers)
        mask_operands_(named.pop("weights", layers.weights), n, **named)

    for change, message in (
        (lambda a: {"ids": a.lists()[0][:2]}, "ids: must have one entry per layer, 5, got 2"),
        (lambda a: {"operands": a.lists()[1]}, "operands: must be empty for n = 2, whose values are the operands, got 5"),
        (lambda a: {"weights": [w[:, :3] for w in a.weights]}, r"weights\[0\]: must"),
        (lambda a: {"values": [v[:, :4] for v in a.lists()[1]]}, r"values\[0\]: must have shape \(64, 24\), got \(64, 4\)"),
        (lambda a: {"operands_t": [t.float() for t in a.lists()[4]]}, r"operands_t\[0\]: must have dtype float16, got torch.float32"),
        (lambda a: {"metas": a.lists()[5]}, r"metas\[\d\]: must have shape"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call(change)
    with pytest.raises(ValueError, match="operands: must have one entry per layer, 5, got 0"):
        call(lambda a: {"operands": []}, n=1)
    weight, ids = torch.zeros(8, 8), torch.zeros(2, 2, dtype=torch.uint8)
    for grads, of, decay, message in (
        ([weight], [ids], -1.0, r"decay: must be in \[0, inf\), got -1.0"),
        ([weight], [], 0.1, "ids: must have one entry per layer, 1, got 0"),
        ([weight[:4]], [ids], 0.1, r"grads\[0\]: must have shape \(8, 8\), got \(4, 8\)"),
        ([weight], [ids[:1]], 0.1, r"ids\[0\]: must have shape \(2, 2\), got \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_out_decay_(grads, [weight], of, 2, decay)
    mask_operands_([], 2, [], [], [], [], [], [])
    masked_out_decay_([], [], [], 2, 0.1)


# --- the kernels
@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
@pytest.mark.timeout(600)
def test_under_the_interpreter(interpreted):
    assert interpreted.returncode == 0, interpreted.stdout[-6000:] + interpreted.stderr[-2000:]


@ON_DEVICES
@BOTH
@pytest.mark.parametrize("master", (FP32, BF16), ids=str)
def test_operands_are_those_of_the_reference(n, master, device):
    compute = BF16 if not INTERPRETED or master == BF16 else FP16
    # On a device the search is a kernel per dtype, the packing one per combination of odd sizes.
    shapes = SHAPES if INTERPRETED else [*SHAPES[:3], (1376, 512), (512, 4096)]
    got, expected = (Layers(n, device=device, master=master, compute=compute, shapes=shapes).run(i) for i in ("triton", "reference"))
    for a, b in zip(got.written(), expected.written(), strict=True):
        testing.assert_bitwise_equal(a, b)


@ON_DEVICES
@BOTH
@pytest.mark.parametrize("kinds", ((FP32, FP32), (FP32, BF16), *([] if INTERPRETED else [(BF16, BF16)])), ids=str)
def test_the_decay_is_that_of_the_reference(n, kinds, device):
    of_grads, of_weights = kinds  # the interpreter does not round to bfloat16
    weights = [testing.random_tensor(s, FP32, seed=i).to(device, of_weights) for i, s in enumerate(SHAPES)]
    ids = [prune(w, n) for w in weights]
    made = []
    for impl in ("triton", "reference"):
        made.append([testing.random_tensor(s, FP32, seed=9 + i).to(device, of_grads) for i, s in enumerate(SHAPES)])
        versions = [g._version for g in made[-1]]
        masked_out_decay_(made[-1], weights, ids, n, 0.3, impl=impl)
        assert all(g._version > v for g, v in zip(made[-1], versions, strict=True))
    for a, b in zip(*made, strict=True):
        testing.assert_bitwise_equal(a, b)


@ON_DEVICES
def test_weights_and_gradients_may_lie_anywhere(device):
    """Parameters of a flat buffer start where they start."""
    w, g = (testing.random_tensor((16 * 32 + 1,), seed=i).half().float().to(device)[1:].view(16, 32) for i in range(2))
    layers = [Layers(2, device=device, shapes=[(16, 32)]) for _ in range(2)]
    for impl, some in zip(("triton", "reference"), layers, strict=True):
        some.weights = [w]
        some.run(impl)
    for a, b in zip(layers[0].written(), layers[1].written(), strict=True):
        testing.assert_bitwise_equal(a, b)
    expected = g.clone()
    masked_out_decay_([expected], [w], [prune(w)], 2, 0.5, impl="reference")
    masked_out_decay_([g], [w], [prune(w)], 2, 0.5, impl="triton")
    testing.assert_bitwise_equal(g, expected)


@pytest.mark.parametrize("device", [CPU])
def test_more_layers_than_a_table_has_room_for(device, monkeypatch):
    from chts_kernels.ops.masked import triton_masked

    monkeypatch.setattr(triton_masked, "MOST_LAYERS", 2)
    for n in (1, 2):
        got, expected = (Layers(n).run(impl) for impl in ("triton", "reference"))
        for a, b in zip(got.written(), expected.written(), strict=True):
            testing.assert_bitwise_equal(a, b)
        grads = [[torch.ones_like(w) for w in got.weights] for _ in range(2)]
        for impl, of_impl in zip(("triton", "reference"), grads, strict=True):
            finite = [w.nan_to_num(0, 1, -1) for w in got.weights]
            masked_out_decay_(of_impl, finite, got.lists()[0], n, 0.5, impl=impl)
        for a, b in zip(*grads, strict=True):
            testing.assert_bitwise_equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="interpreting")
@BOTH
def test_captured_launches_follow_the_weights(n):
    shapes = [(512, 1376), (128, 64), (12, 80)]
    eager, captured = (Layers(n, device="cuda", compute=BF16, shapes=shapes) for _ in range(2))
    grads = [[torch.randn(s, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) for s in shapes] for _ in range(2)]

    def step(layers, of_layers):
        layers.run("triton")
        masked_out_decay_(of_layers, layers.weights, layers.lists()[0], n, 0.1, impl="triton")

    step(eager, grads[0]), step(captured, grads[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, grads[1])
    for seed in range(3):
        for a, b in zip(eager.weights, captured.weights, strict=True):
            new = torch.randn(a.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
            a.copy_(new), b.copy_(new)
        step(eager, grads[0])
        graph.replay()
    for a, b in zip([*eager.written(), *grads[0]], [*captured.written(), *grads[1]], strict=True):
        testing.assert_bitwise_equal(a, b)


CAPABILITIES = [(8, 0), (9, 0), (12, 0)]


def compiled(name, n, capability=(9, 0), vectors=(True, True)):
    from chts_kernels.ops.masked.triton_masked import DECAY, PACK, SEARCH

    shared = {"LINKS": n, "LAYERS": 64}
    kernel, types, constants, warps = {
        "search": (SEARCH, ("*i64", "*i64"), {"MASTER": tl.float32, "DTYPE": tl.bfloat16, **shared, "LANES_N": 4, "LANES_K": 32}, 4),
        "pack": (
            PACK, ("*i64", "*i64"),
            {"DTYPE": tl.bfloat16, **shared, "VECTOR_N": vectors[0], "VECTOR_K": vectors[1], "LANES_N": 4, "LANES_K": 8}, 1,
        ),
        "decay": (
            DECAY, ("*i64", "*i64", "*i64", "fp32"),
            {"MASTER": tl.float32, "GRAD": tl.float32, **shared, "LANES_N": 4, "LANES_K": 32}, 4,
        ),
    }[name]  # fmt: skip
    return kernel.compile(types, tuple(constants.items()), warps, capability)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@BOTH
@pytest.mark.parametrize("name", ("search", "pack", "decay"))
def test_kernels_compile_without_spills_and_move_vectors(name, n, capability):
    from chts_kernels.gluon_compat import ptxas_log

    made = compiled(name, n, capability)
    ptx = made.asm["ptx"]
    assert made.metadata.shared <= 64  # the search for the layer, nothing else
    log = ptxas_log(ptx, re.search(r"\.target (sm_\w+)", ptx).group(1))
    assert re.findall(r"(\d+) bytes spill", log) == ["0", "0"], log
    assert "fma" not in ptx
    found = {kind: len(re.findall(rf"{re.escape(kind)}\b", ptx)) for kind in ("ld.global.v2.b64", "ld.global.v4.b32", "st.global.v4.b32")}
    # A row of a block is one vector; the packing's tiles are 16 rows and 16 columns, of which half are links for n = 2.
    expected = {
        "search": {"ld.global.v2.b64": 4},
        "pack": {"ld.global.v4.b32": 16 * (n - 1), "st.global.v4.b32": 16 * (3 - n)},
        "decay": {"ld.global.v4.b32": 8, "st.global.v4.b32": 4},
    }[name]
    assert {kind: found[kind] for kind in expected} == expected, found


class Executed:
    """Compiled kernels in a machine for PTX on the CPU: every access has to be inside of a tensor and on the boundary of its vector."""

    def __init__(self, n: int, capability: tuple[int, int]) -> None:
        from chts_kernels.ops.pack.triton_pack import block_table

        self.n, self.capability, self.memory = n, capability, Memory()
        self.patterns = self.memory.put(block_table(n, torch.device("cpu")).numpy())

    def put(self, tensors) -> list[int]:
        return [self.memory.put(t.detach().contiguous().view(torch.uint8).numpy()) for t in tensors]

    def get(self, addresses, like) -> list[torch.Tensor]:
        found = [self.memory.find(at, t.nbytes) for at, t in zip(addresses, like, strict=True)]
        return [torch.from_numpy(data.copy()).view(t.dtype).view(t.shape) for data, t in zip(found, like, strict=True)]

    def run(self, name, ids, counts, columns, *, vectors=(True, True), moving=(), decay=None) -> None:
        from chts_kernels.ops._layers import NEVER

        made, size = compiled(name, self.n, self.capability, vectors), 64
        rows = [[sum(counts[:i]) for i in range(len(counts))] + [NEVER] * (size - len(counts))]
        own = [[i.shape[way] for i in ids] for way in (0, 1)]
        rows += [[*column, *[0] * (size - len(column))] for column in (*own, *columns)]
        parameters = [self.memory.put(np.array(rows, np.int64))]
        parameters += [self.memory.put(np.array(moving, np.int64))] if moving else []
        parameters += [self.patterns, *([] if decay is None else [int(np.float32(decay).view(np.uint32))])]
        machine = Machine(made.asm["ptx"], f"{name}_kernel", made.metadata.shared, late=False)
        for block in range(sum(counts)):
            machine.run(self.memory, parameters, block, sum(counts))


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(("n", "capability"), [(2, (9, 0)), (1, (9, 0)), (2, (8, 0))], ids=str)
def test_compiled_code_computes_what_the_reference_does(n, capability):
    from chts_kernels.ops.masked.triton_masked import _programs
    from chts_kernels.ops.pack import triton_pack

    shapes = [(64, 48), (12, 80), (20, 12)]  # of the packing, a kernel each
    expected = Layers(n, compute=BF16, shapes=shapes)
    for w in expected.weights:  # what a NaN is rounded to is not the same on a CPU
        w.nan_to_num_(0.5, torch.inf, -torch.inf)
    expected.run("reference")
    ids, values, operands, metas, operands_t, metas_t = expected.lists()
    machine = Executed(n, capability)
    weights = machine.put(expected.weights)
    places = [machine.put([torch.zeros_like(t) for t in some]) for some in (ids, values, operands, metas, operands_t, metas_t)]
    machine.run("search", ids, [_programs(i) for i in ids], (places[0], weights, places[1]))
    for layer, of_layer in enumerate(ids):
        programs, along_k = triton_pack.tiling(*of_layer.shape, *triton_pack.lanes())
        at_ids, at_values, *rest = ([place[layer]] if place else [] for place in places)
        vectors = of_layer.shape[0] % 4 == 0, of_layer.shape[1] % 4 == 0
        machine.run("pack", [of_layer], [programs], (at_ids, [], at_values, [along_k], *rest), vectors=vectors)
    for place, some in zip(places, expected.lists(), strict=True):
        for got, wanted in zip(machine.get(place, some), some, strict=True):
            testing.assert_bitwise_equal(got, wanted)

    grads = [testing.random_tensor(s, FP32, seed=7 + i) for i, s in enumerate(shapes)]
    at_grads = machine.put(grads)
    machine.run("decay", ids, [_programs(i) for i in ids], (places[0], weights), moving=at_grads, decay=0.3)
    masked_out_decay_(grads, expected.weights, ids, n, 0.3, impl="reference")
    for got, wanted in zip(machine.get(at_grads, grads), grads, strict=True):
        testing.assert_bitwise_equal(got, wanted)


def test_the_kernels_say_why_they_cannot_run():
    assert MASK_OPERANDS_.names == MASKED_OUT_DECAY_.names == ["auto", "reference", "triton"]
    if not INTERPRETED:
        with pytest.raises(RuntimeError, match="'triton' cannot run chts.mask_operands_ here: it needs NVIDIA CUDA tensors"):
            Layers(2).run("triton")
    else:
        weights = [torch.zeros(8, 8), torch.zeros(8, 8, dtype=FP16)]
        ids = [torch.zeros(2, 2, dtype=torch.uint8)] * 2
        with pytest.raises(RuntimeError, match="it takes weights all float32, all bfloat16 or all float16, got"):
            masked_out_decay_([torch.zeros(8, 8)] * 2, weights, ids, 2, 0.1, impl="triton")
