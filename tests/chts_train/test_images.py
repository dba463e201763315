"""Images: every source, splits, normalisation, augmentation, resuming. No file outside tmp_path is needed."""

from __future__ import annotations

import io
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import chts_train.data.images as images_module
from chts_train.data import ImageBatches, ImageData, load_images
from chts_train.data.image_files import hold_out
from chts_train.data.images import ArraySource, augment, make_data, resize

Image = pytest.importorskip("PIL.Image")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def all_pixels(data: ImageData) -> Tensor:
    return torch.cat([part.pixels(np.arange(len(part))) for part in (data.train, data.val)])


def plain_data(count: int = 20, size: int = 8, channels: int = 3) -> ImageData:
    pixels = torch.from_numpy(noise(count, channels, size, size))
    labels = np.arange(count) % 4
    return make_data("noise", [(ArraySource(pixels), labels)] * 2, image_size=size, channels=channels)


# Sources


def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = load_images("digits")
    assert (data.image_size, data.channels, data.num_classes) == (8, 1, 10)
    assert len(data.train) + len(data.val) == 1797
    pixels = all_pixels(data)
    assert (pixels.min(), pixels.max(), pixels.dtype) == (0, 255, torch.uint8)
    assert not data.train.mirror
    assert "1 x 8 x 8" in data.describe()
    assert load_images("digits", 16).train.pixels(np.arange(2)).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("layout", ["nhw", "nhwc", "nchw", "float"])
def test_npz_layouts(tmp_path: Path, layout: str) -> None:
    array = noise(12, 3, 6, 6) if layout != "nhw" else noise(12, 1, 6, 6)
    stored = {"nhw": array[:, 0], "nhwc": array.transpose(0, 2, 3, 1), "nchw": array, "float": array / 255}[layout]
    np.savez(tmp_path / "a.npz", images=stored, labels=np.arange(12) % 3, is_test=np.arange(12) >= 9)
    data = load_images(tmp_path / "a.npz")
    assert (len(data.train), len(data.val), data.num_classes, data.channels) == (9, 3, 3, array.shape[1])
    assert torch.equal(all_pixels(data), torch.from_numpy(array))
    assert data.train.labels.tolist() == [0, 1, 2] * 3
    assert data.train.mirror == (layout != "nhw")


def test_npz_with_both_splits_and_any_labels(tmp_path: Path) -> None:
    x, y = noise(8, 5, 5), np.array([3, 7, 7, 3, 9, 9, 3, 7])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y[:, None], x_test=x[:2], y_test=y[:2])
    data = load_images(str(tmp_path / "a.npz"))
    assert data.num_classes == 3
    assert data.train.labels.tolist() == [0, 1, 1, 0, 2, 2, 0, 1]
    assert data.val.labels.tolist() == [0, 1]


def test_npz_split_is_stratified_and_seeded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=noise(100, 4, 4), y=np.repeat([0, 1], [80, 20]))
    data = load_images(tmp_path / "a.npz", val_fraction=0.2)
    assert data.val.labels.bincount().tolist() == [16, 4]
    again, other = (load_images(tmp_path / "a.npz", seed=s, val_fraction=0.2) for s in (42, 43))
    assert torch.equal(all_pixels(again), all_pixels(data))
    assert not torch.equal(all_pixels(other), all_pixels(data))


def test_hold_out_leaves_every_class_in_train() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    held_out = hold_out(labels, 0.99, 0)
    assert set(labels[~held_out]) == {0, 1, 2}
    assert np.bincount(labels[held_out], minlength=3).tolist() == [0, 1, 2]


def test_jpeg_npz(tmp_path: Path) -> None:
    """The header that all JPEG files of one size share is stored once."""
    files, colours = [], [(200, 30, 30), (30, 200, 30), (30, 30, 200), (90, 90, 90)]
    for colour in colours:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), colour).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    shared = len(os.path.commonprefix(files))
    bodies = [file[shared:] for file in files]
    np.savez(
        tmp_path / "c.npz",
        header=np.frombuffer(files[0][:shared], np.uint8),
        body=np.frombuffer(b"".join(bodies), np.uint8),
        offset=np.cumsum([0, *map(len, bodies)]),
        label=np.array([0, 1, 0, 1], np.uint8),
        is_test=np.array([False, False, True, True]),
    )
    data = load_images(tmp_path / "c.npz")
    assert (len(data.train), len(data.val), data.channels, data.image_size) == (2, 2, 3, 16)
    means = all_pixels(data).float().mean((2, 3))
    torch.testing.assert_close(means, torch.tensor(colours).float(), rtol=0, atol=6)


def folder_of(path: Path, classes: dict[str, list[tuple[int, int]]], colour: int = 100) -> None:
    for name, shapes in classes.items():
        (path / name).mkdir(parents=True)
        for i, shape in enumerate(shapes):
            Image.new("RGB", shape, (colour, 10 * i, 0)).save(path / name / f"{i}.png")


def test_class_folders(tmp_path: Path) -> None:
    folder_of(tmp_path, {"cat": [(12, 8)] * 5, "dog": [(8, 8)] * 5})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = load_images(tmp_path, val_fraction=0.2)
    assert (len(data.train), len(data.val), data.num_classes, data.image_size) == (8, 2, 2, 8)
    assert load_images(tmp_path, 4).train.pixels(np.arange(1)).shape == (1, 3, 4, 4)
    assert (all_pixels(data)[:, 0] == 100).all()


def test_folders_of_both_splits(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", {"cat": [(8, 8)] * 2, "dog": [(8, 8)]}, colour=50)
    folder_of(tmp_path / "val", {"dog": [(8, 8)]}, colour=60)
    data = load_images(tmp_path)
    assert data.train.labels.tolist() == [0, 0, 1]
    assert data.val.labels.tolist() == [1]
    assert (data.val.pixels(np.arange(1))[:, 0] == 60).all()


def test_large_sets_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, {"a": [(8, 8)] * 6, "b": [(8, 8)] * 6})
    held = load_images(tmp_path)
    monkeypatch.setattr(images_module, "_KEEP_BYTES", 0)
    read = load_images(tmp_path)
    assert isinstance(held.train.pixels, ArraySource)
    assert not isinstance(read.train.pixels, ArraySource)
    assert torch.equal(all_pixels(held), all_pixels(read))
    for a, b in zip(ImageBatches.eval_batches(held.val, 3), ImageBatches.eval_batches(read.val, 3), strict=True):
        assert torch.equal(a[0], b[0])


def fake_torchvision(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    class Shapes:
        """With a bool for the split, and its labels in a list."""

        def __init__(self, root: Any, train: bool = True, download: bool = False) -> None:
            calls.append({"root": root, "train": train, "download": download})
            self.count = 6 if train else 2
            self.targets = [i % 2 for i in range(self.count)]

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, item: int) -> tuple[Any, int]:
            return Image.new("RGB", (8, 8), (item, self.count, 0)), self.targets[item]

    class SVHN(Shapes):
        """With a name for the split, and no list of labels."""

        def __init__(self, root: Any, split: str = "train") -> None:
            super().__init__(root, split == "train")
            self.classes_of, self.targets = self.targets, None
            del self.targets

        def __getitem__(self, item: int) -> tuple[Any, int]:
            return Image.new("RGB", (8, 8), (item, self.count, 0)), self.classes_of[item]

    class Unsplit:
        def __init__(self, root: Any) -> None: ...

    package, module = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    module.Shapes, module.SVHN, module.Unsplit = Shapes, SVHN, Unsplit
    package.datasets = module
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    return calls


def test_torchvision_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_torchvision(monkeypatch)
    data = load_images("shapes")
    assert [call["download"] for call in calls] == [True, True]
    assert (len(data.train), len(data.val), data.num_classes, data.name) == (6, 2, 2, "Shapes")
    assert all_pixels(data)[:, :2, 0, 0].tolist() == [*([i, 6] for i in range(6)), [0, 2], [1, 2]]
    assert data.train.mirror
    svhn = load_images("SVHN:some/where")
    assert calls[-1] == {"root": "some/where", "train": False, "download": False}
    assert svhn.val.labels.tolist() == [0, 1]
    assert not svhn.train.mirror
    with pytest.raises(ValueError, match="'digits', an .npz, a folder or a torchvision data set, got 'nonsense'"):
        load_images("nonsense")
    with pytest.raises(ValueError, match="Unsplit must have train and test splits"):
        load_images("unsplit")


@pytest.mark.parametrize(
    ("spec", "module", "message"),
    [
        ("digits", "sklearn.datasets", "data 'digits' needs the package scikit-learn: pip install scikit-learn"),
        (
            "CIFAR10",
            "torchvision.datasets",
            r"'CIFAR10' \(no file or folder .*package torchvision: pip install torchvision",
        ),
        ("folder", "PIL.Image", r'needs the package PIL: pip install "chts\[train\]"'),
    ],
)
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str, module: str, message: str
) -> None:
    folder_of(tmp_path, {"a": [(8, 8)]})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        load_images(tmp_path if spec == "folder" else spec)


def test_argument_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size must be positive or None, got 0"):
        load_images("digits", 0)
    with pytest.raises(ValueError, match=r"val_fraction must be in \(0, 1\), got 1"):
        load_images("digits", val_fraction=1)
    for spec in ("some/where", "missing.npz"):
        with pytest.raises(FileNotFoundError, match=f"must be an existing .npz or folder, got '{spec}'"):
            load_images(spec)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"must be an .npz or a folder, got the file '.*a.txt'"):
        load_images(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="must hold a subfolder of images per class, got no image"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": noise(3)}, r"must hold images and labels, x and y, .*got \['a'\]"),
        ({"x": noise(3, 4), "y": noise(3)}, r"x in .* must be \[N, H, W\].* got \[3, 4\]"),
        ({"x": noise(3, 2, 4, 4), "y": noise(3)}, r"with 1 or 3 channels, got \[3, 2, 4, 4\]"),
        ({"x": noise(3, 4, 4).astype(int), "y": noise(3)}, "x in .* must be uint8 or floating point, got int64"),
        ({"x": noise(3, 4, 4) * 2.0, "y": noise(3)}, r"x in .* must be in 0..1 when it is floating point"),
        ({"x": noise(3, 4, 4), "y": noise(2)}, "y in .* must have 3 entries as x, got 2"),
        ({"x": noise(3, 4, 4), "y": noise(3), "is_test": noise(2)}, r"is_test in .* must have shape \[3\], got \[2\]"),
        ({"x": noise(3, 4, 4), "y": np.arange(3)}, "must hold val images, got none"),
        (
            {"x_train": noise(3, 4, 4), "y_train": np.arange(3), "x_test": noise(1, 4, 4), "y_test": np.array([9])},
            "val labels of data a.npz must occur in train, got 9",
        ),
        (
            {"header": noise(1), "body": noise(9), "offset": np.array([0, 5, 10]), "label": noise(2)},
            r"offset in .* must be 3 ascending places in body \(9 bytes\)",
        ),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "a.npz")


def test_broken_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=noise(9, 8, 8), y=noise(9))
    (tmp_path / "a.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match="a.npz is not a whole .npz of plain arrays"):
        load_images(tmp_path / "a.npz")


# Pixels


def test_resize_keeps_the_middle() -> None:
    pixels = torch.zeros(2, 1, 4, 8, dtype=torch.uint8)
    pixels[:, :, :, 2:6] = 200
    assert torch.equal(resize(pixels, 4), torch.full((2, 1, 4, 4), 200, dtype=torch.uint8))
    assert resize(pixels, 7).shape == (2, 1, 7, 7)
    square = torch.from_numpy(noise(2, 3, 5, 5))
    assert resize(square, 5) is square


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**31))
def test_augment_against_slicing(size: int, margin: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 2, size, size), generator=generator).to(torch.uint8)
    shift = torch.randint(0, 2 * margin + 1, (4, 2), generator=generator)
    flip = torch.randint(0, 2, (4,), generator=generator).bool()
    out = augment(pixels, shift, flip, margin)
    for i in range(4):
        padded = torch.zeros(2, size + 2 * margin, size + 2 * margin, dtype=torch.uint8)
        padded[:, margin : margin + size, margin : margin + size] = pixels[i]
        top, left = shift[i].tolist()
        expected = padded[:, top : top + size, left : left + size]
        assert torch.equal(out[i], expected.flip(-1) if flip[i] else expected)


def test_normalised_by_the_train_split() -> None:
    data = plain_data(count=50)
    x = torch.cat([x for x, _ in ImageBatches.eval_batches(data.train, 16)])
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-5, atol=0)


def test_constant_images_do_not_divide_by_zero() -> None:
    pixels = torch.full((4, 1, 3, 3), 7, dtype=torch.uint8)
    data = make_data("flat", [(ArraySource(pixels), np.arange(4))] * 2, image_size=3, channels=1)
    x, _ = next(ImageBatches(data.train, 4))
    assert torch.equal(x, torch.zeros_like(x))


# Batches


def test_an_epoch_has_every_image_once() -> None:
    data = plain_data(count=20)
    batches = ImageBatches(data.train, 6, seed=1, shuffle=True)
    rows = torch.cat([next(batches)[0] for _ in range(10)])  # 60 images: three epochs, batches across their ends
    for epoch in range(3):
        part = rows[20 * epoch : 20 * epoch + 20]
        assert len(torch.unique(part, dim=0)) == 20
    assert not torch.equal(rows[:20], rows[20:40])
    x, y = next(ImageBatches(data.train, 5, shuffle=False))
    assert (x.shape, y.tolist(), y.dtype) == ((5, 3, 8, 8), [0, 1, 2, 3, 0], torch.int64)


@pytest.mark.parametrize("with_augment", [False, True])
@given(skip=st.integers(0, 12))
def test_resuming_goes_on_with_the_same_batches(with_augment: bool, skip: int) -> None:
    data = plain_data(count=10)
    batches = ImageBatches(data.train, 4, seed=2, augment=with_augment)
    for _ in range(skip):
        next(batches)
    state = json.loads(json.dumps(batches.state_dict()))
    expected = [next(batches) for _ in range(6)]
    resumed = ImageBatches(data.train, 4, seed=2, augment=with_augment)
    resumed.load_state_dict(state)
    for (x, y), (x2, y2) in zip(expected, (next(resumed) for _ in range(6)), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_augmentation_is_drawn_per_seed_epoch_and_image() -> None:
    data = plain_data(count=12, size=16)

    def epochs(seed: int, batch_size: int) -> list[Tensor]:
        batches = ImageBatches(data.train, batch_size, seed, shuffle=False, augment=True)
        rows = torch.cat([next(batches)[0] for _ in range(24 // batch_size)])
        return [rows[:12], rows[12:]]

    first, second = epochs(0, 4)
    assert torch.equal(first, epochs(0, 6)[0])  # whatever batch an image is in
    assert not torch.equal(first, second)
    assert not torch.equal(first, epochs(1, 4)[0])


def test_grey_images_are_not_mirrored() -> None:
    pixels = torch.zeros(60, 1, 4, 4, dtype=torch.uint8)
    pixels[..., 0] = 255  # size 4 leaves no margin: without a flip nothing moves
    data = make_data("grey", [(ArraySource(pixels), np.zeros(60))] * 2, image_size=4, channels=1)
    x, _ = next(ImageBatches(data.train, 60, augment=True))
    assert (x[..., 0] > x[..., 3]).all()
    colour = make_data(
        "colour", [(ArraySource(pixels.expand(-1, 3, -1, -1)), np.zeros(60))] * 2, image_size=4, channels=3
    )
    x, _ = next(ImageBatches(colour.train, 60, augment=True))
    assert 10 < (x[:, 0, 0, 0] < x[:, 0, 0, 3]).sum() < 50


def test_eval_limit_and_state_errors() -> None:
    data = plain_data(count=20)
    labels = torch.cat([y for _, y in ImageBatches.eval_batches(data.val, 4, max_images=5)])
    assert labels.tolist() == data.val.labels[[0, 4, 8, 12, 16]].tolist()
    state = ImageBatches(data.train, 4).state_dict()
    with pytest.raises(ValueError, match="the state has augment=False, these batches have augment=True"):
        ImageBatches(data.train, 4, augment=True).load_state_dict(state)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ImageBatches(data.train, 0)
