"""Corruptions of images at five severities: those of CIFAR-10-C and ImageNet-C that are plain formulas.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, and the parameters of its published generation scripts: CIFAR-10-C's for images of up to 64 pixels,
ImageNet-C's for larger ones. As there, results are cut, not rounded, to 8 bits.
Deviation: noise is seeded per image, so that it does not depend on how images are grouped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

LARGEST_SMALL_SIZE = 64  # pixels: up to here CIFAR-10-C's parameters hold
SEVERITIES = (1, 2, 3, 4, 5)
_CHUNK_BYTES = 2**25  # of float64 values at a time

Formula = Callable[[np.ndarray, float | tuple[float, float], Sequence[np.random.Generator]], np.ndarray]


def gaussian_noise(x: np.ndarray, scale: float, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Add normal noise of standard deviation `scale`; x float64 (n, 3, H, W) in [0, 1], one generator per image."""
    return x + scale * _each(generators, lambda generator, _: generator.standard_normal(x.shape[1:]), x)


def shot_noise(x: np.ndarray, photons: float, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Count photons: Poisson draws of mean `x * photons`, over `photons`."""
    return _each(generators, lambda generator, image: generator.poisson(image * photons), x) / photons


def impulse_noise(x: np.ndarray, amount: float, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Set a share `amount` of all values, each channel on its own, to 0 or 1, equally likely."""
    uniform = _each(generators, lambda generator, _: generator.random(x.shape[1:]), x)
    return np.where(uniform < amount / 2, 0.0, np.where(uniform < amount, 1.0, x))


def speckle_noise(x: np.ndarray, scale: float, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Add normal noise of standard deviation `scale * x`."""
    return x + x * scale * _each(generators, lambda generator, _: generator.standard_normal(x.shape[1:]), x)


def brightness(x: np.ndarray, shift: float, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Raise HSV's value by `shift`, up to 1: hue and saturation stay, so all channels grow by one factor."""
    value = x.max(axis=1, keepdims=True)
    raised = np.minimum(value + shift, 1.0)
    factor = raised / np.where(value > 0, value, 1.0)
    return np.where(value > 0, x * factor, raised)  # black has no saturation and becomes grey


def contrast(x: np.ndarray, factor: float, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Shrink each channel's distance from its mean over the image by `factor`."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    return (x - mean) * factor + mean


def saturate(x: np.ndarray, scale_shift: tuple[float, float], generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Map HSV's saturation s to `s * scale + shift`, cut to [0, 1].

    Grey has hue 0, so that a positive shift tints it red, as in the published images.
    """
    scale, shift = scale_shift
    value = x.max(axis=1, keepdims=True)
    chroma = value - x.min(axis=1, keepdims=True)
    saturation = chroma / np.where(value > 0, value, 1.0)
    wanted = np.clip(saturation * scale + shift, 0.0, 1.0)
    depth = (value - x) / np.where(chroma > 0, chroma, 1.0)  # 0 for the largest channel, 1 for the smallest
    depth = np.where(chroma > 0, depth, np.array([0.0, 1.0, 1.0]).reshape(1, 3, 1, 1))
    return value * (1.0 - wanted * depth)


def _each(
    generators: Sequence[np.random.Generator],
    draw: Callable[[np.random.Generator, np.ndarray], np.ndarray],
    x: np.ndarray,
) -> np.ndarray:
    """Draw for every image with its own generator; (n, 3, H, W)."""
    return np.stack([draw(generator, image) for generator, image in zip(generators, x, strict=True)])


@dataclass(frozen=True)
class Corruption:
    """A formula on images in [0, 1] with its parameter at severity 1 to 5 for small and large images."""

    formula: Formula
    small: tuple[float | tuple[float, float], ...]
    large: tuple[float | tuple[float, float], ...]


_CORRUPTIONS = {
    "gaussian_noise": Corruption(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption(shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": Corruption(speckle_noise, (0.06, 0.10, 0.12, 0.16, 0.20), (0.15, 0.20, 0.35, 0.45, 0.60)),
    "brightness": Corruption(brightness, (0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(contrast, (0.75, 0.50, 0.40, 0.30, 0.15), (0.40, 0.30, 0.20, 0.10, 0.05)),
    "saturate": Corruption(
        saturate,
        ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)),
        ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2)),
    ),
}


def corruption_names() -> tuple[str, ...]:
    """Names that `corrupt` knows."""
    return tuple(_CORRUPTIONS)


def check_corruption(name: str, severity: int) -> None:
    """Raise ValueError unless `corrupt` knows the name and the severity is an int from 1 to 5."""
    if name not in _CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}; allowed are {', '.join(_CORRUPTIONS)}")
    if isinstance(severity, bool) or not isinstance(severity, int) or severity not in SEVERITIES:
        raise ValueError(f"severity of {name!r} must be an int from 1 to 5, got {severity!r}")


def corrupt(
    images: torch.Tensor, name: str, severity: int, seed: int = 0, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Corrupt images; what happens to one depends on itself, the seed and its position alone.

    Args:
        images: uint8 tensor (n, 3, H, W).
        name: one of `corruption_names()`.
        severity: 1 to 5.
        seed: of the noise, not negative.
        positions: int64 (n,), what seeds each image's noise beside `seed`; None means 0 .. n-1.
    Returns:
        New uint8 tensor (n, 3, H, W).
    Raises:
        ValueError: unknown name, severity outside 1 to 5, or images of another dtype or shape.
    """
    check_corruption(name, severity)
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (n, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    chosen = _CORRUPTIONS[name]
    parameter = (chosen.small if max(images.shape[2:]) <= LARGEST_SMALL_SIZE else chosen.large)[severity - 1]
    where = range(len(images)) if positions is None else positions.tolist()
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    chunk = max(1, _CHUNK_BYTES // (8 * images[0].numel())) if len(images) else 1
    for start in range(0, len(images), chunk):
        x = images[start : start + chunk].numpy() / 255.0  # float64
        generators = [np.random.default_rng((seed, position)) for position in where[start : start + chunk]]
        result = np.clip(chosen.formula(x, parameter, generators), 0.0, 1.0) * 255
        out[start : start + chunk] = torch.from_numpy(result.astype(np.uint8))
    return out
