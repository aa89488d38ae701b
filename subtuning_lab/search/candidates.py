"""Candidates of a search: what they score and cost, with which recipe they count, and which one is best. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from subtuning_lab.search.statistics import DIGITS, overlap_factor
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Has, OneOf, checked

if TYPE_CHECKING:
    from subtuning_lab.search.racing import Halving, Race

COSTS = ("trainings", "seconds", "flops")
SCORER = Has(("scores", "block_names", "title"), "a Study, or whatever scores subsets likewise")


class Scorer(Protocol):
    """What a search asks of a `Study`. Profiles need no more than `scores`, greedy and exhaustive search `all_scores`,
    races all of it."""

    title: str
    block_names: tuple[str, ...]
    part_names: tuple[str, ...]
    n_folds: int
    seeds: tuple[int, ...]
    epochs: int

    def scores(self, subsets: Sequence[Sequence[str]]) -> pd.DataFrame:
        """Rows with `blocks` (tuple), `fold`, `seed`, `accuracy` and `params`; besides, where it is known, `score`
        (what counts, larger is better), `status` ("diverged" where accuracy is missing), `seconds` and `flops`."""

    def all_scores(self, subsets: Sequence[Sequence[str]]) -> pd.DataFrame:
        """The same for every recipe, whose number is in `recipe`."""

    def count_parameters(self, blocks: Sequence[str]) -> int:
        """Parameters of a subset."""

    def candidates(self, subsets: Sequence[Sequence[str]]) -> list[Any]:
        """Every subset with each of its recipes; each has `blocks`."""

    def candidate_scores(
        self,
        candidates: Sequence[Any],
        folds: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        epochs: int | None = None,
    ) -> pd.DataFrame:
        """Rows as of `scores`, besides `candidate` (its place in the list) and `loss`; None means all."""


@dataclass(frozen=True)
class Cost:
    """What a search trains when nothing is recorded yet: trainings, their seconds and floating-point operations."""

    trainings: int
    seconds: float
    flops: float


class Chosen:
    """What a search chose, and how good that is: `blocks`, and a table that has a row for them."""

    blocks: tuple[str, ...]

    @property
    def tried(self) -> pd.DataFrame:
        """All subsets that the search scored."""
        raise NotImplementedError

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the chosen subset over seeds and folds, in [0, 1]."""
        return float(row_of(self.tried, self.blocks)["accuracy"])

    @property
    def std(self) -> float:
        """Its standard deviation over seeds and folds; missing for one score."""
        return float(row_of(self.tried, self.blocks)["std"])

    @property
    def n(self) -> int:
        """How many scores these are of."""
        return int(row_of(self.tried, self.blocks)["n"])

    @property
    def cost(self) -> Cost:
        """Of the whole search, every subset counted once."""
        return total_cost(self.tried)


@checked(scores=Table(("blocks",), ("accuracy",), rows=0))
def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and number of fold scores per subset.

    Args:
        scores: rows of `Study.scores`.
    Returns:
        Index `blocks`; columns `accuracy` (mean, in [0, 1]), `std` (with n - 1; missing for one score), `n`, `error`
        (standard error of the mean over folds, see `overlap_factor`), `score` (mean of what is chosen by; accuracy
        where nothing else was asked for). A subset of which one training diverged has none of these but `n`.
    """
    rows = scores.assign(score=value_of(scores), fold=scores.get("fold", 0))
    groups = rows.groupby("blocks", sort=False)
    table = groups["accuracy"].agg(accuracy="mean", std="std", n="size")
    by_fold = rows.groupby(["blocks", "fold"], sort=False)["accuracy"].mean().groupby(level="blocks", sort=False)
    table["error"] = by_fold.std() * overlap_factor(by_fold.size())
    table["score"] = groups["score"].mean()
    broken = rows["score"].isna().groupby(rows["blocks"], sort=False).any()
    table.loc[broken.to_numpy(), ["accuracy", "std", "error", "score"]] = math.nan
    return table


def value_of(table: pd.DataFrame) -> pd.Series:
    """What is chosen by, larger is better: the column `score` where there is one, else accuracy."""
    return table["score"] if "score" in table else table["accuracy"]


@checked(rows=Table(("fold",), ("accuracy",), rows=0), among=OneOf(("recipe", "method")))
def chosen_rows(rows: pd.DataFrame, among: str = "recipe", nested: bool = True) -> pd.DataFrame:
    """The rows that each subset counts with: those of its best recipe.

    Args:
        rows: of `Study.all_scores`, or of `Study.method_scores` for one method's settings.
        among: the column whose values are chosen among, "recipe" or "method".
        nested: each fold's rows are those of the recipe that is best on the other folds, so that what is reported was
            not chosen on the same images; one fold leaves no others. False: the best on all folds, whose own scores are
            optimistic (by 2 to 4 points in our measurements) and lean against subsets with fewer distinct recipes.
    Returns:
        Rows per subset, seed and fold, without `recipe`. Of recipes that tie the first counts; one of which a training
        diverged counts only if there is no other.
    """
    if among == "recipe" and (rows.empty or rows["recipe"].max() == 0):
        return rows.drop(columns=among)
    blocks = rows["blocks"] if among == "recipe" else pd.Series("", rows.index)
    return pd.concat([_of_best(some, among, nested) for _, some in rows.groupby(blocks, sort=False)], ignore_index=True)


def _of_best(rows: pd.DataFrame, among: str, nested: bool) -> pd.DataFrame:
    values = value_of(rows).fillna(-math.inf)
    chosen = {}
    for fold in rows["fold"].unique():
        others = rows["fold"] != fold
        seen = others if nested and others.any() else slice(None)
        means = values[seen].groupby(rows.loc[seen, among], sort=False).mean().round(DIGITS)
        chosen[fold] = means.index[int(means.to_numpy().argmax())]
    places = rows.groupby(among, sort=False).cumcount()  # of fold and seed, the same for every recipe
    kept = rows[among] == rows["fold"].map(chosen)
    return rows[kept].loc[places[kept].sort_values(kind="stable").index].drop(columns=among)


def candidate_table(
    study: Scorer,
    subsets: Sequence[tuple[str, ...]],
    race: Race | Halving | None = None,
    certain: Sequence[tuple[str, ...]] = (),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores subsets, all in one call.

    Args:
        study: what scores them.
        subsets: blocks each, in the network's order.
        race: by which some may be dropped before they are scored in full.
        certain: further subsets, which are scored in full whatever the others do.
    Returns:
        One row a subset, first those that are `certain`: `blocks`, `params`, `accuracy` and `std` (over seeds and
        folds), `n`, `error`, `score` (see `summarize`), `trainings`, `seconds` and `flops` (of all its recipes),
        `dropped` (the stage of the race after which it was given up; 0 for those scored in full). And the rows that
        count, one per subset, seed and fold.
    Raises:
        ValueError: a subset without a score, or one that is no number.
    """
    everything = [*certain, *subsets]
    if race is None:
        spent = study.all_scores(everything).assign(dropped=0)  # losing recipes were trained, too
        scores = chosen_rows(spent) if "recipe" in spent else spent
    else:
        spent = race.scores(study, subsets, certain)
        scores = spent[spent["counted"]]
    missing = set(everything) - set(scores["blocks"])
    if missing:
        raise ValueError(f"the scorer gave no score of {sorted(missing)}")
    check_accuracies(scores)
    means = summarize(scores).to_dict("index")  # a tuple as a key of .loc would mean several keys
    known = spent.reindex(columns=["blocks", "seconds", "flops"]).assign(trainings=1)
    costs = known.groupby("blocks")[list(COSTS)].sum(min_count=1).to_dict("index")  # missing where it isn't told
    facts = scores.groupby("blocks").agg(params=("params", "first"), dropped=("dropped", "max")).to_dict("index")
    rows = [{"blocks": blocks, **facts[blocks], **means[blocks], **costs[blocks]} for blocks in everything]
    return pd.DataFrame(rows), scores


def best_of(table: pd.DataFrame, names: Sequence[str]) -> int:
    """Label of the best row that was neither dropped nor diverged; ties go to fewer parameters, then to the earlier.

    Args:
        table: rows with `accuracy` or `score`, `params`, `dropped`, `blocks`, and `candidate` where that is compared.
        names: all blocks, in the network's order.
    Raises:
        ValueError: every training diverged.
    """
    values = value_of(table).astype(float).round(DIGITS)
    rows = table[(table["dropped"] == 0) & values.notna()]
    if rows.empty:
        raise ValueError(f"every training of {len(table)} subsets diverged; give a lower learning rate, or more warmup")
    last = [(name,) for name in rows["candidate"]] if "candidate" in rows else rows["blocks"]
    depth = [tuple(names.index(name) for name in blocks) for blocks in last]
    return min(zip(-values[rows.index], rows["params"], depth, rows.index, strict=True))[-1]


def row_of(table: pd.DataFrame, blocks: tuple[str, ...]) -> pd.Series:
    """The first row of a subset that was scored in full."""
    return next(row for _, row in table.iterrows() if row["blocks"] == blocks and row["dropped"] == 0)


def total_cost(table: pd.DataFrame) -> Cost:
    """Sum over the subsets of a table; one that is there twice was trained once."""
    total = table.groupby("blocks", sort=False)[list(COSTS)].max().sum(min_count=len(table["blocks"].unique()))
    return Cost(int(total["trainings"]), float(total["seconds"]), float(total["flops"]))


def check_accuracies(scores: pd.DataFrame) -> None:
    """Raises ValueError at the first accuracy that is no number in [0, 1], unless its row says that it diverged."""
    diverged = scores["status"].eq("diverged") if "status" in scores else False
    bad = scores[~(scores["accuracy"].between(0, 1) | diverged)]  # not a number isn't between
    if len(bad):
        row = bad.iloc[0]
        raise ValueError(
            f"accuracy of {row['blocks']} in fold {row['fold']}, seed {row['seed']} is {row['accuracy']}; "
            "it must be a number in [0, 1]"
        )
