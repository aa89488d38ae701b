"""Draw the images that the bundled backbones are pretrained on: glyphs, fractals, polygons and stars, textures.

The glyphs are those of the package's task "source"; masks are painted as there.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Generator, Tensor

from subtuning_lab.data.synthetic import (
    SIDE,
    SOURCE_GLYPHS,
    MaskFamily,
    affine_grid,
    draw,
    numbered,
    pixel_grid,
    soft_mask,
    source_glyph_masks,
    uniform,
)

SOURCE_FAMILIES = {"glyphs": SOURCE_GLYPHS, "fractals": 28, "polygons": 16, "textures": 16}  # in the order of labels
SOURCE_CLASSES = sum(SOURCE_FAMILIES.values())
FRACTAL_SEED = 2  # defines the classes
MAPS_PER_FRACTAL = 3


def source_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `n` images of the 100 classes; arguments and result as of `subtuning_lab.data.synthetic.draw`."""
    return draw(_source_masks, SOURCE_CLASSES, n, seed)


@cache
def class_names() -> tuple[str, ...]:
    """Names of the 100 classes, by label."""
    styles = ("filled {}-gon", "outlined {}-gon", "filled {}-pointed star", "outlined {}-pointed star")
    polygons = (style.format(corners) for style in styles for corners in range(3, 7))
    gratings = (f"{pace} grating {angle} deg" for pace in ("slow", "fast") for angle in (0, 45, 90, 135))
    patterns = ("slow checkers", "fast checkers", "slow rings", "fast rings")
    noises = (f"noise 1/f^{slope}" for slope in (0.4, 0.9, 1.5, 2.2))
    fractals = numbered("fractal", SOURCE_FAMILIES["fractals"])
    return (*numbered("glyph", SOURCE_GLYPHS), *fractals, *polygons, *gratings, *patterns, *noises)


def _source_masks(labels: Tensor, generator: Generator) -> Tensor:
    masks = torch.empty(len(labels), SIDE, SIDE)
    first = 0
    for (_, n_classes), family in zip(SOURCE_FAMILIES.items(), _families(), strict=True):
        rows = ((labels >= first) & (labels < first + n_classes)).nonzero()[:, 0]
        if len(rows) > 0:
            masks[rows] = family(labels[rows] - first, generator)
        first += n_classes
    return masks


@cache
def _families() -> tuple[MaskFamily, ...]:
    maps = fractal_maps(SOURCE_FAMILIES["fractals"], FRACTAL_SEED)
    return (
        source_glyph_masks,
        lambda labels, generator: fractal_masks(labels, maps, generator),
        polygon_masks,
        texture_masks,
    )


@dataclass(frozen=True)
class FractalMaps:
    """Iterated function systems: x -> linear @ x + offset, a few maps per class.

    Args:
        linear: Contractions (classes, maps, 2, 2).
        offset: Translations (classes, maps, 2).
    """

    linear: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        if self.linear.shape[:2] != self.offset.shape[:2] or self.linear.shape[2:] != (2, 2):
            raise ValueError(f"shapes do not fit: linear {tuple(self.linear.shape)}, offset {tuple(self.offset.shape)}")


def fractal_maps(n_classes: int, seed: int) -> FractalMaps:
    """Define fractal classes: random contractions whose attractor covers between 12 % and 50 % of the image."""
    generator = torch.Generator().manual_seed(seed)
    linear, offset = torch.empty(0, MAPS_PER_FRACTAL, 2, 2), torch.empty(0, MAPS_PER_FRACTAL, 2)
    while len(linear) < n_classes:
        candidates = uniform((256, MAPS_PER_FRACTAL, 2, 2), generator, -1, 1)
        largest = torch.linalg.svdvals(candidates)[..., :1, None]
        candidates = candidates / largest * uniform((256, MAPS_PER_FRACTAL, 1, 1), generator, 0.45, 0.85)
        moves = uniform((256, MAPS_PER_FRACTAL, 2), generator, -1, 1)
        covered = (_attractor_masks(candidates, moves, generator) > 0.3).float().mean(dim=(1, 2))
        kept = (covered > 0.12) & (covered < 0.5)
        linear, offset = torch.cat([linear, candidates[kept]]), torch.cat([offset, moves[kept]])
    return FractalMaps(linear[:n_classes], offset[:n_classes])


def fractal_masks(labels: Tensor, maps: FractalMaps, generator: Generator, jitter: float = 0.04) -> Tensor:
    """Draw the attractors (n, 32, 32) of the classes' maps after a small random change of every coefficient."""
    linear, offset = maps.linear[labels], maps.offset[labels]
    linear = linear + jitter * torch.randn(linear.shape, generator=generator)
    offset = offset + jitter * torch.randn(offset.shape, generator=generator)
    return _attractor_masks(linear, offset, generator)


def _attractor_masks(
    linear: Tensor, offset: Tensor, generator: Generator, chains: int = 24, steps: int = 40, burn_in: int = 8
) -> Tensor:
    """Play the chaos game with `chains` points per system, and count where they fall; (n, 32, 32)."""
    n = len(linear)
    area = torch.linalg.det(linear).abs() + 0.05  # larger images of the whole are visited more often
    cumulative = (area / area.sum(dim=1, keepdim=True)).cumsum(dim=1)
    draws = torch.rand(n, chains * steps, generator=generator)
    choice = torch.searchsorted(cumulative, draws).clamp_max(MAPS_PER_FRACTAL - 1).view(n, chains, steps)
    system = torch.arange(n)[:, None]
    points, visited = torch.zeros(n, chains, 2), []
    for step in range(steps):
        chosen = choice[:, :, step]
        points = (linear[system, chosen] @ points[..., None])[..., 0] + offset[system, chosen]
        visited.append(points)
    return _density_masks(torch.cat(visited[burn_in:], dim=1))


def _density_masks(points: Tensor) -> Tensor:
    """Fit each cloud of points (n, points, 2) into the image and saturate the counts per pixel."""
    low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
    unit = (points - low) / (high - low).clamp_min(1e-4)
    cell = (unit * (SIDE - 4) + 1.5).long()
    flat = cell[..., 1] * SIDE + cell[..., 0]
    counts = torch.zeros(len(points), SIDE * SIDE).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
    return 1 - torch.exp(-0.8 * counts.view(-1, SIDE, SIDE))


def polygon_masks(labels: Tensor, generator: Generator) -> Tensor:
    """Draw 16 classes: 3 to 6 corners (label % 4) x filled, outlined, star, outlined star (label // 4)."""
    n = len(labels)
    corners = (3 + labels % 4).float()[:, None, None]
    style = (labels // 4)[:, None, None]
    u, v = affine_grid(n, generator, math.pi, scales=(0.5, 0.95), shift=0.25, shear=0.15)
    radius = (u**2 + v**2).sqrt()
    angle = torch.remainder(torch.atan2(v, u), 2 * math.pi / corners) - math.pi / corners  # 0 at mid-side
    polygon = 0.75 - radius * torch.cos(angle) / torch.cos(math.pi / corners)
    star = 0.45 + 0.4 * angle.abs() * corners / math.pi - radius
    inside = torch.where(style >= 2, star, polygon)
    half_width = uniform((n, 1, 1), generator, 0.10, 0.18)
    outline = half_width - (inside - half_width).abs()
    return soft_mask(torch.where(style % 2 == 0, inside, outline))


def texture_masks(labels: Tensor, generator: Generator) -> Tensor:
    """Draw 16 classes: gratings of 4 directions and 2 frequencies, 2 checkers, 2 rings, 4 slopes of 1/f noise."""
    column = labels[:, None, None]
    wave = torch.where(column < 8, _gratings(column, generator), _checkers(column, generator))
    wave = torch.where((column >= 10) & (column < 12), _rings(column, generator), wave)
    wave = torch.where(column >= 12, _power_law_noise(column, generator), wave)
    return torch.sigmoid(2.5 * wave)


def _phase(n: int, generator: Generator) -> Tensor:
    return uniform((n, 1, 1), generator, 0, 2 * math.pi)


def _gratings(column: Tensor, generator: Generator) -> Tensor:
    n = len(column)
    x, y = pixel_grid()
    direction = (column % 4) * math.pi / 4 + uniform((n, 1, 1), generator, -0.175, 0.175)
    slow, fast = uniform((n, 1, 1), generator, 6, 9), uniform((n, 1, 1), generator, 13, 18)
    frequency = torch.where((column // 4) % 2 == 0, slow, fast)
    return torch.sin(frequency * (torch.cos(direction) * x + torch.sin(direction) * y) + _phase(n, generator))


def _two_frequencies(column: Tensor, generator: Generator) -> Tensor:
    n = len(column)
    slow, fast = uniform((n, 1, 1), generator, 6, 8), uniform((n, 1, 1), generator, 11, 14)
    return torch.where(column % 2 == 0, slow, fast)


def _checkers(column: Tensor, generator: Generator) -> Tensor:
    n = len(column)
    x, y = pixel_grid()
    frequency = _two_frequencies(column, generator)
    return 2 * torch.sin(frequency * x + _phase(n, generator)) * torch.sin(frequency * y + _phase(n, generator))


def _rings(column: Tensor, generator: Generator) -> Tensor:
    n = len(column)
    x, y = pixel_grid()
    dx, dy = uniform((n, 1, 1), generator, -0.5, 0.5), uniform((n, 1, 1), generator, -0.5, 0.5)
    radius = ((x - dx) ** 2 + (y - dy) ** 2).sqrt()
    return torch.sin(1.3 * _two_frequencies(column, generator) * radius + _phase(n, generator))


def _power_law_noise(column: Tensor, generator: Generator) -> Tensor:
    n = len(column)
    frequencies = torch.fft.fftfreq(SIDE)
    radius = (frequencies[None, :] ** 2 + frequencies[:, None] ** 2).sqrt().clamp_min(1 / SIDE)
    slope = torch.tensor([0.4, 0.9, 1.5, 2.2])[column % 4]
    spectrum = torch.fft.fft2(torch.randn(n, SIDE, SIDE, generator=generator)) * radius**-slope
    noise = torch.fft.ifft2(spectrum).real
    return noise / noise.std(dim=(1, 2), keepdim=True)
