"""Filters on batches of images: along an axis as matrices, in the plane through Fourier transforms, along paths.

Source: the filters of scipy.ndimage, OpenCV and ImageMagick that the published corruptions are made with.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import scipy.ndimage
import torch
from scipy.fft import next_fast_len

SLACK = 1e-6  # of 255 levels: a filtered flat area must not fall a level short by the last digit of a float
LARGEST_OF_COSINES = 96  # pixels: up to here products with matrices take less time than Fourier transforms
Border = Literal["edge", "reflect"]  # as in numpy.pad: repeat the outer pixels, mirror at them


@lru_cache(maxsize=64)
def gaussian_matrix(size: int, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> torch.Tensor:
    """The matrix that filters `size` values along an axis as `scipy.ndimage.gaussian_filter1d` does.

    Args:
        size: number of values.
        sigma: standard deviation in pixels; 0 leaves values as they are.
        mode: scipy's name of the border.
        truncate: where the kernel ends, in standard deviations.
    Returns:
        float64 (size, size); row i holds the weights of output i.
    """
    identity = np.eye(size)
    if sigma == 0:
        return torch.from_numpy(identity)
    return torch.from_numpy(scipy.ndimage.gaussian_filter1d(identity, sigma, axis=0, mode=mode, truncate=truncate))


@lru_cache(maxsize=64)
def zoom_matrix(size: int, factor: float) -> torch.Tensor:
    """The matrix that enlarges the middle of `size` values by `factor` and keeps `size` of them.

    Values between are interpolated linearly by `scipy.ndimage.zoom`.

    Returns:
        float64 (size, size); row i holds the weights of output i.
    """
    kept = math.ceil(size / factor)
    first = (size - kept) // 2
    enlarged = scipy.ndimage.zoom(np.eye(size)[first : first + kept], (factor, 1), order=1)
    spare = (len(enlarged) - size) // 2
    return torch.from_numpy(np.ascontiguousarray(enlarged[spare : spare + size]))


def along_axes(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Filter every image by one matrix down its rows and one across its columns.

    Args:
        x: float64 (..., H, W).
        rows: (H', H).
        columns: (W', W).
    Returns:
        float64 (..., H', W').
    """
    return rows.to(x.device) @ (x @ columns.to(x.device).T)


def gaussian_filter(x: torch.Tensor, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> torch.Tensor:
    """Blur every image (..., H, W) as `scipy.ndimage.gaussian_filter` does; see `gaussian_matrix`."""
    return along_axes(x, *(gaussian_matrix(size, sigma, mode, truncate) for size in x.shape[-2:]))


def cut(x: torch.Tensor) -> torch.Tensor:
    """Cut values in [0, 1] to 8 bits, as the published scripts do between two filters; float64 again."""
    return torch.floor(x * 255 + SLACK) / 255


def pad(x: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int], border: Border) -> torch.Tensor:
    """Add (before, after) rows and columns to every image (..., H, W), more than it has if need be."""
    for axis, amount in ((-2, rows), (-1, columns)):
        where = np.pad(np.arange(x.shape[axis]), amount, mode=border)
        x = x.index_select(axis, torch.from_numpy(where).to(x.device))
    return x


def mirrored_filter(x: torch.Tensor, kernel: np.ndarray) -> torch.Tensor:
    """Slide one kernel over every image, mirrored at its outer pixels, as OpenCV's `filter2D`.

    Args:
        x: float64 (..., H, W).
        kernel: (odd, odd), the same when its rows or columns are turned around.
    Returns:
        float64 (..., H, W).
    """
    size = x.shape[-2:]
    if max(size) > LARGEST_OF_COSINES:
        return _by_fourier(x, kernel)
    # Mirrored images are sums of cosines, and a symmetric kernel does nothing to each but multiply it.
    gains = kernel.astype(np.float64)
    for side in size:
        reach = gains.shape[0] // 2
        waves = np.cos(np.pi * np.outer(np.arange(side), np.arange(-reach, reach + 1)) / max(1, side - 1))
        gains = (waves @ gains).T
    back, to = zip(*(cosines(side) for side in size), strict=True)
    return along_axes(along_axes(x, *to) * torch.from_numpy(gains).to(x.device), *back)


@lru_cache(maxsize=32)
def cosines(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines that mirrored signals are sums of, in columns, and the inverse; float64 (size, size) each."""
    steps = np.arange(size)
    waves = np.cos(np.pi * np.outer(steps, steps) / max(1, size - 1))
    return torch.from_numpy(waves), torch.from_numpy(np.linalg.inv(waves))


def _by_fourier(x: torch.Tensor, kernel: np.ndarray) -> torch.Tensor:
    """`mirrored_filter` by Fourier transforms, whose cost grows less with the image."""
    high, wide = (side // 2 for side in kernel.shape)
    padded = pad(x, (high, high), (wide, wide), "reflect")
    size = tuple(next_fast_len(side, real=True) for side in padded.shape[-2:])
    gains = torch.fft.rfft2(torch.from_numpy(kernel.astype(np.float64)).to(x.device), s=size)
    whole = torch.fft.irfft2(torch.fft.rfft2(padded, s=size) * gains, s=size)
    height, width = padded.shape[-2:]
    return whole[..., 2 * high : height, 2 * wide : width]  # what wraps around is cut off


def smear(x: torch.Tensor, radius: int, sigma: float, angles: np.ndarray) -> torch.Tensor:
    """Smear each image along a line of its own: ImageMagick's motion blur, half a normal curve from each pixel on.

    Args:
        x: float64 (n, C, H, W).
        radius: the line has `2 * radius + 1` points a pixel apart, each moved to the nearest pixel.
        sigma: standard deviation of the curve in pixels.
        angles: (n,) in degrees.
    Returns:
        float64 (n, C, H, W); beyond the edge its pixels repeat.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    directions = np.stack([np.sin(np.deg2rad(angles)), np.cos(np.deg2rad(angles))], axis=-1)
    offsets = np.ceil(directions[:, None] * steps[:, None] - 0.5).astype(np.int64)  # (n, steps, 2): rows, columns
    # Few angles differ after rounding: images that share a path are smeared together.
    paths, path_of = np.unique(offsets.reshape(len(x), -1), axis=0, return_inverse=True)
    order = np.argsort(path_of.reshape(-1), kind="stable")
    ends = np.searchsorted(path_of.reshape(-1)[order], np.arange(len(paths) + 1))
    out = torch.empty_like(x)
    for number, path in enumerate(paths.reshape(len(paths), -1, 2)):
        chosen = torch.from_numpy(order[ends[number] : ends[number + 1]]).to(x.device)
        out[chosen] = _along_path(x[chosen], weights, path)
    return out


def _along_path(x: torch.Tensor, weights: np.ndarray, path: np.ndarray) -> torch.Tensor:
    """Weighted sum of the images (n, C, H, W) seen from every point of a path (steps, 2)."""
    height, width = x.shape[-2:]
    before, after = np.maximum(-path.min(axis=0), 0), np.maximum(path.max(axis=0), 0)
    padded = pad(x, (before[0], after[0]), (before[1], after[1]), "edge")
    total = torch.zeros_like(x)
    for weight, (row, column) in zip(weights.tolist(), (path + before).tolist(), strict=True):
        total += weight * padded[..., row : row + height, column : column + width]
    return total
