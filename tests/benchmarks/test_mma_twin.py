"""The dense twin builds where there is no device; its results are gated by the benchmark itself."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize(("columns", "turn"), [(False, True), (True, False)])
def test_the_twin_builds_without_spills(columns, turn):
    from benchmarks.competitors_mma_twin import compile_twin
    from benchmarks.providers.mma_twin import CONFIGS
    from chts_kernels.gluon_compat import ptxas_log

    for config in CONFIGS:
        ptx = compile_twin(config, columns, turn, torch.bfloat16, 80).asm["ptx"]
        assert "mma.sync.aligned.m16n8k16" in ptx and "ldmatrix" in ptx and "cp.async.cg" in ptx
        assert not any(map(int, re.findall(r"(\d+) bytes spill", ptxas_log(ptx, "sm_80"))))
