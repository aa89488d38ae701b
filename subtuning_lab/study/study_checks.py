"""What a study accepts: everything wrong is told before the first training."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import torch

from subtuning_lab.data.arrays import check_labels
from subtuning_lab.data.task import Split, Task
from subtuning_lab.engine.fit import ENGINES
from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.inputs import network_input

_SHARED, _CHUNK = 0.1, 256  # share of other images that may be test images; images decoded at a time


def usable_device(name: str | torch.device | None) -> torch.device:
    """The named device, by default the GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f'device is {name!r}; it must be one that is here, e.g. "cpu" or "cuda" ({error})') from error
    return device


def check_types(backbone: object, task: object, engine: str) -> None:
    """Raises TypeError for what is no chain or no task, ValueError for an unknown engine."""
    for name, value, kind in (("backbone", backbone, Chain), ("task", task, Task)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}")
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds as a tuple. Raises TypeError or ValueError unless they are different whole numbers from 0 on."""
    if isinstance(seeds, int) or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise TypeError(f"seeds is {seeds!r}; it must be a sequence of whole numbers, e.g. (0, 1, 2)")
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {seeds!r}; it must hold different whole numbers from 0 on, at least one")
    return tuple(seeds)


def check_other(split: Split, task: Task) -> None:
    """Raises ValueError unless a task's trainings can be scored on the images, and they are not its test images.

    A corruption may leave a few images as they are, so that up to a tenth of them may be the task's own.
    """
    check_labels(split.labels, task.classes, "split")
    if tuple(split.images.shape[2:]) != task.image_size:
        raise ValueError(
            f"images of the split are {tuple(split.images.shape[2:])}; those of {task.name} are {task.image_size}"
        )
    own = _digests(task.test) if task.test is not None else set()
    shared = sum(digest in own for digest in _digests(split, distinct=False))
    if shared > _SHARED * len(split):
        raise ValueError(
            f"{shared} of the split's {len(split)} images are test images of {task.name}; only Study.test reaches these"
        )


def _digests(split: Split, distinct: bool = True) -> Collection[bytes]:
    """A hash of every image; streamed ones are decoded a few at a time."""
    rows = (split.images[rows] for rows in torch.arange(len(split)).split(_CHUNK))
    found = [hashlib.blake2b(image.cpu().numpy().tobytes()).digest() for images in rows for image in images]
    return set(found) if distinct else found


def check_images(backbone: Chain, task: Task, image_size: int | None) -> None:
    """Sends one training image through the backbone, so that a wrong size fails now and not in the first pass."""
    image = task.train.images[torch.tensor([0])].to(backbone.mean.device)
    size = image_size or task.image_size[0]
    try:
        with torch.no_grad():
            features = backbone(network_input(backbone, image, image_size))
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
