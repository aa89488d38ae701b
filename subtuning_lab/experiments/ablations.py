"""Ablations: what does SubTuning owe to one of its choices? Each is the same study with one thing changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pandas as pd

from subtuning_lab.data.task import Task
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.experiments.tables import group_summary, paired_differences
from subtuning_lab.nets.chain import Chain, in_order
from subtuning_lab.search.candidates import candidate_table
from subtuning_lab.study.records import opened
from subtuning_lab.study.study import Blocks, Folds, Shown, Store, Study
from subtuning_lab.utils.containers import Blocks as BlocksRule
from subtuning_lab.utils.containers import Mapped, Table
from subtuning_lab.utils.validation import Is, OneOf, Several, Text, Whole, checked

SUBTUNING = "SubTuning"
#: fields of the recipe that an ablation changes, by its name; a list is tried on the folds
ABLATIONS: dict[str, dict[str, Any]] = {
    SUBTUNING: {},
    "re-initialized blocks": {"init": "random"},
    "Siamese readout": {"siamese": True},
    "two-layer readout": {"head_depth": 2},
    "three-layer readout": {"head_depth": 3},
    "LoRA in the blocks": {"adapter": "lora"},
}


@checked
def ablate(
    backbone: Chain,
    task: Task,
    subsets: Annotated[Mapping[str, Blocks], Mapped(BlocksRule())],
    variants: Annotated[Mapping[str, Mapping[str, Any]], Mapped(Mapped(least=0))],
    size: Annotated[int, Whole(2)],
    recipes: Annotated[Sequence[Recipe], Several(Is(Recipe))],
    *,
    folds: Folds = 5,
    repeats: Annotated[int, Whole(1)] = 3,
    test: bool = True,
    records: Store = None,
    progress: Shown = True,
) -> pd.DataFrame:
    """Trains subsets in several variants, each repetition with training images and a seed of its own.

    Within a repetition all variants see the same images, folds and seed, and each subset of each variant counts with
    its own best recipe on the folds.

    Args:
        backbone: the pretrained chain.
        task: whose training images are chosen from, stratified; its test images are the same throughout.
        subsets: label -> part names; [] is linear probing, "all" full finetuning.
        variants: name -> changed fields of the recipe, e.g. `ABLATIONS`; a list of values is tried on the folds.
        size: number of training images.
        recipes: the grid that all choose from.
        folds, records, progress: as for `Study`.
        repeats: repetitions.
        test: whether to use the test images, once per subset, variant and repetition.
    Returns:
        One row per subset, variant and repetition: `subset` (label), `method` (variant), `blocks`, `params` (the
        readout's not counted), `accuracy`, `std` and `n` over the folds, `trainings`, `seconds` and `flops` spent on
        them, `subsets` (1), `train_size`, `repeat`, and with `test` also `test_accuracy`. Rows of one subset are what
        `summarize_repeats` takes.
    Source: PAPER "Ablations"; its numbers were not found in a readable source.
    """
    named = {label: in_order(backbone, blocks) for label, blocks in subsets.items()}
    store = opened(records)
    tables = []
    for repeat in range(repeats):
        options = {"folds": folds, "seeds": (repeat,), "records": store, "progress": progress}
        study = Study(backbone, task.subset(size, seed=repeat), recipes, **options)
        for variant, choices in variants.items():
            scored = _scored(study.variant(**choices), named, test)
            tables.append(scored.assign(method=variant, train_size=size, repeat=repeat))
    return pd.concat(tables, ignore_index=True)


_COMPARED = OneOf(("test_accuracy", "accuracy"))
_VARIANTS = Table(("subset", "method", "train_size", "repeat"), ("accuracy", "params"))


@checked(table=_VARIANTS, variant=Text(), other=Text(), by=_COMPARED)
def variant_differences(
    table: pd.DataFrame, variant: str, other: str = SUBTUNING, by: str = "test_accuracy"
) -> pd.DataFrame:
    """How far one variant is ahead of another per subset, paired: in a repetition both see the same images and seed.

    Args:
        table: of `ablate`.
        variant, other: names of variants in it.
        by: "test_accuracy", or "accuracy" for the mean over the folds.
    Returns:
        One row per subset: `subset`, `variant`, `train_size`, `difference`, `std` (of the repetitions' differences),
        `error` (standard error of the mean), `n` (repetitions).
    """
    _check_column(table, by)
    return paired_differences(table, variant, other, within=["subset"], of=by).assign(variant=variant)


@checked(table=_VARIANTS, by=_COMPARED)
def summarize_variants(table: pd.DataFrame, by: str = "test_accuracy") -> pd.DataFrame:
    """Mean, standard deviation and number of repetitions per subset and variant.

    Args:
        table: of `ablate`.
        by: as for `variant_differences`.
    Returns:
        `subset`, `method`, `accuracy`, `std`, `n`, `params`.
    """
    _check_column(table, by)
    return group_summary(table, ["subset", "method"], {"params": "params"}, of=by)


def _check_column(table: pd.DataFrame, by: str) -> None:
    if by not in table:
        raise ValueError(f'by is {by!r}; it must be "accuracy" where the test images were not used')


def _scored(study: Study, subsets: Mapping[str, tuple[str, ...]], test: bool) -> pd.DataFrame:
    """A row per label with its fold scores and costs, and its test accuracy if asked."""
    table, _ = candidate_table(study, list(dict.fromkeys(subsets.values())))
    rows = {row["blocks"]: row for row in table.drop(columns="dropped").to_dict("records")}
    scored = pd.DataFrame([{"subset": label, **rows[blocks], "subsets": 1} for label, blocks in subsets.items()])
    if not test:
        return scored
    return scored.assign(test_accuracy=[study.test(blocks).mean for blocks in subsets.values()])
