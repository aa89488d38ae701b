"""Digital corruptions: contrast, elastic transforms, pixels, JPEG and saturation.

All take x float64 (n, 3, H, W) in [0, 1], but `pixelate` and `jpeg_compression` take and give uint8 levels; beside it
a severity's parameter, and one generator per image.

Source: Hendrycks and Dietterich (ICLR 2019) and the published scripts.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from subtuning_lab.data.corruptions.filters import SLACK, gaussian_filter
from subtuning_lab.data.corruptions.noise import Generators


def contrast(x: torch.Tensor, factor: float, generators: Generators) -> torch.Tensor:
    """Shrink each channel's distance from its mean over the image by `factor`."""
    # Sums in NumPy's order on every device: the last digit decides where a flat area is cut to 8 bits.
    mean = torch.from_numpy(x.cpu().numpy().mean(axis=(2, 3), keepdims=True)).to(x.device)
    return (x - mean) * factor + mean


def saturate(x: torch.Tensor, scale_shift: tuple[float, float], generators: Generators) -> torch.Tensor:
    """Map HSV's saturation s to `s * scale + shift`, cut to [0, 1].

    Grey has hue 0, so that a positive shift tints it red, as in the published images.
    """
    scale, shift = scale_shift
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    saturation = chroma / torch.where(value > 0, value, 1.0)
    wanted = (saturation * scale + shift).clamp(0.0, 1.0)
    depth = (value - x) / torch.where(chroma > 0, chroma, 1.0)  # 0 for the largest channel, 1 for the smallest
    depth = torch.where(chroma > 0, depth, x.new_tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1))
    return value * (1.0 - wanted * depth)


def elastic_transform(
    x: torch.Tensor, parameter: tuple[float, float, float, float], generators: Generators
) -> torch.Tensor:
    """Move three points of the image by up to `reach`, the rest along with them, then every pixel by smooth noise.

    Args:
        parameter: (amount, sigma, reach, side): the noise is uniform, blurred by `sigma` and multiplied by `amount`.
            All are in pixels of an image whose shorter side is `side`, and grow with the image.
    Source: the published scripts. Not equal: OpenCV rounds the first step's coordinates to 1/32 pixel, here they are
        exact; and the published pixels hold for images of 32 and 224 pixels alone, hence the growth.
    """
    amount, sigma, reach, side = parameter
    height, width = x.shape[2:]
    grown = min(height, width) / side
    moves = reach * grown * (2 * generators.uniform(3, 2) - 1)
    noise = 2 * generators.uniform(2, height, width) - 1
    rows, columns = torch.meshgrid(*(torch.arange(size, device=x.device) for size in (height, width)), indexing="ij")
    grid = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1).to(x.dtype)  # (H, W, 3)
    affine = _back_from(moves, height, width)  # (n, 3, 2)
    x = _sampled(x, (grid.view(1, -1, 3) @ affine).view(len(x), height, width, 2), "mirror")
    shifts = amount * grown * gaussian_filter(noise, sigma * grown, mode="reflect", truncate=3.0)
    return _sampled(x, grid[..., :2] + shifts.permute(0, 2, 3, 1), "reflect")


def _back_from(moves: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The affine maps (n, 3, 2) from a moved image's (column, row, 1) to the (column, row) that it shows.

    Args:
        moves: (n, 3, 2), how far three corners of the middle square move.
    """
    middle, half = torch.tensor([height // 2, width // 2]), min(height, width) // 3
    corners = middle + half * torch.tensor([[1, 1], [1, -1], [-1, -1]])
    corners = corners.to(moves)
    moved = torch.cat([corners + moves, moves.new_ones(len(moves), 3, 1)], dim=-1)
    return torch.linalg.solve(moved, corners.expand(len(moves), 3, 2))


def _sampled(x: torch.Tensor, where: torch.Tensor, border: str) -> torch.Tensor:
    """Images at (column, row) coordinates (n, H, W, 2), linear between pixels.

    Args:
        border: "mirror" at the outer pixels' middles or "reflect" at their rims, in SciPy's words.
    """
    size = where.new_tensor([x.shape[3], x.shape[2]])
    mirror = border == "mirror"
    unit = where * 2 / (size - 1).clamp(min=1) - 1 if mirror else (where * 2 + 1) / size - 1
    return torch.nn.functional.grid_sample(x, unit, "bilinear", "reflection", align_corners=mirror)


def pixelate(levels: torch.Tensor, share: float, generators: Generators) -> torch.Tensor:
    """Scale to `share` of both sides, each time by means over whole pixels rounded to 8 bits, and repeat pixels back.

    Source: Pillow's box filter, columns before rows.
    """
    height, width = levels.shape[2:]
    low, narrow = (max(1, int(size * share)) for size in (height, width))
    fewer = _rounded(levels.double() @ box_matrix(width, narrow).to(levels.device).T)
    fewer = _rounded(box_matrix(height, low).to(levels.device) @ fewer).to(torch.uint8)
    rows, columns = (box_matrix(*sizes).argmax(dim=1).to(levels.device) for sizes in ((low, height), (narrow, width)))
    return fewer.index_select(2, rows).index_select(3, columns)


def _rounded(levels: torch.Tensor) -> torch.Tensor:
    """To whole numbers, halves up, as Pillow does; a half may be a float's last digit short."""
    return torch.floor(levels + (0.5 + SLACK))


@lru_cache(maxsize=32)
def box_matrix(size: int, new_size: int) -> torch.Tensor:
    """The matrix of Pillow's box filter from `size` to `new_size` values; float64 (new_size, size)."""
    identity = Image.fromarray(np.eye(size, dtype=np.float32))
    weights = np.asarray(identity.resize((size, new_size), Image.Resampling.BOX)).astype(np.float64)
    return torch.from_numpy(weights / weights.sum(axis=1, keepdims=True))


def jpeg_compression(levels: torch.Tensor, quality: int, generators: Generators) -> torch.Tensor:
    """Write and read each image as a JPEG of `quality` (1 to 95), by Pillow on the CPU."""
    images = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    out = np.empty_like(images)
    height, width, _ = images.shape[1:]
    for index in range(len(images)):  # threads took longer, at 32 and at 224 pixels
        stream = BytesIO()
        image = Image.frombuffer("RGB", (width, height), images[index], "raw", "RGB", 0, 1)
        image.save(stream, "JPEG", quality=quality)
        stream.seek(0)
        out[index] = np.frombuffer(JpegImageFile(stream).tobytes(), np.uint8).reshape(height, width, 3)
    return torch.from_numpy(out).to(levels.device).permute(0, 3, 1, 2)
