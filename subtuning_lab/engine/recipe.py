"""How a subset is trained: everything that an optimizer, a schedule and an augmentation need to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Annotated, Any

from subtuning_lab.data.augment import AUGMENTATIONS
from subtuning_lab.nets.chain import BN_MODES, BatchNormMode
from subtuning_lab.utils.validation import Flag, Is, OneOf, Real, Several, Whole, checked

#: what all subsets of a pass have in common; recipes may differ in the rest
SHARED_FIELDS = ("epochs", "batch_size", "warmup", "augment", "image_size", "precision", "patience")
#: what has no effect without tuned blocks
_OF_TUNED_BLOCKS = ("params", "adapter", "rank", "lora_targets", "lr_decay", "lr_scaling", "siamese", "init")


@checked
@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up and a cosine schedule down to zero.

    Args:
        epochs: passes over the training images, at least 1.
        lr: peak learning rate of the tuned blocks, above 0.
        weight_decay: decoupled weight decay, at least 0.
        batch_size: images per step, at least 1; an epoch is cut into equal batches of at most this many.
        bn: BatchNorm of tuned blocks: "batch" uses and updates batch statistics, "frozen" keeps the pretrained ones
            (InstanceNorm's running ones likewise). It can reverse the verdict between two methods, so choose it on
            the folds for every method.
        head_lr: peak learning rate of the new readout; None means `lr`. Linear probing wants a higher one.
        warmup: share of all steps that the learning rate rises for, in [0, 1).
        label_smoothing: in [0, 1).
        augment: one of `augment.AUGMENTATIONS`; never used on validation or test images.
        image_size: side in pixels that images are resized to; None keeps the task's own.
        precision: "float32", or "bf16" for autocast to bfloat16 in the network (weights and optimizer stay float32).
        patience: stop a subset after so many epochs without a better validation loss, and keep the weights of its
            best epoch; None trains all epochs. The validation score of a stopped run is slightly optimistic.
        params: which parameters of the tuned blocks are trained: "all", "bias" (BitFit), or "norm" (scales and shifts).
        adapter: None trains the blocks' own parameters; "lora", "ia3" and "ln_tuning" train small additions in them
            instead (extra `peft`), which are merged into the blocks when training ends. IA3's factors don't decay.
        rank: of "lora", 1 to 4096.
        lora_targets: what "lora" adapts: "all", every linear layer and ungrouped convolution, which suits any network
            and is the default; or "attention", the projections of attention alone, as in the LoRA paper.
        lr_decay: each part's learning rate is so many times that of the part behind it, in (0, 1]; 1 for none.
        lr_scaling: "rgn" trains everything but BatchNorm's parameters, and scales each tensor's learning rate, the
            readout's too, by its relative gradient norm (Auto-RGN); or "none".
        head_start: "random" for a new readout; "probe" for one that linear probing has trained at `head_lr`, tuned
            further at `lr` (LP-FT); "source" for the pretrained one, where the classes are the same.
        siamese: the readout sees the frozen features beside the tuned ones.
        init: where tuned blocks start: at their "pretrained" weights, or at "random" ones of a new network.
        head_depth: linear layers of the readout, ReLU between them; hidden ones are as wide as the features.
        class_weights: "balanced" counts an image's training loss n / (classes * images of its class) times, with the
            classes that occur among the n training images, so that each class has the same say; or "none".
    Source: PAPER "SubTuning"; from `params` on they are the baselines' (BitFit, LoRA, IA3, layer-wise decay, surgical
        finetuning's Auto-RGN, LP-FT) and the ablations' (Siamese readout, re-initialized blocks). `class_weights` as
        in scikit-learn's `compute_class_weight`.
    """

    epochs: Annotated[int, Whole(1, 100_000)] = 20
    lr: Annotated[float, Real(0, above=True)] = 1e-3
    weight_decay: Annotated[float, Real(0)] = 1e-2
    batch_size: Annotated[int, Whole(1, 1_000_000)] = 64
    bn: Annotated[BatchNormMode, OneOf(BN_MODES)] = "batch"
    head_lr: Annotated[float | None, Real(0, above=True, none=True)] = None
    warmup: Annotated[float, Real(0, 1, below=True)] = 0.1
    label_smoothing: Annotated[float, Real(0, 1, below=True)] = 0.0
    augment: Annotated[str, OneOf(tuple(AUGMENTATIONS))] = "none"
    image_size: Annotated[int | None, Whole(1, 4096, none=True)] = None
    precision: Annotated[str, OneOf(("float32", "bf16"))] = "float32"
    patience: Annotated[int | None, Whole(1, 100_000, none=True)] = None
    params: Annotated[str, OneOf(("all", "bias", "norm"))] = "all"
    adapter: Annotated[str | None, OneOf((None, "lora", "ia3", "ln_tuning"))] = None
    rank: Annotated[int, Whole(1, 4096)] = 8
    lr_decay: Annotated[float, Real(0, 1, above=True)] = 1.0
    lr_scaling: Annotated[str, OneOf(("none", "rgn"))] = "none"
    head_start: Annotated[str, OneOf(("random", "probe", "source"))] = "random"
    siamese: bool = False
    init: Annotated[str, OneOf(("pretrained", "random"))] = "pretrained"
    head_depth: Annotated[int, Whole(1, 16)] = 1
    lora_targets: Annotated[str, OneOf(("all", "attention"))] = "all"
    class_weights: Annotated[str, OneOf(("none", "balanced"))] = "none"

    def __post_init__(self) -> None:
        for name, rule in self.rules.items():  # numpy's numbers could not be written into records
            kind = {Whole: int, Real: float, Flag: bool}.get(type(rule))
            if kind is not None and getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))
        if self.adapter is not None and self.params != "all":
            raise ValueError(
                f'params is {self.params!r} beside adapter {self.adapter!r}; an adapter needs params="all"'
            )
        if self.adapter == "lora" and self.lr_scaling == "rgn":
            raise ValueError(
                'lr_scaling is "rgn" beside adapter "lora", whose second factor starts at 0 and has no relative '
                'gradient; it must be "none"'
            )
        if self.head_start == "source" and self.head_depth > 1:
            raise ValueError(
                f'head_depth is {self.head_depth} beside head_start "source", which is one linear layer; it must be 1'
            )

    @property
    def trains_all(self) -> bool:
        """Whether every parameter of a tuned block is trained, and not only some or additions to them."""
        return self.params == "all" and self.adapter is None and self.lr_scaling == "none"

    def as_dict(self) -> dict[str, object]:
        """Plain values by name, for records and files."""
        return asdict(self)

    def for_probing(self) -> Recipe:
        """The same for linear probing: what has no effect without tuned blocks is at its default."""
        head_start = "source" if self.head_start == "source" else "random"
        kept = {"lr": self.head_lr or self.lr, "head_lr": None, "bn": BN_MODES[0], "head_start": head_start}
        return replace(self, **{name: _DEFAULTS[name] for name in _OF_TUNED_BLOCKS}, **kept)


_DEFAULTS = {field.name: field.default for field in fields(Recipe)}


@checked
def recipe_grid(recipe: Recipe, **choices: Sequence[Any]) -> list[Recipe]:
    """Every combination of the choices, for a study to choose among on its folds.

    Args:
        recipe: what all have in common.
        choices: a field of the recipe each, with the values to try, e.g. `lr=[1e-3, 3e-3], bn=["batch", "frozen"]`.
    """
    unknown = sorted(set(choices) - set(_DEFAULTS))
    if unknown:
        raise ValueError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(_DEFAULTS)}")
    for name, values in choices.items():
        Several(Recipe.rules[name]).check(name, values)
    return [replace(recipe, **dict(zip(choices, values, strict=True))) for values in product(*choices.values())]


def check_recipes(recipe: Recipe | Sequence[Recipe]) -> tuple[Recipe, ...]:
    """One or more recipes that subsets of one pass can be trained with.

    Raises:
        TypeError: something that is no recipe.
        ValueError: none at all, or recipes that differ in what a pass shares.
    """
    recipes = (recipe,) if isinstance(recipe, Recipe) else recipe
    Several(Is(Recipe)).check("recipe", recipes)
    for name in SHARED_FIELDS:
        values = {getattr(one, name) for one in recipes}
        if len(values) > 1:
            raise ValueError(f"recipes of one pass differ in {name}: {sorted(map(str, values))}; it must be the same")
    return tuple(recipes)
