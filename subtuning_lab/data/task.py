"""Tasks: labelled images with a training part, a held-out test part, and folds for selection."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

from subtuning_lab.data.arrays import as_images, as_integers, check_labels, check_number, check_validation
from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.images import StreamedImages, common_size, default_memory_limit, load_images
from subtuning_lab.data.load import list_images, parse_spec, task_names
from subtuning_lab.data.splits import HOLDOUT, Listing, stratified_choice

__all__ = ["Split", "Task", "load_task", "task_names"]


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Args:
        images: uint8 tensor (n, 3, H, W), or `StreamedImages`, which indexes like one.
        labels: int64 tensor (n,).
    """

    images: torch.Tensor | StreamedImages
    labels: torch.Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"images must be uint8 (n, 3, H, W), got {self.images.dtype} {shape}")
        if self.labels.dtype != torch.int64 or self.labels.dim() != 1:
            raise ValueError(f"labels must be int64 (n,), got {self.labels.dtype} {tuple(self.labels.shape)}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")
        if len(self.labels) == 0:
            raise ValueError("a split needs at least one image")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: torch.Tensor) -> Split:
        """The images at `indices` (int64 (k,)) as a new split; streamed images stay undecoded."""
        images = self.images.take(indices) if isinstance(self.images, StreamedImages) else self.images[indices]
        return Split(images, self.labels[indices])


@dataclass(frozen=True, eq=False)
class Task:
    """What a backbone is adapted to: selection sees folds of `train` only, `test` is for the end.

    Args:
        name: shown in tables; not part of the fingerprint.
        classes: class names; label i means classes[i].
        train: training images; every class must occur.
        test: held-out images of the same size, or None.
        validation: int64 indices into train of an official validation part, or None.
    Raises:
        ValueError: fewer than two classes, a class without training images, a label out of range, sizes that differ.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split | None
    validation: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"a task needs at least two classes, got {list(self.classes)}")
        for part, split in (("train", self.train), ("test", self.test)):
            if split is not None:
                check_labels(split.labels, self.classes, part)
        counts = torch.bincount(self.train.labels, minlength=self.num_classes)
        if (counts == 0).any():
            raise ValueError(f"class {self.classes[int(counts.argmin())]!r} has no training images")
        if self.test is not None and self.test.images.shape[1:] != self.train.images.shape[1:]:
            raise ValueError(
                f"train and test images differ in size: {self.image_size}, {tuple(self.test.images.shape[2:])}"
            )
        if self.validation is not None:
            check_validation(self.validation, len(self.train))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return tuple(self.train.images.shape[2:])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that scores depend on: images (file bytes when streamed), labels, classes, parts."""
        digest = hashlib.sha256(repr((self.classes, self.image_size)).encode())
        for split in (self.train, self.test):
            digest.update(b"none" if split is None else repr(tuple(split.images.shape)).encode())
            if split is not None:
                _digest_images(digest, split.images)
                digest.update(split.labels.numpy().tobytes())
        digest.update(b"none" if self.validation is None else self.validation.numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray | torch.Tensor,
        labels: np.ndarray | torch.Tensor | Sequence[int],
        test_images: np.ndarray | torch.Tensor | None = None,
        test_labels: np.ndarray | torch.Tensor | Sequence[int] | None = None,
        *,
        classes: Sequence[str] | None = None,
        name: str = "arrays",
        validation: np.ndarray | torch.Tensor | Sequence[int] | None = None,
    ) -> Task:
        """Make a task from arrays in memory.

        Args:
            images: uint8, or floating point in [0, 1]: (n, 3, H, W), (n, H, W, 3), or grey (n, H, W).
            labels: ints (n,) from 0 on.
            test_images, test_labels: likewise, both or neither.
            classes: names; "0", "1", ... by default.
            name: of the task.
            validation: indices into `images` of a validation part.
        Raises:
            ValueError: wrong shape or range, NaN (the first bad image's index is named), lengths that differ.
            TypeError: a dtype that is neither uint8 nor floating point, or labels that are not integers.
        """
        if (test_images is None) != (test_labels is None):
            raise ValueError("give test_images and test_labels both, or neither")
        train = Split(as_images(images, "images"), as_integers(labels, "labels"))
        test = None
        if test_images is not None and test_labels is not None:
            test = Split(as_images(test_images, "test_images"), as_integers(test_labels, "test_labels"))
        if classes is None:
            classes = [str(label) for label in range(int(train.labels.max()) + 1)]
        held = None if validation is None else as_integers(validation, "validation")
        return cls(name, tuple(classes), train, test, held)

    def folds(self, k: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Split `train` for cross-validation: stratified, disjoint, complete.

        Args:
            k: number of folds; 1 means one split: the official validation part, else a stratified 20 % holdout.
            seed: of the shuffling; the same seed gives the same folds.
        Returns:
            k pairs (train_indices, validation_indices), int64 and sorted.
        Raises:
            ValueError: k below 1, or a class with fewer than k images (two for a holdout); it is named.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be an integer >= 1, got {k!r}")
        if k == 1 and self.validation is not None:
            held = self.validation.sort().values
            everything = torch.arange(len(self.train))
            return [(everything[~torch.isin(everything, held)], held)]
        splitter = self._splitter(k, seed)
        pairs = splitter.split(np.zeros(len(self.train)), self.train.labels.numpy())
        return [tuple(torch.from_numpy(np.sort(part)) for part in pair) for pair in pairs]

    def _splitter(self, k: int, seed: int) -> StratifiedKFold | StratifiedShuffleSplit:
        """The scikit-learn splitter for `folds`, after checking that every class has images enough."""
        counts = torch.bincount(self.train.labels, minlength=self.num_classes)
        fewest, needed = int(counts.argmin()), max(k, 2)
        if counts[fewest] < needed:
            raise ValueError(
                f"class {self.classes[fewest]!r} has {int(counts[fewest])} training images; "
                f"k={k} needs at least {needed} of every class"
            )
        if k > 1:
            return StratifiedKFold(k, shuffle=True, random_state=seed)
        held = round(HOLDOUT * len(self.train))
        if held < self.num_classes:
            raise ValueError(
                f"a 20 % holdout of {len(self.train)} images has {held}, fewer than the {self.num_classes} classes; "
                "use k >= 2"
            )
        return StratifiedShuffleSplit(1, test_size=held, random_state=seed)

    def subset(self, train_size: int, seed: int = 0) -> Task:
        """The task with fewer training images: stratified, every class at least once; test stays as it is.

        Args:
            train_size: number of training images to keep.
            seed: of the choice.
        Returns:
            A new task; without `validation`, unless all images are kept.
        Raises:
            ValueError: train_size below the number of classes or above the number of training images.
        """
        check_number("train_size", train_size, 2)
        if train_size == len(self.train):
            return self
        chosen = stratified_choice(self.train.labels.numpy(), train_size, seed, "train_size")
        return replace(self, train=self.train.take(torch.from_numpy(chosen)), validation=None)


def _digest_images(digest: hashlib._Hash, images: torch.Tensor | StreamedImages) -> None:
    """Feed images to a hash."""
    if isinstance(images, StreamedImages):
        images.update_digest(digest)
    else:
        digest.update(np.ascontiguousarray(images.cpu().numpy()))


def load_task(
    spec: str,
    *,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
    data_dir: str | Path | None = None,
    download: bool = True,
    memory_limit: int | None = None,
    progress: bool = True,
) -> Task:
    """Load a task by name, from a folder of images, from VTAB-1k's lists, or from CIFAR-10-C's arrays.

    Images are decoded once, in parallel.

    Published splits are used where there are any. Else 20 % are held out for testing: stratified, and the same ones
    whatever `seed` says. `folder:DIR` takes DIR/train and DIR/test (or DIR/val where there is no test), or class
    folders directly in DIR. Only images that were chosen are decoded.

    Args:
        spec: a name of `task_names()`, `folder:DIR`, `vtab:DIR` or `cifar10c:DIR/NAME@SEVERITY`, then any number of
            `+corruption@severity`, applied to training and test images at their final size.
        train_size, test_size: how many images to choose, stratified; None takes all (1,000 of a generated task).
        seed: of that choice, and of the training images of a generated task.
        image_size: pixels; the shorter side is scaled to it and the centre cut out. None keeps the images' own size
            if it is the same for all chosen ones and at most 256, else means 224.
        data_dir: folder of downloaded data sets; None takes $SUBTUNING_LAB_DATA, else ~/.cache/subtuning_lab.
        download: whether missing data sets may be downloaded.
        memory_limit: bytes of decoded images, beyond which a split is decoded on demand; None: half of what is free.
        progress: whether to show progress bars on stderr.
    Returns:
        The task, named `spec`.
    Raises:
        ValueError: an unknown name, a number out of range, a damaged image, a class without images, a bad line.
        TypeError: a number that is not an int, a spec that is not a string.
        FileNotFoundError: a missing folder, list, image or data set.
        ConnectionError: a download failed.
    """
    check_number("train_size", train_size, 2)
    check_number("test_size", test_size, 1)
    check_number("image_size", image_size, 1)
    check_number("memory_limit", memory_limit, 0)
    check_number("seed", seed, 0, 2**31 - 1)
    base, corruptions = parse_spec(spec)
    listing = list_images(base, train_size or 1000, test_size or 1000, seed, data_dir, download)
    chosen = listing.choose(train_size, test_size, seed)
    size = (image_size, image_size) if image_size else common_size([chosen.train.items, chosen.test.items])
    limit = default_memory_limit() if memory_limit is None else memory_limit
    train, test = _load_splits(chosen, size, limit, corruptions, base if progress else None)
    held = chosen.validation
    return Task(spec, chosen.classes, train, test, None if held is None else torch.from_numpy(held))


def _load_splits(
    listing: Listing,
    size: tuple[int, int],
    limit: int,
    corruptions: Sequence[tuple[str, int]],
    progress: str | None,
) -> list[Split]:
    """Decode and corrupt train and test, while the memory limit (bytes, for both together) allows."""
    splits = []
    for number, (label, part) in enumerate((("train", listing.train), ("test", listing.test))):
        images = load_images(part.items, size, limit, progress and f"{progress} {label}")
        limit -= 0 if isinstance(images, StreamedImages) else images.numel()
        splits.append(Split(_corrupted(images, corruptions, number), torch.from_numpy(part.labels)))
    return splits


def _corrupted(
    images: torch.Tensor | StreamedImages, corruptions: Sequence[tuple[str, int]], part: int
) -> torch.Tensor | StreamedImages:
    """Apply corruptions in order, each with its own noise; `part` keeps train's and test's noise apart."""
    seeded = tuple((name, severity, 2 * number + part) for number, (name, severity) in enumerate(corruptions))
    if isinstance(images, StreamedImages):
        return replace(images, corruptions=seeded)
    for name, severity, seed in seeded:
        images = corrupt(images, name, severity, seed=seed)
    return images
