"""Head2Toe: a linear readout on features chosen from everywhere in the frozen network, not from its end alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, MultiTaskLasso

from subtuning_lab.baselines.latest import Latest
from subtuning_lab.data.arrays import check_labels
from subtuning_lab.data.images import StreamedImages
from subtuning_lab.data.task import Split
from subtuning_lab.nets.chain import Chain, frozen_copy
from subtuning_lab.nets.inputs import network_input
from subtuning_lab.utils.validation import IMAGE_SIZE, SEED, Is, OneOf, Real, Several, Whole, checked

_BATCH, _STEPS = 64, 10_000
_MAX_PREFIX = 8  # class and register tokens before the tokens of the grid; more than these means that there is no grid
_SHARE, _C = Real(0, 1, above=True), Real(0, above=True)


@checked
@dataclass(frozen=True)
class Head2Toe:
    """Features of every part of the frozen backbone, the most relevant share of them, and logistic regression on it.

    Nothing in it is left to chance: the seed changes no number, and there is no spread over seeds.

    Args:
        pool: average pooling over positions leaves at most so many features per part, but one per channel at least.
        share: of all features that is kept, in (0, 1]; 1 keeps all, and nothing has to be chosen.
        C: inverse strength of the readout's L2 penalty (scikit-learn's), above 0.
        sparsity: of the group lasso that ranks features, in (0, 1): its penalty, as a share of the smallest one that
            would leave no feature at all.
        scaling: "image" gives every image's features of one part norm 1, so that a narrow part's are large and soon
            chosen; "part" gives each part's features variance 1 in the mean, so that widths don't matter.
    Source: Evci, Dumoulin, Larochelle, Mozer, "Head2Toe" (ICML 2022). Deviations: outputs of the chain's parts are the
        features, none from inside a block, and all parts are pooled to one size; the group lasso is of squared error on
        one-hot labels, with a penalty relative to the largest useful one, not of cross-entropy by gradient descent;
        where its weights are zero, features are ranked by how near they are to entering; the readout on the chosen ones
        is logistic regression to convergence, and the backbone is never tuned after it.
    """

    pool: Annotated[int, Whole(1)] = 512
    share: Annotated[float, _SHARE] = 0.1
    C: Annotated[float, _C] = 1.0
    sparsity: Annotated[float, Real(0, 1, above=True, below=True)] = 0.1
    scaling: Annotated[str, OneOf(("image", "part"))] = "image"
    latest: Latest = field(default_factory=Latest, compare=False, repr=False)

    name: ClassVar[str] = "Head2Toe"

    @staticmethod
    @checked(pool=Whole(1), shares=Several(_SHARE), Cs=Several(_C))
    def grid(
        pool: int = 512, shares: Sequence[float] = (0.01, 0.02, 0.1, 1.0), Cs: Sequence[float] = (0.01, 0.1, 1.0)
    ) -> list[Head2Toe]:
        """Every combination, to be chosen among on the folds; they share features and ranking."""
        latest = Latest()
        return [Head2Toe(pool, share, C, latest=latest) for share, C in product(shares, Cs)]

    def settings(self) -> dict[str, object]:
        """Plain values by name, for records."""
        numbers = {name: float(getattr(self, name)) for name in ("share", "C", "sparsity")}
        return {"pool": int(self.pool), **numbers, "scaling": self.scaling}

    @checked(
        backbone=Is(Chain), train=Is(Split), num_classes=Whole(2), seed=SEED, image_size=IMAGE_SIZE.or_none()
    )
    def fit(
        self, backbone: Chain, train: Split, num_classes: int, seed: int = 0, image_size: int | None = None
    ) -> FittedHead2Toe:
        """Chooses features on the training images and fits the readout on them, see `Method`.

        Raises:
            ValueError: labels out of range, or all the same; activations of a shape that can't be pooled.
        """
        check_labels(train.labels, range(num_classes), "train")
        if len(train.labels.unique()) < 2:
            raise ValueError(f"train has the one label {int(train.labels[0])}; a readout needs at least two")
        features = _Features(frozen_copy(backbone), self.pool, self.scaling, image_size)
        key = (features.backbone.fingerprint, self.pool, self.scaling, image_size)
        raw, owners = self.latest.of(train, key, lambda: features.of_all(train.images))
        center, scale = _scaling(raw, owners if self.scaling == "part" else np.zeros_like(owners))
        scaled, labels = (raw - center) * scale, train.labels.numpy()
        chosen = np.arange(len(owners))
        if self.share < 1:
            ranks = self.latest.of(train, (*key, self.sparsity), lambda: relevance(scaled, labels, self.sparsity))
            kept = max(1, round(self.share * len(chosen)))
            chosen = np.sort(np.argsort(-ranks, kind="stable")[:kept])
        weight, bias = _readout(scaled[:, chosen], labels, num_classes, self.C)
        weight = weight * scale[chosen]
        table = pd.DataFrame({"part": np.array(backbone.part_names)[owners], "chosen": False})
        table.loc[chosen, "chosen"] = True
        return FittedHead2Toe(features, chosen, weight, bias - weight @ center[chosen], table)


@dataclass(frozen=True)
class FittedHead2Toe:
    """A readout on chosen features of a frozen backbone.

    Args:
        source: where the features come from.
        chosen: int64 (kept,), their places among all features, ascending.
        weight, bias: of the readout, (classes, kept) and (classes,); -inf for a class without training images.
        features: table with a row per feature: `part`, and whether it was `chosen`.
    """

    source: _Features = field(repr=False)
    chosen: np.ndarray = field(repr=False)
    weight: np.ndarray = field(repr=False)
    bias: np.ndarray = field(repr=False)
    features: pd.DataFrame = field(repr=False)

    @property
    def params(self) -> int:
        """Trained parameters of the readout."""
        return self.weight.size + self.bias.size

    def logits(self, split: Split) -> torch.Tensor:
        """Logits (n, classes) of a split's images, float64 on the CPU."""
        batches = self.source.batches(split.images)
        rows = [features[:, self.chosen] @ self.weight.T + self.bias for features, _ in batches]
        return torch.from_numpy(np.concatenate(rows))


@dataclass(frozen=True)
class _Features:
    """Features of all parts of a frozen backbone; see `Head2Toe` for how they are made."""

    backbone: Chain
    pool: int
    scaling: str
    image_size: int | None

    @torch.no_grad()
    def batches(self, images: torch.Tensor | StreamedImages) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features (batch, features), float64, and the part's number of each feature."""
        for rows in torch.arange(len(images), device=images.device).split(_BATCH):
            x = network_input(self.backbone, images[rows], self.image_size)
            size, features = tuple(x.shape[-2:]), []
            for part in self.backbone.parts:
                x = part(x)
                values = pooled(x, self.pool, size).cpu().to(torch.float64, copy=True)  # a next part may write into x
                features.append((F.normalize(values) if self.scaling == "image" else values).numpy())
            yield np.concatenate(features, axis=1), np.repeat(np.arange(len(features)), [f.shape[1] for f in features])

    def of_all(self, images: torch.Tensor | StreamedImages) -> tuple[np.ndarray, np.ndarray]:
        """As `batches`, of all images together."""
        batches, owners = zip(*self.batches(images), strict=True)
        return np.concatenate(batches), owners[0]


def relevance(features: np.ndarray, labels: np.ndarray, sparsity: float) -> np.ndarray:
    """How much a group lasso on one-hot labels wants each feature, in all classes together.

    Args:
        features: (n, features), on comparable scales.
        labels: int64 (n,).
        sparsity: the lasso's penalty over the smallest one that leaves no feature.
    Returns:
        Scores (features,): of weight minus gradient, over the classes, the norm. It is above the penalty exactly for
        features with weights that are not zero, so that these come first; below it, it is what lacks to enter.
    """
    targets = np.eye(int(labels.max()) + 1)[labels]
    targets -= targets.mean(0)
    features = np.asfortranarray(features - features.mean(0))
    strongest = np.linalg.norm(features.T @ targets, axis=1).max() / len(labels)
    if strongest == 0:  # no feature varies with the labels
        return np.zeros(features.shape[1])
    lasso = MultiTaskLasso(alpha=sparsity * strongest, fit_intercept=False, max_iter=_STEPS, tol=1e-3)
    weights = lasso.fit(features, targets).coef_.T  # (features, classes)
    downhill = features.T @ (targets - features @ weights) / len(labels)
    return np.linalg.norm(weights + downhill, axis=1)


def pooled(activation: torch.Tensor, pool: int, image: tuple[int, int]) -> torch.Tensor:
    """Features (batch, features) of one part's output, pooled over positions.

    Args:
        activation: (batch, channels, height, width), (batch, height, width, channels), (batch, tokens, width) or
            (batch, features). Tokens before those of a grid, such as the class token, are kept as they are.
        pool: features to leave at most; at least one per channel, and the tokens before the grid, stay.
        image: (height, width) of the images in pixels, whose proportions tell positions from channels.
    """
    if activation.dim() == 2:
        return activation
    if activation.dim() == 4:
        return _pooled_grid(_channels_first(activation, image), pool)
    if activation.dim() != 3:
        raise ValueError(f"cannot pool an activation of shape {tuple(activation.shape)}; it must have 2 to 4 axes")
    first, height, width = _token_grid(activation.shape[1], image)
    prefix, grid = activation[:, :first], activation[:, first:].transpose(1, 2)  # (batch, width, tokens)
    grid = grid.unflatten(2, (height, width))
    return torch.cat([prefix.flatten(1), _pooled_grid(grid, pool - prefix[0].numel())], dim=1)


def _pooled_grid(activation: torch.Tensor, pool: int) -> torch.Tensor:
    """The finest means over cells of (batch, channels, height, width) that give at most `pool` features."""
    channels, height, width = activation.shape[1:]
    cells = max(1, pool // channels)
    side = math.isqrt(cells)
    rows = min(height, max(side, cells // width))  # a grid of one row or column takes the other's share
    return F.adaptive_avg_pool2d(activation, (rows, min(width, cells // rows))).flatten(1)


def _channels_first(activation: torch.Tensor, image: tuple[int, int]) -> torch.Tensor:
    """The activation as (batch, channels, height, width): positions are the axes in the images' proportions."""
    # Where both readings fit, as with 16 channels of 16 x 16, convolutions are the likelier source.
    target = math.log(image[0] / image[1])
    first, second, third = activation.shape[1:]
    first_off, last_off = abs(math.log(second / third) - target), abs(math.log(first / second) - target)
    return activation if first_off <= last_off else activation.permute(0, 3, 1, 2)


def _token_grid(tokens: int, image: tuple[int, int]) -> tuple[int, int, int]:
    """(tokens before the grid, height, width) in the images' proportions; without such a grid, one row of tokens."""
    for first in range(min(_MAX_PREFIX + 1, tokens)):
        width = round(math.sqrt((tokens - first) * image[1] / image[0]))
        height = (tokens - first) // width if width else 0
        if height and height * width == tokens - first and height * image[1] == width * image[0]:
            return first, height, width
    return 0, 1, tokens


def _scaling(features: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of every feature, and one factor per group that brings its features' mean variance to 1."""
    variance = np.bincount(groups, features.var(0)) / np.bincount(groups)
    factors = 1 / np.sqrt(np.where(variance > 0, variance, 1.0))
    return features.mean(0), factors[groups]


def _readout(features: np.ndarray, labels: np.ndarray, num_classes: int, C: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (classes, features) and bias (classes,) of logistic regression."""
    model = LogisticRegression(C=C, max_iter=_STEPS).fit(features, labels)
    weight, bias = np.zeros((num_classes, features.shape[1])), np.full(num_classes, -np.inf)
    two = len(model.classes_) == 2  # scikit-learn then keeps the second class's margin over the first alone
    weight[model.classes_] = np.concatenate([0 * model.coef_, model.coef_]) if two else model.coef_
    bias[model.classes_] = np.append(0.0, model.intercept_) if two else model.intercept_
    return weight, bias
