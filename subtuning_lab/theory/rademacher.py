"""The Rademacher bound of the training set for the linearized network, with all constants known. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np

from subtuning_lab.theory.bounds import (
    CONFIDENCE,
    COUNT,
    NOT_PRETRAINED_ON,
    POSITIVE,
    SAME_SAMPLE,
    SHARE,
    SIZE,
    Bound,
    grid_price,
    make_bound,
)
from subtuning_lab.utils.containers import Either, Numbers
from subtuning_lab.utils.validation import checked

_LINEARIZED = (
    SAME_SAMPLE,
    NOT_PRETRAINED_ON,
    "the network is its linearization at the start (exact for linear probing alone)",
    'the start, its BatchNorm statistics included (bn="frozen"), does not depend on these examples',
    "margins, radii and the subsets that are paid for were fixed before the examples were seen",
)


@checked(margins=Numbers(), margin=POSITIVE)
def ramp_error(margins: Sequence[float] | np.ndarray, margin: float) -> float:
    """Mean ramp loss: 1 for examples that are wrong, 0 for those right by `margin` and more, linear between.

    Args:
        margins: logit of the right class minus the largest other logit, (n,).
        margin: gamma, above 0.
    """
    return float(np.clip(1 - np.asarray(margins, dtype=float) / margin, 0, 1).mean())


@checked(feature_norms=Numbers(0), delta=SIZE)
def empirical_rademacher(feature_norms: Sequence[float] | np.ndarray, delta: float) -> float:
    """Bound on the empirical Rademacher complexity of {<psi, w> : |w| <= delta}, delta sqrt(sum |psi_i|^2) / n.

    Args:
        feature_norms: Frobenius norms |psi(x_i)| of the n examples, (n,).
        delta: radius.
    """
    return float(delta * np.linalg.norm(feature_norms) / len(feature_norms))


@checked
def rademacher_bound(
    *,
    n: Annotated[int, COUNT],
    delta: Annotated[float, SIZE],
    feature_norms: Annotated[Sequence[float] | np.ndarray | float, Either(SIZE, Numbers(0, 1e100))],
    margin: Annotated[float, POSITIVE],
    empirical_error: Annotated[float | None, SHARE.or_none()] = None,
    deltas: Annotated[Sequence[float] | None, Numbers(0, none=True)] = None,
    margins: Annotated[Sequence[float] | None, Numbers(0, none=True)] = None,
    price: Annotated[float, SIZE] = 0.0,
    confidence: Annotated[float, CONFIDENCE] = 0.95,
) -> Bound:
    """Theorem 1 with constants, for the linearized network f(x) + psi_S(x) w, |w| <= Delta, with K logits.

    Args:
        n: training examples.
        delta: Euclidean distance of all that is trained from where it started, readout included.
        feature_norms: Frobenius norms (n,) of the training examples' Jacobians psi_S(x_i), (K, parameters), at the
            start; or one number, the root of their mean square. Columns may have their mean over classes taken off.
        margin: gamma, above 0.
        empirical_error: `ramp_error` of the training examples at this margin; None bounds the gap alone.
        deltas: radii fixed before the data were seen, e.g. a `geometric_grid`: the smallest that holds `delta` is
            used and all are paid for. None says that `delta` itself was fixed before, which a measured one is not.
        margins: the same for `margin`, which must be one of them.
        price: log of the number of subsets that S was chosen among, see `selection_price`.
        confidence: in (0, 1).

    Proof sketch. (1) For losses in [0, 1], symmetrization and McDiarmid twice, at half the failure probability each:
        risk <= empirical risk + 2 R + 3 sqrt(log(2 / failure) / 2n), R the empirical Rademacher complexity of the
        losses. (2) The margin is sqrt(2)-Lipschitz in the logits, the ramp 1 / gamma in the margin; Maurer's vector
        contraction costs another sqrt(2), so R <= (2 / gamma) E sup_w sum_ik e_ik <psi_k(x_i), w> / n; f drops out,
        since it doesn't depend on w. (3) By Cauchy-Schwarz and Jensen this is at most
        (2 / gamma) Delta sqrt(sum_i |psi(x_i)|^2) / n. (4) A union over subsets, radii and margins divides the
        failure probability by their number.
    Source: PAPER "Theorem 1"; Mohri, Rostamizadeh and Talwalkar, Foundations of Machine Learning, theorem 3.3; Maurer,
        A Vector-Contraction Inequality for Rademacher Complexities (2016), corollary 1.
    """
    norm = _root_mean_square(feature_norms, n)
    radius, radii_price = _radius(delta, deltas)
    margin_price = grid_price("margin", margin, margins)
    steps = np.cumsum([math.log(2 / (1 - confidence)), price, radii_price + margin_price])
    roots = 3 * np.sqrt(steps / (2 * n))
    terms = {
        **({} if empirical_error is None else {"empirical error": empirical_error}),
        "complexity": 4 / margin * radius * norm / math.sqrt(n),
        "price of selection": float(roots[1] - roots[0]),
        "price of the grids": float(roots[2] - roots[1]),
        "confidence": float(roots[0]),
    }
    inputs = {"n": n, "delta": delta, "radius": radius, "feature_norm": norm, "margin": margin, "price": price}
    return make_bound("Rademacher", terms, inputs, confidence, _LINEARIZED)


def _root_mean_square(feature_norms: Sequence[float] | np.ndarray | float, n: int) -> float:
    if np.ndim(feature_norms) == 0:
        return float(feature_norms)
    if len(feature_norms) != n:
        raise ValueError(f"feature_norms holds {len(feature_norms)} numbers; it must hold n, {n}")
    return empirical_rademacher(feature_norms, 1.0) * math.sqrt(n)


def _radius(delta: float, deltas: Sequence[float] | None) -> tuple[float, float]:
    """The smallest candidate that holds delta, and log of the number of candidates."""
    if deltas is None:
        return float(delta), 0.0
    grid = np.asarray(deltas, dtype=float)
    if delta > grid.max():
        raise ValueError(f"delta is {delta}; it must be at most {grid.max()}, the largest of deltas")
    return float(grid[grid >= delta].min()), math.log(len(grid))
