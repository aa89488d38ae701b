"""Is one subset better than another, or was it luck? Paired tests over folds and seeds. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class SignificantGain:
    """Lets greedy SubTuning keep a block only where it is significantly better with it than without.

    Args:
        alpha: greatest p-value that counts as significant, above 0 and below 1.

    Raises:
        ValueError: an alpha out of that range.
    """

    alpha: float = 0.05

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def p_values(self, current: pd.DataFrame, candidates: Sequence[pd.DataFrame | None], larger: bool) -> list[float]:
        """p-values of the larger subset being no better, by `paired_p`.

        Args:
            current: rows of the subset so far.
            candidates: rows of each candidate; None for one that was given up, which counts as no better.
            larger: whether candidates have a block more than the subset so far, and not one less.

        Returns:
            For larger candidates Holm's: the best of many is tested. For smaller ones as they are: the search stops
            only if every removal hurts, so that a correction would help removals.
        """
        if not larger:
            return [math.nan if rows is None else paired_p(current, rows) for rows in candidates]
        return holm([1.0 if rows is None else paired_p(rows, current) for rows in candidates])


def paired_p(better: pd.DataFrame, worse: pd.DataFrame) -> float:
    """One-sided p-value of `better` having no higher mean accuracy than `worse`, over the same folds and seeds.

    Args:
        better, worse: rows of one subset each, with `fold`, `seed` and `accuracy`.

    Raises:
        ValueError: other folds and seeds, or fewer than 2 folds.

    Source: Nadeau and Bengio, Inference for the Generalization Error (2003). Training sets of folds overlap, so the
        variance of the mean over J pairs is (1/J + 1/(folds - 1)) times that of the differences, not 1/J times.
    """
    pairs = better.merge(worse, on=["fold", "seed"], how="outer", validate="one_to_one")
    if len(pairs) != len(better) or pairs[["accuracy_x", "accuracy_y"]].isna().any(axis=None):
        raise ValueError("a paired test needs scores of both subsets on the same folds and seeds, each once")
    folds = pairs["fold"].nunique()
    if folds < 2:
        raise ValueError(f"a paired test over folds needs at least 2, got {folds}")
    return corrected_p((pairs["accuracy_x"] - pairs["accuracy_y"]).to_numpy(), overlap=1 / (folds - 1))


def corrected_p(differences: np.ndarray, overlap: float) -> float:
    """One-sided p-value of a mean difference of at most 0.

    Args:
        differences: paired, at least 2.
        overlap: validation images per training image of a fold; 0 gives the usual paired t test.

    Returns:
        Where all differences are equal there is no variance to go by: then the sign test's, 2^-n if they are positive,
        else 1.
    """
    differences = np.round(np.asarray(differences, dtype=float), 12)  # rounding is no variance
    if differences.ndim != 1 or len(differences) < 2 or not np.isfinite(differences).all():
        raise ValueError(f"a paired test needs at least 2 finite differences, got {differences}")
    if np.ptp(differences) == 0:
        return 0.5 ** len(differences) if differences[0] > 0 else 1.0
    error = differences.std(ddof=1) * math.sqrt(1 / len(differences) + overlap)
    return float(stats.t.sf(differences.mean() / error, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number; at most alpha for every one that Holm's method rejects at alpha.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def check_alpha(alpha: object) -> None:
    """Raises ValueError unless alpha is a number above 0 and below 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha!r}; it must be a number above 0 and below 1")
