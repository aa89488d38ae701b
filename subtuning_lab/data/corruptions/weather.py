"""Corruptions by weather: snow, frost, fog and brightness.

All take x float64 (n, 3, H, W) in [0, 1], a severity's parameter, and one generator per image.

Source: Hendrycks and Dietterich (ICLR 2019) and the published scripts.
"""

from __future__ import annotations

import torch

from subtuning_lab.data.corruptions.filters import along_axes, cut, gaussian_filter, smear, zoom_matrix
from subtuning_lab.data.corruptions.noise import Generators

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R BT.601)
_DARK_ICE, _BRIGHT_ICE = (0.40, 0.53, 0.59), (0.79, 0.81, 0.84)  # mean colours of the published frost photographs
_FIBRES = 3  # directions of ice fibres, 60 degrees apart


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
