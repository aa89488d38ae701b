"""Corruptions of images at five severities: the 15 common ones of CIFAR-10-C and ImageNet-C, and their 4 extra ones.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, and the parameters of its published generation scripts: CIFAR-10-C's for images of up to 64 pixels,
ImageNet-C's for larger ones. As there, results are cut, not rounded, to 8 bits.
Deviations: noise is seeded per image, so that it does not depend on how images are grouped. Frost is drawn, not
photographed. What filters compute counts as a level from 1e-6 below it on, so that a float's last digit does not
decide. Smaller ones stand in the functions: `glass_blur`, `motion_blur`, `elastic_transform`, `spatter`, `frost`.
Compared: given our draws, the published formulas and the library imagecorruptions-imaug 1.1.5 make the same images of
photographs of 32, 96 and 224 pixels but for one level in places (two in glass blur and three in snow, which are cut
between steps, and more in spatter where noise exceeds 1), and but for frost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from subtuning_lab.data.arrays import check_uint8_rgb
from subtuning_lab.data.corruptions.blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from subtuning_lab.data.corruptions.digital import contrast, elastic_transform, jpeg_compression, pixelate, saturate
from subtuning_lab.data.corruptions.filters import SLACK
from subtuning_lab.data.corruptions.noise import Generators, gaussian_noise, impulse_noise, shot_noise, speckle_noise
from subtuning_lab.data.corruptions.weather import brightness, fog, frost, snow, spatter
from subtuning_lab.utils.validation import Is, OneOf, Whole, checked

LARGEST_SMALL_SIZE = 64  # pixels: up to here CIFAR-10-C's parameters hold
SEVERITIES = (1, 2, 3, 4, 5)
_CHUNK_BYTES = 2**21  # of float64 values at a time: more of them leave a CPU's caches
_CHUNKS_OF_GPU = 64  # times as many at a time on a GPU, whose kernels are slow to start

Parameter = float | tuple[float, ...]


@dataclass(frozen=True)
class Corruption:
    """A formula with its parameter at severity 1 to 5 for small and large images.

    Args:
        formula: of images in [0, 1] (float64), or of their levels (uint8).
        small, large: parameters.
        slack: how far below a level, of 255, a result still counts as that level when it is cut to 8 bits.
        of_levels: whether the formula takes and gives levels.
    """

    formula: Callable[[torch.Tensor, Parameter, Generators], torch.Tensor]
    small: tuple[Parameter, ...]
    large: tuple[Parameter, ...]
    slack: float = SLACK
    of_levels: bool = False


# fmt: off
_CORRUPTIONS = {
    "gaussian_noise": Corruption(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38), 0.0),
    "shot_noise": Corruption(shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3), 0.0),
    "impulse_noise": Corruption(impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27), 0.0),
    "defocus_blur": Corruption(
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(
        glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        motion_blur,
        ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(
        zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": Corruption(
        snow,
        (
            (0.10, 0.2, 1.00, 0.60, 8, 3, 0.95),
            (0.10, 0.2, 1.00, 0.50, 10, 4, 0.90),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.90),
            (0.25, 0.3, 2.25, 0.60, 12, 6, 0.85),
            (0.30, 0.3, 1.25, 0.65, 14, 12, 0.80),
        ),
        (
            (0.10, 0.3, 3.0, 0.50, 10, 4, 0.80),
            (0.20, 0.3, 2.0, 0.50, 12, 4, 0.70),
            (0.55, 0.3, 4.0, 0.90, 12, 8, 0.70),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(
        frost,
        ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": Corruption(
        fog,
        ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
        ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
    ),
    "brightness": Corruption(brightness, (0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5), 0.0),
    "contrast": Corruption(contrast, (0.75, 0.50, 0.40, 0.30, 0.15), (0.40, 0.30, 0.20, 0.10, 0.05), 0.0),
    "elastic_transform": Corruption(
        elastic_transform,
        (
            (0.0, 0.0, 2.56, 32),
            (1.6, 6.4, 2.24, 32),
            (2.56, 1.92, 1.92, 32),
            (3.2, 1.28, 1.6, 32),
            (3.2, 0.96, 0.96, 32),
        ),
        (
            (488.0, 170.8, 24.4, 224),
            (488.0, 19.52, 48.8, 224),
            (12.2, 2.44, 4.88, 224),
            (17.08, 2.44, 4.88, 224),
            (29.28, 2.44, 4.88, 224),
        ),
    ),
    "pixelate": Corruption(pixelate, (0.95, 0.90, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25), of_levels=True),
    "jpeg_compression": Corruption(jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7), of_levels=True),
    "speckle_noise": Corruption(speckle_noise, (0.06, 0.10, 0.12, 0.16, 0.20), (0.15, 0.20, 0.35, 0.45, 0.60), 0.0),
    "gaussian_blur": Corruption(gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "spatter": Corruption(
        spatter,
        (
            (0.62, 0.1, 0.7, 0.70, 0.5, 0),
            (0.65, 0.1, 0.8, 0.70, 0.5, 0),
            (0.65, 0.3, 1.0, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    ),
    "saturate": Corruption(
        saturate,
        ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)),
        ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2)),
        0.0,
    ),
}
# fmt: on

#: the 15 that published mean errors are over, in their order
COMMON_CORRUPTIONS = tuple(_CORRUPTIONS)[:15]
#: the 4 that are published beside them, for choosing settings
EXTRA_CORRUPTIONS = tuple(_CORRUPTIONS)[15:]
#: the four families of the paper, each with one extra corruption at its end
CORRUPTION_FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
        "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
        "weather": ("snow", "frost", "fog", "brightness", "spatter"),
        "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
    }
)


def corruption_names() -> tuple[str, ...]:
    """Names that `corrupt` knows: the common ones, then the extra ones."""
    return tuple(_CORRUPTIONS)


_NAME, _SEVERITY = OneOf(tuple(_CORRUPTIONS)), Whole(SEVERITIES[0], SEVERITIES[-1])


def check_corruption(name: str, severity: int) -> None:
    """Raise TypeError or ValueError unless `corrupt` knows the name and the severity is a whole number from 1 to 5."""
    _NAME.check("corruption", name)
    _SEVERITY.check(f"severity of {name}", severity)


def parse_corruptions(text: str) -> list[tuple[str, int]]:
    """Read "name@severity", or several of these with "+" between them, into (name, severity) each.

    Raises:
        ValueError: a corruption that is unknown, or has a severity outside 1 to 5.
    """
    corruptions = []
    for name, _, severity in (piece.partition("@") for piece in text.split("+") if piece):
        _NAME.check("corruption", name)
        if severity not in map(str, SEVERITIES):
            raise ValueError(f"severity of {name} is {severity!r}; it must be {_SEVERITY.allowed}")
        corruptions.append((name, int(severity)))
    return corruptions


@checked(name=_NAME, severity=_SEVERITY, seed=Whole(), positions=Is(torch.Tensor, none=True))
def corrupt(
    images: torch.Tensor, name: str, severity: int, seed: int = 0, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Corrupt images; what happens to one depends on itself, the seed and its position alone.

    Args:
        images: uint8 tensor (n, 3, H, W), on any device that computes in float64.
        name: one of `corruption_names()`.
        severity: 1 to 5.
        seed: of the noise, not negative.
        positions: int64 (n,), what seeds each image's noise beside `seed`; None means 0 .. n-1.
    Returns:
        New uint8 tensor (n, 3, H, W) on the same device.
    """
    check_uint8_rgb(images)
    if positions is not None and (len(positions) != len(images) or (positions < 0).any()):
        raise ValueError(f"positions must be {len(images)} indices, none negative, got {tuple(positions.shape)}")
    chosen = _CORRUPTIONS[name]
    parameter = (chosen.small if max(images.shape[2:]) <= LARGEST_SMALL_SIZE else chosen.large)[severity - 1]
    where = range(len(images)) if positions is None else positions.tolist()
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    room = _CHUNK_BYTES * (1 if images.device.type == "cpu" else _CHUNKS_OF_GPU)
    chunk = max(1, room // (8 * images[0].numel())) if len(images) else 1
    for start in range(0, len(images), chunk):
        rows = slice(start, start + chunk)
        x = images[rows].contiguous()
        x = x if chosen.of_levels else x.double() / 255
        result = chosen.formula(x, parameter, Generators(seed, where[rows], images.device))
        if not chosen.of_levels:
            result = (result.clamp(0.0, 1.0) * 255 + chosen.slack).to(torch.uint8)
        out[rows] = result
    return out
