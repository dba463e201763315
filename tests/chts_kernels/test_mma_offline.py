"""The Ampere-class kernels without a GPU: they build for every architecture without spills, and the PTX, run thread by thread on the CPU,
gives the right results, in bounds and without bank conflicts."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from chts_kernels import target, testing
from chts_kernels.format import random_ids
from chts_kernels.ops.pack.reference import pack
from chts_kernels.ops.spmm import mma_config, mma_launch
from chts_kernels.ops.spmm.mma_config import MmaConfig, shared_limit, why_illegal
from chts_kernels.ops.weight_grad import mma_launch as mma_launch_dw
from chts_kernels.ops.weight_grad import mma_schedule, mvue
from chts_kernels.ops.weight_grad.mma_launch import Variant
from chts_kernels.ops.weight_grad.sm90_launch import selector_table
from tests.chts_kernels.ptx_machine import Machine, Memory

pytest.importorskip("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAPABILITIES = (80, 86, 89, 90, 100, 120)
# CI builds every configuration for 8.0 and the first that fits for every other architecture; the rest is marked slow.
FIRST = {cap: next(name for name, c in mma_config.CONFIGS.items() if why_illegal(c, cap) is None) for cap in CAPABILITIES}
FIRST_DW = {
    (cap, kind): next(name for name, c in mma_schedule.CONFIGS.items() if c.kind == kind and why_illegal(c, cap) is None)
    for cap, kind in itertools.product(CAPABILITIES, ("weight_grad", "mvue"))
}


def slow_unless(fast, *values):
    return pytest.param(*values, marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "dtype", "bias", "capability"),
    [
        slow_unless(
            ((dtype, bias) == (BF16, FP32) and cap == 80) or ((dtype, bias) == (FP16, None) and FIRST[cap] == name), name, dtype, bias, cap
        )
        for name, dtype, bias, cap in itertools.product(mma_config.CONFIGS, (BF16, FP16), (None, FP32, BF16), CAPABILITIES)
        if bias in (None, FP32, dtype)
    ],
)
def test_every_product_builds_without_spills(name, dtype, bias, capability):
    config = mma_config.CONFIGS[name]
    if why_illegal(config, capability):
        with pytest.raises(ValueError, match="shared memory"):
            mma_launch.compile_config(config, dtype, bias, capability)
        return
    report = mma_launch.check_compiled(config, dtype, bias, capability)
    assert report["shared"] <= shared_limit(capability) and report["registers"] <= 255


@pytest.mark.parametrize(
    ("name", "n", "out_dtype", "accumulate", "capability"),
    [
        slow_unless((n, out, acc) == (2, BF16, False) and (cap == 80 or name in (FIRST_DW[cap, "weight_grad"], FIRST_DW[cap, "mvue"])),
                    name, n, out, acc, cap)
        for name, n, out, acc, cap in itertools.product(mma_schedule.CONFIGS, (1, 2), (BF16, FP32), (False, True), CAPABILITIES)
        if why_illegal(mma_schedule.CONFIGS[name], cap) is None and not (acc and name.startswith("mvue"))
    ],
)  # fmt: skip
def test_every_weight_gradient_builds_without_spills(name, n, out_dtype, accumulate, capability):
    report = mma_launch_dw.check_compiled(Variant(mma_schedule.CONFIGS[name], n, BF16, out_dtype, accumulate), capability)
    assert report["shared"] <= shared_limit(capability) and report["registers"] <= 255


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_architecture_has_large_and_small_tiles(capability):
    legal = [c for c in mma_config.CONFIGS.values() if why_illegal(c, capability) is None]
    assert {c.bm * c.bn for c in legal} >= {64 * 64, 128 * 128}
    for shape in [(1, 4, 4), (2048, 768, 768), (8192, 8192, 8192), (12608, 3072, 768)]:
        assert mma_config.choose(*shape, 108, capability) in legal
        for kind in ("weight_grad", "mvue"):
            config, splits = mma_schedule.choose(*shape, 108, capability, kind)
            assert config.kind == kind and why_illegal(config, capability) is None and splits >= 1


def bits(tensor):
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def padded(tensor):
    """Rows of a multiple of 16 bytes, NaN behind them."""
    wide = torch.full((tensor.shape[0], -(-tensor.shape[1] // 8) * 8), float("nan"), dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide


# blocks: CTAs of the grid. `late` copies land when they are waited for, early ones at once: both orders must give the same.
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    ("config", "shape", "blocks", "dtype", "bias"),
    [
        (MmaConfig(64, 64, 2, 2, 3), (80, 72, 160), 1, BF16, None),
        (MmaConfig(64, 128, 2, 2, 4), (200, 72, 64), 2, FP16, FP32),
        (MmaConfig(256, 128, 4, 2, 4), (72, 264, 208), 1, BF16, BF16),
        (MmaConfig(128, 128, 2, 4, 2, 1), (140, 136, 80), 3, BF16, None),
        (MmaConfig(128, 256, 2, 4, 3), (3, 8, 528), 1, FP16, FP16),
    ],
)
def test_the_product_on_the_cpu(config, shape, blocks, dtype, bias, late):
    tokens, rows, columns = shape
    weight = testing.random_weight(rows, columns, 2, dtype, magnitude="integer")
    x = testing.random_tensor((tokens, columns), dtype, magnitude="integer", seed=5)
    operands = weight.operands(dtype)
    memory = Memory()
    pointers = [memory.put(bits(t)) for t in (operands.values, x, operands.meta)]
    b = None if bias is None else testing.random_tensor((rows,), bias, magnitude="integer", seed=9)
    pointers.append(0 if b is None else memory.put(bits(b)))
    pointers.append(memory.put(np.full((tokens, rows), -1, np.int16)))
    tiles = -(-rows // config.bm), -(-tokens // config.bn)
    compiled = mma_launch.compile_config(config, dtype, bias, 80)
    machine = Machine(compiled.asm["ptx"], mma_launch.NAME, config.shared_bytes, late=late, dtype=mma_launch.PTX_DTYPE[dtype])
    for block in range(blocks):
        machine.run(memory, [*pointers, columns, 2 * columns, 2 * rows, rows, tokens, columns, *tiles, 0, 0], block, blocks)
    y = torch.from_numpy(memory.find(pointers[4], 2 * tokens * rows).copy()).view(dtype).view(tokens, rows)
    exact = x.double() @ weight.to_dense().double().t() + (0 if b is None else b.double())
    testing.assert_bitwise_equal(y, exact.to(dtype) + 0.0)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    ("config", "shape", "blocks", "splits", "dtype", "n", "out_dtype", "accumulate"),
    [
        (MmaConfig(64, 64, 2, 2, 3, 8, "weight_grad"), (70, 72, 68), 1, 1, BF16, 2, FP32, False),
        (MmaConfig(128, 64, 2, 2, 3, 8, "weight_grad"), (100, 136, 100), 2, 1, FP16, 1, FP16, True),
        (MmaConfig(256, 128, 4, 2, 4, 8, "weight_grad"), (40, 264, 136), 3, 1, BF16, 2, BF16, True),
        (MmaConfig(64, 128, 2, 4, 2, 1, "weight_grad"), (200, 68, 136), 2, 3, BF16, 2, FP32, False),
        (MmaConfig(64, 64, 2, 2, 3, 8, "mvue"), (70, 72, 68), 1, 1, BF16, 2, FP32, False),
        (MmaConfig(256, 128, 4, 2, 3, 8, "mvue"), (130, 68, 132), 2, 2, FP16, 1, FP32, False),
    ],
)
def test_the_weight_gradient_on_the_cpu(config, shape, blocks, splits, dtype, n, out_dtype, accumulate, late):
    tokens, rows, columns = shape
    dy, x = (testing.random_tensor((tokens, size), dtype, magnitude="integer", seed=size) for size in (rows, columns))
    ids = random_ids(rows, columns, n, seed=3)
    memory, left, meta, used = Memory(), padded(dy), 0, dy
    if config.kind == "mvue":
        values, nibbles = mvue.prune(dy, seed=1, layer=2, step=3)
        used = mvue.expand(values, nibbles, tokens)
        left = torch.zeros(rows, -(-tokens // 64) * 32, dtype=dtype)
        left[:, : values.shape[1]] = values
        meta = memory.put(bits(mvue.metadata(nibbles)))
    right = padded(x)
    steps = -(-tokens // config.step)
    part = -(-steps // splits)
    before = testing.random_tensor((splits, rows, columns * n // 4), out_dtype, magnitude="integer", seed=8)
    pointers = [memory.put(bits(left)), memory.put(bits(right)), meta, memory.put(bits(ids)), memory.put(selector_table(n))]
    pointers.append(memory.put(bits(before if accumulate else torch.full_like(before, float("nan")))))
    tiles = -(-rows // config.bm), -(-columns // config.bn)
    compiled = mma_launch_dw.compile_variant(Variant(config, n, dtype, out_dtype, accumulate), 80)
    machine = Machine(compiled.asm["ptx"], mma_launch_dw.NAME, config.shared_bytes, late=late, dtype=mma_launch.PTX_DTYPE[dtype])
    strides = 2 * left.shape[1], 2 * right.shape[1]
    for block in range(blocks):
        machine.run(memory, [*pointers, *strides, rows, columns, tokens, *tiles, splits, part, 0, 0], block, blocks)
    size = before.numel() * before.element_size()
    layers = torch.from_numpy(memory.find(pointers[5], size).copy()).view(out_dtype).view(before.shape)
    exact = pack(used.double().t() @ x.double(), ids, n) + (before[0].double() if accumulate else 0)
    if config.kind == "mvue":  # its values are no integers
        testing.assert_no_worse_than(layers.double().sum(0).float(), exact, exact.to(dtype).float())
    else:
        testing.assert_bitwise_equal(layers.double().sum(0).to(out_dtype) + 0.0, exact.to(out_dtype) + 0.0)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (MmaConfig(96, 128, 2, 2, 3), "bm must be"),
        (MmaConfig(128, 512, 2, 2, 3), "bn 32, 64"),
        (MmaConfig(128, 128, 2, 1, 3), "4 or 8 warps"),
        (MmaConfig(256, 128, 2, 2, 3), "a warp must have"),
        (MmaConfig(64, 32, 2, 2, 3, 8, "weight_grad"), "128 bytes"),
        (MmaConfig(128, 128, 2, 2, 1), "at least 2"),
        (MmaConfig(128, 128, 2, 2, 3, 0), "positive"),
        (MmaConfig(128, 128, 2, 2, 3, 8, "dense"), "kind must be"),
        (MmaConfig(256, 128, 4, 2, 8), "shared memory"),
    ],
)
def test_illegal_configurations_are_named(config, rule):
    assert rule in why_illegal(config)
    compile_it = mma_launch.compile_config if config.kind == "spmm" else lambda c, *_: mma_launch_dw.compile_variant(Variant(c), 90)
    with pytest.raises(ValueError, match="config: "):
        compile_it(config, BF16, None, 90)


def test_the_wrong_kind_of_configuration_is_named():
    with pytest.raises(ValueError, match="kind must be spmm"):
        mma_launch.compile_config(mma_schedule.CONFIGS[FIRST_DW[80, "weight_grad"]], BF16, None, 80)
    with pytest.raises(ValueError, match="kind must be weight_grad or mvue"):
        mma_launch_dw.compile_variant(Variant(mma_config.CONFIGS[FIRST[80]]), 80)
    with pytest.raises(ValueError, match="accumulate: must be False"):
        mma_launch_dw.compile_variant(Variant(mma_schedule.CONFIGS[FIRST_DW[80, "mvue"]], accumulate=True), 80)


def test_guards_fire_on_a_changed_artefact():
    ptx = mma_launch.compile_config(MmaConfig(64, 64, 2, 2, 3), BF16, None, 80).asm["ptx"]
    kinds = ["u64"] * 5 + ["u32"] * 8
    mma_launch.check_ptx(ptx, mma_launch.NAME, 1024, kinds, "mma.sp::ordered_metadata")
    for changed, shared, message in [
        (ptx.replace("mma.sp::ordered_metadata", "mma"), 1024, "must be present"),
        (ptx + "\n mov.b32 %r1, global_smem+4096;", 1024, "stay below"),
        (ptx, 4096, "must fit"),
        (ptx.replace(".u64 .ptr .global .align 1 chts_spmm_mma_param_2", ".u32 chts_spmm_mma_param_2"), 1024, "parameters must begin"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            mma_launch.check_ptx(changed, mma_launch.NAME, shared, kinds, "mma.sp::ordered_metadata")


def test_a_spill_fails_the_build(monkeypatch):
    import chts_kernels.gluon_compat as compat

    monkeypatch.setattr(compat, "ptxas_log", lambda ptx, arch: "Used 255 registers\n8 bytes stack frame, 8 bytes spill stores")
    with pytest.raises(RuntimeError, match="must not spill"):
        mma_launch.check_compiled(MmaConfig(64, 64, 2, 2, 3))


@pytest.mark.parametrize(
    ("capability", "families"),
    [((7, 5), None), ((8, 0), "mma_sp"), ((8, 6), "mma_sp"), ((9, 0), "wgmma_sp"), ((10, 0), "mma_sp"), ((12, 0), "mma_sp")],
)
def test_each_architecture_takes_its_family(monkeypatch, caplog, capability, families):
    monkeypatch.setattr(target, "compute_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    first = next((name for name in ("wgmma_sp", "mma_sp") if target.why_not_kernel(name, device) is None), None)
    assert first == families
    with caplog.at_level(logging.WARNING, "chts_kernels"):
        found = [target.has_sparse_tensor_core_kernel.__wrapped__(0) for _ in range(1)]
    assert found == [families is not None]
    assert len(caplog.records) == (families is None)
    if families is None:
        assert "reference" in caplog.text and "7.5" in caplog.text


def test_import_needs_neither_triton_nor_a_device():
    code = (
        "import sys; import chts_kernels.ops.spmm.mma_sp; import chts_kernels.ops.weight_grad.mma_weight_grad; "
        "import chts_kernels.cuda_driver as d; assert d._driver.cache_info().currsize == 0; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
