"""Listings of image folders: torchvision's ImageFolder layout, and the lists of VTAB-1k."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from subtuning_lab.images import IMAGE_SUFFIXES
from subtuning_lab.listings import Listing, Part, seeded_split


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
            raise ValueError(f"class {name!r} has no images in {root / name}; allowed: {sorted(IMAGE_SUFFIXES)}")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64)


def _image_files(root: Path) -> list[Path]:
    """Image files anywhere under `root`, sorted; hidden ones don't count."""
    return sorted(
        Path(parent) / name
        for parent, _, names in os.walk(root, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
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
