"""The sm_90 sparse product without a GPU: every configuration builds, and what the kernel takes for granted is in the artefact."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from chts_kernels.cuda_driver import parameters
from chts_kernels.ops.spmm import sm90_launch as launch
from chts_kernels.ops.spmm import sm90_wgmma_sp
from chts_kernels.ops.spmm.sm90_config import CONFIGS, CYCLES, MEASURED, SHARED_LIMIT, Sm90Config, choose, why_illegal

triton = pytest.importorskip("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# A dtype changes one word of two instructions, a bias a few instructions of the epilogue. CI builds each configuration plain and with
# the heaviest epilogue; the other combinations are marked slow.
COMMON = [(BF16, None), (FP16, FP32)]
VARIANTS = [
    pytest.param(name, dtype, bias, marks=[] if (dtype, bias) in COMMON else pytest.mark.slow)
    for name in CONFIGS
    for dtype, bias in itertools.product((BF16, FP16), (None, FP32, "same"))
]


@pytest.mark.parametrize(("name", "dtype", "bias"), VARIANTS)
def test_every_configuration_builds_clean(name, dtype, bias):
    report = launch.check_compiled(CONFIGS[name], dtype, dtype if bias == "same" else bias)
    assert report["shared"] <= SHARED_LIMIT
    assert 0 < report["registers"] <= 255


def test_the_binary_holds_the_sparse_instruction():
    compiled = launch.compile_config(CONFIGS["128x256"], BF16, None)
    tool = triton.knobs.nvidia.nvdisasm.path
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    # 4 steps and a rest step, 2 instructions each, in each of two warpgroups
    assert sass.count("HGMMA.SP.64x256x32.F32.BF16") == 20
    assert "UTMALDG.2D" in sass and "UTMASTG.2D" in sass
    assert "STL" not in sass and "MEMBAR.ALL.GPU" not in sass


def test_guards_fire_on_a_changed_artefact():
    config = CONFIGS["128x128"]
    compiled = launch.compile_config(config, BF16, None)
    ptx = compiled.asm["ptx"]
    launch.check_ptx(ptx, 36, config)
    for changed, shared, message in [
        (ptx.replace("wgmma.mma_async.sp", "wgmma.mma_async"), 36, "sparse instruction"),
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
        launch.check_compiled(CONFIGS["128x128"])


def test_parameters_are_read_from_the_entry():
    kinds = parameters(launch.compile_config(CONFIGS["128x128"], BF16, None).asm["ptx"], launch.NAME)
    assert [i for i, kind in enumerate(kinds) if kind == "map"] == [launch.PARAM_W, launch.PARAM_X, launch.PARAM_Y]
    with pytest.raises(ValueError, match="entry absent"):
        parameters(".entry other()", "absent")


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (Sm90Config(96, 128), "bm must be"),
        (Sm90Config(128, 120), "multiple of 16"),
        (Sm90Config(128, 272), "up to 256"),
        (Sm90Config(256, 256, 2), "accumulators"),
        (Sm90Config(128, 128, cluster=4), "cluster must be"),
        (Sm90Config(128, 48 + 16, cluster=2, stages=1), "at least 2"),
        (Sm90Config(128, 128, hints="nn"), "hints must be"),
        (Sm90Config(128, 128, cluster=2, hints="nex"), "hints must be"),
        (Sm90Config(128, 128, y_tokens=48), "divide bn"),
        (Sm90Config(128, 256, 5), "shared memory"),
        (Sm90Config(128, 128, group=0), "positive"),
        (Sm90Config(64, 64, ahead=0), "ahead must be"),
    ],
)
def test_illegal_configurations_are_named(config, rule):
    import re

    assert re.search(rule, why_illegal(config))
    with pytest.raises(ValueError, match="config: "):
        launch.compile_config(config, BF16, None)


def test_the_table_is_legal_and_every_problem_gets_a_configuration_from_it():
    assert all(why_illegal(config) is None for config in CONFIGS.values())
    assert set(CYCLES) <= set(CONFIGS) and set(MEASURED.values()) <= set(CONFIGS)
    for shape, name in MEASURED.items():
        assert choose(*shape, 132) is CONFIGS[name]
    sizes = [4, 64, 512, 1096, 4096, 11008]
    for tokens, rows, columns in itertools.product([1, 17, 1000, 16384], sizes, sizes):
        assert choose(tokens, rows, columns, 132) in CONFIGS.values()


def test_a_small_change_of_a_configuration_is_another_kernel():
    config = CONFIGS["128x128"]
    assert launch.compile_config(config, BF16, None) is launch.compile_config(replace(config), BF16, None)
    assert config.name != replace(config, stages=4).name


def test_importing_the_entry_point_imports_neither_triton_nor_the_driver():
    code = (
        "import sys; import chts_kernels.ops.spmm.sm90_wgmma_sp as m; import chts_kernels.cuda_driver as d;"
        "assert d._driver.cache_info().currsize == 0; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_cannot_run_here_is_said():
    assert "CUDA device" in sm90_wgmma_sp.why_not(torch.device("cpu"), BF16)


def test_arguments_are_named_in_errors():
    x = torch.zeros(4, 16, dtype=BF16)
    values, meta = torch.zeros(16, 8, dtype=BF16), torch.zeros(8, 1, 128, dtype=torch.int32)
    with pytest.raises(ValueError, match="x: must be on a CUDA device"):
        sm90_wgmma_sp.spmm_sm90(x, values, meta, 16)
    with pytest.raises(TypeError, match="x: must have dtype"):
        sm90_wgmma_sp.spmm_sm90(x.float(), values, meta, 16)
