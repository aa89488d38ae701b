"""The criteria's formulas: from gradients, activations and weights to a number per block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

Array = np.ndarray
Tensor = tuple[Array, Array, Array, bool]  # mean gradient, mean square, weights (numel,) each, whether BatchNorm's


def relative_gradient_norm(tensors: Sequence[Tensor]) -> float:
    """Mean over tensors of |mean gradient| / |weights|, BatchNorm's and those of zeros left out.

    Source: surgical finetuning's RGN; its 5 batches are one batch of all images here, so that nothing depends on how
        images are batched.
    """
    ratios = [np.linalg.norm(g) / np.linalg.norm(w) for g, _, w, norm in tensors if not norm and w.any()]
    return float(np.mean(ratios)) if ratios else 0.0


def signal_to_noise(tensors: Sequence[Tensor]) -> float:
    """Mean over weights of mean(gradient)^2 / variance(gradient) over images; a weight without gradient has 0.

    Source: surgical finetuning's SNR, whose official code takes the variance over another axis.
    """
    mean, square = (np.concatenate([one[i] for one in tensors]) if tensors else np.zeros(1) for i in (0, 1))
    variance = square - mean**2
    still = variance <= 1e-12 * square  # rounding: the same gradient on every image
    ratio = np.divide(mean**2, np.where(still, square * 1e-12, variance), out=np.zeros_like(mean), where=square > 0)
    return float(ratio.mean())


def gradient_magnitude(tensors: Sequence[Tensor]) -> float:
    """Squared norm of the mean gradient."""
    return float(sum((g**2).sum() for g, *_ in tensors))


def linear_cka(x: Array, y: Array) -> float:
    """Linear CKA of two sets of features (n, width) of the same images; 1 where nothing varies.

    Source: Kornblith et al. 2019.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    shared, own = np.linalg.norm(x.T @ y) ** 2, np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(shared / own) if own > 0 else 1.0


def mean_cosine(x: Array, y: Array) -> float:
    """Mean over images of the cosine of two features (n, width); missing where their widths differ."""
    if x.shape != y.shape:
        return float("nan")
    sizes = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.divide((x * y).sum(1), sizes, out=np.ones_like(sizes), where=sizes > 0).mean())


def spectral_ratio(matrix: Array) -> float:
    """(sum of singular values above the noise / sum of those below) / the largest; infinite where none is below.

    The noise's edge is sigma (1 + sqrt(beta)), sigma = interquartile range / 1.349, beta = shorter / longer side.

    Source: Spectrum (arXiv 2406.06623).
    """
    values = np.linalg.svd(matrix, compute_uv=False)
    if not values.any():
        return 0.0
    low, high = np.quantile(values, [0.25, 0.75])
    edge = (high - low) / 1.349 * (1 + (min(matrix.shape) / max(matrix.shape)) ** 0.5)
    above, below = values[values > edge].sum(), values[values <= edge].sum()
    return float(above / below / values.max()) if below > 0 else float("inf")


def spectrum(blocks: Sequence[nn.Module]) -> Array:
    """Mean over a block's weight matrices of the share of layers of the same name that have no larger ratio."""
    ratios = [
        {name: spectral_ratio(p.detach().flatten(1).double().cpu().numpy())
         for name, p in block.named_parameters() if p.dim() > 1}
        for block in blocks
    ]  # fmt: skip
    kinds: dict[str, list[float]] = {}
    for own in ratios:
        for name, ratio in own.items():
            kinds.setdefault(name, []).append(ratio)
    shares = [[np.mean([other <= r for other in kinds[name]]) for name, r in own.items()] for own in ratios]
    return np.array([float(np.mean(own)) if own else 0.0 for own in shares])


def own_gain(tensors: Sequence[Sequence[Tensor]], energy: Array, gates: Array) -> Array:
    """Squared gradient per activation energy, less what other blocks would gain, too: times 1 - coupling.

    Coupling of a block: mean over the others of the absolute cosine, over images, of their gates' derivatives.

    Source: Layer Card (arXiv 2602.04019) names the three quantities; this combination of them is ours.
    """
    gain = np.array([gradient_magnitude(own) for own in tensors]) / np.where(energy > 0, energy, 1)
    directions = gates / np.maximum(np.linalg.norm(gates, axis=0), 1e-300)
    alike = np.abs(directions.T @ directions)
    others = max(1, len(gain) - 1)
    return gain * (1 - (alike.sum(1) - alike.diagonal()) / others)


def suppressed_importance(
    loss: Callable[[Array], float], blocks: int, draws: Sequence[Sequence[Array]], scale: float = 0.25
) -> Array:
    """How unimportant each block's change is: its log-odds of being suppressed without harm, learned from draws.

    Args:
        loss: of the network whose blocks keep these shares (blocks,) of their changes.
        blocks: how many there are.
        draws: rounds of draws, each a bool (blocks,): which are suppressed.
        scale: share that suppressed ones keep.

    Source: IST (arXiv 2410.11772): reward exp(-loss) less the round's mean; importance rises by
        10 reward s(I) (1 - s(I)) for the suppressed.
    """
    importance = np.zeros(blocks)
    for several in draws:
        rewards = np.array([np.exp(-loss(np.where(one, scale, 1.0))) for one in several])
        for one, reward in zip(several, rewards - rewards.mean(), strict=True):
            chance = 1 / (1 + np.exp(-importance))
            importance = importance + 10 * reward * chance * (1 - chance) * one
    return importance


def ntk_eigenvalue(network: nn.Module, head: nn.Linear, x: torch.Tensor, steps: int) -> Array:
    """Largest eigenvalue of J J^T per block, J the Jacobian of all logits of a batch, by power iteration.

    Args:
        network: a frozen chain.
        x: normalized images.
        steps: of the iteration, which begins at the logits.
    """
    values = []
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
        with torch.no_grad():
            x = network.stem(x)
        for place, block in enumerate(network.blocks):
            values.append(_top(_logits_by(network, head, place, x), dict(block.named_parameters()), steps))
            with torch.no_grad():
                x = block(x.clone())
    return np.array(values)


def _logits_by(network: nn.Module, head: nn.Linear, place: int, x: torch.Tensor) -> Callable[[dict], torch.Tensor]:
    def logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        y = functional_call(network.blocks[place], weights, (x.clone(),))
        for part in (*network.blocks[place + 1 :], network.tail):
            y = part(y)
        return head(y)

    return logits


def _top(function: Callable[[dict], torch.Tensor], weights: dict[str, torch.Tensor], steps: int) -> float:
    if not weights:
        return 0.0
    weights = {name: weight.detach() for name, weight in weights.items()}
    v, pull = vjp(function, weights)
    value = 0.0
    for _ in range(steps):
        v = v / v.norm().clamp(min=1e-30)
        _, moved = jvp(function, (weights,), pull(v))
        value, v = float((v * moved).sum()), moved
    return value


def ranks(scores: Array, largest: bool) -> Array:
    """Places from 1 for what is tuned first; ties go to the earlier block, missing scores to the end."""
    keys = np.where(np.isnan(scores), np.inf, -scores if largest else scores)
    places = np.empty(len(scores), dtype=int)
    places[np.argsort(keys, kind="stable")] = np.arange(1, len(scores) + 1)
    return places
