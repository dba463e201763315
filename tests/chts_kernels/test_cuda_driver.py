"""What the launcher hands to the driver, read back from memory by a stand-in for the driver."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import pytest

from chts_kernels import cuda_driver
from chts_kernels.cuda_driver import Launch


class Driver:
    """Notes every launch: (stream, grid, block, shared memory, attributes by id, parameters, function)."""

    def __init__(self):
        self.seen, self.codes, self.contexts = [], [], []

    def cuLaunchKernelEx(self, config_at, function, parameters_at, extra):
        config = cuda_driver._LaunchConfig.from_address(config_at)
        attributes = {a.id: a.value[0] for a in config.attributes[: config.num_attributes]}
        pointers = (ctypes.c_void_p * 4).from_address(parameters_at)
        parameters = [pointers[0], *(ctypes.c_uint64.from_address(pointers[i]).value for i in (1, 2, 3))]
        self.seen.append((config.stream, config.grid[0], config.block[0], config.shared, attributes, parameters, function))
        return self.codes.pop(0) if self.codes else 0

    def cuCtxSetCurrent(self, context):
        self.contexts.append(context)
        return 0

    def cuGetErrorString(self, code, text):
        return 0


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    return driver


def kernel(cluster=1):
    return SimpleNamespace(kinds=["map", "u64", "u64", "u32"], threads=384, shared=1000, cluster=cluster, function=99, context=5)


def test_a_launch_passes_what_was_set(driver):
    launch = Launch(kernel(), 132, ((3, 7),))
    launch.pointers[0], launch.values[1], launch.values[2] = 1 << 40, 2 << 40, 0
    launch.run(11)
    assert driver.seen == [(11, 132, 384, 1000, {}, [1 << 40, 2 << 40, 0, 7], 99)]


@pytest.mark.parametrize(
    ("cluster", "overlap", "attributes"), [(1, False, {}), (2, False, {4: 2}), (1, True, {6: 1}), (2, True, {4: 2, 6: 1})]
)
def test_attributes(driver, cluster, overlap, attributes):
    launch = Launch(kernel(cluster), 132, (), overlap)
    launch.run(11)
    assert driver.seen[0][4] == attributes


def test_every_thread_has_its_own_arguments(driver):
    launch = Launch(kernel(), 132, ((3, 7),))
    launch.pointers[0], launch.values[1] = 1 << 40, 2 << 40

    def other():
        launch.pointers[0], launch.values[1] = 3 << 40, 4 << 40
        launch.run(12)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    launch.run(11)
    assert [(seen[0], seen[5]) for seen in driver.seen] == [(12, [3 << 40, 4 << 40, 0, 7]), (11, [1 << 40, 2 << 40, 0, 7])]


def test_a_thread_without_a_context_gets_one_and_errors_are_raised(driver):
    launch = Launch(kernel(), 132, ())
    driver.codes = [201, 0]
    launch.run(11)
    assert driver.contexts == [5] and len(driver.seen) == 2
    driver.codes = [201, 700]
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx.*700"):
        launch.run(11)
    driver.codes = [1]
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx\(132 blocks of 384 threads\): CUDA driver error 1"):
        launch.run(11)
