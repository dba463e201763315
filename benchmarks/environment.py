"""What the numbers were measured on: device, clocks, power limit, versions, commit, and a hash of the kernels' source."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SMI_FIELDS = (
    "driver_version",
    "power.limit",
    "power.max_limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "temperature.gpu",
)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def capability() -> tuple[int, int] | None:
    """Compute capability of the current device."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def capture() -> dict[str, Any]:
    """Everything but the roofs (:mod:`benchmarks.roofs`), which have to be measured. Never raises for a missing tool."""
    found: dict[str, Any] = {
        "gpu": gpu_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cusparselt": cusparselt_version(),
        "chts": _version("chts"),
        "commit": os.environ.get("CHTS_COMMIT") or _commit(),  # a copy of the tree may have another one's git, or none
        "kernel_hash": kernel_hash(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": l2_bytes(),
        }
    found |= smi()
    found["driver"] = found.pop("driver_version", None)
    return found


def session(roofs: dict[str, float]) -> dict[str, Any]:
    """One run's share of a file that several runs filled: when, on which card, its state and its own roofs."""
    uuid = None
    if torch.cuda.is_available():
        uuid = str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"started": now, "gpu_uuid": uuid, **state(), **roofs}


def state() -> dict[str, Any]:
    """Clock (MHz), power (W) and temperature (C) of this moment."""
    return {key: value for key, value in smi().items() if key in ("clocks.sm", "power.draw", "temperature.gpu")}


def l2_bytes() -> int:
    """Size of the second-level cache; 50 MiB where torch does not say."""
    if not torch.cuda.is_available():
        return 0
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "L2_cache_size", 0)) or 50 << 20


def cusparselt_version() -> str | None:
    try:
        version = torch.backends.cusparselt.version()
    except (AttributeError, RuntimeError):
        return None
    # CUSPARSELT_VERSION: 1000 * major + 100 * minor + patch
    return None if version is None else f"{version // 1000}.{version // 100 % 10}.{version % 100}"


def smi() -> dict[str, Any]:
    """Fields of nvidia-smi as numbers where they are numbers; empty where there is no nvidia-smi."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    query += ["-i", visible or str(torch.cuda.current_device())]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (subprocess.SubprocessError, OSError, IndexError):
        return {}
    return {key: _number(text.strip()) for key, text in zip(SMI_FIELDS, line.split(","), strict=False)}


def sm_clock_mhz() -> float | None:
    """The clock right now, or None where NVML's Python bindings are missing; takes well under a millisecond."""
    try:
        return float(torch.cuda.clock_rate())
    except Exception:  # NVML bindings are optional, and their errors have their own types
        return None


def kernel_hash() -> str:
    """SHA-256 (first 16 hex digits) over the names and contents of chts_kernels' Python files."""
    spec = importlib.util.find_spec("chts_kernels")
    root = Path(spec.submodule_search_locations[0])
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "chts_kernels", "chts_train", "benchmarks")
        return git("rev-parse", "HEAD") + (" with changes" if dirty else "")
    except (subprocess.SubprocessError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
