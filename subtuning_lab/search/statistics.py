"""What tables of scores say: rank correlations with one bootstrap, and errors of means over folds. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from subtuning_lab.utils.validation import Real, Whole, checked

DIGITS = 12  # means are compared rounded: the order of a sum must not break a tie


def spearman(pairs: np.ndarray) -> np.ndarray:
    """Spearman's rank correlations of pairs (..., n, 2); missing where a column is constant, or n below 3."""
    ranks = stats.rankdata(pairs, axis=-2)
    x, y = np.moveaxis(ranks - ranks.mean(-2, keepdims=True), -1, 0)
    sizes = (x * x).sum(-1) * (y * y).sum(-1)
    enough = (sizes > 0) & (pairs.shape[-2] > 2) & np.isfinite(pairs).all((-2, -1))
    return np.where(enough, (x * y).sum(-1) / np.sqrt(np.where(sizes > 0, sizes, 1)), math.nan)


@checked(resamples=Whole(1), confidence=Real(0, 1, above=True, below=True), seed=Whole())
def rank_correlation(
    groups: Sequence[np.ndarray], resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean Spearman correlation with a percentile bootstrap interval.

    Args:
        groups: pairs (views, n, 2) each, e.g. of one study's n subsets. Every group is resampled by itself; views of a
            group, such as other halves of the folds, are of the same subsets and are resampled together.
        resamples: of the bootstrap over each group's subsets.
        confidence: of its interval, in (0, 1).
        seed: of the bootstrap.
    Returns:
        Mean over views and groups, lower and upper limit; all missing where one correlation is.
    """
    value = float(np.mean([float(spearman(pairs).mean()) for pairs in groups]))
    if not math.isfinite(value):
        return math.nan, math.nan, math.nan
    random, drawn = np.random.default_rng(seed), []
    for pairs in groups:
        n = pairs.shape[-2]
        again = pairs[:, random.integers(n, size=(resamples, n))]  # (views, resamples, n, 2)
        drawn.append(spearman(again).mean(axis=0))
    low, high = np.nanquantile(np.mean(drawn, axis=0), [(1 - confidence) / 2, (1 + confidence) / 2])
    return value, float(low), float(high)


def overlap_factor(folds: int | pd.Series) -> float | pd.Series:
    """What a standard deviation over k folds is multiplied by for the standard error of their mean.

    Args:
        folds: k; missing values for fewer than 2. Seeds share their fold's images and are averaged before.
    Returns:
        sqrt(1/k + 1/(k - 1)), since the folds' training sets overlap: 1.5 times the usual 1/sqrt(k) for k = 5.
    Source: Nadeau and Bengio, Inference for the Generalization Error (2003).
    """
    k = np.asarray(folds, dtype=float)
    factor = np.sqrt(1 / k + 1 / np.where(k > 1, k - 1, math.nan))
    return pd.Series(factor, folds.index) if isinstance(folds, pd.Series) else float(factor)
