"""Training steps on several GPUs, dense against ours: rows of this suite's schema from one ``torchrun`` job.

::

    torchrun --nproc-per-node 8 -m benchmarks.distributed --models llama-1b,llama-8b --kinds ddp,fsdp
    torchrun --nproc-per-node 2 -m benchmarks.distributed --models llama-tiny --device cpu --steps 2    # tries the script itself

Every process takes a batch of the model's own size (weak scaling). A row's ``gpu_ms`` (``eager_ms`` on a CPU) is the median wall
time of a step of the slowest process, from one synchronised instant to the next; ``peak_bytes`` the largest peak of any process;
``note`` has the world size, tokens/s of all processes together and the bytes that one process hands to collectives in a step,
counted from parameter sizes. The op ``update`` is a step that updates the topology instead of the weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import environment
from benchmarks.problems.models import Spec, random_batch, stack
from benchmarks.results import RESULTS, Results, Row
from chts_train import FusedAdamW, TopologyEvolver, TopologySchedule, sparsify_
from chts_train.parallel import Processes, joined, leave_at_once

PROVIDERS = ("dense", "chts")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that ``torchrun`` started; only the first process prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama-1b", help="comma-separated, of benchmarks.problems.models.SPECS")
    parser.add_argument("--kinds", default="ddp,fsdp", help="comma-separated: ddp, fsdp")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each row")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--all-layers", action="store_true", help="whole Llamas, not the few blocks of the suite model")
    parser.add_argument("--compile", action="store_true", help="torch.compile of every block, for all providers")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/distributed-<world>x<gpu>.json")
    options = parser.parse_args(arguments)
    if not dist.is_torchelastic_launched():
        parser.error("must be started with torchrun")
    with joined(options.device):
        rows = []
        for model in options.models.split(","):
            for kind in options.kinds.split(","):
                for provider in PROVIDERS:
                    rows += measure(model, provider, Processes.here(kind), options)
        if dist.get_rank() == 0:
            _save(rows, options.out)
    leave_at_once(0)
    return 0


def measure(name: str, provider: str, processes: Processes, options: argparse.Namespace) -> list[Row]:
    """The rows of one model, provider and kind of parallelism."""
    cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    with device:
        model, spec = stack(name, None if options.all_layers else 0)
    batch = random_batch(spec, device)
    if provider == "chts":
        sparsify_(model)
    if options.compile:
        for blocks in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
            for block in blocks:
                block.compile()
    traffic = _bytes_sent(model, processes)
    network = processes.wrap(model, device)
    optimizer = FusedAdamW(model.parameters(), lr=1e-4, model=model)
    evolver = None
    if provider == "chts":
        schedule = TopologySchedule(total_steps=1 << 30, interval=1 << 20, stop_fraction=1.0)
        evolver = TopologyEvolver(model, optimizer, schedule, collect_stats=False)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = network(*batch)
        loss.backward()
        if evolver is None or evolver.step():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = [_slowest(step, device) for _ in range(options.steps)]
    peak = _largest(torch.cuda.max_memory_allocated(device) if cuda else 0, device)
    updates = []
    if evolver is not None:
        for _ in range(3):
            evolver.step_count = (1 << 20) * (evolver.updates + 1) - 1
            updates.append(_slowest(step, device))
    tokens = spec.batch * (spec.length or spec.config.num_patches + 1) * processes.size
    rows = [_row("step", name, spec, provider, processes, times, peak, options, tokens, traffic)]
    if updates:
        rows.append(_row("update", name, spec, provider, processes, updates[1:], None, options, tokens, traffic))
    if processes.main:
        for row in rows:
            print(f"{row.op:7} {name:11} {processes.kind:5} {provider:6} {row.note}", flush=True)
    return rows


def _slowest(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of a step, of the process that takes longest."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _largest(time.perf_counter() - start, device) * 1e3


def _largest(value: float, device: torch.device) -> float:
    box = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


def _bytes_sent(model: nn.Module, processes: Processes) -> int:
    """What a process hands to collectives in a step: gradients (DDP), or parameters twice and gradients once (FSDP)."""
    size = sum(p.nbytes for p in model.parameters())
    return size if processes.kind == "ddp" else 3 * size


def _row(
    op: str, name: str, spec: Spec, provider: str, processes: Processes, times: list[float], peak: float | None,
    options: argparse.Namespace, tokens: int, traffic: int,
) -> Row:  # fmt: skip
    ms = statistics.median(times)
    layers = f"{spec.all_layers if options.all_layers else spec.layers} of {spec.all_layers} blocks"
    note = f"world {processes.size}, {processes.kind}, {layers}, {ms:.2f} ms ({min(times):.2f} to {max(times):.2f})"
    if op == "step":
        note += f", {tokens / ms * 1e3:,.0f} tokens/s, {traffic / 1e6:,.1f} MB to collectives a step"
    note += ", blocks compiled" * options.compile
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    return Row(
        suite="distributed", op=op, shape={"model": name, "kind": processes.kind, "world": processes.size}, dtype="bf16",
        provider=provider, impl="auto" if provider == "chts" else None, gpu_ms=ms if on_gpu else None,
        eager_ms=None if on_gpu else ms, peak_bytes=int(peak) if peak else None, note=note,
    )  # fmt: skip


def _save(rows: list[Row], out: Path | None) -> None:
    gpu = environment.gpu_name().replace("NVIDIA ", "").replace(" ", "-").lower()
    path = out or RESULTS / f"distributed-{dist.get_world_size()}x{gpu}.json"
    found = environment.capture()
    results = Results.load(path) if path.exists() else Results(found, [], path)
    reason = results.mismatch(found)
    if reason is not None:
        raise ValueError(f"{path} was measured on something else: {reason}; --out names another file")
    results.replace(rows)
    results.save()
    print(f"results: {path}", flush=True)


if __name__ == "__main__":
    main()
