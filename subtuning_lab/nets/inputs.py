"""From images to what a chain computes on: the one way that training, scoring, merging and theory all take."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from subtuning_lab.data.augment import resize_to
from subtuning_lab.nets.chain import Chain

Layout = TypeVar("Layout", nn.Module, torch.Tensor)


def network_input(backbone: Chain, images: torch.Tensor, image_size: int | None = None) -> torch.Tensor:
    """Images as the backbone wants them: on its device, in its dtype, resized, normalized, in its fastest layout.

    Args:
        backbone: says device, dtype and normalization.
        images: uint8, or float in [0, 1], (batch, 3, height, width), on any device.
        image_size: side in pixels to resize to; None keeps the images' own size.

    Returns:
        Float (batch, 3, height, width).
    """
    images = images.to(backbone.mean.device)
    scaled = images.to(backbone.mean.dtype) / (255 if images.dtype == torch.uint8 else 1)
    return fast_layout(backbone.normalize(resize_to(scaled, image_size)))


def fast_layout(value: Layout) -> Layout:
    """A module or images (batch, channels, height, width), channels last: what float32 convolutions are fastest in."""
    tensor = value if isinstance(value, torch.Tensor) else next(value.parameters(), None)
    return value if tensor is None or tensor.dtype == torch.float64 else value.to(memory_format=torch.channels_last)
