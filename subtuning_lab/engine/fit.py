"""Training of subsets: one candidate after another, which is the plain reference, or all in one shared pass."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from subtuning_lab.data.arrays import check_labels
from subtuning_lab.data.task import Split
from subtuning_lab.engine.batches import Training, TrunkBatches
from subtuning_lab.engine.memory import NotEnoughMemoryError, Prepared, free_bytes, memory_for, pack, release
from subtuning_lab.engine.optim import RGN_BATCHES, adamw, parameter_groups, scale_by_relative_gradients, set_lr
from subtuning_lab.engine.recipe import Recipe, check_recipes
from subtuning_lab.engine.shared_forward import Branch, Trunk
from subtuning_lab.engine.trainable import check_adapters, new_head, plain_part, tune_parts
from subtuning_lab.nets.chain import Chain, copy_weights, fork_of, in_order, put_parts, set_trainable, subset_of
from subtuning_lab.nets.heads import Start
from subtuning_lab.nets.inputs import fast_layout
from subtuning_lab.utils.validation import Is, OneOf, Whole, checked

#: part of every record's key: raise it whenever the same call may give other numbers than before
ENGINE_VERSION = 3
ENGINES: tuple[str, ...] = ("one_pass", "sequential")
Weights = dict[str, dict[str, torch.Tensor]]  # part name, or "head" -> tensor name -> tensor


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
        diverged: whether a loss, a logit, a weight or a running statistic was not finite. Such a fit is worth nothing:
            with validation images its accuracies are 0 and its loss is infinite, and nobody should save its weights.
        balanced_accuracy: mean over the classes of the validation images of each class's accuracy; None without them.
    """

    blocks: frozenset[str]
    weights: Weights = field(repr=False)
    losses: torch.Tensor = field(repr=False)
    accuracy: float | None
    validation_loss: float | None
    epochs: int
    seconds: float
    diverged: bool = False
    balanced_accuracy: float | None = None


Fits = dict[int, Fit]  # by place among the candidates


@checked
def fit_together(
    backbone: Annotated[Chain | Prepared, Is((Chain, Prepared))],
    subsets: Annotated[Sequence[Iterable[str]], Is(Collection)],
    train: Split,
    recipe: Annotated[Recipe | Sequence[Recipe], Is((Recipe, Sequence))],
    *,
    num_classes: Annotated[int, Whole(2)],
    validation: Split | None = None,
    seed: Annotated[int, Whole()] = 0,
    engine: Annotated[str, OneOf(ENGINES)] = "one_pass",
    fold: bool = True,
    memory_limit: Annotated[int | None, Whole(none=True)] = None,
    on_step: Annotated[Callable[[int], None] | None, Is(Callable, none=True)] = None,
    on_pass: Annotated[Callable[[dict[int, Fit]], None] | None, Is(Callable, none=True)] = None,
) -> list[Fit]:
    """Trains every subset from the pretrained weights, all on the same batches in the same order.

    Args:
        backbone: the pretrained chain, on the device to train on; it is not changed. `Prepared` saves many calls time.
        subsets: part names each; [] is linear probing, "all" full finetuning.
        train: training images.
        recipe: one for all, or one per subset; a pass shares `SHARED_FIELDS`, recipes may differ in the rest.
        num_classes: outputs of the new readout.
        validation: images to score on, never augmented; None scores nothing.
        seed: of the readout's start, the order of images and their augmentation.
        engine: "one_pass" or "sequential", which are equal but for rounding; see below.
        fold: whether the shared pass folds frozen BatchNorm into convolutions: faster, and equal but for rounding.
        memory_limit: bytes that one pass may take; by default a third of what is free on the device, or in the
            container. Candidates that don't fit together go into further passes, with the same numbers.
        on_step: called with the number of candidates trained by one step; it may raise to stop the training.
        on_pass: called with the finished fits of each pass, by their place in `subsets`, before the next one starts.
    Returns:
        One `Fit` per subset, in their order.
    Raises:
        ValueError, TypeError: unknown blocks, engine, labels out of range, recipes that can't share a pass or find
            nothing to train.
        ImportError: an adapter without the extra `peft`.
        MemoryError: not even one candidate at a time fits; the message names the first one.

    Dropout and stochastic depth are off: what they draw would depend on which candidates share a pass.

    **Equality.** Where nothing is folded (`fold=False`) or stored (with augmentation), one pass has the bits of
    separate trainings in every network tried on a CPU. Elsewhere sums are rounded otherwise, and training enlarges
    that: most with `bn="batch"` where a batch has few values a channel. Measured with lab-resnet after 20 steps:
    weights apart by 7e-5 of the largest and losses by 6e-6 in float32 (2e-13 and 4e-15 in float64) at lr 0.01 with
    8 images of 16 px; and with 4 images of 8 px, whose last maps are 1 x 1, by 1e-3 and 3e-4 at lr 0.01 and by 9e-3
    and 2e-4 at lr 0.1 (9e-13 and 3e-13 in float64). On a CPU the same call gives the same bits with as many threads;
    on a GPU, cuDNN's backward may differ in the last ones unless `torch.backends.cudnn.deterministic` is set.

    Source: PAPER "The Finetuning Profile" (what is trained); the shared pass is ours.
    """
    prepared = backbone if isinstance(backbone, Prepared) else Prepared(backbone)
    subsets = [subset_of(prepared.backbone, blocks) for blocks in subsets]
    recipes = check_recipes(recipe)
    recipes = recipes * len(subsets) if isinstance(recipe, Recipe) else recipes
    if len(recipes) != len(subsets):
        raise ValueError(f"{len(recipes)} recipes for {len(subsets)} subsets; give one for all or one each")
    for name, split in {"train": train, "validation": validation}.items():
        if split is not None:
            check_labels(split.labels, range(num_classes), name)
    if validation is None and any(one.patience is not None for one in recipes):
        raise ValueError(f"patience is {recipes[0].patience}, but there are no validation images to stop by")
    if not subsets:
        return []
    shared = (prepared.backbone, train, validation, recipes[0], num_classes, seed)
    training = Training(*shared, on_step=on_step or (lambda trained: None))
    fits: Fits = {}
    with memory_for(f"{len(subsets)} subsets of {prepared.backbone.name}"):
        example = training.example()
        prepared.check(example)
        prepared.check_adapters(example, subsets, recipes)
        passes = partial(_fit_passes, prepared=prepared, example=example, fold=fold, memory_limit=memory_limit)
        run = _fit_each if engine == "sequential" else passes
        for done in run(training, _started(training, list(map(Candidate, subsets, recipes)), run)):
            fits |= done
            if on_pass is not None:
                on_pass(done)
    return [fits[i] for i in range(len(subsets))]


@dataclass(frozen=True)
class Candidate:
    """A subset with a recipe, and the weights that its readout starts from (None: random ones)."""

    blocks: frozenset[str]
    recipe: Recipe
    start: Start | None = None

    @property
    def probing(self) -> Recipe | None:
        """The recipe of the linear probing that trains the readout first, if any does."""
        if self.recipe.head_start != "probe" or not self.blocks:
            return None
        return replace(self.recipe.for_probing(), patience=None)

    def head(self, training: Training) -> nn.Module:
        """The readout before training; a Siamese one without tuned blocks would see the same features twice."""
        siamese = self.recipe.siamese and bool(self.blocks)
        shape = {"depth": self.recipe.head_depth, "siamese": siamese, "start": self.start}
        return new_head(training.backbone, training.num_classes, training.seed, **shape)


def fit_alone(training: Training, candidate: Candidate) -> Fit:
    """The obvious loop over one candidate: the reference that the shared pass must equal."""
    began, backbone, recipe = time.perf_counter(), training.backbone, candidate.recipe
    parts = tune_parts(backbone, candidate.blocks, recipe, training.seed)
    network = put_parts(set_trainable(copy.deepcopy(backbone), candidate.blocks, recipe.bn), parts)
    network, head = fast_layout(network, training.layout), candidate.head(training)
    positions = {network.part_names.index(name): part for name, part in parts.items()}
    optimizer = adamw(parameter_groups(positions, len(network.parts) - 1, head, recipe))

    def snapshot() -> Weights:
        return copy_weights({name: plain_part(part) for name, part in parts.items()} | {"head": head})

    def logits(images: torch.Tensor) -> torch.Tensor:
        features = network(images)
        return head(torch.cat([backbone(images), features], 1) if recipe.siamese and parts else features)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with training.autocast():
            output = logits(images)
        return history.loss(output, labels)

    trained = [p for p in nn.ModuleList([*parts.values(), head]).parameters() if p.requires_grad]
    history = History(training, recipe, trained, snapshot)
    for epoch in range(recipe.epochs):
        network.eval()
        first = islice(training.batches(epoch), RGN_BATCHES)
        scale_by_relative_gradients(optimizer, (loss_of(*batch) for batch in first))
        network.train()
        for step, (images, labels) in enumerate(training.batches(epoch), start=epoch * training.steps_per_epoch):
            set_lr(optimizer, step, training.steps, recipe.warmup)
            loss = loss_of(images, labels)
            loss.backward()
            if step == 0:
                check_adapters(parts, recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.losses.append(loss.detach())
            training.on_step(1)
        network.eval()
        scores = validation_scores(training, epoch, lambda images: [logits(images)])
        if not history.end_epoch(scores[0] if scores else None):
            break
    return history.fit(candidate.blocks, time.perf_counter() - began)


def fit_pass(training: Training, source: TrunkBatches, candidates: Sequence[Candidate]) -> list[Fit]:
    """Trains candidates in step with each other: the loop of `fit_alone`, with all that is frozen run once for all."""
    began, shared, depth = time.perf_counter(), source.shared, len(training.backbone.parts) - 1
    branches = [Branch(training.backbone, c.blocks, c.recipe, c.head(training), training.seed) for c in candidates]
    branches = [fast_layout(branch, training.layout) for branch in branches]
    groups = [group for b in branches for group in parameter_groups(b.parts, depth, b.head, b.recipe)]
    optimizer = adamw(groups)
    histories = {
        b: History(training, b.recipe, [p for p in b.parameters() if p.requires_grad], b.snapshot) for b in branches
    }

    def losses_of(some: Sequence[Branch], trunk: Trunk, labels: torch.Tensor) -> torch.Tensor:
        with training.autocast():
            logits = shared.logits(trunk, some)
        return torch.stack([histories[b].loss(z, labels) for b, z in zip(some, logits, strict=True)])

    def logits_of(images: torch.Tensor) -> list[torch.Tensor]:
        return shared.logits(shared.trunk(images, shared.exits(active)), active)

    active = branches
    for epoch in range(training.recipe.epochs):
        scaled = [b.eval() for b in active if b.recipe.lr_scaling == "rgn"]
        first = islice(source.batches(epoch, shared.exits(scaled)), RGN_BATCHES if scaled else 0)
        scale_by_relative_gradients(optimizer, (losses_of(scaled, *batch).sum() for batch in first))
        for branch in active:
            branch.train()
        batches = source.batches(epoch, shared.exits(active))
        for step, (trunk, labels) in enumerate(batches, start=epoch * training.steps_per_epoch):
            set_lr(optimizer, step, training.steps, training.recipe.warmup)
            losses = losses_of(active, trunk, labels)
            losses.sum().backward()  # each loss reaches its own candidate's weights alone
            if step == 0:
                for branch in active:
                    check_adapters(dict(zip(branch.names, branch.tuned, strict=True)), branch.recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for branch, loss in zip(active, losses.detach(), strict=True):
                histories[branch].losses.append(loss)
            training.on_step(len(active))
        for branch in active:
            branch.eval()
        scores = validation_scores(training, epoch, logits_of) or [None] * len(active)
        going = [histories[b].end_epoch(score) for b, score in zip(active, scores, strict=True)]
        active = [b for b, goes_on in zip(active, going, strict=True) if goes_on]
        if not active:
            break
    seconds = (time.perf_counter() - began) / len(candidates)
    return [histories[b].fit(b.blocks, seconds) for b in branches]


@dataclass(frozen=True)
class Score:
    """What a candidate comes to on the validation images; its loss is infinite where a logit is not finite."""

    loss: float
    accuracy: float
    balanced_accuracy: float


class History:
    """What happens to one candidate: its losses, and its best weights where the recipe stops early.

    Args:
        training, recipe: how it is trained.
        trained: its parameters that are trained.
        snapshot: copies its weights and buffers.
    """

    def __init__(
        self, training: Training, recipe: Recipe, trained: list[nn.Parameter], snapshot: Callable[[], Weights]
    ):
        self.recipe, self.trained, self.snapshot = recipe, trained, snapshot
        self.dtype = training.backbone.mean.dtype
        self.class_weights = balanced_weights(training) if recipe.class_weights == "balanced" else None
        self.losses: list[torch.Tensor] = []
        self.epochs, self.best_epoch = 0, 0
        self.score: Score | None = None  # of the weights that are kept
        self.best: Weights | None = None

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of one batch of logits (batch, classes), each image with its class's weight."""
        logits, smoothing = logits.to(self.dtype), self.recipe.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return (self.class_weights[labels] * losses).mean()

    def end_epoch(self, score: Score | None) -> bool:
        """Notes the epoch's validation score, if there is one; returns whether to go on."""
        self.epochs += 1
        if score is None:
            return True
        if self.score is None or self.recipe.patience is None or score.loss < self.score.loss:
            self.score, self.best_epoch = score, self.epochs
            self.best = self.snapshot() if self.recipe.patience is not None else None
        return self.recipe.patience is None or self.epochs - self.best_epoch < self.recipe.patience

    def fit(self, blocks: frozenset[str], seconds: float) -> Fit:
        """The finished candidate."""
        losses = torch.stack(self.losses).cpu().double()  # Apple's GPU has no float64
        weights = self.best or self.snapshot()
        kept = [tensor for tensors in weights.values() for tensor in tensors.values()]
        diverged = not (_all_finite([losses, *kept]) and _all_finite(self.trained))
        score = self.score
        if score is not None and (diverged or not math.isfinite(score.loss)):
            score, diverged = Score(math.inf, 0.0, 0.0), True
        accuracy, loss, balanced = (score.accuracy, score.loss, score.balanced_accuracy) if score else [None] * 3
        return Fit(blocks, weights, losses, accuracy, loss, self.epochs, seconds, diverged, balanced)


@torch.no_grad()
def _all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors of one device are finite; that device is waited for once."""
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


@torch.no_grad()
def validation_scores(
    training: Training, epoch: int, logits_of: Callable[[torch.Tensor], list[torch.Tensor]]
) -> list[Score] | None:
    """Scores on the validation images per candidate; None where this epoch needs no score."""
    last = epoch == training.recipe.epochs - 1
    if training.validation is None or not (last or training.recipe.patience is not None):
        return None
    totals = 0  # (candidates, 1 + classes): the sum of losses, and hits by class
    for images, labels in training.validation_batches():
        with training.autocast():
            logits = torch.stack(logits_of(images)).to(training.backbone.mean.dtype)  # (candidates, batch, classes)
        loss = F.cross_entropy(logits.movedim(-1, 1), labels.expand(len(logits), -1), reduction="none").sum(1)
        loss = loss.where(logits.isfinite().flatten(1).all(1), math.inf)
        hits = (logits.argmax(-1) == labels).to(loss) @ F.one_hot(labels, training.num_classes).to(loss)
        totals = torch.cat([loss[:, None], hits], 1) + totals
    loss, hits = totals.cpu().double().tensor_split([1], dim=1)
    sizes = torch.bincount(training.validation.labels.cpu(), minlength=training.num_classes)
    values = loss[:, 0] / sizes.sum(), hits.sum(1) / sizes.sum(), (hits / sizes)[:, sizes > 0].mean(1)
    return [Score(*score) for score in zip(*(value.tolist() for value in values), strict=True)]


def balanced_weights(training: Training) -> torch.Tensor:
    """Weight (classes,) of every class such that all have the same say; 0 for one without training images."""
    sizes = torch.bincount(training.train.labels.cpu(), minlength=training.num_classes).double()
    weights = sizes.sum() / ((sizes > 0).sum() * sizes)
    return weights.where(sizes > 0, 0.0).to(training.device, training.backbone.mean.dtype)


def _fit_each(training: Training, candidates: Sequence[Candidate]) -> Iterator[Fits]:
    for i, candidate in enumerate(candidates):
        with memory_for(_work_of(training, candidate)):
            fit = fit_alone(training, candidate)
        yield {i: fit}


def _fit_passes(
    training: Training,
    candidates: Sequence[Candidate],
    prepared: Prepared,
    example: torch.Tensor,
    fold: bool,
    memory_limit: int | None,
) -> Iterator[Fits]:
    """Packs the candidates into passes; a pass that runs out of memory is done again in two halves."""
    shared = prepared.shared(example, fold, training.layout)
    subsets, batch_size = [c.blocks for c in candidates], len(training.order(0)[0])
    costs = prepared.costs(example, subsets, batch_size, training.recipe.precision == "bf16")
    forks = [fork_of(prepared.backbone, subset) for subset in subsets]
    limit = free_bytes(training.device) if memory_limit is None else memory_limit
    exits = {*forks, *(len(shared.frozen) for c in candidates if c.recipe.siamese)}
    source = TrunkBatches(training, shared, exits, limit)
    passes = pack(costs, forks, limit - source.nbytes)
    while passes:
        members = passes.pop(0)
        try:
            with memory_for(_work_of(training, candidates[members[0]])):
                fits = fit_pass(training, source, [candidates[i] for i in members])
        except NotEnoughMemoryError:
            if len(members) == 1 and not source.stored:
                raise
        else:
            yield dict(zip(members, fits, strict=True))
            continue
        if len(members) == 1:
            source.drop()
        half = len(members) // 2
        passes = [some for some in (members[:half], members[half:]) if some] + passes
        release(training.device)  # here, where the error holds the failed pass no longer


def _work_of(training: Training, candidate: Candidate) -> str:
    """What a candidate's training is, for messages."""
    blocks = " + ".join(in_order(training.backbone, candidate.blocks)) or "a readout"
    size = min(training.recipe.batch_size, len(training.train))
    return f"training {blocks} of {training.backbone.name} on batches of {size} images"


def _started(
    training: Training,
    candidates: Sequence[Candidate],
    run: Callable[[Training, Sequence[Candidate]], Iterator[Fits]],
) -> list[Candidate]:
    """Gives the candidates the readouts that their recipes start from; linear probing trains some of them first."""
    heads: dict[Recipe | None, Start | None] = {None: None}
    probes = list(dict.fromkeys(c.probing for c in candidates if c.probing))
    if probes:
        quiet = replace(training, validation=None, recipe=probes[0], on_step=lambda trained: None)
        for fits in run(quiet, [Candidate(frozenset(), recipe) for recipe in probes]):
            heads |= {probes[i]: fit.weights["head"] for i, fit in fits.items()}
    source = _source_head(training) if any(c.recipe.head_start == "source" for c in candidates) else None
    starts = [source if c.recipe.head_start == "source" else heads[c.probing] for c in candidates]
    return [replace(c, start=start) for c, start in zip(candidates, starts, strict=True)]


def _source_head(training: Training) -> dict[str, torch.Tensor]:
    """The pretrained readout's weights. Raises ValueError where there is none, or one of other classes."""
    head = training.backbone.source_head
    if head is None or head.out_features != training.num_classes:
        has = "has none" if head is None else f"has one of {head.out_features} classes"
        raise ValueError(
            f'head_start is "source", the pretrained readout, but {training.backbone.name} {has} for the task\'s '
            f'{training.num_classes} classes; give "random" or "probe"'
        )
    return {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
