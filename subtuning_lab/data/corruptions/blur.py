"""Corruptions by blur: out of focus, through glass, in motion, zooming, and by a normal curve.

All take x float64 (n, 3, H, W) in [0, 1], a severity's parameter, and one generator per image.

Source: Hendrycks and Dietterich (ICLR 2019) and the published scripts, which use scikit-image, OpenCV, SciPy and
ImageMagick; here the same kernels are applied to all images at once.
"""

from __future__ import annotations

import numpy as np
import scipy.ndimage
import torch

from subtuning_lab.data.corruptions.filters import along_axes, cut, gaussian_filter, mirrored_filter, smear, zoom_matrix
from subtuning_lab.data.corruptions.noise import Generators


def gaussian_blur(x: torch.Tensor, sigma: float, generators: Generators) -> torch.Tensor:
    """Blur by a normal curve of standard deviation `sigma` pixels, cut at four of them; the edge repeats."""
    return gaussian_filter(x, sigma)


def defocus_blur(x: torch.Tensor, radius_sigma: tuple[float, float], generators: Generators) -> torch.Tensor:
    """Blur by a disk of `radius` pixels whose rim a normal curve of `sigma` pixels softens."""
    return mirrored_filter(x, disk(*radius_sigma))


def disk(radius: float, sigma: float) -> np.ndarray:
    """A disk that sums to 1, softened by a normal curve 3 pixels wide (5 beyond a radius of 8); (odd, odd).

    Source: the published function of this name, without the rows and columns of zeros around the disk.
    """
    reach = 8 if radius <= 8 else int(radius)
    steps, half = np.arange(-reach, reach + 1), 1 if radius <= 8 else 2
    sharp = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.float32)
    curve = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    curve = (curve / curve.sum()).astype(np.float32)
    soft = sharp / sharp.sum()
    for axis in (0, 1):
        soft = scipy.ndimage.correlate1d(soft, curve, axis=axis, mode="mirror")
    used = int(np.abs(steps[soft.any(axis=0)]).max())
    return soft[reach - used : reach + used + 1, reach - used : reach + used + 1]


def glass_blur(x: torch.Tensor, parameter: tuple[float, int, int], generators: Generators) -> torch.Tensor:
    """Blur by `sigma` pixels, let pixels take the place of near ones `rounds` times, and blur again.

    In each round every pixel that is more than `reach` from the border takes the value of one at most `reach` away,
    from the last row and column to the first; values that have been taken already are taken on.

    Source: the published loop means to swap two pixels, but what it assigns are views of one array, so that the
        first pixel becomes a copy of the second and the second stays. Copies are what the published images show,
        and what this does.
    """
    sigma, reach, rounds = parameter
    blurred = cut(gaussian_filter(x, sigma))
    source = _taken_from(x, reach, rounds, generators)
    moved = blurred.flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1)).view_as(x)
    return gaussian_filter(moved, sigma)


def _taken_from(x: torch.Tensor, reach: int, rounds: int, generators: Generators) -> torch.Tensor:
    """Index of the pixel whose value each pixel has after all rounds; int64 (n, H * W)."""
    height, width = x.shape[2:]
    rows, columns = max(0, height - 2 * reach), max(0, width - 2 * reach)
    place = torch.arange(height * width, device=x.device).view(height, width)
    inside = torch.zeros(height, width, dtype=torch.bool, device=x.device)
    inner = (slice(reach + 1, reach + 1 + rows), slice(reach + 1, reach + 1 + columns))
    inside[inner] = True
    shape = (rounds, rows, columns, 2)
    steps = np.stack([generator.integers(-reach, reach, shape, dtype=np.int8) for generator in generators])
    steps = torch.from_numpy(steps).to(x.device).long()
    source = place.flatten().expand(len(x), -1)
    for number in range(rounds):
        target = place.expand(len(x), -1, -1).clone()
        target[:, *inner] += steps[:, number, ..., 0] * width + steps[:, number, ..., 1]
        taken = inside.flatten()[target.flatten(1)] & (target.flatten(1) > place.flatten())
        source = source.gather(1, _followed(target.flatten(1), taken))
    return source


def _followed(target: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Follow pointers (n, pixels) on as long as their targets are `taken` values, twice as far each time."""
    while taken.any():
        further = torch.where(taken, target.gather(1, target), target)
        taken = taken & taken.gather(1, target)
        target = further
    return target


def motion_blur(x: torch.Tensor, radius_sigma: tuple[int, float], generators: Generators) -> torch.Tensor:
    """Smear along a line at a random angle of -45 to 45 degrees.

    Source: ImageMagick's motion blur, which the published scripts call. Equal: the kernel, its way over the pixels,
        the repeated edge, and that the result is cut to 8 bits. Not equal: ImageMagick sums in 16 bits, so that some
        values differ by one level: 0.2 to 1.2 % of them when compared with ImageMagick 6.9.11.
    """
    return smear(x, *radius_sigma, generators.angles(-45, 45))


def zoom_blur(x: torch.Tensor, stop_step: tuple[float, float], generators: Generators) -> torch.Tensor:
    """Average the image and its middle enlarged by each of `numpy.arange(1, stop, step)`."""
    total = x.clone()
    factors = np.arange(1, *stop_step)
    for factor in factors.tolist():
        total += along_axes(x, *(zoom_matrix(size, factor) for size in x.shape[2:]))
    return total / (len(factors) + 1)
