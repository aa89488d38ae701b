"""Cheaper rounds of a search: hopeless candidates are given up before they are trained in full. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
from scipy import stats

from subtuning_lab.search.candidates import SCORER, Scorer, check_accuracies, chosen_rows, value_of
from subtuning_lab.search.significance import corrected_p, holm
from subtuning_lab.search.statistics import DIGITS
from subtuning_lab.utils.validation import Is, Real, Several, Whole, checked

_SHARE = Real(0, 1, above=True, below=True)
_LADDER = Several(Several(Real(0, 1, above=True), least=2))
_SUBSETS = Several(Is((tuple, list, frozenset)), least=0)


@dataclass(frozen=True)
class Stage:
    """A part of the whole budget.

    Args:
        epochs: of a short schedule of its own; None trains in full.
        places: folds and seeds to score on. Those that an earlier stage with as many epochs scored are not paid again.
    """

    epochs: int | None
    places: tuple[tuple[int, int], ...]


@checked
@dataclass(frozen=True)
class Race:
    """Gives up what a paired test finds to be behind the leader, and trains the others in full.

    A first stage trains short schedules on all folds and seeds; their validation loss is compared, which tells more
    than the accuracy on few images does. Then follow full trainings fold by fold, whose accuracy is compared. After
    each stage comes Friedman's test over all candidates, and if these differ, a paired t test of each against the
    leader, both over folds, with seeds averaged and corrected for overlapping training sets as in `fold_difference`.

    A heuristic: the leader is chosen by the scores that it is compared on, looks are repeated, and `most` asks for no
    test at all. In simulations of equal candidates on 5 folds at alpha = 0.05, at least one was given up in 11, 13 and
    20 % of looks with 2, 9 and 18 candidates, and in 20, 7 and 17 % of whole races; of the candidates it were 1 to 6 %
    a look. What is best on average is never given up at that look.

    Args:
        alpha: greatest p-value, after Holm's correction, at which a candidate is given up.
        first: full trainings (folds, then seeds) before the first test on them, at least 2.
        short: share of the epochs of a short schedule, above 0 and below 1; None leaves that stage out.
        most: of those that the test leaves after the short stage, so many go on at most, by their loss; None
            leaves it to the test.
    Source: F-Race and t-race (Birattari et al. 2002; López-Ibáñez et al. 2016, irace). Ours: the short stage, its
        limit, and the test's correction for overlapping training sets.
    """

    alpha: Annotated[float, _SHARE] = 0.05
    first: Annotated[int, Whole(2)] = 2
    short: Annotated[float | None, _SHARE.or_none()] = 0.05
    most: Annotated[int | None, Whole(1, none=True)] = 2

    @checked(study=SCORER, subsets=_SUBSETS, certain=_SUBSETS)
    def scores(
        self, study: Scorer, subsets: Sequence[tuple[str, ...]], certain: Sequence[tuple[str, ...]] = ()
    ) -> pd.DataFrame:
        """Races subsets with all their recipes; see `race_scores` for the rows."""
        places = _places(study)
        short = [] if self.short is None else _short_epochs(study, [self.short])
        stages = [Stage(epochs, places) for epochs in short]
        stages += [Stage(None, places[:count]) for count in range(min(self.first, len(places)), len(places) + 1)]
        overlap = 1 / (study.n_folds - 1) if study.n_folds > 1 else 0.0

        def survivors(number: int, values: pd.DataFrame) -> list[int]:
            left = not_behind(_by_fold(values), self.alpha, overlap)
            return _ranked(values[left])[: self.most] if number < len(short) else left

        return race_scores(study, subsets, stages, survivors, certain)


@checked
@dataclass(frozen=True)
class Halving:
    """Successive halving: the better part of the candidates gets a larger budget, and only the best is trained in full.

    Args:
        eta: of n candidates, n / eta go on to the next rung (rounded down, at least one); above 1.
        ladder: shares of (epochs, folds and seeds) of the rungs, each in (0, 1], the last one (1, 1). Short schedules
            are ranked by their validation loss, full ones by accuracy.
    Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification (2016).
    """

    eta: Annotated[float, Real(1, above=True)] = 4.0
    ladder: Annotated[tuple[tuple[float, float], ...], _LADDER] = ((0.05, 1.0), (1.0, 1.0))

    def __post_init__(self) -> None:
        if any(len(rung) != 2 for rung in self.ladder) or tuple(self.ladder[-1]) != (1, 1):
            raise ValueError(f"ladder is {self.ladder}; it must be of pairs (epochs, folds), the last of them (1, 1)")

    @checked(study=SCORER, subsets=_SUBSETS, certain=_SUBSETS)
    def scores(
        self, study: Scorer, subsets: Sequence[tuple[str, ...]], certain: Sequence[tuple[str, ...]] = ()
    ) -> pd.DataFrame:
        """Halves subsets with all their recipes; see `race_scores` for the rows."""
        places = _places(study)
        stages = []
        for epochs, share in self.ladder:
            short = _short_epochs(study, [epochs])
            stages.append(Stage(short[0] if short else None, places[: math.ceil(round(share * len(places), DIGITS))]))

        def survivors(number: int, values: pd.DataFrame) -> list[int]:
            return _ranked(values)[: max(1, int(values.shape[1] / self.eta))]

        return race_scores(study, subsets, stages, survivors, certain)


def race_scores(
    study: Scorer,
    subsets: Sequence[tuple[str, ...]],
    stages: Sequence[Stage],
    survivors: Callable[[int, pd.DataFrame], Sequence[int]],
    certain: Sequence[tuple[str, ...]] = (),
) -> pd.DataFrame:
    """Trains candidates stage by stage, and after each stage but the last gives up some.

    Args:
        study: what trains them.
        subsets: blocks each.
        stages: the last one is the whole budget.
        survivors: the number of the stage and its values (one column a candidate, one row a fold and seed, larger is
            better) -> the columns that go on, at least one.
        certain: subsets that take part in no comparison and are trained in full: it is cheaper to share a pass.
    Returns:
        One row per training made: the columns of `Scorer.candidate_scores` (`candidate` is the place in
        `study.candidates([*subsets, *certain])`); `stage` in which it was made, from 1; `dropped`, the stage after
        which the subset was given up, 0 if never; `counted`, whether the row is of those that the subset counts with:
        of the candidates that came furthest, and of their longest schedule, by `chosen_rows`.
    """
    candidates = study.candidates([*subsets, *certain])
    kept = [i for i, candidate in enumerate(candidates) if candidate.blocks in certain]
    alive = [i for i in range(len(candidates)) if i not in kept]
    dropped, rows = dict.fromkeys(range(len(candidates)), 0), pd.DataFrame()
    for number, stage in enumerate(stages, start=1):
        if stage.epochs is not None and len(alive) == 1:
            continue  # nothing to compare it with
        trained = alive if stage.epochs is not None else [*kept, *alive]
        new = _new_rows(study, candidates, trained, stage, rows)
        rows = pd.concat([rows, *(table.assign(stage=number) for table in new)], ignore_index=True)
        if number < len(stages) and len(alive) > 1:
            left = set(survivors(number - 1, _values(study, rows, alive, stage)))
            dropped |= {candidate: number for candidate in alive if candidate not in left}
            alive = [candidate for candidate in alive if candidate in left]
    return _counted(rows, dropped)


def not_behind(values: pd.DataFrame, alpha: float, overlap: float = 0.0) -> list[int]:
    """Columns that are not significantly below the one with the best mean; all of them if there is but one row.

    Args:
        values: one column a candidate, one row a fold; larger is better, and what is not finite is behind.
        alpha: greatest p-value that counts as significant.
        overlap: of training sets, as in `corrected_p`.
    """
    sound = values.loc[:, np.isfinite(values).all()]  # a training that diverged is behind
    if sound.empty:
        return list(values)
    best = _ranked(sound)[0]
    others = [candidate for candidate in sound if candidate != best]
    if not others or len(sound) < 2 or (len(others) > 1 and _friedman_p(sound) > alpha):
        return list(sound)
    p_values = holm([corrected_p((values[best] - values[other]).to_numpy(), overlap) for other in others])
    behind = {other for other, p in zip(others, p_values, strict=True) if p <= alpha}
    return [candidate for candidate in sound if candidate not in behind]


def _by_fold(values: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds, which share a fold's images; missing where a training diverged."""
    broken = (~np.isfinite(values)).groupby(level="fold").any()
    return values.groupby(level="fold").mean().mask(broken)


def _new_rows(study: Scorer, candidates: list, trained: list[int], stage: Stage, known: pd.DataFrame) -> list:
    """Rows of a stage that no earlier one has: candidates that go on were scored on all that is known."""
    epochs = _budget(study, stage)
    done = set() if known.empty else set(map(tuple, known.loc[known["budget"] == epochs, ["fold", "seed"]].values))
    tables = []
    for seed in dict.fromkeys(seed for _, seed in stage.places):
        folds = [fold for fold, other in stage.places if other == seed and (fold, seed) not in done]
        if folds:
            chosen = [candidates[i] for i in trained]
            rows = study.candidate_scores(chosen, folds=folds, seeds=[seed], epochs=stage.epochs)
            check_accuracies(rows)
            tables.append(rows.assign(candidate=[trained[i] for i in rows["candidate"]], budget=epochs))
    return tables


def _values(study: Scorer, rows: pd.DataFrame, alive: list[int], stage: Stage) -> pd.DataFrame:
    """What a stage compares: minus the loss of short schedules where it is told, else what is chosen by."""
    rows = rows[rows["candidate"].isin(alive) & (rows["budget"] == _budget(study, stage))]
    by_loss = stage.epochs is not None and "loss" in rows and rows.loc[rows["accuracy"].notna(), "loss"].notna().all()
    rows = rows.assign(value=-rows["loss"].astype(float) if by_loss else value_of(rows))
    return rows.pivot(index=["seed", "fold"], columns="candidate", values="value")


def _budget(study: Scorer, stage: Stage) -> int:
    return study.epochs if stage.epochs is None else stage.epochs


def _counted(rows: pd.DataFrame, dropped: dict[int, int]) -> pd.DataFrame:
    """Marks the rows that each subset counts with; see `race_scores`."""
    last = rows["candidate"].map({candidate: stage or math.inf for candidate, stage in dropped.items()})
    counted = []
    for _, of_subset in rows.groupby("blocks", sort=False):
        furthest = of_subset[last[of_subset.index] == last[of_subset.index].max()]
        longest = furthest[furthest["budget"] == furthest["budget"].max()]
        counted += chosen_rows(longest.assign(recipe=longest["candidate"], row=longest.index))["row"].tolist()
    rows["counted"] = rows.index.isin(counted)
    rows["dropped"] = last.groupby(rows["blocks"]).transform("max").replace(math.inf, 0).astype(int)
    return rows.drop(columns="budget")


def _ranked(values: pd.DataFrame) -> list[int]:
    """Columns from the best mean to the worst; ties go to the earlier one."""
    means = values.mean(skipna=False).round(DIGITS)
    return means.sort_values(ascending=False, kind="stable").index.tolist()


def _friedman_p(values: pd.DataFrame) -> float:
    """Friedman's test that no candidate differs from another; 1 where every row is of equal values."""
    values = values.round(DIGITS)
    if (values.nunique(axis=1) == 1).all():
        return 1.0
    return float(stats.friedmanchisquare(*(values[candidate] for candidate in values)).pvalue)


def _places(study: Scorer) -> tuple[tuple[int, int], ...]:
    """All folds of the first seed, then those of the next."""
    return tuple((fold, seed) for seed in study.seeds for fold in range(study.n_folds))


def _short_epochs(study: Scorer, shares: Sequence[float]) -> list[int]:
    """Whole numbers of epochs, without those that are the full schedule anyway."""
    return [n for n in (max(1, round(share * study.epochs)) for share in shares) if n < study.epochs]
