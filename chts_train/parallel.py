"""The processes of one training run: ``torchrun`` starts them, each trains on its share of every batch.

::

    torchrun --nproc-per-node 8 -m chts_train pretrain --parallel fsdp

The same config computes the same run on any number of processes, up to the rounding of sums: rank r of R takes the r-th
R-th of every batch. Rank 0 alone writes and prints. Everything that decides what the processes do next (signals, losses,
folders) is agreed on, so that no rank waits for another in vain.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

PARALLEL = ("auto", "ddp", "fsdp")
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    ``kind``: "single", "ddp" (every process holds the model) or "fsdp" (parameters, gradients and optimizer are sharded).
    """

    rank: int = 0
    size: int = 1
    kind: str = "single"

    @classmethod
    def here(cls, parallel: str = "auto") -> Processes:
        """The processes of the default group: "auto" is DDP where there are several, and a single process otherwise.

        Raises:
            ValueError: unknown ``parallel``, or one that needs ``torchrun`` without it.
        """
        if parallel not in PARALLEL:
            raise ValueError(f"parallel: must be one of {', '.join(PARALLEL)}, got {parallel!r}")
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            if parallel != "auto":
                raise ValueError(f"parallel: must be auto for a single process, got {parallel!r}; start it with torchrun")
            return cls()
        rank, size = distributed.get_rank(), distributed.get_world_size()
        if parallel == "auto":
            parallel = "ddp" if size > 1 else "single"
        return cls(rank, size, parallel)

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def check(self, batch_size: int, method_kind: str) -> None:
        """Whether a run can be split among these processes.

        Raises:
            ValueError: naming the setting that does not fit.
        """
        if batch_size % self.size:
            raise ValueError(f"batch_size must be a multiple of the {self.size} processes, got {batch_size}")
        if self.kind == "fsdp" and method_kind == "ste":
            raise ValueError("parallel must be ddp for methods with dense masked weights, got fsdp")

    def mine(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch."""
        return batch.chunk(self.size)[self.rank]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """What to call instead of ``model`` in training; under "fsdp" that is ``model`` itself, sharded in place.

        FSDP gathers one element of every ``nn.ModuleList`` (a transformer's block) at a time.
        """
        if self.kind == "ddp":
            kind = nn.parallel.DistributedDataParallel
            # Buffers are pattern ids, and equal: broadcasting them before each forward pass would outdate what is derived.
            new, old = "forward_sync_buffers", "broadcast_buffers"  # torch 2.13 renamed it
            option = new if new in inspect.signature(kind).parameters else old
            return kind(model, gradient_as_bucket_view=True, **{option: False})
        if self.kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (self.size,))
            for module in reversed(list(model.modules())):
                if isinstance(module, nn.ModuleList):
                    for block in module:
                        fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def accumulating(self, network: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a pass of gradient accumulation: DDP sends gradients in the ``last`` one only; FSDP keeps them sharded."""
        return network.no_sync() if self.kind == "ddp" and not last else contextlib.nullcontext()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of every process's number; a message through the host, never through a GPU."""
        if self.size == 1:
            return number
        box = torch.tensor(number)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        return int(box)


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Join the other processes that ``torchrun`` started; without ``torchrun`` do nothing.

    CPU tensors travel through gloo, CUDA tensors through NCCL; process i of a host takes its i-th GPU.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: a single GPU is named, or the host has fewer GPUs than processes.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if device not in ("auto", "cuda"):
            raise ValueError(f"device: must be auto, cpu or cuda under torchrun, got {device!r}")
        if local >= torch.cuda.device_count():
            raise ValueError(f"--nproc-per-node: must be at most the {torch.cuda.device_count()} GPUs of this host")
        torch.cuda.set_device(local)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    yield  # after an error the process ends without a farewell, which could wait for processes that are gone
    distributed.barrier()
    distributed.destroy_process_group()


def leave_at_once(code: int) -> None:
    """End a process that ``torchrun`` started; do nothing without ``torchrun``.

    Threads of gloo that still run when C++ cleans up abort the process, and torchrun takes that for a failure: measured with
    torch 2.13, in a third of all runs of a plain FSDP2 model on CPUs.
    """
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rank_from_environment() -> int:
    """This process's number as ``torchrun`` set it, 0 without it."""
    return int(os.environ.get("RANK", "0")) if torch.distributed.is_available() else 0


def on_main(function: Callable[[], T]) -> T:
    """Call ``function`` in the first process and give its result to all of them; what it raises is raised everywhere."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return function()
    box: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            box = [function(), None]
        except Exception as error:
            box = [None, error]
    distributed.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return box[0]


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    kinds = tuple(
        getattr(torch.distributed, name)
        for name in ("DistBackendError", "DistNetworkError")
        if hasattr(torch.distributed, name)
    )
    if isinstance(error, kinds):
        return True
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
