"""Corruptions by noise: normal, Poisson, impulses and speckles; each image draws from a generator of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

Generators = Sequence[np.random.Generator]


def each(generators: Generators, draw: Callable[[np.random.Generator], np.ndarray], x: torch.Tensor) -> torch.Tensor:
    """Draw for every image with its own generator on the CPU, and move the draws to where x is; (n, ...)."""
    return torch.from_numpy(np.stack([draw(generator) for generator in generators])).to(x.device)


def gaussian_noise(x: torch.Tensor, scale: float, generators: Generators) -> torch.Tensor:
    """Add normal noise of standard deviation `scale`; x float64 (n, 3, H, W) in [0, 1], one generator per image."""
    return x + scale * each(generators, lambda generator: generator.standard_normal(x.shape[1:]), x)


def shot_noise(x: torch.Tensor, photons: float, generators: Generators) -> torch.Tensor:
    """Count photons: Poisson draws of mean `x * photons`, over `photons`."""
    means = iter((x * photons).cpu().numpy())
    return each(generators, lambda generator: generator.poisson(next(means)), x) / photons


def impulse_noise(x: torch.Tensor, amount: float, generators: Generators) -> torch.Tensor:
    """Set a share `amount` of all values, each channel on its own, to 0 or 1, equally likely."""
    uniform = each(generators, lambda generator: generator.random(x.shape[1:]), x)
    return torch.where(uniform < amount / 2, 0.0, torch.where(uniform < amount, 1.0, x))


def speckle_noise(x: torch.Tensor, scale: float, generators: Generators) -> torch.Tensor:
    """Add normal noise of standard deviation `scale * x`."""
    return x + x * scale * each(generators, lambda generator: generator.standard_normal(x.shape[1:]), x)
