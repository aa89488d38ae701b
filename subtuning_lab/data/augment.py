"""Batched augmentation on the device, drawn per image from a generator that knows only seed, epoch and batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import resize

from subtuning_lab.utils.validation import Is, OneOf, Whole, checked

AUGMENTATIONS: dict[str, str] = {
    "none": "images as they are",
    "flip": "mirrored left to right with probability 1/2",
    "shift": "moved by up to 1/8 of the side, edges repeated",
    "shift_flip": "both of these, the usual choice for small photographs",
    "crop_flip": "a random crop of 35 to 100 % of the area, resized, and flipped: usual for ImageNet networks",
}
_MIN_AREA, _MAX_LOG_RATIO, _MAX_SHIFT = 0.35, math.log(4 / 3), 0.25  # a shift of 0.25 is 1/8 of the side [-1, 1]


def resize_to(images: torch.Tensor, size: int | None) -> torch.Tensor:
    """Images (batch, 3, height, width) at size x size pixels, antialiased; None leaves them as they are."""
    if size is None or tuple(images.shape[-2:]) == (size, size):
        return images
    return resize(images, [size, size], antialias=True)


@checked(name=OneOf(tuple(AUGMENTATIONS)), size=Whole(1, none=True), generator=Is(torch.Generator))
def augment(images: torch.Tensor, name: str, size: int | None, generator: torch.Generator) -> torch.Tensor:
    """One random view of every image.

    Args:
        images: float (batch, 3, height, width).
        name: one of `AUGMENTATIONS`.
        size: height and width of the result in pixels; None keeps the images' own.
        generator: the only source of chance; on the CPU, so that every device draws the same views.
    Returns:
        Float (batch, 3, size, size).
    """
    if name == "none":
        return resize_to(images, size)
    if size is not None:  # sampling alone would alias: shrink first, to what the smallest crop still fills
        crop = _MIN_AREA**-0.5 if name == "crop_flip" else 1.0
        images = resize_to(images, min(math.ceil(crop * size), min(images.shape[-2:])))
    theta = _affine(name, len(images), generator).to(images)  # (batch, 2, 3)
    height, width = (size, size) if size else images.shape[-2:]
    grid = F.affine_grid(theta, [len(images), 3, height, width], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _affine(name: str, n: int, generator: torch.Generator) -> torch.Tensor:
    """Maps from output to input coordinates, both in [-1, 1], shape (n, 2, 3)."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    scale_x = scale_y = torch.ones(n)
    limit_x = limit_y = torch.full((n,), _MAX_SHIFT if "shift" in name else 0.0)
    if name == "crop_flip":
        area, ratio = uniform(_MIN_AREA, 1.0), uniform(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        scale_x, scale_y = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        limit_x, limit_y = 1 - scale_x, 1 - scale_y
    shift_x, shift_y = uniform(-1, 1) * limit_x, uniform(-1, 1) * limit_y
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if "flip" in name else torch.ones(n)
    zero = torch.zeros(n)
    rows = [torch.stack([scale_x * mirror, zero, shift_x], 1), torch.stack([zero, scale_y, shift_y], 1)]
    return torch.stack(rows, 1)
