"""Packages that only some commands need: imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTRA = "train"


def require(module: str, purpose: str, extra: str = EXTRA) -> ModuleType:
    """Import ``module`` for ``purpose``; ``extra`` of this package brings it.

    Raises:
        ImportError: when it is missing; the message has the package and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'{purpose} needs the package {package}: pip install "chts[{extra}]"') from error
