"""The Rademacher bound: hand-worked values, limits, brute force, a world with a known risk, bad input."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from subtuning_lab import empirical_rademacher, geometric_grid, rademacher_bound, ramp_error
from tests.helpers import unit_directions

NAN, INF = float("nan"), float("inf")
WORKED = {"n": 400, "delta": 0.5, "feature_norms": 2.0, "margin": 0.8}


def rademacher(**changes):
    return rademacher_bound(**WORKED | changes)


def margins_of(logits, labels):
    """Right logit minus the largest other; logits (..., n, classes), labels (n,)."""
    right = logits[..., np.arange(len(labels)), labels]
    others = np.where(np.arange(logits.shape[-1]) == labels[:, None], -np.inf, logits)
    return right - others.max(-1)


def test_rademacher_by_hand():
    found = rademacher(empirical_error=0.1)
    assert found.terms["complexity"] == pytest.approx(4 / 0.8 * 0.5 * 2 / 20)
    assert found.terms["confidence"] == pytest.approx(3 * math.sqrt(math.log(40) / 800))
    assert found.terms["price of selection"] == found.terms["price of the grids"] == 0
    assert found.value == pytest.approx(0.1 + 0.25 + 3 * math.sqrt(math.log(40) / 800)) and found.of == "error"
    assert rademacher().value == pytest.approx(found.value - 0.1) and rademacher().of == "gap"
    assert any("linearization" in text for text in found.assumptions)
    paid = rademacher(price=math.log(7), deltas=(0.25, 0.5, 1.0), margins=(0.4, 0.8))
    assert paid.value == pytest.approx(0.25 + 3 * math.sqrt(math.log(2 * 7 * 3 * 2 / 0.05) / 800))


def test_feature_norms_as_numbers_or_their_root_mean_square():
    norms = np.random.default_rng(0).uniform(0, 3, 400)
    rms = math.sqrt((norms**2).mean())
    assert rademacher(feature_norms=norms).value == pytest.approx(rademacher(feature_norms=rms).value)
    assert rademacher(feature_norms=list(norms)).terms["complexity"] == pytest.approx(
        5 * empirical_rademacher(norms, 0.5)
    )


def test_a_measured_radius_is_rounded_up():
    deltas = geometric_grid(0.1, 10)
    found = rademacher(delta=0.9, deltas=deltas)
    assert found.inputs["radius"] == pytest.approx(1.6) and found.inputs["delta"] == 0.9
    assert found.terms["complexity"] == pytest.approx(rademacher(delta=1.6).terms["complexity"])
    exact = rademacher(delta=0.4, deltas=(0.2, 0.4, 0.8))
    assert exact.inputs["radius"] == 0.4 and exact.value > rademacher(delta=0.4).value


def test_limits_of_rademacher():
    assert rademacher(delta=0).value == rademacher(feature_norms=0.0).value == rademacher().terms["confidence"]
    values = [rademacher(n=10**power).value for power in range(2, 15, 2)]
    assert values == sorted(values, reverse=True) and values[-1] < 1e-5
    assert rademacher(delta=1e6).vacuous and not rademacher().vacuous


INCREASING = {
    "delta": st.floats(0, 1e6),
    "feature_norms": st.floats(0, 1e6),
    "margin": st.floats(1e-6, 1e6).map(lambda margin: -margin),
    "empirical_error": st.floats(0, 1),
    "price": st.floats(0, 1e4),
    "confidence": st.floats(1e-6, 1 - 1e-6),
    "n": st.integers(1, 10**12).map(lambda n: -n),
}


@pytest.mark.parametrize("name", INCREASING)
def test_rademacher_is_monotone_in_every_argument(name):
    @settings(max_examples=40, deadline=None)
    @given(st.tuples(INCREASING[name], INCREASING[name]).map(sorted))
    def ordered(pair):
        low, high = (rademacher(**{name: abs(value)}).value for value in pair)
        assert low <= high * (1 + 1e-9)

    ordered()


@pytest.mark.parametrize("shape", [(30, 1, 2), (30, 3, 5), (80, 10, 40)])
def test_rademacher_complexity_against_brute_force(shape):
    """The supremum over the ball is the norm of the signed sum; Khintchine: the bound is at most sqrt(2) too large."""
    rng = np.random.default_rng(2)
    features = rng.normal(size=shape) * rng.uniform(0.1, 2, (shape[0], 1, 1))
    signs = rng.choice((-1.0, 1.0), (4000, shape[0], shape[1]))
    sums = np.einsum("smk,mkd->sd", signs, features, optimize=True)
    estimate = 0.7 * np.linalg.norm(sums, axis=1).mean() / shape[0]
    bound = empirical_rademacher(np.linalg.norm(features, axis=(1, 2)), 0.7)
    assert bound / math.sqrt(2) < estimate < bound


@pytest.mark.parametrize("n", [2, 5, 8])
def test_contraction_of_the_ramp_against_brute_force(n):
    """All signs, and a fine grid of w in the disc: the losses' complexity stays below (2 / gamma) the features'."""
    rng, radius, gamma, classes = np.random.default_rng(n), 1.0, 2.0, 3
    features, labels = rng.normal(size=(n, classes, 2)), rng.integers(0, classes, n)
    weights = unit_directions(120, np.linspace(0, radius, 12))
    for start in (np.zeros((n, classes)), rng.normal(size=(n, classes))):
        logits = start + np.einsum("mkd,wd->wmk", features, weights)
        losses = np.clip(1 - margins_of(logits, labels) / gamma, 0, 1)  # (w, n)
        signs = np.array(list(product((-1, 1), repeat=n)))
        complexity = (signs @ losses.T).max(1).mean() / n
        bound = 2 / gamma * empirical_rademacher(np.linalg.norm(features, axis=(1, 2)), radius)
        assert 0.05 * bound < complexity < bound


def test_the_margin_is_sqrt_2_lipschitz_in_the_logits():
    rng = np.random.default_rng(3)
    logits, moves, labels = rng.normal(size=(5000, 4)), rng.normal(size=(5000, 4)), rng.integers(0, 4, 5000)
    change = np.abs(margins_of(logits + moves, labels) - margins_of(logits, labels))
    assert (change <= math.sqrt(2) * np.linalg.norm(moves, axis=1) + 1e-12).all()
    logits, move = np.array([[3.0, 2.0, 0.0]]), np.array([[-0.1, 0.1, 0.0]])
    assert margins_of(logits, np.array([0])) - margins_of(logits + move, np.array([0])) == pytest.approx(0.2)


def test_ramp_error_by_hand():
    assert ramp_error([-1, 0, 0.5, 1, 2, 3], 2) == pytest.approx((1 + 1 + 0.75 + 0.5) / 6)
    margins = np.random.default_rng(4).normal(size=100)
    assert (margins <= 0).mean() <= ramp_error(margins, 1e-9) <= ramp_error(margins, 0.5) <= ramp_error(margins, 2)


def adversary(n, repeats, radius=1.0, gamma=0.3):
    """A world of 8 inputs and 3 noisy classes, and a learner that takes of all w the one with the largest gap.

    Returns exact risks, empirical ramp errors and the bounds' values, (repeats,).
    """
    rng = np.random.default_rng(0)
    features = rng.normal(size=(8, 3, 2))
    inputs, labels = np.repeat(np.arange(8), 3), np.tile(np.arange(3), 8)
    cells = (rng.dirichlet(np.ones(8))[:, None] * rng.dirichlet(np.ones(3), 8)).ravel()  # of (input, label)
    weights = unit_directions(90, np.linspace(0, radius, 6))
    margins = margins_of(np.einsum("xkd,wd->wxk", features, weights)[:, inputs], labels)  # (w, cell)
    risks, ramps = (margins <= 0) @ cells, np.clip(1 - margins / gamma, 0, 1)
    shares = rng.multinomial(n, cells, repeats) / n
    empirical = np.minimum(shares @ ramps.T, 1.0)  # (repeats, w)
    worst = (risks - empirical).argmax(1)
    norms, errors = np.linalg.norm(features, axis=(1, 2))[inputs], empirical[np.arange(repeats), worst]
    values = [
        rademacher_bound(
            n=n, delta=radius, feature_norms=math.sqrt(share @ norms**2), margin=gamma, empirical_error=error
        ).value
        for share, error in zip(shares, errors, strict=True)
    ]
    return risks[worst], errors, np.array(values)


def test_rademacher_is_violated_as_seldom_as_promised():
    risks, errors, values = adversary(n=20_000, repeats=400)
    violated = int((risks > values).sum())
    assert stats.binomtest(violated, len(risks), 0.05, alternative="greater").pvalue > 0.01
    assert (risks > errors).mean() > 0.5 and values.mean() < 1  # the learner does fool itself; the bound says something


# what is wrong: (call, error, pattern of the message)
CALLS = {
    "margin not a candidate": (lambda: rademacher(margins=(0.5, 1.0)), ValueError, "margin is 0.8; .*0.5, 1.0"),
    "margin tiny": (lambda: rademacher(margin=5e-324), ValueError, "is inf; it must be"),
    "delta beyond the radii": (lambda: rademacher(deltas=(0.1, 0.2)), ValueError, "delta is 0.5; .*at most 0.2"),
    "norms of other examples": (lambda: rademacher(feature_norms=[1.0] * 399), ValueError, "399 numbers.*n, 400"),
}


@pytest.mark.parametrize("what", CALLS)
def test_wrong_arguments_are_named(what):
    call, error, pattern = CALLS[what]
    with pytest.raises(error, match=pattern):
        call()
