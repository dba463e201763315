"""The callback in the real Trainer of transformers, on a tiny Llama of theirs."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch

from chts_train import SparsityConfig, TopologyEvolver, TopologySchedule, sparse_layers, sparsify_
from chts_train.storage import load_tensors

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from chts_train.adapters.huggingface import AGES, TopologyCallback  # noqa: E402

OPTIONS = {"interval": 3, "zeta": 0.5, "lr_ramp_steps": 2, "stop_fraction": 0.8, "seed": 4}
STEPS = 12


def llama() -> torch.nn.Module:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    sparsify_(model, SparsityConfig(n=2, init="magnitude"))
    return model


class Tokens(torch.utils.data.Dataset):
    """32 made-up sequences, each its own label."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 32, (10,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def trainer(folder, callback, model=None, **changes):
    arguments = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 0.02, "lr_scheduler_type": "linear", "warmup_steps": 2, "save_steps": 4, "save_total_limit": 3,
        "logging_steps": 3, "report_to": [], "use_cpu": True, "optim": "adamw_torch", "disable_tqdm": True,
        "dataloader_num_workers": 0, "seed": 5,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**(arguments | changes))
    return transformers.Trainer(model or llama(), arguments, train_dataset=Tokens(), callbacks=[callback])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    callback = TopologyCallback(**OPTIONS)
    run = trainer(folder, callback)
    run.train()
    return folder, callback, run


def same(first, second) -> None:
    first, second = first.state_dict(), second.state_dict()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def test_it_evolves_as_a_loop_over_the_same_batches_does(whole, monkeypatch):
    _, callback, run = whole
    evolver = callback.evolver
    assert (evolver.step_count, evolver.updates, evolver.schedule.total_steps) == (STEPS, 3, STEPS)
    assert {row["name"] for row in evolver.stats()} == set(sparse_layers(run.model)) and len(evolver.stats()) == 7
    assert type(run.model.lm_head) is torch.nn.Linear

    batches = []
    quiet = trainer(whole[0], TopologyCallback(**OPTIONS), save_strategy="no")
    monkeypatch.setattr(quiet, "training_step", lambda _, inputs, count: batches.append((inputs, count)) or torch.tensor(0.0))
    quiet.train()
    model = llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    loop = TopologyEvolver(model, optimizer, TopologySchedule(STEPS, 3, 0.8, 0.5, lr_ramp_steps=2), seed=4)
    for step in range(STEPS):
        for inputs, count in batches[2 * step : 2 * step + 2]:
            model(**inputs, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if loop.step():
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    same(model, run.model)


@pytest.mark.parametrize("step", [4, 8])
def test_it_resumes_bit_by_bit(whole, tmp_path, step):
    folder, callback, run = whole
    checkpoint = folder / f"checkpoint-{step}"
    stored = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["TopologyCallback"]
    assert stored["attributes"]["counters"]["step"] == step and stored["args"] == OPTIONS
    ages = load_tensors(checkpoint / AGES)
    assert all(t.dtype == torch.uint8 for t in ages.values()) and max(int(t.max()) for t in ages.values()) == step // 3
    names = load_tensors(checkpoint / "model.safetensors")
    assert {"model.layers.0.mlp.up_proj.ids", "model.layers.0.mlp.up_proj.values"} <= set(names)

    model = llama()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    again = TopologyCallback(**OPTIONS)
    second = trainer(tmp_path, again, model, restore_callback_states_from_checkpoint=step == 8)
    second.args.resume_from_checkpoint = str(checkpoint)
    second.train(resume_from_checkpoint=str(checkpoint))
    live = next(c for c in second.callback_handler.callbacks if isinstance(c, TopologyCallback))  # the trainer may replace it
    assert live.evolver.updates == 3
    same(run.model, second.model)
    assert all(torch.equal(live.evolver.ages[k], v) for k, v in callback.evolver.ages.items())


def test_ages_are_not_needed_but_counters_are(whole, tmp_path, caplog):
    import shutil

    folder, _, run = whole
    shutil.copytree(folder / "checkpoint-8", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / AGES).unlink()
    second = trainer(tmp_path, TopologyCallback(**OPTIONS))
    with caplog.at_level(logging.WARNING, logger="chts_train"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "link ages start again from 0" in caplog.text
    same(run.model, second.model)

    file = tmp_path / "checkpoint-8" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["TopologyCallback"]
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="resume_from_checkpoint: must be a checkpoint that was written with a TopologyCallback"):
        trainer(tmp_path, TopologyCallback(**OPTIONS)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_one_trainer_may_train_twice_and_an_option_may_replace_the_steps(tmp_path):
    callback = TopologyCallback(**OPTIONS, total_steps=100)
    run = trainer(tmp_path, callback, max_steps=4, save_strategy="no")
    run.train()
    first = callback.evolver
    run.train()
    assert callback.evolver is not first and callback.evolver.step_count == 4 and first.step_count == 4
    assert callback.evolver.schedule.total_steps == 100
