"""What scores subsets: a backbone, a task and a recipe, over folds and seeds, every score recorded."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from tqdm import tqdm

from subtuning_lab.augmentation import resize_to
from subtuning_lab.chain import Chain, count_parameters, in_order, part_table, set_trainable, subset_of, training_flops
from subtuning_lab.deltas import TunedTask
from subtuning_lab.images import StreamedImages
from subtuning_lab.recipe import Recipe
from subtuning_lab.records import Records, record_key
from subtuning_lab.tasks import Split, Task
from subtuning_lab.training import ENGINE_VERSION, ENGINES, Fit, fit_together

Blocks = Iterable[str] | Literal["all"]
_SCORE_COLUMNS = ["blocks", "fold", "seed", "accuracy", "loss", "params", "flops", "epochs", "seconds"]


@dataclass(frozen=True)
class TestResult:
    """What the test split said, once per seed.

    Args:
        blocks: the tuned parts, in the network's order.
        accuracies: test accuracy in [0, 1] per seed.
        n_test: number of test images.
        uses: how often this study's test split has been used so far, this time included.
    """

    __test__ = False  # the name is no pytest class

    blocks: tuple[str, ...]
    accuracies: tuple[float, ...]
    n_test: int
    uses: int
    mean: float = field(init=False)
    std: float = field(init=False)

    def __post_init__(self) -> None:
        values = pd.Series(self.accuracies)
        object.__setattr__(self, "mean", float(values.mean()))
        object.__setattr__(self, "std", float(values.std(ddof=1)) if len(values) > 1 else math.nan)


class Study:
    """Scores subsets of one backbone on one task by cross-validation on the training split.

    Selection sees folds of `task.train` only; `test` is the one door to the test split.

    Args:
        backbone: the pretrained chain; a frozen copy is taken.
        task: images and labels.
        recipe: how subsets are trained.
        folds: at least 2 for cross-validation; 1 for a single split (the task's validation part, or 20 %).
        seeds: of readout, order and augmentation; every subset is trained once per fold and seed.
        records: SQLite file, a `Records`, or None for this session only. What is there is not computed again.
        recipes: other recipes for some subsets, e.g. `{(): Recipe(lr=1e-2), "all": Recipe(bn="frozen")}`.
        device: by default the GPU if there is one.
        engine: "one_pass" or "sequential".
        memory_limit: bytes for one pass; by default most of what is free.
        progress: whether to show a progress bar; a function is called with (trained, total) steps instead, and may
            raise to stop.

    Raises:
        TypeError, ValueError: wrong arguments; images that the backbone can't take; weights that give no numbers.
    """

    def __init__(
        self,
        backbone: Chain,
        task: Task,
        recipe: Recipe,
        *,
        folds: int = 5,
        seeds: Sequence[int] = (0,),
        records: str | Path | Records | None = None,
        recipes: Mapping[Blocks, Recipe] | None = None,
        device: str | torch.device | None = None,
        engine: str = "one_pass",
        memory_limit: int | None = None,
        progress: object = True,
    ):
        _check_types(backbone, task, recipe, engine)
        self.task, self.recipe, self.n_folds, self.seeds = task, recipe, folds, _check_seeds(seeds)
        self.engine, self.memory_limit, self.progress = engine, memory_limit, progress
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.backbone = set_trainable(copy.deepcopy(backbone), []).eval().to(self.device)
        self.records = records if isinstance(records, Records) else Records(records or ":memory:")
        self._recipes = {subset_of(backbone, blocks): own for blocks, own in (recipes or {}).items()}
        self._folds = task.folds(folds)
        self._fingerprints = {"backbone": backbone.fingerprint, "task": task.fingerprint}
        _check_images(self.backbone, task, recipe)
        self.parts = part_table(backbone, recipe.image_size or task.image_size[0])

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the backbone's blocks, from input to output."""
        return self.backbone.block_names

    @property
    def part_names(self) -> tuple[str, ...]:
        """The blocks' names between "stem" and "tail"."""
        return self.backbone.part_names

    @property
    def title(self) -> str:
        """One line for figures: backbone, task, number of training images."""
        return f"{self.backbone.name} on {self.task.name}, n = {len(self.task.train)}"

    def count_parameters(self, blocks: Blocks) -> int:
        """Parameters of a subset, the readout not counted."""
        return count_parameters(self.backbone, blocks)

    def recipe_of(self, blocks: Blocks) -> Recipe:
        """The recipe that a subset is trained with."""
        return self._recipes.get(subset_of(self.backbone, blocks), self.recipe)

    def scores(self, subsets: Sequence[Blocks]) -> pd.DataFrame:
        """Fold scores of subsets, computed where no record has them.

        Args:
            subsets: part names each; [] is linear probing, "all" full finetuning.

        Returns:
            One row per subset, seed and fold, in this order: `blocks` (tuple in the network's order), `fold`, `seed`,
            `accuracy` in [0, 1], `loss`, `params`, `flops` of the training, `epochs`, `seconds`.
        """
        wanted = list(dict.fromkeys(in_order(self.backbone, blocks) for blocks in subsets))
        keys = {
            (blocks, seed, fold): record_key(self._determined_by(blocks, seed, fold))
            for blocks in wanted
            for seed in self.seeds
            for fold in range(len(self._folds))
        }
        missing = set(keys.values()) - set(self.records.get(list(keys.values())))
        self._compute([place for place, key in keys.items() if key in missing])
        rows = self.records.get(list(keys.values()))
        table = [rows[key] | {"blocks": blocks} for (blocks, _, _), key in keys.items()]
        return pd.DataFrame(table, columns=_SCORE_COLUMNS)

    def fit(self, blocks: Blocks, seed: int | None = None) -> TunedTask:
        """Trains a subset on all training images.

        With early stopping, the first fold's validation images are held out to decide when to stop.

        Args:
            blocks: the subset; [] is linear probing, "all" full finetuning.
            seed: by default the study's first.
        """
        fit = self._fit_fully(blocks, self.seeds[0] if seed is None else seed)
        recipe = self.recipe_of(blocks)
        provenance = {
            "task": self.task.name,
            "task_fingerprint": self._fingerprints["task"],
            "n_train": len(self.task.train),
            "recipe": recipe.as_dict(),
            "versions": {name: version(name) for name in ("torch", "timm")} | {"python": platform.python_version()},
        }
        size = recipe.image_size
        return TunedTask(self.backbone, fit.blocks, fit.weights, self.task.classes, size, provenance)

    def test(self, blocks: Blocks) -> TestResult:
        """Trains a subset on all training images, once per seed, and scores it on the test split.

        Every call counts as a use of the test split, also where records already hold its score.

        Raises:
            ValueError: the task has no test split.
        """
        if self.task.test is None:
            raise ValueError(f"task {self.task.name} has no test split")
        names = in_order(self.backbone, blocks)
        uses = self.records.count_test(record_key(self._fingerprints))
        keys = [record_key(self._determined_by(names, seed, None)) for seed in self.seeds]
        found = self.records.get(keys)
        for seed, key in zip(self.seeds, keys, strict=True):
            if key not in found:
                self.records.put([self._test_row(names, seed, key)])
        rows = self.records.get(keys)
        return TestResult(names, tuple(rows[key]["accuracy"] for key in keys), len(self.task.test), uses)

    def _compute(self, missing: list[tuple[tuple[str, ...], int, int]]) -> None:
        """Trains what is missing, one fold and seed at a time, and records each pass when it ends."""
        groups: dict[tuple[int, int], list[tuple[str, ...]]] = {}
        for blocks, seed, fold in missing:
            groups.setdefault((fold, seed), []).append(blocks)
        steps = self.recipe.epochs * -(-len(self._folds[0][0]) // self.recipe.batch_size)
        with _Progress(self.progress, len(missing) * steps) as progress:
            for (fold, seed), subsets in groups.items():
                self._compute_fold(fold, seed, subsets, progress)

    def _compute_fold(self, fold: int, seed: int, subsets: list[tuple[str, ...]], progress: _Progress) -> None:
        train, validation = (self._on_device(self.task.train.take(rows)) for rows in self._folds[fold])

        def record(fits: dict[int, Fit]) -> None:
            rows = [self._row(subsets[i], seed, fold, fit, len(train), len(validation)) for i, fit in fits.items()]
            self.records.put(rows)

        fit_together(
            self.backbone,
            subsets,
            train,
            [self.recipe_of(blocks) for blocks in subsets],
            num_classes=self.task.num_classes,
            validation=validation,
            seed=seed,
            engine=self.engine,
            memory_limit=self.memory_limit,
            on_step=progress.advance,
            on_pass=record,
        )

    def _fit_fully(self, blocks: Blocks, seed: int) -> Fit:
        """One subset on all training images; less the first fold's validation images where these decide the end."""
        recipe, train, validation = self.recipe_of(blocks), self.task.train, None
        if recipe.patience is not None:
            train, validation = (train.take(rows) for rows in self._folds[0])
        with _Progress(self.progress, recipe.epochs * -(-len(train) // recipe.batch_size)) as progress:
            (fit,) = fit_together(
                self.backbone,
                [blocks],
                self._on_device(train),
                recipe,
                num_classes=self.task.num_classes,
                validation=validation,
                seed=seed,
                engine=self.engine,
                memory_limit=self.memory_limit,
                on_step=progress.advance,
            )
        return fit

    def _test_row(self, blocks: tuple[str, ...], seed: int, key: str) -> dict[str, object]:
        fit = self._fit_fully(blocks, seed)
        size = self.recipe_of(blocks).image_size
        tuned = TunedTask(self.backbone, fit.blocks, fit.weights, self.task.classes, size)
        accuracy = accuracy_of(tuned, self.task.test)
        fit = replace(fit, accuracy=accuracy, validation_loss=None)
        return self._row(blocks, seed, None, fit, len(self.task.train), len(self.task.test)) | {"key": key}

    def _row(
        self, blocks: tuple[str, ...], seed: int, fold: int | None, fit: Fit, n_train: int, n_scored: int
    ) -> dict[str, object]:
        determined_by = self._determined_by(blocks, seed, fold)
        return {
            "key": record_key(determined_by),
            "split": "test" if fold is None else "fold",
            "backbone": self.backbone.name,
            "task": self.task.name,
            "blocks": list(blocks),
            "fold": fold,
            "seed": seed,
            "accuracy": fit.accuracy,
            "loss": fit.validation_loss,
            "n_train": n_train,
            "n_scored": n_scored,
            "params": self.count_parameters(blocks),
            "flops": float(sum(training_flops(self.parts, blocks).values()) * n_train * fit.epochs),
            "epochs": fit.epochs,
            "seconds": fit.seconds,
            "device": self.device.type,
            "recipe": determined_by["recipe"],
            "determined_by": determined_by,
        }

    def _determined_by(self, blocks: tuple[str, ...], seed: int, fold: int | None) -> dict[str, object]:
        """Everything that a score depends on; fold None is the test split."""
        folds = {} if fold is None and self.recipe_of(blocks).patience is None else {"folds": self.n_folds}
        return (
            self._fingerprints
            | folds
            | {
                "engine": ENGINE_VERSION,
                "recipe": self.recipe_of(blocks).as_dict(),
                "blocks": list(blocks),
                "fold": fold,
                "seed": seed,
            }
        )

    def _on_device(self, split: Split) -> Split:
        """The split with its images on the device, where they fit beside a pass."""
        if self.device.type != "cuda" or isinstance(split.images, StreamedImages):
            return split
        fits = split.images.nbytes < torch.cuda.mem_get_info(self.device)[0] / 3
        return Split(split.images.to(self.device), split.labels) if fits else split


def accuracy_of(tuned: TunedTask, split: Split, batch_size: int = 256) -> float:
    """Share of images in [0, 1] that a tuned task classifies right."""
    network, device, hits = tuned.network(), tuned.backbone.mean.device, 0
    with torch.no_grad():
        for rows in torch.arange(len(split)).split(batch_size):
            predictions = network(split.images[rows].to(device)).argmax(-1).cpu()
            hits += int((predictions == split.labels[rows]).sum())
    return hits / len(split)


class _Progress:
    """Counts trained candidates' steps, on a bar or into a function."""

    def __init__(self, progress: object, total: int):
        self.report, self.total, self.trained = (progress if callable(progress) else None), total, 0
        shown = progress is True and total > 0
        self.bar = tqdm(total=total, unit="step", desc="training", disable=not shown, mininterval=0.5)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def advance(self, trained: int) -> None:
        self.trained += trained
        self.bar.update(trained)
        if self.report is not None:
            self.report(self.trained, self.total)


def _check_types(backbone: object, task: object, recipe: object, engine: str) -> None:
    for name, value, kind in (("backbone", backbone, Chain), ("task", task, Task), ("recipe", recipe, Recipe)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}")
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")


def _check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, int) or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise TypeError(f"seeds is {seeds!r}; it must be a sequence of whole numbers, e.g. (0, 1, 2)")
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {seeds!r}; it must hold different whole numbers from 0 on, at least one")
    return tuple(seeds)


def _check_images(backbone: Chain, task: Task, recipe: Recipe) -> None:
    """Sends one training image through the backbone, so that a wrong size fails now and not in the first pass."""
    image = task.train.images[torch.tensor([0])].to(backbone.mean.device)
    size = recipe.image_size or task.image_size[0]
    try:
        with torch.no_grad():
            features = backbone(backbone.normalize(resize_to(image / 255, recipe.image_size).to(backbone.mean.dtype)))
    except (AssertionError, RuntimeError, ValueError) as error:
        wanted = backbone.input_size[-1]
        raise ValueError(
            f"{backbone.name} can't take images of {size} pixels ({error}); it was made for {wanted}: "
            f"give Recipe(image_size={wanted})"
        ) from error
    if tuple(features.shape) != (1, backbone.num_features) or not features.isfinite().all():
        raise ValueError(
            f"{backbone.name} gives features of shape {tuple(features.shape)} that are "
            f"{'' if features.isfinite().all() else 'not '}finite; expected finite ones of (1, {backbone.num_features})"
        )
