"""Shared fixtures: GPU tests are skipped where there is no device, everything else runs single-threaded and seeded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> subprocess.CompletedProcess[str]:
    """The ``cpu`` cases of the test's file, run in a process with TRITON_INTERPRET=1: Triton looks at it when a kernel is declared."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cpu", "-p", "no:cacheprovider", str(request.path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)
