"""From images to what a network says of them: the one way that training, scoring, merging and theory all take."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from subtuning_lab.data.augment import resize_to
from subtuning_lab.nets.chain import Chain, check_tensors

if TYPE_CHECKING:
    from subtuning_lab.data.images import StreamedImages

BATCH = 256  # images at a time where nothing is trained
_LARGE = 2  # times the pixels that a backbone was made for: from here on the cost is said
Layout = TypeVar("Layout", nn.Module, torch.Tensor)


def network_input(
    backbone: Chain, images: torch.Tensor, image_size: int | None = None, layout: torch.memory_format | None = None
) -> torch.Tensor:
    """Images as the backbone wants them: on its device, in its dtype, resized, normalized, in its fastest layout.

    Args:
        backbone: says device, dtype and normalization.
        images: uint8, or float in [0, 1], (batch, 3, height, width), on any device.
        image_size: side in pixels to resize to; None keeps the images' own size.
        layout: in memory; by default that of `layout_of`.

    Returns:
        Float (batch, 3, height, width).
    """
    images = images.to(backbone.mean.device)
    scaled = images.to(backbone.mean.dtype) / (255 if images.dtype == torch.uint8 else 1)
    return fast_layout(backbone.normalize(resize_to(scaled, image_size)), layout or layout_of(backbone))


def layout_of(backbone: Chain, mixed: bool = False) -> torch.memory_format:
    """The layout in memory that a network is fastest in: channels last, which float32 convolutions are made for.

    On a GPU cuDNN is slow there at depthwise convolutions in float32, where torch has fast ones of its own for the
    usual layout; `mixed` says that products are in bf16 instead.
    """
    depthwise = any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in backbone.modules())
    slow = backbone.mean.is_cuda and depthwise and not mixed
    return torch.contiguous_format if slow or backbone.mean.dtype == torch.float64 else torch.channels_last


def fast_layout(value: Layout, layout: torch.memory_format) -> Layout:
    """A module or images (batch, channels, height, width) in a layout; the usual one is left as it is."""
    return value if layout is torch.contiguous_format else value.to(memory_format=layout)


@torch.no_grad()
def check_images(backbone: Chain, images: torch.Tensor, image_size: int | None = None) -> None:
    """Sends images (batch, 3, height, width) through the backbone, so that what doesn't fit fails before any training.

    Raises:
        ValueError: tensors that spoil a training (see `check_tensors`), a size that the backbone can't take, or
            features that are not finite ones of (batch, num_features).
    Warns:
        UserWarning: images much larger than those that the backbone was made for, where nobody asked for their size.
    """
    check_tensors(backbone)
    given = (image_size,) * 2 if image_size else tuple(images.shape[-2:])
    size, wanted = given[-1], backbone.input_size[-1]
    try:
        features = backbone(network_input(backbone, images, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        across = f"{given[0]} x {given[1]}" if given[0] != given[1] else size
        advice = (
            f"; it was made for {wanted}: give Recipe(image_size={wanted}), or load a vision transformer with "
            f"img_size={size} or dynamic_img_size=True"
        )
        told = f"{backbone.name} can't take images of {across} pixels ({error})"
        raise ValueError(told + advice * (given != backbone.input_size[1:])) from error
    if tuple(features.shape) != (len(images), backbone.num_features) or not features.isfinite().all():
        raise ValueError(
            f"{backbone.name} gives features of shape {tuple(features.shape)} that are "
            f"{'' if features.isfinite().all() else 'not '}finite; they must be finite ones of "
            f"({len(images)}, {backbone.num_features})"
        )
    times = images.shape[-2] * images.shape[-1] / (backbone.input_size[1] * backbone.input_size[2])
    if image_size is None and times >= _LARGE:
        made_for = f"{backbone.name} was made for {wanted} pixels and gets {size}"
        warnings.warn(
            f"{made_for}: about {times:.0f} times the work; Recipe(image_size={wanted}) avoids it", stacklevel=4
        )


@torch.no_grad()
def logits_of(
    network: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor | StreamedImages,
    batch_size: int = BATCH,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """What a network gives for all images, a batch at a time.

    Args:
        network: maps images (batch, 3, height, width) to logits, or anything else with a row per image.
        images: (n, 3, height, width), of any kind that the network takes.
        batch_size: images at a time.
        device: where the network computes; by default where its first parameter or buffer lies.

    Returns:
        Logits (n, classes) on the CPU, in the network's dtype.
    """
    if device is None:
        device = next(chain(network.parameters(), network.buffers())).device
    batches = torch.arange(len(images), device=images.device).split(batch_size)
    return torch.cat([network(images[rows].to(device)).cpu() for rows in batches])


def accuracy_of(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images, in [0, 1], whose largest logit is the label's; NaN where any logit is not finite.

    Args:
        logits: (n, classes); those of a diverged network would all count as class 0.
        labels: int64 (n,).
    """
    if not logits.isfinite().all():
        return float("nan")
    return float((logits.argmax(-1).cpu() == labels.cpu()).double().mean())
