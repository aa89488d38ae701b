"""Which images to label next: margin, entropy, BADGE and chance, by what a tuned network makes of the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from subtuning_lab.data.arrays import check_number
from subtuning_lab.data.images import StreamedImages
from subtuning_lab.inference.tuned_task import TunedTask

RANDOM = "random"
QUERY_VERSION = 1  # of the strategies; another one makes recorded queries void
_ROWS = 256  # images at a time

#: probabilities (n, classes), features (n, width), how many, chance -> places (size,) of the wanted images
_Strategy = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]


def strategy_names() -> tuple[str, ...]:
    """Names of the ways to choose what to label."""
    return tuple(_STRATEGIES)


def query_images(
    tuned: TunedTask | None,
    images: torch.Tensor | StreamedImages,
    size: int,
    strategy: str = "margin",
    *,
    labelled: Sequence[int] = (),
    seed: int = 0,
) -> tuple[int, ...]:
    """The images to label next, by a network in eval mode that sees them without augmentation.

    Args:
        tuned: tuned on the labels so far; None is enough for "random".
        images: uint8 (n, 3, height, width).
        size: how many to choose.
        strategy: "margin" takes the smallest differences between the two largest class probabilities, "entropy" the
            largest entropies, "BADGE" gradients of the readout's loss that are large and point in different ways,
            "random" any.
        labelled: places of images that have labels; these are never chosen.
        seed: of "random" and "BADGE".

    Returns:
        Places in `images`, all different, the most wanted first.

    Raises:
        ValueError: an unknown strategy, fewer unlabelled images than `size`, wrong places, or logits that are not
            finite.

    Source: margin: Scheffer et al. 2001; BADGE: Ash et al. 2020, by k-means++ (Arthur and Vassilvitskii 2007).
    """
    check_strategy(strategy)
    check_number("size", size, 1)
    open_places = _unlabelled(len(images), labelled)
    if size > len(open_places):
        raise ValueError(f"size is {size}; {len(open_places)} of {len(images)} images have no label yet")
    generator = np.random.default_rng((seed, len(labelled)))
    if strategy == RANDOM:
        return tuple(generator.choice(open_places, size, replace=False).tolist())
    if not isinstance(tuned, TunedTask):
        raise TypeError(f"tuned is a {type(tuned).__name__}; {strategy} needs a TunedTask")
    probabilities, features = _outputs(tuned, images, open_places)
    return tuple(open_places[_STRATEGIES[strategy](probabilities, features, size, generator)].tolist())


def check_strategy(strategy: str) -> None:
    """Raises ValueError for an unknown name."""
    if strategy not in _STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; there are {', '.join(_STRATEGIES)}")


@torch.no_grad()
def _outputs(tuned: TunedTask, images: torch.Tensor | StreamedImages, places: np.ndarray) -> tuple[np.ndarray, ...]:
    """Class probabilities (n, classes) and the inputs (n, width) of the readout's last layer, float64."""
    network, device, features = tuned.network(), tuned.backbone.mean.device, []
    last = [layer for layer in network.head.modules() if isinstance(layer, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda layer, inputs: features.append(inputs[0].double().cpu()))
    batches = torch.from_numpy(places).to(images.device).split(_ROWS)
    logits = torch.cat([network(images[rows].to(device)).double().cpu() for rows in batches])
    if not logits.isfinite().all():
        raise ValueError(f"{tuned} gives logits that are not finite; it can't say what to label")
    return logits.softmax(1).numpy(), torch.cat(features).numpy()


def _by_margin(probabilities: np.ndarray, features: np.ndarray, size: int, generator: Any) -> np.ndarray:
    second, first = np.sort(probabilities, axis=1)[:, -2:].T
    return np.argsort(first - second, kind="stable")[:size]


def _by_entropy(probabilities: np.ndarray, features: np.ndarray, size: int, generator: Any) -> np.ndarray:
    return np.argsort(-stats.entropy(probabilities, axis=1), kind="stable")[:size]


def _by_gradients(
    probabilities: np.ndarray, features: np.ndarray, size: int, generator: np.random.Generator
) -> np.ndarray:
    """k-means++ on the loss's gradients by the readout's weight, the likeliest class taken for the label."""
    errors = probabilities - np.eye(probabilities.shape[1])[probabilities.argmax(1)]
    return spread_out(errors, features, size, generator)


def spread_out(errors: np.ndarray, features: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Seeds of k-means++ among outer products, which are never made: they would be (n, classes x width).

    scikit-learn's own seeding wants them all, and takes a point twice where no other is apart from those it has.

    Args:
        errors: (n, classes), features: (n, width); point i is the outer product of their rows i.
        size: how many, at most n.
        generator: the only source of chance.

    Returns:
        Places (size,), all different.
    """
    squares = (errors**2).sum(1) * (features**2).sum(1)
    chosen, nearest = [int(generator.choice(len(errors), p=np.full(len(errors), 1 / len(errors))))], np.inf
    while len(chosen) < size:
        last = chosen[-1]
        apart = squares + squares[last] - 2 * (errors @ errors[last]) * (features @ features[last])
        nearest = np.minimum(nearest, np.maximum(apart, 0.0))
        nearest[chosen] = 0.0
        weights = nearest if nearest.any() else 1.0 * ~np.isin(np.arange(len(errors)), chosen)
        chosen.append(int(generator.choice(len(errors), p=weights / weights.sum())))
    return np.array(chosen)


_STRATEGIES: dict[str, _Strategy | None] = {
    RANDOM: None,
    "margin": _by_margin,
    "entropy": _by_entropy,
    "BADGE": _by_gradients,
}


def _unlabelled(n: int, labelled: Sequence[int]) -> np.ndarray:
    """Places of n images that have no label yet, ascending."""
    known = np.asarray(labelled, dtype=np.int64)
    if len(np.unique(known)) < len(known) or not ((known >= 0) & (known < n)).all():
        raise ValueError(f"labelled must hold different places in 0..{n - 1}, got {list(labelled)}")
    return np.setdiff1d(np.arange(n), known)
