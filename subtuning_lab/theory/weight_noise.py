"""Networks with Gaussian noise on what was tuned: their error rates, and the PAC-Bayes bounds made of these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from subtuning_lab.data.task import Split
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.engine.trainable import new_head
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import Chain, fork_of, in_order
from subtuning_lab.nets.heads import Start
from subtuning_lab.nets.inputs import logits_of, network_input
from subtuning_lab.study.study import Blocks, Study
from subtuning_lab.theory.bounds import CONFIDENCE, POSITIVE, SIZE, Bound, geometric_grid
from subtuning_lab.theory.linearization import tuned_distance
from subtuning_lab.theory.pac_bayes import gaussian_kl, kl_inverse, pac_bayes_bound
from subtuning_lab.utils.containers import Either, Mapped, Numbers
from subtuning_lab.utils.random import Stream, seeded
from subtuning_lab.utils.validation import Several, Whole, checked

SIGMAS: dict[str, tuple[float, ...]] = {"blocks": geometric_grid(0.0025, 0.16), "head": geometric_grid(0.01, 5.12)}
Sigmas = Mapping[str, Sequence[float]] | Sequence[float] | None
SIGMA_CHOICES = Either(Several(POSITIVE), Mapped(Several(POSITIVE)), none=True)
_NOISE = {"sigmas": SIGMA_CHOICES, "posteriors": Whole(2), "price": SIZE, "confidence": CONFIDENCE, "seed": Whole()}
_EXACT = 10**5  # equal draws that stand for an error rate that is known
_ROWS = 250  # images at a time
_NODES = 64  # of Gauss-Hermite quadrature


@checked
def readout_start(tuned: TunedTask) -> Start:
    """Weight and bias that a study's readout started from, on the CPU; fixed before any image was seen.

    A readout that linear probing trained first started at random, too: the probing counts as a part of its way.
    """
    recipe, seed = Recipe(**tuned.provenance["recipe"]), tuned.provenance["seed"]
    source = tuned.backbone.source_head.state_dict() if recipe.head_start == "source" else None
    head = new_head(tuned.backbone, len(tuned.classes), seed, start=source)
    return {key: tensor.detach().cpu() for key, tensor in head.state_dict().items()}


@checked(**_NOISE)
def noisy_bound(
    tuned: TunedTask,
    split: Split,
    head_start: Start,
    *,
    sigmas: Sigmas = None,
    posteriors: int = 1000,
    price: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Bound:
    """PAC-Bayes-kl bound of a tuned task with Gaussian noise on its tuned blocks and readout.

    The noise is chosen among the candidates by a tenth of the draws; the bound is made of new ones.

    Args:
        tuned: the tuned task; the prior's centre is its backbone.
        split: examples that the prior doesn't depend on.
        head_start: the prior's centre of the readout.
        sigmas, posteriors, price, confidence, seed: as for `measure_bounds`.
    """
    grid, way, n = noise_grid(sigmas), tuned_distance(tuned, head_start)["distance"], len(split)
    delta = {"blocks": float(way["all"]), "head": float(way["head"])}
    if not tuned.blocks:
        grid, delta = ({"head": values["head"]} for values in (grid, delta))
    fixed = price + sum(math.log(len(sigmas)) for sigmas in grid.values())
    fixed += math.log(2 * math.sqrt(n) / (1 - confidence))
    in_blocks, at_head = grid.get("blocks", (0.0,)), grid["head"]
    means = posterior_errors(tuned, split, in_blocks, at_head, draws=max(2, posteriors // 10), seed=2 * seed).mean(1)
    candidates = []
    for sigma, errors in zip(in_blocks, means.tolist(), strict=True):
        for head_sigma, error in zip(at_head, errors, strict=True):
            noise = {"blocks": sigma, "head": head_sigma} if tuned.blocks else {"head": head_sigma}
            divergence = gaussian_kl(delta, noise)
            candidates.append((kl_inverse(error, (divergence + fixed) / n), divergence, noise))
    noise = min(candidates, key=lambda candidate: candidate[:2])[2]
    draws = posteriors if tuned.blocks else _EXACT
    chosen = ([noise.get("blocks", 0.0)], [noise["head"]])
    errors = posterior_errors(tuned, split, *chosen, draws=draws, seed=2 * seed + 1).flatten().numpy()
    chosen_noise = {"n": n, "delta": delta, "sigma": noise, "sigmas": grid, "posteriors": 1}
    return pac_bayes_bound(errors=errors, price=price, confidence=confidence, **chosen_noise)


@checked(lr_share=POSITIVE, **_NOISE)
def half_prior_bound(
    study: Study,
    blocks: Blocks,
    *,
    lr_share: float = 0.1,
    sigmas: Sigmas = None,
    posteriors: int = 1000,
    price: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Bound:
    """PAC-Bayes bound whose prior is trained on half of the training images, and counts errors on the other half.

    The subset is trained on the first half; what comes out is trained on, readout included, on all images. So the way
    from prior to posterior is short.

    Args:
        study: as for `measure_bounds`; with several recipes, the choice among them is paid for.
        blocks: the subset.
        lr_share: learning rates of the second training, as a share of the recipe's.
        sigmas, posteriors, price, confidence, seed: as for `measure_bounds`.
    Source: Ambroladze, Parrado-Hernandez and Shawe-Taylor (2006), Tighter PAC-Bayes Bounds.
    """
    blocks, task = in_order(study.backbone, blocks), replace(study.task, test=None, validation=None)
    recipe = replace(study.recipe_of(blocks), patience=None)
    first, second = (task.train.take(rows) for rows in task.folds(2, seed)[0])
    options = {"folds": 2, "seeds": study.seeds[:1], "device": study.device, "progress": False}
    prior = Study(study.backbone, replace(task, train=first), recipe, **options).fit(blocks)
    centre = prior.network()
    centre.backbone.source_head = centre.head
    head_lr = recipe.head_lr and lr_share * recipe.head_lr
    again = replace(recipe, lr=lr_share * recipe.lr, head_lr=head_lr, head_start="source")
    posterior = Study(centre.backbone, task, again, **options).fit(blocks)
    price += math.log(len({*study.recipes}))
    noise = {"sigmas": sigmas, "posteriors": posteriors, "confidence": confidence, "seed": seed}
    return noisy_bound(posterior, second, readout_start(posterior), price=price, **noise)


@checked
@torch.no_grad()
def posterior_errors(
    tuned: TunedTask,
    split: Split,
    sigmas: Annotated[Sequence[float], Numbers(0, 1e100)],
    head_sigmas: Annotated[Sequence[float], Several(POSITIVE)],
    *,
    draws: Annotated[int, Whole(1)] = 1000,
    images_per_draw: Annotated[int, Whole(1)] = 4,
    seed: Annotated[int, Whole()] = 0,
) -> torch.Tensor:
    """Error rates of networks with noise on the tuned blocks and the readout, float64 (sigmas, draws, head_sigmas).

    Each draw is a network of its own, scored on a few images that are drawn with replacement: many small draws say
    more than few large ones. The readout's noise is integrated out, so that a draw is the chance of an error. Without
    tuned blocks nothing else is drawn: all rows are the exact rate over all images.

    Args:
        tuned: the tuned task; its BatchNorm statistics get no noise.
        split: examples.
        sigmas: standard deviations in the blocks, at least 0; all for the same draws.
        head_sigmas: standard deviations in the readout, above 0; likewise.
        draws: networks.
        images_per_draw: images that each is scored on.
        seed: of noise and images.
    Raises:
        ValueError: a Siamese task, or a readout of several layers.
    """
    if tuned.siamese:
        raise ValueError("the task is Siamese; noise is there for plain tasks only")
    if tuned.head_depth > 1:
        raise ValueError(f"the task's head_depth is {tuned.head_depth}; noise is there for linear readouts only")
    network, fork = tuned.network(), fork_of(tuned.backbone, tuned.blocks)
    trunk = logits_of(lambda images: _before(network, fork, images), split.images, _ROWS, tuned.backbone.mean.device)
    trunk = trunk.to(tuned.backbone.mean.device)
    if fork == len(tuned.backbone.part_names):
        batches = zip(trunk.split(_ROWS), split.labels.split(_ROWS), strict=True)
        exact = torch.cat([_error_chances(network.head, *batch, head_sigmas) for batch in batches])
        return exact.mean(0).expand(len(sigmas), draws, -1)

    def score(sigma: float, numbers: torch.Tensor) -> torch.Tensor:
        noise = [seeded(Stream.NOISE, seed, int(number)) for number in numbers]
        rows = torch.stack([torch.randint(len(split), (images_per_draw,), generator=draw) for draw in noise])
        features = _noisy_features(tuned, network.backbone, fork, trunk[rows.to(trunk.device)], sigma, noise)
        chances = _error_chances(network.head, features.flatten(0, 1), split.labels[rows.flatten()], head_sigmas)
        return chances.unflatten(0, rows.shape).mean(1)

    chunks = torch.arange(draws).split(max(1, _ROWS // images_per_draw))
    return torch.stack([torch.cat([score(sigma, numbers) for numbers in chunks]) for sigma in sigmas])


@checked(sigmas=SIGMA_CHOICES)
def noise_grid(sigmas: Sigmas) -> dict[str, tuple[float, ...]]:
    """Candidates of the noise for "blocks" and "head"; None means `SIGMAS`."""
    grid = SIGMAS if sigmas is None else sigmas
    grid = grid if isinstance(grid, Mapping) else dict.fromkeys(("blocks", "head"), grid)
    if set(grid) != {"blocks", "head"}:
        raise ValueError(f'sigmas has groups {", ".join(map(str, grid))}; they must be "blocks" and "head"')
    return {group: tuple(map(float, grid[group])) for group in ("blocks", "head")}


def _before(network: nn.Module, fork: int, images: torch.Tensor) -> torch.Tensor:
    """Activations of some images where the first tuned part begins."""
    x = network_input(network.backbone, images, network.image_size)
    for part in network.backbone.parts[:fork]:
        x = part(x)
    return x


def _noisy_features(
    tuned: TunedTask, chain: Chain, fork: int, x: torch.Tensor, sigma: float, noise: Sequence[torch.Generator]
) -> torch.Tensor:
    """Features (draws, images, num_features) of activations x (draws, images, ...); frozen parts run once for all."""
    for name, part in list(zip(chain.part_names, chain.parts, strict=True))[fork:]:
        if name not in tuned.blocks:
            x = part(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            continue
        params, outputs = dict(part.named_parameters()), []
        for images, generator in zip(x, noise, strict=True):
            moved = {key: p + sigma * torch.randn(p.shape, generator=generator).to(p) for key, p in params.items()}
            outputs.append(functional_call(part, moved, (images.clone(),)))  # a part may write into its input
        x = torch.stack(outputs)
    return x


def _error_chances(
    head: nn.Linear, features: torch.Tensor, labels: torch.Tensor, sigmas: Sequence[float]
) -> torch.Tensor:
    """Probability (n, sigmas) of a wrong class when every entry of the readout carries noise.

    Each logit then carries independent noise of sigma sqrt(|features|^2 + 1): the right one is the largest with
    probability E_z prod_j Phi((l_right - l_j) / std + z), z standard normal.
    """
    logits, labels = head(features).cpu().double(), labels.cpu()
    reach = (features.cpu().double().square().sum(1) + (head.bias is not None)).sqrt()
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(_NODES))
    gaps = (logits.gather(1, labels[:, None]) - logits).scatter(1, labels[:, None], math.inf)
    right = []
    for sigma in sigmas:
        spread = (gaps / (sigma * reach)[:, None])[..., None] + nodes  # (n, classes, nodes)
        right.append(torch.special.ndtr(spread).prod(1) @ (weights / weights.sum()))
    return 1 - torch.stack(right, 1).clamp(0, 1)
