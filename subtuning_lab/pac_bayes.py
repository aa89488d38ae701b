"""Training-set bounds with all constants known: Rademacher for the linearized network, PAC-Bayes. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import rel_entr

from subtuning_lab.bounds import (
    SAME_SAMPLE,
    Bound,
    as_numbers,
    binomial_upper,
    check_count,
    check_real,
    check_share,
    empirical_term,
    failure_of,
    grid_price,
    make_bound,
)

MONTE_CARLO_SHARE = 0.1  # of the failure probability; the rest is for the training sample

_LINEARIZED = (
    SAME_SAMPLE,
    "the network is its linearization at the start (exact for linear probing alone)",
    'the start, its BatchNorm statistics included (bn="frozen"), does not depend on these examples',
    "margins, radii and the subsets that are paid for were fixed before the examples were seen",
)
_RANDOMIZED = (
    SAME_SAMPLE,
    "the error is that of weights drawn anew from the posterior for every prediction",
    'the prior\'s centre, BatchNorm statistics included (bn="frozen"), does not depend on these examples',
    "sigmas and the subsets that are paid for were fixed before the examples were seen",
    "the draws were made after the posterior was chosen",
)


def ramp_error(margins: Sequence[float] | np.ndarray, margin: float) -> float:
    """Mean ramp loss: 1 for examples that are wrong, 0 for those right by `margin` and more, linear between.

    Args:
        margins: logit of the right class minus the largest other logit, (n,).
        margin: gamma, above 0.
    """
    check_real("margin", margin, low=0.0, open_low=True)
    return float(np.clip(1 - as_numbers("margins", margins) / margin, 0, 1).mean())


def empirical_rademacher(feature_norms: Sequence[float] | np.ndarray, delta: float) -> float:
    """Bound on the empirical Rademacher complexity of {<psi, w> : |w| <= delta}, delta sqrt(sum |psi_i|^2) / n.

    Args:
        feature_norms: Frobenius norms |psi(x_i)| of the n examples, (n,).
        delta: radius.
    """
    check_real("delta", delta, low=0.0)
    norms = as_numbers("feature_norms", feature_norms, low=0.0)
    return float(delta * np.linalg.norm(norms) / len(norms))


def rademacher_bound(
    *,
    n: int,
    delta: float,
    feature_norms: Sequence[float] | np.ndarray | float,
    margin: float,
    empirical_error: float | None = None,
    deltas: Sequence[float] | None = None,
    margins: Sequence[float] | None = None,
    price: float = 0.0,
    confidence: float = 0.95,
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

    Raises:
        ValueError: an argument out of its range, by name.

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
    check_count("n", n, low=1)
    check_real("price", price, low=0.0)
    failure = failure_of(confidence)
    norm = _root_mean_square(feature_norms, n)
    radius, radii_price = _radius(delta, deltas)
    margin_price = grid_price("margin", margin, margins)
    steps = np.cumsum([math.log(2 / failure), price, radii_price + margin_price])
    roots = 3 * np.sqrt(steps / (2 * n))
    terms = {
        **empirical_term(empirical_error),
        "complexity": 4 / margin * radius * norm / math.sqrt(n),
        "price of selection": float(roots[1] - roots[0]),
        "price of the grids": float(roots[2] - roots[1]),
        "confidence": float(roots[0]),
    }
    inputs = {"n": n, "delta": delta, "radius": radius, "feature_norm": norm, "margin": margin, "price": price}
    return make_bound("Rademacher", terms, inputs, confidence, _LINEARIZED)


def binary_kl(q: float, p: float) -> float:
    """Kullback-Leibler divergence of two coins, in nats: q log(q / p) + (1 - q) log((1 - q) / (1 - p)).

    Args:
        q, p: probabilities in [0, 1].

    Returns:
        At least 0; infinite where p is 0 or 1 and q is not.
    """
    for name, value in {"q": q, "p": p}.items():
        check_share(name, value)
    return max(0.0, float(rel_entr(q, p) + rel_entr(1 - q, 1 - p)))


def kl_inverse(q: float, budget: float) -> float:
    """The largest p in [q, 1] with binary_kl(q, p) <= budget; errs upwards, by 1e-12 at most.

    Args:
        q: in [0, 1].
        budget: at least 0, may be infinite.
    """
    check_share("q", q)
    if budget != math.inf:
        check_real("budget", budget, low=0.0, high=math.inf)
    q, last = float(q), math.nextafter(1.0, 0.0)
    if budget == 0 or q == 1:
        return q
    if q >= last or binary_kl(q, last) <= budget:
        return 1.0
    return min(1.0, brentq(lambda p: binary_kl(q, p) - budget, q, last, xtol=1e-13) + 1e-12)


def gaussian_kl(delta: Mapping[str, float] | float, sigma: Mapping[str, float] | float) -> float:
    """Divergence of a Gaussian that was moved, sum over groups of delta^2 / (2 sigma^2), in nats.

    Args:
        delta: Euclidean distance moved, or group of parameters -> distance.
        sigma: standard deviation of every parameter, or group -> standard deviation, with the same groups.
    """
    deltas, sigmas = _by_group("delta", delta), _by_group("sigma", sigma)
    if isinstance(sigma, Mapping) and sigmas.keys() != deltas.keys():
        raise ValueError(f"sigma has groups {list(sigmas)}; it must have those of delta, {list(deltas)}")
    for name, value in deltas.items():
        check_real(f"delta{name and f'[{name!r}]'}", value, low=0.0)
    for name, value in sigmas.items():
        check_real(f"sigma{name and f'[{name!r}]'}", value, low=0.0, open_low=True)
    ratios = [deltas[name] / sigmas.get(name, sigma) for name in deltas]
    return math.fsum(ratio * ratio / 2 for ratio in ratios)


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
    check_real("failure", failure, low=0.0, high=1.0, open_low=True)
    draws = as_numbers("errors", errors, low=0.0, high=1.0)
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


def pac_bayes_bound(
    *,
    errors: Sequence[float] | np.ndarray,
    n: int,
    delta: Mapping[str, float] | float,
    sigma: Mapping[str, float] | float,
    sigmas: Mapping[str, Sequence[float]] | Sequence[float] | None = None,
    price: float = 0.0,
    posteriors: int | None = None,
    confidence: float = 0.95,
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
    check_count("n", n, low=1)
    check_real("price", price, low=0.0)
    failure, divergence = failure_of(confidence), gaussian_kl(delta, sigma)
    of_grid = _sigma_price(_by_group("delta", delta), sigma, sigmas)
    posteriors = max(1, round(math.exp(min(of_grid, 30.0)))) if posteriors is None else posteriors
    check_count("posteriors", posteriors, low=1)
    upper = monte_carlo_upper(errors, MONTE_CARLO_SHARE * failure / posteriors)
    steps = [divergence, price, of_grid, math.log(2 * math.sqrt(n) / ((1 - MONTE_CARLO_SHARE) * failure))]
    budgets = np.cumsum(steps) / n
    values = np.maximum.accumulate([np.mean(errors), upper, *(kl_inverse(upper, float(b)) for b in budgets)])
    names = ("Monte Carlo", "complexity", "price of selection", "price of the grids", "confidence")
    terms = {"empirical error": float(values[0]), **dict(zip(names, np.diff(values).tolist(), strict=True))}
    inputs = {"n": n, "draws": len(errors), "delta": delta, "sigma": sigma, "KL": divergence, "price": price}
    return make_bound("PAC-Bayes", terms, inputs | {"posteriors": posteriors}, confidence, _RANDOMIZED)


def _by_group(name: str, value: Mapping[str, float] | float) -> dict[str, float]:
    if isinstance(value, Mapping) and not value:
        raise ValueError(f"{name} is empty; it must be a number, or have at least one group")
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


def _root_mean_square(feature_norms: object, n: int) -> float:
    if isinstance(feature_norms, Sequence | np.ndarray) and not isinstance(feature_norms, str):
        norms = as_numbers("feature_norms", feature_norms, low=0.0)
        if len(norms) != n:
            raise ValueError(f"feature_norms holds {len(norms)} numbers; it must hold n, {n}")
        return empirical_rademacher(norms, 1.0) * math.sqrt(n)
    check_real("feature_norms", feature_norms, low=0.0)
    return float(feature_norms)


def _radius(delta: float, deltas: Sequence[float] | None) -> tuple[float, float]:
    """The smallest candidate that holds delta, and log of the number of candidates."""
    check_real("delta", delta, low=0.0)
    if deltas is None:
        return float(delta), 0.0
    grid = as_numbers("deltas", deltas, low=0.0)
    if delta > grid.max():
        raise ValueError(f"delta is {delta}; it must be at most {grid.max()}, the largest of deltas")
    return float(grid[grid >= delta].min()), math.log(len(grid))
