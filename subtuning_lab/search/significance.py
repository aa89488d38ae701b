"""Is one subset better than another, or was it luck? Paired tests over folds. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
from scipy import stats

from subtuning_lab.search.candidates import summarize, value_of
from subtuning_lab.search.statistics import DIGITS, overlap_factor
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is, Real, checked

_ROWS = Table(("fold", "seed"), ("accuracy",))


@checked
@dataclass(frozen=True)
class SignificantGain:
    """Lets greedy SubTuning keep a block only where it is significantly better with it than without.

    Args:
        alpha: greatest p-value that counts as significant, above 0 and below 1.
    """

    alpha: Annotated[float, Real(0, 1, above=True, below=True)] = 0.05

    @checked(current=_ROWS, candidates=Is(Sequence))
    def p_values(self, current: pd.DataFrame, candidates: Sequence[pd.DataFrame | None], larger: bool) -> list[float]:
        """p-values of the larger subset being no better, by `fold_difference`.

        Args:
            current: rows of the subset so far.
            candidates: rows of each candidate; None for one that was given up, which counts as no better.
            larger: whether candidates have a block more than the subset so far, and not one less.
        Returns:
            For larger candidates Holm's: the best of many is tested. For smaller ones as they are: the search stops
            only if every removal hurts, so that a correction would help removals.
        """
        if current["fold"].nunique() < 2:
            raise ValueError("a paired test over folds needs at least 2, got 1")
        if not larger:
            return [math.nan if rows is None else fold_difference(current, rows).p for rows in candidates]
        return holm([1.0 if rows is None else fold_difference(rows, current).p for rows in candidates])


@dataclass(frozen=True)
class FoldDifference:
    """How far one subset is ahead of another on the same folds.

    Args:
        mean: mean difference of accuracies, or of what the study's `score` is.
        error: its standard error, corrected for the folds' common training images; missing for one fold.
        p: one-sided p-value of being no better; missing for one fold.
        folds: how many there are; seeds are averaged within them.
    """

    mean: float
    error: float
    p: float
    folds: int


_UNKNOWN = FoldDifference(math.nan, math.nan, math.nan, 0)


@checked(rows=_ROWS, others=_ROWS)
def fold_difference(rows: pd.DataFrame, others: pd.DataFrame) -> FoldDifference:
    """Compares two subsets, paired by fold: does the first score higher?

    Args:
        rows, others: of one subset each, as of `Study.scores`, on the same folds and seeds.
    Raises:
        ValueError: other folds and seeds, or a subset of which a training diverged.
    Source: Nadeau and Bengio, Inference for the Generalization Error (2003). Training sets of folds overlap, so the
        variance of the mean over k folds is (1/k + 1/(k - 1)) times that of the folds' differences, not 1/k times.
        Seeds share a fold's images, so they are averaged first: k differences, k - 1 degrees of freedom.
    """
    one, other = (table.assign(value=value_of(table)).set_index(["fold", "seed"])["value"] for table in (rows, others))
    same = one.index.is_unique and other.index.is_unique and set(one.index) == set(other.index)
    if not same or one.isna().any() or other.isna().any():
        raise ValueError("a paired test needs scores of both subsets on the same folds and seeds, each once")
    by_fold = (one - other).groupby(level="fold").mean().to_numpy()
    k = len(by_fold)
    if k < 2:
        return FoldDifference(float(by_fold.mean()), math.nan, math.nan, k)
    error = float(by_fold.std(ddof=1) * overlap_factor(k))
    return FoldDifference(float(by_fold.mean()), error, corrected_p(by_fold, overlap=1 / (k - 1)), k)


@checked(scores=Table(("blocks", "fold", "seed"), ("accuracy",)))
def compare_with_best(scores: pd.DataFrame) -> pd.DataFrame:
    """How far each subset is behind the best one, paired by fold: what a one-standard-error rule goes by.

    Args:
        scores: rows of `Study.scores`, or a profile's or search's `scores`.
    Returns:
        Index `blocks`; `accuracy` (mean), `difference` (from the best subset's, 0 for this, else below), `error` (its
        standard error, see `fold_difference`; missing for one fold), `p` (one-sided, of the best being no better), and
        `within` (at most one standard error behind). Missing where a training diverged, or a race gave the subset up.
    """
    groups = dict(iter(scores.groupby("blocks", sort=False)))
    means = summarize(scores)
    best = groups[means["score"].where(~means.index.isin(_given_up(scores))).idxmax()]
    places, rows = set(zip(best["fold"], best["seed"], strict=True)), []
    for blocks, rows_of in groups.items():
        same = value_of(rows_of).notna().all() and set(zip(rows_of["fold"], rows_of["seed"], strict=True)) == places
        ahead = fold_difference(best, rows_of) if same and blocks not in _given_up(scores) else _UNKNOWN
        rows.append((-ahead.mean + 0.0, ahead.error, ahead.p, rows_of is best or bool(ahead.mean <= ahead.error)))
    table = pd.DataFrame(rows, columns=["difference", "error", "p", "within"], index=means.index)
    return pd.concat([means["accuracy"], table], axis=1)


def _given_up(scores: pd.DataFrame) -> list[tuple[str, ...]]:
    return scores.loc[scores["dropped"] > 0, "blocks"].unique().tolist() if "dropped" in scores else []


def corrected_p(differences: np.ndarray, overlap: float) -> float:
    """One-sided p-value of a mean difference of at most 0.

    Args:
        differences: one per fold, paired; at least 2.
        overlap: validation images per training image of a fold; 0 gives the usual paired t test.
    Returns:
        Where all differences are equal there is no variance to go by: then the sign test's, 2^-n if they are positive,
        else 1.
    """
    differences = np.round(np.asarray(differences, dtype=float), DIGITS)  # rounding is no variance
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
