"""Every kernel of the topology update compiles without a device for 8.0, 9.0 and 12.0, and none of them spills registers."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chts_kernels import cuda_driver
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
    ids, values = torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(8, 2 * n)
    pointers = torch.zeros(5, 1, dtype=torch.int64)
    survivors = remove_many([values], [ids], n, 0.1, 2.0, "soft", 1, [0], 1)
    remove_many([values], [ids], n, 0.1, 2.0, "hard", 1, [0], 1, schedule=torch.zeros(3, dtype=torch.float64))
    for digits in (1, 2):
        raw = triton_score.score_raw(survivors, digits=digits)
        triton_score.score_many(survivors, digits=digits)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_score, "STRIPS_FROM", -1)
            triton_score.score_raw(survivors, digits=digits)
    old_ids, counters = regrow_many(
        raw, survivors, n, "soft", 1, pointers, 1, sizes=(32, 32, 32), in_place=True, refresh=(torch.float32, torch.bfloat16, 1)
    )  # fmt: skip
    regrow_many(None, survivors, n, "random", 1, pointers, 1, sizes=(16,), in_place=True, refresh=(torch.bfloat16, torch.bfloat16, 1))
    regrow_many(torch.zeros(1, 8, 8), survivors, n, "greedy", 1, pointers, 1)
    evolve_triton._stats(raw, survivors, old_ids, counters, n, 1)
    carry_over_([values, values.bfloat16(), values.double()], ids, ids, n)
    return found


def requests_once(n: int) -> list[tuple[BatchKernel, tuple]]:
    """Those of soft removal alone."""
    with pytest.MonkeyPatch.context() as patch:
        found = requests(patch, n)
    return [(kernel, key) for kernel, key in found if ("SOFT", True) in key[1] and ("FROM_DEVICE", False) in key[1]]


def spilled(cubin: bytes, folder: os.PathLike) -> int:
    """Bytes of local memory a thread uses."""
    path = os.path.join(folder, "kernel.cubin")
    with open(path, "wb") as file:
        file.write(cubin)
    done = subprocess.run([os.path.join(TOOLS, "cuobjdump"), "-res-usage", path], capture_output=True, text=True)
    stack = re.findall(r"STACK:(\d+)", done.stdout + done.stderr)
    assert stack, done.stdout + done.stderr
    return sum(int(n) for n in stack)


@pytest.mark.parametrize("capability", ((8, 0), (9, 0), (12, 0)))
@pytest.mark.parametrize("n", (1, 2))
def test_everything_compiles_and_nothing_spills(n, capability, monkeypatch, tmp_path) -> None:
    names = set()
    for kernel, key in requests(monkeypatch, n):
        compiled = kernel.compile(*key, capability)
        assert spilled(compiled.asm["cubin"], tmp_path) == 0, (kernel.function.__name__, key)
        assert int(compiled.metadata.shared) <= 99 * 1024  # what a block may have on 8.6, 8.9 and 12.0
        names.add(kernel.function.__name__)
    assert len(names) == 14, names


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


def test_the_sparse_hopper_product_multiplies_asynchronously(tmp_path) -> None:
    from chts_kernels.gluon_compat import ptxas_log
    from chts_kernels.ops.score.sm90_products import COMPILER

    for key in ((True, 1, False), (False, 1, False), (False, 1, True), (False, 2, False)):
        ptx = COMPILER.compile(*key).asm["ptx"]
        assert not re.search(r"C7\d\d\d", ptxas_log(ptx)), key
        assert spilled(COMPILER.compile(*key).asm["cubin"], tmp_path) == 0
        assert "wgmma.wait_group.sync.aligned 1" in ptx
        assert "trap" in ptx  # no wait without an end


def whole_tile(t: int, tiles: int) -> tuple[int, int]:
    """The function of that name in ``sm90_kernel``, in plain arithmetic."""
    first, height = 0, min(tiles // 2, 8)
    size = height * (tiles - height)
    while t >= size:
        t, first = t - size, first + 8
        height = min(tiles // 2 - first, 8)
        size = height * (tiles - 2 * first - height)
    if t < height * (height + 1):
        pair = sum(t >= i * (i + 1) for i in range(1, 8))
        place = t - pair * (pair + 1)
        row, column = place % (pair + 1), 2 * pair + place // (pair + 1)
    else:
        past = t - height * (height + 1)
        row, column = past % height, 2 * height + past // height
    return first + row, 2 * first + column + 1


def counted_tile(t: int, layers: int, deeper: int, tiles: tuple[int, int]) -> tuple[int, int, int, int]:
    """Likewise; ``tiles`` of both sides."""
    sides = (1, 0) if deeper else (0, 1)
    for half in (False, True):
        for side in sides:
            per_layer = (tiles[side] + 1) // 2 if half else tiles[side] ** 2 // 4
            if t < layers * per_layer:
                layer, t = divmod(t, per_layer)
                return (layer, side, t, 2 * t) if half else (layer, side, *whole_tile(t, tiles[side]))
            t -= layers * per_layer
    raise AssertionError("no such tile")


@pytest.mark.parametrize(
    ("tiles", "layers"), (((1, 1), 1), ((1, 2), 2), ((4, 4), 3), ((11, 4), 2), ((4, 11), 1), ((32, 32), 1), ((33, 17), 1))
)
def test_the_sparse_hopper_walk_covers_every_tile_once(tiles: tuple[int, int], layers: int) -> None:
    """And no CTA has much more to do than others: tiles with one block below the diagonal take half the time."""
    from chts_kernels.ops.score.sm90_products import half_tiles

    count = layers * sum(half_tiles(size) for size in tiles)
    deeper = int(tiles[0] > tiles[1])
    every = [counted_tile(t, layers, deeper, tiles) for t in range(count)]
    wanted = [(layer, side, m, j) for layer in range(layers) for side, size in enumerate(tiles)
              for m in range((size + 1) // 2) for j in range(2 * m, size)]  # fmt: skip
    assert sorted(every) == wanted
    ctas = min(count, 132)
    seen, loads = [], []
    for cta in range(ctas):
        def place(wave: int, cta: int = cta) -> int:
            return ctas - 1 - cta if wave % 2 else cta

        waves = count // ctas + (place(count // ctas) < count % ctas)
        own = [every[wave * ctas + place(wave)] for wave in range(waves)]
        seen += own
        loads.append(sum(tiles[1 - side] * (1 if j > 2 * m else 0.5) for _, side, m, j in own))
    assert sorted(seen) == wanted
    if count >= 4 * ctas:
        assert max(loads) < 1.1 * sum(loads) / ctas


@pytest.mark.parametrize("tiles", (1, 8, 66, 67, 131, 132, 133, 512, 1376))
def test_the_last_wave_of_sums_is_cut_in_two(tiles: int) -> None:
    """``uncut_tile`` of the kernel in plain arithmetic: every warpgroup of every tile once, and no wave more than before."""
    from chts_kernels.ops.score.sm90_products import parts

    whole, halves = parts(tiles, 132)
    entries = [(t, part) for t in range(whole) for part in (1, 2)]
    entries += [(whole + past // 2, 1 + past % 2) for past in range(halves)]
    assert sorted(entries) == [(t, part) for t in range(tiles) for part in (1, 2)]
    assert -(-(whole + halves) // 132) == -(-tiles // 132)
    assert (halves > 0) == (0 < tiles % 132 <= 66)


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


class StubDriver:
    """libcuda without a device: every call succeeds, and launches are read back from the arguments' memory."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int, list[int]]] = []  # blocks, stream, addresses of the parameters

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0

    def cuLaunchKernelEx(self, config: int, function: int, parameters: int, extra: None) -> int:
        given = cuda_driver._LaunchConfig.from_address(config)
        self.launches.append((given.grid[0], given.stream or 0, parameters))
        return 0

    def value(self, index: int, kind: Any) -> Any:
        """Parameter ``index`` of the last launch."""
        place = ctypes.c_void_p.from_address(self.launches[-1][2] + 8 * index).value
        return kind.from_address(place).value


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> StubDriver:
    stub = StubDriver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: stub)
    monkeypatch.setattr(cuda_driver, "_primary_context", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return stub


def test_a_launch_passes_every_argument(driver: StubDriver) -> None:
    from chts_kernels.ops.remove.triton_remove import SAMPLE

    (key,) = {key for kernel, key in requests_once(2) if kernel is SAMPLE}
    launch = SAMPLE.load(*key, 0)
    tensors = [torch.zeros(4, dtype=torch.int64) for _ in range(4)]
    scalars = [123, 0.75, 1 << 33, 0xFFFFFFFF, 7, 16, 256, 3, 64, 2]
    _batch.enqueue(launch, 6, tuple(enumerate([*tensors, *scalars])), 99)
    assert driver.launches[-1][:2] == (6, 99)
    assert [driver.value(i, ctypes.c_uint64) for i in range(4)] == [t.data_ptr() for t in tensors]
    assert driver.value(4, ctypes.c_int64) == 123
    assert driver.value(5, ctypes.c_float) == 0.75
    assert [driver.value(i, ctypes.c_int64) for i in (6, 7, 8)] == [1 << 33, 0xFFFFFFFF, 7]
    assert [driver.value(i, ctypes.c_int32) for i in range(9, 14)] == [16, 256, 3, 64, 2]


def test_the_hopper_product_is_launched_with_its_problem(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    from chts_kernels.ops.score import sm90_multiply

    monkeypatch.setattr(sm90_multiply, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(sm90_multiply, "current_stream", lambda device: 5)
    sm90_multiply.load.cache_clear()
    operands, sums = torch.zeros(2 * (384 + 256), 640, dtype=torch.int8), torch.zeros(2, 384, 256, dtype=torch.int32)
    problem = 0, 384, 0, 768, 256, 0
    sm90_multiply.launch(operands, sums, 2, problem, 640, (0, 384 * 256, 256), (384, 256), False, None)
    sm90_multiply.load.cache_clear()
    assert driver.launches[-1][:2] == (6, 5)  # three tile rows, one tile column, two layers
    start = sm90_multiply.PARAM_OUT
    assert driver.value(start, ctypes.c_uint64) == sums.data_ptr()
    got = [driver.value(start + 1 + i, ctypes.c_int64 if kind == "i64" else ctypes.c_int32)
           for i, kind in enumerate(sm90_multiply.SCALARS.values())]  # fmt: skip
    assert got == [0, 384, 0, 768, 256, 0, 5, 0, 384 * 256, 256, 384, 256, 3, 1, 3, 6]
