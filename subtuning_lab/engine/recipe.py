"""How a subset is trained: everything that an optimizer, a schedule and an augmentation need to know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

from subtuning_lab.data.augment import check_augmentation
from subtuning_lab.nets.chain import BN_MODES, BatchNormMode, check_bn

#: what all subsets of a pass have in common; recipes may differ in the rest
SHARED_FIELDS = ("epochs", "batch_size", "warmup", "augment", "image_size", "precision", "patience")
PRECISIONS: tuple[str, ...] = ("float32", "bf16")
PARAMS: tuple[str, ...] = ("all", "bias", "norm")
ADAPTERS: tuple[str | None, ...] = (None, "lora", "ia3", "ln_tuning")
LR_SCALINGS: tuple[str, ...] = ("none", "rgn")
HEAD_STARTS: tuple[str, ...] = ("random", "probe", "source")
INITS: tuple[str, ...] = ("pretrained", "random")


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
        params: which parameters of the tuned blocks are trained: "all", "bias" (BitFit), or "norm" (scales and shifts).
        adapter: None trains the blocks' own parameters; "lora", "ia3" and "ln_tuning" train small additions in them
            instead (extra `peft`), which are merged into the blocks when training ends.
        rank: of "lora", at least 1.
        lr_decay: each part's learning rate is so many times that of the part behind it, in (0, 1]; 1 for none.
        lr_scaling: "rgn" scales each tensor's learning rate by its relative gradient norm (Auto-RGN); or "none".
        head_start: "random" for a new readout; "probe" for one that linear probing has trained at `head_lr`, tuned
            further at `lr` (LP-FT); "source" for the pretrained one, where the classes are the same.
        siamese: the readout sees the frozen features beside the tuned ones.
        init: where tuned blocks start: at their "pretrained" weights, or at "random" ones of a new network.
        head_depth: linear layers of the readout, ReLU between them; hidden ones are as wide as the features.

    Raises:
        ValueError: a value out of its range, by name.

    Source: PAPER "SubTuning"; from `params` on they are the baselines' (BitFit, LoRA, IA3, layer-wise decay, surgical
        finetuning's Auto-RGN, LP-FT) and the ablations' (Siamese readout, re-initialized blocks).
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
    params: str = "all"
    adapter: str | None = None
    rank: int = 8
    lr_decay: float = 1.0
    lr_scaling: str = "none"
    head_start: str = "random"
    siamese: bool = False
    init: str = "pretrained"
    head_depth: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "image_size", "patience", "rank", "head_depth"):
            _check_count(name, getattr(self, name), optional=name in ("image_size", "patience"))
        for name in ("lr", "head_lr"):
            _check_real(name, getattr(self, name), low=0.0, open_low=True, optional=name == "head_lr")
        _check_real("weight_decay", self.weight_decay, low=0.0)
        for name in ("warmup", "label_smoothing"):
            _check_real(name, getattr(self, name), low=0.0, high=1.0)
        _check_real("lr_decay", self.lr_decay, low=0.0, high=math.nextafter(1.0, 2.0), open_low=True)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(map(str, allowed))
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {names}")
        if self.adapter is not None and self.params != "all":
            raise ValueError(
                f'params is {self.params!r} beside adapter {self.adapter!r}; an adapter needs params="all"'
            )
        if self.head_start == "source" and self.head_depth > 1:
            raise ValueError(
                f'head_depth is {self.head_depth} beside head_start "source", which is one linear layer; it must be 1'
            )
        check_bn(self.bn)
        check_augmentation(self.augment)

    def as_dict(self) -> dict[str, object]:
        """Plain values by name, for records and files."""
        return asdict(self)

    def for_probing(self) -> Recipe:
        """The same for linear probing: what has no effect without tuned blocks is at its default."""
        head_start = "source" if self.head_start == "source" else "random"
        kept = {"lr": self.head_lr or self.lr, "head_lr": None, "bn": BN_MODES[0], "head_start": head_start}
        return replace(self, **{name: _DEFAULTS[name] for name in _OF_TUNED_BLOCKS}, **kept)


def recipe_grid(recipe: Recipe, **choices: Sequence[Any]) -> list[Recipe]:
    """Every combination of the choices, for a study to choose among on its folds.

    Args:
        recipe: what all have in common.
        choices: a field of the recipe each, with the values to try, e.g. `lr=[1e-3, 3e-3], bn=["batch", "frozen"]`.

    Raises:
        ValueError: an unknown field, no values for one, or a value out of its range.
    """
    unknown = sorted(set(choices) - set(_DEFAULTS))
    if unknown:
        raise ValueError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(_DEFAULTS)}")
    empty = [name for name, values in choices.items() if isinstance(values, str) or not list(values)]
    if empty:
        raise ValueError(f"{empty[0]} is {choices[empty[0]]!r}; it must be a list of at least one value")
    return [replace(recipe, **dict(zip(choices, values, strict=True))) for values in product(*choices.values())]


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


_DEFAULTS = {field.name: field.default for field in fields(Recipe)}
_OF_TUNED_BLOCKS = ("params", "adapter", "rank", "lr_decay", "lr_scaling", "siamese", "init")
_CHOICES = {
    "precision": PRECISIONS,
    "params": PARAMS,
    "adapter": ADAPTERS,
    "lr_scaling": LR_SCALINGS,
    "head_start": HEAD_STARTS,
    "siamese": (False, True),
    "init": INITS,
}


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
