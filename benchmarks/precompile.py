"""Compile ahead: the kernels of ours that the cases are going to launch, in several processes, before anything is timed.

Each process makes cases' first calls, at one set of inputs, which leaves the compiled kernel in Triton's cache on disk. No list of
kernels has to be kept; whatever goes wrong here goes wrong again, with a row of its own, where the case is measured; and what
hangs is ended with its process, which is why these are not threads.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import environment, providers
from benchmarks.cases import LINEAR_SETS, Case
from benchmarks.problems import make
from chts_kernels import SparseWeight, spmm

LIMIT_S = 25.0
"""What is not compiled by then compiles where it is measured."""
PROGRESS_S = 5.0
BYTES_A_PROCESS = 5 << 30
"""Device memory that a process may need: its context and the largest problem."""
WORTH_IT = 4
"""Fewer cases may as well compile when their turn comes."""
OF_SHAPES = ("forward", "input_grad", "weight_grad", "weight_grad_mvue")
"""Operations whose kernel depends on the shape, and that no other operation covers. Of the others one shape is compiled."""


def jobs(asked: int | None) -> int:
    """How many processes: as asked, else one for every core, as far as the device's memory goes; 0 without a device."""
    if asked is not None or not torch.cuda.is_available():
        return asked or 0
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return max(1, min(os.cpu_count() or 1, memory // BYTES_A_PROCESS))


def tasks(cases: Sequence[Case]) -> list[Case]:
    """The cases whose first call compiles something that the others' do not."""
    found: dict[tuple, Case] = {}
    for case in cases:
        shaped = (case.suite == "linear" and case.op in OF_SHAPES) or case.suite == "model"
        covered = case.suite == "linear" and case.op not in OF_SHAPES
        if "chts" in providers.names(case) and not covered:
            found.setdefault((case.suite, case.op, case.dtype, case.shape if shaped else None), case)
    return list(found.values())


def precompile(
    cases: Sequence[Case], impl: str, processes: int, limit_s: float = LIMIT_S, say: Callable[[str], None] = lambda text: None
) -> float:
    """Make the first calls that :func:`tasks` names in ``processes`` processes, for ``limit_s`` at most; returns the seconds.

    Args:
        say: told how far it is, every :data:`PROGRESS_S`.
    """
    start, wanted = time.perf_counter(), tasks(cases)
    if processes < 2 or len(wanted) < WORTH_IT:
        return 0.0
    # Neighbours share kernels: far apart, fewer processes compile the same one at the same time.
    order = [(case, impl) for offset in range(processes) for case in wanted[offset::processes]]
    context = multiprocessing.get_context("forkserver")  # imports once; a fork of this process would inherit its CUDA
    context.set_forkserver_preload(["benchmarks.precompile", "benchmarks.providers.chts"])
    done, told = 0, 0.0
    with context.Pool(processes) as pool:  # its end terminates the processes
        found = pool.imap_unordered(first_call, order)
        while done < len(order):
            seconds = time.perf_counter() - start
            if seconds - told >= PROGRESS_S:
                told = seconds
                say(f"{seconds:.0f} s: kernels of {done} of {len(order)} cases compiled")
            if seconds > limit_s:
                break
            try:
                found.next(timeout=0.5)
                done += 1
            except multiprocessing.TimeoutError:
                continue
    seconds = time.perf_counter() - start
    say(f"kernels of {done} of {len(order)} cases compiled ahead in {seconds:.1f} s")
    return seconds


def first_call(task: tuple[Case, str]) -> str | None:
    """Do a case's work once, untimed and unchecked; returns what went wrong."""
    case, impl = task
    torch.set_num_threads(1)
    device = environment.device()
    try:
        if case.suite == "model":
            _layers(case.dims["model"], impl, device, "mvue24" if case.op == "step_mvue" else "exact")
        else:
            problem = make(case, device, sets=1)
            for variant in providers.builder("chts")(problem, impl):
                variant.calls[0]()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as error:  # met again, and said in the case's row, where the case is measured
        return f"{case.id}: {error!r}"
    return None


def _layers(model: str, impl: str, device: torch.device, weight_grad: str) -> None:
    """Forward and backward of the model's distinct layers as training runs them: float32 values under bf16 autocast."""
    for tokens, rows, columns in LINEAR_SETS.get(model, []):
        weight = SparseWeight.random(rows, columns, device=device)
        weight.values.requires_grad_()
        x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16).requires_grad_()
        bias = torch.zeros(rows, device=device, requires_grad=True) if model.startswith("vit") else None
        with torch.autocast(device.type, torch.bfloat16):
            spmm(x, weight, bias, weight_grad=weight_grad, impl=impl).sum().backward()
