"""What tables of repetitions say: means and spreads of groups, and differences that are paired by repetition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Text, checked

COSTS = ("params", "subsets", "trainings", "seconds", "flops")
PAIRED = Table(("method", "train_size", "repeat"), ("test_accuracy",))


def group_summary(
    table: pd.DataFrame, by: Sequence[str], means: Mapping[str, str], of: str = "test_accuracy"
) -> pd.DataFrame:
    """Means and spreads over the repetitions of a group.

    Args:
        table: a row per repetition.
        by: columns that tell groups apart.
        means: name -> column whose mean it is.
        of: column that `accuracy`, `std` and `n` are of.
    """
    spread = {"accuracy": (of, "mean"), "std": (of, "std"), "n": (of, "count")}
    further = {name: (column, "mean") for name, column in means.items()}
    return table.groupby(list(by), sort=False).agg(**spread, **further).reset_index()


def paired_differences(
    table: pd.DataFrame,
    first: str,
    second: str,
    among: str = "method",
    within: Sequence[str] = (),
    of: str = "test_accuracy",
) -> pd.DataFrame:
    """How far one is ahead of another per group and size; in a repetition both see the same images and seed.

    Args:
        table: a row per repetition, with `train_size` and `repeat`.
        first, second: values of the column `among`.
        within: further columns that tell groups apart.
        of: column that is compared.
    Returns:
        `within`, `train_size`, `difference` (mean of the first minus the second), `std` (of the repetitions'
        differences), `error` (standard error of their mean over repetitions) and `n` (repetitions).
    Raises:
        ValueError: a value that the table, or one of its groups, doesn't have, or not in the other's repetitions.
    """
    place = [*within, "train_size"]
    wide = table.pivot(index=[*place, "repeat"], columns=among, values=of)
    for name in (first, second):
        if name not in wide:
            raise ValueError(f"the table has no {among} {name!r}; it has {', '.join(map(str, wide))}")
    pairs = wide.loc[wide[[first, second]].notna().any(axis=1), [first, second]]
    groups = table[[*within]].drop_duplicates()
    lone = within and len(pairs.groupby(list(within))) < len(groups)
    if lone or pairs.isna().any(axis=None):
        places = ", ".join((*within, "sizes"))
        raise ValueError(f"{first} and {second} must be there in the same {places} and repetitions")
    differences = (pairs[first] - pairs[second]).groupby(place)
    result = differences.agg(difference="mean", std="std", error="sem", n="count").reset_index()
    return groups.merge(result, on=list(within)) if within else result  # groups in the table's order


@checked(table=PAIRED, method=Text(), other=Text())
def method_differences(table: pd.DataFrame, method: str, other: str) -> pd.DataFrame:
    """How far one method is ahead of another per size, paired: in a repetition both see the same images and seed.

    Args:
        table: of `low_data_curves`.
        method, other: names of methods in it.
    Returns:
        One row per size: `train_size`, `difference` (mean test accuracy of `method` minus that of `other`), `std` (of
        the repetitions' differences), `error` (standard error of the mean), `n` (repetitions).
    """
    return paired_differences(table, method, other)
