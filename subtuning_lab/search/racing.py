"""Cheaper rounds of a search: hopeless candidates are given up before they are trained in full. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
from scipy import stats

from subtuning_lab.search.exhaustive import DIGITS, check_accuracies
from subtuning_lab.search.profiles import Scorer
from subtuning_lab.search.significance import check_alpha, corrected_p, holm


class Arm(Protocol):
    """A subset with one recipe for it."""

    blocks: tuple[str, ...]


class RacingScorer(Scorer, Protocol):
    """What a race asks of a study."""

    n_folds: int
    seeds: tuple[int, ...]
    epochs: int

    def arms(self, subsets: Sequence[Sequence[str]]) -> list[Arm]:
        """Every subset with each of its recipes."""

    def arm_scores(
        self,
        arms: Sequence[Arm],
        folds: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        epochs: int | None = None,
    ) -> pd.DataFrame:
        """Rows as of `scores`, besides `arm` (its place in the list) and `loss`; None means all."""


@dataclass(frozen=True)
class Stage:
    """A part of the whole budget.

    Args:
        epochs: of a short schedule of its own; None trains in full.
        places: folds and seeds to score on. Those that an earlier stage with as many epochs scored are not paid again.
    """

    epochs: int | None
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Race:
    """Gives up what a paired test finds to be behind the leader, and trains the others in full.

    A first stage trains short schedules on all folds and seeds; their validation loss is compared, which tells more
    than the accuracy on few images does. Then follow full trainings fold by fold, whose accuracy is compared. After
    each stage comes Friedman's test over all arms, and if these differ, a paired t test of each against the leader.

    Args:
        alpha: greatest p-value, after Holm's correction, at which an arm is given up.
        first: full trainings (folds, then seeds) before the first test on them, at least 2.
        short: share of the epochs of a short schedule, above 0 and below 1; None leaves that stage out.
        most: of the arms that the test leaves after the short stage, so many go on at most, by their loss; None
            leaves it to the test.

    Raises:
        TypeError, ValueError: a value out of its range.

    Source: F-Race and t-race (Birattari et al. 2002; López-Ibáñez et al. 2016, irace). Ours: the short stage, its
        limit, and the test's correction for overlapping training sets.
    """

    alpha: float = 0.05
    first: int = 2
    short: float | None = 0.05
    most: int | None = 2

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        _check_whole("first", self.first, 2)
        if self.most is not None:
            _check_whole("most", self.most, 1)
        if self.short is not None and not (_is_real(self.short) and 0 < self.short < 1):
            raise ValueError(f"short is {self.short!r}; it must be a share above 0 and below 1, or None")

    def scores(
        self, study: RacingScorer, subsets: Sequence[tuple[str, ...]], beside: Sequence[tuple[str, ...]] = ()
    ) -> pd.DataFrame:
        """Races subsets with all their recipes; see `race_scores` for the rows."""
        places = _places(study)
        short = [] if self.short is None else _short_epochs(study, [self.short])
        stages = [Stage(epochs, places) for epochs in short]
        stages += [Stage(None, places[:count]) for count in range(min(self.first, len(places)), len(places) + 1)]
        overlap = 1 / (study.n_folds - 1) if study.n_folds > 1 else 0.0

        def survivors(number: int, values: pd.DataFrame) -> list[int]:
            left = not_behind(values, self.alpha, overlap)
            return _ranked(values[left])[: self.most] if number < len(short) else left

        return race_scores(study, subsets, stages, survivors, beside)


@dataclass(frozen=True)
class Halving:
    """Successive halving: the better part of the arms gets a larger budget, and only the best is trained in full.

    Args:
        eta: of n arms, n / eta go on to the next rung (rounded down, at least one); above 1.
        ladder: shares of (epochs, folds and seeds) of the rungs, each in (0, 1], the last one (1, 1). Short schedules
            are ranked by their validation loss, full ones by accuracy.

    Raises:
        TypeError, ValueError: a value out of its range.

    Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification (2016).
    """

    eta: float = 4.0
    ladder: tuple[tuple[float, float], ...] = ((0.05, 1.0), (1.0, 1.0))

    def __post_init__(self) -> None:
        if not (_is_real(self.eta) and 1 < self.eta < math.inf):
            raise ValueError(f"eta is {self.eta!r}; it must be a number above 1")
        rungs = [tuple(rung) for rung in self.ladder]
        if not all(len(rung) == 2 and all(_is_real(share) and 0 < share <= 1 for share in rung) for rung in rungs):
            raise ValueError(f"ladder is {self.ladder}; it must be of shares (epochs, folds) above 0 and up to 1")
        if not rungs or rungs[-1] != (1, 1):
            raise ValueError(f"ladder is {self.ladder}; its last rung must be (1, 1)")

    def scores(
        self, study: RacingScorer, subsets: Sequence[tuple[str, ...]], beside: Sequence[tuple[str, ...]] = ()
    ) -> pd.DataFrame:
        """Halves subsets with all their recipes; see `race_scores` for the rows."""
        places = _places(study)
        stages = []
        for epochs, share in self.ladder:
            short = _short_epochs(study, [epochs])
            stages.append(Stage(short[0] if short else None, places[: math.ceil(round(share * len(places), DIGITS))]))

        def survivors(number: int, values: pd.DataFrame) -> list[int]:
            return _ranked(values)[: max(1, int(values.shape[1] / self.eta))]

        return race_scores(study, subsets, stages, survivors, beside)


def race_scores(
    study: RacingScorer,
    subsets: Sequence[tuple[str, ...]],
    stages: Sequence[Stage],
    survivors: Callable[[int, pd.DataFrame], Sequence[int]],
    beside: Sequence[tuple[str, ...]] = (),
) -> pd.DataFrame:
    """Trains arms stage by stage, and after each but the last gives up some.

    Args:
        study: what trains them.
        subsets: blocks each.
        stages: the last one is the whole budget.
        survivors: the number of the stage and its values (one column an arm, one row a fold and seed, larger is
            better) -> the columns that go on, at least one.
        beside: subsets that take part in no comparison and are trained in full: it is cheaper to share a pass.

    Returns:
        One row per training made: the columns of `RacingScorer.arm_scores` (`arm` is the place in
        `study.arms([*subsets, *beside])`); `stage` in which it was made, from 1; `dropped`, the stage after which the
        subset was given up, 0 if never; `counted`, whether the row is of the arm and the schedule that the subset
        counts with: of the arms that came furthest the one with the best mean accuracy, and its longest schedule.
    """
    arms = study.arms([*subsets, *beside])
    certain = [i for i, arm in enumerate(arms) if arm.blocks in beside]
    alive = [i for i in range(len(arms)) if i not in certain]
    dropped, rows = dict.fromkeys(range(len(arms)), 0), pd.DataFrame()
    for number, stage in enumerate(stages, start=1):
        if stage.epochs is not None and len(alive) == 1:
            continue  # nothing to compare it with
        trained = alive if stage.epochs is not None else [*certain, *alive]
        new = _new_rows(study, arms, trained, stage, rows)
        rows = pd.concat([rows, *(own.assign(stage=number) for own in new)], ignore_index=True)
        if number < len(stages) and len(alive) > 1:
            left = set(survivors(number - 1, _values(study, rows, alive, stage)))
            dropped |= {arm: number for arm in alive if arm not in left}
            alive = [arm for arm in alive if arm in left]
    return _counted(rows, dropped)


def not_behind(values: pd.DataFrame, alpha: float, overlap: float = 0.0) -> list[int]:
    """Columns that are not significantly below the one with the best mean; all of them if there is but one row.

    Args:
        values: one column an arm, one row a fold and seed; larger is better, and what is not finite is behind.
        alpha: greatest p-value that counts as significant.
        overlap: of training sets, as in `corrected_p`.
    """
    sound = values.loc[:, np.isfinite(values).all()]  # a training that diverged is behind
    if sound.empty:
        return list(values)
    best = _ranked(sound)[0]
    others = [arm for arm in sound if arm != best]
    if not others or len(sound) < 2 or (len(others) > 1 and _friedman_p(sound) > alpha):
        return list(sound)
    p_values = holm([corrected_p((values[best] - values[arm]).to_numpy(), overlap) for arm in others])
    behind = {arm for arm, p in zip(others, p_values, strict=True) if p <= alpha}
    return [arm for arm in sound if arm not in behind]


def _new_rows(study: RacingScorer, arms: list, trained: list[int], stage: Stage, known: pd.DataFrame) -> list:
    """Rows of a stage that no earlier one has: arms that go on were scored on all that is known."""
    epochs = _budget(study, stage)
    done = set() if known.empty else set(map(tuple, known.loc[known["budget"] == epochs, ["fold", "seed"]].values))
    found = []
    for seed in dict.fromkeys(seed for _, seed in stage.places):
        folds = [fold for fold, own in stage.places if own == seed and (fold, seed) not in done]
        if folds:
            rows = study.arm_scores([arms[i] for i in trained], folds=folds, seeds=[seed], epochs=stage.epochs)
            check_accuracies(rows)
            found.append(rows.assign(arm=[trained[i] for i in rows["arm"]], budget=epochs))
    return found


def _values(study: RacingScorer, rows: pd.DataFrame, alive: list[int], stage: Stage) -> pd.DataFrame:
    """What a stage compares: minus the loss of short schedules where it is told, else accuracy."""
    own = rows[rows["arm"].isin(alive) & (rows["budget"] == _budget(study, stage))]
    by_loss = stage.epochs is not None and "loss" in own and own["loss"].notna().all()
    own = own.assign(value=-own["loss"] if by_loss else own["accuracy"])
    return own.pivot(index=["seed", "fold"], columns="arm", values="value")


def _budget(study: RacingScorer, stage: Stage) -> int:
    return study.epochs if stage.epochs is None else stage.epochs


def _counted(rows: pd.DataFrame, dropped: dict[int, int]) -> pd.DataFrame:
    """Marks each subset's best arm; see `race_scores`."""
    last = {arm: stage or math.inf for arm, stage in dropped.items()}
    counted = {}  # arm -> epochs of the rows that count
    for _, own in rows.groupby("blocks", sort=False):
        furthest = own[own["arm"].map(last) == own["arm"].map(last).max()]
        longest = furthest[furthest["budget"] == furthest["budget"].max()]
        best = longest.groupby("arm")["accuracy"].mean().round(DIGITS).idxmax()
        counted[best] = longest["budget"].iloc[0]
    rows["counted"] = [counted.get(arm) == budget for arm, budget in zip(rows["arm"], rows["budget"], strict=True)]
    furthest = rows["arm"].map(last).groupby(rows["blocks"]).transform("max")
    rows["dropped"] = furthest.replace(math.inf, 0).astype(int)
    return rows.drop(columns="budget")


def _ranked(values: pd.DataFrame) -> list[int]:
    """Columns from the best mean to the worst; ties go to the earlier one."""
    means = values.mean().round(DIGITS)
    return means.sort_values(ascending=False, kind="stable").index.tolist()


def _friedman_p(values: pd.DataFrame) -> float:
    """Friedman's test that no arm differs from another; 1 where every row is of equal values."""
    values = values.round(DIGITS)
    if (values.nunique(axis=1) == 1).all():
        return 1.0
    return float(stats.friedmanchisquare(*(values[arm] for arm in values)).pvalue)


def _places(study: RacingScorer) -> tuple[tuple[int, int], ...]:
    """All folds of the first seed, then those of the next."""
    return tuple((fold, seed) for seed in study.seeds for fold in range(study.n_folds))


def _short_epochs(study: RacingScorer, shares: Sequence[float]) -> list[int]:
    """Whole numbers of epochs, without those that are the full schedule anyway."""
    return [n for n in (max(1, round(share * study.epochs)) for share in shares) if n < study.epochs]


def _check_whole(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be a whole number")
    if value < low:
        raise ValueError(f"{name} is {value}; it must be at least {low}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
