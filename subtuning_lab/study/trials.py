"""What one score is of, and what the test split said."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Protocol

import pandas as pd
import torch

from subtuning_lab.data.images import StreamedImages
from subtuning_lab.data.task import Split
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.engine.trainable import count_trained, tune_parts
from subtuning_lab.nets.chain import Chain, count_parameters
from subtuning_lab.nets.flops import training_flops
from subtuning_lab.utils.hashing import hash_tensor


@dataclass(frozen=True)
class Arm:
    """A subset with one recipe for it: what a race lets run."""

    blocks: tuple[str, ...]
    recipe: Recipe


class FittedMethod(Protocol):
    """What a method has learned."""

    params: int

    def logits(self, split: Split) -> torch.Tensor:
        """Logits (n, classes) of a split's images."""


class Method(Protocol):
    """A way to adapt a frozen backbone that is no subset of its blocks, e.g. Head2Toe.

    One that reads the pretrained readout has an attribute `head_start`, "source", as a recipe does.
    """

    name: str

    def settings(self) -> dict[str, object]:
        """Plain values that determine the result, for the records."""

    def fit(self, backbone: Chain, train: Split, num_classes: int, seed: int, image_size: int | None) -> FittedMethod:
        """Learns from labelled images."""


@dataclass(frozen=True)
class OtherImages:
    """Images beside a task's own that its trainings are scored on; those of equal content are equal."""

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
        return {"method": self.method.name, **self.method.settings()} if self.method else self.recipe.as_dict()

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
    """What a trial came to; accuracy is in [0, 1], `flops` per training image and epoch."""

    accuracy: float
    loss: float | None
    params: int
    flops: int
    epochs: int
    seconds: float


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


@dataclass(frozen=True)
class TestResult:
    """What the test split, or other images, said, once per seed.

    Args:
        blocks: the tuned parts, in the network's order.
        accuracies: accuracy in [0, 1] per seed.
        n_test: number of images.
        uses: how often this study has used these images so far, this time included.
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
