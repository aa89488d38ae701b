"""Training of subsets: all candidates in one pass, or one after another as the plain reference."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from subtuning_lab.augmentation import augment, resize_to, seeded
from subtuning_lab.chain import Chain, set_trainable, subset_of
from subtuning_lab.one_pass import Candidate, SharedForward
from subtuning_lab.packing import bytes_per_candidate, free_bytes, is_out_of_memory, pack
from subtuning_lab.recipe import Recipe, lr_factor
from subtuning_lab.tasks import Split

#: part of every record's key: raise it whenever the same call may give other numbers than before
ENGINE_VERSION = 1
ENGINES: tuple[str, ...] = ("one_pass", "sequential")
_SHARED_FIELDS = ("epochs", "batch_size", "warmup", "augment", "image_size", "precision", "patience")
Layout = TypeVar("Layout", nn.Module, torch.Tensor)
_ORDER, _VIEW, _HEAD = 0, 1, 2  # independent streams of chance


@dataclass(frozen=True)
class Fit:
    """One trained subset.

    Args:
        blocks: the tuned parts.
        weights: part name -> its tensors (buffers too), and "head" -> the readout's; on the CPU.
        losses: training loss of every step, float64 (steps,).
        accuracy: validation accuracy in [0, 1]; None without validation images.
        validation_loss: mean cross-entropy on the validation images; None without them.
        epochs: epochs trained.
        seconds: wall-clock time; candidates of one pass share its time equally.
    """

    blocks: frozenset[str]
    weights: dict[str, dict[str, torch.Tensor]] = field(repr=False)
    losses: torch.Tensor = field(repr=False)
    accuracy: float | None
    validation_loss: float | None
    epochs: int
    seconds: float


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
        engine: "one_pass" or "sequential"; equal up to rounding.
        fold: whether the shared pass folds frozen BatchNorm into convolutions, which is faster and equal up to rounding.
        memory_limit: bytes that one pass may take; by default most of what is free on the device. Candidates that
            don't fit together go into further passes, with the same numbers.
        on_step: called with the number of candidates trained by one step; it may raise to stop the training.

        on_pass: called with the finished fits of each pass, by their place in `subsets`, before the next one starts.

    Returns:
        One `Fit` per subset, in their order.

    Raises:
        ValueError, TypeError: unknown blocks, engine or recipes that can't share a pass.

    Source: PAPER "The Finetuning Profile" (what is trained); the shared pass is ours.
    """
    subsets = [subset_of(backbone, blocks) for blocks in subsets]
    recipes = _check_recipes(recipe, len(subsets))
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    if not subsets:
        return []
    job = _Job(backbone, train, validation, recipes[0], num_classes, seed, on_step or (lambda trained: None))
    work = list(zip(subsets, recipes, strict=True))
    finished = _fit_each(job, work) if engine == "sequential" else _fit_passes(job, work, fold, memory_limit)
    fits: dict[int, Fit] = {}
    for done in finished:
        fits |= done
        if on_pass is not None:
            on_pass(done)
    return [fits[i] for i in range(len(work))]


@dataclass(frozen=True)
class _Job:
    """What all candidates of a call share."""

    backbone: Chain
    train: Split
    validation: Split | None
    recipe: Recipe
    num_classes: int
    seed: int
    on_step: Callable[[int], None]

    @property
    def device(self) -> torch.device:
        return self.backbone.mean.device

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.recipe.batch_size)

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch of normalized views (batch, 3, height, width) and labels (batch,), equal sizes up to one."""
        order = torch.randperm(len(self.train), generator=seeded(self.seed, epoch, _ORDER))
        for number, rows in enumerate(order.tensor_split(self.steps_per_epoch)):
            images = self.train.images[rows.to(self.train.images.device)].to(self.device)
            images = images.to(self.backbone.mean.dtype) / 255
            generator = seeded(self.seed, epoch, _VIEW, number)
            views = augment(images, self.recipe.augment, self.recipe.image_size, generator)
            yield _fast_layout(self.backbone.normalize(views)), self.train.labels[rows].to(self.device)

    def validation_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The validation images as they are."""
        for rows in torch.arange(len(self.validation)).split(2 * self.recipe.batch_size):
            images = self.validation.images[rows.to(self.validation.images.device)].to(self.device)
            views = resize_to(images.to(self.backbone.mean.dtype) / 255, self.recipe.image_size)
            yield _fast_layout(self.backbone.normalize(views)), self.validation.labels[rows].to(self.device)

    def new_head(self) -> nn.Linear:
        """A readout that starts at the same random weights for every candidate of a seed."""
        head = nn.Linear(self.backbone.num_features, self.num_classes)
        bound, generator = self.backbone.num_features**-0.5, seeded(self.seed, _HEAD)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
        return head.to(self.device, self.backbone.mean.dtype)

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where the recipe asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def optimizer(self, groups: list[dict[str, object]]) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
        """AdamW over parameter groups, with the recipe's schedule."""
        optimizer = torch.optim.AdamW(groups, fused=True)
        total = self.recipe.epochs * self.steps_per_epoch
        return optimizer, torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, total, self.recipe.warmup)
        )


class _Course:
    """How one candidate fares: its losses, and its best weights where the recipe stops early."""

    def __init__(self, job: _Job, recipe: Recipe, snapshot: Callable[[], dict[str, dict[str, torch.Tensor]]]):
        self.job, self.recipe, self.snapshot = job, recipe, snapshot
        self.losses: list[torch.Tensor] = []
        self.epochs, self.best_epoch = 0, 0
        self.score: tuple[float, float] | None = None  # (validation loss, accuracy) of the weights that are kept
        self.best: dict[str, dict[str, torch.Tensor]] | None = None

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of one batch, noted."""
        logits = logits.to(self.job.backbone.mean.dtype)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.losses.append(loss.detach())
        return loss

    def end_epoch(self, score: tuple[float, float] | None) -> bool:
        """Notes the epoch's validation score, if there is one; returns whether to go on."""
        self.epochs += 1
        if score is None:
            return True
        if self.score is None or self.recipe.patience is None or score[0] < self.score[0]:
            self.score, self.best_epoch = score, self.epochs
            self.best = self.snapshot() if self.recipe.patience is not None else None
        return self.recipe.patience is None or self.epochs - self.best_epoch < self.recipe.patience

    def fit(self, blocks: frozenset[str], seconds: float) -> Fit:
        """The finished candidate."""
        loss, accuracy = self.score or (None, None)
        losses = torch.stack(self.losses).double().cpu()
        return Fit(blocks, self.best or self.snapshot(), losses, accuracy, loss, self.epochs, seconds)


def _fit_alone(job: _Job, blocks: frozenset[str], recipe: Recipe) -> Fit:
    """The obvious loop over one subset: the reference that the shared pass must equal."""
    start = time.perf_counter()
    network = _fast_layout(set_trainable(copy.deepcopy(job.backbone), blocks, recipe.bn))
    candidate = nn.ModuleDict({"backbone": network, "head": job.new_head()})
    optimizer, schedule = job.optimizer(_groups(network, candidate["head"], recipe))
    course = _Course(job, recipe, lambda: _snapshot(network, blocks, candidate["head"]))
    for epoch in range(recipe.epochs):
        candidate.train()
        for images, labels in job.batches(epoch):
            with job.autocast():
                logits = candidate["head"](network(images))
            optimizer.zero_grad(set_to_none=True)
            course.loss(logits, labels).backward()
            optimizer.step()
            schedule.step()
            job.on_step(1)
        candidate.eval()
        scores = _scores(job, epoch, lambda images: [candidate["head"](network(images))])
        if not course.end_epoch(scores[0] if scores else None):
            break
    return course.fit(blocks, time.perf_counter() - start)


def _fit_each(job: _Job, work: list[tuple[frozenset[str], Recipe]]) -> Iterator[dict[int, Fit]]:
    for i, (blocks, recipe) in enumerate(work):
        yield {i: _fit_alone(job, blocks, recipe)}


def _fit_passes(
    job: _Job, work: list[tuple[frozenset[str], Recipe]], fold: bool, memory_limit: int | None
) -> Iterator[dict[int, Fit]]:
    """Packs the candidates into passes; a pass that runs out of memory is done again in two halves."""
    images, _ = next(job.batches(0))
    example = images[: min(4, len(images))]
    shared = SharedForward(_fast_layout(copy.deepcopy(job.backbone).eval()), example, fold)
    costs = bytes_per_candidate(job.backbone, example, [blocks for blocks, _ in work], len(images))
    passes = pack(costs, _forks(job.backbone, work), free_bytes(job.device) if memory_limit is None else memory_limit)
    while passes:
        members = passes.pop(0)
        try:
            fits = _fit_pass(job, shared, [work[i] for i in members])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(members) == 1:
                raise
            half = len(members) // 2
            passes = [members[:half], members[half:], *passes]
        else:
            yield dict(zip(members, fits, strict=True))


def _fit_pass(job: _Job, shared: SharedForward, work: list[tuple[frozenset[str], Recipe]]) -> list[Fit]:
    """Trains the candidates of one pass in step with each other."""
    start = time.perf_counter()
    candidates = [_fast_layout(Candidate(job.backbone, blocks, job.new_head(), own.bn)) for blocks, own in work]
    courses = {c: _Course(job, own, c.snapshot) for c, (_, own) in zip(candidates, work, strict=True)}
    groups = [g for c, (_, own) in zip(candidates, work, strict=True) for g in _groups(c.tuned, c.head, own)]
    optimizer, schedule = job.optimizer(groups)
    active = list(candidates)
    for epoch in range(job.recipe.epochs):
        for images, labels in job.batches(epoch):
            _step(job, shared, active, courses, images, labels)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            job.on_step(len(active))
        for candidate in active:
            candidate.eval()
        scores = _scores(job, epoch, lambda images: _logits(shared, active, images))  # noqa: B023 - called at once
        going = [courses[c].end_epoch(s) for c, s in zip(active, scores or [None] * len(active), strict=True)]
        active = [c for c, goes_on in zip(active, going, strict=True) if goes_on]
        if not active:
            break
    seconds = (time.perf_counter() - start) / len(work)
    return [courses[c].fit(c.subset, seconds) for c in candidates]


def _step(
    job: _Job,
    shared: SharedForward,
    active: list[Candidate],
    courses: dict[Candidate, _Course],
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


@torch.no_grad()
def _scores(
    job: _Job, epoch: int, logits_of: Callable[[torch.Tensor], list[torch.Tensor]]
) -> list[tuple[float, float]] | None:
    """(loss, accuracy) on the validation images per candidate; None where this epoch needs no score."""
    last = epoch == job.recipe.epochs - 1
    if job.validation is None or not (last or job.recipe.patience is not None):
        return None
    totals = None
    for images, labels in job.validation_batches():
        with job.autocast():
            logits = torch.stack(logits_of(images)).to(job.backbone.mean.dtype)  # (candidates, batch, classes)
        loss = F.cross_entropy(logits.movedim(-1, 1), labels.expand(len(logits), -1), reduction="none").sum(1)
        hits = (logits.argmax(-1) == labels).sum(1).to(loss)
        totals = torch.stack([loss, hits], 1) + (0 if totals is None else totals)
    return [(loss, accuracy) for loss, accuracy in (totals / len(job.validation)).tolist()]


def _groups(tuned: nn.Module, head: nn.Linear, recipe: Recipe) -> list[dict[str, object]]:
    head_lr = recipe.head_lr if recipe.head_lr is not None else recipe.lr
    blocks = [p for p in tuned.parameters() if p.requires_grad]
    groups = [{"params": list(head.parameters()), "lr": head_lr, "weight_decay": recipe.weight_decay}]
    return groups + ([{"params": blocks, "lr": recipe.lr, "weight_decay": recipe.weight_decay}] if blocks else [])


def _snapshot(network: Chain, blocks: frozenset[str], head: nn.Linear) -> dict[str, dict[str, torch.Tensor]]:
    parts = {name: network.part(name) for name in network.part_names if name in blocks} | {"head": head}
    return {name: {k: v.detach().cpu().clone() for k, v in part.state_dict().items()} for name, part in parts.items()}


def _forks(backbone: Chain, work: list[tuple[frozenset[str], Recipe]]) -> list[int]:
    """Where each candidate leaves the trunk."""
    names = backbone.part_names
    return [min((names.index(name) for name in blocks), default=len(names)) for blocks, _ in work]


def _fast_layout(value: Layout) -> Layout:
    """A module or images (batch, channels, height, width), channels last: what float32 convolutions are fastest in."""
    tensor = value if isinstance(value, torch.Tensor) else next(value.parameters())
    return value if tensor.dtype == torch.float64 else value.to(memory_format=torch.channels_last)


def _check_recipes(recipe: Recipe | Sequence[Recipe], n: int) -> list[Recipe]:
    recipes = [recipe] * n if isinstance(recipe, Recipe) else list(recipe)
    if len(recipes) != n:
        raise ValueError(f"{len(recipes)} recipes for {n} subsets; give one for all or one each")
    for name in _SHARED_FIELDS:
        values = {getattr(own, name) for own in recipes}
        if len(values) > 1:
            raise ValueError(f"recipes of one pass differ in {name}: {sorted(map(str, values))}; it must be the same")
    return recipes
