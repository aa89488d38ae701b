"""Finetuning profiles: how well each block, window or pair of blocks does when it alone is tuned. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from subtuning_lab.search.candidates import SCORER, Scorer, summarize, value_of
from subtuning_lab.search.statistics import DIGITS
from subtuning_lab.utils.validation import Whole, checked

LINEAR_PROBING, FULL_FINETUNING = "linear probing", "full finetuning"


@dataclass(frozen=True)
class Profile:
    """Scores of subsets, with linear probing and full finetuning to compare with.

    Args:
        table: one row a subset: `label`, `kind` ("blocks", "linear probing" or "full finetuning"), `position` (of its
            first block, from 1; missing for the two references), `blocks`, `params`, and `accuracy`, `std`, `n`,
            `error` and `score` as of `summarize`. A recipe is chosen for each fold on the others.
        scores: the rows that the table sums up, one per subset, seed and fold.
        window: blocks per subset.
        title: backbone, task, number of training images.
    """

    table: pd.DataFrame
    scores: pd.DataFrame
    window: int
    title: str

    def best(self) -> tuple[str, ...]:
        """Blocks of the best row of the profile; ties go to fewer parameters, then to the earlier one.

        Raises:
            ValueError: every training diverged.
        """
        rows = self.table[self.table["kind"] == "blocks"]
        rows = rows.assign(value=value_of(rows).astype(float).round(DIGITS))
        best = rows.sort_values(["value", "params", "position"], ascending=[False, True, True]).iloc[0]
        if pd.isna(best["value"]):
            raise ValueError(f"every training of {len(rows)} subsets diverged; give a lower learning rate")
        return best["blocks"]


@checked(study=SCORER, window=Whole(1))
def finetuning_profile(study: Scorer, window: int = 1) -> Profile:
    """Scores every window of consecutive blocks, tuned alone; linear probing and full finetuning are scored as well.

    Args:
        window: consecutive blocks per subset, from 1 to the number of blocks.
    Source: PAPER "The Finetuning Profile".
    """
    names = study.block_names
    Whole(1, len(names)).check("window", window)
    windows = [names[i : i + window] for i in range(len(names) - window + 1)]
    subsets = {_label(blocks): blocks for blocks in windows} | _references(study)
    return _profile(study, subsets, study.scores(list(subsets.values())), window)


@checked(study=SCORER)
def pair_profile(study: Scorer) -> Profile:
    """Scores every pair of blocks, and every single block; `plot_pairs` shows it as a heat map.

    Source: PAPER "Greedy SubTuning", whose reviews ask whether greedy finds the best pair.
    """
    singles = [(name,) for name in study.block_names]
    subsets = {_label(blocks): blocks for blocks in [*singles, *combinations(study.block_names, 2)]}
    subsets |= _references(study)
    return _profile(study, subsets, study.scores(list(subsets.values())), window=2)


def _references(study: Scorer) -> dict[str, tuple[str, ...]]:
    return {LINEAR_PROBING: (), FULL_FINETUNING: tuple(study.part_names)}


def _profile(study: Scorer, subsets: Mapping[str, tuple[str, ...]], scores: pd.DataFrame, window: int) -> Profile:
    summary = summarize(scores).to_dict("index")  # a tuple as a key of .loc would mean several keys
    rows = []
    for label, blocks in subsets.items():
        reference = label in (LINEAR_PROBING, FULL_FINETUNING)
        row = {"label": label, "kind": label if reference else "blocks"}
        row["position"] = None if reference else study.block_names.index(blocks[0]) + 1
        rows.append(row | {"blocks": blocks, "params": study.count_parameters(blocks), **summary[blocks]})
    return Profile(pd.DataFrame(rows).astype({"position": "Int64", "n": int}), scores, window, study.title)


def _label(blocks: Sequence[str]) -> str:
    return " + ".join(blocks) if len(blocks) < 3 else f"{blocks[0]} ... {blocks[-1]}"
