"""Distribution shift: a source network adapted to corrupted images, or to new classes, with few labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import pandas as pd

from subtuning_lab.baselines.bn_adapt import BN_STATISTICS, NO_ADAPTATION, SourceNetwork, with_readout_of
from subtuning_lab.baselines.compare import compare_methods, method_names, stages
from subtuning_lab.data.corruptions.registry import parse_corruptions
from subtuning_lab.data.task import Split, Task
from subtuning_lab.engine.recipe import Recipe, check_recipes
from subtuning_lab.experiments.low_data import GREEDY, chosen_recipes
from subtuning_lab.experiments.tables import COSTS, group_summary, paired_differences
from subtuning_lab.nets.chain import Chain
from subtuning_lab.search.candidates import summarize
from subtuning_lab.search.greedy import GreedyResult, greedy_subtuning
from subtuning_lab.search.profiles import Profile, finetuning_profile
from subtuning_lab.search.racing import Halving, Race
from subtuning_lab.study.records import opened
from subtuning_lab.study.study import Folds, Recipes, Shown, Store, Study
from subtuning_lab.utils.containers import Either, Table
from subtuning_lab.utils.validation import Flag, Has, Is, Several, Text, Whole, checked

STAGES, INPUT, LABEL = "stages", "input", "label"
SHIFT_METHODS = (NO_ADAPTATION, BN_STATISTICS, "linear probing", "full finetuning", "Auto-RGN", STAGES, GREEDY)
_UNTRAINED = {NO_ADAPTATION: [SourceNetwork()], BN_STATISTICS: [SourceNetwork("target")]}
_PLACE = ["train_size", "shift"]
_SHIFTS = Table(("train_size", "shift", "kind", "method", "repeat"), ("test_accuracy", "clean_accuracy"))
_Corruptions = Annotated[Iterable[str], Several(Text(), least=0)]
_NewTasks = Annotated[Sequence[Task], Several(Is(Task), least=0)]
_TrainSize = Annotated[int | None, Whole(2, none=True)]
_Repeats = Annotated[int, Whole(1)]
_Studies = Annotated[
    Iterable[tuple[Mapping[str, Any], Study]],
    Either(Has(("__next__",), "a generator such as shift_studies(...)"), Several(Is(tuple))),
]


@checked
def shift_study(
    backbone: Chain,
    source_task: Task,
    corruptions: _Corruptions,
    recipes: Recipes,
    methods: Annotated[Sequence[str], Several(Text(), unique=True)] = SHIFT_METHODS,
    *,
    new_tasks: _NewTasks = (),
    train_size: _TrainSize = None,
    folds: Folds = 2,
    repeats: _Repeats = 3,
    max_blocks: Annotated[int | None, Whole(1, none=True)] = None,
    race: Annotated[Race | Halving | None, Is((Race, Halving), none=True)] = None,
    pilot: Annotated[bool, Flag()] = False,
    records: Store = None,
    progress: Shown = True,
) -> pd.DataFrame:
    """Adapts a source network to each shift with few labels, by several methods, each with its best recipe.

    Corrupted images keep their classes, so that a recipe may start from the pretrained readout (`head_start="source"`),
    and the clean test images tell what is forgotten. New classes get a new readout.

    Args:
        backbone: the source network; output i of its `source_head` is class i of the source task.
        source_task: clean images, training and test.
        corruptions: "name@severity" each, or several of these with "+" between them.
        recipes: the grid that every method chooses from on the folds.
        methods: of `SHIFT_METHODS` and `method_names()`; "stages" makes a row for each stage of the network alone, and
            "stage 1" is one of them.
        new_tasks: label shifts: tasks with other classes. What needs the pretrained readout is left out there.
        train_size: labelled images; None takes all.
        folds, records, progress: as for `Study`.
        repeats: repetitions, each with its own labelled images and seed.
        max_blocks, race: as for `greedy_subtuning`.
        pilot: whether a shift's first repetition chooses each method's recipe for the others, as in `low_data_curves`.
    Returns:
        Rows of `compare_methods` with test accuracy under the shift, one per shift, repetition and method, with
        `train_size`, `shift`, `kind` ("input" or "label"), `repeat`; `clean_accuracy` on the source task's test images
        (missing for new classes); and `steps`, the blocks in the order in which greedy chose them.
    Raises:
        ValueError: no pretrained readout of the source task's classes, no test images, an unknown method or corruption.
    Source: PAPER "Distribution shift"; Lee et al. 2023 (surgical finetuning), whose claim this is to test.
    """
    _check_methods(backbone, methods)
    if not corruptions and not new_tasks:
        raise ValueError("corruptions and new_tasks are empty; give at least one shift")
    options = {"records": records, "folds": folds, "progress": progress}
    studies = shift_studies(backbone, source_task, corruptions, recipes, new_tasks, train_size, repeats, **options)
    tables, piloted = [], {}
    for place, study in studies:
        clean = source_task.test if place["kind"] == INPUT else None
        for own, names in piloted.get(place["shift"], {tuple(study.recipes): methods}).items():
            one = study.with_(recipe=own)
            searches = {GREEDY: greedy_subtuning(one, max_blocks=max_blocks, race=race)} if GREEDY in names else {}
            tables.append(_adapted(one, names, searches, clean, place["repeat"]).assign(**place))
        if pilot and place["repeat"] == 0:
            piloted[place["shift"]] = _by_recipe(study, tables[-1], searches)
    return pd.concat(tables, ignore_index=True)


@checked
def shift_studies(
    backbone: Chain,
    source_task: Task,
    corruptions: _Corruptions,
    recipes: Recipes,
    new_tasks: _NewTasks = (),
    train_size: _TrainSize = None,
    repeats: _Repeats = 3,
    *,
    records: Store = None,
    **options: Any,
) -> Iterator[tuple[dict[str, Any], Study]]:
    """The study of every shift and repetition, with its `shift`, `kind`, `train_size` and `repeat`.

    Args and Raises: as for `shift_study`; `options` go to `Study`.
    """
    if source_task.test is None:
        raise ValueError(f"task {source_task.name} has no test split")
    source, wanted = with_readout_of(backbone, source_task), list(corruptions)
    for corruption in wanted:
        _parsed(corruption)  # a misspelt one must not wait for its turn
    store = opened(records)
    grid = list(check_recipes(recipes))
    renewed = list(dict.fromkeys(replace(r, head_start="random") if r.head_start == "source" else r for r in grid))
    for task, corruption in [(source_task, name) for name in wanted] + [(task, None) for task in new_tasks]:
        test = task.test if corruption is None else corrupted(task.test, corruption, part=1)
        for repeat in range(repeats):
            small = replace(task.subset(train_size or len(task.train), seed=repeat), test=test)
            if corruption is not None:
                train = corrupted(small.train, corruption, part=0)
                small = replace(small, name=f"{task.name}+{corruption}", train=train)
            place = {"shift": corruption or task.name, "kind": INPUT if corruption else LABEL}
            place |= {"train_size": len(small.train), "repeat": repeat}
            settings = {"seeds": (repeat,), "records": store, **options}
            yield place, Study(source, small, grid if corruption else renewed, **settings)


@checked(corruption=Text(), part=Whole(0, 1))
def corrupted(split: Split, corruption: str, part: int) -> Split:
    """The split with its images corrupted as `load_task` does it.

    Args:
        corruption: "name@severity", or several of these with "+" between them.
        part: 0 for training images, 1 for test images, so that their noise differs.
    """
    return split.corrupted(_parsed(corruption), part)


@checked
def stage_subsets(backbone: Chain) -> dict[str, tuple[str, ...]]:
    """The network's stages by name, "stage 1" and so on; the first has the stem, the last a tail with weights.

    Source: surgical finetuning (Lee et al. 2023), which tunes one of them.
    """
    subsets = {f"stage {number}": blocks for number, blocks in enumerate(stages(backbone.block_names), start=1)}
    first, last = next(iter(subsets)), list(subsets)[-1]
    subsets[first] = ("stem", *subsets[first])
    if any(True for _ in backbone.tail.parameters()):
        subsets[last] = (*subsets[last], "tail")
    return subsets


@checked
def shift_profiles(studies: _Studies) -> dict[str, Profile]:
    """The finetuning profile under each shift, over the folds of all repetitions; what is recorded is read.

    Args:
        studies: of `shift_studies`, for one training-set size.
    """
    by_shift: dict[str, list[Profile]] = {}
    for place, study in studies:
        by_shift.setdefault(place["shift"], []).append(finetuning_profile(study))
    return {shift: _pooled(profiles) for shift, profiles in by_shift.items()}


@checked(table=_SHIFTS)
def summarize_shifts(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over repetitions per training-set size, shift and method.

    Args:
        table: of `shift_study`, or several of these together.
    Returns:
        `train_size`, `shift`, `kind`, `method`, `accuracy` and `std` (under the shift, on the test images), `n`
        (repetitions), `clean_accuracy` and `clean_std`, `fold_accuracy`, `params`, `subsets`, `trainings`, `seconds`
        and `flops`, as means.
    """
    return _summary(table, [*_PLACE, "kind", "method"])


@checked(table=_SHIFTS)
def average_shifts(table: pd.DataFrame) -> pd.DataFrame:
    """As `summarize_shifts`, of each repetition's mean over all corruptions; label shifts are left out.

    Raises:
        ValueError: a method that is missing under some of the corruptions.
    """
    rows = table[table["kind"] == INPUT]
    shifts = rows.groupby("method")["shift"].nunique()
    if (shifts < shifts.max()).any():
        raise ValueError(f"{shifts.idxmin()} is there for {shifts.min()} of {shifts.max()} corruptions; it needs all")
    numbers = ["test_accuracy", "clean_accuracy", "accuracy", *COSTS]
    means = rows.groupby(["train_size", "method", "repeat"], sort=False)[numbers].mean().reset_index()
    return _summary(means, ["train_size", "method"])


@checked(table=Table((*_PLACE, "method", "repeat"), ("test_accuracy",)), method=Text(), other=Text())
def shift_differences(table: pd.DataFrame, method: str, other: str) -> pd.DataFrame:
    """`method_differences` under each shift, with its column `shift`."""
    return paired_differences(table, method, other, within=["shift"])


@checked(table=Table((*_PLACE, "method", "steps")), block_names=Several(Text(), unique=True))
def chosen_steps(table: pd.DataFrame, block_names: Sequence[str]) -> pd.DataFrame:
    """At which step greedy chose which block.

    Args:
        table: of `shift_study`, with the method "greedy".
        block_names: of the backbone, from input to output.
    Returns:
        One row per training-set size, shift and block: `step`, the mean over the repetitions that chose it (from 1;
        missing where none did), `chosen`, their number, and `n`, of all repetitions.
    """
    rows = table[table["method"] == GREEDY]
    if rows.empty:
        raise ValueError(f"the table has no method {GREEDY!r}; it has {', '.join(table['method'].unique())}")
    counts = []
    for place, group in rows.groupby(_PLACE, sort=False):
        for block in block_names:
            steps = pd.Series([order.index(block) + 1 for order in group["steps"] if block in order], dtype=float)
            counts.append((*place, block, steps.mean(), len(steps), len(group)))
    return pd.DataFrame(counts, columns=[*_PLACE, "block", "step", "chosen", "n"])


def _check_methods(backbone: Chain, methods: Sequence[str]) -> None:
    """Raises ValueError for a name that no method has, before the first training."""
    known = [*dict.fromkeys((*SHIFT_METHODS, *stage_subsets(backbone), *method_names()))]
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}; there are {', '.join(known)}")


def _adapted(
    study: Study, methods: Sequence[str], searches: Mapping[str, GreedyResult], clean: Split | None, seed: int
) -> pd.DataFrame:
    """One row per method in their order, for one shift and repetition; without clean images, it is a label shift."""
    own_stages = stage_subsets(study.backbone)
    subsets = {name: blocks for name, blocks in own_stages.items() if name in methods or STAGES in methods}
    others = {name: _UNTRAINED[name] for name in methods if name in _UNTRAINED and clean is not None}
    usual = [name for name in methods if name not in (*_UNTRAINED, *own_stages, STAGES, GREEDY)]
    # Where greedy chose nothing, one block stands in as what random subsets are like.
    chosen = next((search.blocks for search in searches.values() if search.blocks), study.block_names[:1])
    extra = {"subsets": subsets, "others": others, "also_on": clean}
    rows = compare_methods(study, usual, searches, chosen=chosen, test=True, seed=seed, **extra)
    steps = {name: _order(search) for name, search in searches.items()}
    rows = rows.assign(steps=[steps.get(name) for name in rows["method"]])
    rows["clean_accuracy"] = rows.pop("also_accuracy") if clean is not None else float("nan")
    order = [own for name in methods for own in (subsets if name == STAGES else [name])]
    return rows.sort_values("method", key=lambda names: names.map(order.index), kind="stable")


def _by_recipe(
    study: Study, rows: pd.DataFrame, searches: Mapping[str, GreedyResult]
) -> dict[tuple[Recipe, ...], list[str]]:
    """The methods of a pilot's rows, by the recipes that they go on with."""
    groups: dict[tuple[Recipe, ...], list[str]] = {}
    for name in rows["method"]:
        recipes = study.recipes if name in _UNTRAINED else chosen_recipes(study, name, rows, searches)
        groups.setdefault(tuple(recipes), []).append(name)
    return groups


def _order(search: GreedyResult) -> tuple[str, ...]:
    """The chosen blocks in the order in which they were chosen."""
    rows = search.trace[search.trace["kept"] & (search.trace["round"] > 0)]
    return tuple(rows.sort_values("round")["candidate"])


def _parsed(corruption: str) -> list[tuple[str, int]]:
    """(name, severity) of each. Raises ValueError for an unknown one, or none at all."""
    corruptions = parse_corruptions(corruption)
    if not corruptions:
        raise ValueError(f"corruption is {corruption!r}; write name@severity, e.g. contrast@5")
    return corruptions


def _pooled(profiles: Sequence[Profile]) -> Profile:
    """One profile over the scores of all repetitions."""
    first, scores = profiles[0], pd.concat([profile.scores for profile in profiles], ignore_index=True)
    summary = summarize(scores).to_dict("index")  # a tuple as a key of .loc would mean several keys
    values = pd.DataFrame([summary[blocks] for blocks in first.table["blocks"]], index=first.table.index)
    return replace(first, table=first.table.assign(**values), scores=scores)


def _summary(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    means = {"clean_accuracy": "clean_accuracy", "fold_accuracy": "accuracy"} | {name: name for name in COSTS}
    clean = group_summary(table, by, {}, "clean_accuracy")["std"]
    summary = group_summary(table, by, means)
    summary.insert(summary.columns.get_loc("clean_accuracy") + 1, "clean_std", clean)
    return summary
