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
Border = Literal["edge", "reflect", "symmetric"]  # as in numpy.pad: repeat the edge, mirror at it, mirror with it


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
    height, width = (torch.from_numpy(np.arange(size)) for size in x.shape[-2:])
    height, width = (
        torch.from_numpy(np.pad(where.numpy(), amount, mode=border)).to(x.device)
        for where, amount in ((height, rows), (width, columns))
    )
    return x.index_select(-2, height).index_select(-1, width)


def correlate(x: torch.Tensor, kernel: np.ndarray, border: Border = "reflect") -> torch.Tensor:
    """Slide one kernel over every image, as OpenCV's `filter2D`; through Fourier transforms, so any size is cheap.

    Args:
        x: float64 (..., H, W).
        kernel: (odd, odd).
        border: what lies beyond the image.
    Returns:
        float64 (..., H, W).
    """
    high, wide = (size // 2 for size in kernel.shape)
    padded = pad(x, (high, high), (wide, wide), border)
    turned = torch.from_numpy(np.ascontiguousarray(kernel[::-1, ::-1]).astype(np.float64)).to(x.device)
    size = tuple(next_fast_len(side, real=True) for side in padded.shape[-2:])
    product = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(turned, s=size)
    whole = torch.fft.irfft2(product, s=size)[..., : padded.shape[-2], : padded.shape[-1]]
    return whole[..., 2 * high :, 2 * wide :]  # what wraps around is cut off


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
