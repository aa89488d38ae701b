"""The way from the pretrained weights to the tuned ones: networks in between, and what they know of either task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import pandas as pd
import torch

from subtuning_lab.baselines.latest import Latest
from subtuning_lab.data.task import Split
from subtuning_lab.engine.fit import fit_together
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.engine.trainable import count_trained, tune_parts
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import Chain, count_parameters, in_order
from subtuning_lab.nets.heads import fill_readout
from subtuning_lab.nets.inputs import logits_of
from subtuning_lab.study.study import Blocks, Study
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.hashing import fingerprint_of
from subtuning_lab.utils.random import Stream, seeded
from subtuning_lab.utils.validation import Real, Several, checked

ALPHAS: tuple[float, ...] = tuple(step / 10 for step in range(11))
_ALPHA, _CURVE = Real(0, 1), Table(("images",), ("alpha", "accuracy"))


@checked(alpha=_ALPHA)
def interpolate(tuned: TunedTask, alpha: float) -> TunedTask:
    """The task with its tuned blocks at (1 - alpha) pretrained + alpha tuned.

    Args:
        tuned: the tuned task; it is not changed.
        alpha: 0 gives the pretrained blocks, 1 the tuned ones, both bit for bit.
    Returns:
        A task with the same blocks, without scores, `alpha` in its provenance. Floating buffers (BatchNorm's running
        statistics) are interpolated like weights; whole numbers are the tuned task's. The readout is interpolated
        where it started from the pretrained one (`head_start="source"`); a new readout has no pretrained value, and
        stays the tuned one at every alpha.
    Raises:
        ValueError: blocks that started at random weights, or ones of other shapes than the pretrained blocks.
    Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT, 2022), who interpolate all weights;
        here only the subset has two ends.
    """
    recipe = tuned.provenance.get("recipe", {})
    if recipe.get("init") == "random":
        raise ValueError('the blocks were tuned with init "random"; they have no pretrained weights to go back to')
    starts = {name: tuned.backbone.part(name).state_dict() for name in tuned.blocks}
    if recipe.get("head_start") == "source":
        starts["head"] = _source_readout(tuned)
    weights = {name: _between(starts.get(name, ends), ends, alpha, name) for name, ends in tuned.weights.items()}
    return replace(tuned, weights=weights, provenance=tuned.provenance | {"alpha": float(alpha)}, scores={})


@checked
@dataclass(frozen=True)
class Interpolated:
    """A subset tuned by a recipe, then interpolated with the pretrained weights: a method for `Study.test`.

    Several of one subset and recipe share a training, so that a whole curve costs as much as its end.

    Args:
        blocks: part names, in the network's order.
        recipe: without early stopping, for which there are no images.
        alpha: as for `interpolate`.
        latest: where a training is kept for the others.
    """

    blocks: tuple[str, ...]
    recipe: Recipe
    alpha: Annotated[float, _ALPHA]
    latest: Latest = field(default_factory=Latest, compare=False, repr=False)

    name: ClassVar[str] = "interpolated"

    def __post_init__(self) -> None:
        if self.recipe.patience is not None:
            raise ValueError(f"patience is {self.recipe.patience}; interpolation needs recipes with patience None")

    @property
    def head_start(self) -> str:
        """Of the recipe: tells the records whether the pretrained readout matters."""
        return self.recipe.head_start

    def settings(self) -> dict[str, object]:
        """Plain values that determine the result, for the records."""
        return {"blocks": list(self.blocks), "alpha": float(self.alpha), "recipe": self.recipe.as_dict()}

    def fit(
        self, backbone: Chain, train: Split, num_classes: int, seed: int = 0, image_size: int | None = None
    ) -> FittedInterpolation:
        """Tunes the subset, or takes the latest training on these images, and goes back to alpha, see `Method`."""
        readout = None if backbone.source_head is None else fingerprint_of({"head": backbone.source_head}, (), ())
        key = (backbone.fingerprint, readout, self.blocks, self.recipe, num_classes, seed, backbone.mean.device)
        tuned = self.latest.of(train, key, lambda: _fit(self, backbone, train, num_classes, seed))
        params = count_parameters(backbone, self.blocks)
        if self.recipe.adapter is not None or self.recipe.params != "all":
            params = count_trained(tune_parts(backbone, self.blocks, self.recipe).values())
        return FittedInterpolation(interpolate(tuned, self.alpha), params)


@dataclass(frozen=True)
class FittedInterpolation:
    """The network at one point of the way.

    Args:
        tuned: the interpolated task.
        params: parameters that were trained, the readout not counted.
    """

    tuned: TunedTask = field(repr=False)
    params: int

    def logits(self, split: Split) -> torch.Tensor:
        """Logits (n, classes) of a split's images."""
        return logits_of(self.tuned.network(), split.images)


@checked(alphas=Several(_ALPHA))
def interpolation_curve(study: Study, blocks: Blocks, clean: Split, alphas: Sequence[float] = ALPHAS) -> pd.DataFrame:
    """Accuracy along the way from the pretrained blocks to the tuned ones, on the task and on other images.

    Args:
        study: of the target task, e.g. a shifted one. The subset is trained with the recipe that it counts with at
            alpha 1; `head_start="source"` lets the readout take part.
        blocks: the tuned subset.
        clean: images with the same classes, e.g. from before the shift, for networks tuned on all training images.
        alphas: points of the way, in [0, 1].
    Returns:
        One row per alpha, seed and measurement: `alpha`, `images` ("target": validation images of one of the study's
        folds; "clean"), `fold` (missing for "clean"), `seed`, `accuracy`. An alpha may be chosen by the rows of
        "target"; the study's test images are not looked at.
    """
    methods = interpolated(study, blocks, alphas)
    held_out = study.method_scores(methods).assign(images="target")
    rows = [
        (number, "clean", seed, accuracy)
        for number, method in enumerate(methods)
        for seed, accuracy in zip(study.seeds, study.accuracy_on(method, clean).accuracies, strict=True)
    ]
    table = pd.concat([held_out, pd.DataFrame(rows, columns=["method", "images", "seed", "accuracy"])])
    table["alpha"] = table["method"].map(lambda number: methods[number].alpha)
    columns = ["alpha", "images", "fold", "seed", "accuracy"]
    return table[columns].astype({"fold": "Int64"}).reset_index(drop=True)


@checked(alphas=Several(_ALPHA))
def interpolated(study: Study, blocks: Blocks, alphas: Sequence[float] = ALPHAS) -> list[Interpolated]:
    """The methods of `interpolation_curve`, one per different alpha, from 0 to 1: what `study.test` takes."""
    names, recipe, latest = in_order(study.backbone, blocks), study.recipe_of(blocks), Latest()
    return [Interpolated(names, recipe, alpha, latest) for alpha in sorted(set(alphas))]


@checked(table=_CURVE)
def summarize_interpolation(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and number of the accuracies per alpha and kind of images.

    Args:
        table: of `interpolation_curve`; several, e.g. of repetitions, may stand below each other.
    Returns:
        `alpha`, `images`, `accuracy`, `std`, `n`.
    """
    groups = table.groupby(["images", "alpha"], sort=False)["accuracy"]
    return groups.agg(accuracy="mean", std="std", n="count").reset_index()


@checked(table=_CURVE)
def best_alpha(table: pd.DataFrame) -> float:
    """The alpha with the best mean accuracy on the target's folds; of equal ones the smallest, which forgets least.

    Args:
        table: of `interpolation_curve`.
    """
    means = table[table["images"] == "target"].groupby("alpha")["accuracy"].mean().round(12)
    if means.empty:
        raise ValueError('the table has no rows with images "target"; give a table of interpolation_curve')
    return float(means.idxmax())


def _fit(method: Interpolated, backbone: Chain, train: Split, num_classes: int, seed: int) -> TunedTask:
    recipe = method.recipe
    (fit,) = fit_together(backbone, [method.blocks], train, recipe, num_classes=num_classes, seed=seed)
    provenance = {"recipe": recipe.as_dict(), "seed": seed}
    classes, siamese = tuple(map(str, range(num_classes))), recipe.siamese and bool(method.blocks)
    shape = {"siamese": siamese, "head_depth": recipe.head_depth}
    return TunedTask(backbone, fit.blocks, fit.weights, classes, recipe.image_size, provenance, **shape)


def _between(
    start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], alpha: float, name: str
) -> dict[str, torch.Tensor]:
    """Tensors on the way from start to end; whole numbers are those of the end."""
    other = [key for key in end if key not in start or start[key].shape != end[key].shape]
    if other:
        raise ValueError(f"tensor {other[0]} of {name} has another shape than the pretrained one: no way leads there")
    return {
        # torch.lerp is exact at both ends.
        key: torch.lerp(start[key].detach().to(tensor), tensor, alpha) if tensor.is_floating_point() else tensor.clone()
        for key, tensor in end.items()
    }


def _source_readout(tuned: TunedTask) -> dict[str, torch.Tensor]:
    """The weights that a readout started from with `head_start="source"`."""
    head = tuned.empty_head()
    start = {name: tensor.cpu() for name, tensor in tuned.backbone.source_head.state_dict().items()}
    fill_readout(head, seeded(Stream.HEAD, 0), start)
    return head.state_dict()
