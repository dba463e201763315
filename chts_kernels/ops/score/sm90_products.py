"""Build, guard, cache and launch the scores' products of compute capability 9.0 (:mod:`.sm90_kernel`)."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from ...cuda_driver import Kernel, Launch, TensorMap, parameters
from ...gluon_compat import DESC_PARAMS, RESERVED_SHARED, compile_kernel, gl
from .._batch import current_stream, enqueue, is_recording, record
from .sm90_kernel import chts_score_sm90
from .sm90_ptx import KERNEL, MAPS, PARAM_OUT, STEP

BM, BN = 256, 128
SCALARS = {
    "a_first": "i32", "a_rows": "i32", "b_first": "i32", "b_rows": "i32", "a_column": "i32", "b_column": "i32", "b_dense": "i32",
    "digit_columns": "i32", "sparse_steps": "i32", "dense_steps": "i32", "out_first": "i64", "out_layer": "i64", "out_stride": "i32",
    "rows": "i32", "columns": "i32", "tiles_m": "i32", "tiles_n": "i32", "layers": "i32", "deeper": "i32", "whole": "i32", "tiles": "i32",
}  # fmt: skip

def stages(counts: bool) -> tuple[int, int]:
    """(stages in flight, bytes of one)."""
    return (6, BM * STEP // 2 + BN * STEP) if counts else (4, BM * STEP + BN * STEP)


def shared_bytes(counts: bool) -> int:
    count, size = stages(counts)
    return RESERVED_SHARED + count * size + 16 * count


class _Compiler:
    """The kernel of one (counts, digits, transposed); needs no device."""

    @functools.cache  # noqa: B019 - one instance for the life of the process
    def compile(self, counts: bool, digits: int, transposed: bool, band: int = 8, group: int = 4) -> Any:
        # the type only makes Triton pass a tensor map; box and swizzle are set where the map is made
        desc = f"tensordesc<bf16[64, 64],{gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)!r}>"
        pointers = {"out_ptr": "*i16" if counts else "*i32", "meta_ptr": "*i32", "other_meta_ptr": "*i32"}
        signature = {f"map{i}_desc": desc for i in range(MAPS)} | pointers | SCALARS
        count, size = stages(counts)
        constants = {
            "COUNTS": counts, "DIGITS": digits, "TRANSPOSED": transposed, "STAGES": count, "STAGE": size,
            "B_OFFSET": size - BN * STEP, "RING": RESERVED_SHARED, "BARRIERS": RESERVED_SHARED + count * size, "BAND": band,
            "GROUP": group, "SOURCE": _source(),
        }  # fmt: skip
        compiled = compile_kernel(chts_score_sm90, signature, constants, num_warps=8)
        check_ptx(compiled.asm["ptx"], int(compiled.metadata.shared))
        return compiled


COMPILER = _Compiler()


@functools.cache
def _source() -> str:
    """A digest of the inline PTX's source, part of Triton's cache key through a constant: the key does not see builtins' code."""
    here = Path(__file__).parent
    files = here / "sm90_ptx.py", here.parent / "spmm" / "sm90_ptx.py", here.parents[1] / "gluon_compat.py"
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def check_ptx(ptx: str, triton_shared: int) -> None:
    """What the inline PTX takes for granted. Raises RuntimeError naming the guard that fails."""
    kinds = parameters(ptx, KERNEL)
    maps = [i for i, kind in enumerate(kinds) if kind == "map"]
    own = [int(offset) for offset in re.findall(r"global_smem\+(\d+)", ptx)]
    scalars = ["u64"] * 3 + ["u64" if kind == "i64" else "u32" for kind in SCALARS.values()]
    expected = [i * DESC_PARAMS for i in range(MAPS)]
    guards = [
        (maps == expected, f"tensor maps must be parameters {expected}, got {maps}"),
        (kinds[PARAM_OUT : PARAM_OUT + len(scalars)] == scalars, f"scalar parameters changed: {kinds}"),
        (triton_shared <= RESERVED_SHARED, f"Triton's own shared memory must fit {RESERVED_SHARED} bytes, got {triton_shared}"),
        (all(offset < RESERVED_SHARED for offset in own), f"Triton must stay below global_smem + {RESERVED_SHARED}, got {own}"),
        (f"sp.sync.aligned.m64n{BN}k64.s32.s8.s8" in ptx, "sparse wgmma must be present"),
    ]
    for holds, message in guards:
        if not holds:
            raise RuntimeError(f"chts sm_90 score products: {message}")


@functools.cache
def load(key: tuple, device: int) -> Launch:
    """The kernel on a device, ready to launch."""
    compiled = COMPILER.compile(*key)
    ptx = compiled.asm["ptx"]
    threads = int(re.search(r"\.reqntid (\d+)", ptx).group(1))
    kernel = Kernel(compiled.asm["cubin"], KERNEL, parameters(ptx, KERNEL), threads, shared_bytes(key[0]), 1, device)
    return Launch(kernel, 1, ())


@functools.lru_cache(maxsize=1024)
def _map(pointer: int, rows: int, row_bytes: int, box_rows: int, box_bytes: int) -> TensorMap:
    return TensorMap(pointer, rows, row_bytes // 2, row_bytes, (box_rows, box_bytes // 2), box_bytes)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def half_tiles(tiles: int) -> int:
    """Tiles of 256 x 128 with a block of 128 x 128 on or above the diagonal."""
    return sum(tiles - 2 * m for m in range((tiles + 1) // 2))


def parts(tiles: int, multiprocessors: int) -> tuple[int, int]:
    """(whole tiles, halves of tiles): the last wave is cut in two where that keeps more multiprocessors busy."""
    rest = tiles % multiprocessors
    cut = rest if 2 * rest <= multiprocessors else 0
    return tiles - cut, 2 * cut


def _launch(key: tuple, maps: list[TensorMap], pointers: list[torch.Tensor], scalars: dict[str, int]) -> None:
    device = pointers[0].get_device()
    kernel = load(key, device)
    values = [*pointers, *(scalars.get(name, 0) for name in SCALARS)]
    enqueue(
        kernel, min(scalars["tiles"], multiprocessors(device)), tuple(enumerate(values, PARAM_OUT)), current_stream(device),
        [(i * DESC_PARAMS, map_.address) for i, map_ in enumerate(maps)],
    )  # fmt: skip


def counts(operands: torch.Tensor, sides: list[tuple[torch.Tensor, torch.Tensor]], out: torch.Tensor, layers: int, a: int, b: int,
           digits: int, **options: int) -> None:  # fmt: skip
    """Common neighbours of both sides into ``out``, int16, tile by tile; arguments as in ``triton_score.score_raw``."""
    key = (True, 1, False, *options.values())
    if is_recording():
        record(COMPILER, key)
        return
    plain = (digits - 1) * (a + b)
    (row_values, row_meta), (column_values, column_meta) = sides
    maps = [
        _map(row_values.data_ptr(), layers * a, b // 2, BM, STEP // 2),
        _map(column_values.data_ptr(), layers * b, a // 2, BM, STEP // 2),
        _map(operands.data_ptr(), *operands.shape, BN, STEP),
    ]
    per_side = [s // 128 * (s // 128 + 1) // 2 for s in (a, b)]
    _launch(key, maps, [out, row_meta, column_meta], {
        "a_rows": a, "b_first": layers * a, "b_rows": b, "a_column": (plain + a) // 2, "b_column": plain // 2,
        "sparse_steps": b // STEP, "dense_steps": a // STEP, "out_layer": sum(per_side) * 128 * 128,
        "tiles_m": a // 128, "tiles_n": b // 128, "layers": layers, "deeper": int(a > b),
        "tiles": (half_tiles(a // 128) + half_tiles(b // 128)) * layers,
    })  # fmt: skip


def sums(operands: torch.Tensor, sides: list[tuple[torch.Tensor, torch.Tensor]], out: torch.Tensor, layers: int, a: int, b: int,
         digits: int, transposed: bool, **options: int) -> None:  # fmt: skip
    """The scores' sums, int32 [layers, a, b]. The survivors of one of the two terms are compressed: M of the one over K or, with
    ``transposed``, M^T of the one over N."""
    key = (False, digits, transposed, *options.values())
    if is_recording():
        record(COMPILER, key)
        return
    values, metadata = sides[transposed]
    plain = (digits - 1) * (a + b)
    m, n = (b, a) if transposed else (a, b)
    maps = [
        _map(values.data_ptr(), layers * m, n // 2, BM, STEP // 2),
        _map(operands.data_ptr(), *operands.shape, BM, STEP),
        _map(operands.data_ptr(), *operands.shape, BN, STEP),
    ]
    rows_a, rows_b = (0, a), (layers * a, b)
    (a_first, _), (b_first, _) = (rows_b, rows_a) if transposed else (rows_a, rows_b)
    tiles_m, tiles_n = -(-m // BM), n // BN
    whole, halves = parts(tiles_m * tiles_n * layers, multiprocessors(out.get_device()))
    _launch(key, maps, [out, metadata, metadata], {
        "a_first": a_first, "a_rows": m, "b_first": b_first, "b_rows": n,
        "a_column": a // 2 if transposed else 0, "b_column": 0 if transposed else a // 2,
        "b_dense": (plain + a) // 2 if transposed else plain // 2, "digit_columns": (a + b) // 2,
        "sparse_steps": n // STEP, "dense_steps": m // STEP, "out_layer": a * b, "out_stride": b, "rows": m, "columns": n,
        "tiles_m": tiles_m, "tiles_n": tiles_n, "layers": layers, "whole": whole, "tiles": whole + halves,
    })  # fmt: skip
