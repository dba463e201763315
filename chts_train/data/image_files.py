"""Readers of image data: arrays or JPEG streams in an npz, class folders, torchvision, scikit-learn digits."""

from __future__ import annotations

import inspect
import io
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from .images import ArraySource, DecodedSource, ImageData, Source, make_data, resize
from .optional import require_package

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_TRAIN_FOLDERS, _VAL_FOLDERS = ("train", "training"), ("val", "valid", "validation", "test", "testing")
_IMAGE_KEYS, _LABEL_KEYS = ("images", "x", "image", "data"), ("labels", "y", "label", "targets")
_NOT_MIRRORED = ("SVHN", "GTSRB", "RenderedSST2")  # colour images of digits, signs and text
_JPEG_KEYS = frozenset(("header", "body", "offset", "label"))


def load_images(
    spec: str | os.PathLike[str] = "digits",
    image_size: int | None = None,
    seed: int = 42,
    *,
    val_fraction: float = 0.1,
) -> ImageData:
    """Read labelled images and split them.

    spec is one of

    - ``"digits"``: scikit-learn's 1,797 digits, 8 x 8, grey;
    - an ``.npz`` with ``x_train, y_train, x_test, y_test``, or ``images``/``x`` and ``labels``/``y`` (and bool
      ``is_test``): [N, H, W], [N, H, W, C] or [N, C, H, W], uint8 or float in 0..1;
    - an ``.npz`` with ``header, body, offset, label`` (and ``is_test``): image i is the JPEG
      ``header + body[offset[i]:offset[i + 1]]``;
    - a folder with a subfolder of images per class, or with such a folder ``train`` and one ``val`` (or ``test``);
    - the name of a torchvision data set (``CIFAR10``, ``MNIST``, ``ImageNet:root-folder`` ...), with the package
      `torchvision`; without a root it is downloaded into torch's cache folder.

    image_size: side of the square images; by default the arrays' own, or the shorter side of the first file.
    seed, val_fraction: where the data brings no split, that share of every class is held out.

    Raises ValueError for a broken file, unknown keys, no images or an argument out of range, FileNotFoundError for
    a path that does not exist, ImportError naming the package that the data needs.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be positive or None, got {image_size!r}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be in (0, 1), got {val_fraction!r}")
    if spec == "digits":
        return _digits(image_size, seed, val_fraction)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(path, image_size, seed, val_fraction)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path, image_size, seed, val_fraction)
    if path.exists():
        raise ValueError(f"image data must be an .npz or a folder, got the file {os.fspath(spec)!r}")
    if os.sep in os.fspath(spec).split(":")[0] or path.suffix:
        raise FileNotFoundError(f"image data must be an existing .npz or folder, got {os.fspath(spec)!r}")
    return _torchvision(os.fspath(spec), image_size)


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Bool [N]: ``fraction`` of every class (rounded; none of a class with one image), chosen from ``seed``."""
    state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = state.permutation(np.flatnonzero(labels == label))
        held_out[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return held_out


def _select(source: Source, labels: np.ndarray, items: np.ndarray) -> tuple[Source, np.ndarray]:
    if isinstance(source, ArraySource):
        return ArraySource(source(items)), labels[items]
    return (lambda numbers: source(items[numbers])), labels[items]


def _divide(source: Source, labels: np.ndarray, is_val: np.ndarray) -> list[tuple[Source, np.ndarray]]:
    return [_select(source, labels, np.flatnonzero(part)) for part in (~is_val, is_val)]


def _digits(image_size: int | None, seed: int, val_fraction: float) -> ImageData:
    digits = require_package("sklearn.datasets", "scikit-learn", "data 'digits'").load_digits()
    pixels = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]  # 0..16 -> 0..255
    size = image_size or pixels.shape[-1]
    splits = _divide(ArraySource(resize(pixels, size)), digits.target, hold_out(digits.target, val_fraction, seed))
    return make_data("digits", splits, image_size=size, channels=1)


def _pixels(array: np.ndarray, key: str, path: Path) -> Tensor:
    """uint8 [N, C, H, W] of an array in any of the layouts that :func:`load_images` names."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(
            f"{key} in {path} must be [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, "
            f"got {list(array.shape)}"
        )
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min(initial=0) >= 0 and array.max(initial=0) <= 1):
            raise ValueError(f"{key} in {path} must be in 0..1 when it is floating point, got values outside")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{key} in {path} must be uint8 or floating point, got {array.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array))


def _npz(path: Path, image_size: int | None, seed: int, val_fraction: float) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole .npz of plain arrays: {error}") from error
    if arrays.keys() >= _JPEG_KEYS:
        return _jpeg_npz(path, arrays, image_size, seed, val_fraction)
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        pairs = [(f"x_{part}", f"y_{part}") for part in ("train", "test")]
    else:
        image_key = next((key for key in _IMAGE_KEYS if key in arrays), None)
        label_key = next((key for key in _LABEL_KEYS if key in arrays), None)
        if image_key is None or label_key is None:
            raise ValueError(
                f"{path} must hold images and labels, x and y, or x_train, y_train, x_test, y_test, "
                f"got {sorted(arrays)}"
            )
        pairs = [(image_key, label_key)]
    loaded = []
    for image_key, label_key in pairs:
        pixels, labels = _pixels(arrays[image_key], image_key, path), arrays[label_key].reshape(-1)
        if len(pixels) != len(labels):
            raise ValueError(f"{label_key} in {path} must have {len(pixels)} entries as {image_key}, got {len(labels)}")
        size = image_size or min(pixels.shape[2:])
        loaded.append((ArraySource(resize(pixels, size)), labels))
    if len(loaded) == 1:
        source, labels = loaded[0]
        loaded = _divide(source, labels, _is_test(arrays, labels, seed, val_fraction, path))
    return make_data(path.name, loaded, image_size=size, channels=pixels.shape[1])


def _is_test(
    arrays: Mapping[str, np.ndarray], labels: np.ndarray, seed: int, val_fraction: float, path: Path
) -> np.ndarray:
    if "is_test" not in arrays:
        return hold_out(labels, val_fraction, seed)
    if arrays["is_test"].shape != labels.shape:
        raise ValueError(f"is_test in {path} must have shape {list(labels.shape)}, got {list(arrays['is_test'].shape)}")
    return arrays["is_test"].astype(bool)


def _jpeg_npz(
    path: Path, arrays: Mapping[str, np.ndarray], image_size: int | None, seed: int, val_fraction: float
) -> ImageData:
    header, body, offset, labels = arrays["header"].tobytes(), arrays["body"], arrays["offset"], arrays["label"]
    if len(offset) != len(labels) + 1 or (np.diff(offset) < 0).any() or offset[0] < 0 or offset[-1] > len(body):
        raise ValueError(
            f"offset in {path} must be {len(labels) + 1} ascending places in body ({len(body)} bytes), "
            f"got {len(offset)} from {offset[:1]} to {offset[-1:]}"
        )
    image = require("PIL.Image", f"decoding the JPEG images of {path}")

    def open_image(item: int) -> Any:
        return image.open(io.BytesIO(header + body[offset[item] : offset[item + 1]].tobytes()))

    return _decoded(path.name, open_image, labels, _is_test(arrays, labels, seed, val_fraction, path), image_size)


def _decoded(
    name: str,
    open_image: Callable[[int], Any],
    labels: np.ndarray,
    is_val: np.ndarray,
    image_size: int | None,
    mirror: bool = True,
) -> ImageData:
    if not len(labels):
        raise ValueError(f"data {name} must hold images, got none")
    with open_image(0) as first:
        channels = 1 if first.mode in ("1", "L", "I;16") else 3
        size = image_size or min(first.size)
    source = DecodedSource(open_image, size, channels)
    return make_data(name, _divide(source, labels, is_val), image_size=size, channels=channels, mirror=mirror)


def _class_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Image files below the class subfolders of ``folder``, sorted, and the class name of each."""
    files, labels = [], []
    for subfolder in sorted(p for p in folder.iterdir() if p.is_dir()):
        found = sorted(p for p in subfolder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        files += found
        labels += [subfolder.name] * len(found)
    return files, labels


def _folder(path: Path, image_size: int | None, seed: int, val_fraction: float) -> ImageData:
    train = next((path / name for name in _TRAIN_FOLDERS if (path / name).is_dir()), None)
    val = next((path / name for name in _VAL_FOLDERS if (path / name).is_dir()), None)
    files, names = _class_files(train if train and val else path)
    train_count = len(files)
    if train and val:
        val_files, val_names = _class_files(val)
        files, names = files + val_files, names + val_names
    labels = np.array(names, dtype=np.str_)
    if not files:
        raise ValueError(f"image data {path} must hold a subfolder of images per class, got no image")
    image = require("PIL.Image", f"decoding the images of {path}")
    is_val = np.arange(len(files)) >= train_count if train and val else hold_out(labels, val_fraction, seed)
    return _decoded(path.name, lambda item: image.open(files[item]), labels, is_val, image_size)


def _torchvision(spec: str, image_size: int | None) -> ImageData:
    name, _, root = spec.partition(":")
    datasets = require_package(
        "torchvision.datasets",
        "torchvision",
        f"image data {spec!r} (no file or folder of that name, so taken as a torchvision data set)",
    )
    by_name = {key.lower(): key for key, kind in vars(datasets).items() if inspect.isclass(kind)}
    if name.lower() not in by_name:
        raise ValueError(f"image data must be 'digits', an .npz, a folder or a torchvision data set, got {spec!r}")
    kind = getattr(datasets, by_name[name.lower()])
    takes = inspect.signature(kind).parameters
    if "train" not in takes and "split" not in takes:
        raise ValueError(f"torchvision data set {kind.__name__} must have train and test splits to be used here")
    cache = Path(torch.hub.get_dir()).parent / "datasets"
    sets = []
    for train in (True, False):
        arguments = {"train": train} if "train" in takes else {"split": "train" if train else "test"}
        if "split" in takes and kind.__name__ in ("ImageNet", "Places365"):
            arguments["split"] = "train" if train else "val"
        if "download" in takes and not root:
            arguments["download"] = True
        sets.append(kind(root or cache, **arguments))
    labels = np.concatenate([_labels(part) for part in sets])
    train_count = len(sets[0])

    def open_image(item: int) -> Any:
        part, place = (sets[0], item) if item < train_count else (sets[1], item - train_count)
        return part[place][0]

    is_val = np.arange(len(labels)) >= train_count
    return _decoded(kind.__name__, open_image, labels, is_val, image_size, kind.__name__ not in _NOT_MIRRORED)


def _labels(part: Any) -> np.ndarray:
    """Labels without decoding an image where the set keeps them in a list, as most do."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(part, name):
            return np.asarray(getattr(part, name)).reshape(-1)
    return np.array([part[item][1] for item in range(len(part))])
