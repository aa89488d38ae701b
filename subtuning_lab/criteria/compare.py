"""What scores of blocks are worth: against the profile that they save, and against what that is worth itself."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from subtuning_lab.search.candidates import chosen_rows, value_of
from subtuning_lab.search.statistics import spearman
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is, Real, Whole, checked

if TYPE_CHECKING:
    from subtuning_lab.study.study import Study

CEILING = "half of the folds"
_SPLITS = 20  # ways to halve the folds that are looked at


@checked(
    study=Is("Study"),
    scores=Table(("criterion", "block"), ("rank", "flops")),
    resamples=Whole(1),
    confidence=Real(0, 1, above=True, below=True),
    seed=Whole(),
)
def compare_criteria(
    study: Study, scores: pd.DataFrame, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """How well criteria foretell the finetuning profile, whose fold scores are computed where no record has them.

    Args:
        study: with at least 2 folds.
        scores: of `score_blocks`, of any criteria.
        resamples: of a bootstrap over folds, which leaves the scores as they are.
        confidence: of its percentile interval.
        seed: of the bootstrap.

    Returns:
        One row a criterion: `spearman` of its ranks with the profile's accuracies (1 is the profile's own order), `low`
        and `high`; `block`, its first; `accuracy` of that block on the folds, `regret` behind the best block, which
        was chosen on these very folds, and `std` of the difference over folds; `share` of the profile's FLOPs that it
        takes; `n` folds and `blocks`. The last row, "half of the folds", is the ceiling: one half's profile against the
        other half's, `regret` on the half that did not choose, mean over ways to halve them.

    Raises:
        ValueError: one fold, or a block whose training diverged.
    """
    if study.n_folds < 2:
        raise ValueError(f"study has {study.n_folds} fold; it must have at least 2 to compare with")
    singles = [(name,) for name in study.block_names]
    rows = study.all_scores(singles)
    counted = chosen_rows(rows)
    values = counted.assign(value=value_of(counted), block=counted["blocks"].str[0])
    folds = values.pivot_table("value", "fold", "block")[list(study.block_names)].to_numpy()  # mean over seeds
    if not np.isfinite(folds).all():
        raise ValueError("study has a block whose training diverged; give a lower learning rate")
    drawn = np.random.default_rng(seed).integers(len(folds), size=(resamples, len(folds)))
    again, cost, results = folds[drawn].mean(1), float(rows["flops"].sum()), []
    for name, own in scores.groupby("criterion", sort=False):
        order = -own.set_index("block")["rank"].loc[list(study.block_names)].to_numpy(float)
        rho = _against(order, folds.mean(0))
        limits = _quantiles(_against(order, again), [(1 - confidence) / 2, (1 + confidence) / 2])
        first, best = int(order.argmax()), int(folds.mean(0).argmax())
        behind = folds[:, best] - folds[:, first]
        facts = (study.block_names[first], folds[:, first].mean(), behind.mean(), behind.std(ddof=1))
        results.append((name, float(rho), *limits, *facts, own["flops"].iloc[0] / cost))
    results.append(_ceiling(folds))
    columns = ["criterion", "spearman", "low", "high", "block", "accuracy", "regret", "std", "share"]
    return pd.DataFrame(results, columns=columns).assign(n=len(folds), blocks=folds.shape[1])


def _against(order: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rank correlations of one order (blocks,) with values (..., blocks)."""
    return spearman(np.stack(np.broadcast_arrays(order, values), -1))


def _quantiles(rho: np.ndarray, shares: list[float]) -> np.ndarray:
    """Of the correlations that there are: one with equal accuracies everywhere is none."""
    return np.quantile(rho[np.isfinite(rho)], shares) if np.isfinite(rho).any() else np.full(2, np.nan)


def _ceiling(folds: np.ndarray) -> tuple[object, ...]:
    count = len(folds)
    halves = [list(some) for some in combinations(range(count), count // 2) if count % 2 or 0 in some][:_SPLITS]
    pairs = [(folds[some].mean(0), np.delete(folds, some, 0).mean(0)) for some in halves]
    rho = np.array([_against(one, other) for one, other in pairs])
    regrets = [b.max() - b[a.argmax()] for one, other in pairs for a, b in ((one, other), (other, one))]
    spread = float(np.std(regrets, ddof=1))
    known = rho[np.isfinite(rho)]
    mean = float(known.mean()) if len(known) else np.nan
    return CEILING, mean, *_quantiles(rho, [0, 1]), "", np.nan, float(np.mean(regrets)), spread, 0.5
