"""Tasks: labelled images with a training part, a held-out test part, and folds for selection."""

from __future__ import annotations

import hashlib
import unicodedata
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import numpy as np
import torch

from subtuning_lab.data.arrays import (
    MOST_CLASSES,
    as_images,
    as_integers,
    check_labels,
    check_uint8_rgb,
    check_validation,
    numbered_classes,
)
from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.images import Items, StreamedImages, count_shared
from subtuning_lab.data.splits import fold_pairs, stratified_choice
from subtuning_lab.utils.text import printable
from subtuning_lab.utils.validation import Is, Several, Text, Whole, checked, shown

Integers = np.ndarray | torch.Tensor | Sequence[int]


@checked
@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Args:
        images: uint8 tensor (n, 3, H, W), or `StreamedImages`, which indexes like one.
        labels: int64 tensor (n,).
    """

    images: Annotated[torch.Tensor | StreamedImages, Is((torch.Tensor, StreamedImages))]
    labels: Annotated[torch.Tensor, Is(torch.Tensor)]

    def __post_init__(self) -> None:
        check_uint8_rgb(self.images)
        if self.labels.dtype != torch.int64 or self.labels.dim() != 1:
            raise ValueError(f"labels must be int64 (n,), got {self.labels.dtype} {tuple(self.labels.shape)}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")
        if len(self.labels) == 0:
            raise ValueError("a split needs at least one image")

    def __len__(self) -> int:
        return len(self.labels)

    @checked(indices=Is(torch.Tensor))
    def take(self, indices: torch.Tensor) -> Split:
        """The images at `indices` (int64 (k,)) as a new split; streamed images stay undecoded."""
        images = self.images.take(indices) if isinstance(self.images, StreamedImages) else self.images[indices]
        return Split(images, self.labels[indices])

    @checked(corruptions=Several(Is(tuple), least=0), part=Whole(0))
    def corrupted(self, corruptions: Sequence[tuple[str, int]], part: int) -> Split:
        """The split with (name, severity) corruptions applied in order, each with noise of its own.

        Args:
            part: 0 for training images, 1 for test images, so that their noise differs.
        """
        images = self.images
        for number, (name, severity) in enumerate(corruptions):
            seed = 2 * number + part
            if isinstance(images, StreamedImages):
                images = replace(images, corruptions=(*images.corruptions, (name, severity, seed)))
            else:
                images = corrupt(images, name, severity, seed=seed)
        return Split(images, self.labels)


@checked
@dataclass(frozen=True, eq=False)
class Task:
    """What a backbone is adapted to: selection sees folds of `train` only, `test` is for the end.

    Args:
        name: shown in tables; not part of the fingerprint.
        classes: class names, all different; label i means classes[i]. A class may lack training images.
        train: training images.
        test: held-out images of the same size, or None.
        validation: int64 indices into train of an official validation part, or None.
        source: the published images that `train` was taken from, where that is known: "cifar10/train", "cifar10/test",
            "imagenet/train"; "cifar10" alone where the part is not known. A backbone that was pretrained on these has
            seen the task, which its bounds and its scores don't allow for. Not part of the fingerprint.
    Raises:
        ValueError: names that hold control characters, a label out of range, sizes that differ.
    """

    name: Annotated[str, Text()]
    classes: Annotated[tuple[str, ...], Several(Text(), least=2, unique=True)]
    train: Split
    test: Split | None
    validation: Annotated[torch.Tensor | None, Is(torch.Tensor, none=True)] = None
    source: Annotated[str | None, Text(none=True)] = None

    def __post_init__(self) -> None:
        if isinstance(self.classes, Set):
            raise TypeError(f"classes is {shown(self.classes)}; it must be a list: a set has no order")
        object.__setattr__(self, "classes", tuple(str(name) for name in self.classes))
        if self.num_classes > MOST_CLASSES:
            raise ValueError(f"a task has at most {MOST_CLASSES} classes, got {self.num_classes}")
        if len({unicodedata.normalize("NFC", name) for name in self.classes}) < self.num_classes:
            raise ValueError(f"classes is {shown(self.classes)}; only Unicode's forms tell two of its names apart")
        for name in (self.name, *self.classes):
            if printable(name) != name:
                raise ValueError(f"name {name!r} has control characters, or bytes that are no UTF-8")
        for part, split in (("train", self.train), ("test", self.test)):
            if split is not None:
                check_labels(split.labels, self.classes, part)
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
    def class_counts(self) -> torch.Tensor:
        """Training images of every class; int64 (classes,)."""
        return torch.bincount(self.train.labels, minlength=self.num_classes)

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
    @checked(classes=Several(Text(), least=2, unique=True, none=True), name=Text())
    def from_arrays(
        cls,
        images: np.ndarray | torch.Tensor,
        labels: Integers,
        test_images: np.ndarray | torch.Tensor | None = None,
        test_labels: Integers | None = None,
        *,
        classes: Sequence[str] | None = None,
        name: str = "arrays",
        validation: Integers | None = None,
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
            ValueError: wrong shape or range, NaN (the first bad image's index is named), lengths that differ, a class
                without training images.
            TypeError: a dtype that is neither uint8 nor floating point, or labels that are not integers.
        Warns:
            UserWarning: test images that are training images, too.
        """
        if (test_images is None) != (test_labels is None):
            raise ValueError("give test_images and test_labels both, or neither")
        train = Split(as_images(images, "images"), as_integers(labels, "labels"))
        test = None
        if test_images is not None and test_labels is not None:
            test = Split(as_images(test_images, "test_images"), as_integers(test_labels, "test_labels"))
        held = None if validation is None else as_integers(validation, "validation")
        names = numbered_classes(train.labels) if classes is None else classes
        task = cls(name, names, train, test, held)
        if (task.class_counts == 0).any():
            raise ValueError(f"class {task.classes[int(task.class_counts.argmin())]!r} has no training images")
        if test is not None:
            warn_of_shared(train.images, test.images)
        return task

    @checked(k=Whole(1), seed=Whole(0, 2**32 - 1))
    def folds(self, k: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Split `train` for cross-validation: stratified, disjoint, complete.

        Args:
            k: number of folds; 1 means one split: the official validation part, else a stratified 20 % holdout.
            seed: of the shuffling; the same seed gives the same folds.
        Returns:
            k pairs (train_indices, validation_indices), int64 and sorted.

        Warns:
            UserWarning: a class with fewer images than folds, which then lacks in some of them.
        """
        if k == 1 and self.validation is not None:
            held = self.validation.sort().values
            everything = torch.arange(len(self.train))
            return [(everything[~torch.isin(everything, held)], held)]
        pairs = fold_pairs(self.train.labels.numpy(), self.classes, k, seed)
        return [tuple(torch.from_numpy(part) for part in pair) for pair in pairs]

    @checked(train_size=Whole(1), seed=Whole())
    def subset(self, train_size: int, seed: int = 0) -> Task:
        """The task with fewer training images: stratified, every class at least once; test stays as it is.

        Args:
            train_size: number of training images to keep.
            seed: of the choice.
        Returns:
            A new task; without `validation`, unless all images are kept.
        """
        if train_size == len(self.train):
            return self
        chosen = stratified_choice(self.train.labels.numpy(), int(train_size), int(seed), "train_size")
        return replace(self, train=self.train.take(torch.from_numpy(chosen)), validation=None)


def warn_of_shared(train: Items | torch.Tensor, test: Items | torch.Tensor) -> None:
    """Warns, with their number, of test images that are training images, too."""
    shared = count_shared(train, test)
    if shared:
        message = f"{shared} of {len(test)} test images are training images, too: test scores will be too high"
        warnings.warn(message, stacklevel=4)


def _digest_images(digest: hashlib._Hash, images: torch.Tensor | StreamedImages) -> None:
    """Feed images to a hash."""
    if isinstance(images, StreamedImages):
        images.update_digest(digest)
    else:
        digest.update(np.ascontiguousarray(images.cpu().numpy()))
