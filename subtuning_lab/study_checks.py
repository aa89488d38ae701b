"""What a study accepts: everything wrong is told before the first training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from subtuning_lab.augmentation import resize_to
from subtuning_lab.chain import Chain
from subtuning_lab.tasks import Task
from subtuning_lab.training import ENGINES


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


def check_images(backbone: Chain, task: Task, image_size: int | None) -> None:
    """Sends one training image through the backbone, so that a wrong size fails now and not in the first pass."""
    image = task.train.images[torch.tensor([0])].to(backbone.mean.device)
    size = image_size or task.image_size[0]
    try:
        with torch.no_grad():
            features = backbone(backbone.normalize(resize_to(image / 255, image_size).to(backbone.mean.dtype)))
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
