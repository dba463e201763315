"""One run on one process and on two, compared; and the rows made of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.curves import KINDS, config_of, differences, main
from benchmarks.distributed import figures
from benchmarks.distributed import main as report
from benchmarks.results import Results


def log(losses, turnovers):
    lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    return lines + [{"kind": "update", "step": step, "turnover": t} for step, t in enumerate(turnovers, 1)] + [{"kind": "eval", "step": 9}]


def test_differences_are_of_the_same_steps():
    assert differences(log([3.0, 2.0, 1.0], [0.01]), log([3.0, 2.5, 0.9], [0.03])) == pytest.approx(
        {"mean_difference": 0.2, "largest_difference": 0.5, "largest_turnover_difference": 0.02, "updates": 1}
    )
    assert differences(log([1.0], []), log([1.0], []))["largest_turnover_difference"] == 0
    with pytest.raises(AssertionError, match=r"train lines: must be of the same steps, got \[1\] and \[1, 2\]"):
        differences(log([1.0], []), log([1.0, 2.0], []))
    with pytest.raises(AssertionError, match="update lines"):
        differences(log([1.0], [0.1]), log([1.0], []))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_rows_of_two_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file, kept = tmp_path / "rows.json", tmp_path / "kept"
    run = ["--models", "tiny", "--world", "2", "--device", "cpu", "--steps", "4", "--interval", "2", "--batch", "4", "--compile", "off"]
    assert main([*run, "--out", str(file), "--keep", str(kept)]) == 0
    rows = {row.shape["kind"]: row for row in Results.load(file).rows}
    assert list(rows) == list(KINDS) and sorted(p.name for p in kept.iterdir()) == sorted(f"tiny-{kind}" for kind in KINDS)
    for kind, row in rows.items():
        facts = figures(row)
        assert (row.suite, row.op, row.gpu_ms, row.error) == ("distributed", "curve", None, None)
        assert row.shape["world"] == (2 if kind in ("ddp", "fsdp") else 1) and facts["val_loss"] > 1
        if kind == "single":
            assert "updates" not in facts
        else:
            assert facts["updates"] == 1 and facts["largest_difference"] < 1e-4 and facts["mean_difference"] < 1e-5
        assert row.dtype == "fp32"
    with pytest.raises(SystemExit):
        main([*run, "--out", str(file), "--keep", str(kept)])
    assert "--keep: must not exist yet" in capsys.readouterr().err
    assert report(["--report", str(file)]) == 0
    assert "| tiny | 2 | fsdp | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--models", "1c"], "--models: must be of"),
        (["--world", "1"], "--world: must be at least 2 and divide --batch 64, got 1"),
        (["--world", "3"], "must be at least 2 and divide --batch 64, got 3"),
    ),
)
def test_mistakes_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_every_kind_trains_on_the_same_batches():
    from benchmarks.curves import _parser

    options = _parser().parse_args(["--batch", "8", "--text", '"stdlib"'])
    configs = {kind: config_of(options, "60m", kind) for kind in KINDS}
    assert {c.micro_batch for kind, c in configs.items() if kind != "reordered"} == {4} and configs["reordered"].micro_batch == 8
    assert len({(c.batch_size, c.total_steps, c.interval, c.seed, c.seq_len) for c in configs.values()}) == 1
