"""What a score is of: trials, everything that determines one, and the row of the records that holds it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import pandas as pd
import torch

from subtuning_lab.data.arrays import check_labels
from subtuning_lab.data.images import StreamedImages
from subtuning_lab.data.task import Split, Task
from subtuning_lab.engine.fit import ENGINE_VERSION
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.engine.trainable import count_trained, tune_parts
from subtuning_lab.nets.chain import Chain, count_parameters
from subtuning_lab.nets.flops import training_flops
from subtuning_lab.study.records import Row, record_key
from subtuning_lab.utils.hashing import fingerprint_of, hash_tensor

_SHARED, _CHUNK = 0.1, 256  # share of other images that may be test images; images decoded at a time


@dataclass(frozen=True)
class Candidate:
    """A subset with one recipe for it."""

    blocks: tuple[str, ...]
    recipe: Recipe


class Method(Protocol):
    """A way to adapt a frozen backbone that is no subset of its blocks, e.g. Head2Toe.

    One that reads the pretrained readout has an attribute `head_start`, "source", as a recipe does.
    """

    name: str

    def settings(self) -> dict[str, object]:
        """Plain values that determine the result, for the records."""

    def fit(self, backbone: Chain, train: Split, num_classes: int, seed: int, image_size: int | None) -> Any:
        """Learns from labelled images; what it gives has `params`, and `logits(split)` (n, classes).

        Args:
            backbone: the pretrained chain, on the device to compute on; it is not changed.
            train: training images, not augmented.
            num_classes: outputs that the readout must have.
            seed: of the training, where anything is left to chance.
            image_size: side in pixels that images are resized to; None keeps their own.
        """


@dataclass(frozen=True)
class OtherImages:
    """Images other than a task's own that its trainings are scored on; those of equal content are equal."""

    split: Split = field(compare=False, repr=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(repr(tuple(self.split.images.shape)).encode())
        if isinstance(self.split.images, StreamedImages):
            self.split.images.update_digest(digest)
        else:
            hash_tensor(digest, "images", self.split.images)
        hash_tensor(digest, "labels", self.split.labels)
        object.__setattr__(self, "fingerprint", digest.hexdigest())


@dataclass(frozen=True)
class Trial:
    """One score: of a subset with its recipe, or of a method.

    Args:
        blocks, recipe: the subset and how it is trained; None for a method.
        seed: of the training.
        fold: to score on; None trains on all training images and scores on the test images.
        method: what is trained instead of a subset.
        other: images to score on instead of the test images.
    """

    blocks: tuple[str, ...]
    recipe: Recipe | None
    seed: int
    fold: int | None
    method: Method | None = None
    other: OtherImages | None = None

    def steps(self, n_train: int) -> int:
        """Optimizer steps on so many training images, without early stopping; a method counts as one."""
        return 1 if self.recipe is None else self.recipe.epochs * -(-n_train // self.recipe.batch_size)

    def settings(self) -> dict[str, object]:
        """How it is trained, as plain values."""
        return {"method": self.method.name, **self.method.settings()} if self.method else _plain(self.recipe)

    @property
    def stops_early(self) -> bool:
        """Whether validation images decide when the training ends."""
        return self.recipe is not None and self.recipe.patience is not None

    @property
    def reads_source_head(self) -> bool:
        """Whether the pretrained readout matters, which is no part of a backbone's fingerprint."""
        return getattr(self.method or self.recipe, "head_start", None) == "source"


@dataclass(frozen=True)
class Score:
    """What a trial came to.

    Args:
        accuracy, balanced_accuracy: in [0, 1]; missing where the training diverged, which gives no score.
        loss: mean cross-entropy.
        params: parameters that were trained, the readout's not counted.
        flops: per training image and epoch.
        epochs, seconds: of the training.
        confusion: (true class, predicted class, images), those with images only; None where it isn't asked for.
    """

    accuracy: float | None
    balanced_accuracy: float | None
    loss: float | None
    params: int
    flops: int
    epochs: int
    seconds: float
    confusion: list[tuple[int, int, int]] | None = None


class Keys:
    """The records' keys and rows for one backbone on one task.

    Args:
        backbone, task: what the scores are of.
        folds: pairs of training and validation indices.
        image_size: side in pixels that images are resized to, or None.
    """

    def __init__(
        self, backbone: Chain, task: Task, folds: Sequence[tuple[torch.Tensor, torch.Tensor]], image_size: int | None
    ):
        self.names = {"backbone": backbone.name, "task": task.name}
        self.fingerprints = {"backbone": backbone.fingerprint, "task": task.fingerprint}
        self.fold_sizes = [(len(train), len(validation)) for train, validation in folds]
        self.n_train, self.image_size = len(task.train), image_size
        head = backbone.source_head
        self._source_head = None if head is None else fingerprint_of({"head": head}, (), ())

    def key(self, trial: Trial) -> str:
        """The key of a trial's row."""
        return record_key(self.determined_by(trial))

    def key_of_uses(self, other: OtherImages | None) -> str:
        """What uses of the test split, or of other images, are counted under."""
        return record_key(self.fingerprints | ({} if other is None else {"scored_on": other.fingerprint}))

    def determined_by(self, trial: Trial) -> dict[str, object]:
        """Everything that a score depends on, but for the last bits, which are the device's and its threads'."""
        values = dict(self.fingerprints)
        if trial.fold is not None or trial.stops_early:
            values["folds"] = len(self.fold_sizes)
        values |= {"recipe": trial.settings(), "blocks": trial.blocks, "fold": trial.fold, "seed": trial.seed}
        if trial.method:
            values["image_size"] = self.image_size  # a subset's recipe says it
        if trial.reads_source_head:
            values["source_head"] = self._source_head
        if trial.other is not None:
            values["scored_on"] = trial.other.fingerprint
        return values | {"engine": ENGINE_VERSION}

    def trained_on(self, trial: Trial) -> int:
        """Images that a trial is trained on."""
        if trial.fold is not None:
            return self.fold_sizes[trial.fold][0]
        return self.n_train - (self.fold_sizes[0][1] if trial.stops_early else 0)

    def row(self, trial: Trial, score: Score, n_scored: int, device: torch.device) -> Row:
        """A trial's row, as the records store and give it; it was scored on so many images."""
        n_train, determined_by = self.trained_on(trial), self.determined_by(trial)
        return {
            "key": record_key(determined_by),
            "split": "test" if trial.fold is None else "fold",
            "backbone": self.names["backbone"],
            "task": self.names["task"] + ("" if trial.other is None else ", scored on other images"),
            "blocks": list(trial.blocks),
            "fold": trial.fold,
            "seed": trial.seed,
            "status": "diverged" if score.accuracy is None else "ok",
            "accuracy": score.accuracy,
            "balanced_accuracy": score.balanced_accuracy,
            "loss": score.loss,
            "confusion": score.confusion,
            "n_train": n_train,
            "n_scored": n_scored,
            "params": score.params,
            "flops": float(score.flops * n_train * score.epochs),
            "epochs": score.epochs,
            "seconds": score.seconds,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "recipe": trial.settings(),
            "determined_by": determined_by,
        }


def cost_of(trial: Trial, backbone: Chain, parts: pd.DataFrame) -> tuple[int, int]:
    """Parameters that a subset's trial trains, the readout not counted, and its FLOPs per training image and epoch.

    Args:
        trial: with a recipe.
        backbone: whose blocks it names.
        parts: of `part_table`.
    """
    recipe, narrowed = trial.recipe, trial.recipe.adapter is not None or trial.recipe.params != "all"
    flops = sum(training_flops(parts, trial.blocks, weight_gradients=not narrowed).values())
    if trial.blocks and recipe.head_start == "probe":
        flops += int(parts["flops"].sum())  # linear probing before
    if trial.blocks and recipe.siamese:
        flops += int(parts["flops"].sum()) - training_flops(parts, trial.blocks)["trunk"]  # the frozen side's rest
    if recipe.trains_all:
        return count_parameters(backbone, trial.blocks), flops
    return count_trained(tune_parts(backbone, trial.blocks, recipe).values()), flops


def trained_once(trials: Sequence[Trial]) -> dict[Trial, list[Trial]]:
    """Trainings on all images, each with the trials that score it on one set of images or another."""
    trainings: dict[Trial, list[Trial]] = {}
    for trial in trials:
        trainings.setdefault(replace(trial, other=None), []).append(trial)
    return trainings


def check_other(split: Split, task: Task) -> None:
    """Raises ValueError unless a task's trainings can be scored on the images, and they are not its test images.

    A corruption may leave a few images as they are, so that up to a tenth of them may be the task's own.
    """
    check_labels(split.labels, task.classes, "split")
    if tuple(split.images.shape[2:]) != task.image_size:
        raise ValueError(
            f"images of the split are {tuple(split.images.shape[2:])}; those of {task.name} are {task.image_size}"
        )
    tested = set(_digests(task.test)) if task.test is not None else set()
    shared = sum(digest in tested for digest in _digests(split))
    if shared > _SHARED * len(split):
        raise ValueError(
            f"{shared} of the split's {len(split)} images are test images of {task.name}; only Study.test reaches these"
        )


def _digests(split: Split) -> Collection[bytes]:
    """A hash of every image; streamed ones are decoded a few at a time."""
    rows = (split.images[rows] for rows in torch.arange(len(split)).split(_CHUNK))
    return [hashlib.blake2b(image.cpu().numpy().tobytes()).digest() for images in rows for image in images]


@lru_cache(maxsize=4096)
def _plain(recipe: Recipe) -> dict[str, object]:
    return recipe.as_dict()
