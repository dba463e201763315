"""Where a run runs and what it writes: everything about it that does not change what it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

COMPILE = ("auto", "off", "blocks", "graph")


@dataclass(frozen=True)
class Settings:
    """Free to change when a run is resumed.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:<number>".
        log_interval: steps between lines of the log.
        save_interval: steps between checkpoints; 0: as often as evaluations.
        keep: checkpoints to keep.
        quiet: print nothing.
        compile: "blocks" (``torch.compile`` of a model's blocks), "graph" (also whole steps as CUDA graphs: one GPU, the fastest), "auto"
            ("graph" on a GPU that trains alone, else "off") or "off". Compiling takes up to half a minute at the start.
        checkpoints: save any; without them a run that was stopped is lost.
        parallel: among the processes that ``torchrun`` started: "ddp", "fsdp", or "auto" (DDP where there are several).

    Raises:
        ValueError: naming the argument that is out of range.
    """

    device: str = "auto"
    log_interval: int = 10
    save_interval: int = 0
    keep: int = 2
    quiet: bool = False
    compile: str = "off"
    checkpoints: bool = True
    parallel: str = "auto"

    def __post_init__(self) -> None:
        for name, low in (("log_interval", 1), ("save_interval", 0), ("keep", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be at least {low}, got {getattr(self, name)}")
        if self.compile not in COMPILE:
            raise ValueError(f"compile: must be one of {', '.join(COMPILE)}, got {self.compile!r}")


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"device: must be auto, cpu, cuda or cuda:<number>, got {name!r}")
    if kind == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= found:
        raise ValueError(f"device: must exist, got {name!r} where torch {torch.__version__} sees {found} CUDA devices")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16"; "auto" is bf16 on a GPU that has it, else fp32."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return name


def resolve_compile(name: str, device: torch.device, parallel: str = "single") -> str:
    """ "off", "blocks" or "graph"; "auto" is "graph" on a GPU that trains alone, else "off".

    Args:
        name: the setting.
        device: of the training.
        parallel: "single", or the way of sharing the training with other processes, be it with none: "ddp", "fsdp".

    Raises:
        ValueError: "graph" on a CPU, under DDP or FSDP.
    """
    fits = device.type == "cuda" and parallel == "single"
    if name == "auto":
        return "graph" if fits else "off"
    if name == "graph" and not fits:
        raise ValueError(f"compile: must not be 'graph' on {device.type} with parallel = {parallel!r}: it takes one GPU and one process")
    return name
