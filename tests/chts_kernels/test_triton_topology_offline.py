"""Every kernel of the topology update compiles without a device for 8.0, 9.0 and 12.0, and none of them spills registers."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chts_kernels.ops import _batch
from chts_kernels.ops._batch import BatchKernel, interpreted

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def requests(monkeypatch: pytest.MonkeyPatch, n: int) -> list[tuple[BatchKernel, tuple]]:
    """What a whole update launches, by running its host side on tiny CPU tensors with every launch noted instead."""
    from chts_kernels import evolve_triton
    from chts_kernels.ops.carry_over.triton_carry_over import carry_over_
    from chts_kernels.ops.regrow.triton_regrow import regrow_many
    from chts_kernels.ops.remove.triton_remove import remove_many
    from chts_kernels.ops.score import triton_score

    found: list[tuple[BatchKernel, tuple]] = []

    def note(self: BatchKernel, blocks: int, *arguments: Any, num_warps: int | None = None, **constants: Any) -> None:
        types = tuple(
            _batch.TYPES[a.dtype] if isinstance(a, torch.Tensor) else self.scalars.get(name, "i32")
            for name, a in zip(self.function.arg_names, arguments, strict=False)
        )
        found.append((self, (types, tuple(constants.items()), num_warps or self.num_warps)))

    monkeypatch.setattr(BatchKernel, "__call__", note)
    monkeypatch.setattr(triton_score, "multiply", lambda *_, **__: None)
    ids, values = torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(8, 2 * n)
    pointers = torch.zeros(5, 1, dtype=torch.int64)
    survivors = remove_many([values], [ids], n, 0.1, 2.0, "soft", 1, [0], 1)
    remove_many([values], [ids], n, 0.1, 2.0, "hard", 1, [0], 1, schedule=torch.zeros(3, dtype=torch.float64))
    for digits in (1, 2):
        raw = triton_score.score_raw(survivors, digits=digits)
        triton_score.score_many(survivors, digits=digits)
    old_ids, counters = regrow_many(raw, survivors, n, "soft", 1, pointers, 1, sizes=(32, 32, 32), in_place=True)
    regrow_many(torch.zeros(1, 8, 8), survivors, n, "greedy", 1, pointers, 1)
    evolve_triton._stats(raw, survivors, old_ids, counters, n, 1)
    carry_over_([values, values.bfloat16(), values.double()], ids, ids, n)
    return found


def spilled(cubin: bytes, folder: os.PathLike) -> int:
    """Bytes of local memory a thread uses."""
    path = os.path.join(folder, "kernel.cubin")
    with open(path, "wb") as file:
        file.write(cubin)
    done = subprocess.run([os.path.join(TOOLS, "cuobjdump"), "-res-usage", path], capture_output=True, text=True)
    stack = re.findall(r"STACK:(\d+)", done.stdout + done.stderr)
    assert stack, done.stdout + done.stderr
    return sum(int(n) for n in stack)


@pytest.mark.parametrize("capability", [pytest.param((8, 0), marks=pytest.mark.slow), (9, 0), pytest.param((12, 0), marks=pytest.mark.slow)])
@pytest.mark.parametrize("n", (1, 2))
def test_everything_compiles_and_nothing_spills(n, capability, monkeypatch, tmp_path) -> None:
    names = set()
    for kernel, key in requests(monkeypatch, n):
        compiled = kernel.compile(*key, capability)
        assert spilled(compiled.asm["cubin"], tmp_path) == 0, (kernel.function.__name__, key)
        names.add(kernel.function.__name__)
    assert len(names) == 13, names


def generic_product(capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from chts_kernels.ops.score.multiply import multiply_kernel

    step = 128 if capability == 90 else 64
    constants = {"TILE": 128, "DEPTH": step, "STAGES": 3 if step == 128 else 2, "TRIANGLE": False, "COMPILED": True}
    names = [name for name in multiply_kernel.arg_names if name not in constants]
    types = {"a_desc": f"tensordesc<i8[128,{step}]>", "b_desc": f"tensordesc<i8[128,{step}]>", "out_ptr": "*i32"}
    signature = {n: types.get(n, "i32") for n in names} | dict.fromkeys(constants, "constexpr")
    signature = {n: signature[n] for n in multiply_kernel.arg_names}
    aligned = {(multiply_kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in ("out_ptr", "out_stride")}
    source = ASTSource(multiply_kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})


@pytest.mark.parametrize("capability", (80, 90, 120))
def test_the_generic_product_compiles(capability: int, tmp_path) -> None:
    compiled = generic_product(capability)
    assert spilled(compiled.asm["cubin"], tmp_path) == 0
    assert int(compiled.metadata.shared) <= {80: 163, 90: 227, 120: 99}[capability] * 1024


def hopper_kernels() -> Iterator[tuple[str, int, bool]]:
    from chts_kernels.ops.score.sm90_multiply import CONFIGS, SYMMETRIC

    yield SYMMETRIC, 2, True
    for name in CONFIGS:
        yield name, 4, False


def test_the_hopper_product_multiplies_asynchronously(tmp_path) -> None:
    """No spill, no product serialised by ptxas (C75xx), and the next product issued before the last has been waited for."""
    from chts_kernels.gluon_compat import ptxas_log
    from chts_kernels.ops.score.sm90_multiply import COMPILER

    for name, size, symmetric in hopper_kernels():
        compiled = COMPILER.compile(name, size, symmetric)
        assert not re.search(r"C7\d\d\d", ptxas_log(compiled.asm["ptx"])), name
        assert spilled(compiled.asm["cubin"], tmp_path) == 0
        assert "wgmma.wait_group.sync.aligned 1" in compiled.asm["ptx"]


def test_the_hopper_walk_covers_every_tile_once() -> None:
    """``triangle`` and ``rectangle`` as plain arithmetic: each tile on and above the diagonal, or of the grid, exactly once."""
    for n in range(1, 12):
        even = 1 - n % 2
        seen = []
        for t in range(n * (n + 1) // 2):
            line, place = divmod(t, n + even)
            folded = place >= n - line
            seen.append((n - line - even, place - even) if folded else (line, line + place))
        assert sorted(seen) == [(i, j) for i in range(n) for j in range(i, n)]
