"""Where earlier searches with the same backbone found their best blocks: a score that costs nothing. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd


def earlier_ranks(records: pd.DataFrame, names: Sequence[str], backbone: str, task: str) -> pd.DataFrame:
    """Ranks of single blocks on other tasks of the same backbone, as far as their profiles are complete.

    Args:
        records: of `Records.table`.
        names: the blocks.
        backbone, task: fingerprints; rows of this very task are left out.

    Returns:
        One row a task (index, its name and fingerprint), one column a block: 1 for the block that scored best over
        folds, seeds and recipes' best; ties share their mean rank.
    """
    single = records["blocks"].map(lambda blocks: len(blocks) == 1 and blocks[0] in names)
    rows = records[(records["split"] == "fold") & single & records["accuracy"].notna()]
    keys = rows["determined_by"].map(lambda known: (known.get("backbone"), known.get("task")))
    rows = rows.assign(block=rows["blocks"].str[0], source=keys, settings=rows["recipe"].map(str))
    rows = rows[[own == backbone and other != task for own, other in rows["source"]]]
    means = rows.groupby(["task", "source", "block", "settings"])["accuracy"].mean()
    best = means.groupby(["task", "source", "block"]).max().unstack("block").reindex(columns=list(names)).dropna()
    return best.rank(axis=1, ascending=False)


def mean_rank(records: pd.DataFrame, names: Sequence[str], backbone: str, task: str) -> np.ndarray:
    """Mean rank (blocks,) of each block over the other tasks; smaller is better.

    Raises:
        ValueError: no other task with a complete profile.
    """
    table = earlier_ranks(records, names, backbone, task)
    if table.empty:
        raise ValueError(
            "criterion is 'prior', but the records hold no complete profile of this backbone on another task; "
            "it must be another one, or give the study the records of earlier profiles"
        )
    return table.mean().to_numpy()
