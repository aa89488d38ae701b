"""What candidates take from the frozen trunk, batch by batch: computed anew, or once and for all epochs."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from subtuning_lab.engine.job import Job
from subtuning_lab.engine.shared_forward import SharedForward, Trunk

_SHARE = 0.25  # of the memory for a pass that may go to stored activations


class TrunkSource:
    """The frozen trunk's activations of the training images.

    Without augmentation an image's activations are the same in every epoch, since the trunk is frozen: they are then
    computed once, if they fit.

    Args:
        job: what is trained on.
        shared: the frozen network.
        exits: positions that any candidate leaves the trunk at.
        limit: bytes that a pass may take.
    """

    def __init__(self, job: Job, shared: SharedForward, exits: Collection[int], limit: int):
        self.job, self.shared = job, shared
        self.stored: dict[int, torch.Tensor] = {}
        if job.recipe.augment == "none" and job.recipe.epochs > 1:
            images, _ = next(job.batches(0))
            sizes = self._trunk(images[:1], exits)
            if sum(x.nbytes for x in sizes.values()) * len(job.train) <= _SHARE * limit:
                self._store(exits)

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(x.nbytes for x in self.stored.values())

    def batches(self, epoch: int, exits: Collection[int]) -> Iterator[tuple[Trunk, torch.Tensor]]:
        """One epoch of activations (batch, ...) at some of the exits, and labels (batch,)."""
        if not self.stored:
            for images, labels in self.job.batches(epoch):
                yield self._trunk(images, exits), labels
            return
        for rows in self.job.order(epoch):
            where, labels = rows.to(self.job.device), self.job.train.labels[rows].to(self.job.device)
            yield {position: _channels_second(self.stored[position][where]) for position in exits}, labels

    def _trunk(self, images: torch.Tensor, exits: Collection[int]) -> Trunk:
        with self.job.autocast():
            return self.shared.trunk(images, exits)

    def _store(self, exits: Collection[int]) -> None:
        """Computes the first epoch's activations and puts each image's in its place."""
        for rows, (images, _) in zip(self.job.order(0), self.job.batches(0), strict=True):
            for position, x in self._trunk(images, exits).items():
                x = _channels_last(x)
                if position not in self.stored:
                    self.stored[position] = x.new_empty((len(self.job.train), *x.shape[1:]))
                self.stored[position][rows.to(x.device)] = x


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """Images (batch, channels, height, width) as (batch, height, width, channels), which is how they lie in memory."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


def _channels_second(x: torch.Tensor) -> torch.Tensor:
    """Undoes `_channels_last`, without a copy."""
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x
