"""Every op has its name in a profile, results are the same under a profiler, and it costs nothing without one."""

from __future__ import annotations

import json
import timeit

import pytest
import torch
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile

import chts_kernels as ck
from chts_kernels.ops._library import REGISTRY


def _everything(seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A forward and a backward pass and an update; and all they left."""
    generator = torch.Generator().manual_seed(seed)
    w = ck.SparseWeight.from_dense(torch.randn(64, 32, generator=generator).to(device, dtype))
    w.values.requires_grad_(True)
    x = torch.randn(4, 8, 32, generator=generator).to(device, dtype).requires_grad_(True)
    y = ck.spmm(x, w)
    y.square().sum().backward()
    with torch.no_grad():
        ck.evolve(w, zeta=0.5, temperature=1.0, seed=0, step=1)
    return [y, x.grad, w.values.grad, w.values, w.ids, w.to_dense()]


def test_ops_have_their_names_in_a_profile_and_results_stay(tmp_path):
    expected = _everything()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        found = _everything()
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in zip(expected, found, strict=True))
    names = {event.key for event in recorded.key_averages()}
    for op in ("prune", "pack", "spmm", "input_grad", "weight_grad", "remove", "score", "regrow", "carry_over_", "unpack"):
        assert f"chts::{op}" in names and op in REGISTRY
    assert {"SparseMatmul", "SparseMatmulBackward"} <= names
    [shapes] = {str(e.input_shapes[:3]) for e in recorded.key_averages(group_by_input_shape=True) if e.key == "chts::spmm"}
    assert shapes == "[[32, 32], [64, 16], [16, 8]]"
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    assert "chts::spmm" in {e.get("name") for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}


def test_the_switch_of_the_profiler_is_where_the_ops_look_for_it():
    """A private name of torch: on the oldest and the newest supported version alike."""
    assert profiler._is_profiler_enabled is False
    with profile(activities=[ProfilerActivity.CPU]):
        assert profiler._is_profiler_enabled is True
    assert profiler._is_profiler_enabled is False


def test_the_switch_costs_less_than_half_a_microsecond():
    seconds = min(timeit.repeat("profiler._is_profiler_enabled", globals={"profiler": profiler}, number=20_000, repeat=7))
    assert seconds / 20_000 < 0.5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_names_and_results_on_a_gpu(dtype):
    expected = _everything(device="cuda", dtype=dtype)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        found = _everything(device="cuda", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert {"chts::spmm", "chts::input_grad", "chts::weight_grad"} <= {event.key for event in recorded.key_averages()}
    with torch.autograd.profiler.emit_nvtx():
        found = _everything(device="cuda", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
