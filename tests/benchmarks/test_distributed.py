"""The rows of a job of two processes, on the CPU, and the tables made of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.distributed import _related, figures, main, markdown
from benchmarks.results import Results, Row
from chts_train import sparsify_
from chts_train.configs import preset

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_rows_of_two_processes(tmp_path, capsys):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "benchmarks.distributed", "--models", "tiny,llama-tiny", "--batch", "2", "--device", "cpu", "--steps", "2",
               "--updates", "1", "--all-layers", "--out", str(file)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {(r.shape["model"], r.shape["kind"], r.op, r.provider): r for r in Results.load(file).rows}
    assert set(rows) == {
        (model, kind, op, provider) for model in ("tiny", "llama-tiny") for kind in ("single", "ddp", "fsdp")
        for op, provider in (("step", "dense"), ("step", "chts"), ("update", "chts"))
    }  # fmt: skip
    facts = {key: figures(row) for key, row in rows.items()}
    for (model, kind, op, provider), row in rows.items():
        mine, alone = facts[model, kind, op, provider], facts[model, "single", op, provider]
        world = 1 if kind == "single" else 2
        assert row.suite == "distributed" and row.shape["world"] == world and row.eager_ms > 0 and row.error is None
        assert f"world {world}, {kind}; " in row.note
        if op == "update":
            assert 0.01 < mine["changed"] < 0.3 and ("ratio" in mine) == (kind != "single") and row.gpu_ms is None
            continue
        assert mine["tokens_per_s"] == pytest.approx(mine["tokens"] * world / row.eager_ms * 1e3, rel=1e-4)
        assert mine["host_ms"] <= row.eager_ms * 1.001
        if kind == "single":
            assert "gradient_bytes" not in mine and "efficiency" not in mine
        else:
            assert mine["efficiency"] == pytest.approx(mine["tokens_per_s"] / 2 / alone["tokens_per_s"], rel=1e-4)
    # What the collectives were seen to carry is what the parameters are; compressed gradients are half of dense ones.
    dense, ours = preset("tiny").build_model(), preset("tiny").build_model()
    linear = 4 * sum(p.numel() for p in dense.model.layers.parameters() if p.dim() == 2)
    sparsify_(ours)
    for provider, model, half in (("dense", dense, 1), ("chts", ours, 2)):
        whole = 4 * sum(p.numel() for p in model.parameters())
        of_ddp, of_fsdp = (facts["tiny", kind, "step", provider] for kind in ("ddp", "fsdp"))
        assert of_ddp["gradient_bytes"] == whole
        assert of_ddp["sparse_gradient_bytes"] == linear // half
        assert of_fsdp["gradient_bytes"] == whole + 4 * 2 * 128  # embedding and head have 257 rows: padded to 258
        norms = 4 * 2 * 4 * 128
        assert of_fsdp["sparse_gradient_bytes"] == linear // half + norms
        assert of_fsdp["gathered_bytes"] == of_fsdp["gradient_bytes"] + of_fsdp["sparse_gradient_bytes"]  # the root stays gathered
    assert main(["--report", str(file)]) == 0
    text = capsys.readouterr().out
    assert "| tiny | 2 | ddp | chts |" in text and "| tiny | 2 | fsdp |" in text and "| 0.500 |" in text
    assert all(line.count("|") == text.splitlines()[2].count("|") for line in text.split("####")[1].splitlines() if line.startswith("|"))


def test_tables_of_a_part_of_the_rows():
    note = "world 8, ddp; 2 of 2 blocks, 24 tokens a process; 1.00 ms (1.00 to 1.00); tokens_per_s=192 host_ms=0.5 tokens=24"
    row = Row("distributed", "step", {"model": "llama-tiny", "kind": "ddp", "world": 8}, "bf16", "chts", gpu_ms=1.0, note=note)
    assert figures(row) == {"tokens_per_s": 192, "host_ms": 0.5, "tokens": 24}
    assert "| llama-tiny | 8 | ddp | chts | 1.0 | 0.5 | 192 |" in markdown(Results({"gpu": "X"}, [row]))
    assert markdown(Results()) == "\n"


def test_updates_are_related_by_wall_time_and_by_the_devices_own():
    note = "world {}, {}; 2 of 2 blocks; 9.00 ms (9.00 to 9.00); changed=0.1"

    def row(kind: str, world: int, wall: float | None, own: float) -> Row:
        shape = {"model": "60m", "kind": kind, "world": world}
        return Row("distributed", "update", shape, "bf16", "chts", gpu_ms=own, eager_ms=wall, note=note.format(world, kind))

    alone, sharded, old = row("single", 1, 8.0, 1.0), row("fsdp", 2, 12.0, 1.3), row("ddp", 2, None, 16.0)
    rows = [_related(r, [alone, sharded, old]) for r in (alone, sharded, old)]
    assert [{key: value for key, value in figures(r).items() if "ratio" in key} for r in rows] == [
        {}, {"ratio": 1.5, "device_ratio": 1.3}, {"ratio": 2.0}
    ]  # fmt: skip
    text = markdown(Results({"gpu": "X"}, rows))
    assert "| 60m | 2 | fsdp | 12 ms | 1.50x | 1.3 ms | 1.30x | 10 % |" in text
    assert "| 60m | 2 | ddp | 16 ms | 2.00x |  |  | 10 % |" in text  # of before there were both


@pytest.mark.parametrize(
    ("arguments", "message"),
    ((["--models", "1b,1c"], "--models: must be of"), (["--kinds", "tp"], "--kinds: must be of"), ([], "started with torchrun")),
)
def test_mistakes_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
