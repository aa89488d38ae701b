"""Which blocks to tune, without a search: scores by name, and the choice under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from subtuning_lab.criteria import formulas
from subtuning_lab.criteria.evidence import Evidence, Spent
from subtuning_lab.criteria.prior import mean_rank
from subtuning_lab.data.splits import stratified_choice
from subtuning_lab.nets.chain import count_parameters
from subtuning_lab.theory.bounds import subtuning_bound
from subtuning_lab.utils.containers import Either, Table
from subtuning_lab.utils.random import Stream, seeded
from subtuning_lab.utils.validation import Is, OneOf, Real, Several, Whole, checked

if TYPE_CHECKING:
    from subtuning_lab.data.task import Split
    from subtuning_lab.study.study import Study

_ROUNDS, _DRAWS = 12, 3  # of IST
_GRADIENTS = ("activations", "readout", "gradients")
_SEEN = ("activations",)


@dataclass(frozen=True)
class Criterion:
    """A score of blocks.

    Args:
        says: what it is, in a line.
        score: from evidence to a number per block, (blocks,).
        needs: pieces of evidence that it costs.
        largest: whether the block with the largest score is tuned first.
    """

    says: str
    score: Callable[[Evidence], np.ndarray]
    needs: tuple[str, ...] = ()
    largest: bool = True


def _of_tensors(formula: Callable[[Sequence[formulas.Tensor]], float]) -> Callable[[Evidence], np.ndarray]:
    return lambda seen: np.array([formula(own) for own in seen.gradients.tensors])


def _of_pairs(formula: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Evidence], np.ndarray]:
    """Of what enters and what leaves each block."""
    return lambda seen: np.array(
        [formula(x, y) for x, y in zip(seen.activations[:-2], seen.activations[1:-1], strict=True)]
    )


def _random(seen: Evidence) -> np.ndarray:
    return torch.rand(len(seen.names), generator=seeded(Stream.CRITERION, seen.seed)).double().numpy()


def _parameters(seen: Evidence) -> np.ndarray:
    return np.array([count_parameters(seen.study.backbone, [name]) for name in seen.names], dtype=float)


def _bound(seen: Evidence) -> np.ndarray:
    sizes = {"delta": 1.0, "n_blocks": len(seen.names), "max_blocks": 1}
    return np.array(
        [subtuning_bound(n=len(seen.split), tuned_params=int(p), **sizes).value for p in _parameters(seen)]
    )


def _ist(seen: Evidence) -> np.ndarray:
    blocks, generator = len(seen.names), seeded(Stream.CRITERION, seen.seed, 0)
    draws = [
        [(torch.randperm(blocks, generator=generator) < (blocks + 1) // 2).numpy() for _ in range(_DRAWS)]
        for _ in range(_ROUNDS)
    ]
    return formulas.suppressed_importance(seen.held_out_loss, blocks, draws)


def _prior(seen: Evidence) -> np.ndarray:
    own = seen.study.backbone.fingerprint, seen.study.task.fingerprint
    return mean_rank(seen.study.records.table(), seen.names, *own)


def _ntk_share(seen: Evidence) -> np.ndarray:
    return seen.ntk / (seen.ntk.sum() or 1.0)


def _coupling(seen: Evidence) -> np.ndarray:
    return formulas.own_gain(seen.gradients.tensors, seen.gradients.energy, seen.gradients.gates)


CRITERIA: dict[str, Criterion] = {
    "random": Criterion("a block at random: what every criterion must beat", _random),
    "parameters": Criterion("the block's size: the control that every criterion must beat, too", _parameters),
    "rgn": Criterion("gradient relative to weights", _of_tensors(formulas.relative_gradient_norm), _GRADIENTS),
    "snr": Criterion("the gradient's mean by its spread", _of_tensors(formulas.signal_to_noise), _GRADIENTS),
    "gradient": Criterion("size of the mean gradient", _of_tensors(formulas.gradient_magnitude), _GRADIENTS),
    "fisher": Criterion(
        "mean squared gradient, labels drawn of the network",
        lambda seen: seen.gradients.drawn.mean(0),
        _GRADIENTS,
    ),
    "empirical_fisher": Criterion(
        "mean squared gradient, the images' labels", lambda seen: seen.gradients.squared.mean(0), _GRADIENTS
    ),
    "gate_fisher": Criterion(
        "mean squared derivative by a factor on the block's change (FLoE)",
        lambda seen: (seen.gradients.gates**2).mean(0),
        _GRADIENTS,
    ),
    "ntk": Criterion("share of the largest kernel eigenvalues (F3OCUS)", _ntk_share, (*_GRADIENTS[:2], "ntk")),
    "cka": Criterion("CKA of input and output; the least alike first", _of_pairs(formulas.linear_cka), _SEEN, False),
    "cosine": Criterion(
        "cosine of input and output; the least alike first", _of_pairs(formulas.mean_cosine), _SEEN, False
    ),
    "spectrum": Criterion(
        "weights' singular values above noise, no image needed (Spectrum)", lambda seen: formulas.spectrum(seen.blocks)
    ),
    "displacement": Criterion(
        "relative way of the weights in a short full finetuning (SALFT)",
        lambda seen: seen.displacement(seen.drift[0]),
        ("drift",),
    ),
    "ist": Criterion("harm of undoing the block's change after that (IST)", _ist, ("drift", "suppression"), False),
    "coupling": Criterion("gradient per activation energy that others don't share (Layer Card)", _coupling, _GRADIENTS),
    "bound": Criterion("value of the generalization bound, which counts parameters; least first", _bound, (), False),
    "prior": Criterion("mean rank in the records' profiles of other tasks; least first", _prior, (), False),
}


def criterion_names() -> dict[str, str]:
    """What `score_blocks` knows: name -> one line."""
    return {name: criterion.says for name, criterion in CRITERIA.items()}


@checked(
    study=Is("Study"),
    criterion=Either(OneOf(("all", *CRITERIA)), Several(OneOf(tuple(CRITERIA)), unique=True)),
    images=Whole(2, none=True),
    seed=Whole(0, 2**31 - 1),
    chunk=Whole(1, none=True),
)
def score_blocks(
    study: Study,
    criterion: str | Sequence[str] = "fisher",
    *,
    images: int | None = 512,
    seed: int = 0,
    chunk: int | None = None,
) -> pd.DataFrame:
    """Scores every block without tuning it alone; what several criteria look at is computed once for all.

    The readout is fitted on the frozen features first (`fitted_readout`). Test images are not seen.

    Args:
        study: backbone, task and recipe; of several recipes the first counts, where anything is trained.
        criterion: a name of `criterion_names()`, several, or "all" but "prior", which needs records of other tasks.
        images: training images to look at, stratified; None takes all.
        seed: of their choice and of whatever is drawn.
        chunk: images at a time; scores don't depend on it.

    Returns:
        One row a criterion and block: `criterion`, `block`, `score`, `rank` (1 is to be tuned first, whichever way the
        criterion points), `params`, `weight_flops` and `reach_flops` (per image and step: gradients of its weights; the
        forward, and the backward down to it), and what the criterion takes by itself: images sent `forwards` and
        `backwards`, `labels`, `flops`, `seconds`; `n` images.

    Raises:
        TypeError, ValueError: an unknown criterion, fewer images than classes.

    Source: each formula says its own.
    """
    names = [criterion] if isinstance(criterion, str) else list(criterion)
    if criterion == "all":
        names = [name for name in CRITERIA if name != "prior"]
    seen = Evidence(study, _some_images(study, images, seed), seed, chunk)
    facts = pd.DataFrame({"block": seen.names, "params": _parameters(seen).astype(int), **_training_costs(study)})
    return pd.concat([_scored(name, seen, facts) for name in names], ignore_index=True)


def _scored(name: str, seen: Evidence, facts: pd.DataFrame) -> pd.DataFrame:
    rule = CRITERIA[name]
    scores = rule.score(seen)
    spent = sum((seen.spent[piece] for piece in rule.needs), Spent())
    table = facts.assign(criterion=name, score=scores, rank=formulas.ranks(scores, rule.largest))
    columns = ["criterion", "block", "score", "rank", "params", "weight_flops", "reach_flops"]
    return table[columns].assign(**vars(spent), n=len(seen.split))


def _training_costs(study: Study) -> dict[str, list[int]]:
    """Of each block, as `training_flops` counts them: the latter once for a subset, of its first block."""
    parts = study.parts
    behind = parts["backward"][::-1].cumsum()[::-1].shift(-1, fill_value=0)
    reach = parts["flops"].sum() + parts["backward_first"] + behind
    names = list(study.block_names)
    return {"weight_flops": parts["backward_weights"].loc[names].tolist(), "reach_flops": reach.loc[names].tolist()}


def _some_images(study: Study, images: int | None, seed: int) -> Split:
    train = study.task.train
    if images is None or images >= len(train):
        return train
    return train.take(torch.from_numpy(stratified_choice(train.labels.numpy(), images, seed, "images")))


@checked(
    scores=Table(("block",), ("rank", "params", "weight_flops", "reach_flops")),
    k=Whole(1, none=True),
    max_params=Whole(1, none=True),
    max_flops=Real(0, above=True, none=True),
)
def select_blocks(
    scores: pd.DataFrame, k: int | None = None, max_params: int | None = None, max_flops: float | None = None
) -> tuple[str, ...]:
    """The blocks to tune: down the ranks, those that fit into the budget.

    Args:
        scores: of `score_blocks`, of one criterion.
        k: most blocks.
        max_params: most tuned parameters.
        max_flops: most FLOPs of a training step per image.

    Returns:
        Names in the network's order; none where nothing fits. A block that doesn't fit is passed over.

    Raises:
        ValueError: no budget, or scores of several criteria.
    """
    if k is None and max_params is None and max_flops is None:
        raise ValueError("k is None; it must be a number of blocks, or give max_params or max_flops")
    if scores["block"].duplicated().any():
        raise ValueError("scores is a table of several criteria; it must be of one, scores[scores.criterion == NAME]")
    limits = [math.inf if limit is None else limit for limit in (k, max_params, max_flops)]
    chosen: list[int] = []
    for row in scores["rank"].sort_values().index:
        own = scores.loc[[*chosen, row]]
        costs = (len(own), own["params"].sum(), own["weight_flops"].sum() + own["reach_flops"].max())
        if all(cost <= limit for cost, limit in zip(costs, limits, strict=True)):
            chosen.append(row)
    return tuple(scores.loc[sorted(chosen), "block"])
