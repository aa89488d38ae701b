"""What comes in which order: batches of images, and of the frozen trunk's activations, computed anew or stored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch

from subtuning_lab.data.augment import augment
from subtuning_lab.data.task import Split
from subtuning_lab.engine.memory import is_out_of_memory
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.engine.shared_forward import SharedForward, Trunk
from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.inputs import layout_of, network_input
from subtuning_lab.utils.random import Stream, seeded

_SHARE = 0.25  # of the memory for a pass that may go to stored activations


@dataclass(frozen=True)
class Training:
    """What all candidates of a call share.

    Args:
        backbone: frozen, without dropout, on the device to train on.
        train: training images.
        validation: images to score on, or None.
        recipe: says how images are batched and viewed, and for how many epochs.
        num_classes: outputs of the readout.
        seed: of the readout's start, the order of images and their augmentation.
        on_step: called with the number of candidates that one step trained.
    """

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

    @cached_property
    def layout(self) -> torch.memory_format:
        """Of images, weights and activations in memory."""
        return layout_of(self.backbone, self.recipe.precision == "bf16")

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.recipe.batch_size)

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def example(self) -> torch.Tensor:
        """A few normalized images of the first batch (batch, 3, height, width), to examine the network with."""
        images, _ = next(self.batches(0))
        return images[:4].clone()

    def order(self, epoch: int) -> tuple[torch.Tensor, ...]:
        """The images of one epoch's batches, int64 (batch,) each, equal sizes up to one."""
        order = torch.randperm(len(self.train), generator=seeded(Stream.ORDER, self.seed, epoch))
        return order.tensor_split(self.steps_per_epoch)

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch of normalized views (batch, 3, height, width) and labels (batch,), as `order` has them."""
        for number, chosen in enumerate(self.order(epoch)):
            images = self.train.images[chosen.to(self.train.images.device)].to(self.device)
            images = images.to(self.backbone.mean.dtype) / 255
            generator = seeded(Stream.VIEW, self.seed, epoch, number)
            views = augment(images, self.recipe.augment, self.recipe.image_size, generator)
            yield network_input(self.backbone, views, layout=self.layout), self.train.labels[chosen].to(self.device)

    def validation_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The validation images as they are."""
        for chosen in torch.arange(len(self.validation)).split(2 * self.recipe.batch_size):
            images = self.validation.images[chosen.to(self.validation.images.device)]
            labels = self.validation.labels[chosen].to(self.device)
            yield network_input(self.backbone, images, self.recipe.image_size, self.layout), labels

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where the recipe asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")


class TrunkBatches:
    """The frozen trunk's activations of the training images.

    Without augmentation an image's activations are the same in every epoch, since the trunk is frozen: they are then
    computed once, if they fit.

    Args:
        training: what is trained on.
        shared: the frozen network.
        exits: positions that any candidate leaves the trunk at.
        limit: bytes that a pass may take.
    """

    def __init__(self, training: Training, shared: SharedForward, exits: Collection[int], limit: int):
        self.training, self.shared = training, shared
        self.stored: dict[int, torch.Tensor] = {}
        if training.recipe.augment == "none" and training.recipe.epochs > 1:
            try:
                self._store(exits, _SHARE * limit)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.drop()

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(x.nbytes for x in self.stored.values())

    def drop(self) -> None:
        """Gives the memory back; activations are computed anew from now on."""
        self.stored = {}

    def batches(self, epoch: int, exits: Collection[int]) -> Iterator[tuple[Trunk, torch.Tensor]]:
        """One epoch of activations (batch, ...) at some of the exits, and labels (batch,)."""
        if not self.stored:
            for images, labels in self.training.batches(epoch):
                yield self._trunk(images, exits), labels
            return
        for order in self.training.order(epoch):
            chosen = order.to(self.training.device)
            labels = self.training.train.labels[order].to(self.training.device)
            yield {position: self._as_computed(self.stored[position][chosen]) for position in exits}, labels

    def _trunk(self, images: torch.Tensor, exits: Collection[int]) -> Trunk:
        with self.training.autocast():
            return self.shared.trunk(images, exits)

    def _store(self, exits: Collection[int], limit: float) -> None:
        """Computes the first epoch's activations and puts each image's in its place, if they stay within the limit."""
        n = len(self.training.train)
        for order, (images, _) in zip(self.training.order(0), self.training.batches(0), strict=True):
            if not self.stored:
                first = self._trunk(images[:1], exits)
                if sum(x.nbytes for x in first.values()) * n > limit:
                    return
                self.stored = {i: x.new_empty((n, *self._as_stored(x).shape[1:])) for i, x in first.items()}
            for position, x in self._trunk(images, exits).items():
                self.stored[position][order.to(x.device)] = self._as_stored(x)

    def _as_stored(self, x: torch.Tensor) -> torch.Tensor:
        """Images (batch, channels, height, width) such that each lies in memory in one piece, as it is indexed."""
        return x.permute(0, 2, 3, 1) if x.dim() == 4 and self.training.layout is torch.channels_last else x

    def _as_computed(self, x: torch.Tensor) -> torch.Tensor:
        """Undoes `_as_stored`, without a copy."""
        return x.permute(0, 3, 1, 2) if x.dim() == 4 and self.training.layout is torch.channels_last else x
