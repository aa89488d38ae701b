"""How a subset is trained: everything that an optimizer, a schedule and an augmentation need to know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from subtuning_lab.augmentation import check_augmentation
from subtuning_lab.chain import BatchNormMode, check_bn

#: what all subsets of a pass have in common; recipes may differ in the rest
SHARED_FIELDS = ("epochs", "batch_size", "warmup", "augment", "image_size", "precision", "patience")
PRECISIONS: tuple[str, ...] = ("float32", "bf16")


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up and a cosine schedule down to zero.

    Args:
        epochs: passes over the training images, at least 1.
        lr: peak learning rate of the tuned blocks, above 0.
        weight_decay: decoupled weight decay, at least 0.
        batch_size: images per step, at least 1; an epoch is cut into equal batches of at most this many.
        bn: BatchNorm of tuned blocks: "batch" uses and updates batch statistics, "frozen" keeps the pretrained ones.
            It can reverse the verdict between two methods, so choose it on the folds for every method.
        head_lr: peak learning rate of the new readout; None means `lr`. Linear probing wants a higher one.
        warmup: share of all steps that the learning rate rises for, in [0, 1).
        label_smoothing: in [0, 1).
        augment: one of `augmentation.AUGMENTATIONS`; never used on validation or test images.
        image_size: side in pixels that images are resized to; None keeps the task's own.
        precision: "float32", or "bf16" for autocast to bfloat16 in the network (weights and optimizer stay float32).
        patience: stop a subset after so many epochs without a better validation loss, and keep the weights of its
            best epoch; None trains all epochs. The validation score of a stopped run is slightly optimistic.

    Raises:
        ValueError: a value out of its range, by name.
    """

    epochs: int = 20
    lr: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 64
    bn: BatchNormMode = "batch"
    head_lr: float | None = None
    warmup: float = 0.1
    label_smoothing: float = 0.0
    augment: str = "none"
    image_size: int | None = None
    precision: str = "float32"
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "image_size", "patience"):
            _check_count(name, getattr(self, name), optional=name in ("image_size", "patience"))
        for name in ("lr", "head_lr"):
            _check_real(name, getattr(self, name), low=0.0, open_low=True, optional=name == "head_lr")
        _check_real("weight_decay", self.weight_decay, low=0.0)
        for name in ("warmup", "label_smoothing"):
            _check_real(name, getattr(self, name), low=0.0, high=1.0)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")
        check_bn(self.bn)
        check_augmentation(self.augment)

    def as_dict(self) -> dict[str, object]:
        """Plain values by name, for records and files."""
        return asdict(self)


def check_recipes(recipe: Recipe | Sequence[Recipe]) -> tuple[Recipe, ...]:
    """One or more recipes that subsets of one pass can be trained with.

    Raises:
        TypeError: something that is no recipe.
        ValueError: none at all, or recipes that differ in what a pass shares.
    """
    recipes = (recipe,) if isinstance(recipe, Recipe) else tuple(recipe) if isinstance(recipe, Sequence) else (recipe,)
    if not recipes:
        raise ValueError("recipe is empty; give a Recipe, or a sequence of at least one")
    for own in recipes:
        if not isinstance(own, Recipe):
            raise TypeError(f"recipe is a {type(own).__name__}; it must be a Recipe, or a sequence of them")
    for name in SHARED_FIELDS:
        values = {getattr(own, name) for own in recipes}
        if len(values) > 1:
            raise ValueError(f"recipes of one pass differ in {name}: {sorted(map(str, values))}; it must be the same")
    return recipes


def lr_factor(step: int, total: int, warmup: float) -> float:
    """Learning rate of one step as a share of its peak: linear warm-up, then a half cosine to zero."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _check_count(name: str, value: object, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be a whole number")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def _check_real(
    name: str, value: object, low: float, high: float = math.inf, open_low: bool = False, optional: bool = False
) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not (low < value if open_low else low <= value) or not value < high:
        raise ValueError(f"{name} is {value}; it must be {'above' if open_low else 'at least'} {low:g}, below {high:g}")
