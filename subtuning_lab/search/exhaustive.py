"""Searches over subsets: what candidates score and cost, which one is best, and the search through all. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import pandas as pd

from subtuning_lab.search.profiles import Scorer, summarize

COSTS = ("trainings", "seconds", "flops")
DIGITS = 12  # means are compared rounded: the order of a sum must not break a tie


class CheapScores(Protocol):
    """What a search asks of a race."""

    def scores(
        self, study: Scorer, subsets: Sequence[tuple[str, ...]], beside: Sequence[tuple[str, ...]] = ()
    ) -> pd.DataFrame:
        """Rows of every training made, with `counted` and `dropped`; see `racing.race_scores`."""


class Found(Protocol):
    """What every search's result tells: `GreedyResult`, `SearchResult`."""

    blocks: tuple[str, ...]
    accuracy: float
    std: float
    n: int
    cost: Cost


@dataclass(frozen=True)
class Cost:
    """What a search trains when nothing is recorded yet: trainings, their seconds and floating-point operations."""

    trainings: int
    seconds: float
    flops: float


@dataclass(frozen=True)
class SearchResult:
    """The best of many subsets, all of them scored, if only in short where a race gave them up.

    Args:
        blocks: the best subset; ties go to fewer parameters, then to the earlier blocks.
        table: one row a subset: `blocks`, `params`, `accuracy`, `std`, `n`, `trainings`, `seconds`, `flops`, `dropped`.
        scores: the rows that the table sums up, one per subset, seed and fold.
        title: backbone, task, number of training images.
    """

    blocks: tuple[str, ...]
    table: pd.DataFrame
    scores: pd.DataFrame
    title: str

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the best subset over seeds and folds, in [0, 1]."""
        return float(row_of(self.table, self.blocks)["accuracy"])

    @property
    def std(self) -> float:
        """Its standard deviation over seeds and folds."""
        return float(row_of(self.table, self.blocks)["std"])

    @property
    def n(self) -> int:
        """How many scores these are of."""
        return int(row_of(self.table, self.blocks)["n"])

    @property
    def cost(self) -> Cost:
        """Of the whole search."""
        return total_cost(self.table)


def exhaustive_search(study: Scorer, size: int, limit: int = 500, race: CheapScores | None = None) -> SearchResult:
    """Scores every subset of up to `size` blocks, the empty one included.

    Args:
        study: a `Study`, or whatever scores subsets likewise.
        size: blocks per subset, from 1 to the number of blocks.
        limit: how many subsets may be scored at most.
        race: drops hopeless subsets early; see `Race` and `Halving`.

    Raises:
        TypeError, ValueError: a size out of that range, or more subsets than `limit`.

    Source: PAPER "Greedy SubTuning", whose reviews ask whether greedy finds the best pair.
    """
    names = study.block_names
    check_count("size", size, len(names))
    check_count("limit", limit, None)
    subsets = [blocks for count in range(size + 1) for blocks in combinations(names, count)]
    if len(subsets) > limit:
        raise ValueError(
            f"{len(subsets)} subsets of up to {size} of {len(names)} blocks are more than limit={limit}; "
            f"give a smaller size, or limit={len(subsets)}"
        )
    return _search(study, subsets, race)


def best_window(study: Scorer, max_window: int | None = None, race: CheapScores | None = None) -> SearchResult:
    """Scores every window of consecutive blocks of any length up to `max_window`, by default all of them.

    Args:
        study: a `Study`, or whatever scores subsets likewise.
        max_window: blocks in the longest window.
        race: drops hopeless windows early; see `Race` and `Halving`.

    Raises:
        TypeError, ValueError: `max_window` is not from 1 to the number of blocks.

    Source: PAPER "The Finetuning Profile" (windows of 2 and 3 blocks).
    """
    names = study.block_names
    longest = len(names) if max_window is None else check_count("max_window", max_window, len(names))
    windows = [names[i : i + w] for w in range(1, longest + 1) for i in range(len(names) - w + 1)]
    return _search(study, windows, race)


def agreement_table(full: Mapping[str, Found], **cheaper: Mapping[str, Found]) -> pd.DataFrame:
    """Do cheaper searches find what the full search finds?

    Args:
        full: results of the full search by a label, e.g. "digits, seed 0".
        cheaper: results of other searches by their names, with the same labels.

    Returns:
        One row per label and search: `label`, `search`, `blocks`, `same` (blocks as of the full search), `accuracy`,
        `std`, `n`, `difference` from the full search's accuracy, `within` (at most one standard error of the full
        search's accuracy below it), `trainings`, `seconds`, `saved` (how many times fewer seconds the search takes),
        `flops`, `saved_flops` (likewise; a trunk that candidates share counts for each of them).

    Raises:
        ValueError: labels that differ.
    """
    rows = []
    for search, results in {"full": full, **cheaper}.items():
        if set(results) != set(full):
            raise ValueError(f"{search} has results of {sorted(results)}; it must have those of {sorted(full)}")
        for label, whole in full.items():
            own = results[label]
            difference = round(own.accuracy - whole.accuracy, DIGITS)
            row = {"label": label, "search": search, "blocks": own.blocks, "same": own.blocks == whole.blocks}
            row |= {"accuracy": own.accuracy, "std": own.std, "n": own.n, "difference": difference}
            row["within"] = difference >= -round(whole.std / math.sqrt(whole.n), DIGITS)
            row |= {"trainings": own.cost.trainings, "seconds": own.cost.seconds}
            row |= {"saved": whole.cost.seconds / own.cost.seconds, "flops": own.cost.flops}
            rows.append(row | {"saved_flops": whole.cost.flops / own.cost.flops})
    return pd.DataFrame(rows)


def candidate_table(
    study: Scorer,
    subsets: Sequence[tuple[str, ...]],
    race: CheapScores | None = None,
    beside: Sequence[tuple[str, ...]] = (),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores subsets, all in one call.

    Args:
        study: what scores them.
        subsets: blocks each, in the network's order.
        race: by which some may be dropped before they are scored in full.
        beside: subsets that are scored in full whatever the others do.

    Returns:
        One row a subset, first those `beside`: `blocks`, `params`, `accuracy` and `std` (over seeds and folds), `n`,
        `trainings`, `seconds` and `flops` (of all its recipes), `dropped` (the stage of the race after which it was
        given up; 0 for those scored in full). And the rows that count, one per subset, seed and fold.

    Raises:
        ValueError: a subset without a score, or one that is no number.
    """
    everything = [*beside, *subsets]
    if race is None:
        scores = study.scores(everything).assign(dropped=0)
        every_recipe = getattr(study, "all_scores", None)  # losing recipes were trained too
        spent = scores if every_recipe is None else every_recipe(everything)
    else:
        spent = race.scores(study, subsets, beside)
        scores = spent[spent["counted"]]
    _check_scores(scores, everything)
    means = summarize(scores).to_dict("index")  # a tuple as a key of .loc would mean several keys
    costs = _costs(spent)
    own = scores.groupby("blocks").agg(params=("params", "first"), dropped=("dropped", "max")).to_dict("index")
    rows = [{"blocks": blocks, **own[blocks], **means[blocks], **costs[blocks]} for blocks in everything]
    return pd.DataFrame(rows), scores


def best_of(table: pd.DataFrame, names: Sequence[str]) -> int:
    """Label of the best row that was not dropped; ties go to fewer parameters, then to the earlier candidate.

    Args:
        table: rows with `accuracy`, `params`, `dropped`, `blocks`, and `candidate` where that is what is compared.
        names: all blocks, in the network's order.
    """
    rows = table[table["dropped"] == 0]
    last = [(name,) for name in rows["candidate"]] if "candidate" in rows else rows["blocks"]
    depth = [tuple(names.index(name) for name in blocks) for blocks in last]
    keys = zip(-rows["accuracy"].round(DIGITS), rows["params"], depth, rows.index, strict=True)
    return min(keys)[-1]


def row_of(table: pd.DataFrame, blocks: tuple[str, ...]) -> pd.Series:
    """The first row of a subset that was scored in full."""
    return next(row for _, row in table.iterrows() if row["blocks"] == blocks and row["dropped"] == 0)


def total_cost(table: pd.DataFrame) -> Cost:
    """Sum over the subsets of a table; one that is there twice was trained once."""
    total = table.groupby("blocks", sort=False)[list(COSTS)].max().sum(min_count=len(table["blocks"].unique()))
    return Cost(int(total["trainings"]), float(total["seconds"]), float(total["flops"]))


def check_count(name: str, value: object, high: int | None) -> int:
    """The value; raises TypeError or ValueError unless it is a whole number from 1 to `high`."""
    allowed = "from 1 on" if high is None else f"from 1 to {high}, the number of blocks"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be a whole number {allowed}")
    if value < 1 or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; it must be {allowed}")
    return value


def check_accuracies(scores: pd.DataFrame) -> None:
    """Raises ValueError at the first accuracy that is no number in [0, 1]."""
    bad = scores[~scores["accuracy"].between(0, 1)]  # not a number isn't between
    if len(bad):
        row = bad.iloc[0]
        raise ValueError(
            f"accuracy of {row['blocks']} in fold {row['fold']}, seed {row['seed']} is {row['accuracy']}; "
            "it must be a number in [0, 1]"
        )


def _search(study: Scorer, subsets: Sequence[tuple[str, ...]], race: CheapScores | None) -> SearchResult:
    table, scores = candidate_table(study, subsets, race)
    best = table.at[best_of(table, study.block_names), "blocks"]
    return SearchResult(best, table, scores, study.title)


def _costs(rows: pd.DataFrame) -> dict[tuple[str, ...], dict[str, float]]:
    """Sums per subset; missing where a scorer doesn't tell."""
    told = rows.reindex(columns=["blocks", "seconds", "flops"]).assign(trainings=1)
    return told.groupby("blocks")[list(COSTS)].sum(min_count=1).to_dict("index")


def _check_scores(scores: pd.DataFrame, subsets: Sequence[tuple[str, ...]]) -> None:
    missing = set(subsets) - set(scores["blocks"])
    if missing:
        raise ValueError(f"the scorer gave no score of {sorted(missing)}")
    check_accuracies(scores)
