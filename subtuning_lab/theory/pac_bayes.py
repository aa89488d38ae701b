"""The PAC-Bayes-kl bound of the training set, with all constants known. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from scipy.optimize import brentq
from scipy.special import rel_entr

from subtuning_lab.theory.bounds import (
    CONFIDENCE,
    COUNT,
    NOT_PRETRAINED_ON,
    POSITIVE,
    SAME_SAMPLE,
    SHARE,
    SIZE,
    Bound,
    binomial_upper,
    grid_price,
    make_bound,
)
from subtuning_lab.utils.containers import Either, Mapped, Numbers
from subtuning_lab.utils.validation import Real, checked

_SIGMAS = Either(Numbers(0), Mapped(Numbers(0)), none=True)
MONTE_CARLO_SHARE = 0.1  # of the failure probability; the rest is for the training sample

_RANDOMIZED = (
    SAME_SAMPLE,
    NOT_PRETRAINED_ON,
    "the error is that of weights drawn anew from the posterior for every prediction",
    'the prior\'s centre, BatchNorm statistics included (bn="frozen"), does not depend on these examples',
    "sigmas and the subsets that are paid for were fixed before the examples were seen",
    "the draws were made after the posterior was chosen",
)


@checked(q=SHARE, p=SHARE)
def binary_kl(q: float, p: float) -> float:
    """Kullback-Leibler divergence of two coins, in nats: q log(q / p) + (1 - q) log((1 - q) / (1 - p)).

    Args:
        q, p: probabilities in [0, 1].
    Returns:
        At least 0; infinite where p is 0 or 1 and q is not.
    """
    return max(0.0, float(rel_entr(q, p) + rel_entr(1 - q, 1 - p)))


@checked(q=SHARE, budget=Real(0, infinite=True))
def kl_inverse(q: float, budget: float) -> float:
    """The largest p in [q, 1] with binary_kl(q, p) <= budget; errs upwards, by 1e-12 at most.

    Args:
        q: in [0, 1].
        budget: at least 0, may be infinite.
    """
    q, last = float(q), math.nextafter(1.0, 0.0)
    if budget == 0 or q == 1:
        return q
    if q >= last or binary_kl(q, last) <= budget:
        return 1.0
    return min(1.0, brentq(lambda p: binary_kl(q, p) - budget, q, last, xtol=1e-13) + 1e-12)


@checked(delta=Either(SIZE, Mapped(SIZE)), sigma=Either(POSITIVE, Mapped(POSITIVE)))
def gaussian_kl(delta: Mapping[str, float] | float, sigma: Mapping[str, float] | float) -> float:
    """Divergence of a Gaussian that was moved, sum over groups of delta^2 / (2 sigma^2), in nats.

    Args:
        delta: Euclidean distance moved, or group of parameters -> distance.
        sigma: standard deviation of every parameter, or group -> standard deviation, with the same groups.
    """
    deltas, sigmas = _by_group(delta), _by_group(sigma)
    if isinstance(sigma, Mapping) and sigmas.keys() != deltas.keys():
        raise ValueError(f"sigma has groups {list(sigmas)}; it must have those of delta, {list(deltas)}")
    ratios = [deltas[name] / sigmas.get(name, sigma) for name in deltas]
    return math.fsum(ratio * ratio / 2 for ratio in ratios)


@checked(errors=Numbers(0, 1), failure=CONFIDENCE)
def monte_carlo_upper(errors: Sequence[float] | np.ndarray, failure: float) -> float:
    """Upper bound on the mean of independent draws in [0, 1]; fails with probability `failure` at most.

    Args:
        errors: at least 2 draws. Error rates, not only 0 and 1, so that plain Clopper-Pearson would not hold.
        failure: in (0, 1).
    Returns:
        The smaller of two, for half the failure each. One is good for few draws: Hoeffding's inequality in kl form
        and Clopper-Pearson with Bentkus' factor e, two bounds of the same tail, so that the smaller is free. The
        other, empirical Bernstein, is good for many draws that differ little, as error rates of n examples do.
    Source: Hoeffding (1963), theorem 1; Bentkus, On Hoeffding's Inequalities (2004); Maurer and Pontil, Empirical
        Bernstein Bounds (2009), theorem 4.
    """
    draws = np.asarray(errors, dtype=float)
    n, mean = len(draws), math.fsum(draws) / len(draws)
    if n < 2:
        raise ValueError(f"errors holds {n} draw; it must hold at least 2")
    mean, half = min(1.0, mean), failure / 2
    tail = min(
        kl_inverse(mean, -math.log(half) / n),
        binomial_upper(min(n, math.ceil(math.fsum(draws))), n, half / math.e),
    )
    log = math.log(2 / half)
    bernstein = mean + math.sqrt(2 * draws.var(ddof=1) * log / n) + 7 * log / (3 * (n - 1))
    return float(min(1.0, tail, bernstein))


@checked
def pac_bayes_bound(
    *,
    errors: Annotated[Sequence[float] | np.ndarray, Numbers(0, 1)],
    n: Annotated[int, COUNT],
    delta: Annotated[Mapping[str, float] | float, Either(SIZE, Mapped(SIZE))],
    sigma: Annotated[Mapping[str, float] | float, Either(POSITIVE, Mapped(POSITIVE))],
    sigmas: Annotated[Mapping[str, Sequence[float]] | Sequence[float] | None, _SIGMAS] = None,
    price: Annotated[float, SIZE] = 0.0,
    posteriors: Annotated[int | None, COUNT.or_none()] = None,
    confidence: Annotated[float, CONFIDENCE] = 0.95,
) -> Bound:
    """PAC-Bayes-kl bound on the error of a network whose tuned weights carry Gaussian noise; no linearization.

    Prior: the starting weights with noise sigma; posterior: the tuned weights with the same noise. All that is trained
    counts: a new readout starts at its random initialization (or 0), so its distance from there is a group of its own.

    Args:
        errors: error rates of the n examples, without augmentation, one for each draw of the weights, (draws,).
        n: examples that the error rates are of; with a prior trained on a part of the data, the rest alone.
        delta: distance from prior to posterior, or group of parameters (a block, the readout) -> distance.
        sigma: standard deviation of the noise, or group -> standard deviation.
        sigmas: candidates for sigma, fixed before the data were seen, or group -> candidates. None says that sigma
            itself was fixed before.
        price: log of the number of subsets that S was chosen among, see `selection_price`. 0 where S was chosen on
            other data, and where every block carries noise, tuned or not, so that there is one prior for all subsets.
        posteriors: how often draws were made on these data before one result was reported; None means once for every
            candidate of sigma.
        confidence: in (0, 1).
    Returns:
        Not a sum by nature: each term is what the bound grows by when that is added to those before, in the order of
        `terms`, so the first to come looks largest.

    Proof sketch. For prior P fixed before the n examples, with probability 1 - failure for every posterior Q at once:
        kl(empirical error of Q, error of Q) <= (KL(Q, P) + log(2 sqrt(n) / failure)) / n. A union over priors adds
        the log of their number to KL. The empirical error of Q is known from draws alone; its upper bound takes
        `MONTE_CARLO_SHARE` of the failure probability, divided by `posteriors`.
    Source: Langford and Seeger (2001); Maurer, A Note on the PAC Bayesian Theorem (2004); Dziugaite and Roy (2017).
    """
    failure, divergence = 1 - confidence, gaussian_kl(delta, sigma)
    of_grid = _sigma_price(_by_group(delta), sigma, sigmas)
    posteriors = max(1, round(math.exp(min(of_grid, 30.0)))) if posteriors is None else posteriors
    upper = monte_carlo_upper(errors, MONTE_CARLO_SHARE * failure / posteriors)
    steps = [divergence, price, of_grid, math.log(2 * math.sqrt(n) / ((1 - MONTE_CARLO_SHARE) * failure))]
    budgets = np.cumsum(steps) / n
    values = np.maximum.accumulate([np.mean(errors), upper, *(kl_inverse(upper, float(b)) for b in budgets)])
    names = ("Monte Carlo", "complexity", "price of selection", "price of the grids", "confidence")
    terms = {"empirical error": float(values[0]), **dict(zip(names, np.diff(values).tolist(), strict=True))}
    inputs = {"n": n, "draws": len(errors), "delta": delta, "sigma": sigma, "KL": divergence, "price": price}
    return make_bound("PAC-Bayes", terms, inputs | {"posteriors": posteriors}, confidence, _RANDOMIZED)


def _by_group(value: Mapping[str, float] | float) -> dict[str, float]:
    return dict(value) if isinstance(value, Mapping) else {"": value}


def _sigma_price(groups: Mapping[str, float], sigma: object, sigmas: object) -> float:
    """Log of the number of priors: one candidate for all groups, or one for each."""
    if isinstance(sigmas, Mapping):
        if not isinstance(sigma, Mapping) or sigmas.keys() != sigma.keys():
            raise ValueError(f"sigmas has groups {list(sigmas)}; sigma must be a mapping with the same")
        return math.fsum(grid_price("sigma", sigma[name], sigmas[name]) for name in sigma)
    if isinstance(sigma, Mapping):
        return math.fsum(grid_price("sigma", sigma[name], sigmas) for name in groups)
    return grid_price("sigma", sigma, sigmas)
