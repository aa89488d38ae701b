"""PAC-Bayes-kl: hand-worked values, limits, grids, a world with a known risk, bad input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from subtuning_lab.theory.bounds import geometric_grid, selection_price
from subtuning_lab.theory.pac_bayes import (
    MONTE_CARLO_SHARE,
    binary_kl,
    gaussian_kl,
    kl_inverse,
    monte_carlo_upper,
    pac_bayes_bound,
)
from tests.helpers import unit_directions

NAN, INF = float("nan"), float("inf")
DRAWS = tuple(np.linspace(0.05, 0.15, 200))


def pac_bayes(**changes):
    return pac_bayes_bound(**{"errors": DRAWS, "n": 1000, "delta": 3.0, "sigma": 0.5} | changes)


# ---- the binary divergence -----------------------------------------------------------------------------------------


def test_binary_kl_by_hand():
    assert binary_kl(0.5, 0.25) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert binary_kl(0, 0.3) == pytest.approx(-math.log(0.7)) and binary_kl(1, 0.3) == pytest.approx(-math.log(0.3))
    assert binary_kl(0.2, 0.2) == binary_kl(0, 0) == binary_kl(1, 1) == 0
    assert binary_kl(0.2, 0) == binary_kl(0.2, 1) == binary_kl(0, 1) == INF


@given(q=st.floats(0, 1), p=st.floats(1e-9, 1 - 1e-9))
@settings(max_examples=100, deadline=None)
def test_binary_kl_against_scipy_and_pinsker(q, p):
    assert binary_kl(q, p) == pytest.approx(float(stats.entropy([q, 1 - q], [p, 1 - p])), abs=1e-12)
    assert binary_kl(q, p) >= 2 * (q - p) ** 2 - 1e-12


@pytest.mark.parametrize("q", [0.0, 0.001, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("budget", [1e-4, 0.01, 0.2, 1.0, 5.0])
def test_kl_inverse_against_a_dense_grid(q, budget):
    grid = np.linspace(q, 1, 200_001)[1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = (q * np.log(q / grid) if q else 0.0) + (1 - q) * np.log((1 - q) / (1 - grid))
    held = grid[divergence <= budget]
    assert kl_inverse(q, budget) == pytest.approx(held[-1] if len(held) else q, abs=1e-5)


def test_kl_inverse_at_the_ends():
    assert kl_inverse(0, 0.3) == pytest.approx(1 - math.exp(-0.3), abs=1e-11)
    assert kl_inverse(0.3, 0) == 0.3 and kl_inverse(1, 0) == kl_inverse(1, 5) == 1
    assert kl_inverse(0.3, INF) == kl_inverse(0.3, 1e9) == kl_inverse(0.0, 800.0) == 1
    assert kl_inverse(math.nextafter(1, 0), 0.1) == 1


@given(q=st.floats(0, 1), more=st.floats(0, 1), budget=st.floats(0, 50), extra=st.floats(0, 50))
@settings(max_examples=100, deadline=None)
def test_kl_inverse_is_an_upper_inverse_and_monotone(q, more, budget, extra):
    p = kl_inverse(q, budget)
    assert q <= p <= 1
    assert p == 1 or binary_kl(q, p) >= budget - 1e-15
    assert kl_inverse(q, budget + extra) >= p - 2e-12
    assert kl_inverse(min(1.0, q + more), budget) >= p - 1e-7  # near q = 1 the divergence has no more digits


# ---- PAC-Bayes -----------------------------------------------------------------------------------------------------


def test_gaussian_kl_by_hand_and_against_densities():
    assert gaussian_kl(2.0, 0.5) == 8.0
    assert gaussian_kl({"block1": 2.0, "head": 3.0}, {"block1": 0.5, "head": 1.0}) == 8 + 4.5
    assert gaussian_kl({"block1": 3.0, "head": 4.0}, 2.0) == pytest.approx(gaussian_kl(5.0, 2.0))
    rng = np.random.default_rng(5)
    shift, sigma = rng.normal(size=3), 0.7
    draws = shift + sigma * rng.normal(size=(200_000, 3))
    ratios = stats.norm.logpdf(draws, shift, sigma).sum(1) - stats.norm.logpdf(draws, 0, sigma).sum(1)
    error = ratios.std() / math.sqrt(len(ratios))
    assert gaussian_kl(float(np.linalg.norm(shift)), sigma) == pytest.approx(ratios.mean(), abs=5 * error)


def test_pac_bayes_solves_its_equation():
    found = pac_bayes(price=selection_price(9, 3), sigmas=(0.25, 0.5), confidence=0.9)
    upper = monte_carlo_upper(DRAWS, MONTE_CARLO_SHARE * 0.1 / 2)
    budget = (18 + math.log(130) + math.log(2) + math.log(2 * math.sqrt(1000) / (0.9 * 0.1))) / 1000
    assert binary_kl(upper, found.value) == pytest.approx(budget, rel=1e-9)
    assert found.terms["empirical error"] == pytest.approx(0.1)
    assert found.terms["Monte Carlo"] == pytest.approx(upper - 0.1)
    assert list(found.terms)[2:] == ["complexity", "price of selection", "price of the grids", "confidence"]
    assert all(term > 0 for term in found.terms.values()) and found.inputs["KL"] == 18


def test_every_group_chooses_its_own_sigma_and_pays():
    deltas, grid = {"block1": 3.0, "head": 8.0}, geometric_grid(0.25, 2)
    own = pac_bayes(delta=deltas, sigma={"block1": 0.5, "head": 2.0}, sigmas=grid)
    assert own.inputs["posteriors"] == 16 and own.inputs["KL"] == 18 + 8
    by_name = pac_bayes(delta=deltas, sigma={"block1": 0.5, "head": 2.0}, sigmas={"block1": grid, "head": [2.0]})
    assert by_name.inputs["posteriors"] == 4 and by_name.value < own.value
    shared = pac_bayes(delta=deltas, sigma=0.5, sigmas=grid)
    assert shared.inputs["posteriors"] == 4 and shared.value > own.value  # 18 + 128
    assert pac_bayes(delta=deltas, sigma=0.5, sigmas=grid, posteriors=1).value < shared.value


def test_limits_of_pac_bayes():
    assert pac_bayes(delta=0.0).terms["complexity"] == 0
    many = pac_bayes(n=10**12, errors=np.tile(DRAWS, 500))
    assert many.value == pytest.approx(0.1, abs=2e-3) and many.value > 0.1
    assert pac_bayes(delta=1e5).value == 1 and pac_bayes(delta=1e5).vacuous
    assert pac_bayes(delta=1e90, sigma=1e-90).value == 1  # an infinite divergence
    assert pac_bayes(errors=[1.0] * 50).value == 1
    assert 0 < pac_bayes(errors=[0.0] * 50).value < 0.3


PAC_INCREASING = {
    "delta": st.floats(0, 100),
    "sigma": st.floats(0.01, 100).map(lambda sigma: -sigma),
    "price": st.floats(0, 1000),
    "confidence": st.floats(0.01, 0.999),
    "posteriors": st.integers(1, 10**9),
    "n": st.integers(1, 10**9).map(lambda n: -n),
}


@pytest.mark.parametrize("name", PAC_INCREASING)
def test_pac_bayes_is_monotone_in_every_argument(name):
    @settings(max_examples=25, deadline=None)
    @given(st.tuples(PAC_INCREASING[name], PAC_INCREASING[name]).map(sorted))
    def ordered(pair):
        low, high = (pac_bayes(**{name: abs(value)}).value for value in pair)
        assert low <= high + 1e-9

    ordered()


def test_pac_bayes_grows_with_errors_and_candidates_and_falls_with_draws():
    values = [pac_bayes(errors=np.array(DRAWS) + shift).value for shift in (0, 0.01, 0.2, 0.5)]
    assert values == sorted(values) and values[0] < values[-1]
    values = [pac_bayes(sigmas=geometric_grid(0.5, high), posteriors=1).value for high in (0.5, 1, 8)]
    assert values[0] == pac_bayes().value and values == sorted(set(values))
    values = [pac_bayes(errors=np.tile(DRAWS, times)).value for times in (1, 4, 50)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("n_draws", [5, 30, 600])
@pytest.mark.parametrize("beta", [(0.2, 0.6), (40, 360), (0.02, 0.3)], ids=["spread", "narrow", "mostly 0"])
def test_monte_carlo_upper_is_violated_as_seldom_as_promised(n_draws, beta):
    draws = np.random.default_rng(6).beta(*beta, size=(400, n_draws))
    values = np.array([monte_carlo_upper(row, 0.2) for row in draws])
    mean = beta[0] / sum(beta)
    violated = int((values < mean).sum())
    assert stats.binomtest(violated, len(draws), 0.2, alternative="greater").pvalue > 0.01
    assert (draws.mean(1) < mean).mean() > 0.3


def test_monte_carlo_upper_by_hand():
    draws = np.tile(DRAWS, 10)  # 2,000 that differ by 0.03: empirical Bernstein
    variance, log = ((draws - 0.1) ** 2).sum() / 1999, math.log(2 / 0.005)
    bernstein = 0.1 + math.sqrt(2 * variance * log / 2000) + 7 * log / (3 * 1999)
    assert monte_carlo_upper(draws, 0.01) == pytest.approx(bernstein)
    assert bernstein < kl_inverse(0.1, math.log(200) / 2000)
    zeros = monte_carlo_upper([0.0] * 40, 0.01)
    assert zeros == pytest.approx(1 - 0.005 ** (1 / 40), abs=1e-9)  # Hoeffding's, the better of the tails here
    for first in (1.0, 0.5):  # sums 20 and 19.5: Clopper-Pearson of 20 with Bentkus' factor
        found = monte_carlo_upper([first] + [1.0] * 19 + [0.0] * 80, 0.01)
        assert math.e * stats.binom.cdf(20, 100, found) == pytest.approx(0.005)
    assert monte_carlo_upper([1.0, 1.0], 0.5) == 1.0


def gibbs_world(n, repeats, move, sigma=0.6, seed=7):
    """Gaussian linear classifiers of the plane, labels with 10 % noise; the posterior moves to what fits the noise.

    The class of a direction u under w ~ N(mean, sigma^2) is wrong with a normal tail probability, so that the exact
    error is an integral over the circle. Returns exact errors, empirical errors of the posterior, and the bounds.
    """
    rng = np.random.default_rng(seed)
    circle = unit_directions(2000, [1.0])
    sides, truths, found, values = np.sign(circle[:, 0] + 1e-9), [], [], []
    for _ in range(repeats):
        points = unit_directions(2000, [1.0])[rng.integers(0, 2000, n)]
        labels = np.sign(points[:, 0] + 1e-9) * np.where(rng.random(n) < 0.1, -1, 1)
        overfit = (labels[:, None] * points).mean(0) * (1, 8)  # along noise rather than along signal
        mean = move * overfit / np.linalg.norm(overfit)
        wrong = stats.norm.cdf(-sides * (circle @ mean) / sigma)
        truths.append(0.1 + 0.8 * wrong.mean())
        draws = mean + sigma * rng.normal(size=(300, 2))
        errors = (np.sign(draws @ points.T) != labels).mean(1)
        found.append(stats.norm.cdf(-labels * (points @ mean) / sigma).mean())
        values.append(pac_bayes_bound(errors=errors, n=n, delta=move, sigma=sigma, confidence=0.9).value)
    return np.array(truths), np.array(found), np.array(values)


@pytest.mark.parametrize("move", [0.7, 1.5])
def test_pac_bayes_is_violated_as_seldom_as_promised(move):
    truths, found, values = gibbs_world(n=60, repeats=150, move=move)
    violated = int((truths > values).sum())
    assert stats.binomtest(violated, len(truths), 0.1, alternative="greater").pvalue > 0.01
    assert (truths > found).mean() > 0.3 and values.mean() < 1


def test_the_price_of_selection_is_needed_and_enough():
    """The best of all subsets of at most 8 of 16 blocks, each a mere coin: it looks good until its price is paid."""
    n, price, rng = 200, selection_price(16, 8), np.random.default_rng(8)
    lowest = 1 - (1 - rng.random(150)) ** math.exp(-price)  # the smallest of so many uniform numbers
    best = stats.binom.ppf(lowest, n, 0.5) / n

    def violated(price):
        draws = [[error] * 20_000 for error in np.unique(best)]
        values = [pac_bayes_bound(errors=row, n=n, delta=0, sigma=1, price=price).value for row in draws]
        return int((np.array(values)[np.unique(best, return_inverse=True)[1]] < 0.5).sum())

    assert stats.binomtest(violated(0.0), len(best), 0.05, alternative="greater").pvalue < 1e-6
    assert stats.binomtest(violated(price), len(best), 0.05, alternative="greater").pvalue > 0.01


# what is wrong: (call, error, pattern of the message)
CALLS = {
    "one draw": (lambda: pac_bayes(errors=[0.1]), ValueError, "errors holds 1 draw; .*at least 2"),
    "groups differ": (lambda: pac_bayes(delta={"a": 1.0}, sigma={"b": 1.0}), ValueError, r"\['b'\].*delta, \['a'\]"),
    "sigma not a candidate": (lambda: pac_bayes(sigmas=(1.0, 2.0)), ValueError, "sigma is 0.5; .*1.0, 2.0"),
    "candidates of groups, one sigma": (lambda: pac_bayes(sigmas={"a": [0.5]}), ValueError, "sigmas has groups"),
}


@pytest.mark.parametrize("what", CALLS)
def test_wrong_arguments_are_named(what):
    call, error, pattern = CALLS[what]
    with pytest.raises(error, match=pattern):
        call()
