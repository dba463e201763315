"""Device tensors that are made once and live as long as the process: tables, schedules, counters."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def lasting(make: Callable[[], torch.Tensor], device: torch.device | str | int) -> torch.Tensor:
    """``make()``, called so that the tensor can be kept: the modes of the caller do not reach it.

    Fake tensors and inference mode are set per thread, and so is the memory pool that ``torch.compile(mode="reduce-overhead")``
    has its warm-up allocate from, whose tensors must not outlive the graph. So ``make`` runs in a thread of its own, on the
    caller's current stream: what it enqueues there is done before what the caller enqueues later.

    Args:
        make: returns a new tensor on ``device``.
        device: where; for a CPU the thread changes nothing but the modes.
    """
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(make).result()
    stream = torch.cuda.current_stream(device)

    def on_stream() -> torch.Tensor:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_stream).result()


def to_device(array: np.ndarray, device: torch.device | str | int) -> torch.Tensor:
    """A lasting copy of an array; to a GPU from pinned memory, so that nothing waits for the device."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)

    def make() -> torch.Tensor:
        host = torch.from_numpy(array.copy())
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)

    return lasting(make, device)
