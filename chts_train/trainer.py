"""The training loop: one run of one config in one run folder.

::

    trainer = Trainer(preset("tiny"), new_run("mine"))      # or Trainer.resume("runs/mine")
    outcome = trainer.train()

What a run computes is decided by its :class:`RunConfig` alone; :class:`Settings` say where it runs and what it
writes. On the CPU a resumed run gives the same bits as one that was never interrupted. Under ``torchrun`` every process has
its trainer, and they train one model together (:mod:`chts_train.parallel`).
"""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .baselines import attach_srste_decay
from .checkpoint import FOLDER, find_checkpoint, read_checkpoint, restore, save_checkpoint
from .checkpoint_rules import check_fit
from .configs import RunConfig
from .extras import require
from .forms import dense_states, load_dense_states_
from .interrupt import GracefulStop
from .linear import SparsityConfig, densify_, sparsify_
from .masked import make_masks_resident_
from .methods import attach_method, get_method
from .metrics import METRICS, UPDATES, MetricsLog, update_summary
from .optim import make_optimizer, make_scheduler
from .parallel import Processes, is_lost_connection, leave_at_once, on_main
from .progress import Progress
from .report import spell, summarise
from .run_state import Counters, Outcome
from .runs import RunError, RunLock, write_config
from .settings import Settings, resolve_compile, resolve_device, resolve_precision
from .step_graphs import StepGraphs, compile_blocks
from .tasks import evaluate, make_task
from .topology import TopologySchedule

FINAL_EVAL_FACTOR = 20
"""The last evaluation takes up to this many times ``eval_tokens``: the figure that is reported deserves the time."""


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


class Trainer:
    """Trains one model by one method and writes a run folder.

    Args:
        config: what to compute; it is fitted to its data.
        run: an existing folder for the results (see :func:`chts_train.runs.new_run`).
        settings: default :class:`Settings`.
        weights: start from these dense weights (the plain model's state_dict) instead of random ones; the dense and the
            pruned model are then evaluated first.
        origin: JSON-able facts kept in every checkpoint, such as where ``weights`` came from.
        data: of ``config``, where that is loaded already.

    After :meth:`train`, ``model`` holds the trained model; :mod:`chts_train.report` puts it all in words.

    Raises:
        ValueError: config, data, weights or processes do not fit each other; the message names what does not.
    """

    def __init__(
        self,
        config: RunConfig,
        run: str | Path,
        settings: Settings | None = None,
        *,
        weights: Mapping[str, Tensor] | None = None,
        origin: Mapping[str, Any] | None = None,
        data: Any = None,
    ) -> None:
        data = config.load_data() if data is None else data
        self._build(config.fit(data), data, run, settings, origin or {}, weights, step=0)

    @classmethod
    def resume(cls, path: str | Path, settings: Settings | None = None, *, run: str | Path | None = None) -> Trainer:
        """Continue a run from its latest checkpoint, or any checkpoint in the new folder ``run``.

        Raises:
            CheckpointError: there is nothing usable, or it does not fit the data that is there now.
            RunError: a checkpoint that is not its run's latest is given without ``run``: going on in place would
                overwrite what came after it.
        """
        checkpoint = read_checkpoint(path)
        if "run" not in checkpoint.config:
            raise RunError(f"{checkpoint.path}: must be a checkpoint of a training run, got another program's")
        home = checkpoint.path.parent.parent
        if run is None:
            inside = checkpoint.path.parent.name == FOLDER
            if not inside or find_checkpoint(home) != checkpoint.path:
                found = f"the latest is {find_checkpoint(home).name}" if inside else "it is in no run folder"
                raise RunError(
                    f"{checkpoint.path}: must be its run's latest checkpoint ({found}); give --out to branch off"
                )
        config = RunConfig.from_dict(checkpoint.config["run"])
        self = cls.__new__(cls)
        origin = checkpoint.config.get("origin", {})
        self._build(config, config.load_data(), run or home, settings, origin, None, step=checkpoint.step)
        restore(checkpoint, self.model, self.optimizer, self._parts(), rng=True)
        if run is not None:
            for log in (self.log, self.update_log):
                if log.enabled and (home / log.path.name).is_file():
                    shutil.copyfile(home / log.path.name, log.path)
        self._saved, self._resumed = (checkpoint.path if run is None else None), checkpoint.path
        return self

    def _build(
        self,
        config: RunConfig,
        data: Any,
        run: str | Path,
        settings: Settings | None,
        origin: Mapping[str, Any],
        weights: Mapping[str, Tensor] | None,
        step: int,
    ) -> None:
        require("safetensors.torch", "saving checkpoints")  # now, not after an hour of training
        self.config, self.run, self.settings, self.origin = config, Path(run), settings or Settings(), dict(origin)
        self.method = get_method(config.method)
        self.processes = Processes.here(self.settings.parallel)
        self.processes.check(config.batch_size, self.method.kind)
        if self.method.kind != "sparse" or self.processes.kind == "fsdp":
            with_what = f"method {self.method.name}" if self.method.kind != "sparse" else "parallel fsdp"
            if config.dense_steps:
                raise ValueError(f"dense_fraction must be 0 with {with_what}, got {config.dense_fraction}")
            if config.ste_window:
                raise ValueError(f"ste_window must be None with {with_what}, got {config.ste_window}")
        self.device = resolve_device(self.settings.device)
        self.precision = resolve_precision(config.precision, self.device)
        if self.method.kind == "sparse" != self.method.form_of(config, step):
            self._try_sparse()
        self.compile = resolve_compile(self.settings.compile, self.device, self.processes.kind)
        self.task = make_task(config, data)
        self.batches = self.task.batches()
        self.baseline = self.task.baseline()

        torch.manual_seed(config.seed)
        self.model = config.build_model()  # on the CPU: the same initial weights on every device
        if weights is not None:
            check_fit(Path(self.origin.get("dense", "weights")), {}, weights, self.model)
            self.model.load_state_dict(weights)
        self.model.to(self.device)
        self.dense_parameters = sum(p.numel() for p in self.model.parameters())
        self.dense_figures = self.evaluate(config.eval_tokens) if weights is not None else None
        self.schedule = TopologySchedule(**_take(config, *(item.name for item in fields(TopologySchedule))))
        self._assemble(self.method.form_after(config, step))

        self.counters = Counters()
        self.log, self.update_log = (
            MetricsLog(self.run / name, enabled=self.processes.main) for name in (METRICS, UPDATES)
        )
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._window = (0, 0.0)  # targets seen and seconds at the last line of the log
        self._unlogged: tuple[int, dict[str, float]] | None = None  # step and settings of an update whose figures are on the device
        self._figures: tuple[int, dict[str, float]] = (-1, {})  # the last evaluation and its step
        self._saved: Path | None = None  # the checkpoint of this very step
        self._resumed: Path | None = None

    def _sparsity(self, form: str | None = None, init: str | None = None) -> SparsityConfig | None:
        config = self.config
        return self.method.sparsity_config(
            config.seed,
            init=init or config.init or ("magnitude" if config.dense_steps else None),
            srste_lambda=config.srste_lambda,
            impl=config.impl,
            weight_grad=config.weight_grad,
            form=form,
        )

    def _try_sparse(self) -> None:
        """What would stop the run when weights are compressed stops it now: a model without fitting layers, an ``impl`` that cannot run."""
        sparsity = self._sparsity(init="random")
        with torch.random.fork_rng(devices=()):
            with torch.device("meta"):
                sparsify_(self.config.build_model(), sparsity)
            probe = nn.Sequential(nn.Linear(16, 16))
            sparsify_(probe, sparsity)
            with self.autocast():
                probe.to(self.device)(torch.zeros(1, 16, device=self.device)).sum().backward()

    def _assemble(self, form: str, *, init: str | None = None, step: int = 0) -> None:
        """Everything around the model: sparse layers, compilation, wrapping, optimizer, scheduler, evolver and graphs.

        ``form``: of the weights, "dense", "ste" or "sparse"; ``init``: another choice of patterns than the run's.
        """
        config, sparsity, self.form = self.config, self._sparsity(form, init), form
        self.records = sparsify_(self.model, sparsity) if sparsity else []
        if self.compile != "off":
            compile_blocks(self.model)
        self.network = self.processes.wrap(self.model, self.device)
        # Everything that writes weights here follows with the operands; sharded values keep none.
        resident = self.precision == "bf16" and self.processes.kind != "fsdp"
        self.optimizer = make_optimizer(
            config.optimizer, self.model, resident_operands=torch.bfloat16 if resident else None,
            **_take(config, "lr", "betas", "eps", "weight_decay"),
        )  # fmt: skip
        if resident and form == "ste":
            make_masks_resident_(self.model, self.optimizer)
        self.scheduler = make_scheduler(self.optimizer, **_take(config, "total_steps", "warmup_steps", "min_lr_ratio"))
        self.evolver = None
        if form == self.method.kind:
            self.evolver = attach_method(
                self.method, self.model, self.optimizer, self.schedule, config.seed, step, config.new_moments
            )
        elif form == "ste":
            attach_srste_decay(self.model, self.optimizer)
        self.graphs = StepGraphs(self._pass, self.optimizer, self.device) if self.compile == "graph" else None

    def _change_form(self, form: str) -> None:
        """Go on with another form of the same weights.

        Compressed ones become dense with zeros; second moments of what was no link are estimated. Dense ones are pruned by magnitude (after
        a dense start as ``init`` says) and keep what the optimizer knows of the links; masked ones keep their masks as patterns.
        """
        before = self.form
        if self.evolver is not None:
            self._log_update()
            self.evolver.close()
        states = dense_states(self.model, self.optimizer)
        schedule = self.scheduler.state_dict()
        for parameter in self.model.parameters():
            parameter.grad = None
        # DDP's hooks, the captured graphs and their memory: gone before their successors come.
        self.network = self.optimizer = self.scheduler = self.graphs = self.evolver = None
        gc.collect()
        densify_(self.model)
        self._assemble(form, init="magnitude" if before == "ste" else None, step=self.counters.step)
        self.scheduler.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        load_dense_states_(self.model, self.optimizer, states)
        self.log.write("compress" if form == "sparse" else "expand", self.counters.step, method=self.method.name)

    def train(self) -> Outcome:
        """Train to the end, or to a signal: then the step is finished and a checkpoint saved before this returns.

        Raises:
            TrainingError: the loss is not finite, or another process of the run is gone.
            RunError: another run uses the same folder.
        """
        try:
            return self._train()
        except Exception as error:
            if self.processes.size == 1 or not is_lost_connection(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"process {self.processes.rank} of {self.processes.size} lost another one at step {self.counters.step} "
                f"({reason}); torchrun's report says how that ended; the checkpoints in {self.run} are intact"
            ) from error

    def _stuck(self) -> None:
        """A signal came and this process waits for its GPU, which waits for another process: end it before torchrun loses patience."""
        print(
            f"error: process {self.processes.rank} of {self.processes.size} was told to stop at step {self.counters.step} and waits for "
            f"its device, as it does when another process is gone; torchrun's report says how that ended; the checkpoints in {self.run} "
            "are intact", file=sys.stderr, flush=True,
        )  # fmt: skip
        leave_at_once(1)

    def _train(self) -> Outcome:
        counters, total, main = self.counters, self.config.total_steps, self.processes.main
        progress = Progress(total, counters.step, quiet=self.settings.quiet or not main)
        stuck = self._stuck if self.processes.size > 1 else None
        with RunLock(self.run) if main else contextlib.nullcontext(), GracefulStop(stuck) as stop, progress:
            self._open_logs(progress)
            while not self._stopped(stop):
                if self._due(self.config.eval_interval) and self._figures[0] != counters.step:
                    self._evaluate_and_log(stop, progress)
                if self._due(self.settings.save_interval or self.config.eval_interval):
                    self._save()
                if counters.step == total or self._stopped(stop):
                    break
                self._train_step()
                progress.advance(counters.step)
                if counters.step % self.settings.log_interval == 0 or counters.step == total:
                    progress.show(self._log_train())
            saved = self._save()
            finished = counters.step == total and self._figures[0] == total
            figures = self._figures[1] if finished else {}
            if finished and main:
                summarise(self, figures)
        return Outcome(counters.step, finished, 0 if finished else stop.exit_code, saved, figures)

    def evaluate(self, limit: int | None = None, stop: GracefulStop | None = None) -> dict[str, float] | None:
        """Figures of the model as it is on about ``limit`` held-out targets (images); None when stopped by a signal."""
        with torch.compiler.set_stance("force_eager"):  # not worth another compilation, and the same figures in every mode
            return evaluate(
                self.task,
                self.model,
                device=self.device,
                autocast=self.autocast,
                limit=limit,
                stop=lambda: stop is not None and self._stopped(stop),
                processes=self.processes,
            )

    @property
    def passes(self) -> int:
        """Forward and backward passes of one optimizer step in this process."""
        return -(-self.config.batch_size // self.processes.size // self.config.micro_batch)

    def _stopped(self, stop: GracefulStop) -> bool:
        """Whether any process got a signal: all stop after the same step."""
        number = self.processes.largest(stop.signal or 0)
        if number:
            stop.signal = number
        return bool(number)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast, or nothing for fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _due(self, interval: int) -> bool:
        step = self.counters.step
        if step == 0:
            return self.dense_figures is not None  # re-training starts from figures worth knowing
        return step % interval == 0 or step == self.config.total_steps

    def _train_step(self) -> None:
        """One batch: backward over its micro-batches, then the optimizer's step or a topology update."""
        start = time.monotonic()
        counters, processes, size = self.counters, self.processes, self.config.micro_batch
        form = self.method.form_of(self.config, counters.step)
        if form != self.form:
            self._change_form(form)
        inputs, targets = next(self.batches)
        total = self.task.count(targets)
        if processes.size > 1:  # each process drops its own paths, and a resumed run the same ones
            torch.manual_seed(((self.config.seed << 32) + counters.step * processes.size + processes.rank) % (1 << 63))
        inputs, targets = processes.mine(inputs).split(size), processes.mine(targets).split(size)
        # So that neither accumulation nor the number of processes changes anything, also with padding. (Every sequence
        # has a target, so no share is 0.)
        passes = [(x, y, self.task.count(y) / total) for x, y in zip(inputs, targets, strict=True)]
        eager = self.evolver is not None and self.evolver.needs_dense_gradients
        with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            if self.graphs is not None:
                self.graphs.gradients(passes, eager=eager)
            else:
                for number, (x, y, share) in enumerate(passes, 1):
                    with processes.accumulating(self.network, last=number == len(passes)):
                        self._pass(x.to(self.device), y.to(self.device), share)
        counters.step += 1
        counters.seen += total
        counters.loss_steps += 1
        if self.evolver is not None and self.schedule.is_update(counters.step):
            self._log_update()  # the one before
        if self.evolver is not None and not self.evolver.step():
            self._unlogged = counters.step, {"zeta": self.evolver.zeta, "T": self.evolver.temperature}
        elif self.graphs is not None:
            self.graphs.step(1.0 if self.evolver is None else self.schedule.lr_scale(counters.step))
        else:
            self.optimizer.step()
        self.scheduler.step()
        if self.graphs is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.graphs.clear()
        self._saved = None
        counters.seconds += time.monotonic() - start

    def _pass(self, inputs: Tensor, targets: Tensor, share: float | Tensor) -> None:
        """Forward and backward of one micro-batch on the device; ``share``: its part of the batch's targets."""
        with self.autocast():
            loss = self.network(inputs, targets)
        (loss * (share * self.processes.size)).backward()  # DDP and FSDP average over the processes
        self._loss += loss.detach().double() * share

    def _log_update(self) -> None:
        """Log the last update if it is not logged yet. Not at once: reading its figures waits for the device."""
        if self._unlogged is None:
            return
        (step, facts), self._unlogged = self._unlogged, None
        layers = self.evolver.stats()
        summary = update_summary(layers)
        self.counters.turnover = summary["turnover"]
        self.log.write("update", step, **facts, **summary)
        self.update_log.write("update", step, **facts, layers=layers)

    def _log_train(self) -> dict[str, Any]:
        self._read_loss()
        counters, unit = self.counters, self.task.unit
        loss = counters.loss_sum / counters.loss_steps
        speed = (counters.seen - self._window[0]) / max(1e-9, counters.seconds - self._window[1])
        facts: dict[str, Any] = {
            "loss": loss,
            **self.task.train_figures(loss),
            "lr": self._lr(),
            f"{unit}_per_s": speed,
        }
        facts |= {unit: counters.seen, "seconds": round(counters.seconds, 3)}
        if self.evolver is not None:
            facts |= {"turnover": counters.turnover, "zeta": self.evolver.zeta, "T": self.evolver.temperature}
        self._window = (counters.seen, counters.seconds)
        counters.loss_sum, counters.loss_steps = 0.0, 0
        return self.log.write("train", counters.step, **facts)

    def _read_loss(self) -> None:
        """Take the sum of losses from the device, where it grows without waiting, and check it."""
        start = time.monotonic()
        loss = self.processes.sum_(self._loss).item()
        self._log_update()
        self.counters.seconds += time.monotonic() - start  # a GPU was still training
        self._loss.zero_()
        self.counters.loss_sum += loss
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss: must be finite, got {loss} at step {self.counters.step}; try a lower --lr than "
                f"{self.config.lr:g} or a longer --warmup-steps (earlier checkpoints in {self.run} are intact)"
            )

    def _lr(self) -> float:
        """The learning rate of the step just finished."""
        step = self.counters.step
        rate = self.config.lr * self.scheduler.lr_lambdas[0](step - 1)
        return rate * self.schedule.lr_scale(step) if self.evolver is not None else rate

    def _evaluate_and_log(self, stop: GracefulStop, progress: Progress) -> None:
        step, limit = self.counters.step, self.config.eval_tokens
        if limit is not None and step == self.config.total_steps:
            limit *= FINAL_EVAL_FACTOR
        self._read_loss()  # waits for the training that a GPU still does, so that its time is counted as such
        figures = self.evaluate(limit, stop)
        if figures is not None:
            self._figures = (step, figures)
            self.log.write("eval", step, **figures)
            progress.message(f"step {step}: held-out {spell(figures)}")

    def _save(self) -> Path | None:
        """The checkpoint of this step, written unless it is there already or none are wanted."""
        if self._saved is None:
            self._read_loss()  # a diverged model never replaces a good one
            if not self.settings.checkpoints:
                return None
            self._saved = save_checkpoint(
                self.run,
                step=self.counters.step,
                config={"run": self.config.to_dict(), "origin": self.origin},
                model=self.model,
                optimizer=self.optimizer,
                parts=self._parts(),
                keep=self.settings.keep,
                write=self.processes.main,
            )
        return self._saved

    def _parts(self) -> dict[str, Any]:
        parts = {"counters": self.counters, "scheduler": self.scheduler, "batches": self.batches}
        return parts | ({"evolver": self.evolver} if self.evolver is not None else {})

    def _open_logs(self, progress: Progress) -> None:
        counters = self.counters
        self._window = (counters.seen, counters.seconds)
        if self.processes.main:
            write_config(self.run, {"run": self.config.to_dict(), "origin": self.origin})
        if self._resumed is not None:
            progress.message(f"resumed from {self._resumed} at step {counters.step:,} of {self.config.total_steps:,}")
            for log in (self.log, self.update_log):
                log.truncate(counters.step)
            rows = on_main(lambda: [row for row in self.log.read() if row["kind"] == "eval"])
            if rows:
                self._figures = (rows[-1]["step"], {k: v for k, v in rows[-1].items() if k.startswith("val_")})
            return
        facts = {"method": self.config.method, "preset": self.config.name, "device": str(self.device)}
        self.log.write("start", 0, **facts, precision=self.precision, **self.baseline)
        if self.dense_figures is not None:
            self.log.write("dense", 0, **self.dense_figures)
            progress.message(f"dense: held-out {spell(self.dense_figures)}")


def _take(config: RunConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}
