"""Packages that one kind of data needs and that are too heavy for the extra "train"."""

from __future__ import annotations

import importlib
from types import ModuleType


def require_package(module: str, package: str, purpose: str) -> ModuleType:
    """Import ``module`` of ``package`` for ``purpose``.

    Raises ImportError with the package and the command that installs it when it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {package}: pip install {package}") from error
