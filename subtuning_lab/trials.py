"""What one score is of, and what the test split said."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from subtuning_lab.recipe import Recipe


@dataclass(frozen=True)
class Trial:
    """One training: a subset, its recipe, the seed, and the fold; fold None means all training images."""

    blocks: tuple[str, ...]
    recipe: Recipe
    seed: int
    fold: int | None

    def steps(self, n_train: int) -> int:
        """Optimizer steps on so many training images, without early stopping."""
        return self.recipe.epochs * -(-n_train // self.recipe.batch_size)


@dataclass(frozen=True)
class TestResult:
    """What the test split said, once per seed.

    Args:
        blocks: the tuned parts, in the network's order.
        accuracies: test accuracy in [0, 1] per seed.
        n_test: number of test images.
        uses: how often this study's test split has been used so far, this time included.
    """

    __test__ = False  # the name is no pytest class

    blocks: tuple[str, ...]
    accuracies: tuple[float, ...]
    n_test: int
    uses: int
    mean: float = field(init=False)
    std: float = field(init=False)

    def __post_init__(self) -> None:
        values = pd.Series(self.accuracies)
        object.__setattr__(self, "mean", float(values.mean()))
        object.__setattr__(self, "std", float(values.std(ddof=1)) if len(values) > 1 else math.nan)
