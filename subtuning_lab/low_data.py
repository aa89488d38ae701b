"""The low-data regime: methods against the number of training images, selected on folds, tested once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from subtuning_lab.baselines import compare_methods
from subtuning_lab.chain import Chain
from subtuning_lab.checks import check_number
from subtuning_lab.greedy import greedy_subtuning
from subtuning_lab.recipe import Recipe
from subtuning_lab.records import Records
from subtuning_lab.search import CheapScores, best_window
from subtuning_lab.study import Study
from subtuning_lab.tasks import Task

GREEDY, BEST_WINDOW = "greedy", "best window"


def low_data_curves(
    backbone: Chain,
    task: Task,
    sizes: Sequence[int],
    recipes: Sequence[Recipe],
    methods: Sequence[str],
    *,
    folds: int = 5,
    repeats: int = 3,
    max_blocks: int | None = None,
    max_window: int | None = 3,
    race: CheapScores | None = None,
    draws: int = 3,
    records: str | Path | Records | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> pd.DataFrame:
    """Compares methods at several training-set sizes, each with training images of its own in every repetition.

    Args:
        backbone: the pretrained chain.
        task: whose training images are chosen from, stratified; its test images are the same throughout.
        sizes: numbers of training images.
        recipes: the grid that every method chooses from on the folds.
        methods: of `method_names()`; "greedy" and "best window" may be among them.
        folds, records, progress: as for `Study`.
        repeats: repetitions, each with its own training images and seed.
        max_blocks: most blocks for greedy.
        max_window: longest window of consecutive blocks.
        race: by which greedy and the best window drop hopeless candidates early; see `Race` and `Halving`.
        draws: random subsets of each kind.

    Returns:
        Rows of `compare_methods` with test accuracy, one per size, repetition and method, with `train_size`, `repeat`.
    """
    check_number("repeats", repeats, 1)
    store = records if isinstance(records, Records) else Records(records or ":memory:")
    tables = []
    for size in sizes:
        for repeat in range(repeats):
            own = task.subset(size, seed=repeat)
            options = {"folds": folds, "seeds": (repeat,), "records": store, "progress": progress}
            study = Study(backbone, own, recipes, **options)
            searches = {}
            if GREEDY in methods:
                searches[GREEDY] = greedy_subtuning(study, max_blocks=max_blocks, race=race)
            if BEST_WINDOW in methods:
                searches[BEST_WINDOW] = best_window(study, max_window, race)
            # Where greedy chose nothing, the best window stands in as what random subsets are like.
            chosen = next((found.blocks for found in searches.values() if found.blocks), study.block_names[:1])
            others = [name for name in methods if name not in (GREEDY, BEST_WINDOW)]
            table = compare_methods(study, others, searches, chosen=chosen, draws=draws, test=True, seed=repeat)
            tables.append(table.assign(train_size=size, repeat=repeat))
    return pd.concat(tables, ignore_index=True)


def summarize_repeats(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over repetitions per size and method.

    Args:
        table: of `low_data_curves`.

    Returns:
        `train_size`, `method`, `accuracy` and `std` (on the test split), `n` (repetitions), `fold_accuracy`, `params`,
        `subsets`, `trainings`, `seconds` and `flops`, as means.
    """
    groups = table.groupby(["train_size", "method"], sort=False)
    return groups.agg(
        accuracy=("test_accuracy", "mean"),
        std=("test_accuracy", "std"),
        n=("test_accuracy", "count"),
        fold_accuracy=("accuracy", "mean"),
        params=("params", "mean"),
        subsets=("subsets", "mean"),
        trainings=("trainings", "mean"),
        seconds=("seconds", "mean"),
        flops=("flops", "mean"),
    ).reset_index()


def method_differences(table: pd.DataFrame, method: str, other: str) -> pd.DataFrame:
    """How far one method is ahead of another per size, paired: in a repetition both see the same images and seed.

    Args:
        table: of `low_data_curves`.
        method, other: names of methods in it.

    Returns:
        One row per size: `train_size`, `difference` (mean test accuracy of `method` minus that of `other`), `std` (of
        the repetitions' differences), `error` (standard error of the mean), `n` (repetitions).

    Raises:
        ValueError: a method that the table doesn't have, or not in all the repetitions that the other has.
    """
    wide = table.pivot(index=["train_size", "repeat"], columns="method", values="test_accuracy")
    for name in (method, other):
        if name not in wide:
            raise ValueError(f"the table has no method {name!r}; it has {', '.join(wide)}")
    pairs = wide.loc[wide[[method, other]].notna().any(axis=1), [method, other]]
    if pairs.isna().any(axis=None):
        raise ValueError(f"{method} and {other} must be there in the same sizes and repetitions")
    groups = (pairs[method] - pairs[other]).groupby("train_size")
    return groups.agg(difference="mean", std="std", error="sem", n="count").reset_index()
