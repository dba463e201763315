"""One rank of a small job: ``python -m tests.chts_train.jobs FOLDER CHECK...``, started by :mod:`tests.chts_train.jobs.launch`.

Over gloo on the CPU, with ``JOBS_DEVICE=cuda:0`` over gloo on one GPU, or with ``JOBS_DEVICE=cuda`` over NCCL with a GPU for each
rank. Each check compares with a single process, which every rank computes for itself. Results go to ``FOLDER/<world>-<rank>.json``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from chts_train.distributed import gathered_together

from . import checks
from .common import DEVICE, FOLDER, JOBS_DEVICE, RANK, WORLD


def full_tensor(tensor: DTensor) -> torch.Tensor:
    """``DTensor.full_tensor`` without functional collectives: waiting for one of CUDA tensors over gloo crashes torch 2.11."""
    if not any(placement.is_partial() for placement in tensor.placements):
        return gathered_together([tensor], DEVICE)[0]
    total = tensor.to_local().clone()
    dist.all_reduce(total)
    return total


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if WORLD > 1:
        backend, store = "cpu:gloo,cuda:nccl" if JOBS_DEVICE == "cuda" else "gloo", f"file://{FOLDER}/store-{WORLD}"
        dist.init_process_group(backend, store, timedelta(seconds=60), WORLD, RANK)
    if JOBS_DEVICE == "cuda:0":
        DTensor.full_tensor = full_tensor
    for name in sys.argv[2:]:
        start = time.process_time()
        try:
            checks.CHECKS[name]()
            results[name] = "ok"
        except BaseException:
            results[name] = traceback.format_exc()
        results[f"{name} seconds"] = round(time.process_time() - start, 2)
        (FOLDER / f"{WORLD}-{RANK}.json").write_text(json.dumps(results))
        if results[name] != "ok":
            break  # ranks are no longer in step
    if WORLD > 1 and all(v == "ok" for k, v in results.items() if not k.endswith("seconds")):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may abort an ordinary exit (chts_train.parallel.leave_at_once)


main()
