"""The protocol of VTAB-1k: choose on the 1,000 training images, train on all of them, look at the test images once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import pandas as pd

from subtuning_lab.baselines.head2toe import Head2Toe
from subtuning_lab.data.task import Task
from subtuning_lab.experiments.reported import reported
from subtuning_lab.nets.chain import Chain
from subtuning_lab.search.candidates import value_of
from subtuning_lab.search.greedy import greedy_subtuning
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, finetuning_profile
from subtuning_lab.search.statistics import DIGITS
from subtuning_lab.study.keys import Method
from subtuning_lab.study.study import Recipes, Store, Study
from subtuning_lab.utils.containers import Mapped, Table
from subtuning_lab.utils.validation import OneOf, Several, Whole, checked

Chosen = Iterable[str] | Literal["all"] | Method | tuple[Study, Iterable[str] | Literal["all"]]
Choice = Callable[[Study], Chosen]

COLUMNS = (
    *("method", "backbone", "task", "blocks", "settings", "params", "fold_accuracy", "fold_std", "n_scores"),
    *("accuracy", "std", "n", "n_train", "n_held_out", "n_test", "test_uses"),
)
_TITLES = {
    "CIFAR-100": ("cifar", "cifar100", "vtabcifar100"),
    "Caltech101": ("caltech101", "vtabcaltech101"),
    "Flowers102": ("flowers102", "oxfordflowers102", "vtabflowers102"),
    "DMLab": ("dmlab",),
}
_TITLE_OF = {name: title for title, names in _TITLES.items() for name in names}


@checked
def best_head2toe(study: Study) -> Head2Toe:
    """The settings of `Head2Toe.grid` that are best by the study's score on the folds; of equal ones the first."""
    methods = Head2Toe.grid()
    rows = study.method_scores(methods)
    means = value_of(rows).fillna(-math.inf).groupby(rows["method"]).mean()
    return methods[int(means.round(DIGITS).idxmax())]


#: ways to choose what to tune, by name
CHOICES: Mapping[str, Choice] = MappingProxyType(
    {
        LINEAR_PROBING: lambda study: (),
        FULL_FINETUNING: lambda study: "all",
        "Head2Toe": best_head2toe,
        "best block": lambda study: finetuning_profile(study).best(),
        "greedy SubTuning": lambda study: greedy_subtuning(study).blocks,
    }
)


@checked
def vtab_protocol(
    backbone: Chain,
    task: Task,
    recipes: Recipes,
    choose: Annotated[Mapping[str, Choice], Mapped()] = CHOICES,
    *,
    folds: Annotated[int, OneOf((1, 5))] = 1,
    seeds: Annotated[Sequence[int], Several(Whole(), unique=True)] = (0, 1, 2),
    records: Store = None,
    **options: Any,
) -> pd.DataFrame:
    """Chooses what to tune on the training images, trains that on all of them, and scores it once on the test images.

    All methods choose before the first one is tested, and the study that they get has no test images.

    Args:
        backbone: the pretrained chain.
        task: 1,000 training images with a validation part of 200 and all test images, e.g. "vtab:DIR".
        recipes: one, or several to choose among on the folds, the same for every method.
        choose: name of a method -> function of a `Study` that gives a subset, a method such as `Head2Toe`, or a pair
            of a `study.variant(...)` and a subset.
        folds: 1 chooses on the validation part alone (on a fifth of the images, if the task has none); 5 on five
            folds of all training images.
        seeds: of every training; mean and standard deviation are over these.
        records, options: as for `Study`.
    Returns:
        One row per method: `method`, `backbone`, `task`, `blocks`, `settings` (of its recipe or method), `params`
        (trained, the readout among them), `fold_accuracy`, `fold_std` and `n_scores` (what it was chosen by, over
        folds and seeds), `accuracy`, `std` and `n` (test, over seeds), `n_train` (images of the last training),
        `n_held_out` (training images that a recipe with patience keeps out to decide when to stop: fewer than VTAB
        trains on), `n_test`, `test_uses` (how often these test images have been used so far).
    Source: Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark"
        (2019); PAPER "Low data", which chooses by five folds.
    """
    if task.test is None:
        raise ValueError(f"task {task.name} has no test split")
    study = Study(backbone, task, recipes, folds=folds, seeds=seeds, records=records, **options)
    blind = study.with_(task=replace(task, test=None))
    chosen = {name: _with_study(blind, choice(blind)) for name, choice in choose.items()}
    rows = [{"method": name} | _row(owner, what, task) for name, (owner, what) in chosen.items()]
    return pd.DataFrame(rows, columns=list(COLUMNS))


@checked(results=Table(("method", "backbone", "task"), ("n_train", "params", "accuracy", "std", "n")))
def vtab_table(results: pd.DataFrame) -> pd.DataFrame:
    """Results of the protocol, and what others report on the same tasks.

    Args:
        results: of `vtab_protocol`, of one task or of several together.
    Returns:
        One row per method, backbone and task, by task and then as given, ours first: `method`, `backbone`, `task` (as
        the reports call it), `n_train`, `params`, `accuracy`, `std`, `n`, `source`. Reports have no `params`, `std`
        or `n`; those of tasks without results are left out. `source` tells ours on VTAB-1k's own images from ours on
        others, whose numbers are not comparable.
    """
    columns = ["method", "backbone", "task", "n_train", "params", "accuracy", "std", "n", "source"]
    ours = results.assign(task=results["task"].map(_title), source=results["task"].map(_source))
    theirs = reported("low_data").query("task in @ours.task.unique()")
    order = {task: place for place, task in enumerate(ours["task"].unique())}
    table = pd.concat([ours.reindex(columns=columns), theirs.reindex(columns=columns).astype({"params": "Int64"})])
    table = table.astype({"params": "Int64", "n": "Int64", "std": float})
    return table.sort_values("task", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def _with_study(study: Study, chosen: Chosen) -> tuple[Study, Any]:
    """The study that a choice is trained by, and the choice itself."""
    if isinstance(chosen, tuple) and chosen and isinstance(chosen[0], Study):
        return chosen
    return study, chosen


def _row(blind: Study, what: Any, task: Task) -> dict[str, object]:
    """What a method came to on the folds, and then on the test images."""
    study = blind.with_(task=task)
    if hasattr(what, "fit"):
        scores, settings, held_out = study.method_scores([what]), what.settings(), 0
        params = int(scores["params"].iloc[0])
    else:
        scores, recipe = study.scores([what]), study.recipe_of(what)
        what = scores["blocks"].iloc[0]
        settings = recipe.as_dict()
        held_out = 0 if recipe.patience is None else len(task.folds(study.n_folds)[0][1])
        width = study.backbone.num_features * (2 if recipe.siamese and what else 1)
        params = int(scores["params"].iloc[0]) + task.num_classes * (width + 1)
    result = study.test(what)
    return {
        **{"backbone": study.backbone.name, "task": task.name, "blocks": result.blocks, "settings": settings},
        **{"params": params, "fold_accuracy": scores["accuracy"].mean(), "fold_std": scores["accuracy"].std()},
        **{"n_scores": len(scores), "accuracy": result.mean, "std": result.std, "n": len(result.accuracies)},
        **{"n_train": len(task.train) - held_out, "n_held_out": held_out},
        **{"n_test": result.n_test, "test_uses": result.uses},
    }


def _title(spec: str) -> str:
    """A task's name as the reports have it, by the last word of its spec; the spec itself where they don't have it."""
    name = re.sub(r"[-_ ]", "", Path(spec.removeprefix("vtab:")).name.lower())
    return _TITLE_OF.get(name, spec) if spec.startswith("vtab") else spec


def _source(spec: str) -> str:
    return "this run, on other images than VTAB-1k's" if spec.startswith("vtab-") else "this run"
