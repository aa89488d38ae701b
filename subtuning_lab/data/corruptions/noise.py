"""Corruptions by noise: normal, Poisson, impulses and speckles; each image draws from a generator of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Generators:
    """A random generator for every image, made when it is first asked for: most corruptions are not random.

    Args:
        seed: not negative.
        positions: one per image; the image's generator depends on the seed and its position alone.
        device: where draws are needed; they are made on the CPU, so that they are the same everywhere.
    """

    seed: int
    positions: Sequence[int]
    device: torch.device

    @cached_property
    def _all(self) -> list[np.random.Generator]:
        return [np.random.default_rng((self.seed, position)) for position in self.positions]

    def __iter__(self) -> Iterator[np.random.Generator]:
        return iter(self._all)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal draws; float64 (n, *shape)."""
        return self._filled(shape, lambda generator, out: generator.standard_normal(out=out))

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform draws from [0, 1); float64 (n, *shape)."""
        return self._filled(shape, lambda generator, out: generator.random(out=out))

    def angles(self, low: float, high: float) -> np.ndarray:
        """One angle per image, in degrees; float64 (n,)."""
        return np.array([generator.uniform(low, high) for generator in self])

    def _filled(
        self, shape: tuple[int, ...], fill: Callable[[np.random.Generator, np.ndarray], object]
    ) -> torch.Tensor:
        draws = np.empty((len(self.positions), *shape))
        for generator, out in zip(self, draws, strict=True):
            fill(generator, out)
        return torch.from_numpy(draws).to(self.device)


def gaussian_noise(x: torch.Tensor, scale: float, generators: Generators) -> torch.Tensor:
    """Add normal noise of standard deviation `scale`; x float64 (n, 3, H, W) in [0, 1], one generator per image."""
    return x + scale * generators.normal(*x.shape[1:])


def shot_noise(x: torch.Tensor, photons: float, generators: Generators) -> torch.Tensor:
    """Count photons: Poisson draws of mean `x * photons`, over `photons`."""
    means = (x * photons).cpu().numpy()
    counts = [generator.poisson(mean) for generator, mean in zip(generators, means, strict=True)]
    return torch.from_numpy(np.stack(counts)).to(x.device) / photons


def impulse_noise(x: torch.Tensor, amount: float, generators: Generators) -> torch.Tensor:
    """Set a share `amount` of all values, each channel on its own, to 0 or 1, equally likely."""
    uniform = generators.uniform(*x.shape[1:])
    return torch.where(uniform < amount / 2, 0.0, torch.where(uniform < amount, 1.0, x))


def speckle_noise(x: torch.Tensor, scale: float, generators: Generators) -> torch.Tensor:
    """Add normal noise of standard deviation `scale * x`."""
    return x + x * scale * generators.normal(*x.shape[1:])
