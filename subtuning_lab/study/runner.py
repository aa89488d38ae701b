"""Turns trials into scores: trains them on folds, or on all training images, and notes what they came to."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version

import pandas as pd
import torch

from subtuning_lab.data.images import StreamedImages
from subtuning_lab.data.task import Split, Task
from subtuning_lab.engine.fit import Fit, fit_together
from subtuning_lab.engine.memory import Prepared, free_bytes
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import Chain
from subtuning_lab.study.keys import Scorebook
from subtuning_lab.study.trials import Score, Trial, cost_of
from subtuning_lab.utils.progress import Progress

Shown = bool | Callable[[int, int], None]  # as for `Progress`


@dataclass(frozen=True)
class Trainer:
    """Trains trials of one backbone on one task.

    Args:
        backbone: frozen, on its device.
        task: images and labels.
        folds: pairs of training and validation indices.
        book: where scores are noted.
        parts: of `part_table`.
        image_size: side in pixels that images are resized to, or None.
        engine, memory_limit: as for `fit_together`.
    """

    backbone: Chain
    task: Task
    folds: Sequence[tuple[torch.Tensor, torch.Tensor]]
    book: Scorebook
    parts: pd.DataFrame
    image_size: int | None
    engine: str
    memory_limit: int | None

    @cached_property
    def _prepared(self) -> Prepared:
        return Prepared(self.backbone)

    def score_on_folds(self, trials: Sequence[Trial], shown: Shown) -> None:
        """Trains on what the folds leave, one fold and seed at a time, and notes each pass when it ends."""
        groups: dict[tuple[int, int], list[Trial]] = {}
        for trial in trials:
            groups.setdefault((trial.seed, trial.fold), []).append(trial)
        steps = sum(trial.steps(self.book.sizes(trial)[0]) for trial in trials)
        with Progress(shown, steps) as progress:
            for (_, fold), group in groups.items():
                train, validation = self._fold(fold)
                methods = [trial for trial in group if trial.method]
                for trial in methods:
                    self.book.note({trial: self._learn(trial, train, [validation])[0]})
                    progress.advance(1)
                subsets = [trial for trial in group if not trial.method]
                self._fit(subsets, train, validation, progress, partial(self._note, subsets))

    def score_at_last(self, trials: Sequence[Trial], shown: Shown) -> None:
        """Trains on all training images, scores on the test images or other ones, and notes what a training came to.

        Trials that differ in the images that they are scored on share one training.
        """
        trainings: dict[Trial, list[Trial]] = {}
        for trial in trials:
            trainings.setdefault(replace(trial, other=None), []).append(trial)
        for training, own in trainings.items():
            if training.method:
                scores = self._learn(training, self._on_device(self.task.train), [self._scored(t) for t in own])
                self.book.note(dict(zip(own, scores, strict=True)))
        for training, tuned, fit in self.fit([trial for trial in trainings if not trial.method], shown):
            own = trainings[training]
            fits = [replace(fit, accuracy=tuned.accuracy(self._scored(t)), validation_loss=None) for t in own]
            self._note(own, dict(enumerate(fits)))

    def fit(self, trials: Sequence[Trial], shown: Shown) -> Iterator[tuple[Trial, TunedTask, Fit]]:
        """Trains on all training images; less the first fold's validation images where these decide the end."""
        steps = sum(trial.steps(self.book.sizes(trial)[0]) for trial in trials)
        with Progress(shown, steps) as progress:
            for trial in trials:
                train, validation = self._fold(0) if trial.stops_early else (self._on_device(self.task.train), None)
                (fit,) = self._fit([trial], train, validation, progress, None)
                yield trial, self._tuned(trial, fit), fit

    def _fit(
        self,
        trials: Sequence[Trial],  # of one seed
        train: Split,
        validation: Split | None,
        progress: Progress,
        on_pass: Callable[[dict[int, Fit]], None] | None,
    ) -> list[Fit]:
        return (
            fit_together(
                self._prepared,
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
            if trials
            else []
        )

    def _learn(self, trial: Trial, train: Split, scored: Sequence[Split]) -> list[Score]:
        """Trains a method and scores it on each of the splits."""
        start, flops = time.perf_counter(), int(self.parts["flops"].sum())
        fitted = trial.method.fit(self.backbone, train, self.task.num_classes, trial.seed, self.image_size)
        hits = [(fitted.logits(own).argmax(1).cpu() == own.labels.cpu()).double().mean().item() for own in scored]
        seconds = time.perf_counter() - start
        return [Score(accuracy, None, fitted.params, flops, 1, seconds) for accuracy in hits]

    def _scored(self, trial: Trial) -> Split:
        """The images that a training on all training images is scored on."""
        return self.task.test if trial.other is None else trial.other.split

    def _note(self, trials: Sequence[Trial], fits: Mapping[int, Fit]) -> None:
        self.book.note({trials[i]: self._score(trials[i], fit) for i, fit in fits.items()})

    def _score(self, trial: Trial, fit: Fit) -> Score:
        params, flops = cost_of(trial, self.backbone, self.parts)
        return Score(fit.accuracy, fit.validation_loss, params, flops, fit.epochs, fit.seconds)

    def _tuned(self, trial: Trial, fit: Fit) -> TunedTask:
        provenance = {
            "task": self.task.name,
            "task_fingerprint": self.book.fingerprints["task"],
            "n_train": self.book.sizes(trial)[0],
            "pixels": [self.image_size] * 2 if self.image_size else list(self.task.image_size),
            "seed": trial.seed,
            "recipe": trial.recipe.as_dict(),
            "versions": {name: version(name) for name in ("torch", "timm")} | {"python": platform.python_version()},
        }
        siamese = trial.recipe.siamese and bool(trial.blocks)
        own = (self.backbone, fit.blocks, fit.weights, self.task.classes, self.image_size, provenance)
        return TunedTask(*own, siamese=siamese, head_depth=trial.recipe.head_depth, crop_size=self.task.image_size)

    def _fold(self, number: int) -> tuple[Split, Split]:
        """Training and validation images of a fold, on the device if they fit."""
        train, validation = (self._on_device(self.task.train.take(rows)) for rows in self.folds[number])
        return train, validation

    def _on_device(self, split: Split) -> Split:
        """The split with its images on the device, where they fit beside a pass."""
        device = self.backbone.mean.device
        if device.type != "cuda" or isinstance(split.images, StreamedImages):
            return split
        fits = split.images.nbytes < free_bytes(device) / 2
        return Split(split.images.to(device), split.labels) if fits else split
