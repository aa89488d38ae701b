"""Which blocks to tune, within a budget: by a profile where that fits, by a race, or by a score alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from subtuning_lab.criteria.score import CRITERIA, score_blocks, select_blocks
from subtuning_lab.data.task import Task
from subtuning_lab.engine.recipe import Recipe, recipe_grid
from subtuning_lab.nets.chain import BN_MODES, Chain
from subtuning_lab.nets.flops import training_flops
from subtuning_lab.nets.inputs import network_input
from subtuning_lab.search.candidates import candidate_table
from subtuning_lab.search.racing import Race
from subtuning_lab.search.significance import compare_with_best
from subtuning_lab.study.records import Records
from subtuning_lab.study.study import Study
from subtuning_lab.utils.containers import Either
from subtuning_lab.utils.validation import Is, OneOf, Real, Several, Whole, checked

UNITS = ("seconds", "flops")
BY = "empirical_fisher"  # what ranks blocks where nothing can be trained
_TIMED_IMAGES = 8
_RACED = 2.0  # full trainings that a race goes on with, see `Race`


@dataclass(frozen=True)
class Suggestion:
    """Blocks to tune, and how far to trust that.

    Args:
        blocks: the suggested subset, in the network's order.
        by: "profile", "race", "race of the better half", or a criterion's name.
        confidence: what the suggestion rests on, in words.
        more: what a longer search could gain, in words.
        table: one row a block: `block`, `score` and `rank` by the criterion, and where blocks were trained, their
            `accuracy`, `std` and `n` on the folds; `dropped` by the race.
        plans: one row a way to choose: `plan`, its `flops` and `seconds` as foretold, and whether it `fits`.
        study: that scored the blocks, with its records: `study.fit(suggestion.blocks)` trains them.
    """

    blocks: tuple[str, ...]
    by: str
    confidence: str
    more: str
    table: pd.DataFrame = field(repr=False)
    plans: pd.DataFrame = field(repr=False)
    study: Study = field(repr=False)


@checked(
    backbone=Is(Chain),
    task=Is(Task),
    budget=Real(0, above=True),
    unit=OneOf(UNITS),
    recipe=Either(Is(Recipe), Several(Is(Recipe)), none=True),
    folds=Whole(2),
    seeds=Several(Whole(0, 2**63 - 1), unique=True),
    records=Is((str, Path, Records), none=True),
    criterion=OneOf(tuple(CRITERIA)),
    device=Is((str, torch.device), none=True),
)
def suggest_blocks(
    backbone: Chain,
    task: Task,
    budget: float = 60.0,
    unit: str = "seconds",
    *,
    recipe: Recipe | Sequence[Recipe] | None = None,
    folds: int = 5,
    seeds: Sequence[int] = (0,),
    records: str | Path | Records | None = None,
    criterion: str = BY,
    device: str | torch.device | None = None,
    progress: bool | Callable[[int, int], None] = False,
) -> Suggestion:
    """The block to tune, by the most thorough way to choose that a budget allows.

    That is the whole profile, a race of all blocks, a race of the better half by a criterion, or the criterion alone.
    What the ways cost is foretold from FLOPs, seconds by timing a few images; the budget is no hard limit.

    Args:
        backbone, task, folds, seeds, records, device, progress: as for `Study`.
        budget: seconds or FLOPs, by `unit`.
        recipe: by default 10 epochs in both BatchNorm modes, `head_lr=1e-2`.
        criterion: what ranks blocks that are not trained.

    Raises:
        TypeError, ValueError: wrong arguments.
    """
    recipes = recipe_grid(Recipe(epochs=10, head_lr=1e-2), bn=list(BN_MODES)) if recipe is None else recipe
    how = {"device": device, "progress": progress}
    study = Study(backbone, task, recipes, folds=folds, seeds=seeds, records=records, **how)
    plans = _plans(study, budget, unit)
    scores = score_blocks(study, criterion)
    table = scores[["block", "score", "rank", "params"]]
    plan = next((row.plan for row in plans.itertuples() if row.fits), "score")
    if plan == "score":
        blocks = select_blocks(scores, k=1)
        says = f"low: {criterion} looked at {scores['n'].iloc[0]} images, and no block was trained to see"
        return Suggestion(blocks, criterion, says, _longer(plans, plan), table, plans, study)
    better = scores.nsmallest((len(scores) + 1) // 2, "rank")["block"]
    names = [name for name in study.block_names if plan != "race of the better half" or name in set(better)]
    trained, rows = candidate_table(study, [(name,) for name in names], None if plan == "profile" else Race(), [()])
    blocks, says = _judged(trained, rows)
    facts = trained.assign(block=trained["blocks"].map(" ".join))[["block", "accuracy", "std", "n", "dropped"]]
    return Suggestion(blocks, plan, says, _longer(plans, plan), table.merge(facts, "left", "block"), plans, study)


def _judged(trained: pd.DataFrame, rows: pd.DataFrame) -> tuple[tuple[str, ...], str]:
    """The best of the subsets that were trained in full, linear probing among them, and how sure that is."""
    behind = compare_with_best(rows)
    best = behind.index[behind["difference"] == 0][0]
    score = trained[trained["blocks"] == best].iloc[0]
    near = [" + ".join(own) or "linear probing" for own in behind.index[behind["within"]] if own != best]
    said = f"{score['accuracy']:.1%} on the folds, n = {score['n']}"
    if near:
        return best, f"medium: {said}; within one standard error of it: {', '.join(near)}"
    return best, f"high: {said}; nothing else that was trained in full is within one standard error of it"


def _longer(plans: pd.DataFrame, plan: str) -> str:
    """What the next more thorough way would bring and cost."""
    names = plans["plan"].tolist()
    place = names.index(plan)
    if place == 0:
        return "a second block by lab.greedy_subtuning(study); more folds or seeds, where blocks are close"
    row = plans.iloc[place - 1]
    gain = {
        "profile": "accuracy of every block on all folds, instead of those that the race kept",
        "race": "a look at the blocks that the score put into the worse half",
        "race of the better half": "a measured accuracy in place of a score",
    }[row["plan"]]
    return f"{row['plan']}: {gain}, for about {row['seconds']:.0f} s ({row['flops']:.1e} FLOPs)"


def _plans(study: Study, budget: float, unit: str) -> pd.DataFrame:
    """The ways to choose, the most thorough first."""
    n = len(study.task.train) * (study.n_folds - 1) * len(study.seeds)  # images of all trainings, an epoch
    each = [sum(training_flops(study.parts, [name]).values()) for name in study.block_names]
    whole = n * study.epochs * sum(each) * len(study.recipes)
    probing = n * study.epochs * sum(training_flops(study.parts, []).values())
    short, keeps = (Race().short or 0.0) * whole, n * study.epochs * max(each) * _RACED + probing
    plans = {"profile": whole + probing, "race": short + keeps}
    plans |= {"race of the better half": short / 2 + keeps, "score": 0.0}
    speed = _flops_per_second(study)
    table = pd.DataFrame({"plan": list(plans), "flops": list(plans.values())})
    table["seconds"] = table["flops"] / speed
    return table.assign(fits=table[unit] <= budget)


def _flops_per_second(study: Study) -> float:
    images = study.task.train.images[torch.arange(min(_TIMED_IMAGES, len(study.task.train)))]
    x, seconds = network_input(study.backbone, images, study.recipes[0].image_size), []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            study.backbone(x).sum().item()
            seconds.append(time.perf_counter() - start)
    return len(x) * int(study.parts["flops"].sum()) / min(seconds)
