"""The Triton kernels of pack and prune against the references, bit for bit: interpreted on the CPU, compiled on a GPU, and
compiled to cubins with no GPU at all.

The same tests run twice: ``cpu`` cases inside a process started with TRITON_INTERPRET=1 (by the first test here), since Triton
looks at that variable when a kernel is declared, and ``cuda`` cases where there is a device.
"""

from __future__ import annotations

import re

import pytest
import torch

from chts_kernels import pack, pack_operands_, patterns, prune, testing, unpack
from chts_kernels.format import random_ids
from chts_kernels.ops import _triton
from chts_kernels.ops.pack import empty_operands
from chts_kernels.ops.prune import prune_pack, reference

triton = pytest.importorskip("triton")
tl = triton.language
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INTERPRETED = _triton.interpreting()
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs under TRITON_INTERPRET=1"))
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="interpreting")])
SMALL = [(4, 4), (12, 80), (64, 20), (64, 80)]  # one block; sizes 4 mod 8 one way, the other way, neither
LARGE = [*SMALL, (1028, 516), (1376, 512), (64, 4096)]
ON_DEVICES = pytest.mark.parametrize(
    ("device", "shape"), [pytest.param(*p.values, s, marks=p.marks) for p, shapes in ((CPU, SMALL), (CUDA, LARGE)) for s in shapes]
)
DTYPES = [(2, BF16, BF16), (2, FP32, BF16), (1, BF16, BF16), (1, FP32, FP16), (2, FP16, BF16), (2, FP32, FP16)]
"""(n, dtype of the master, dtype of the operands)."""
BY_DTYPES = pytest.mark.parametrize(("n", "master", "compute"), DTYPES, ids=str)


def operands_of(n, values, ids, compute, impl):
    rows, columns = ids.shape[0] * 4, ids.shape[1] * 4
    with testing.poison():
        operand, *rest = empty_operands(rows, columns, compute, values.device)
    operand = None if n == 2 and values.dtype == compute else operand
    pack_operands_(values, ids, n, operand, *rest, impl=impl)
    return operand, *rest


def numbers(shape, master, compute, device, kind="normal"):
    """Random numbers with special ones strewn in; representable in both dtypes for the interpreter, which does not round."""
    x = testing.random_tensor(shape, FP32, magnitude=kind, seed=sum(shape), device=device)
    special = torch.cat([testing.special_values(FP32), testing.special_values(BF16).float()]).to(device)
    at = torch.randint(0, x.numel(), (x.numel() // 8,), device=device)
    x.view(-1)[at] = special[torch.randint(0, len(special), at.shape, device=device)]
    return (x.to(compute) if INTERPRETED and compute is not None else x).to(master)


def skip_unless_it_rounds(master, compute):
    if INTERPRETED and compute == BF16 != master:
        pytest.skip("Triton's interpreter does not round to bfloat16")


def assert_all_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            testing.assert_bitwise_equal(a, e)


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
@pytest.mark.timeout(600)
def test_under_the_interpreter(interpreted):
    assert interpreted.returncode == 0, interpreted.stdout[-6000:] + interpreted.stderr[-2000:]


def test_kernels_are_registered_and_explain_themselves():
    dense = torch.zeros(8, 8, dtype=torch.float64 if INTERPRETED else FP32)
    with pytest.raises(RuntimeError, match="triton.*needs float32" if INTERPRETED else "needs a CUDA device, got cpu"):
        prune(dense, impl="triton")


# --- pack ------------------------------------------------------------------------------------------------------------
@ON_DEVICES
@BY_DTYPES
def test_operands_are_those_of_the_reference(device, shape, n, master, compute):
    skip_unless_it_rounds(master, compute)
    ids = random_ids(*shape, n, seed=1, device=device)
    values = numbers((shape[0], shape[1] * n // 4), master, compute, device)
    expected = operands_of(n, values, ids, compute, "reference")
    for _ in range(1 if INTERPRETED else 3):
        assert_all_equal(operands_of(n, values, ids, compute, "triton"), expected)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("n", [2, 1])
def test_every_pattern_at_every_place_of_a_thread_tile(device, n):
    """Block (i, j) has id (7 i + 13 j + shift) modulo the count, so over the shifts every id visits every place."""
    count = len(patterns.pattern_table(n))
    i, j = torch.arange(16, device=device)[:, None], torch.arange(32, device=device)[None]
    for shift in range(0, count, 30 if INTERPRETED else 1):
        ids = ((7 * i + 13 * j + shift) % count).to(torch.uint8)
        values = torch.arange(1, 64 * 32 * n + 1, device=device).remainder(255).view(64, 32 * n).to(BF16)
        assert_all_equal(operands_of(n, values, ids, BF16, "triton"), operands_of(n, values, ids, BF16, "reference"))
        dense = unpack(values, ids, n, impl="triton")
        testing.assert_bitwise_equal(dense, unpack(values, ids, n, impl="reference"))
        testing.assert_bitwise_equal(pack(dense, ids, n, impl="triton"), values)


@ON_DEVICES
@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP16], ids=str)
def test_pack_and_unpack_move_bits(device, shape, n, dtype):
    ids = random_ids(*shape, n, seed=2, device=device)
    dense = numbers(shape, dtype, None, device)
    with testing.poison():
        values = pack(dense, ids, n, impl="triton")
        back = unpack(values, ids, n, impl="triton")
    testing.assert_bitwise_equal(values, pack(dense, ids, n, impl="reference"))
    testing.assert_bitwise_equal(back, unpack(values, ids, n, impl="reference"))


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_sources_may_be_strided_or_misaligned(device):
    ids = random_ids(16, 32, 2, seed=3, device=device)
    flat = numbers((16 * 16 + 1,), BF16, BF16, device)
    values = flat[1:].view(16, 16)
    assert_all_equal(operands_of(2, values, ids, BF16, "triton"), operands_of(2, values.clone(), ids, BF16, "reference"))
    dense = numbers((32, 16), FP32, FP32, device).t()
    testing.assert_bitwise_equal(prune(dense, impl="triton"), prune(dense, impl="reference"))


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_outputs_that_cannot_be_written_are_refused(device):
    ids = random_ids(16, 16, 2, seed=4, device=device)
    values = torch.ones(16, 8, dtype=FP32, device=device)
    _, meta, operand_t, meta_t = empty_operands(16, 16, FP16, torch.device(device))
    shifted = torch.empty(16 * 8 + 1, dtype=FP16, device=device)[1:].view(16, 8)
    with pytest.raises(RuntimeError, match="operand must be contiguous and start on a 16-byte boundary"):
        pack_operands_(values, ids, 2, shifted, meta, operand_t, meta_t, impl="triton")


# --- prune -----------------------------------------------------------------------------------------------------------
@ON_DEVICES
@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP16], ids=str)
@pytest.mark.parametrize("score", ["abs", "square"])
def test_ids_are_those_of_the_reference(device, shape, n, dtype, score):
    for kind in testing.MAGNITUDES if device == "cuda" else ("wide",):
        dense = numbers(shape, dtype, None, device, kind)
        testing.assert_bitwise_equal(prune(dense, n, score, impl="triton"), prune(dense, n, score, impl="reference"))


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("n", [2, 1])
def test_two_blocks_a_thread_choose_the_same(device, n):
    from chts_kernels.ops.prune import triton_prune

    dense = numbers((32, 264), BF16, None, device)
    testing.assert_bitwise_equal(triton_prune.prune(dense, n, "abs", (4, 32, 2)), prune(dense, n, impl="reference"))
    ids, values = torch.empty(8, 66, dtype=torch.uint8, device=device), torch.empty(32, 66 * n, dtype=BF16, device=device)
    triton_prune.prune_pack_(dense, n, "abs", ids, values, None, None, None, None, (4, 32, 2))
    assert_all_equal((ids, values), prune_pack(dense, n, impl="reference")[:2])


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("n", [2, 1])
def test_ties_take_the_lowest_id(device, n):
    """Few distinct sums, and sums that tie only after rounding: 2**24 + 1 is 2**24 in float32."""
    shape = (64, 256) if INTERPRETED else (512, 1024)
    few = torch.randint(0, 3, shape, device=device).float()
    large = torch.tensor([0.0, 1.0, 2.0, 2.0**24, 2.0**24 + 2], device=device)[torch.randint(0, 5, shape, device=device)]
    for dense in (few, large, torch.zeros_like(few), torch.full_like(few, torch.nan)):
        testing.assert_bitwise_equal(prune(dense, n, impl="triton"), prune(dense, n, impl="reference"))


@ON_DEVICES
@pytest.mark.parametrize(("n", "master", "compute"), [*DTYPES[:3], (2, BF16, None), (1, FP32, None)], ids=str)
def test_prune_pack_is_prune_and_pack(device, shape, n, master, compute):
    skip_unless_it_rounds(master, compute)
    dense = numbers(shape, master, compute, device)
    with testing.poison():
        actual = prune_pack(dense, n, "abs", compute, impl="triton")
    expected = prune_pack(dense, n, "abs", compute, impl="reference")
    assert_all_equal(actual, expected)
    assert (actual[2] is actual[1]) == (n == 2 and master == compute)


@triton.jit
def _regrow(scores_ptr, required_ptr, ids_ptr, BLOCKS: tl.constexpr, LINKS: tl.constexpr):
    from_select = tl.arange(0, BLOCKS)
    x = ()
    for slot in tl.static_range(16):
        x = x + (tl.load(scores_ptr + 16 * from_select + slot),)
    best = best_pattern(x, tl.load(required_ptr + from_select), LINKS, True)
    tl.store(ids_ptr + from_select, best.to(tl.uint8))


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("n", [2, 1])
def test_selection_around_required_links(device, n):
    global best_pattern
    from chts_kernels.ops.prune.triton_select import best_pattern

    blocks = 4096
    table = patterns.pattern_table(n)
    masks = table.tensor("mask16", device)[torch.randint(0, len(table), (blocks,), device=device)]
    required = masks & torch.randint(0, 1 << 16, (blocks,), device=device, dtype=torch.int32)
    for scores in (torch.rand(blocks, 16, device=device), torch.randint(0, 3, (blocks, 16), device=device).float()):
        ids = torch.empty(blocks, dtype=torch.uint8, device=device)
        _regrow[(1,)](scores, required, ids, BLOCKS=blocks, LINKS=n)
        expected = reference.best_pattern(scores.view(4 * blocks, 4), n, required=required[:, None])
        testing.assert_bitwise_equal(ids, expected.view(-1))


# --- device behaviour ------------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_programs_that_take_many_tiles_choose_the_same():
    for shape in ((2048, 4096), (2052, 4168)):  # the second with tiles that overhang
        dense = numbers(shape, BF16, None, torch.device("cuda"))
        testing.assert_bitwise_equal(prune(dense, impl="triton"), prune(dense, impl="reference"))
        assert_all_equal(prune_pack(dense, impl="triton")[:2], prune_pack(dense, impl="reference")[:2])


@pytest.mark.gpu
def test_captured_graphs_follow_their_inputs():
    ids = random_ids(256, 512, 2, seed=5, device="cuda")
    values = torch.randn(256, 256, device="cuda", dtype=BF16)
    _, meta, operand_t, meta_t = empty_operands(256, 512, BF16, torch.device("cuda"))
    dense = torch.randn(256, 512, device="cuda")

    def step():
        pack_operands_(values, ids, 2, None, meta, operand_t, meta_t, impl="triton")
        return prune(dense, impl="triton")

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    values.normal_()
    dense.normal_()
    ids.copy_(random_ids(256, 512, 2, seed=6, device="cuda"))
    graph.replay()
    assert_all_equal((meta, operand_t, meta_t), operands_of(2, values, ids, BF16, "reference")[1:])
    testing.assert_bitwise_equal(found, prune(dense, impl="reference"))


@pytest.mark.gpu
def test_a_side_stream_is_followed():
    dense = torch.randn(2048, 2048, device="cuda")
    expected = prune(-2 * dense, impl="reference")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        dense *= -2
        ids = prune(dense, impl="triton")
    side.synchronize()
    testing.assert_bitwise_equal(ids, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_than_the_current_one():
    dense = torch.randn(64, 64, device="cuda:1")
    testing.assert_bitwise_equal(prune(dense, impl="triton"), prune(dense, impl="reference"))


# --- without a device ------------------------------------------------------------------------------------------------
def configurations():
    """(kernel, types, constants, warps) of the kernels that a 16-bit training run compiles."""
    from chts_kernels.ops.pack import triton_compress, triton_pack
    from chts_kernels.ops.prune import triton_prune

    tile = (("VECTOR_N", True), ("VECTOR_K", True), ("LANES_N", 4), ("LANES_K", 8))
    integers = ("i32", "i32", "i32")
    selection = (("LINKS", 2), ("SQUARE", False), ("HAS_VALUES", True), ("BLOCKS", 2), ("LANES_N", 4), ("LANES_K", 32), ("AHEAD", True))
    compress = (("BITS", 16), ("LINKS", 2), ("LANES_N", 4), ("LANES_K", 32))
    operands = (("LINKS", 2), ("HAS_OPERAND", True), *tile)
    return {
        "prune": (triton_prune.PRUNE, ("*bf16", "*u8", "*bf16", "*i64", *integers, "i32"), selection, 4),
        "pack": (triton_compress.PACK, ("*bf16", "*u8", "*i64", "*bf16", *integers), compress, 4),
        "unpack": (triton_compress.UNPACK, ("*bf16", "*u8", "*i64", "*bf16", *integers), compress, 4),
        "pack_operands_": (
            triton_pack.PACK_OPERANDS, ("*fp32", "*u8", "*i64", "*bf16", "*i32", "*bf16", "*i32", *integers), operands, 1,
        ),
    }  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("name", ["prune", "pack", "unpack", "pack_operands_"])
def test_kernels_compile_without_spills_or_shared_memory(name, capability):
    kernel, types, constants, warps = configurations()[name]
    compiled = kernel.compile(types, constants, warps, capability)
    # Tiles are laid out so that nothing moves between threads: shared memory would mean that a layout was missed.
    assert compiled.metadata.shared == 0
    from chts_kernels.gluon_compat import ptxas_log

    arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"]).group(1)
    log = ptxas_log(compiled.asm["ptx"], arch)
    # Not the stack size: Triton 3.9 declares a byte of local memory that nothing uses.
    assert re.findall(r"(\d+) bytes spill", log) == ["0", "0"], log
    assert "fma" not in compiled.asm["ptx"].replace("fma.rn.f64", "")
