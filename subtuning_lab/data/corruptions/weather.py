"""Corruptions by weather: snow, frost, fog, brightness and spatter.

All take x float64 (n, 3, H, W) in [0, 1], a severity's parameter, and one generator per image.

Source: Hendrycks and Dietterich (ICLR 2019) and the published scripts. Spatter's OpenCV steps (edges after Canny,
distances after Borgefors with a 5 x 5 mask, an equalized histogram) are done here for all images at once.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from subtuning_lab.data.corruptions.filters import SLACK, along_axes, cut, gaussian_filter, pad, smear, zoom_matrix
from subtuning_lab.data.corruptions.noise import Generators

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R BT.601)
_DARK_ICE, _BRIGHT_ICE = (0.40, 0.53, 0.59), (0.79, 0.81, 0.84)  # mean colours of the published frost photographs
_FIBRES = 3  # directions of ice fibres, 60 degrees apart
_WATER, _MUD = (175, 238, 238), (63, 42, 20)  # red, green, blue of 255
_LOW, _HIGH = 50, 150  # Canny's thresholds
# Rows, columns and lengths of the steps of the 5 x 5 mask that come from above.
_STEPS = (
    (1, 0, 1.0),
    *((1, c, 1.4) for c in (-1, 1)),
    *((r, c, 2.1969) for r, c in ((1, -2), (1, 2), (2, -1), (2, 1))),
)
_FARTHEST = 20.0  # pixels: larger distances to an edge are cut to it
_RELIEF = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])  # light from the upper left


def brightness(x: torch.Tensor, shift: float, generators: Generators) -> torch.Tensor:
    """Raise HSV's value by `shift`, up to 1: hue and saturation stay, so all channels grow by one factor."""
    value = x.amax(dim=1, keepdim=True)
    raised = (value + shift).clamp(max=1.0)
    factor = raised / torch.where(value > 0, value, 1.0)
    return torch.where(value > 0, x * factor, raised)  # black has no saturation and becomes grey


def fog(x: torch.Tensor, amount_decay: tuple[float, float], generators: Generators) -> torch.Tensor:
    """Add `amount` times a plasma that gets `decay` times less rough per octave, then scale back to the old maximum."""
    amount, decay = amount_decay
    height, width = x.shape[2:]
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    mist = plasma(x, decay, generators)[:, None, :height, :width]
    return (x + amount * mist) * brightest / (brightest + amount)


def plasma(x: torch.Tensor, decay: float, generators: Generators) -> torch.Tensor:
    """Random clouds by the diamond-square algorithm on a torus, with values from 0 to 1.

    Args:
        x: the images (n, 3, H, W) that they are for.
        decay: from one octave to the next, noise falls by its square.
        generators: one per image.
    Returns:
        float64 (n, side, side); side is the least power of two that covers the images.
    """
    side = 1 << (max(x.shape[2:]) - 1).bit_length()
    draws = 2 * generators.uniform(side * side - 1) - 1
    field, amplitude = x.new_zeros(len(x), 1, 1), 100.0**2
    while (coarse := field.shape[1]) < side:
        noise, draws = draws[:, : 3 * coarse**2], draws[:, 3 * coarse**2 :]
        noise = amplitude * noise.reshape(len(x), 3, coarse, coarse)
        pairs = field + field.roll(-1, 2)  # of neighbours in a row
        middles = (pairs + pairs.roll(-1, 1)) / 4 + noise[:, 0]
        tops = (pairs + middles + middles.roll(1, 1)) / 4 + noise[:, 1]
        lefts = (field + field.roll(-1, 1) + middles + middles.roll(1, 2)) / 4 + noise[:, 2]
        even = torch.stack([field, tops], dim=-1).flatten(2)
        odd = torch.stack([lefts, middles], dim=-1).flatten(2)
        field = torch.stack([even, odd], dim=2).flatten(1, 2)
        amplitude /= decay**2
    field = field - field.amin(dim=(1, 2), keepdim=True)
    return field / field.amax(dim=(1, 2), keepdim=True)


def snow(x: torch.Tensor, parameter: tuple[float, ...], generators: Generators) -> torch.Tensor:
    """Whiten the image and let flakes fall on it, and once more turned by 180 degrees.

    Args:
        parameter: (mean, deviation) of normal noise, its enlargement, the value from which it is a flake, radius and
            sigma of the flakes' motion in pixels, and the share of the image that is not whitened.
    Source: the published scripts; flakes are cut to 8 bits before and after they move by `smear`.
    """
    mean, deviation, enlarged, least, radius, sigma, share = parameter
    noise = mean + deviation * generators.normal(*x.shape[2:])
    noise = along_axes(noise, *(zoom_matrix(size, enlarged) for size in x.shape[2:]))
    flakes = torch.where(noise < least, 0.0, noise).clamp(0.0, 1.0)
    flakes = cut(smear(cut(flakes[:, None]), radius, sigma, generators.angles(-135, -45)))
    grey = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    white = share * x + (1 - share) * torch.maximum(x, grey * 1.5 + 0.5)
    return white + flakes + flakes.flip(2, 3)


def frost(x: torch.Tensor, shares: tuple[float, float], generators: Generators) -> torch.Tensor:
    """Mix the image, `kept`, with a texture of ice, `added`: fibres in three directions over blotches.

    Source: the published scripts mix with crops of photographs of frost, which are not ours to pass on. This texture
        is drawn instead; it has their mean colours, from dark blue to near white, but not their crystals. Accuracies
        under this frost are not comparable to published ones.
    """
    kept, added = shares
    return kept * x + added * _ice(x, generators)


def _ice(x: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Textures of ice: fibres along three directions, deep or shallow by patches; float64 (n, 3, H, W) in [0, 1]."""
    height, width = x.shape[2:]
    rime = plasma(x, 2.0, generators)[:, None, :height, :width]
    noise, pale = generators.normal(_FIBRES, height, width), generators.uniform(1, 1, 1)
    turns = generators.angles(0, 60)
    length = max(4, round(max(height, width) / 12))  # pixels
    noise = gaussian_filter(noise, 0.5 + length / 24)
    along = [smear(noise[:, k : k + 1], length, length / 2, turns + 60 * k) for k in range(_FIBRES)]
    fibres = torch.cat(along, dim=1).amax(dim=1, keepdim=True)
    fibres = fibres - fibres.mean(dim=(2, 3), keepdim=True)
    fibres = fibres / fibres.std(dim=(2, 3), correction=0, keepdim=True).clamp(min=1e-6)
    dark, white = (x.new_tensor(colour).view(1, 3, 1, 1) for colour in (_DARK_ICE, _BRIGHT_ICE))
    depth = (1.3 - pale) * (0.35 + rime) * 0.08
    return (dark + (white - dark) * pale + 0.3 * (1.2 - pale) * (rime - 0.5) + depth * fibres).clamp(0, 1)


def spatter(x: torch.Tensor, parameter: tuple[float, ...], generators: Generators) -> torch.Tensor:
    """Cover parts of the image with pale water or brown mud.

    Args:
        x: float64 (n, 3, H, W) in [0, 1].
        parameter: (mean, deviation) of normal noise, the sigma in pixels that blurs it, the value from which it is
            liquid, then the strength of water or the sigma in pixels of mud, and 0 for water or 1 for mud.
        generators: one per image.
    Source: the published scripts. Not equal: where no drop is, they divide by 0, and the rare noise above 1 wraps
        around to 0; here the image stays as it is, and noise is cut to 1.
    """
    mean, deviation, sigma, least, strength, is_mud = parameter
    liquid = gaussian_filter(mean + deviation * generators.normal(*x.shape[2:]), sigma)
    liquid = torch.where(liquid < least, 0.0, liquid)
    if is_mud:
        cover = gaussian_filter((liquid > least).to(x.dtype), strength)[:, None]
        cover = torch.where(cover < 0.8, 0.0, cover)
        return x * (1 - cover) + cover * x.new_tensor(_MUD).view(1, 3, 1, 1) / 255
    drops = shaded((liquid * 255).clamp(0, 255).floor())[:, None] * strength
    return x + drops * x.new_tensor(_WATER).view(1, 3, 1, 1) / 255


def shaded(liquid: torch.Tensor) -> torch.Tensor:
    """Shade drops by their distance to the nearest edge, as a relief lit from one side.

    Args:
        liquid: float64 (n, H, W), whole numbers from 0 to 255.
    Returns:
        float64 (n, H, W) from 0 to 1; all 0 where nothing is lit.
    """
    distance = chamfer_distance(canny_edges(liquid), _FARTHEST)
    relief = equalized((_mean3(distance) + SLACK).floor())
    lit = sum(weight * part for weight, part in _shifted(relief, "reflect", _RELIEF) if weight)
    light = liquid * (_mean3(lit.clamp(0, 255)) + SLACK).round()
    return light / light.amax(dim=(1, 2), keepdim=True).clamp(min=1.0)


def _shifted(x: torch.Tensor, border: str, weights: np.ndarray) -> list[tuple[float, torch.Tensor]]:
    """Images (n, H, W) moved by -1, 0 and 1 rows and columns, each with its weight of (3, 3)."""
    padded = pad(x, (1, 1), (1, 1), border)
    height, width = x.shape[1:]
    return [
        (float(weights[row, column]), padded[:, row : row + height, column : column + width])
        for row in range(3)
        for column in range(3)
    ]


def _mean3(x: torch.Tensor) -> torch.Tensor:
    """Mean over 3 x 3 pixels, mirrored at the edge."""
    return sum(part for _, part in _shifted(x, "reflect", np.ones((3, 3)))) / 9


def canny_edges(x: torch.Tensor) -> torch.Tensor:
    """Edges after Canny: thin ridges of the gradient, strong ones and the weak ones that touch them.

    Args:
        x: float64 (n, H, W), whole numbers from 0 to 255.
    Returns:
        bool (n, H, W).
    Source: OpenCV's variant: 3 x 3 Sobel gradients, their size as a sum of absolute values.
    """
    across = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    down, right = (
        sum(weight * part for weight, part in _shifted(x, "edge", kernel) if weight) for kernel in (across.T, across)
    )
    size = down.abs() + right.abs()
    around = torch.nn.functional.pad(size, (1, 1, 1, 1))  # no gradient beyond the edge
    height, width = x.shape[1:]

    def at(row: int, column: int) -> torch.Tensor:
        return around[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    slope = down.abs() / right.abs().clamp(min=0.5)
    rising, falling = (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1))
    slanted = torch.where(down * right < 0, rising, falling)
    steep = (size > at(-1, 0)) & (size >= at(1, 0))
    flat = (size > at(0, -1)) & (size >= at(0, 1))
    tangent = math.tan(math.pi / 8)
    ridge = torch.where(slope < tangent, flat, torch.where(slope > tangent + 2, steep, slanted))
    weak = ridge & (size > _LOW)
    return _touched(weak & (size > _HIGH), weak)


def _touched(strong: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
    """Let strong pixels (n, H, W) spread over weak ones that touch them, until nothing changes."""
    while True:
        around = torch.nn.functional.pad(strong, (1, 1, 1, 1))
        above = around[:, :-2] | around[:, 1:-1] | around[:, 2:]
        grown = (above[..., :-2] | above[..., 1:-1] | above[..., 2:]) & weak
        if torch.equal(grown, strong):
            return strong
        strong = grown


def chamfer_distance(targets: torch.Tensor, farthest: float) -> torch.Tensor:
    """Length of the shortest way to a target, in straight, diagonal and knight's steps.

    Args:
        targets: bool (n, H, W).
        farthest: longer ways are cut to this, in pixels.
    Returns:
        float64 (n, H, W).
    Source: Borgefors (1986), "Distance transformations in digital images", with OpenCV's lengths.
    """
    distance = torch.where(targets, 0.0, farthest).double()
    for _ in range(2):  # down and to the right, then, turned by 180 degrees, up and to the left
        distance = _swept(distance, farthest).flip(1, 2)
    return distance


def _swept(distance: torch.Tensor, farthest: float) -> torch.Tensor:
    """Shorten distances (n, H, W) by steps that come from above and from the left."""
    height, width = distance.shape[1:]
    ramp = torch.arange(width, dtype=distance.dtype, device=distance.device)[:, None]
    # Images last, so that each step reads and writes memory in its order.
    rows = torch.full((height + 2, width + 4, len(distance)), farthest, dtype=distance.dtype, device=distance.device)
    rows[2:, 2:-2] = distance.permute(1, 2, 0)
    for row in range(2, height + 2):
        best = rows[row, 2:-2]
        for up, left, length in _STEPS:
            best = torch.minimum(best, rows[row - up, 2 + left : 2 + left + width] + length)
        # A way along the row from the left is a running minimum once the ramp is taken off.
        rows[row, 2:-2] = (best - ramp).cummin(dim=0).values + ramp
    return rows[2:, 2:-2].permute(2, 0, 1)


def equalized(x: torch.Tensor) -> torch.Tensor:
    """Spread each image's levels so that all become about equally frequent.

    Args:
        x: float64 (n, H, W), whole numbers from 0 to 255.
    Returns:
        The same with new levels; an image of one level stays.
    Source: OpenCV's histogram equalization: the lowest level becomes 0.
    """
    levels = x.flatten(1).long()
    counts = torch.zeros(len(x), 256, dtype=x.dtype, device=x.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=x.dtype))
    least = levels.amin(dim=1, keepdim=True)
    lowest = counts.gather(1, least)
    left = levels.shape[1] - lowest
    new = ((counts.cumsum(dim=1) - lowest) * (255 / left.clamp(min=1))).round()
    new = torch.where(left > 0, new, least.to(x.dtype))
    return new.gather(1, levels).view_as(x)
