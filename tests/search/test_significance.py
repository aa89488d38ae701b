"""Paired tests: values by hand, scipy as reference, and the rejection rate where nothing is better."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from subtuning_lab.search.significance import SignificantGain, compare_with_best, corrected_p, fold_difference, holm


def rows(accuracies, folds=5):
    """Scores of one subset: all folds of the first seed, then those of the next."""
    places = [(i % folds, i // folds) for i in range(len(accuracies))]
    return pd.DataFrame(places, columns=["fold", "seed"]).assign(accuracy=accuracies)


def test_a_value_by_hand():
    # differences 1 to 5 %: mean 3, variance 2.5; error = sqrt(2.5 * (1/5 + 1/4)) = 1.06066; t = 2.82843, 4 degrees
    # of freedom, whose distribution is 1/2 + 3/8 * x * (1 - x**2 / 12), x = 2 sqrt(t**2 / (4 + t**2)) = 1.632993
    p = fold_difference(rows([0.51, 0.62, 0.53, 0.64, 0.55]), rows([0.5, 0.6, 0.5, 0.6, 0.5])).p
    x = 2 * math.sqrt(8 / 12)
    assert p == pytest.approx(0.5 - 3 / 8 * x * (1 - x**2 / 12), abs=1e-9)
    assert p == pytest.approx(0.02371, abs=1e-5)


def test_without_overlap_it_is_the_usual_paired_t_test():
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.normal(size=(2, 7))
        expected = stats.ttest_rel(a, b, alternative="greater").pvalue
        assert corrected_p(a - b, overlap=0) == pytest.approx(expected, abs=1e-9)
        assert corrected_p(a - b, overlap=0.25) > expected or (a - b).mean() < 0


def test_seeds_are_averaged_within_their_fold_first():
    # differences by fold and seed; their means per fold are 1, 2, 3, 4, 5 %, the example above
    first, second = np.array([0.0, 0.03, 0.02, 0.07, 0.01]), np.array([0.02, 0.01, 0.04, 0.01, 0.09])
    base = np.array([0.5, 0.6, 0.5, 0.6, 0.5] * 2)
    two = fold_difference(rows(base + np.concatenate([first, second])), rows(base))
    assert (two.mean, two.folds) == (pytest.approx(0.03), 5) and two.p == pytest.approx(0.02371, abs=1e-5)
    assert two.error == pytest.approx(math.sqrt(2.5 * (1 / 5 + 1 / 4)) / 100)


def test_pairs_are_matched_by_fold_and_seed_not_by_place():
    better, worse = rows([0.5, 0.9, 0.7, 0.8, 0.6] * 2), rows([0.4, 0.88, 0.6, 0.7, 0.55] * 2)
    expected = fold_difference(better, worse).p
    assert fold_difference(better.sample(frac=1, random_state=0), worse).p == pytest.approx(expected, abs=1e-15)


def test_equal_scores_are_no_evidence():
    assert fold_difference(rows([0.5, 0.6, 0.7, 0.8, 0.9]), rows([0.5, 0.6, 0.7, 0.8, 0.9])).p == 1.0


@pytest.mark.parametrize("gain, p", [(0.1, 2.0**-5), (-0.1, 1.0)])
def test_constant_differences_leave_the_sign_test(gain, p):
    base = np.array([0.3, 0.1, 0.7, 0.2, 0.6])  # whose sums with 0.1 round differently
    assert np.ptp((base + gain) - base) > 0
    assert fold_difference(rows(base + gain), rows(base)).p == p


def null_differences(folds, seeds, noise, runs, generator):
    """Differences (runs, folds, seeds) of two equal subsets: luck common to folds, that of a fold's images, of seeds.

    Nadeau and Bengio take folds' errors to be correlated as much as their share of validation images, 1 / folds.
    """
    common = generator.normal(size=(runs, 1, 1)) * math.sqrt(1 / folds)
    images = generator.normal(size=(runs, folds, 1)) * math.sqrt(1 - 1 / folds)
    return common + images + noise * generator.normal(size=(runs, folds, seeds))


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
@pytest.mark.parametrize("seeds", [1, 3, 10])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_where_nothing_is_better_it_rejects_no_more_often_than_alpha(folds, seeds, noise):
    generator, runs, overlap = np.random.default_rng([folds, seeds, int(noise)]), 1000, 1 / (folds - 1)
    drawn = null_differences(folds, seeds, noise, runs, generator)
    means = drawn.mean(axis=2)
    rejected = sum(corrected_p(own, overlap) <= 0.05 for own in means)
    assert stats.binomtest(rejected, runs, 0.05, alternative="greater").pvalue > 1e-4
    if noise == 0:  # the model that the correction is made for: exact
        assert stats.binomtest(rejected, runs, 0.05).pvalue > 1e-4
    if seeds == 3 and folds == 2 and noise == 0:  # seeds counted as if they were folds
        false = [corrected_p(own.ravel() + 1e-6 * generator.normal(size=own.size), overlap) for own in drawn[:500]]
        assert np.mean(np.array(false) <= 0.05) > 0.12


def test_a_real_gain_is_found():
    generator = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        base = generator.normal(0.6, 0.05, size=15)
        found += fold_difference(rows(base + generator.normal(0.1, 0.04, size=15)), rows(base)).p <= 0.05
    assert found > 190


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.5))
def test_holm_rejects_what_stepping_down_rejects(values, alpha):
    expected = set()
    for step, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[place] * (len(values) - step) > alpha:
            break
        expected.add(place)
    assert {i for i, p in enumerate(holm(values)) if p <= alpha} == expected


def test_a_rule_corrects_for_choosing_the_best_of_many_but_not_for_removals():
    generator = np.random.default_rng(4)
    current, *candidates = (rows(generator.normal(0.7, 0.05, size=5)) for _ in range(5))
    rule = SignificantGain(0.1)
    gains = [fold_difference(one, current).p for one in candidates]
    assert rule.p_values(current, candidates, larger=True) == holm(gains)
    assert rule.p_values(current, [None, *candidates], larger=True) == holm([1.0, *gains])
    losses = rule.p_values(current, [None, *candidates], larger=False)
    assert math.isnan(losses[0]) and losses[1:] == [fold_difference(current, one).p for one in candidates]


def test_scores_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match="same folds and seeds"):
        fold_difference(rows([0.5, 0.6, 0.7]), rows([0.5, 0.6]))
    with pytest.raises(ValueError, match="same folds and seeds"):
        fold_difference(rows([0.5, 0.6]).assign(fold=[1, 2]), rows([0.5, 0.6]))
    alone = rows([0.5, 0.6], folds=1)
    assert math.isnan(fold_difference(alone, alone).p) and math.isnan(fold_difference(alone, alone).error)
    for larger in (True, False):
        with pytest.raises(ValueError, match="at least 2, got 1"):
            SignificantGain().p_values(alone, [alone], larger)
    for wrong in ([0.1], [0.1, math.nan], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="at least 2 finite differences"):
            corrected_p(np.array(wrong), 0.25)


def test_who_is_within_one_paired_standard_error_of_the_best():
    """Folds differ much and subsets little: unpaired errors would call everything equal."""
    hard, better = np.array([0.2, 0.9, 0.5, 0.7, 0.4]), np.array([0.05, 0.06, 0.04, 0.05, 0.06])
    tables = {("b1",): hard + better, ("b2",): hard, ("b3",): hard + better - [0.01, -0.01, 0.01, -0.01, 0.005]}
    scores = pd.concat([rows(values).assign(blocks=[blocks] * 5) for blocks, values in tables.items()])
    diverged = rows([0.9, math.nan, 0.9, 0.9, 0.9]).assign(blocks=[("b4",)] * 5)
    table = compare_with_best(pd.concat([scores, diverged]))
    assert table["within"].tolist() == [True, False, True, False]
    assert table["difference"].tolist()[:3] == pytest.approx([0, -0.052, -0.001]) and math.isnan(
        table["difference"].iloc[3]
    )
    assert table["error"].tolist()[1] == pytest.approx(better.std(ddof=1) * math.sqrt(1 / 5 + 1 / 4))
    given_up = scores.assign(dropped=[1 if blocks == ("b1",) else 0 for blocks in scores["blocks"]])
    assert compare_with_best(given_up)["within"].tolist() == [False, False, True]
