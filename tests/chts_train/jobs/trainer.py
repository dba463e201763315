"""The trainer on several processes."""

from __future__ import annotations

import contextlib
import json
import re

import torch
import torch.distributed as dist

from .common import DEVICE, FOLDER, RANK, WORLD, hidden_group


def micro(**changes):
    from chts_train.configs import DataConfig, RunConfig
    from chts_train.models import LlamaConfig

    size = {"hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 2, "num_hidden_layers": 1}
    return RunConfig(
        name="micro", model=LlamaConfig(**size, max_position_embeddings=64),
        data=DataConfig(spec=str(FOLDER / "text"), val_fraction=0.2), total_steps=8,
        batch_size=6 if WORLD <= 3 else 2 * WORLD, micro_batch=2, seq_len=24, warmup_steps=2, lr=1e-2,
        interval=3, lr_ramp_steps=1, zeta=0.3, eval_interval=4, eval_tokens=200, precision="fp32", **changes,
    )  # fmt: skip


def check_trainer_is_a_single_process():
    from chts_train.checkpoint import read_checkpoint
    from chts_train.parallel import Processes
    from chts_train.settings import Settings
    from chts_train.trainer import Trainer

    config = micro()
    rows = {}
    for kind in ("ddp", "fsdp"):
        run = FOLDER / f"run-{kind}-{WORLD}"
        settings = Settings(device=DEVICE.type, quiet=True, log_interval=2, parallel=kind)
        if RANK == 0:
            run.mkdir()
        dist.barrier()
        trainer = Trainer(config, run, settings)
        assert trainer.processes == Processes(RANK, WORLD, kind)
        try:
            step, train_step = [0], trainer._train_step

            def interrupted(step=step, train_step=train_step):
                step[0] += 1
                if step[0] == 6:
                    raise KeyboardInterrupt
                train_step()

            trainer._train_step = interrupted
            trainer.train()
        except KeyboardInterrupt:
            pass
        dist.barrier()
        # As the other kind: a checkpoint is that of a single process.
        other = Settings(device=DEVICE.type, quiet=True, log_interval=2, parallel="fsdp" if kind == "ddp" else "ddp")
        resumed = Trainer.resume(run, other)
        assert resumed.counters.step == 4
        outcome = resumed.train()
        dist.barrier()
        assert outcome.finished and outcome.step == 8
        rows[kind] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        saved = read_checkpoint(run)
        assert saved.model["model.layers.0.mlp.up_proj.values"].shape == (28, 10)
        del trainer, resumed
    # The single process: this rank's own, with the group hidden from it.
    alone = FOLDER / f"run-single-{WORLD}-{RANK}"
    alone.mkdir()
    with hidden_group():
        Trainer(config, alone, Settings(device=DEVICE.type, quiet=True, log_interval=2)).train()
        expected = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
        truth = read_checkpoint(alone)
    tolerance = 1e-4 if DEVICE.type == "cpu" else 0.1
    for kind, found in rows.items():
        assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected], kind
        for row, wanted in zip(found, expected, strict=True):
            for key in ("loss", "val_loss", "turnover", "val_tokens", "tokens", "score_mean"):
                if wanted.get(key) is not None:
                    assert abs(row[key] - wanted[key]) <= tolerance * abs(wanted[key]), (kind, key, row, wanted)
        saved = read_checkpoint(FOLDER / f"run-{kind}-{WORLD}")
        for name, tensor in truth.model.items():
            if DEVICE.type == "cuda":  # float32 kernels add in an order of their own, and Adam makes steps of tiny gradients
                apart = (saved.model[name].float() - tensor.float()).abs()
                share = (apart > 0).float().mean() if name.endswith(".ids") else apart.mean()
                assert share <= (0.2 if name.endswith(".ids") else 2e-3), (kind, name, share)
            elif name.endswith(".ids"):
                assert torch.equal(saved.model[name], tensor), (kind, name)
            else:
                torch.testing.assert_close(saved.model[name], tensor, rtol=1e-3, atol=1e-4)


def check_a_dense_start_over_ddp_is_a_single_process():
    compare_changes_of_form("dense-start", "dense", dense_fraction=0.5)


def check_a_window_of_masked_weights_over_ddp_is_a_single_process():
    compare_changes_of_form("window", "sparse", ste_window=(0.25, 0.5))


def compare_changes_of_form(name, first, **changes):
    from chts_train.settings import Settings
    from chts_train.trainer import Trainer

    config, ends = micro(method="chts24", optimizer="sgd", **changes), []
    for parallel in ("ddp", "auto"):
        run = FOLDER / (f"{name}-{WORLD}" if parallel == "ddp" else f"{name}-alone-{RANK}-{WORLD}")
        run.mkdir(exist_ok=True)
        settings = Settings(device=DEVICE.type, quiet=True, log_interval=1, parallel=parallel, checkpoints=False)
        with hidden_group() if parallel == "auto" else contextlib.nullcontext():
            trainer = Trainer(config, run, settings)
            assert trainer.form == first
            trainer.train()
        assert trainer.form == "sparse" and trainer.evolver.updates == 1
        ends.append({name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()})
    ((field, value),) = changes.items()
    try:
        Trainer(config, FOLDER / f"{name}-{WORLD}", Settings(device=DEVICE.type, quiet=True, parallel="fsdp"))
    except ValueError as error:
        assert re.search(f"{field} must be (0|None) with parallel fsdp, got {re.escape(str(value))}", str(error)), error
    else:
        raise AssertionError("not refused")
    for name, tensor in ends[1].items():
        if name.endswith(".ids"):
            share = (ends[0][name] != tensor).float().mean()
            assert share <= (0 if DEVICE.type == "cpu" else 0.1), (name, share)
        elif DEVICE.type == "cpu":
            torch.testing.assert_close(ends[0][name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def check_trainer_refuses_what_cannot_be_split():
    from chts_train.parallel import Processes, on_main

    here = Processes.here()
    assert here == Processes(RANK, WORLD, "ddp")
    for arguments, message in (
        ((WORLD + 1, "sparse"), f"batch_size must be a multiple of the {WORLD} processes, got {WORLD + 1}"),
        ((WORLD, "ste"), "parallel must be ddp for methods with dense masked weights, got fsdp"),
    ):
        try:
            Processes.here("fsdp").check(*arguments)
        except ValueError as error:
            assert message == str(error), error
        else:
            raise AssertionError(message)
    assert on_main(lambda: RANK) == 0
    try:
        on_main(lambda: 1 / 0)
    except ZeroDivisionError:
        pass
    else:
        raise AssertionError("only rank 0 raised")
    assert here.largest(RANK) == WORLD - 1
    assert here.sum_(torch.tensor(1.0)).item() == WORLD
    assert torch.equal(torch.cat([Processes(r, WORLD, "ddp").mine(torch.arange(2 * WORLD)) for r in range(WORLD)]),
                       torch.arange(2 * WORLD))  # fmt: skip
