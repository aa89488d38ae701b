"""Listings of folders: images in torchvision's ImageFolder layout, the lists of VTAB-1k, the arrays of CIFAR-10-C."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from subtuning_lab.data.corruptions.registry import SEVERITIES
from subtuning_lab.data.decode import image_suffixes
from subtuning_lab.data.images import NpyRows
from subtuning_lab.data.splits import Listing, Part, seeded_split

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def folder(root: Path) -> Listing:
    """List `root/<class>/*` or `root/train/<class>/*` with `root/test` (preferred) or `root/val`.

    Raises:
        FileNotFoundError: no such folder, or no class folders in it.
        ValueError: a class without images, fewer than two classes, or a test class that train lacks.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"folder not found: {root}")
    if not (root / "train").is_dir():
        classes = class_folders(root)
        return Listing(classes, *seeded_split(*_list_classes(root, classes), classes))
    classes = class_folders(root / "train")
    train = Part(*_list_classes(root / "train", classes))
    held = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held is None:
        return Listing(classes, *seeded_split(train.items, train.labels, classes))
    if unknown := sorted(set(class_folders(held)) - set(classes)):
        raise ValueError(f"{held} has classes that {root / 'train'} lacks: {unknown}")
    return Listing(classes, train, Part(*_list_classes(held, classes)))


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the class folders in `root`, sorted; hidden ones don't count."""
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        raise FileNotFoundError(f"no class folders in {root}: expected {root}/<class>/<image files>")
    if len(names) < 2:
        raise ValueError(f"{root} has the one class {names[0]!r}; a task needs at least two")
    return names


def _list_classes(root: Path, classes: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    """All image files under `root/<class>`, sorted by class and name, with labels int64 (n,)."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if not (found := _image_files(root / name)):
            raise ValueError(f"class {name!r} has no images in {root / name}; allowed: {sorted(image_suffixes())}")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64)


def _image_files(root: Path) -> list[Path]:
    """Image files anywhere under `root`, sorted; hidden ones don't count."""
    return sorted(
        Path(parent) / name
        for parent, _, names in os.walk(root, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in image_suffixes() and not name.startswith(".")
    )


def vtab(root: Path) -> Listing:
    """List the 1,000 training images, 200 of them for validation, and the test images of a VTAB-1k folder.

    Args:
        root: folder with train800val200.txt, val200.txt and test.txt, whose lines are `path label`.
    Raises:
        FileNotFoundError: the folder or one of the lists is missing.
        ValueError: a bad line (file and number named), or a val200 image that train800val200 lacks.
    """
    train = _read_list(root, "train800val200.txt")
    n_classes = int(train.labels.max()) + 1
    validation, test = (_read_list(root, name, n_classes) for name in ("val200.txt", "test.txt"))
    where = {path: index for index, path in enumerate(train.items)}
    if missing := [path for path in validation.items if path not in where]:
        raise ValueError(f"{root / 'val200.txt'} lists {missing[0]}, which train800val200.txt lacks")
    indices = np.array([where[path] for path in validation.items], dtype=np.int64)
    return Listing(tuple(str(label) for label in range(n_classes)), train, test, indices)


def _read_list(root: Path, name: str, n_classes: int | None = None) -> Part:
    """Read one VTAB list: `path label` per line, paths relative to `root`, labels below `n_classes` if given."""
    if not (root / name).is_file():
        raise FileNotFoundError(f"{root / name} not found; vtab:DIR needs train800val200.txt, val200.txt and test.txt")
    files: list[Path] = []
    labels: list[int] = []
    for number, line in enumerate((root / name).read_text().splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise ValueError(f"{root / name}, line {number}: expected 'path label' with a label >= 0, got {line!r}")
        if n_classes is not None and int(label) >= n_classes:
            raise ValueError(f"{root / name}, line {number}: label {label}, but training labels end at {n_classes - 1}")
        files.append(root / path.strip())
        labels.append(int(label))
    if not files:
        raise ValueError(f"{root / name} lists no images")
    return Part(files, np.array(labels, dtype=np.int64))


def cifar10c(path: Path) -> Listing:
    """List one corruption of CIFAR-10-C at one severity; no image is read.

    The published files hold CIFAR-10's test images five times over, at severity 1, 2, ... 5. All have the same order,
    so that every corruption gets the same 80/20 split: no image is trained on under one and tested under another.

    Args:
        path: `root/NAME@SEVERITY`, for root/NAME.npy, uint8 (5 n, 32, 32, 3), and root/labels.npy, (5 n,).
    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        ValueError: a severity outside 1 to 5, a file of another shape or type, or a label outside 0 to 9.
    Source: Hendrycks and Dietterich (ICLR 2019), the published data.
    """
    root, (name, _, severity) = path.parent, path.name.rpartition("@")
    if not name or severity not in map(str, SEVERITIES):
        raise ValueError(
            f"cannot read 'cifar10c:{path}': write cifar10c:DIR/NAME@SEVERITY with a severity from 1 to 5, "
            "as in 'cifar10c:CIFAR-10-C/gaussian_noise@5'"
        )
    images, labels = _read_array(root, name), _read_array(root, "labels")
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or not len(images) or len(images) % len(SEVERITIES):
        raise ValueError(f"{root / name}.npy must be uint8 (5 n, 32, 32, 3), got {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(f"{root}/labels.npy must be ints ({len(images)},), got {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise ValueError(f"{root}/labels.npy must have labels from 0 to 9, got {labels.min()} to {labels.max()}")
    n = len(images) // len(SEVERITIES)
    rows = np.arange(n) + n * (int(severity) - 1)
    items = NpyRows(root / f"{name}.npy", rows)
    return Listing(CIFAR10_CLASSES, *seeded_split(items, labels[rows].astype(np.int64), CIFAR10_CLASSES))


def _read_array(root: Path, name: str) -> np.ndarray:
    """Map `root/name.npy` into memory."""
    if not root.is_dir():
        raise FileNotFoundError(f"folder not found: {root}")
    file = root / f"{name}.npy"
    if not file.is_file():
        found = sorted(path.stem for path in root.glob("*.npy"))
        raise FileNotFoundError(f"{file} not found; the .npy files of {root} are {found}")
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
