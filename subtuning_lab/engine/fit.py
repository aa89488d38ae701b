"""Training of subsets: all candidates in one pass, or one after another as the plain reference."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import nn

from subtuning_lab.data.arrays import check_labels, check_number
from subtuning_lab.data.task import Split
from subtuning_lab.engine.batches import TrunkSource
from subtuning_lab.engine.job import (
    Course,
    Fit,
    Job,
    Start,
    Weights,
    parameter_groups,
    scale_by_relative_gradients,
    validation_scores,
)
from subtuning_lab.engine.memory import free_bytes, is_out_of_memory, pack
from subtuning_lab.engine.prepared import Prepared
from subtuning_lab.engine.recipe import Recipe, check_recipes
from subtuning_lab.engine.shared_forward import Candidate, SharedForward, Trunk
from subtuning_lab.engine.trainable import plain_part, tune_parts
from subtuning_lab.nets.chain import Chain, copy_weights, put_parts, set_trainable, subset_of
from subtuning_lab.nets.inputs import fast_layout

#: part of every record's key: raise it whenever the same call may give other numbers than before
ENGINE_VERSION = 3
Fits = dict[int, Fit]  # by place among the candidates
ENGINES: tuple[str, ...] = ("one_pass", "sequential")


@dataclass(frozen=True)
class Work:
    """One candidate: what is tuned, how, and the weights that its readout starts from (None: random ones)."""

    blocks: frozenset[str]
    recipe: Recipe
    start: Start | None = None

    @property
    def is_probed(self) -> bool:
        """Whether linear probing trains the readout first."""
        return self.recipe.head_start == "probe" and bool(self.blocks)

    @property
    def is_siamese(self) -> bool:
        """Whether the readout sees the frozen features, too; without tuned blocks there are no others."""
        return self.recipe.siamese and bool(self.blocks)


def fit_together(
    backbone: Chain | Prepared,
    subsets: Sequence[Iterable[str]],
    train: Split,
    recipe: Recipe | Sequence[Recipe],
    *,
    num_classes: int,
    validation: Split | None = None,
    seed: int = 0,
    engine: str = "one_pass",
    fold: bool = True,
    memory_limit: int | None = None,
    on_step: Callable[[int], None] | None = None,
    on_pass: Callable[[dict[int, Fit]], None] | None = None,
) -> list[Fit]:
    """Trains every subset from the pretrained weights, all on the same batches in the same order.

    Args:
        backbone: the pretrained chain, on the device to train on; it is not changed. `Prepared` saves many calls time.
        subsets: part names each; [] is linear probing, "all" full finetuning.
        train: training images.
        recipe: one for all, or one per subset; these may differ in learning rates, weight decay, label smoothing
            and BatchNorm mode only, since a pass shares the rest.
        num_classes: outputs of the new readout.
        validation: images to score on, never augmented; None scores nothing.
        seed: of the readout's start, the order of images and their augmentation.
        engine: "one_pass" or "sequential"; equal up to rounding. On a CPU the same call gives the same bits; on a
            GPU, cuDNN's backward may differ in the last ones unless `torch.backends.cudnn.deterministic` is set.
        fold: whether the shared pass folds frozen BatchNorm into convolutions: faster, and equal up to rounding.
        memory_limit: bytes that one pass may take; by default most of what is free on the device. Candidates that
            don't fit together go into further passes, with the same numbers.
        on_step: called with the number of candidates trained by one step; it may raise to stop the training.
        on_pass: called with the finished fits of each pass, by their place in `subsets`, before the next one starts.

    Returns:
        One `Fit` per subset, in their order.

    Raises:
        ValueError, TypeError: unknown blocks, engine, labels out of range, recipes that can't share a pass or find
            nothing to train.
        ImportError: an adapter without the extra `peft`.

    Dropout and stochastic depth are off: what they draw would depend on which candidates share a pass.

    Source: PAPER "The Finetuning Profile" (what is trained); the shared pass is ours.
    """
    prepared = backbone if isinstance(backbone, Prepared) else Prepared(backbone)
    subsets = [subset_of(prepared.backbone, blocks) for blocks in subsets]
    recipes = check_recipes(recipe)
    recipes = recipes * len(subsets) if isinstance(recipe, Recipe) else recipes
    if len(recipes) != len(subsets):
        raise ValueError(f"{len(recipes)} recipes for {len(subsets)} subsets; give one for all or one each")
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    _check_data(train, validation, num_classes, recipes)
    check_number("memory_limit", memory_limit, 0)
    check_number("seed", seed, 0)
    if not subsets:
        return []
    on_step = on_step or (lambda trained: None)
    job = Job(prepared.backbone, train, validation, recipes[0], num_classes, seed, on_step)
    together = partial(_fit_passes, prepared=prepared, fold=fold, memory_limit=memory_limit)
    run = _fit_each if engine == "sequential" else together
    work = _with_heads(job, [Work(*own) for own in zip(subsets, recipes, strict=True)], run)
    fits: Fits = {}
    for done in run(job, work):
        fits |= done
        if on_pass is not None:
            on_pass(done)
    return [fits[i] for i in range(len(work))]


def _with_heads(job: Job, work: list[Work], run: Callable[[Job, list[Work]], Iterator[Fits]]) -> list[Work]:
    """Gives the candidates the readouts that their recipes start from; linear probing trains some of them first."""
    probes = [replace(own.recipe.for_probing(), patience=None) for own in work if own.is_probed]
    started: dict[Recipe, Start] = {}
    if probes:
        alone = replace(job, validation=None, recipe=probes[0], on_step=lambda trained: None)
        probing = [Work(frozenset(), recipe) for recipe in dict.fromkeys(probes)]
        for done in run(alone, probing):
            started |= {probing[i].recipe: fit.weights["head"] for i, fit in done.items()}
    source = _source_start(job) if any(own.recipe.head_start == "source" for own in work) else None
    starts = [
        started[replace(own.recipe.for_probing(), patience=None)]
        if own.is_probed
        else source
        if own.recipe.head_start == "source"
        else None
        for own in work
    ]
    return [replace(own, start=start) for own, start in zip(work, starts, strict=True)]


def _source_start(job: Job) -> Start:
    """The pretrained readout's weights. Raises ValueError where there is none, or one of other classes."""
    head = job.backbone.source_head
    if head is None or head.out_features != job.num_classes:
        has = "has none" if head is None else f"has one of {head.out_features} classes"
        raise ValueError(
            f'head_start is "source", the pretrained readout, but {job.backbone.name} {has} for the task\'s '
            f'{job.num_classes} classes; give "random" or "probe"'
        )
    return {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}


def _fit_alone(job: Job, own: Work) -> Fit:
    """The obvious loop over one subset: the reference that the shared pass must equal."""
    start, recipe = time.perf_counter(), own.recipe
    tuned = tune_parts(job.backbone, own.blocks, recipe, job.seed)
    network = put_parts(set_trainable(copy.deepcopy(job.backbone), own.blocks, recipe.bn), tuned)
    head = job.new_head(recipe.head_depth, own.is_siamese, own.start)
    candidate = nn.ModuleDict({"backbone": fast_layout(network), "head": head})
    positions = {network.part_names.index(name): part for name, part in tuned.items()}
    optimizer = job.optimizer(parameter_groups(positions, len(network.parts) - 1, candidate["head"], recipe))

    def snapshot() -> Weights:
        return copy_weights({name: plain_part(part) for name, part in tuned.items()} | {"head": candidate["head"]})

    def logits(images: torch.Tensor) -> torch.Tensor:
        features = network(images)
        return candidate["head"](torch.cat([job.backbone(images), features], 1) if own.is_siamese else features)

    course = Course(job, recipe, snapshot)
    for epoch in range(recipe.epochs):
        candidate.train()
        for step, (images, labels) in enumerate(job.batches(epoch), start=epoch * job.steps_per_epoch):
            job.set_lr(optimizer, step)
            optimizer.zero_grad(set_to_none=True)
            with job.autocast():
                output = logits(images)
            course.loss(output, labels).backward()
            scale_by_relative_gradients(optimizer)
            optimizer.step()
            job.on_step(1)
        candidate.eval()
        scores = validation_scores(job, epoch, lambda images: [logits(images)])
        if not course.end_epoch(scores[0] if scores else None):
            break
    return course.fit(own.blocks, time.perf_counter() - start)


def _fit_each(job: Job, work: list[Work]) -> Iterator[Fits]:
    for i, own in enumerate(work):
        yield {i: _fit_alone(job, own)}


def _fit_passes(job: Job, work: list[Work], prepared: Prepared, fold: bool, memory_limit: int | None) -> Iterator[Fits]:
    """Packs the candidates into passes; a pass that runs out of memory is done again in two halves."""
    images, _ = next(job.batches(0))
    example = images[: min(4, len(images))]
    shared = prepared.shared(example, fold)
    subsets = [own.blocks for own in work]
    costs, forks = prepared.costs(example, subsets, len(images)), prepared.forks(subsets)
    limit = free_bytes(job.device) if memory_limit is None else memory_limit
    exits = {*forks, *(len(shared.frozen) for own in work if own.is_siamese)}
    source = TrunkSource(job, shared, exits, limit)
    passes = pack(costs, forks, limit - source.nbytes)
    while passes:
        members = passes.pop(0)
        try:
            fits = _fit_pass(job, source, [work[i] for i in members])
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error) or len(members) == 1:
                raise
            half = len(members) // 2
            passes = [members[:half], members[half:], *passes]
        else:
            yield dict(zip(members, fits, strict=True))


def _fit_pass(job: Job, source: TrunkSource, work: list[Work]) -> list[Fit]:
    """Trains the candidates of one pass in step with each other."""
    shared, start, depth = source.shared, time.perf_counter(), len(job.backbone.parts) - 1
    heads = [job.new_head(own.recipe.head_depth, own.is_siamese, own.start) for own in work]
    candidates = [
        fast_layout(Candidate(job.backbone, own.blocks, head, own.recipe, job.seed))
        for own, head in zip(work, heads, strict=True)
    ]
    courses = {c: Course(job, own.recipe, c.snapshot) for c, own in zip(candidates, work, strict=True)}
    groups = [parameter_groups(c.parts, depth, c.head, own.recipe) for c, own in zip(candidates, work, strict=True)]
    optimizer = job.optimizer(list(chain.from_iterable(groups)))
    active = list(candidates)
    for epoch in range(job.recipe.epochs):
        batches = source.batches(epoch, shared.exits(active))
        for step, (trunk, labels) in enumerate(batches, start=epoch * job.steps_per_epoch):
            job.set_lr(optimizer, step)
            _step(job, shared, active, courses, trunk, labels)
            scale_by_relative_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            job.on_step(len(active))
        for candidate in active:
            candidate.eval()

        def logits_of(images: torch.Tensor) -> list[torch.Tensor]:
            return _logits(shared, active, shared.trunk(images, shared.exits(active)))  # noqa: B023 - called at once

        scores = validation_scores(job, epoch, logits_of)
        going = [courses[c].end_epoch(s) for c, s in zip(active, scores or [None] * len(active), strict=True)]
        active = [c for c, goes_on in zip(active, going, strict=True) if goes_on]
        if not active:
            break
    seconds = (time.perf_counter() - start) / len(work)
    return [courses[c].fit(c.subset, seconds) for c in candidates]


def _step(
    job: Job,
    shared: SharedForward,
    active: list[Candidate],
    courses: dict[Candidate, Course],
    trunk: Trunk,
    labels: torch.Tensor,
) -> None:
    """Gradients of all active candidates for one batch."""
    for candidate in active:
        candidate.train()
    with job.autocast():
        logits = _logits(shared, active, trunk)
    # Each loss reaches only its own candidate's weights, so one backward of the sum serves them all.
    torch.stack([courses[c].loss(z, labels) for c, z in zip(active, logits, strict=True)]).sum().backward()


def _logits(shared: SharedForward, active: list[Candidate], trunk: Trunk) -> list[torch.Tensor]:
    features = shared.features(trunk, active)
    return [candidate.head(features[candidate]) for candidate in active]


def _check_data(train: Split, validation: Split | None, num_classes: int, recipes: Sequence[Recipe]) -> None:
    """Raises ValueError for labels that the readout has no output for, and early stopping without validation."""
    check_number("num_classes", num_classes, 2)
    for part, split in (("train", train), ("validation", validation)):
        if split is not None:
            check_labels(split.labels, range(num_classes), part)
    if validation is None and any(own.patience is not None for own in recipes):
        raise ValueError(f"patience is {recipes[0].patience}, but there are no validation images to stop by")
