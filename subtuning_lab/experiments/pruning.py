"""What pruning costs and saves: pruned subsets, before or after tuning, scored on one study's folds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import pandas as pd
import torch

from subtuning_lab.baselines.latest import Latest
from subtuning_lab.data.task import Split
from subtuning_lab.engine.fit import fit_together
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.inference.latency import compare_latency
from subtuning_lab.inference.prune import IMPORTANCES, SCOPES, Pruning, prune_backbone, prune_blocks
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import Chain, copy_weights, count_parameters, in_order
from subtuning_lab.nets.flops import part_table
from subtuning_lab.nets.inputs import logits_of
from subtuning_lab.nets.narrow import narrow_parts
from subtuning_lab.study.study import Blocks, Study
from subtuning_lab.utils.validation import OneOf, Real, Several, Whole, checked

WHEN: tuple[str, ...] = ("before", "after")
_RATIO, _SCOPE, _IMPORTANCE = Real(0, 1, above=True, below=True), OneOf(SCOPES), OneOf(tuple(IMPORTANCES))


@checked
def fit_pruned(
    study: Study,
    blocks: Blocks,
    ratio: Annotated[float, _RATIO],
    *,
    when: Annotated[str, OneOf(WHEN)] = "before",
    tune_on: Annotated[int, Whole()] = 0,
    scope: Annotated[str, _SCOPE] = "local",
    importance: Annotated[str, _IMPORTANCE] = "l1",
    seed: Annotated[int, Whole()] = 0,
) -> TunedTask:
    """Trains a subset with pruned blocks on all training images; the frozen part stays the backbone's own.

    Args:
        study: backbone, task and recipe.
        blocks: the subset, pruned as far as it has inner channels.
        ratio, scope, importance, seed: of `Pruning`.
        when: "before" prunes the pretrained blocks and tunes what is left, with the recipe that is best for it on the
            folds; "after" tunes the blocks and prunes them then.
        tune_on: epochs that a subset pruned after tuning is tuned further for, by the recipe of its first tuning, its
            readout at the blocks' learning rate.
    Raises:
        ImportError: without the extra `pruning`.
        ValueError: a value out of its range; blocks without inner channels; tuning of pruned blocks beside a Siamese
            readout, whose frozen side must stay whole, or on from a deeper readout.
    """
    pruning = Pruning(ratio, scope, importance, seed)
    names = _checked(study, blocks, (when,), tune_on)
    if when == "before":
        return _on_whole(_pruned_study(study, names, pruning).fit(names), study.backbone, pruning)
    pruned = prune_blocks(study.fit(names), **asdict(pruning))
    return _tuned_on(pruned, study.task.train, study.recipe_of(names), tune_on, study.seeds[0]) if tune_on else pruned


@checked
def pruning_table(
    study: Study,
    blocks: Blocks,
    ratios: Annotated[Sequence[float], Several(_RATIO)],
    *,
    scopes: Annotated[Sequence[str], Several(_SCOPE)] = ("local",),
    importances: Annotated[Sequence[str], Several(_IMPORTANCE)] = ("l1",),
    when: Annotated[Sequence[str], Several(OneOf(WHEN))] = WHEN,
    tune_on: Annotated[int, Whole()] = 0,
    seed: Annotated[int, Whole()] = 0,
    test: bool = False,
    batch_size: Annotated[int, Whole(1)] = 1,
    runs: Annotated[int, Whole(1)] = 30,
    clock: Annotated[str, OneOf(("wall", "cpu"))] = "wall",
) -> pd.DataFrame:
    """Scores a subset whole and pruned in several ways on the folds, and measures what the pruned blocks save.

    Args:
        study: backbone, task and recipes; pruned after tuning, a subset has the recipe that is best for it whole.
        blocks: the subset, of which all ratios, scopes and importances are tried.
        ratios, scopes, importances, seed: of `Pruning`. Random channels are drawn once a row, the same on all folds.
        when: "before" and "after" tuning, or one of them.
        tune_on: as for `fit_pruned`; above 0, subsets pruned after tuning have a row without and a row with it, which
            is trained for so many epochs more than all others.
        test: whether to train each on all training images and score it on the test split, once per seed.
        batch_size, runs, clock: of `compare_latency`.
    Returns:
        One row each, the whole subset first: `pruned` ("no", "before tuning", "after tuning", "after, tuned on"),
        `ratio`, `scope`, `importance`; `params` of the subset, `flops` of one image's way through the network,
        `file_bytes`; `median_ms`, `q25_ms`, `q75_ms` and `ratio_ms`, the median ratio to the whole subset's time;
        `accuracy`, `std` and `n` over folds and seeds; with `test`, `test_accuracy`, `test_std` and `test_n`.
    Source: PAPER, ablations (channel pruning); there layer4 of ResNet-50 is pruned locally by L1 at ratio 0.5.
    """
    names = _checked(study, blocks, when, tune_on)
    ways = [Pruning(*way, seed) for way in product(ratios, scopes, importances)]
    whole = study.fit(names)
    variants = [_Variant("no", None, whole, study.scores([names])["accuracy"], study, names)]
    if "before" in when:
        variants += [_before(study, names, pruning, whole) for pruning in ways]
    if "after" in when:
        variants += _after(study, names, ways, whole, tune_on)
    height, width = study.task.image_size
    size = study.recipes[0].image_size or (height, width)
    networks = {str(i): variant.task.network() for i, variant in enumerate(variants)}
    times = compare_latency(networks, size, batch_size, runs=runs, clock=clock)
    times = times[["median_ms", "q25_ms", "q75_ms", "ratio"]].rename(columns={"ratio": "ratio_ms"})
    return pd.DataFrame([variant.row(size, test) for variant in variants]).join(times.reset_index(drop=True))


@dataclass(frozen=True)
class PrunedSubset:
    """A way to adapt a backbone: a subset is tuned, then pruned, then perhaps tuned on; a `Method` for a study.

    Args:
        blocks, recipe: what is tuned, and how.
        pruning: how it is pruned then.
        tune_on: epochs of tuning on.
        latest: where a training is kept for methods that differ in what comes after tuning.
    """

    name: ClassVar[str] = "pruning after tuning"

    blocks: tuple[str, ...]
    recipe: Recipe
    pruning: Pruning
    tune_on: int
    latest: Latest = field(compare=False, repr=False)

    @property
    def head_start(self) -> str:
        """Of the recipe: the pretrained readout's weights matter if it is "source"."""
        return self.recipe.head_start

    def settings(self) -> dict[str, object]:
        """Plain values that determine the result, for the records."""
        pruned = {"pruned_blocks": list(self.blocks), "tune_on": self.tune_on}
        return {**self.recipe.as_dict(), **asdict(self.pruning), **pruned}

    def fit(self, backbone: Chain, train: Split, num_classes: int, seed: int, image_size: int | None) -> FittedPruning:
        """Learns from labelled images."""
        key = (self.blocks, self.recipe, num_classes, seed)
        options = {"num_classes": num_classes, "seed": seed}
        (fit,) = self.latest.of(
            train, key, lambda: fit_together(backbone, [self.blocks], train, self.recipe, **options)
        )
        classes = tuple(map(str, range(num_classes)))
        recipe = {"siamese": self.recipe.siamese, "head_depth": self.recipe.head_depth}
        tuned = TunedTask(backbone, fit.blocks, fit.weights, classes, image_size, **recipe)
        pruned = prune_blocks(tuned, **asdict(self.pruning))
        return FittedPruning(_tuned_on(pruned, train, self.recipe, self.tune_on, seed) if self.tune_on else pruned)


@dataclass(frozen=True)
class FittedPruning:
    """A pruned task."""

    task: TunedTask

    @property
    def params(self) -> int:
        """Parameters of the pruned subset, the readout not counted."""
        return count_parameters(self.task.network().backbone, self.task.blocks)

    def logits(self, split: Split) -> torch.Tensor:
        """Logits (n, classes) of a split's images, on the CPU."""
        return logits_of(self.task.network(), split.images)


class _Variant(NamedTuple):
    """One row to be: the task whose shapes it has, its fold scores, and what the test split is asked through."""

    pruned: str
    pruning: Pruning | None
    task: TunedTask
    scores: pd.Series
    study: Study
    what: tuple[str, ...] | PrunedSubset

    def row(self, size: int | tuple[int, int], test: bool) -> dict[str, Any]:
        """Everything but the latency."""
        chain = self.task.network().backbone
        way = {name: getattr(self.pruning, name, None) for name in ("ratio", "scope", "importance")}
        row = {"pruned": self.pruned, **way, "params": count_parameters(chain, self.task.blocks)}
        row |= {"flops": int(part_table(chain, size)["flops"].sum()), "file_bytes": _file_bytes(self.task)}
        row |= {"accuracy": self.scores.mean(), "std": self.scores.std(), "n": len(self.scores)}
        if not test:
            return row
        result = self.study.test(self.what)
        return row | {"test_accuracy": result.mean, "test_std": result.std, "test_n": len(result.accuracies)}


def _before(study: Study, names: tuple[str, ...], pruning: Pruning, whole: TunedTask) -> _Variant:
    narrow = _pruned_study(study, names, pruning)
    # Sizes and speed are those of the shapes, whatever the weights: no training is needed for them.
    parts = copy_weights({name: narrow.backbone.part(name) for name in names})
    shapes = replace(whole, backbone=narrow.backbone, weights=parts | {"head": whole.weights["head"]}, scores={})
    task = _on_whole(shapes, study.backbone, pruning)
    return _Variant("before tuning", pruning, task, narrow.scores([names])["accuracy"], narrow, names)


def _after(
    study: Study, names: tuple[str, ...], ways: list[Pruning], whole: TunedTask, tune_on: int
) -> Iterator[_Variant]:
    recipe, latest = study.recipe_of(names), Latest()
    epochs = (0, tune_on) if tune_on else (0,)
    methods = [PrunedSubset(names, recipe, pruning, more, latest) for pruning in ways for more in epochs]
    table = study.method_scores(methods)
    for i, method in enumerate(methods):
        label = "after, tuned on" if method.tune_on else "after tuning"
        task, scores = prune_blocks(whole, **asdict(method.pruning)), table.loc[table["method"] == i, "accuracy"]
        yield _Variant(label, method.pruning, task, scores, study, method)


def _pruned_study(study: Study, names: tuple[str, ...], pruning: Pruning) -> Study:
    """The same study of the backbone whose pretrained blocks are pruned; its records are its own."""
    pruned = prune_backbone(study.backbone, names, **asdict(pruning), image_size=study.recipes[0].image_size)
    options = {"folds": study.n_folds, "seeds": study.seeds, "records": study.records, "device": study.device}
    return Study(pruned, study.task, study.recipes, **options, progress=study.progress)


def _on_whole(tuned: TunedTask, backbone: Chain, pruning: Pruning) -> TunedTask:
    """A task that was tuned from a pruned copy of the backbone, as one of the backbone itself."""
    pruned = narrow_parts({name: backbone.part(name) for name in tuned.blocks}, tuned.weights)
    provenance = {**tuned.provenance, "pruning": asdict(pruning)}
    return replace(tuned, backbone=backbone, pruned=pruned, provenance=provenance)


def _tuned_on(pruned: TunedTask, train: Split, recipe: Recipe, epochs: int, seed: int) -> TunedTask:
    """The pruned task after further epochs, which start from its own blocks and readout."""
    network = pruned.network()
    chain = network.backbone
    chain.source_head = network.head
    more = replace(recipe, epochs=epochs, head_start="source", head_lr=None, init="pretrained")
    (fit,) = fit_together(chain, [pruned.blocks], train, more, num_classes=len(pruned.classes), seed=seed)
    return replace(pruned, weights=fit.weights, provenance={**pruned.provenance, "tuned_on": epochs})


def _file_bytes(task: TunedTask) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return task.save(Path(folder) / "task.safetensors").stat().st_size


def _checked(study: Study, blocks: Blocks, when: Sequence[str], tune_on: int) -> tuple[str, ...]:
    """The subset's names in order; raises where the study can't train it pruned."""
    if tune_on and "after" not in when:
        raise ValueError(f'tune_on is {tune_on}, but a subset is tuned on where it is pruned "after" tuning only')
    first = study.recipes[0]
    if "after" in when and first.patience is not None:
        raise ValueError(f"patience is {first.patience}; a subset that is pruned after tuning is trained to the end")
    for recipe in study.recipes:
        if recipe.siamese and ("before" in when or tune_on):
            raise ValueError("siamese is True; pruned blocks can't be tuned beside the whole network's features")
        if recipe.head_depth > 1 and tune_on:
            raise ValueError(f"head_depth is {recipe.head_depth}; a subset is tuned on with a linear readout only")
    return in_order(study.backbone, blocks)
