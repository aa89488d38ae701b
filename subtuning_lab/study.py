"""What scores subsets: a backbone, a task and a recipe, over folds and seeds, every score recorded."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from subtuning_lab.chain import BN_MODES, Chain, count_parameters, in_order, part_table, set_trainable, training_flops
from subtuning_lab.checks import check_number
from subtuning_lab.deltas import TunedTask
from subtuning_lab.images import StreamedImages
from subtuning_lab.job import Fit
from subtuning_lab.packing import free_bytes
from subtuning_lab.progress import Progress
from subtuning_lab.recipe import Recipe, check_recipes
from subtuning_lab.records import Records, record_key
from subtuning_lab.study_checks import check_images, check_seeds, check_types, usable_device
from subtuning_lab.tasks import Split, Task
from subtuning_lab.training import ENGINE_VERSION, fit_together
from subtuning_lab.trials import TestResult, Trial

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
        self.task, self.n_folds = task, folds
        self.engine, self.memory_limit, self.progress = engine, memory_limit, progress
        self.device = usable_device(device)
        self.backbone = set_trainable(copy.deepcopy(backbone), []).eval().to(self.device)
        self.records = records if isinstance(records, Records) else Records(records or ":memory:")
        self._folds = task.folds(folds)
        self._fingerprints = {"backbone": backbone.fingerprint, "task": task.fingerprint}
        check_images(self.backbone, task, self.recipes[0].image_size)
        self.parts = part_table(backbone, self.recipes[0].image_size or task.image_size)

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the backbone's blocks, from input to output."""
        return self.backbone.block_names

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the stem, the blocks and the tail."""
        return self.backbone.part_names

    @property
    def title(self) -> str:
        """One line for figures: backbone, task, number of training images."""
        return f"{self.backbone.name} on {self.task.name}, {len(self.task.train)} training images"

    def count_parameters(self, blocks: Blocks) -> int:
        """Parameters of a subset, the readout not counted."""
        return count_parameters(self.backbone, blocks)

    def scores(self, subsets: Sequence[Blocks]) -> pd.DataFrame:
        """Fold scores of subsets, each with its best recipe, computed where no record has them.

        Args:
            subsets: part names each; [] is linear probing, "all" full finetuning.

        Returns:
            One row per subset, seed and fold, in this order: `blocks` (tuple in the network's order), `fold`, `seed`,
            `accuracy` in [0, 1], `loss`, `params`, `flops` of the training, `epochs`, `seconds`, and the recipe's
            `lr`, `head_lr`, `weight_decay` and `bn`.
        """
        table = self.all_scores(subsets)
        means = table.groupby(["blocks", "recipe"], sort=False)["accuracy"].mean().reset_index()
        best = means.loc[means.groupby("blocks", sort=False)["accuracy"].idxmax(), ["blocks", "recipe"]]
        return table.merge(best).drop(columns="recipe")

    def all_scores(self, subsets: Sequence[Blocks]) -> pd.DataFrame:
        """As `scores`, with the rows of every recipe; `recipe` is its place among the distinct ones of a subset."""
        distinct = dict.fromkeys(in_order(self.backbone, blocks) for blocks in subsets)
        trials = [trial for blocks in distinct for trial in self._trials(blocks)]
        keys = [self._key(trial) for trial in trials]
        found = self.records.get(keys)
        self._compute([trial for trial, key in zip(trials, keys, strict=True) if key not in found])
        rows = self.records.get(keys)
        columns = ["fold", "seed", "accuracy", "loss", "params", "flops", "epochs", "seconds"]
        table = pd.DataFrame([rows[key] for key in keys], columns=columns)
        table.insert(0, "blocks", [trial.blocks for trial in trials])
        for name in ("lr", "head_lr", "weight_decay", "bn"):
            table[name] = [getattr(trial.recipe, name) for trial in trials]
        table["recipe"] = [self._recipes_of(trial.blocks).index(trial.recipe) for trial in trials]
        return table

    def recipe_of(self, blocks: Blocks) -> Recipe:
        """The recipe that a subset counts with: the best on the folds, where there are several."""
        names = in_order(self.backbone, blocks)
        recipes = self._recipes_of(names)
        return (
            recipes[0]
            if len(recipes) == 1
            else recipes[int(self.all_scores([names]).groupby("recipe")["accuracy"].mean().idxmax())]
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
        return self._tuned(*next(self._fit_fully([trial])))

    def test(self, blocks: Blocks) -> TestResult:
        """Trains a subset on all training images, once per seed, and scores it on the test split.

        Every call counts as a use of the test split, also where records already hold its score.

        Raises:
            ValueError: the task has no test split.
        """
        if self.task.test is None:
            raise ValueError(f"task {self.task.name} has no test split")
        names = in_order(self.backbone, blocks)
        trials = [Trial(names, self.recipe_of(names), seed, None) for seed in self.seeds]
        uses = self.records.count_test(record_key(self._fingerprints))
        keys = [self._key(trial) for trial in trials]
        known = self.records.get(keys)
        for trial, fit in self._fit_fully([t for t, key in zip(trials, keys, strict=True) if key not in known]):
            accuracy = self._tuned(trial, fit).accuracy(self.task.test)
            self.records.put([self._row(trial, replace(fit, accuracy=accuracy, validation_loss=None))])
        rows = self.records.get(keys)
        return TestResult(names, tuple(rows[key]["accuracy"] for key in keys), len(self.task.test), uses)

    def _recipes_of(self, blocks: tuple[str, ...]) -> list[Recipe]:
        """The distinct recipes for a subset: what it doesn't depend on is set to one value."""
        norms = [m for name in blocks for m in self.backbone.part(name).modules() if isinstance(m, _BatchNorm)]
        recipes = [own if norms else replace(own, bn=BN_MODES[0]) for own in self.recipes]
        if not blocks:
            recipes = [replace(own, lr=own.head_lr or own.lr, head_lr=None) for own in recipes]
        return list(dict.fromkeys(recipes))

    def _trials(self, blocks: tuple[str, ...]) -> list[Trial]:
        return [
            Trial(blocks, recipe, seed, fold)
            for recipe in self._recipes_of(blocks)
            for seed in self.seeds
            for fold in range(len(self._folds))
        ]

    def _compute(self, missing: list[Trial]) -> None:
        """Trains what is missing, one fold and seed at a time, and records each pass when it ends."""
        groups: dict[tuple[int, int], list[Trial]] = {}
        for trial in missing:
            groups.setdefault((trial.seed, trial.fold), []).append(trial)
        steps = sum(trial.steps(len(self._folds[trial.fold][0])) for trial in missing)
        with Progress(self.progress, steps) as progress:
            for (_, fold), trials in groups.items():
                train, validation = (self._on_device(self.task.train.take(rows)) for rows in self._folds[fold])
                self._fit(trials, train, validation, progress, partial(self._record, trials))

    def _record(self, trials: list[Trial], fits: dict[int, Fit]) -> None:
        self.records.put([self._row(trials[i], fit) for i, fit in fits.items()])

    def _fit_fully(self, trials: list[Trial]) -> Iterator[tuple[Trial, Fit]]:
        """Trains on all training images; less the first fold's validation images where these decide the end."""
        train, validation = self._on_device(self.task.train), None
        if self.recipes[0].patience is not None:
            train, validation = (self._on_device(self.task.train.take(rows)) for rows in self._folds[0])
        with Progress(self.progress, sum(trial.steps(len(train)) for trial in trials)) as progress:
            for trial in trials:
                yield trial, self._fit([trial], train, validation, progress, None)[0]

    def _fit(
        self,
        trials: list[Trial],  # of one seed
        train: Split,
        validation: Split | None,
        progress: Progress,
        on_pass: Callable[[dict[int, Fit]], None] | None,
    ) -> list[Fit]:
        return fit_together(
            self.backbone,
            [trial.blocks for trial in trials],
            train,
            [trial.recipe for trial in trials],
            num_classes=self.task.num_classes,
            validation=validation,
            seed=trials[0].seed,
            engine=self.engine,
            memory_limit=self.memory_limit,
            on_step=progress.advance,
            on_pass=on_pass,
        )

    def _tuned(self, trial: Trial, fit: Fit) -> TunedTask:
        provenance = {
            "task": self.task.name,
            "task_fingerprint": self._fingerprints["task"],
            "n_train": self._sizes(trial)[0],
            "seed": trial.seed,
            "recipe": trial.recipe.as_dict(),
            "versions": {name: version(name) for name in ("torch", "timm")} | {"python": platform.python_version()},
        }
        classes, size = self.task.classes, trial.recipe.image_size
        return TunedTask(self.backbone, fit.blocks, fit.weights, classes, size, provenance)

    def _sizes(self, trial: Trial) -> tuple[int, int]:
        """Images that are trained on, and scored on."""
        if trial.fold is not None:
            return tuple(len(rows) for rows in self._folds[trial.fold])
        held_out = len(self._folds[0][1]) if trial.recipe.patience is not None else 0
        return len(self.task.train) - held_out, len(self.task.test or ())

    def _row(self, trial: Trial, fit: Fit) -> dict[str, object]:
        """One row of the records."""
        n_train, n_scored = self._sizes(trial)
        flops = sum(training_flops(self.parts, trial.blocks).values())
        return {
            "key": self._key(trial),
            "split": "test" if trial.fold is None else "fold",
            "backbone": self.backbone.name,
            "task": self.task.name,
            "blocks": list(trial.blocks),
            "fold": trial.fold,
            "seed": trial.seed,
            "accuracy": fit.accuracy,
            "loss": fit.validation_loss,
            "n_train": n_train,
            "n_scored": n_scored,
            "params": self.count_parameters(trial.blocks),
            "flops": float(flops * n_train * fit.epochs),
            "epochs": fit.epochs,
            "seconds": fit.seconds,
            "device": self.device.type,
            "recipe": trial.recipe.as_dict(),
            "determined_by": self._determined_by(trial),
        }

    def _key(self, trial: Trial) -> str:
        return record_key(self._determined_by(trial))

    def _determined_by(self, trial: Trial) -> dict[str, object]:
        """Everything that a score depends on."""
        folds = {} if trial.fold is None and trial.recipe.patience is None else {"folds": self.n_folds}
        own = {"recipe": trial.recipe.as_dict(), "blocks": trial.blocks, "fold": trial.fold, "seed": trial.seed}
        return {**self._fingerprints, **folds, **own, "engine": ENGINE_VERSION}

    def _on_device(self, split: Split) -> Split:
        """The split with its images on the device, where they fit beside a pass."""
        if self.device.type != "cuda" or isinstance(split.images, StreamedImages):
            return split
        fits = split.images.nbytes < free_bytes(self.device) / 2
        return Split(split.images.to(self.device), split.labels) if fits else split
