"""What the test split, or other images, said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

Confusion = Sequence[Sequence[int]]  # (true class, predicted class, images), those with images only


@dataclass(frozen=True)
class TestResult:
    """What the test split, or other images, said, once per seed.

    Args:
        blocks: the tuned parts, in the network's order.
        accuracies: accuracy in [0, 1] per seed; missing where a training diverged.
        n_test: number of images.
        uses: how often this study has used these images so far, this time included.
        balanced_accuracies: mean over the classes of each class's accuracy, per seed.
        losses: mean cross-entropy per seed.
        confusion: images by true class (index) and predicted class (columns), summed over seeds.
    """

    __test__ = False  # the name is no pytest class

    blocks: tuple[str, ...]
    accuracies: tuple[float, ...]
    n_test: int
    uses: int
    balanced_accuracies: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    confusion: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    mean: float = field(init=False)
    std: float = field(init=False)

    def __post_init__(self) -> None:
        values = pd.Series(self.accuracies, dtype=float)
        object.__setattr__(self, "mean", float(values.mean(skipna=False)))
        object.__setattr__(self, "std", float(values.std(ddof=1, skipna=False)) if len(values) > 1 else math.nan)

    def per_class(self) -> pd.DataFrame:
        """Which classes are recognized: one row each, over all seeds.

        Returns:
            Index `class`; `images` of it, `accuracy` (share of them that is recognized, also called recall),
            `precision` (share of what is taken for it that is it; missing where nothing is), `taken_for` (the class
            that it is most often mistaken for; None where it never is).
        """
        if self.confusion is None:
            raise ValueError("there is no confusion matrix; every training diverged")
        counts, seeds = self.confusion.to_numpy(), int(np.isfinite(self.accuracies).sum())  # those that gave a score
        right, wrong = np.diag(counts).astype(float), counts - np.diag(np.diag(counts))
        with np.errstate(invalid="ignore"):
            table = {"images": counts.sum(1) // max(1, seeds), "accuracy": right / counts.sum(1)}
            table["precision"] = right / counts.sum(0)
        names = self.confusion.columns
        table["taken_for"] = [names[row.argmax()] if row.any() else None for row in wrong]
        return pd.DataFrame(table, index=self.confusion.index.rename("class"))


def confusion_table(counts: Sequence[Confusion | None], classes: Sequence[str]) -> pd.DataFrame | None:
    """Images by true class (index) and predicted class (columns), summed over seeds; None where no seed has any."""
    table = np.zeros((len(classes), len(classes)), dtype=int)
    for entries in (one for one in counts if one is not None):
        for true, predicted, images in entries:
            table[true, predicted] += images
    names = pd.Index(classes, name="true"), pd.Index(classes, name="predicted")
    return pd.DataFrame(table, *names) if any(one is not None for one in counts) else None
