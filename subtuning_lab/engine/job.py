"""One training job: what all its candidates share, and how each of them fares."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from subtuning_lab.data.augment import augment
from subtuning_lab.data.task import Split
from subtuning_lab.engine.recipe import Recipe, lr_factor
from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.heads import empty_readout, fill_readout
from subtuning_lab.nets.inputs import network_input
from subtuning_lab.utils.random import Stream, seeded

Start = dict[str, torch.Tensor]  # weights of a readout by tensor name
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
    """

    blocks: frozenset[str]
    weights: Weights = field(repr=False)
    losses: torch.Tensor = field(repr=False)
    accuracy: float | None
    validation_loss: float | None
    epochs: int
    seconds: float


@dataclass(frozen=True)
class Job:
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

    def order(self, epoch: int) -> tuple[torch.Tensor, ...]:
        """The images of one epoch's batches, int64 (batch,) each, equal sizes up to one."""
        order = torch.randperm(len(self.train), generator=seeded(Stream.ORDER, self.seed, epoch))
        return order.tensor_split(self.steps_per_epoch)

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch of normalized views (batch, 3, height, width) and labels (batch,), as `order` has them."""
        for number, rows in enumerate(self.order(epoch)):
            images = self.train.images[rows.to(self.train.images.device)].to(self.device)
            images = images.to(self.backbone.mean.dtype) / 255
            generator = seeded(Stream.VIEW, self.seed, epoch, number)
            views = augment(images, self.recipe.augment, self.recipe.image_size, generator)
            yield network_input(self.backbone, views), self.train.labels[rows].to(self.device)

    def validation_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The validation images as they are."""
        for rows in torch.arange(len(self.validation)).split(2 * self.recipe.batch_size):
            images = self.validation.images[rows.to(self.validation.images.device)]
            labels = self.validation.labels[rows].to(self.device)
            yield network_input(self.backbone, images, self.recipe.image_size), labels

    def new_head(self, depth: int = 1, siamese: bool = False, start: Start | None = None) -> nn.Module:
        """A readout that starts at the same random weights for every candidate of a seed, or at given ones.

        Args:
            depth: number of its linear layers.
            siamese: whether it sees the frozen features beside the tuned ones.
            start: weights by tensor name, of a readout as deep that saw the features once.
        """
        head = empty_readout(self.backbone.num_features, self.num_classes, depth, siamese)
        fill_readout(head, seeded(Stream.HEAD, self.seed), start)
        return head.to(self.device, self.backbone.mean.dtype)

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where the recipe asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def optimizer(self, groups: list[dict[str, object]]) -> torch.optim.AdamW:
        """AdamW over parameter groups, whose learning rates are the peaks of the schedule."""
        together: dict[object, dict[str, object]] = {}  # one group for all with equal settings makes one fused update
        for group in groups:
            key = id(group) if "family" in group else (group["lr"], group["weight_decay"])
            own = together.setdefault(key, group | {"params": [], "peak_lr": group["lr"]})
            own["params"] += group["params"]
        return torch.optim.AdamW(list(together.values()), fused=True)

    def set_lr(self, optimizer: torch.optim.AdamW, step: int) -> None:
        """Declares the learning rates of one step, counted from 0 over all epochs."""
        # Torch's schedulers and their optimizer hold each other, and with them the weights of finished passes.
        factor = lr_factor(step, self.recipe.epochs * self.steps_per_epoch, self.recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]


class Course:
    """How one candidate fares: its losses, and its best weights where the recipe stops early."""

    def __init__(self, job: Job, recipe: Recipe, snapshot: Callable[[], Weights]):
        self.job, self.recipe, self.snapshot = job, recipe, snapshot
        self.losses: list[torch.Tensor] = []
        self.epochs, self.best_epoch = 0, 0
        self.score: tuple[float, float] | None = None  # (validation loss, accuracy) of the weights that are kept
        self.best: Weights | None = None

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


@torch.no_grad()
def validation_scores(
    job: Job, epoch: int, logits_of: Callable[[torch.Tensor], list[torch.Tensor]]
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
    return [(loss, accuracy) for loss, accuracy in (totals.double() / len(job.validation)).tolist()]


def parameter_groups(
    parts: Mapping[int, nn.Module], depth: int, head: nn.Module, recipe: Recipe
) -> list[dict[str, object]]:
    """The optimizer's groups for one candidate: its readout, and what it trains of its parts.

    Args:
        parts: the tuned parts by position in the network, stem 0.
        depth: position of the network's last part.
        head: the readout; one that linear probing has trained before goes on at the blocks' learning rate.
        recipe: learning rates, their decay from part to part, and their scaling.
    """
    fixed = {"weight_decay": recipe.weight_decay}
    probed = recipe.head_start == "probe" and parts
    head_lr = recipe.lr if probed or recipe.head_lr is None else recipe.head_lr
    groups = [fixed | {"params": list(head.parameters()), "lr": head_lr}]
    trained = {i: [p for p in part.parameters() if p.requires_grad] for i, part in parts.items()}
    lr = {i: recipe.lr * recipe.lr_decay ** (depth - i) for i in parts}
    if recipe.lr_scaling == "rgn":
        family = object()  # marks the tensors of one candidate
        marks = {"family": family, **fixed}
        return groups + [
            marks | {"params": [p], "lr": lr[i], "recent": deque(maxlen=5)} for i, own in trained.items() for p in own
        ]
    if recipe.lr_decay < 1:
        return groups + [fixed | {"params": own, "lr": lr[i]} for i, own in trained.items() if own]
    together = [p for own in trained.values() for p in own]
    return groups + ([fixed | {"params": together, "lr": recipe.lr}] if together else [])


@torch.no_grad()
def scale_by_relative_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Multiplies learning rates of groups with a `family` by ||gradient|| / ||weights||, the family's largest being 1.

    The ratio is a mean over the last five steps. A tensor of zeros has no such ratio, and stays.

    Source: surgical finetuning's Auto-RGN; there the gradients are taken in passes of their own once an epoch.
    """
    families: dict[object, list[dict]] = {}
    for group in optimizer.param_groups:
        if "family" in group and group["params"][0].grad is not None:
            families.setdefault(group["family"], []).append(group)
    for groups in families.values():
        weights = [group["params"][0] for group in groups]
        gradients, sizes = (torch.stack(torch._foreach_norm(own)) for own in ([w.grad for w in weights], weights))
        ratios = torch.where(sizes > 0, gradients / sizes, 0).tolist()
        for group, ratio in zip(groups, ratios, strict=True):
            group["recent"].append(ratio)
        means = [sum(group["recent"]) / len(group["recent"]) for group in groups]
        for group, mean in zip(groups, means, strict=True):
            group["lr"] *= mean / (max(means) or 1.0)
