"""The rows of a job of two processes, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.results import Results


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_rows_of_two_processes(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "benchmarks.distributed", "--models", "llama-tiny", "--device", "cpu", "--steps", "2", "--all-layers",
               "--out", str(tmp_path / "rows.json")]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = Results.load(tmp_path / "rows.json").rows
    assert {(r.op, r.shape["kind"], r.provider) for r in rows} == {
        (op, kind, provider) for kind in ("ddp", "fsdp") for op, provider in
        (("step", "dense"), ("step", "chts"), ("update", "chts"))
    }  # fmt: skip
    for row in rows:
        assert row.suite == "distributed" and row.shape["world"] == 2 and row.eager_ms > 0 and row.error is None
        assert row.op == "update" or "tokens/s" in row.note and "MB to collectives" in row.note
    step = {r.shape["kind"]: r.note for r in rows if r.op == "step" and r.provider == "chts"}
    assert "world 2, ddp, 2 of 2 blocks" in step["ddp"]
