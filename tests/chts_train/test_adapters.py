"""Adapters: each trains as the plain loop does, bit by bit, and goes on from its trainer's checkpoint as if never stopped."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chts_train import SparseLinear, TopologyEvolver, sparse_layers, sparsify_
from chts_train.adapters._build import build_evolver
from chts_train.adapters.torchtitan import STEP, TopologyConverter
from chts_train.distributed import gathered
from chts_train.export import dense_state_dict
from chts_train.packed import export_packed, load_packed

OPTIONS = {"interval": 3, "zeta": 0.5, "lr_ramp_steps": 2, "stop_fraction": 0.8, "seed": 4}
STEPS = 12  # updates at 3, 6, 9


class Net(nn.Module):
    """Two layers to be sparse, a head that is not, and an initialiser of the usual kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.output = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def init_weights(self, std: float = 0.3) -> None:
        for layer in (self.first, self.second, self.output):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(F.relu(self.second(F.relu(self.first(x)))))


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def plain_loop(model: nn.Module, losses, steps: int = STEPS, lr: float = 0.05, **options) -> TopologyEvolver:
    """The loop that adapters are compared with; ``losses(model, step)`` gives the losses of one accumulation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    evolver = build_evolver(model, [optimizer], steps, OPTIONS | options)
    for step in range(1, steps + 1):
        for loss in losses(model, step):
            loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return evolver


# --- options ---


def test_options_are_checked_when_they_are_given():
    with pytest.raises(TypeError, match="intervall: must be one of total_steps, interval, .* got an unknown option"):
        TopologyConverter(total_steps=10, intervall=3)
    with pytest.raises(ValueError, match=r"zeta: must be in \[0, 1\], got 2"):
        TopologyConverter(total_steps=10, zeta=2)
    with pytest.raises(TypeError, match="total_steps: must be given"):
        TopologyConverter(interval=3)


def test_the_right_optimizer_is_found_through_wrappers():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model, other = nn.Sequential(nn.Linear(8, 8)), nn.Linear(2, 2)
    sparsify_(model)
    right, wrong = torch.optim.SGD(model.parameters(), lr=1.0), torch.optim.SGD(other.parameters(), lr=1.0)
    assert build_evolver(model, [Wrapper(wrong), Wrapper(Wrapper(right))], 5, {}).optimizer is right
    with pytest.raises(ValueError, match="optimizer: must hold the values of every sparse layer"):
        build_evolver(model, [wrong], 5, {})
    with pytest.raises(ValueError, match="total_steps: must be given when the trainer does not know it, got inf"):
        build_evolver(model, [right], float("inf"), {})
    assert build_evolver(model, [right], float("inf"), {"total_steps": 7}).schedule.total_steps == 7


# --- an optimizer that calls a closure, as Lightning's does ---


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_makes_the_gradient_before_the_topology_changes(by_name):
    results = []
    for closure in (False, True):
        model = net()
        sparsify_(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        evolver = build_evolver(model, [optimizer], STEPS, OPTIONS)
        for step in range(1, STEPS + 1):

            def backward(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if not closure:
                backward()
                optimizer.step()
            else:
                loss = optimizer.step(closure=backward) if by_name else optimizer.step(backward)
                assert loss.ndim == 0
        assert evolver.updates == 3 and evolver.step_count == STEPS
        results.append(model.state_dict())
    assert_same(*results)


# --- torchtitan ---


class Container(torch.optim.Optimizer):
    """Optimizers of several model parts behind one ``step``, as torchtitan holds them."""

    def __init__(self, parts):
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=0.05) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {"lr": 0.05})

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class Titan:
    """torchtitan's order of things: meta device, convert, (copy for a stage,) memory, initialise, optimizers, hook, steps."""

    def __init__(self, copies: bool = False, shard: Callable[[nn.Module], object] = lambda module: None) -> None:
        with torch.device("meta"):
            model = Net()
        self.converter = TopologyConverter(total_steps=STEPS, **OPTIONS)
        self.converter.convert(model)
        if copies:
            model = copy.deepcopy(model)
        shard(model.first)
        shard(model)
        model.to_empty(device="cpu")
        torch.manual_seed(1)
        with torch.no_grad():
            model.init_weights(std=0.3)
        self.model, self.optimizers = model, Container([model])
        self.optimizers.register_step_post_hook(lambda *_: self.converter.post_optimizer_hook([model]))
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 - t / STEPS) for o in self.optimizers.optimizers]

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.optimizers.zero_grad()
            for part in range(2):
                (loss_of(self.model, 2 * step + part) / 2).backward()
            self.optimizers.step()
            self.schedulers[0].step()


@pytest.mark.parametrize("copies", [False, True])
def test_torchtitan_converter_trains_as_the_plain_loop_does(copies):
    titan = Titan(copies)
    assert isinstance(titan.model.first, SparseLinear) and type(titan.model.output) is nn.Linear
    for layer in sparse_layers(titan.model).values():
        layer.weight.validate()
        assert 0.1 < layer.values.std() < 0.5 and type(layer) is SparseLinear  # drawn by the model's own initialiser
    plain = copy.deepcopy(titan.model)
    plain_loop(plain, lambda model, step: (loss_of(model, 2 * step + part) / 2 for part in range(2)))
    titan.train(1, STEPS)
    [evolver] = titan.converter.evolvers
    assert (evolver.step_count, evolver.updates) == (STEPS, 3) and int(titan.model.get_buffer(STEP)) == STEPS
    plain.get_buffer(STEP).fill_(STEPS)
    assert_same(plain.state_dict(), titan.model.state_dict())


@pytest.mark.parametrize("stop", [5, 8])  # 9 is an update: the first step after resuming
def test_torchtitan_converter_resumes(stop):
    whole = Titan()
    whole.train(1, STEPS)
    first = Titan()
    first.train(1, stop)
    saved = copy.deepcopy([first.model.state_dict(), *(x.state_dict() for x in (first.optimizers.optimizers[0], *first.schedulers))])
    second = Titan()
    targets = [second.model, second.optimizers.optimizers[0], *second.schedulers]
    for target, state in zip(targets, saved, strict=True):
        target.load_state_dict(state)
    second.train(stop + 1, STEPS)
    assert second.converter.evolvers[0].updates == 3
    assert_same(whole.model.state_dict(), second.model.state_dict())


@pytest.fixture
def process_group():
    """The only process of a job: sharding and gathering run as they do in a large one."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators")
def test_torchtitan_converter_and_exports_of_a_sharded_model(process_group, tmp_path):
    from torch.distributed.fsdp import fully_shard

    titan, plain = Titan(shard=fully_shard), Titan()
    titan.train(1, STEPS)
    plain.train(1, STEPS)
    assert titan.converter.evolvers[0].updates == 3
    assert type(titan.model.first.values.data).__name__ == "DTensor"
    assert_same(plain.model.state_dict(), {k: gathered(v) for k, v in titan.model.state_dict().items()})
    assert_same(dense_state_dict(plain.model), dense_state_dict(titan.model))
    export_packed(titan.model, tmp_path)
    loaded = net()
    loaded.register_buffer(STEP, torch.zeros((), dtype=torch.int64))
    assert_same(plain.model.state_dict(), load_packed(tmp_path, loaded).state_dict())


def test_torchtitan_converter_without_meta_device_and_without_its_optimizer():
    model, other = net(), nn.Linear(2, 2)
    converter = TopologyConverter(total_steps=STEPS, filter_fn=lambda name, _: name == "first")
    converter.convert(model)
    assert list(sparse_layers(model)) == ["first"]
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    with pytest.raises(RuntimeError, match="post_optimizer_hook: must follow a step of the optimizer of the converted model"):
        converter.post_optimizer_hook(model)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    converter.post_optimizer_hook(model)
    assert int(model.get_buffer(STEP)) == 1
    assert (converter.key_filter(), converter.state_dict_transform(), converter.format_adapter()) == (None,) * 3


# --- the plain loop of the README ---


def test_the_loop_in_the_readme_runs_and_resumes(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    [code] = re.findall(r"```python\n(# A whole loop.*?)```", text, re.S)
    assert len(code.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)

    def run(total_steps: int, stop: int | None = None) -> dict:
        model = net()
        names = {"model": model, "total_steps": total_steps, "batches": lambda: (batch(s) for s in range(stop or 2 * total_steps)),
                 "loss_fn": F.cross_entropy}  # fmt: skip
        exec(code, names)
        assert isinstance(names["model"].first, SparseLinear)
        return model.state_dict() | {"updates": torch.tensor(names["evolver"].updates)}

    whole = run(200)
    assert int(whole["updates"]) == 1
    (tmp_path / "state.pt").unlink()
    run(200, stop=300)
    assert (tmp_path / "state.pt").is_file()
    assert_same(whole, run(200))


# --- the optional trainers refuse to import without their package ---


@pytest.mark.parametrize(("module", "package", "extra"), [("huggingface", "transformers", "hf"), ("lightning", "lightning", "lightning")])
def test_a_missing_trainer_names_the_extra(monkeypatch, module, package, extra):
    import importlib
    import sys

    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"chts_train.adapters.{module}", raising=False)
    with pytest.raises(ImportError, match=rf'needs the package {package}: pip install "chts\[{extra}\]"'):
        importlib.import_module(f"chts_train.adapters.{module}")


@pytest.mark.skipif("CI" not in os.environ, reason="whoever runs the tests by hand may leave the trainers out")
def test_continuous_integration_has_the_trainers():
    import accelerate  # noqa: F401
    import lightning  # noqa: F401
    import transformers  # noqa: F401
