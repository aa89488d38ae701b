"""The source network as it is: with its own readout, untrained, its BatchNorm statistics adapted or not."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from subtuning_lab.data.images import StreamedImages
from subtuning_lab.data.task import Split, Task
from subtuning_lab.nets.chain import Chain, frozen_copy, set_trainable
from subtuning_lab.nets.inputs import logits_of, network_input
from subtuning_lab.utils.validation import IMAGE_SIZE, SEED, Is, OneOf, Real, Whole, checked

NO_ADAPTATION, BN_STATISTICS = "no adaptation", "BatchNorm statistics"
_BATCH = 256


@checked
@dataclass(frozen=True)
class SourceNetwork:
    """The source network with its own readout: nothing is trained, no label is read.

    Args:
        statistics: of BatchNorm: "source" leaves the network as it is; "target" takes mean and variance of the new
            training images.
        prior: with "target", the source's statistics count as much as so many images do; at least 0.
    Source: Schneider et al. 2020; Nado et al. 2020 (prior 0). Deviation: the statistics are of the training images,
        taken once, and not of the images that are to be classified.
    """

    statistics: Annotated[str, OneOf(("source", "target"))] = "source"
    prior: Annotated[float, Real(0)] = 0.0

    head_start: ClassVar[str] = "source"

    @property
    def name(self) -> str:
        """What tables call it."""
        return NO_ADAPTATION if self.statistics == "source" else BN_STATISTICS

    def settings(self) -> dict[str, object]:
        """Plain values by name, for records."""
        return {"statistics": self.statistics, "prior": float(self.prior)}

    @checked(
        backbone=Is(Chain), train=Is(Split), num_classes=Whole(2), seed=SEED, image_size=IMAGE_SIZE.or_none()
    )
    def fit(
        self, backbone: Chain, train: Split, num_classes: int, seed: int = 0, image_size: int | None = None
    ) -> FittedSource:
        """Takes the training images' statistics, if that is asked for, see `Method`.

        Raises:
            ValueError: no pretrained readout of so many classes.
        """
        head = backbone.source_head
        if head is None or head.out_features != num_classes:
            has = "has none" if head is None else f"has one of {head.out_features} classes"
            raise ValueError(f"{self.name} needs a pretrained readout of {num_classes} classes; {backbone.name} {has}")
        if self.statistics == "source":
            return FittedSource(frozen_copy(backbone), image_size)
        return FittedSource(with_statistics(backbone, train.images, self.prior, image_size), image_size)


@dataclass(frozen=True)
class FittedSource:
    """A frozen network with its pretrained readout."""

    backbone: Chain = field(repr=False)
    image_size: int | None = None

    params: ClassVar[int] = 0

    def logits(self, split: Split) -> torch.Tensor:
        """Logits (n, classes) of a split's images, on the CPU."""
        chain, size = self.backbone, self.image_size

        def network(images: torch.Tensor) -> torch.Tensor:
            return chain.source_head(chain(network_input(chain, images, size)))

        return logits_of(network, split.images, device=chain.mean.device)


@checked(images=Is((torch.Tensor, StreamedImages)), prior=Real(0), image_size=Whole(1).or_none())
@torch.no_grad()
def with_statistics(
    backbone: Chain, images: torch.Tensor | StreamedImages, prior: float = 0.0, image_size: int | None = None
) -> Chain:
    """A copy of the backbone with the images' BatchNorm statistics; one without BatchNorm comes back as it was.

    Each BatchNorm mixes the source's statistics with those of what arrives, and computes with the mixture: the next
    one sees what it will see in the adapted network. Mixtures of several batches are averaged.

    Args:
        images: uint8 (n, 3, H, W), not augmented.
        prior: the source's statistics count as much as so many images do; at least 0.
    Raises:
        ValueError: a BatchNorm to which a batch brings one value per channel, which has no variance.
    Source: Schneider et al. 2020, whose layer mixes with weights prior : number of images.
    """
    network, weight = frozen_copy(backbone), prior / (prior + len(images))
    source = {
        norm: (norm.running_mean.clone(), norm.running_var.clone())
        for norm in network.modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats
    }
    mixtures: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {norm: [] for norm in source}

    def mix(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)  # (channels, values)
        if values.shape[1] < 2:
            raise ValueError("BatchNorm statistics need more than one value per channel: give more images")
        new_variance, new_mean = torch.var_mean(values, 1)
        norm.running_mean, norm.running_var = (
            torch.lerp(new, old, weight) for new, old in zip((new_mean, new_variance), source[norm], strict=True)
        )
        mixtures[norm].append((norm.running_mean, norm.running_var))

    hooks = [norm.register_forward_pre_hook(mix) for norm in source]
    for rows in torch.arange(len(images), device=images.device).tensor_split(-(-len(images) // _BATCH)):
        network(network_input(network, images[rows], image_size))
    for hook in hooks:
        hook.remove()
    for norm, pairs in mixtures.items():
        norm.running_mean, norm.running_var = (torch.stack(tensors).mean(0) for tensors in zip(*pairs, strict=True))
    return network


@checked
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
