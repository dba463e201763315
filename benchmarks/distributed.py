"""Training steps on several GPUs of one host, dense against ours: rows of this suite's schema from one ``torchrun`` job.

::

    torchrun --nproc-per-node 8 -m benchmarks.distributed --models 60m,1b --compile             # whole Llamas of `chts pretrain`
    torchrun --nproc-per-node 8 -m benchmarks.distributed --models llama-1b,llama-8b --kinds ddp,fsdp      # blocks of the suite
    torchrun --nproc-per-node 2 -m benchmarks.distributed --models tiny --device cpu --steps 2             # tries the script itself
    python -m benchmarks.distributed --report [FILE ...]                                                   # tables of what was measured

Every process takes a batch of the same size (weak scaling); the kind "single" is one process alone while the others wait, and
what efficiency is measured by. Dense and sparse models take the same batches, autocast, AdamW and compilation.

A row's ``gpu_ms`` (``eager_ms`` on a CPU) is the median over windows of the wall time of a step of the slowest process, from one
synchronised instant to the next; ``peak_bytes`` the largest peak of any process. The op ``update`` is ``TopologyEvolver.step()``
alone, at a step where the topology changes: not the passes before it. Its ``eager_ms`` is that wall time, most of it the host's in
small models, and its ``gpu_ms`` how long it keeps the device busy when the host is ahead, None if it never was (rows without an
``eager_ms``, of before there were both, have the wall time there). ``note`` ends in figures that :func:`figures` reads:

- ``tokens_per_s``: of all processes together; ``efficiency``: that over ``world`` times the single process'.
- ``host_ms``: of a step, until its last kernel is enqueued: near ``gpu_ms`` the host is what limits.
- ``gradient_bytes``, ``sparse_gradient_bytes``: what one process hands to gradient collectives in a step, all of it and that of
  the layers that are sparse in ours: seen by a communication hook (DDP) or in the calls of reduce-scatter (FSDP, where the norms
  of a block travel with its layers). ``gathered_bytes``: parameters that all-gathers deliver to a process (FSDP).
- ``ratio``, ``device_ratio``: of an update's ``eager_ms`` and ``gpu_ms`` to the single process'. ``changed``: the share of blocks
  whose pattern the timed updates changed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import environment
from benchmarks.problems.models import SPECS, random_batch, stack
from benchmarks.results import RESULTS, Results, Row, default_path
from benchmarks.timing import SPIN_CYCLES_PER_MS
from benchmarks.view import Table, mebibytes, milliseconds, percent, times
from chts_train import FusedAdamW, TopologyEvolver, TopologySchedule, sparsify_
from chts_train.configs import PRESETS, preset
from chts_train.models.llama import DecoderLayer, NextTokenLoss
from chts_train.models.vit import Block
from chts_train.parallel import Processes, joined, leave_at_once
from chts_train.step_graphs import allow_blocks

PROVIDERS = ("dense", "chts")
KINDS = ("single", "ddp", "fsdp")
WARM_UP, WINDOWS = 4, 4
INTERVAL = 1 << 20
"""Steps between updates of the schedule, so large that none is due unless it is asked for."""
GATHERS = ("all_gather_into_tensor", "all_gather_single")
SCATTERS = ("reduce_scatter_tensor", "reduce_scatter_single")
"""What FSDP calls: the names of torch 2.11 and of 2.13."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that ``torchrun`` started; only the first process prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="1b", help="comma-separated presets of `chts pretrain`, or of benchmarks.problems.models.SPECS")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated: single, ddp, fsdp")
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="comma-separated: dense, chts")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each row")
    parser.add_argument("--updates", type=int, default=10, help="timed updates of each row, and as many for the device's own time")
    parser.add_argument("--batch", type=int, default=None, help="sequences of each process (default: the preset's micro-batch)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--all-layers", action="store_true", help="every block of a suite model, not the few that it usually has")
    parser.add_argument("--compile", action="store_true", help="torch.compile of every block and of the loss, for all providers")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/distributed/<gpu>.json")
    parser.add_argument("--report", nargs="*", type=Path, metavar="FILE", help="print tables of result files and measure nothing")
    options = parser.parse_args(arguments)
    if options.report is not None:
        for path in options.report or sorted((RESULTS / "distributed").glob("*.json")):
            print(markdown(Results.load(path)))
        return 0
    for option, known in (("models", (*SPECS, *PRESETS)), ("kinds", KINDS), ("providers", PROVIDERS)):
        for word in getattr(options, option).split(","):
            if word not in known:
                parser.error(f"--{option}: must be of {', '.join(known)}, got {word!r}")
    if not dist.is_torchelastic_launched():
        parser.error("must be started with torchrun")
    with joined(options.device):
        results = open_results(options.out) if dist.get_rank() == 0 else None
        for model in options.models.split(","):
            for provider in options.providers.split(","):
                for kind in options.kinds.split(","):
                    processes = Processes() if kind == "single" else Processes.here(kind)
                    alone = kind == "single" and dist.get_rank() > 0
                    rows = [] if alone else measure(model, provider, processes, options)
                    if results is not None:
                        results.replace([_related(row, [*results.rows, *rows]) for row in rows])
                        results.save()
                        for row in rows:
                            print(f"{row.op:7} {model:11} {kind:6} {provider:6} {row.note}, peak {mebibytes(row.peak_bytes)}", flush=True)
                    dist.all_reduce(torch.zeros(1))  # through the host: no GPU spins while one process measures alone
        if results is not None:
            print(f"results: {results.path}", flush=True)
    leave_at_once(0)
    return 0


class Job:
    """One model in training.

    Args:
        name: of a preset (the whole Llama, tokens in) or of ``SPECS`` (a stack of blocks, hidden states in).
        provider: "dense" or "chts".
        processes: what it is wrapped for.
        options: of the command line.
        device: of this process.
    """

    def __init__(
        self, name: str, provider: str, processes: Processes, options: argparse.Namespace, device: torch.device
    ) -> None:
        self.processes, self.device = processes, device
        torch.manual_seed(0)
        if name in PRESETS:
            config = preset(name)
            with device:
                self.model = config.build_model()
            shape = options.batch or config.micro_batch, config.seq_len + 1
            draw = torch.Generator(device).manual_seed(1 + processes.rank)
            tokens = torch.randint(config.model.vocab_size, shape, generator=draw, device=device)
            self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            self.tokens = self.batch[0].numel()
            self.layers = f"{config.model.num_hidden_layers} blocks with embedding and head"
        else:
            with device:
                self.model, spec = stack(name, None if options.all_layers else 0)
            self.batch = tuple(part[: options.batch] for part in random_batch(spec, device))
            self.tokens = len(self.batch[0]) * (spec.length or spec.config.num_patches + 1)
            self.layers = f"{spec.all_layers if options.all_layers else spec.layers} of {spec.all_layers} blocks"
        if provider == "chts":
            sparsify_(self.model)
        if options.compile:
            _compile(self.model)
        blocks = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        self.linear = {id(p) for m in blocks for p in m.parameters() if p.dim() == 2}
        inside = {id(p) for m in blocks for p in m.parameters()}
        size = processes.size
        self.outside = sum(-(-len(p) // size) * size * p[0].numel() for p in self.model.parameters() if id(p) not in inside)
        self.network = processes.wrap(self.model, device)
        resident = torch.bfloat16 if provider == "chts" and device.type == "cuda" and processes.kind != "fsdp" else None
        self.optimizer = FusedAdamW(self.model.parameters(), lr=1e-4, model=self.model, resident_operands=resident)
        self.evolver = None
        if provider == "chts":
            schedule = TopologySchedule(total_steps=1 << 40, interval=INTERVAL, stop_fraction=1.0, lr_ramp_steps=0)
            self.evolver = TopologyEvolver(self.model, self.optimizer, schedule, collect_stats=False, verify=processes.size > 1)

    def step(self) -> None:
        """One training step; nothing waits for the device."""
        with torch.autocast(self.device.type, torch.bfloat16):
            self.loss = self.network(*self.batch)
        self.loss.backward()
        if self.evolver is not None:
            self.evolver.step()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """An update of the topology, between two training steps."""
        self.evolver.step_count = INTERVAL * (self.evolver.updates + 1) - 1
        if self.evolver.step():
            raise AssertionError("no update was due")

    def ids(self) -> dict[str, torch.Tensor]:
        """Copies of the pattern ids of every sparse layer."""
        return {name: layer.ids.clone() for name, layer in self.evolver.layers.items()}

    def traffic(self) -> dict[str, int]:
        """Bytes of one step that this process hands to collectives, counted where they are called; takes a training step."""
        count = {"gradient_bytes": 0, "sparse_gradient_bytes": 0, "gathered_bytes": 0}
        if self.processes.kind == "ddp":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            linear = self.linear  # DDP keeps the hook for good, which must not keep this job alive

            def hook(group, bucket):  # DDP refuses annotations that are strings
                count["gradient_bytes"] += bucket.buffer().nbytes
                for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                    count["sparse_gradient_bytes"] += gradient.nbytes if id(parameter) in linear else 0
                return allreduce_hook(group, bucket)

            self.network.register_comm_hook(None, hook)
            self.step()
        elif self.processes.kind == "fsdp":

            def gathers(whole: torch.Tensor) -> None:
                count["gathered_bytes"] += whole.nbytes

            def scatters(whole: torch.Tensor) -> None:
                count["gradient_bytes"] += whole.nbytes
                count["sparse_gradient_bytes"] += 0 if whole.numel() == self.outside else whole.nbytes

            with _seen(GATHERS, gathers), _seen(SCATTERS, scatters):
                self.step()
        return count


def measure(name: str, provider: str, processes: Processes, options: argparse.Namespace) -> list[Row]:
    """The rows of one model, provider and kind of parallelism; every process of ``processes`` must call it.

    Raises:
        AssertionError: the loss is not finite, or an update changed nothing.
        TopologyMismatch: ranks hold different ids.
    """
    cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    gc.collect()
    if cuda and torch.cuda.memory_allocated(device) > 1 << 26:  # compiled code holds on to the last model
        torch._dynamo.reset()
        gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    began = time.perf_counter()
    job = Job(name, provider, processes, options, device)
    for _ in range(WARM_UP):
        job.step()
    _synchronise(processes, device)
    began = time.perf_counter() - began
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    count = max(1, options.steps // WINDOWS)
    windows = [_window(job.step, count, processes, device) for _ in range(min(WINDOWS, options.steps))]
    peak = _largest(torch.cuda.max_memory_allocated(device) if cuda else 0, processes)
    ms = [window[0] for window in windows]
    if not torch.isfinite(job.loss.detach()):
        raise AssertionError(f"{name}, {provider}, {processes.kind}: the loss must be finite, got {job.loss.item()}")
    speed = job.tokens * processes.size / statistics.median(ms) * 1e3
    facts = {"tokens_per_s": speed, "host_ms": statistics.median(window[1] for window in windows), "tokens": job.tokens}
    row = _row("step", name, provider, processes, job, ms, peak, options)
    updates: list[float] = []
    own: list[float] = []
    changed = 0.0
    if job.evolver is not None:
        for number in range(options.updates + 2):  # the first two warm up: kernels are chosen, buffers allocated
            job.step()
            before = job.ids()
            took = _window(job.update, 1, processes, device)[0]
            if number >= 2:
                updates.append(took)
                places = sum(ids.numel() for ids in before.values())
                moved = sum(int((layer.ids != before[key]).sum()) for key, layer in job.evolver.layers.items())
                changed += moved / places / options.updates
        for _ in range(options.updates if cuda else 0):
            job.step()
            own += _device_time(job.update, statistics.median(updates), processes, device)
        job.evolver.state_dict()  # looks at the last comparison of the ranks' ids
        if not changed:
            raise AssertionError(f"{name}, {processes.kind}: updates must change the topology, they changed nothing")
    if processes.kind != "single":
        facts |= {key: value for key, value in job.traffic().items() if value}
    row.note += f", ready after {began:.0f} s; {spell(facts)}"
    if not updates:
        return [row]
    update = _row("update", name, provider, processes, job, updates, None, options)
    update.eager_ms, update.gpu_ms = statistics.median(updates), statistics.median(own) if own else None
    update.note += f"; {spell({'changed': changed})}"
    return [row, update]


def figures(row: Row) -> dict[str, float]:
    """The figures at the end of a row's note."""
    return {key: float(value) for key, value in re.findall(r"(\w+)=([0-9.e+-]+)", row.note)}


def markdown(results: Results) -> str:
    """The tables of a result file: steps, topology updates, and the curves of :mod:`benchmarks.curves`."""
    rows = [row for row in results.rows if row.suite == "distributed" and row.error is None]
    by = {_key(row): row for row in rows}
    steps = Table(
        f"Training on {results.environment.get('gpu')}, weak scaling (bf16 autocast, float32 parameters and gradients, AdamW)",
        ["model", "GPUs", "kind", "provider", "ms a step", "host ms", "tokens/s", "vs dense", "efficiency", "peak a GPU",
         "gradients of sparse layers, MB", "of dense", "all gradients, MB", "of dense", "gathered, MB"], [],
    )  # fmt: skip
    updates = Table(
        "A topology update alone",
        ["model", "GPUs", "kind", "time", "to the single GPU's", "the device's own", "to the single GPU's", "blocks changed"], [],
    )  # fmt: skip
    curves = Table(
        "The same run on one GPU and on several: differences from the one GPU's losses and turnovers",
        ["model", "GPUs", "kind", "updates", "mean, nats", "largest, nats", "largest, turnover", "held-out loss at the end"], [],
    )  # fmt: skip
    order = ("single", "reordered", "ddp", "fsdp")
    for row in sorted(rows, key=lambda r: (r.shape["model"], r.shape["world"], order.index(r.shape["kind"]), r.provider != "dense")):
        facts, ms = figures(row), _wall(row)
        where = [row.shape["model"], str(row.shape["world"]), row.shape["kind"]]
        if row.op == "curve":
            apart = [facts.get(key) for key in ("mean_difference", "largest_difference", "largest_turnover_difference")]
            cells = ["" if number is None else f"{number:.2g}" for number in apart]
            count = f"{facts['updates']:.0f}" if "updates" in facts else ""
            curves.rows.append([*where, count, *cells, f"{facts['val_loss']:.4f}"])
            continue
        if row.op == "update":
            own = milliseconds(row.gpu_ms) if row.eager_ms and row.gpu_ms else ""
            ratios = times(facts.get("ratio")), times(facts.get("device_ratio"))
            updates.rows.append([*where, milliseconds(ms), ratios[0], own, ratios[1], f"{100 * facts.get('changed', 0):.2g} %"])
            continue
        dense = by.get((row.op, *where, "dense"))
        base = figures(dense) if dense is not None and row.provider != "dense" else {}
        shares = [
            f"{facts[key] / base[key]:.3f}" if base.get(key) and key in facts else ""
            for key in ("sparse_gradient_bytes", "gradient_bytes")
        ]
        size = {key: f"{facts[key] / 1e6:,.1f}" if key in facts else "" for key in facts if key.endswith("_bytes")}
        faster = facts["tokens_per_s"] / base["tokens_per_s"] if base else None
        steps.rows.append(
            [*where, row.provider, f"{ms:.1f}", f"{facts['host_ms']:.1f}", f"{facts['tokens_per_s']:,.0f}", times(faster),
             percent(facts.get("efficiency")), mebibytes(row.peak_bytes), size.get("sparse_gradient_bytes", ""), shares[0],
             size.get("gradient_bytes", ""), shares[1], size.get("gathered_bytes", "")]
        )  # fmt: skip
    notes = sorted({row.shape["model"] + ": " + row.note.split("; ")[1] for row in rows if row.op == "step"})
    steps.remarks = [*notes, f"torch {results.environment.get('torch')}, commit {results.environment.get('commit')}"]
    curves.remarks = sorted({row.shape["model"] + ": " + row.note.split("; ")[1] for row in rows if row.op == "curve"})
    curves.remarks.append("reordered: one GPU with other micro-batches, another order of the same sums")
    return "\n\n".join(table.markdown() for table in (steps, updates, curves) if table.rows) + "\n"


def _key(row: Row) -> tuple[str, ...]:
    return row.op, row.shape["model"], str(row.shape["world"]), row.shape["kind"], row.provider


def _related(row: Row, rows: Sequence[Row]) -> Row:
    """The row with what relates it to the single process' row of the same model and provider, if that is among ``rows``."""
    alone = {_key(r): r for r in rows}.get((row.op, row.shape["model"], "1", "single", row.provider))
    if row.shape["kind"] == "single" or alone is None or alone.note.split("; ")[1] != row.note.split("; ")[1]:
        return row
    if row.op == "step":
        share = figures(row)["tokens_per_s"] / (figures(alone)["tokens_per_s"] * row.shape["world"])
        row.note += f" {spell({'efficiency': share})}"
    else:
        ratios = {"ratio": _wall(row) / _wall(alone)}
        if all(r.gpu_ms and r.eager_ms for r in (row, alone)):
            ratios["device_ratio"] = row.gpu_ms / alone.gpu_ms
        row.note += f" {spell(ratios)}"
    return row


def _wall(row: Row) -> float:
    """Milliseconds of wall time."""
    return row.eager_ms or row.gpu_ms


def _compile(model: nn.Module) -> None:
    """Compile the forward functions of blocks and loss: the hooks of FSDP around them stay eager."""
    allow_blocks()
    for module in model.modules():
        if isinstance(module, DecoderLayer | NextTokenLoss | Block):
            module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)


def _window(
    function: Callable[[], None], count: int, processes: Processes, device: torch.device
) -> tuple[float, float]:
    """Milliseconds a call of ``count`` calls, of the process that takes longest: until they are done, and until enqueued."""
    _synchronise(processes, device)
    start = time.perf_counter()
    for _ in range(count):
        function()
    host = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    whole = time.perf_counter() - start
    return tuple(_largest(seconds, processes) / count * 1e3 for seconds in (whole, host))


def _device_time(function: Callable[[], None], host_ms: float, processes: Processes, device: torch.device) -> list[float]:
    """Milliseconds that a call of about ``host_ms`` of host time keeps the device busy, of the process where that is longest: the
    device waits until the call is enqueued. Empty when a process was not done in time: then its device has waited for it."""
    _synchronise(processes, device)
    torch.cuda._sleep(int(SPIN_CYCLES_PER_MS * (1 + 3 * host_ms)))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    late = start.query()
    end.record()
    torch.cuda.synchronize(device)
    took = _largest(start.elapsed_time(end), processes)
    return [] if _largest(late, processes) else [took]


def _synchronise(processes: Processes, device: torch.device) -> None:
    """All processes go on at one instant, with idle devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    processes.sum_(torch.zeros(1))  # through the host


def _largest(value: float, processes: Processes) -> float:
    box = torch.tensor(float(value), dtype=torch.float64)
    if processes.size > 1:
        dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


@contextlib.contextmanager
def _seen(names: Sequence[str], note: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Tell ``note`` the largest tensor in every call of ``torch.distributed``'s functions of these names: input or output."""
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    inside = False  # one name may be implemented by another

    def watched(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal inside
            if inside:
                return original(*args, **kwargs)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            note(max(tensors, key=lambda tensor: tensor.nbytes))
            inside = True
            try:
                return original(*args, **kwargs)
            finally:
                inside = False

        return call

    for name, original in originals.items():
        setattr(dist, name, watched(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def spell(facts: dict[str, float]) -> str:
    """Figures as a row's note has them; :func:`figures` reads them."""
    return " ".join(f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in facts.items())


def _row(
    op: str, name: str, provider: str, processes: Processes, job: Job, ms: list[float], peak: float | None,
    options: argparse.Namespace,
) -> Row:  # fmt: skip
    middle = statistics.median(ms)
    settings = f"{job.layers}, {job.tokens:,} tokens a process" + ", blocks compiled" * options.compile
    note = f"world {processes.size}, {processes.kind}; {settings}; {middle:.2f} ms ({min(ms):.2f} to {max(ms):.2f})"
    on_gpu = job.device.type == "cuda"
    return Row(
        suite="distributed", op=op, shape={"model": name, "kind": processes.kind, "world": processes.size}, dtype="bf16",
        provider=provider, impl="auto" if provider == "chts" else None, gpu_ms=middle if on_gpu else None,
        eager_ms=None if on_gpu else middle, peak_bytes=int(peak) if peak else None, note=note,
    )  # fmt: skip


def open_results(out: Path | None) -> Results:
    """The result file to add to.

    Raises:
        ValueError: it was measured on something else.
    """
    path = out or RESULTS / "distributed" / default_path(environment.gpu_name()).name
    found = environment.capture()
    results = Results.load(path) if path.exists() else Results(found, [], path)
    reason = results.mismatch(found)
    if reason is not None:
        raise ValueError(f"{path} was measured on something else: {reason}; --out names another file")
    results.environment.setdefault("sessions", []).append(environment.session({}))
    return results


if __name__ == "__main__":
    main()
