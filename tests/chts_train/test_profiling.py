"""The README's recipe: a trace with a topology update in its middle, and nothing that waits inside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from chts_train import TopologyEvolver, TopologySchedule, sparsify_

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "Memcpy DtoH")


def _trace(folder: Path, monkeypatch, device: str) -> tuple[list[dict], dict]:
    """The events of the recipe's trace, and the update among them."""
    [code] = re.findall(r"```python\n(# A trace of.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.S)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).to(device)
    sparsify_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    evolver = TopologyEvolver(model, optimizer, TopologySchedule(total_steps=1000)).attach()
    x = torch.randn(8, 32, device=device)

    def train_step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    monkeypatch.chdir(folder)
    exec(code, {"train_step": train_step})
    assert (evolver.step_count, evolver.updates) == (202, 2)
    events = [e for e in json.loads((folder / "update.json").read_text())["traceEvents"] if e.get("ph") == "X"]
    [update] = [e for e in events if e["name"] == "chts::topology_update" and e.get("cat") == "user_annotation"]
    return events, update


def _inside(events: list[dict], outer: dict) -> list[dict]:
    end = outer["ts"] + outer["dur"]
    return [e for e in events if e["tid"] == outer["tid"] and outer["ts"] <= e["ts"] < end and e is not outer]


def test_the_recipe_shows_the_update_and_the_steps_around_it(tmp_path, monkeypatch):
    events, update = _trace(tmp_path, monkeypatch, "cpu")
    names = {e["name"] for e in _inside(events, update)}
    assert {"chts::remove", "chts::score", "chts::regrow", "chts::carry_over_"} <= names
    assert "aten::item" not in names and "aten::_local_scalar_dense" not in names  # nothing is read back
    for name in ("chts::spmm", "chts::weight_grad"):
        assert sum(e["name"] == name for e in events) == 10  # 2 layers, 5 steps


@pytest.mark.gpu
def test_nothing_waits_inside_an_update(tmp_path, monkeypatch):
    events, update = _trace(tmp_path, monkeypatch, "cuda")
    if not any(e.get("cat") == "cuda_runtime" for e in events):
        pytest.skip("CUPTI records nothing here")
    names = [e["name"] for e in _inside(events, update)]
    assert any(name.startswith(("cudaLaunch", "cuLaunch")) for name in names)
    assert not [name for name in names if name in WAITS]
