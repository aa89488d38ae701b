"""Turns trials into rows of the records: reads those that are there, trains the others, and notes each pass."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import pandas as pd
import torch
import torch.nn.functional as F

from subtuning_lab.data.images import StreamedImages
from subtuning_lab.data.task import Split, Task
from subtuning_lab.engine.fit import Fit, fit_together
from subtuning_lab.engine.memory import Prepared, free_bytes
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.inputs import logits_of
from subtuning_lab.study.keys import Keys, Score, Trial, cost_of, trained_once
from subtuning_lab.study.records import Records, Row
from subtuning_lab.utils.progress import Progress

Shown = bool | Callable[[int, int], None]  # as for `Progress`


@dataclass(frozen=True)
class Runner:
    """Trains trials of one backbone on one task.

    Args:
        backbone: frozen, on its device.
        prepared: what trainings share of it.
        task: images and labels.
        folds: pairs of training and validation indices.
        records, keys: where scores are noted, and under what.
        parts: of `part_table`.
        image_size: side in pixels that images are resized to, or None.
        engine, memory_limit: as for `fit_together`.
    """

    backbone: Chain
    prepared: Prepared
    task: Task
    folds: Sequence[tuple[torch.Tensor, torch.Tensor]]
    records: Records
    keys: Keys
    parts: pd.DataFrame
    image_size: int | None
    engine: str
    memory_limit: int | None

    def known(self, trials: Iterable[Trial]) -> tuple[dict[Trial, Row], list[Trial]]:
        """The rows that the records have, looked up once, and the trials that have none."""
        keys = {trial: self.keys.key(trial) for trial in trials}
        rows = self.records.get(list(keys.values()))
        return {t: rows[key] for t, key in keys.items() if key in rows}, [t for t in keys if keys[t] not in rows]

    def on_folds(self, trials: Sequence[Trial], shown: Shown) -> dict[Trial, Row]:
        """Rows of trials on folds: what is missing is trained on what the folds leave, one fold and seed at a time,
        and each pass is noted when it ends."""
        rows, missing = self.known(trials)
        groups: dict[tuple[int, int], list[Trial]] = {}
        for trial in missing:
            groups.setdefault((trial.seed, trial.fold), []).append(trial)
        with self._progress(shown, missing) as progress:
            for (seed, fold), group in groups.items():
                train, validation = self._fold(fold)
                for trial in (trial for trial in group if trial.method):
                    rows |= self._noted({trial: self._learn(trial, train, [validation])[0]})
                    progress.advance(1)
                subsets = [trial for trial in group if not trial.method]
                if subsets:
                    blocks, recipes = [t.blocks for t in subsets], [t.recipe for t in subsets]
                    options = self._options | {"validation": validation, "seed": seed, "on_step": progress.advance}
                    options["on_pass"] = partial(self._note_pass, rows, subsets)
                    fit_together(self.prepared, blocks, train, recipes, **options)
        return rows

    def at_last(self, trials: Sequence[Trial], shown: Shown) -> dict[Trial, Row]:
        """Rows of trials that are trained on all training images, and scored on the test images or other ones.

        Trials that differ in the images that they are scored on share one training.
        """
        rows, missing = self.known(trials)
        with self._progress(shown, trained_once(missing)) as progress:
            for training, scored in trained_once(missing).items():
                splits = [self.scored(trial) for trial in scored]
                if training.method:
                    scores = self._learn(training, self._on_device(self.task.train), splits)
                    progress.advance(1)
                else:
                    fit = self._fit(training, progress)
                    tuned = None if fit.diverged else self._tuned(training, fit)
                    scores = [self._score(training, fit, tuned, split) for split in splits]
                rows |= self._noted(dict(zip(scored, scores, strict=True)))
        return rows

    def tuned(self, trial: Trial, shown: Shown) -> TunedTask:
        """Trains a subset on all training images; less the first fold's validation images where these decide the end.

        Raises:
            ValueError: the training diverged, which leaves nothing worth keeping.
        """
        with self._progress(shown, [trial]) as progress:
            fit = self._fit(trial, progress)
        if fit.diverged:
            names = ", ".join(trial.blocks) or "linear probing"
            raise ValueError(f"the training of {names} diverged; give a lower learning rate than {trial.recipe.lr:g}")
        return self._tuned(trial, fit)

    def scored(self, trial: Trial) -> Sized:
        """The images that a trial is scored on; of a fold, their numbers."""
        if trial.fold is not None:
            return self.folds[trial.fold][1]
        return self.task.test if trial.other is None else trial.other.split

    @property
    def _options(self) -> dict[str, object]:
        classes = self.task.num_classes
        return {"num_classes": classes, "engine": self.engine, "memory_limit": self.memory_limit}

    def _progress(self, shown: Shown, trials: Collection[Trial]) -> Progress:
        steps = sum(trial.steps(self.keys.trained_on(trial)) for trial in trials)
        return Progress(shown, steps, len({(trial.blocks, trial.method) for trial in trials}), len(trials))

    def _fit(self, trial: Trial, progress: Progress) -> Fit:
        train, validation = self._fold(0) if trial.stops_early else (self._on_device(self.task.train), None)
        options = self._options | {"validation": validation, "seed": trial.seed, "on_step": progress.advance}
        return fit_together(self.prepared, [trial.blocks], train, trial.recipe, **options)[0]

    def _learn(self, trial: Trial, train: Split, splits: Sequence[Split]) -> list[Score]:
        """Trains a method and scores it on each of the splits."""
        start, flops = time.perf_counter(), int(self.parts["flops"].sum())
        fitted = trial.method.fit(self.backbone, train, self.task.num_classes, trial.seed, self.image_size)
        results = [_measured(fitted.logits(split), split, with_confusion=trial.fold is None) for split in splits]
        seconds = time.perf_counter() - start
        return [Score(**measured, params=fitted.params, flops=flops, epochs=1, seconds=seconds) for measured in results]

    def _score(self, trial: Trial, fit: Fit, tuned: TunedTask | None = None, split: Split | None = None) -> Score:
        """What a fit came to: on a fold by its own validation scores, at last by the tuned network on a split."""
        if fit.diverged:
            measured = dict.fromkeys(("accuracy", "balanced_accuracy", "loss"))
        elif split is None:
            measured = {"accuracy": fit.accuracy, "balanced_accuracy": fit.balanced_accuracy}
            measured["loss"] = fit.validation_loss
        else:
            logits = logits_of(tuned.network(), tuned.preparation.prepared(split.images))
            measured = _measured(logits, split, with_confusion=True)
        params, flops = cost_of(trial, self.backbone, self.parts)
        return Score(**measured, params=params, flops=flops, epochs=fit.epochs, seconds=fit.seconds)

    def _note_pass(self, rows: dict[Trial, Row], trials: Sequence[Trial], fits: Mapping[int, Fit]) -> None:
        rows |= self._noted({trials[i]: self._score(trials[i], fit) for i, fit in fits.items()})

    def _noted(self, scores: Mapping[Trial, Score]) -> dict[Trial, Row]:
        """Writes the rows of finished trials, in one transaction."""
        rows = {t: self.keys.row(t, score, len(self.scored(t)), self._device) for t, score in scores.items()}
        self.records.put(rows.values())
        return rows

    def _tuned(self, trial: Trial, fit: Fit) -> TunedTask:
        provenance = {
            "task": self.task.name,
            "task_fingerprint": self.keys.fingerprints["task"],
            "n_train": self.keys.trained_on(trial),
            "pixels": [self.image_size] * 2 if self.image_size else list(self.task.image_size),
            "seed": trial.seed,
            "recipe": trial.recipe.as_dict(),
            "versions": {name: version(name) for name in ("torch", "timm")} | {"python": platform.python_version()},
            "device": self._device.type,
            "threads": torch.get_num_threads(),
        }
        return TunedTask(
            self.backbone,
            fit.blocks,
            fit.weights,
            self.task.classes,
            self.image_size,
            provenance,
            siamese=trial.recipe.siamese and bool(trial.blocks),
            head_depth=trial.recipe.head_depth,
            crop_size=self.task.image_size,
        )

    @property
    def _device(self) -> torch.device:
        return self.backbone.mean.device

    def _fold(self, number: int) -> tuple[Split, Split]:
        """Training and validation images of a fold, on the device if they fit."""
        train, validation = (self._on_device(self.task.train.take(rows)) for rows in self.folds[number])
        return train, validation

    def _on_device(self, split: Split) -> Split:
        """The split with its images on the device, where they fit beside a pass."""
        if self._device.type != "cuda" or isinstance(split.images, StreamedImages):
            return split
        fits = split.images.nbytes < free_bytes(self._device) / 2
        return Split(split.images.to(self._device), split.labels) if fits else split


def usable_device(device: str | torch.device | None, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device, by default a GPU if there is one. Apple's computes no float64, so it is not picked for that.

    Raises:
        ValueError: one that isn't here, or that computes nothing ("meta").
    """
    if device is None:
        apple = torch.backends.mps.is_available() and dtype != torch.float64
        device = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    try:
        usable = torch.device(device)
        torch.empty(0, device=usable, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f'device is {device!r}; it must be one that is here, e.g. "cpu" or "cuda" ({why})') from error
    if usable.type == "meta":
        raise ValueError(f'device is {device!r}, where nothing is computed; it must be one such as "cpu" or "cuda"')
    return usable


def _measured(logits: torch.Tensor, split: Split, with_confusion: bool) -> dict[str, object]:
    """What logits (n, classes) come to on a split; nothing where any of them is not finite."""
    logits, labels, classes = logits.cpu().double(), split.labels.cpu(), logits.shape[1]
    names = ("accuracy", "balanced_accuracy", "loss", "confusion")
    if not logits.isfinite().all():
        return dict.fromkeys(names)
    counts = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)
    present = counts.sum(1) > 0
    balanced = (counts.diagonal()[present] / counts.sum(1)[present]).double().mean().item()
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    filled = [[*place, int(counts[tuple(place)])] for place in counts.nonzero().tolist()] if with_confusion else None
    return dict(zip(names, (accuracy, balanced, F.cross_entropy(logits, labels).item(), filled), strict=True))
