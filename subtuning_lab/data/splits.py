"""Listings of images before anything is decoded, and stratified choices, splits and folds of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.model_selection import KFold, ShuffleSplit, StratifiedKFold, StratifiedShuffleSplit

from subtuning_lab.data.images import Items, take_items

SPLIT_SEED = 0  # of train/test splits that no one has published: the same test images whatever seed the caller gives
HOLDOUT = 0.2  # share of the test part in such splits


@dataclass(frozen=True, eq=False)
class Part:
    """Undecoded images with labels: files or uint8 images (n, H, W, 3), and int64 (n,)."""

    items: Items
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> Part:
        """The images at `indices` (int64 (k,))."""
        return Part(take_items(self.items, indices), self.labels[indices])

    def choose(self, size: int | None, seed: int, what: str) -> Part:
        """Some images by `stratified_choice`, or all for None; `what` names the size in messages."""
        if size is None or size == len(self.labels):
            return self
        return self.take(stratified_choice(self.labels, size, seed, what))


@dataclass(frozen=True, eq=False)
class Listing:
    """A task before its images are decoded.

    Args:
        classes, train, test: as of a `subtuning_lab.data.task.Task`.
        validation: int64 indices into train, or None.
        source: the published images that train consists of, where that is known; see `Task`.
    """

    classes: tuple[str, ...]
    train: Part
    test: Part
    validation: np.ndarray | None = None
    source: str | None = None

    def choose(self, train_size: int | None, test_size: int | None, seed: int) -> Listing:
        """Fewer images, stratified; `validation` stays only if all training images do. Raises ValueError."""
        train = self.train.choose(train_size, seed, "train_size")
        test = self.test.choose(test_size, seed, "test_size")
        return replace(self, train=train, test=test, validation=self.validation if train is self.train else None)


def stratified_choice(labels: np.ndarray, size: int, seed: int, what: str = "size") -> np.ndarray:
    """Choose `size` images at random, every class that occurs in proportion and at least once.

    Args:
        labels: int64 (n,), not negative.
        size: number of images to choose.
        seed: of the choice.
        what: the size's name, for messages.
    Returns:
        Sorted int64 indices (size,).
    Raises:
        ValueError: size below the number of classes that occur, or above n.
    """
    counts = np.bincount(labels)
    fewest = np.count_nonzero(counts)
    if not fewest <= size <= len(labels):
        raise ValueError(f"{what} must be {fewest} (one image of each class) to {len(labels)} (all images), got {size}")
    generator = np.random.default_rng(seed)
    quota = _shares(counts, size, generator)
    shuffled = generator.permutation(len(labels))
    ranked = [shuffled[labels[shuffled] == label][:share] for label, share in enumerate(quota)]
    return np.sort(np.concatenate(ranked)).astype(np.int64)


def _shares(counts: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Split `size` over classes in proportion to `counts`, at least 1 of each (largest remainders, ties by chance)."""
    exact = counts * (size / counts.sum())
    luck = 1e-9 * generator.random(len(counts))
    shares = np.clip(np.floor(exact).astype(np.int64), 1, counts)
    while (left := size - int(shares.sum())) != 0:
        step = 1 if left > 0 else -1
        movable = shares < counts if left > 0 else shares > 1
        gap = np.where(movable, (exact - shares) * step + luck, -np.inf)
        shares[int(gap.argmax())] += step
    return shares


def seeded_split(items: Items, labels: np.ndarray, classes: Sequence[str]) -> tuple[Part, Part]:
    """Split images without a published split into 80 % train and 20 % test, stratified, always in the same way.

    Raises:
        ValueError: a class with fewer than two images; it is named.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < 2:
        raise ValueError(f"class {classes[int(counts.argmin())]!r} has {counts.min()} images; a split needs at least 2")
    whole = Part(items, labels)
    size = max(len(classes), round(HOLDOUT * len(labels)))
    test = stratified_choice(labels, size, SPLIT_SEED)
    return whole.take(np.setdiff1d(np.arange(len(labels)), test)), whole.take(test)


def fold_pairs(labels: np.ndarray, classes: Sequence[str], k: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds for cross-validation: disjoint, complete, and stratified as far as rare classes allow.

    Args:
        labels: int64 (n,).
        classes: names, for the warning.
        k: number of folds; 1 means one stratified holdout of 20 %.
        seed: of the shuffling.
    Returns:
        k pairs (train_indices, validation_indices), int64 and sorted.
    """
    n, counts = len(labels), np.bincount(labels, minlength=len(classes))
    held, needed = round(HOLDOUT * n), max(k, 2)
    if n < needed:
        raise ValueError(f"k is {k}; it must be at most the number of training images, {n}")
    rare = np.flatnonzero((counts > 0) & (counts < needed))
    many = k == 1 and held < np.count_nonzero(counts)
    if len(rare):
        which = "1 class has" if len(rare) == 1 else f"{len(rare)} classes have"
        first = f"class {classes[rare[0]]!r} first ({counts[rare[0]]})"
        warnings.warn(f"{which} fewer than {needed} training images, {first}: not every fold has them", stacklevel=4)
    elif many:
        warnings.warn(f"a holdout of {held} images can't hold all {np.count_nonzero(counts)} classes", stacklevel=4)
    if k > 1:  # scikit-learn deals out rare classes as well as it can, unless all are rare
        kind = StratifiedKFold if counts.max() >= k else KFold
        splitter = kind(int(k), shuffle=True, random_state=int(seed))
    else:
        kind = ShuffleSplit if len(rare) or many else StratifiedShuffleSplit
        splitter = kind(1, test_size=max(1, held), random_state=int(seed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return [tuple(np.sort(part) for part in pair) for pair in splitter.split(np.zeros(n), labels)]
