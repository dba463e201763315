"""The capability report, and an import that touches neither a device nor Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import chts_kernels
from chts_kernels import capability_report
from chts_kernels.ops._library import REGISTRY
from chts_kernels.target import compute_capability


def python(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_report_is_one_screen_that_names_every_op() -> None:
    report = capability_report()
    lines = report.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 120
    assert all(line == line.rstrip() for line in lines)
    assert f"torch {torch.__version__}" in lines[0]
    for name, op in REGISTRY.items():
        assert any(line.split()[:1] == [name] for line in lines), name
        assert all(kernel.name in report for kernel in op.kernels)
    assert "reference" in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is here")
def test_report_says_why_there_is_no_device() -> None:
    (line,) = [line for line in capability_report().splitlines() if line.strip().startswith("cuda")]
    assert "none: " in line and ("built without CUDA" in line or "no device answers" in line)


def test_module_prints_the_report() -> None:
    printed = python("-m", "chts_kernels").splitlines()
    assert len(printed) == len(capability_report().splitlines())
    assert printed[0] == capability_report().splitlines()[0]


def test_compute_capability_of_the_cpu() -> None:
    assert compute_capability(torch.device("cpu")) is None


def test_import_and_cpu_use_make_no_device_call_and_leave_triton_alone() -> None:
    python("-c", """
import sys
import torch

def refuse(*args, **kwargs):
    raise AssertionError("a device call")

for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties",
             "get_device_name", "init", "_lazy_init", "is_initialized", "synchronize", "current_stream"):
    setattr(torch.cuda, name, refuse)

before = set(sys.modules)
import chts_kernels

new = {m.partition(".")[0] for m in set(sys.modules) - before}
assert "triton" not in sys.modules, "importing chts_kernels imported triton"
assert "chts_train" not in new, "importing chts_kernels imported chts_train"

w = chts_kernels.SparseWeight.random(16, 24)
w.values.requires_grad_()
chts_kernels.spmm(torch.ones(2, 24), w).sum().backward()
chts_kernels.evolve(w, zeta=0.3)
w.operands(torch.bfloat16)
assert "triton" not in sys.modules, "the reference imported triton"
""")  # fmt: skip


def test_public_names_exist_and_the_version_is_one() -> None:
    assert sorted(chts_kernels.__all__) == list(dict.fromkeys(sorted(chts_kernels.__all__)))
    for name in chts_kernels.__all__:
        assert getattr(chts_kernels, name) is not None
    assert chts_kernels.__version__.count(".") >= 1


def test_public_functions_are_documented() -> None:
    for name in chts_kernels.__all__:
        member = getattr(chts_kernels, name)
        if callable(member):
            assert member.__doc__ and len(member.__doc__) > 40, name
