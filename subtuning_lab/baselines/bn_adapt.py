"""The source network as it is: with its own readout, untrained, its BatchNorm statistics adapted or not."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from subtuning_lab.data.images import StreamedImages
from subtuning_lab.data.task import Split, Task
from subtuning_lab.nets.chain import Chain, frozen_copy, set_trainable
from subtuning_lab.nets.inputs import network_input

NO_ADAPTATION, BN_STATISTICS = "no adaptation", "BatchNorm statistics"
_BATCH = 256


@dataclass(frozen=True)
class SourceNetwork:
    """The source network with its own readout: nothing is trained, no label is read.

    Args:
        statistics: of BatchNorm: "source" leaves the network as it is; "target" takes mean and variance of the new
            training images.
        prior: with "target", the source's statistics count as much as so many images do; at least 0.

    Raises:
        ValueError: a value out of its range, by name.

    Source: Schneider et al. 2020; Nado et al. 2020 (prior 0). Deviation: the statistics are of the training images,
        taken once, and not of the images that are to be classified.
    """

    statistics: str = "source"
    prior: float = 0.0

    head_start: ClassVar[str] = "source"

    def __post_init__(self) -> None:
        if self.statistics not in ("source", "target"):
            raise ValueError(f"statistics is {self.statistics!r}; it must be source or target")
        if isinstance(self.prior, bool) or not isinstance(self.prior, int | float):
            raise TypeError(f"prior must be a number, got {self.prior!r}")
        if not 0 <= self.prior < math.inf:
            raise ValueError(f"prior is {self.prior!r}; it must be at least 0 and finite")

    @property
    def name(self) -> str:
        """What tables call it."""
        return NO_ADAPTATION if self.statistics == "source" else BN_STATISTICS

    def settings(self) -> dict[str, object]:
        """Plain values by name, for records."""
        return {"statistics": self.statistics, "prior": float(self.prior)}

    def fit(
        self, backbone: Chain, train: Split, num_classes: int, seed: int = 0, image_size: int | None = None
    ) -> FittedSource:
        """Takes the training images' statistics, if that is asked for.

        Args:
            backbone: the source network; it is not changed.
            train: training images, not augmented.
            num_classes: outputs that the readout must have.
            seed: of no effect.
            image_size: side in pixels that images are resized to; None keeps their own.

        Raises:
            ValueError: no pretrained readout of so many classes.
        """
        head = backbone.source_head
        if head is None or head.out_features != num_classes:
            has = "has none" if head is None else f"has one of {head.out_features} classes"
            raise ValueError(f"{self.name} needs a pretrained readout of {num_classes} classes; {backbone.name} {has}")
        network = frozen_copy(backbone)
        if self.statistics == "target":
            network = with_statistics(network, train.images, self.prior, image_size)
        return FittedSource(network, image_size)


@dataclass(frozen=True)
class FittedSource:
    """A frozen network with its pretrained readout."""

    backbone: Chain = field(repr=False)
    image_size: int | None = None

    params: ClassVar[int] = 0

    @torch.no_grad()
    def logits(self, split: Split) -> torch.Tensor:
        """Logits (n, classes) of a split's images, on the CPU."""
        views = _views(self.backbone, split.images, self.image_size)
        return torch.cat([self.backbone.source_head(self.backbone(x)).cpu() for x in views])


@torch.no_grad()
def with_statistics(
    backbone: Chain, images: torch.Tensor | StreamedImages, prior: float = 0.0, image_size: int | None = None
) -> Chain:
    """A copy of the backbone whose BatchNorm statistics are those of the images; without BatchNorm, an equal one.

    Every BatchNorm normalizes with its batch's statistics meanwhile, so that later ones see adapted inputs. Statistics
    of several batches are averaged.

    Args:
        backbone: the pretrained chain; it is not changed.
        images: uint8 (n, 3, H, W), not augmented.
        prior: the old statistics count as much as so many images do.
        image_size: side in pixels that images are resized to; None keeps their own.
    """
    network = frozen_copy(backbone)
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    old = [(norm.running_mean.clone(), norm.running_var.clone(), norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # a plain mean over batches
    for x in _views(network, images, image_size):
        for part in network.parts:  # the chain's own forward would put frozen BatchNorm back into eval mode
            x = part(x)
    weight = prior / (prior + len(images))
    for norm, (mean, variance, momentum) in zip(norms, old, strict=True):
        norm.running_mean.lerp_(mean, weight)
        norm.running_var.lerp_(variance, weight)
        norm.momentum = momentum
    return network.eval()


def with_readout_of(backbone: Chain, task: Task) -> Chain:
    """A copy of the backbone whose pretrained readout has the task's classes only, the first of those that it has.

    Raises:
        ValueError: no pretrained readout, or one of fewer classes.
    """
    head = backbone.source_head
    if head is None or head.out_features < task.num_classes:
        has = "none" if head is None else f"one of {head.out_features}"
        raise ValueError(
            f"the source task {task.name} has {task.num_classes} classes, which need a pretrained readout; "
            f"{backbone.name} has {has}"
        )
    network = copy.deepcopy(backbone)
    if head.out_features > task.num_classes:
        narrow = nn.utils.skip_init(nn.Linear, head.in_features, task.num_classes, bias=head.bias is not None)
        narrow.load_state_dict({name: tensor[: task.num_classes] for name, tensor in head.state_dict().items()})
        network.source_head = narrow.to(head.weight)
    return set_trainable(network, [])


def _views(backbone: Chain, images: torch.Tensor | StreamedImages, image_size: int | None) -> Iterator[torch.Tensor]:
    """Normalized images (batch, 3, height, width) on the backbone's device, in batches of equal sizes up to one."""
    for rows in torch.arange(len(images)).tensor_split(-(-len(images) // _BATCH)):
        yield network_input(backbone, images[rows.to(images.device)], image_size)
