"""Tensors that are kept for everyone are real ones, whoever asked first."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from chts_kernels.lasting import lasting, to_device


@pytest.mark.parametrize("mode", (torch.inference_mode, FakeTensorMode))
def test_modes_of_the_first_caller_do_not_reach_the_tensor(mode):
    with mode():
        table = to_device(np.arange(5, dtype=np.int16), "cpu")
    assert not isinstance(table, FakeTensor) and not table.is_inference()
    assert table.tolist() == [0, 1, 2, 3, 4] and table.dtype == torch.int16


def test_errors_reach_the_caller():
    with pytest.raises(ZeroDivisionError):
        lasting(lambda: torch.zeros(1 // 0), "cpu")


@pytest.mark.gpu
def test_the_memory_pool_of_the_caller_is_not_used():
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside, kept = torch.ones(1 << 22, device="cuda"), lasting(lambda: torch.ones(1 << 22, device="cuda"), 0)
    segments = {s["address"]: s["address"] + s["total_size"] for s in pool.snapshot()}

    def of_pool(x: torch.Tensor) -> bool:
        return any(start <= x.data_ptr() < end for start, end in segments.items())

    assert of_pool(inside) and not of_pool(kept)
