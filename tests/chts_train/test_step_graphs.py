"""Compiled blocks and captured steps compute what eager training computes; on a GPU with real graphs (`pytest -m gpu`)."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from chts_train import trainer
from chts_train.metrics import METRICS, read_metrics
from chts_train.models import ViT
from chts_train.settings import Settings, resolve_compile
from chts_train.step_graphs import StepGraphs, compile_blocks
from chts_train.trainer import Trainer


def losses(run) -> list[float]:
    rows = [row for row in read_metrics(run / METRICS) if row["kind"] in ("train", "eval")]
    return [row["loss"] if row["kind"] == "train" else row["val_loss"] for row in rows]


def train(config, run, mode, device="cpu", **settings):
    run.mkdir()
    made = Trainer(config, run, Settings(device=device, quiet=True, log_interval=1, compile=mode, **settings))
    made.train()
    return made


@pytest.fixture
def aot_eager(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(trainer, "compile_blocks", functools.partial(compile_blocks, backend="aot_eager"))


def test_compiled_training_is_eager_training_and_arms_share_code(tmp_path, micro, aot_eager):
    """Methods one after the other: three kinds of layer and the loss are compiled, once each, the two layers of a model as one."""
    for number, method in enumerate(("dense", "chts24", "random-regrow", "srste24", "rigl24")):
        config = micro(method=method)
        config = replace(config, model=replace(config.model, num_hidden_layers=2))
        train(config, tmp_path / f"a{number}", "off")
        train(config, tmp_path / f"b{number}", "blocks")
        assert losses(tmp_path / f"a{number}") == losses(tmp_path / f"b{number}"), method
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]


def test_image_blocks_are_compiled_in_parts_where_their_drop_rates_differ(micro_image):
    model = ViT(micro_image().model)
    assert compiled(compile_blocks(model, backend="aot_eager")) == {"Attention", "MLP"}
    model = ViT(replace(micro_image().model, drop_path=0.0))
    assert compiled(compile_blocks(model, backend="aot_eager")) == {"Block"}


def compiled(model) -> set[str]:
    return {type(module).__name__ for module in model.modules() if module._compiled_call_impl is not None}


def window(method):
    """Long enough on each side for graphs to be captured in every form of the weights."""
    return {"ste_window": (1 / 6, 1 / 2)} if "window" in method else {}


class Replayed(StepGraphs):
    """Replays by calling again what would have been captured; capturing computes nothing, as in CUDA."""

    def _capture(self, body):
        return SimpleNamespace(replay=body)

    def _capture_pass(self, first):
        def body():
            if first:
                self._optimizer.zero_grad(set_to_none=True)
            self._run_pass(*self._static)

        return self._capture(body)

    def _can_capture(self):
        return all(self._optimizer.state.get(p) for p in self._parameters)

    @contextlib.contextmanager
    def _capturable(self):
        before = [group["lr"] for group in self._optimizer.param_groups]
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        yield
        for group, lr in zip(self._optimizer.param_groups, before, strict=True):
            group["lr"] = lr

    _upload = staticmethod(torch.Tensor.copy_)

    @contextlib.contextmanager
    def _aside(self):
        yield


@pytest.fixture
def replayed(monkeypatch):
    monkeypatch.setattr(trainer, "StepGraphs", Replayed)
    monkeypatch.setattr(trainer, "resolve_compile", lambda name, *_: name)
    monkeypatch.setattr(trainer, "compile_blocks", lambda model: model)


@pytest.mark.parametrize("method", ("dense", "chts24", "srste24", "rigl24", "ste-window24"))
def test_replayed_steps_are_eager_steps(tmp_path, micro, replayed, method, monkeypatch):
    """Two micro-batches a step, updates at steps 3, 6 and 9 with a ramp of the learning rate, and a resumption between."""
    config = micro(method=method, lr_ramp_steps=2, **window(method))
    train(config, tmp_path / "eager", "off")
    graphs = train(config, tmp_path / "graph", "graph", save_interval=5, keep=9).graphs
    assert set(graphs._passes) == {True, False} and graphs._step is not None
    torch.testing.assert_close(losses(tmp_path / "graph"), losses(tmp_path / "eager"), rtol=1e-5, atol=0)  # lr in float32
    (tmp_path / "more").mkdir()
    from_five = tmp_path / "graph" / "checkpoints" / "step-00000005"
    settings = Settings(device="cpu", quiet=True, log_interval=1, compile="graph")
    Trainer.resume(from_five, settings, run=tmp_path / "more").train()
    torch.testing.assert_close(losses(tmp_path / "more"), losses(tmp_path / "eager"), rtol=1e-5, atol=0)


def test_checkpoints_can_be_left_out(tmp_path, micro):
    outcome = train(micro(), tmp_path / "run", "off", checkpoints=False)
    assert outcome._saved is None and not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "summary.json").exists()


def test_which_mode_fits():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [resolve_compile("auto", *where) for where in ((cpu,), (gpu,), (gpu, "ddp"), (gpu, "fsdp"))] == ["off", "graph", "off", "off"]
    assert resolve_compile("blocks", gpu, "ddp") == "blocks"
    for where in ((cpu,), (gpu, "ddp")):
        with pytest.raises(ValueError, match="compile"):
            resolve_compile("graph", *where)
    with pytest.raises(ValueError, match="compile"):
        Settings(compile="fast")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ("dense", "chts24", "chts14", "srste24", "rigl24", "ste-window24", "ste-window14"))
def test_captured_training_on_the_gpu(tmp_path, micro, method):
    """20 steps with two updates and a resumption: the losses of eager training within the noise of bf16."""
    torch._dynamo.reset()
    base = micro(method=method, total_steps=20, interval=6, stop_fraction=0.6, lr_ramp_steps=2, lr=3e-3, **window(method))
    model = replace(base.model, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    config = replace(base, model=model, batch_size=16, micro_batch=8)
    with torch._inductor.config.patch(compile_threads=4):
        train(config, tmp_path / "eager", "off", "cuda")
        graphs = train(config, tmp_path / "graph", "graph", "cuda", save_interval=7, keep=9).graphs
        assert set(graphs._passes) == {True, False} and graphs._step is not None
        (tmp_path / "more").mkdir()
        from_seven = tmp_path / "graph" / "checkpoints" / "step-00000007"
        settings = Settings(device="cuda", quiet=True, log_interval=1, compile="graph")
        Trainer.resume(from_seven, settings, run=tmp_path / "more").train()
    eager = losses(tmp_path / "eager")
    for name in ("graph", "more"):
        assert max(abs(a - b) for a, b in zip(losses(tmp_path / name), eager, strict=True)) < 0.05, name
