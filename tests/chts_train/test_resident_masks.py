"""Resident masks of STE layers: found once a step for all of them, read by compiled passes, noticed when somebody else writes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo
from torch import nn

import chts_train.baselines
import chts_train.trainer
from chts_kernels import SparseWeight
from chts_kernels.ops.prune import PRUNE_PACK_
from chts_train import SparsityConfig, STELinear, attach_srste_decay, make_masks_resident_, refresh_masks_, sparsify_
from chts_train.metrics import METRICS, read_metrics
from chts_train.settings import Settings
from chts_train.trainer import Trainer

DTYPE = torch.bfloat16
BOTH = pytest.mark.parametrize("n", (1, 2))


def build(n: int = 2, impl: str = "auto", decay: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    sparsify_(model, SparsityConfig(n=n, kind="ste", srste_lambda=decay))
    for layer in ste_layers(model):
        layer.impl = impl
    return model


def ste_layers(model: nn.Module) -> list[STELinear]:
    return [module for module in model.modules() if isinstance(module, STELinear)]


def draw_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def plain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same by dense products, of masks found here and now."""
    for layer in model:
        if isinstance(layer, STELinear):
            weight = SparseWeight.from_dense(layer.weight.detach(), layer.n).to_dense()
            x = nn.functional.linear(x, weight.to(DTYPE), layer.bias.to(DTYPE))
        else:
            x = layer(x)
    return x


class Silent(torch.optim.Optimizer):
    """Writes as fused optimizers do: versions of parameters stay."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.neg_()


@pytest.fixture
def searches(monkeypatch):
    """How many layers were searched: together (a list of numbers), and one by one ("alone")."""
    found: list[object] = []
    together, alone = chts_train.baselines.MASK_OPERANDS_, PRUNE_PACK_.reference

    def search(weights, *rest, **more):
        found.append(len(weights))
        together(weights, *rest, **more)

    monkeypatch.setattr(chts_train.baselines, "MASK_OPERANDS_", search)
    monkeypatch.setattr(PRUNE_PACK_, "reference", lambda *args: (found.append("alone"), alone(*args))[1])
    return found


@BOTH
@pytest.mark.parametrize("mode", ("training", "no_grad"))
def test_compiled_passes_read_the_masks_and_never_search(packed, searches, n, mode):
    model = build(n, impl="operand_reader")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make_masks_resident_(model, optimizer)
    torch._dynamo.reset()
    network = torch.compile(lambda x: model(x).float().square().mean(), fullgraph=True, dynamic=True, backend="aot_eager")

    def check(what: str) -> None:
        x = torch.randn(6, 16, dtype=DTYPE, requires_grad=True)
        packed.clear(), searches.clear()
        if mode == "no_grad":
            with torch.no_grad():
                loss = network(x)
        else:
            loss = network(x)
            [ours, *of_weights] = torch.autograd.grad(loss, (x, *model.parameters()))
            assert all(bool(g.any()) for g in of_weights)
        assert packed == [] and searches == [], what
        expected = plain(model, x).float().square().mean()
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-4)
        if mode == "training":
            [expected] = torch.autograd.grad(expected, x)
            assert (ours - expected).float().norm() <= 3e-2 * expected.float().norm(), what

    check("the first step")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            draw_gradients(model, step)
            searches.clear()
            optimizer.step()
            assert searches == [2]  # both layers in one go
            check(f"step {step}")
        model.load_state_dict({key: -2 * value for key, value in build().state_dict().items()})
        check("load_state_dict")
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(32, 16))
        refresh_masks_(model)
        check("refresh_masks_")


@BOTH
def test_what_a_compiled_graph_takes_for_inputs(packed, recorder, n):
    """The buffers themselves; one graph for layers of one shape."""
    from torch._dynamo.utils import counters

    backend, nodes = recorder
    layers = [STELinear(24, 16, n=n) for _ in range(3)]
    for layer in layers:
        layer.impl, layer.resident_mask = "operand_reader", DTYPE
    torch._dynamo.reset()
    counters.clear()
    network = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=backend)
    for layer in layers:
        network(layer, torch.randn(3, 24, dtype=DTYPE, requires_grad=True)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    products = [node for node in nodes if "chts." in str(node.target)]
    assert [str(node.target) for node in products] == ["chts.spmm.default", "chts.input_grad.default"]
    for node in products:
        assert [argument.op for argument in (*node.args[1:3], *node.args[-2:])] == ["placeholder"] * 4


@BOTH
def test_eager_training_is_the_same_bit_for_bit_with_one_search_a_step(searches, n):
    def train(resident: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model = build(n, decay=0.01)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        attach_srste_decay(model, optimizer)
        if resident:
            make_masks_resident_(model, optimizer)
        searches.clear()
        losses = []
        for step in range(4):
            optimizer.zero_grad()
            for micro in range(2):
                x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + micro))
                with torch.autocast("cpu", DTYPE):
                    loss = (model(x) - x).float().square().mean()
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
        return losses, [p.detach().clone() for p in model.parameters()]

    expected = train(False)
    assert searches == ["alone", "alone"] * 3  # after the first three steps: eager passes see whether a weight has changed
    ours = train(True)
    assert searches == [2] * 4
    for a, b in zip([*ours[0], *ours[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.equal(a, b)


def test_eager_passes_notice_other_writers(searches):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = make_masks_resident_(model, optimizer)
    x = torch.randn(4, 16, dtype=DTYPE)

    def check() -> None:
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(model, x), rtol=2e-2, atol=2e-2)

    searches.clear()
    check()
    assert searches == []
    with torch.no_grad():
        model[2].weight.neg_()
    check()
    assert searches == [1]
    for other in (torch.optim.SGD(model[0].parameters(), lr=1.0), Silent(model[0].parameters(), {})):
        draw_gradients(model, 1)
        other.step()
        searches.clear()
        check()
        assert searches == [1]
    silent = Silent(model.parameters(), {})
    following = make_masks_resident_(model, silent)
    searches.clear()
    silent.step()
    check()
    assert searches == [2]
    following.remove(), handle.remove()
    searches.clear()
    silent.step()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(model, x), rtol=2e-2, atol=2e-2)
    check()
    assert searches == [2]  # whoever finds one out of date does all of them
    before = model[0]._resident.ids
    model.load_state_dict(build().state_dict())
    assert model[0]._resident.ids is before and torch.equal(before, SparseWeight.from_dense(model[0].weight.detach()).ids)


def test_another_dtype_copies_and_moves():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make_masks_resident_(model, optimizer)
    layer = model[0]
    x = torch.randn(4, 16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight * layer.mask(), layer.bias))  # float32: searched for itself
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].resident_mask is None and torch.equal(other[0](x), layer(x))
    assert layer.resident_mask == DTYPE and "resident" not in str(model.state_dict().keys())
    before = layer._resident.ids
    model.float()  # nothing moved: captured graphs stay valid
    assert layer._resident.ids is before
    model.to(torch.float64)
    assert layer.resident_mask == DTYPE and layer._resident.ids is not before
    torch.testing.assert_close(layer(x.to(DTYPE)), plain(nn.Sequential(layer), x.to(DTYPE)), rtol=2e-2, atol=2e-2)
    layer.resident_mask = None
    assert layer._resident is None and layer(x.to(DTYPE)).dtype == DTYPE
    assert build()[0].to("meta").resident_mask is None
    model[2].to("meta")
    assert model[2].resident_mask is None


def test_what_cannot_have_resident_masks_is_refused():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"dtype: must be torch\.bfloat16 or torch\.float16, got torch\.float32"):
        make_masks_resident_(model, optimizer, torch.float32)
    with pytest.raises(ValueError, match="model: must have at least one STELinear, got none"):
        make_masks_resident_(nn.Linear(4, 4), optimizer)
    with pytest.raises(ValueError, match="model: must have at least one STELinear, got none"):
        refresh_masks_(nn.Linear(4, 4))
    model[2].to("meta")
    with pytest.raises(ValueError, match=r"2\.weight: must be whole and on its device to have a resident mask, got one on the meta device"):
        make_masks_resident_(model, optimizer)
    assert model[0].resident_mask is None
    refresh_masks_(model)  # there is none


@pytest.mark.parametrize("compile", ("off", "blocks"))
def test_the_trainer_has_them_in_bf16(micro, tmp_path, monkeypatch, searches, compile):
    """A run through a window and a resumed one, with and without: the same losses."""
    config = micro(method="ste-window24", ste_window=(0.25, 0.75), precision="bf16")

    def train(name: str, resume: bool = False) -> list[float]:
        (tmp_path / name).mkdir()
        settings = Settings(device="cpu", quiet=True, log_interval=1, save_interval=1, keep=20, compile=compile)
        with torch._inductor.config.patch(compile_threads=2):
            if resume:
                from_six = tmp_path / "ours" / "checkpoints" / "step-00000006"
                trainer = Trainer.resume(from_six, settings, run=tmp_path / name)
            else:
                trainer = Trainer(config, tmp_path / name, settings)
            trainer.train()
        return [row["loss"] for row in read_metrics(tmp_path / name / METRICS) if row["kind"] == "train"]

    torch._dynamo.reset()
    ours = train("ours")
    together = [count for count in searches if count != "alone"]
    assert together.count(7) == 6  # one a step of the window, of all layers of the model
    assert train("resumed", resume=True) == ours
    monkeypatch.setattr(chts_train.trainer, "make_masks_resident_", lambda *_: None)
    torch._dynamo.reset()
    assert train("plain") == ours
