"""The sm_90 weight gradient without a GPU: every configuration builds clean, and the schedules cover the work exactly once."""

from __future__ import annotations

import re
import subprocess
import tempfile

import numpy as np
import pytest
import torch

from chts_kernels.ops.weight_grad import sm90_launch as launch
from chts_kernels.ops.weight_grad import sm90_schedule as schedule
from chts_kernels.ops.weight_grad.sm90_config import CONFIGS, SHARED_LIMIT, DwConfig, why_illegal
from chts_kernels.patterns import pattern_table

triton = pytest.importorskip("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMMON = [(True, 2, BF16, FP32, False, True), (False, 2, BF16, BF16, False, True)]
RARE = [(True, 1, FP16, FP16, False, True), (False, 2, BF16, BF16, True, False), (True, 1, BF16, BF16, False, False),
        (True, 2, FP16, FP32, True, True)]  # fmt: skip
VARIANTS = [
    pytest.param(name, rest, marks=[] if rest in COMMON else pytest.mark.slow, id=f"{name}-{i}")
    for name in CONFIGS
    for i, rest in enumerate(COMMON + RARE)
]
SIZES = [(1, 4, 4), (17, 64, 64), (64, 512, 512), (1000, 1096, 516), (1024, 2048, 2048), (16384, 512, 512), (16384, 1376, 512),
         (12608, 768, 768), (12608, 3072, 768), (2048, 4096, 4096), (8192, 14336, 4096), (100000, 64, 64)]  # fmt: skip


@pytest.mark.parametrize(("name", "rest"), VARIANTS)
def test_every_configuration_builds_clean(name, rest):
    report = launch.check_compiled(launch.Variant(CONFIGS[name], *rest))
    assert report["shared"] <= SHARED_LIMIT and 0 < report["registers"] <= 255


@pytest.mark.parametrize(
    ("name", "instruction"),
    [("128x256", "HGMMA.64x256x16.F32.BF16"), ("sparse128x256", "HGMMA.SP.64x256x32.F32.BF16")],
)
def test_the_binary_holds_the_instructions(name, instruction):
    compiled = launch.compile_variant(launch.Variant(CONFIGS[name], *COMMON[1]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.nvdisasm.path
        sass = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(rf"{re.escape(instruction)} .*", sass)
    # first and later steps, 4 instructions each; MVUE: 4 steps and a rest step, 2 each. Both read transposed tiles.
    assert len(found) == (10 if "SP" in instruction else 8)
    assert all("tnspB" in line and ("tnspA" in line) == ("SP" not in instruction) for line in found)
    assert "UTMALDG.2D" in sass and "PRMT" in sass and "STL" not in sass and "MEMBAR.ALL.GPU" not in sass


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["128x256", "256x128", "sparse128x256", "sparse128x256c2x"])
def test_every_piece_has_its_own_number_of_blocks(name, split):
    """Triton 3.6 drops the update of a loop-carried value that only bounds an inner loop: with a carried count of blocks every
    piece got the first one's, and pieces of other lengths hung the kernel.

    In the optimised IR, what bounds the product loop inside the loop over pieces must come from a read inside that loop."""
    code = launch.compile_variant(launch.Variant(CONFIGS[name], split, 2, BF16, BF16)).asm["ttgir"]
    lines = code[: code.index("partition0")].splitlines()  # the MMA partition stands first
    outer = next(i for i, line in enumerate(lines) if "scf.for" in line and "tensor<256x" in line)
    inner = next(i for i, line in enumerate(lines) if i > outer and "scf.for" in line and "tensor<256x" in line)
    loop = re.search(r"iter_args\((.*?)\) ->", lines[outer]).group(1)
    indent = len(lines[outer]) - len(lines[outer].lstrip())
    ends = next(line for line in lines[outer:] if line.startswith(" " * (indent + 2) + "scf.yield"))
    yielded = ends.split("scf.yield")[1].split(" : ")[0]
    carried = dict(zip((a.split(" = ")[0] for a in loop.split(", ")), (v.strip() for v in yielded.split(",")), strict=True))
    reads = [line for line in lines[outer + 1 : inner + 400] if " = tt.elementwise_inline_asm" in line]
    inside = {line.split(" = ")[0].strip().split(":")[0] for line in reads}
    bound = re.search(r" to (\S+) step", lines[inner]).group(1)
    while True:  # back to the value that the bound is made of
        made = next((line for line in lines[:inner] if line.strip().startswith(f"{bound} = arith.")), None)
        if made is None:
            break
        bound = re.search(r"= \S+ (\S+),", made).group(1)
    assert re.fullmatch(r"(%\w+)#3", carried.get(bound, bound)).group(1) in inside


def test_guards_fire_on_a_changed_artefact():
    config = CONFIGS["128x256"]
    ptx = launch.compile_variant(launch.Variant(config, *COMMON[1])).asm["ptx"]
    launch.check_ptx(ptx, 36, config)
    for changed, shared, message in [
        (ptx.replace("wgmma.mma_async", "mma"), 36, "wgmma must be present"),
        (ptx + "\n mov.b32 %r1, global_smem+4096;", 36, "stay below"),
        (ptx, 4096, "must fit"),
        (ptx.replace(f".align 64 .b8 {launch.NAME}_param_5[128]", f".u64 {launch.NAME}_param_5"), 36, "tensor maps"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            launch.check_ptx(changed, shared, config)


@pytest.mark.parametrize("line", ["ptxas info : (C7513) Potential Performance Loss", "8 bytes stack frame, 8 bytes spill stores"])
def test_a_warning_or_a_spill_fails_the_build(monkeypatch, line):
    import chts_kernels.gluon_compat as compat

    monkeypatch.setattr(compat, "ptxas_log", lambda ptx: f"Used 168 registers\n{line}")
    with pytest.raises(RuntimeError, match="neither warn nor spill"):
        launch.check_compiled(launch.Variant(CONFIGS["128x256"], *COMMON[1]))


@pytest.mark.parametrize("changes", [{"bm": 64}, {"bn": 96}, {"bm": 256, "bn": 256}, {"cluster": 4}, {"stages": 1}, {"stages": 6},
                                     {"share": "w"}, {"group": 0}, {"sparse": True, "bm": 256, "bn": 128}])  # fmt: skip
def test_illegal_configurations_are_named(changes):
    config = DwConfig(**({"bm": 128, "bn": 256} | changes))
    assert why_illegal(config) is not None
    with pytest.raises(ValueError, match="config"):
        launch.compile_variant(launch.Variant(config))


def test_shipped_configurations_are_legal():
    assert all(why_illegal(config) is None for config in CONFIGS.values())
    assert set(schedule.EFFICIENCY) | set(schedule.SPARSE_EFFICIENCY) <= set(CONFIGS)


@pytest.mark.parametrize("sms", [132, 114, 78])
@pytest.mark.parametrize("name", CONFIGS)
def test_schedules_cover_every_block_once(name, sms):
    config = CONFIGS[name]
    for tokens, rows, columns in SIZES:
        tiles_m, tiles_n, blocks = -(-rows // config.rows), -(-columns // config.columns), -(-tokens // 64)
        for _, work in schedule.works(tokens, rows, columns, config, sms):
            starts, pieces, slots = schedule.table(tiles_m, tiles_n, blocks, work)
            assert work.ctas * config.cluster <= sms and len(starts) == work.ctas
            assert starts[0, 4] == 0 and starts[-1, 5] == len(pieces) and (starts[1:, 4] == starts[:-1, 5]).all()
            covered: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
            for m, n, low, count, slot, first, contributors, counter in pieces.tolist():
                covered.setdefault((m, n), []).append((low, low + count, slot))
                assert (slot < 0) == (count == blocks)
                if slot >= 0:
                    assert first <= slot < first + contributors and contributors > 1
                    assert 0 <= counter * config.cluster < schedule.COUNTERS
            assert sorted(covered) == [(m, n) for m in range(tiles_m) for n in range(tiles_n)]
            for own in covered.values():
                own.sort()  # token order must be slot order: sums then run in it
                assert own[0][0] == 0 and own[-1][1] == blocks and all(a[1] == b[0] for a, b in zip(own, own[1:], strict=False))
                assert [s for _, _, s in own] == sorted(s for _, _, s in own)
            assert sorted(pieces[pieces[:, 4] >= 0, 4].tolist()) == list(range(slots))
            for start, end, head in zip(starts[:, 4], starts[:, 5], starts[:, :4], strict=True):
                assert (head == (pieces[start, :4] if end > start else 0)).all()


def test_split_loads_are_even():
    for tokens, rows, columns in [(16384, 512, 512), (16384, 1376, 512), (12608, 3072, 768)]:
        work = next(w for _, w in schedule.works(tokens, rows, columns, CONFIGS["128x256"], 132) if w.split)
        starts, pieces, _ = schedule.table(-(-rows // 128), -(-columns // 256), -(-tokens // 64), work)
        loads = [int(pieces[a:b, 3].sum()) for a, b in starts[:, 4:6]]
        assert max(loads) - min(loads) <= 2


def test_choice_is_cached_and_plain():
    schedule.choose.cache_clear()
    first = schedule.choose(16384, 512, 512, 132)
    assert schedule.choose(16384, 512, 512, 132) is first and first.split
    assert not schedule.choose(2048, 4096, 4096, 132).split
    assert schedule.choose(8192, 4096, 4096, 132, True).config.sparse


def test_clusters_only_where_many_waves_are_whole():
    for tokens, rows, columns, cluster in [
        (16384, 512, 512, 1), (12608, 3072, 768, 1), (2048, 4096, 4096, 1),
        (8192, 4096, 14336, 2), (8192, 14336, 4096, 2), (16384, 8192, 8192, 2),
    ]:  # fmt: skip
        work = schedule.choose(tokens, rows, columns, 132, True)
        assert work.config.sparse and work.config.cluster == cluster and (cluster == 1 or (work.ctas == 66 and not work.split))
        assert schedule.choose(tokens, rows, columns, 132).config.cluster == 1


@pytest.mark.parametrize("n", [1, 2])
def test_selectors_gather_the_links(n):
    """prmt with a selector on (own, received) pairs gives the links, for even lanes and, flipped, for odd ones."""
    table = pattern_table(n)
    selectors = launch.selector_table(n).astype(np.uint64)
    columns = [bytes([2 * c, 2 * c + 1]) for c in range(4)]  # bytes of four 16-bit columns
    for pattern in range(len(table)):
        for row in range(4):
            selector = int(selectors[pattern] >> np.uint64(16 * row)) & 0xFFFF
            expected = b"".join(columns[c] for c in table.columns[pattern, row])
            for flip, pool in ((0, columns), (0x4444, columns[2:] + columns[:2])):
                data, control = b"".join(pool), selector ^ flip
                picked = bytes(data[control >> 4 * i & 7] for i in range(2 * n))
                assert picked == expected


def test_errors_name_the_argument():
    from chts_kernels.ops.weight_grad.sm90_wgmma import weight_grad_sm90

    good = torch.zeros(8, 16, dtype=BF16), torch.zeros(8, 32, dtype=BF16), torch.zeros(4, 8, dtype=torch.uint8), 2
    with pytest.raises(ValueError, match="dy: must be on a CUDA device"):
        weight_grad_sm90(*good)
    for position, bad, message in [(0, good[0].float(), "dy"), (1, good[1].half(), "x"), (3, 3, "n")]:
        arguments = list(good)
        arguments[position] = bad
        with pytest.raises((ValueError, TypeError), match=f"^{message}:"):
            weight_grad_sm90(*arguments)
