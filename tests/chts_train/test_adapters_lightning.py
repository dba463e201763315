"""The callback in Lightning's real Trainer: automatic and manual optimization, resuming, several optimizers."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chts_train import TopologyEvolver, TopologySchedule, sparse_layers, sparsify_

lightning = pytest.importorskip("lightning")

from chts_train.adapters.lightning import TopologyCallback  # noqa: E402

OPTIONS = {"interval": 3, "zeta": 0.5, "lr_ramp_steps": 2, "stop_fraction": 0.8, "seed": 4}
STEPS = 12
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Linear(8, 4)
        sparsify_(self)
        self.automatic_optimization = not manual

    def training_step(self, batch, index):
        loss = F.cross_entropy(self.head(self.body(batch[0])), batch[1])
        if self.automatic_optimization:
            return loss
        optimizers = self.optimizers()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self):
        if not self.automatic_optimization:
            head = torch.optim.SGD(self.head.parameters(), lr=0.05)
            return [head, torch.optim.AdamW(self.body.parameters(), lr=0.05)]
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data():
    x = torch.randn(8 * 4, 8, generator=torch.Generator().manual_seed(0))  # an epoch is 4 steps: Lightning resumes at its beginning
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(len(x)) % 4), batch_size=4)


def fit(folder, module=None, ckpt_path=None, callback=None, accumulate=2, **changes):
    callback = callback or TopologyCallback(**OPTIONS)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    arguments = {
        "max_steps": STEPS, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0, "callbacks": [callback, saver],
    }  # fmt: skip
    if module is not None and not module.automatic_optimization:
        arguments |= {"gradient_clip_val": None, "accumulate_grad_batches": 1}
    module = Module() if module is None else module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(**(arguments | changes)).fit(module, data(), ckpt_path=ckpt_path)
    return module, callback.evolver


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *fit(folder)


def same(first, second) -> None:
    first, second = first.state_dict(), second.state_dict()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def test_it_evolves_as_the_plain_loop_does(whole):
    _, module, evolver = whole
    assert (evolver.step_count, evolver.updates, evolver.schedule.total_steps) == (STEPS, 3, STEPS)
    plain = Module()
    [optimizer], [scheduler] = [[x] if not isinstance(x, dict) else [x["scheduler"]] for x in plain.configure_optimizers().values()]
    loop = TopologyEvolver(plain, optimizer, TopologySchedule(STEPS, 3, 0.8, 0.5, lr_ramp_steps=2), seed=4)
    for i, (x, y) in enumerate(batch for _ in range(STEPS // 4) for batch in data()):
        (F.cross_entropy(plain.head(plain.body(x)), y) / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            if loop.step():
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert loop.step_count == STEPS
    same(plain, module)


@pytest.mark.parametrize("step", [4, 8])
def test_it_resumes_bit_by_bit(whole, tmp_path, step):
    folder, module, evolver = whole
    file = folder / f"step={step}.ckpt"
    saved = torch.load(file, weights_only=True)
    [state] = [state for key, state in saved["callbacks"].items() if key.startswith("TopologyCallback")]
    assert state["step"] == step and {"body.0.ids", "body.0.values"} <= set(saved["state_dict"])
    resumed, second = fit(tmp_path, ckpt_path=str(file))
    assert (second.step_count, second.updates) == (STEPS, 3)
    same(module, resumed)
    assert all(torch.equal(second.ages[k], v) for k, v in evolver.ages.items())


def test_manual_optimization_with_two_optimizers(tmp_path):
    before = Module(manual=True)
    module, evolver = fit(tmp_path, Module(manual=True), max_steps=2 * STEPS, callback=TopologyCallback(**OPTIONS, total_steps=STEPS))
    assert type(evolver.optimizer) is torch.optim.AdamW and evolver.step_count == STEPS and evolver.updates == 3
    old = sparse_layers(before)
    assert all(not torch.equal(layer.ids, old[name].ids) for name, layer in sparse_layers(module).items())


def test_a_training_without_end_needs_the_steps(tmp_path):
    with pytest.raises(ValueError, match="total_steps: must be given when the trainer does not know it"):
        fit(tmp_path, max_steps=-1, max_epochs=-1)
    callback = TopologyCallback(**OPTIONS)
    assert callback.state_dict() == {}
