"""The low-data regime: methods against the number of training images, selected on folds, tested once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import pandas as pd

from subtuning_lab.baselines.compare import (
    BASELINES,
    HEAD2TOE,
    RANDOM_PARAMETERS,
    RANDOM_SIZE,
    Search,
    compare_methods,
    method_names,
)
from subtuning_lab.data.task import Task
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.experiments.tables import COSTS, group_summary
from subtuning_lab.nets.chain import Chain
from subtuning_lab.search.candidates import best_of
from subtuning_lab.search.exhaustive import best_window
from subtuning_lab.search.greedy import greedy_subtuning
from subtuning_lab.search.racing import Halving, Race
from subtuning_lab.study.records import opened
from subtuning_lab.study.study import Folds, Shown, Store, Study
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is, OneOf, Several, Whole, checked

GREEDY, BEST_WINDOW = "greedy", "best window"


@checked
def low_data_curves(
    backbone: Chain,
    task: Task,
    sizes: Annotated[Sequence[int], Several(Whole(2))],
    recipes: Annotated[Sequence[Recipe], Several(Is(Recipe))],
    methods: Annotated[Sequence[str], Several(OneOf((*method_names(), GREEDY, BEST_WINDOW)), unique=True)],
    *,
    folds: Folds = 5,
    repeats: Annotated[int, Whole(1)] = 3,
    max_blocks: Annotated[int | None, Whole(1, none=True)] = None,
    max_window: Annotated[int | None, Whole(1, none=True)] = 3,
    race: Annotated[Race | Halving | None, Is((Race, Halving), none=True)] = None,
    draws: Annotated[int, Whole(1)] = 3,
    pilot: bool = False,
    records: Store = None,
    progress: Shown = True,
) -> pd.DataFrame:
    """Compares methods at several training-set sizes, each with training images of its own in every repetition.

    Args:
        backbone: the pretrained chain.
        task: whose training images are chosen from, stratified; its test images are the same throughout.
        sizes: numbers of training images.
        recipes: the grid that every method chooses from on the folds, in every repetition anew unless `pilot`.
        methods: of `method_names()`; "greedy" and "best window" may be among them.
        folds, records, progress: as for `Study`. Each fold's recipe is chosen on the other folds, so that methods with
            many and with few recipes can be compared.
        repeats: repetitions, each with its own training images and seed.
        max_blocks: most blocks for greedy.
        max_window: longest window of consecutive blocks.
        race: by which greedy and the best window drop hopeless candidates early; see `Race` and `Halving`.
        draws: random subsets of each kind.
        pilot: whether a size's first repetition chooses each method's recipe for the others, which saves the grid's
            cost there. Random subsets take that of the first search. Blocks are chosen anew all the same.
    Returns:
        Rows of `compare_methods` with test accuracy, one per size, repetition and method, with `train_size`, `repeat`.
    """
    store = opened(records)
    plan = _Plan(tuple(methods), max_blocks, max_window, race, draws)
    tables = []
    for size in sizes:
        choices = {name: list(recipes) for name in methods}
        for repeat in range(repeats):
            small = task.subset(size, seed=repeat)
            options = {"folds": folds, "seeds": (repeat,), "records": store, "progress": progress}
            studies = _studies(choices, lambda few: Study(backbone, small, few, **options))  # noqa: B023 - called at once
            searches = plan.searches(studies)
            table = plan.compare(studies, searches, repeat)
            tables.append(table.assign(train_size=size, repeat=repeat))
            if pilot and repeat == 0:
                choices = {name: chosen_recipes(study, name, table, searches) for name, study in studies.items()}
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class _Plan:
    """What is compared in every repetition."""

    methods: tuple[str, ...]
    max_blocks: int | None
    max_window: int | None
    race: Race | Halving | None
    draws: int

    def searches(self, studies: Mapping[str, Study]) -> dict[str, Search]:
        """Those that are among the methods."""
        searches: dict[str, Search] = {}
        if GREEDY in self.methods:
            searches[GREEDY] = greedy_subtuning(studies[GREEDY], max_blocks=self.max_blocks, race=self.race)
        if BEST_WINDOW in self.methods:
            searches[BEST_WINDOW] = best_window(studies[BEST_WINDOW], self.max_window, self.race)
        return searches

    def compare(self, studies: Mapping[str, Study], searches: Mapping[str, Search], seed: int) -> pd.DataFrame:
        """One row per method, each on its own study."""
        names = next(iter(studies.values())).block_names
        # Where greedy chose nothing, the best window stands in as what random subsets are like.
        chosen = next((search.blocks for search in searches.values() if search.blocks), names[:1])
        tables = []
        for study in dict.fromkeys(studies.values()):
            methods = [name for name in self.methods if studies[name] is study]
            finished = {name: search for name, search in searches.items() if name in methods}
            others = [name for name in methods if name not in finished]
            tables.append(
                compare_methods(study, others, finished, chosen=chosen, draws=self.draws, test=True, seed=seed)
            )
        return pd.concat(tables, ignore_index=True)


def _studies(choices: Mapping[str, list[Recipe]], make: Callable[[list[Recipe]], Study]) -> dict[str, Study]:
    """A study for each method; those that choose among the same recipes share one."""
    made: dict[tuple[Recipe, ...], Study] = {}
    for recipes in choices.values():
        if tuple(recipes) not in made:
            made[tuple(recipes)] = make(recipes)
    return {name: made[tuple(recipes)] for name, recipes in choices.items()}


def chosen_recipes(study: Study, name: str, table: pd.DataFrame, searches: Mapping[str, Search]) -> list[Recipe]:
    """The recipe that a method counts with; all of them where that isn't one."""
    if name in searches or (searches and name in (RANDOM_SIZE, RANDOM_PARAMETERS)):
        found = searches.get(name, next(iter(searches.values())))
        return [study.recipe_of(_best_blocks(found, study.part_names))]
    if name in (HEAD2TOE, RANDOM_SIZE, RANDOM_PARAMETERS):
        return study.recipes
    variant = study.variant(**BASELINES[name].choices) if name in BASELINES else study
    return [variant.recipe_of(table.set_index("method").at[name, "blocks"])]


def _best_blocks(search: Search, names: Sequence[str]) -> tuple[str, ...]:
    """The search's result, or where that is no block at all, the best of the subsets that have one."""
    if search.blocks:
        return search.blocks
    tried = search.tried[search.tried["blocks"].map(len) > 0].drop(columns="candidate", errors="ignore")
    return tried.at[best_of(tried, names), "blocks"]


@checked(table=Table(("method", "train_size"), ("test_accuracy", "accuracy", *COSTS)))
def summarize_repeats(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over repetitions per size and method.

    Args:
        table: of `low_data_curves`.
    Returns:
        `train_size`, `method`, `accuracy` and `std` (on the test split), `n` (repetitions), `fold_accuracy`, `params`,
        `subsets`, `trainings`, `seconds` and `flops`, as means.
    """
    means = {"fold_accuracy": "accuracy"} | {name: name for name in COSTS}
    return group_summary(table, ["train_size", "method"], means)
