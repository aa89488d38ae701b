"""What scores subsets: a backbone, a task and a recipe, over folds and seeds, every score recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from subtuning_lab.data.arrays import check_number
from subtuning_lab.data.task import Split, Task
from subtuning_lab.engine.recipe import Recipe, check_recipes, recipe_grid
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import BN_MODES, Chain, count_parameters, frozen_copy, in_order
from subtuning_lab.nets.flops import part_table
from subtuning_lab.study.keys import Scorebook
from subtuning_lab.study.records import Records
from subtuning_lab.study.runner import Trainer
from subtuning_lab.study.study_checks import check_images, check_other, check_seeds, check_types, usable_device
from subtuning_lab.study.trials import Arm, Method, OtherImages, TestResult, Trial

Blocks = Iterable[str] | Literal["all"]


class Study:
    """Scores subsets of one backbone on one task by cross-validation on the training split.

    Selection sees folds of `task.train` only; `test` is the one door to the test split.

    Args:
        backbone: the pretrained chain; a frozen copy is taken.
        task: images and labels.
        recipe: how subsets are trained; or several, of which each subset is trained with all and counts with the one
            that has the best mean fold accuracy: the same choice for every subset, full finetuning included.
        folds: at least 2 for cross-validation; 1 for a single split (the task's validation part, or 20 %).
        seeds: of readout, order and augmentation; every subset is trained once per fold and seed.
        records: SQLite file, a `Records`, or None for this session only. What is there is not computed again.
        device: by default the GPU if there is one.
        engine: "one_pass" or "sequential".
        memory_limit: bytes for one pass; by default most of what is free.
        progress: whether to show it; a function is called with (trained, total) steps instead, and may raise to stop.

    Raises:
        TypeError, ValueError: wrong arguments; images that the backbone can't take; weights that give no numbers.
    """

    def __init__(
        self,
        backbone: Chain,
        task: Task,
        recipe: Recipe | Sequence[Recipe],
        *,
        folds: int = 5,
        seeds: Sequence[int] = (0,),
        records: str | Path | Records | None = None,
        device: str | torch.device | None = None,
        engine: str = "one_pass",
        memory_limit: int | None = None,
        progress: bool | Callable[[int, int], None] = True,
    ):
        check_types(backbone, task, engine)
        check_number("folds", folds, 1)
        check_number("memory_limit", memory_limit, 0)
        self.recipes, self.seeds = check_recipes(recipe), check_seeds(seeds)
        self.task, self.n_folds, self.progress = task, folds, progress
        self.device = usable_device(device)
        self.backbone = frozen_copy(backbone).to(self.device)
        self.records = records if isinstance(records, Records) else Records(records or ":memory:")
        self._folds = task.folds(folds)
        self._others: dict[Split, OtherImages] = {}
        size = self.recipes[0].image_size
        check_images(self.backbone, task, size)
        self._book = Scorebook(self.records, backbone, task, self._folds, self.device, size)
        self.parts = part_table(backbone, size or task.image_size)
        self._trainer = Trainer(self.backbone, task, self._folds, self._book, self.parts, size, engine, memory_limit)

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the backbone's blocks, from input to output."""
        return self.backbone.block_names

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the stem, the blocks and the tail."""
        return self.backbone.part_names

    @property
    def epochs(self) -> int:
        """Epochs of a full training."""
        return self.recipes[0].epochs

    @property
    def title(self) -> str:
        """One line for figures: backbone, task, number of training images."""
        return f"{self.backbone.name} on {self.task.name}, {len(self.task.train)} training images"

    def count_parameters(self, blocks: Blocks) -> int:
        """Parameters of a subset, the readout not counted."""
        return count_parameters(self.backbone, blocks)

    def variant(self, **choices: Any) -> Study:
        """The same study with other values in every recipe; records are shared.

        Args:
            choices: fields of the recipe with a value each, or a list of values to choose among on the folds, e.g.
                `variant(params="bias", lr=[1e-3, 1e-2])`.

        Raises:
            ValueError: an unknown field, a value out of its range, or another `image_size`.
        """
        lists = {name: value if isinstance(value, list) else [value] for name, value in choices.items()}
        recipes = dict.fromkeys(own for recipe in self.recipes for own in recipe_grid(recipe, **lists))
        other = copy.copy(self)
        other.recipes = check_recipes(list(recipes))
        if other.recipes[0].image_size != self.recipes[0].image_size:
            raise ValueError("image_size can't be changed in a variant; make another Study")
        return other

    def scores(self, subsets: Sequence[Blocks]) -> pd.DataFrame:
        """Fold scores of subsets, each with its best recipe, computed where no record has them.

        Args:
            subsets: part names each; [] is linear probing, "all" full finetuning.

        Returns:
            One row per subset, seed and fold, in this order: `blocks` (tuple in the network's order), `fold`, `seed`,
            `accuracy` in [0, 1], `loss`, `params` that were trained, `flops` of the training, `epochs`, `seconds`,
            and the recipe's `lr`, `head_lr`, `weight_decay` and `bn`.
        """
        table = self.all_scores(subsets)
        means = _mean_accuracy(table, ["blocks", "recipe"]).reset_index()
        best = means.loc[means.groupby("blocks", sort=False)["accuracy"].idxmax(), ["blocks", "recipe"]]
        return table.merge(best).drop(columns="recipe")

    def all_scores(self, subsets: Sequence[Blocks]) -> pd.DataFrame:
        """As `scores`, with the rows of every recipe; `recipe` is its place among the distinct ones of a subset."""
        arms = self.arms(subsets)
        table = self.arm_scores(arms)
        places = [self._recipes_of(arm.blocks).index(arm.recipe) for arm in arms]
        return table.assign(recipe=table.pop("arm").map(places.__getitem__))

    def arms(self, subsets: Sequence[Blocks]) -> list[Arm]:
        """Every distinct subset with each of its recipes."""
        distinct = dict.fromkeys(in_order(self.backbone, blocks) for blocks in subsets)
        return [Arm(blocks, recipe) for blocks in distinct for recipe in self._recipes_of(blocks)]

    def arm_scores(
        self,
        arms: Sequence[Arm],
        folds: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        epochs: int | None = None,
    ) -> pd.DataFrame:
        """Fold scores of arms, computed where no record has them.

        Args:
            arms: of `arms`.
            folds, seeds: which of the study's; None means all.
            epochs: of a shorter training with a schedule of its own; None means all.

        Returns:
            Rows as of `scores`, for each arm, seed and fold; `arm` is the arm's place in the list.

        Raises:
            ValueError: folds or seeds that the study doesn't have, or epochs out of range.
        """
        check_number("epochs", epochs, 1, self.epochs)
        folds = self._known("folds", folds, range(self.n_folds))
        seeds = self._known("seeds", seeds, self.seeds)
        trained = [arm if epochs is None else Arm(arm.blocks, replace(arm.recipe, epochs=epochs)) for arm in arms]
        trials = [Trial(arm.blocks, arm.recipe, seed, fold) for arm in trained for seed in seeds for fold in folds]
        found = self._book.found(trials)
        missing = [trial for trial in dict.fromkeys(trials) if trial not in found]
        self._trainer.score_on_folds(missing, self.progress)
        per_arm = len(seeds) * len(folds)
        return self._book.table(trials).assign(arm=[i // per_arm for i in range(len(trials))])

    def method_scores(self, methods: Sequence[Method]) -> pd.DataFrame:
        """Fold scores of methods that are no subsets, computed where no record has them.

        Returns:
            Rows as of `scores`, for each method, seed and fold; `method` is the method's place in the list.
        """
        trials = [
            Trial((), None, seed, fold, method)
            for method in methods
            for seed in self.seeds
            for fold in range(self.n_folds)
        ]
        found = self._book.found(trials)
        self._trainer.score_on_folds([trial for trial in trials if trial not in found], self.progress)
        per_method = len(self.seeds) * self.n_folds
        return self._book.table(trials).assign(method=[i // per_method for i in range(len(trials))])

    def recipe_of(self, blocks: Blocks) -> Recipe:
        """The recipe that a subset counts with: the best on the folds, where there are several."""
        names = in_order(self.backbone, blocks)
        recipes = self._recipes_of(names)
        return (
            recipes[0]
            if len(recipes) == 1
            else recipes[int(_mean_accuracy(self.all_scores([names]), "recipe").idxmax())]
        )

    def fit(self, blocks: Blocks, seed: int | None = None) -> TunedTask:
        """Trains a subset on all training images.

        With early stopping, the first fold's validation images are held out to decide when to stop.

        Args:
            blocks: the subset; [] is linear probing, "all" full finetuning.
            seed: by default the study's first.
        """
        names, seed = in_order(self.backbone, blocks), self.seeds[0] if seed is None else seed
        trial = Trial(names, self.recipe_of(names), seed, None)
        ((_, tuned, _),) = self._trainer.fit([trial], self.progress)
        return replace(tuned, scores=self._known_scores(trial))

    def test(self, what: Blocks | Method, beside: Split | None = None) -> TestResult:
        """Trains a subset, or a method, on all training images, once per seed, and scores it on the test split.

        Every call counts as a use of the test split, also where records already hold its score.

        Args:
            what: the subset or the method.
            beside: further images, scored by the same trainings; `accuracy_on` then reads what they say.

        Raises:
            ValueError: the task has no test split, or `beside` is what `accuracy_on` refuses.
        """
        if self.task.test is None:
            raise ValueError(f"task {self.task.name} has no test split")
        others = [None] if beside is None else [None, self._other(beside)]
        return self._at_last(what, others)

    def accuracy_on(self, what: Blocks | Method, split: Split) -> TestResult:
        """As `test`, on other images with the same classes: what an adapted network still does elsewhere.

        Every call counts as a use of these images; the test split's own count stays as it is.

        Raises:
            ValueError: labels that the task doesn't have, images of another size, or more than a tenth of them test
                images of the task, which only `test` reaches.
        """
        return self._at_last(what, [self._other(split)])

    def _other(self, split: Split) -> OtherImages:
        if split not in self._others:  # every image is hashed: once
            check_other(split, self.task)
            self._others[split] = OtherImages(split)
        return self._others[split]

    def _at_last(self, what: Blocks | Method, others: Sequence[OtherImages | None]) -> TestResult:
        """Scores on the first of these images, None being the test split; what is trained is scored on all of them."""
        if hasattr(what, "fit"):
            trainings = [Trial((), None, seed, None, what) for seed in self.seeds]
        else:
            names = in_order(self.backbone, what)
            trainings = [Trial(names, self.recipe_of(names), seed, None) for seed in self.seeds]
        uses = self._book.count_test(others[0])
        trials = [replace(training, other=other) for other in others for training in trainings]
        found = self._book.found(trials)
        self._trainer.score_at_last([trial for trial in trials if trial not in found], self.progress)
        rows, own = self._book.found(trials), trials[: len(trainings)]
        accuracies = tuple(rows[trial]["accuracy"] for trial in own)
        return TestResult(own[0].blocks, accuracies, self._book.sizes(own[0])[1], uses)

    def _known_scores(self, trial: Trial) -> dict[str, float]:
        """Mean, spread and number of a subset's fold scores, where the records have them all."""
        trials = [replace(trial, seed=seed, fold=fold) for seed in self.seeds for fold in range(self.n_folds)]
        found = pd.Series([row["accuracy"] for row in self._book.found(trials).values()], dtype=float)
        if len(found) < max(2, len(trials)):
            return {}
        return {"fold accuracy": found.mean(), "fold std": found.std(), "n": len(found)}

    def _known(self, name: str, chosen: Sequence[int] | None, own: Sequence[int]) -> list[int]:
        """The chosen folds or seeds, all of them for None."""
        unknown = sorted(set(chosen or ()) - set(own))
        if unknown or (chosen is not None and not len(chosen)):
            raise ValueError(f"{name} is {chosen!r}; this study has {', '.join(map(str, own))}")
        return list(own if chosen is None else chosen)

    def _recipes_of(self, blocks: tuple[str, ...]) -> list[Recipe]:
        """The distinct recipes for a subset: what it doesn't depend on is set to one value."""
        norms = [m for name in blocks for m in self.backbone.part(name).modules() if isinstance(m, _BatchNorm)]
        recipes = [own if norms else replace(own, bn=BN_MODES[0]) for own in self.recipes]
        return list(dict.fromkeys(recipes if blocks else [own.for_probing() for own in recipes]))


def _mean_accuracy(table: pd.DataFrame, by: str | list[str]) -> pd.Series:
    """Means that rounding doesn't tell apart: of equal recipes the first one counts."""
    return table.groupby(by, sort=False)["accuracy"].mean().round(12)
