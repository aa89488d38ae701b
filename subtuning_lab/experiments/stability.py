"""Is a finetuning profile a property of the network and the task, or of the training that it was made with?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Annotated

import numpy as np
import pandas as pd
from scipy import stats

from subtuning_lab.search.profiles import Profile
from subtuning_lab.search.statistics import rank_correlation
from subtuning_lab.study.study import Study
from subtuning_lab.theory.measure import rank_correlations
from subtuning_lab.utils.containers import Mapped
from subtuning_lab.utils.validation import Is, Real, Several, Whole, checked

_CONFIDENCE = Real(0, 1, above=True, below=True)
_MOST_SPLITS = 40  # of the folds in two halves


@checked
def profile_stability(
    study: Study,
    epochs: Annotated[Sequence[int] | None, Several(Whole(1), none=True)] = None,
    lr: Annotated[Sequence[float] | None, Several(Real(0, above=True), none=True)] = None,
    *,
    resamples: Annotated[int, Whole(1)] = 2000,
    confidence: Annotated[float, _CONFIDENCE] = 0.95,
    seed: Annotated[int, Whole()] = 0,
) -> pd.DataFrame:
    """Does the ranking of single blocks outlive a change of the training's length and learning rate?

    Every pair of epochs and learning rate gives a profile of its own. The reference is that of the longest trainings,
    at the learning rate with the best block in the mean over the folds. Two profiles on the same folds share their
    validation images, and with them their luck; so rankings are also compared between different halves of the folds.
    What the reference's own halves come to is the noise ceiling: a setting that ranks alike comes to about as much.

    Args:
        study: with at least 2 folds. What its recipes differ in besides is chosen on all folds, for every block, which
            ties the halves to each other a little; give one recipe where they must be apart.
        epochs: lengths of training, each with a schedule of its own; None: the study's.
        lr: learning rates of the tuned blocks; None: those of the study's first recipe.
        resamples: of the bootstrap over blocks.
        confidence: of its percentile intervals.
        seed: of the bootstrap.
    Returns:
        One row per setting, the reference first: `setting` (in words), `epochs`, `lr`, `reference` (whether it is),
        `best` (block), `accuracy` (of that block), `spearman` with `low` and `high`, and `kendall` (tau-b) against the
        reference on the same folds; `halves` with `halves_low` and `halves_high`: Spearman between this profile on half
        of the folds and the reference's on the other half, mean over the ways to halve them; `n` blocks; `scores` per
        block. Profiles of half the folds are noisier than whole ones, so `halves` understates all settings alike.
    """
    if study.n_folds < 2:
        raise ValueError(f"folds is {study.n_folds}; halves of the folds need at least 2")
    if len(study.block_names) < 3:
        raise ValueError(f"{study.backbone.name} has {len(study.block_names)} blocks; a ranking needs at least 3")
    lengths = list(dict.fromkeys(epochs or [study.epochs]))
    rates = list(dict.fromkeys(lr or [study.recipes[0].lr]))
    scores = {
        (length, rate): _block_scores(study.variant(epochs=length, lr=rate)) for length, rate in product(lengths, rates)
    }
    longest = [setting for setting in scores if setting[0] == max(lengths)]
    reference = max(longest, key=lambda setting: scores[setting].mean(axis=1).max())
    bootstrap = {"resamples": resamples, "confidence": confidence, "seed": seed}
    rows = [
        _row(setting, scores[setting], scores[reference], study, bootstrap) | {"reference": setting == reference}
        for setting in sorted(scores, key=lambda setting: (setting != reference, setting))
    ]
    return pd.DataFrame(rows)


@checked(profiles=Mapped(Is(Profile), least=2), confidence=_CONFIDENCE)
def profile_agreement(profiles: Mapping[str, Profile], confidence: float = 0.95) -> pd.DataFrame:
    """Rank correlation of every two profiles, e.g. of one architecture with different pretraining.

    Args:
        profiles: of the same subsets, by name.
        confidence: of the bootstrap interval over subsets.
    Returns:
        One row per two: `first`, `second`, `spearman`, `low`, `high`, `kendall`, `n` subsets.
    """
    tables = {name: profile.table[profile.table["kind"] == "blocks"] for name, profile in profiles.items()}
    subsets = {name: table["blocks"].tolist() for name, table in tables.items()}
    first = next(iter(subsets))
    other = [name for name, blocks in subsets.items() if blocks != subsets[first]]
    if other:
        raise ValueError(f"profiles {first} and {other[0]} are of different subsets, which can't be compared")
    together = pd.DataFrame({name: table["accuracy"].to_numpy() for name, table in tables.items()})
    together = together.assign(study="all", blocks=subsets[first], params=tables[first]["params"].to_numpy())
    rows = []
    for one, two in combinations(profiles, 2):
        found = rank_correlations(together, [one], [two], single=False, confidence=confidence)
        rows.append({"first": one, "second": two, **found.query("against == @two")[_FIGURES].iloc[0]})
    return pd.DataFrame(rows).astype({"n": int})


_FIGURES = ["spearman", "low", "high", "kendall", "n"]


def _block_scores(study: Study) -> np.ndarray:
    """Accuracy (blocks, folds) of the single blocks, mean over the seeds."""
    blocks = [(name,) for name in study.block_names]
    means = study.scores(blocks).groupby(["blocks", "fold"])["accuracy"].mean().unstack("fold")
    return means.loc[blocks].to_numpy()


def _row(
    setting: tuple[int, float], scores: np.ndarray, reference: np.ndarray, study: Study, bootstrap: dict[str, float]
) -> dict[str, object]:
    """A setting beside the reference; scores are (blocks, folds) each."""
    means = scores.mean(axis=1)
    best = int(means.round(12).argmax())
    whole = np.stack([means, reference.mean(axis=1)], axis=-1)[None]  # (1, blocks, 2)
    ways = _splits(scores.shape[1])
    pairs = [(scores[:, left].mean(axis=1), reference[:, right].mean(axis=1)) for left, right in ways]
    halves = np.stack([np.stack(pair, axis=-1) for pair in pairs])  # (splits, blocks, 2)
    row = {"setting": f"{setting[0]} epochs, lr {setting[1]:g}", "epochs": setting[0], "lr": setting[1]}
    row |= {"best": study.block_names[best], "accuracy": means[best]}
    row |= dict(zip(("spearman", "low", "high"), rank_correlation([whole], **bootstrap), strict=True))
    row["kendall"] = float(stats.kendalltau(*whole[0].T).statistic)
    row |= dict(zip(("halves", "halves_low", "halves_high"), rank_correlation([halves], **bootstrap), strict=True))
    return row | {"n": len(scores), "scores": scores.shape[1] * len(study.seeds)}


def _splits(folds: int) -> list[tuple[list[int], list[int]]]:
    """Ways to halve the folds, at most a fixed number of them; the second half has the odd fold."""
    ways = list(combinations(range(folds), folds // 2))
    chosen = np.unique(np.linspace(0, len(ways) - 1, _MOST_SPLITS).round().astype(int))
    return [(list(ways[i]), [fold for fold in range(folds) if fold not in ways[i]]) for i in chosen]
