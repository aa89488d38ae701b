"""Training of subsets: all candidates in one pass, or one after another as the plain reference."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from subtuning_lab.chain import Chain, copy_weights, set_trainable, subset_of, without_dropout
from subtuning_lab.checks import check_labels, check_number
from subtuning_lab.job import Course, Fit, Job, fast_layout, parameter_groups, validation_scores
from subtuning_lab.one_pass import Candidate, SharedForward
from subtuning_lab.packing import bytes_per_candidate, free_bytes, is_out_of_memory, pack
from subtuning_lab.recipe import Recipe, check_recipes
from subtuning_lab.tasks import Split

#: part of every record's key: raise it whenever the same call may give other numbers than before
ENGINE_VERSION = 1
ENGINES: tuple[str, ...] = ("one_pass", "sequential")


def fit_together(
    backbone: Chain,
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
        backbone: the pretrained chain, on the device to train on; it is not changed.
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
        ValueError, TypeError: unknown blocks, engine, labels out of range, or recipes that can't share a pass.

    Dropout and stochastic depth are off: what they draw would depend on which candidates share a pass.

    Source: PAPER "The Finetuning Profile" (what is trained); the shared pass is ours.
    """
    subsets = [subset_of(backbone, blocks) for blocks in subsets]
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
    job = Job(without_dropout(backbone), train, validation, recipes[0], num_classes, seed, on_step)
    work = list(zip(subsets, recipes, strict=True))
    finished = _fit_each(job, work) if engine == "sequential" else _fit_passes(job, work, fold, memory_limit)
    fits: dict[int, Fit] = {}
    for done in finished:
        fits |= done
        if on_pass is not None:
            on_pass(done)
    return [fits[i] for i in range(len(work))]


def _fit_alone(job: Job, blocks: frozenset[str], recipe: Recipe) -> Fit:
    """The obvious loop over one subset: the reference that the shared pass must equal."""
    start = time.perf_counter()
    network = fast_layout(set_trainable(copy.deepcopy(job.backbone), blocks, recipe.bn))
    parts = {name: network.part(name) for name in blocks}
    candidate = nn.ModuleDict({"backbone": network, "head": job.new_head()})
    optimizer = job.optimizer(parameter_groups(network, candidate["head"], recipe))
    course = Course(job, recipe, lambda: copy_weights(parts | {"head": candidate["head"]}))
    for epoch in range(recipe.epochs):
        candidate.train()
        for step, (images, labels) in enumerate(job.batches(epoch), start=epoch * job.steps_per_epoch):
            job.set_lr(optimizer, step)
            with job.autocast():
                logits = candidate["head"](network(images))
            optimizer.zero_grad(set_to_none=True)
            course.loss(logits, labels).backward()
            optimizer.step()
            job.on_step(1)
        candidate.eval()
        scores = validation_scores(job, epoch, lambda images: [candidate["head"](network(images))])
        if not course.end_epoch(scores[0] if scores else None):
            break
    return course.fit(blocks, time.perf_counter() - start)


def _fit_each(job: Job, work: list[tuple[frozenset[str], Recipe]]) -> Iterator[dict[int, Fit]]:
    for i, (blocks, recipe) in enumerate(work):
        yield {i: _fit_alone(job, blocks, recipe)}


def _fit_passes(
    job: Job, work: list[tuple[frozenset[str], Recipe]], fold: bool, memory_limit: int | None
) -> Iterator[dict[int, Fit]]:
    """Packs the candidates into passes; a pass that runs out of memory is done again in two halves."""
    images, _ = next(job.batches(0))
    example = images[: min(4, len(images))]
    shared = SharedForward(fast_layout(copy.deepcopy(job.backbone).eval()), example, fold)
    costs = bytes_per_candidate(job.backbone, example, [blocks for blocks, _ in work], len(images))
    passes = pack(costs, _forks(job.backbone, work), free_bytes(job.device) if memory_limit is None else memory_limit)
    while passes:
        members = passes.pop(0)
        try:
            fits = _fit_pass(job, shared, [work[i] for i in members])
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error) or len(members) == 1:
                raise
            half = len(members) // 2
            passes = [members[:half], members[half:], *passes]
        else:
            yield dict(zip(members, fits, strict=True))


def _fit_pass(job: Job, shared: SharedForward, work: list[tuple[frozenset[str], Recipe]]) -> list[Fit]:
    """Trains the candidates of one pass in step with each other."""
    start = time.perf_counter()
    candidates = [fast_layout(Candidate(job.backbone, blocks, job.new_head(), own.bn)) for blocks, own in work]
    courses = {c: Course(job, own, c.snapshot) for c, (_, own) in zip(candidates, work, strict=True)}
    groups = [g for c, (_, own) in zip(candidates, work, strict=True) for g in parameter_groups(c.tuned, c.head, own)]
    optimizer = job.optimizer(groups)
    active = list(candidates)
    for epoch in range(job.recipe.epochs):
        for step, (images, labels) in enumerate(job.batches(epoch), start=epoch * job.steps_per_epoch):
            job.set_lr(optimizer, step)
            _step(job, shared, active, courses, images, labels)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            job.on_step(len(active))
        for candidate in active:
            candidate.eval()
        scores = validation_scores(job, epoch, lambda images: _logits(shared, active, images))  # noqa: B023 - called at once
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
    images: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    """Gradients of all active candidates for one batch."""
    for candidate in active:
        candidate.train()
    with job.autocast():
        logits = _logits(shared, active, images)
    # Each loss reaches only its own candidate's weights, so one backward of the sum serves them all.
    torch.stack([courses[c].loss(z, labels) for c, z in zip(active, logits, strict=True)]).sum().backward()


def _logits(shared: SharedForward, active: list[Candidate], images: torch.Tensor) -> list[torch.Tensor]:
    features = shared.features(images, active)
    return [candidate.head(features[candidate]) for candidate in active]


def _check_data(train: Split, validation: Split | None, num_classes: int, recipes: Sequence[Recipe]) -> None:
    """Raises ValueError for labels that the readout has no output for, and early stopping without validation."""
    check_number("num_classes", num_classes, 2)
    for part, split in (("train", train), ("validation", validation)):
        if split is not None:
            check_labels(split.labels, range(num_classes), part)
    if validation is None and any(own.patience is not None for own in recipes):
        raise ValueError(f"patience is {recipes[0].patience}, but there are no validation images to stop by")


def _forks(backbone: Chain, work: list[tuple[frozenset[str], Recipe]]) -> list[int]:
    """Where each candidate leaves the trunk."""
    names = backbone.part_names
    return [min((names.index(name) for name in blocks), default=len(names)) for blocks, _ in work]
