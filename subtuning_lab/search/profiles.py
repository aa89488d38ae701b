"""Finetuning profiles: how well each block, window or pair of blocks does when it alone is tuned. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import pandas as pd

LINEAR_PROBING, FULL_FINETUNING = "linear probing", "full finetuning"


class Scorer(Protocol):
    """What a profile asks of a study."""

    title: str
    block_names: tuple[str, ...]
    part_names: tuple[str, ...]

    def scores(self, subsets: Sequence[Sequence[str]]) -> pd.DataFrame:
        """Rows with `blocks` (tuple), `fold`, `seed`, `accuracy` and `params`."""

    def count_parameters(self, blocks: Sequence[str]) -> int:
        """Parameters of a subset."""


@dataclass(frozen=True)
class Profile:
    """Scores of subsets, beside linear probing and full finetuning.

    Args:
        table: one row a subset: `label`, `kind` ("blocks", "linear probing" or "full finetuning"), `position` (of its
            first block, from 1; missing for the two references), `blocks`, `params`, `accuracy` and `std` (mean and
            standard deviation over seeds and folds), `n` (how many scores these are of).
        scores: the rows that the table sums up, one per subset, seed and fold.
        window: blocks per subset.
        title: backbone, task, number of training images.
    """

    table: pd.DataFrame
    scores: pd.DataFrame
    window: int
    title: str

    def best(self) -> tuple[str, ...]:
        """Blocks of the best row of the profile; ties go to fewer parameters, then to the earlier one."""
        rows = self.table[self.table["kind"] == "blocks"]
        rows = rows.round({"accuracy": 12})  # the order of a sum must not break a tie
        return rows.sort_values(["accuracy", "params", "position"], ascending=[False, True, True])["blocks"].iloc[0]


def finetuning_profile(study: Scorer, window: int = 1) -> Profile:
    """Scores every window of consecutive blocks, tuned alone, with linear probing and full finetuning beside them.

    Args:
        study: a `Study`, or whatever scores subsets likewise.
        window: consecutive blocks per subset, from 1 to the number of blocks.

    Raises:
        ValueError: a window out of that range.

    Source: PAPER "The Finetuning Profile".
    """
    names = study.block_names
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= len(names):
        raise ValueError(
            f"window is {window!r}; it must be a whole number from 1 to {len(names)}, the number of blocks"
        )
    starts = range(len(names) - window + 1)
    subsets = {_label(names[i : i + window]): names[i : i + window] for i in starts}
    return _profile(study, subsets, window)


def pair_profile(study: Scorer) -> Profile:
    """Scores every pair of blocks, and every single block; `plot_pairs` shows it as a heat map.

    Source: PAPER "Greedy SubTuning", whose reviews ask whether greedy finds the best pair.
    """
    singles = {name: (name,) for name in study.block_names}
    pairs = {_label(pair): pair for pair in combinations(study.block_names, 2)}
    return _profile(study, singles | pairs, window=2)


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and number of fold scores per subset.

    Args:
        scores: rows of `Study.scores`.

    Returns:
        Index `blocks`; columns `accuracy` (mean, in [0, 1]), `std` (with n - 1; missing for one score), `n`.
    """
    return scores.groupby("blocks", sort=False)["accuracy"].agg(accuracy="mean", std="std", n="count")


def _profile(study: Scorer, subsets: Mapping[str, Sequence[str]], window: int) -> Profile:
    references = {LINEAR_PROBING: (), FULL_FINETUNING: tuple(study.part_names)}
    everything = {**subsets, **references}
    scores = study.scores(list(everything.values()))
    summary = summarize(scores).to_dict("index")  # a tuple as a key of .loc would mean several keys
    rows = []
    for label, blocks in everything.items():
        place = None if label in references else study.block_names.index(blocks[0]) + 1
        kind = label if label in references else "blocks"
        rows.append(
            (label, kind, place, tuple(blocks), study.count_parameters(blocks), *summary[tuple(blocks)].values())
        )
    columns = ["label", "kind", "position", "blocks", "params", "accuracy", "std", "n"]
    table = pd.DataFrame(rows, columns=columns).astype({"position": "Int64", "n": int})
    return Profile(table, scores, window, study.title)


def _label(blocks: Sequence[str]) -> str:
    return " + ".join(blocks) if len(blocks) < 3 else f"{blocks[0]} ... {blocks[-1]}"
