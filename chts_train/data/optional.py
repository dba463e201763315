"""Import of what only some data needs, with an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

# Heavy packages that one kind of data needs are named themselves; the light ones are in the extra.
_INSTALL = {
    "PIL.Image": ("Pillow", "chts[train]"),
    "PIL.ImageOps": ("Pillow", "chts[train]"),
    "tokenizers": ("tokenizers", "chts[train]"),
    "sklearn.datasets": ("scikit-learn", "chts[train]"),
    "datasets": ("datasets", "datasets"),
    "torchvision.datasets": ("torchvision", "torchvision"),
}


def require(module: str, purpose: str) -> ModuleType:
    """Import ``module`` (a key of the table above) for ``purpose``.

    Raises ImportError naming the package and the pip command when it is missing.
    """
    package, target = _INSTALL[module]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{purpose} needs the package {package}: pip install "{target}" ({error})') from error
