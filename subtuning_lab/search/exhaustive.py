"""Searches through all subsets of some kind, and how far cheaper searches agree with them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import pandas as pd

from subtuning_lab.search.candidates import SCORER, Chosen, Scorer, best_of, candidate_table
from subtuning_lab.search.significance import fold_difference
from subtuning_lab.search.statistics import DIGITS
from subtuning_lab.utils.validation import Is, Whole, checked

if TYPE_CHECKING:
    from subtuning_lab.search.greedy import GreedyResult
    from subtuning_lab.search.racing import Halving, Race

RACE = Is(("Race", "Halving"), none=True)


@dataclass(frozen=True)
class SearchResult(Chosen):
    """The best of many subsets, all of them scored, if only in short where a race gave them up.

    Args:
        blocks: the best subset; ties go to fewer parameters, then to the earlier blocks.
        table: one row a subset: `blocks`, `params`, `accuracy`, `std`, `n`, `error`, `score`, `trainings`, `seconds`,
            `flops`, `dropped`.
        scores: the rows that the table sums up, one per subset, seed and fold.
        title: backbone, task, number of training images.
    """

    blocks: tuple[str, ...]
    table: pd.DataFrame
    scores: pd.DataFrame
    title: str

    @property
    def tried(self) -> pd.DataFrame:
        """The table."""
        return self.table


@checked(study=SCORER, size=Whole(1), limit=Whole(1), race=RACE)
def exhaustive_search(study: Scorer, size: int, limit: int = 500, race: Race | Halving | None = None) -> SearchResult:
    """Scores every subset of up to `size` blocks, the empty one included.

    Args:
        size: blocks per subset, from 1 to the number of blocks.
        limit: how many subsets may be scored at most.
        race: drops hopeless subsets early; see `Race` and `Halving`.
    Source: PAPER "Greedy SubTuning", whose reviews ask whether greedy finds the best pair.
    """
    names = study.block_names
    Whole(1, len(names)).check("size", size)
    subsets = [blocks for count in range(size + 1) for blocks in combinations(names, count)]
    if len(subsets) > limit:
        raise ValueError(
            f"{len(subsets)} subsets of up to {size} of {len(names)} blocks are more than limit={limit}; "
            f"give a smaller size, or limit={len(subsets)}"
        )
    return _search(study, subsets, race)


@checked(study=SCORER, max_window=Whole(1, none=True), race=RACE)
def best_window(study: Scorer, max_window: int | None = None, race: Race | Halving | None = None) -> SearchResult:
    """Scores every window of consecutive blocks of any length up to `max_window`, by default all of them.

    Args:
        max_window: blocks in the longest window.
        race: drops hopeless windows early; see `Race` and `Halving`.
    Source: PAPER "The Finetuning Profile" (windows of 2 and 3 blocks).
    """
    names = study.block_names
    Whole(1, len(names), none=True).check("max_window", max_window)
    longest = max_window or len(names)
    windows = [names[i : i + w] for w in range(1, longest + 1) for i in range(len(names) - w + 1)]
    return _search(study, windows, race)


@checked(full=Is(Mapping))
def agreement_table(
    full: Mapping[str, SearchResult], **cheaper: Mapping[str, SearchResult | GreedyResult]
) -> pd.DataFrame:
    """Do cheaper searches find what the full search finds?

    Args:
        full: results of the full search by a label, e.g. "digits, seed 0".
        cheaper: results of other searches of the same studies by their names, with the same labels.
    Returns:
        One row per label and search: `label`, `search`, `blocks`, `same` (blocks as of the full search), `accuracy`,
        `std`, `n`, `difference` (how far it is ahead of the full search), `error` (its standard error, paired by fold),
        `within` (at most one standard error behind), `trainings`, `seconds`, `saved` (how many times fewer seconds the
        search takes), `flops`, `saved_flops` (likewise; a trunk that candidates share counts for each of them).
    """
    rows = []
    for search, results in {"full": full, **cheaper}.items():
        if not isinstance(results, Mapping) or set(results) != set(full):
            labels = sorted(results) if isinstance(results, Mapping) else results
            raise ValueError(f"{search} has results of {labels}; it must have those of {sorted(full)}")
        for label, whole in full.items():
            result = results[label]
            ahead = fold_difference(_rows_of(result), _rows_of(whole))
            difference, error = round(ahead.mean, DIGITS), round(ahead.error, DIGITS)
            row = {"label": label, "search": search, "blocks": result.blocks, "same": result.blocks == whole.blocks}
            row |= {"accuracy": result.accuracy, "std": result.std, "n": result.n}
            row |= {"difference": difference, "error": error, "within": row["same"] or difference >= -error}
            row |= {"trainings": result.cost.trainings, "seconds": result.cost.seconds}
            row |= {"saved": whole.cost.seconds / result.cost.seconds, "flops": result.cost.flops}
            rows.append(row | {"saved_flops": whole.cost.flops / result.cost.flops})
    return pd.DataFrame(rows)


def _rows_of(result: SearchResult | GreedyResult) -> pd.DataFrame:
    """Fold scores of what a search chose."""
    return result.scores[[blocks == result.blocks for blocks in result.scores["blocks"]]]


def _search(study: Scorer, subsets: Sequence[tuple[str, ...]], race: Race | Halving | None) -> SearchResult:
    table, scores = candidate_table(study, subsets, race)
    best = table.at[best_of(table, study.block_names), "blocks"]
    return SearchResult(best, table, scores, study.title)
