"""Rank correlations against scipy, the bootstrap's coverage, and errors of fold means by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from subtuning_lab.search.statistics import overlap_factor, rank_correlation, spearman


def test_spearman_is_scipys_for_every_pair_of_columns():
    pairs = np.random.default_rng(0).normal(size=(5, 4, 9, 2)).round(1)  # with ties
    expected = [[stats.spearmanr(*own.T).statistic for own in row] for row in pairs]
    assert spearman(pairs) == pytest.approx(np.array(expected), abs=1e-12)


@pytest.mark.parametrize("pairs", [np.ones((5, 2)), np.arange(4.0).reshape(2, 2), [[1, math.nan]] * 5])
def test_what_has_no_correlation_is_missing(pairs):
    assert math.isnan(spearman(np.asarray(pairs, dtype=float)))
    assert all(map(math.isnan, rank_correlation([np.asarray(pairs, dtype=float)[None]], resamples=5)))


def test_an_interval_covers_what_it_should():
    """Independent columns have correlation 0; of 90 % intervals about nine in ten hold it."""
    draws = np.random.default_rng(1).normal(size=(200, 1, 40, 2))
    inside = [low <= 0 <= high for _, low, high in (rank_correlation([own], 200, 0.9) for own in draws)]
    assert stats.binomtest(sum(inside), 200, 0.9).pvalue > 0.001


def test_views_of_a_group_are_resampled_together_and_groups_apart():
    pairs = np.random.default_rng(2).normal(size=(1, 12, 2))
    alone = rank_correlation([pairs])
    assert rank_correlation([np.repeat(pairs, 3, axis=0)]) == pytest.approx(alone)
    apart = rank_correlation([pairs, pairs])
    assert apart[0] == pytest.approx(alone[0]) and apart[2] - apart[1] < 0.9 * (alone[2] - alone[1])


def test_the_error_of_five_folds_is_half_as_large_again_as_the_usual_one():
    values = [0.5, 0.6, 0.8, 0.7, 0.9]
    assert np.std(values, ddof=1) * overlap_factor(5) == pytest.approx(1.5 * stats.sem(values))
    assert math.isnan(overlap_factor(1)) and overlap_factor(2) == pytest.approx(math.sqrt(1.5))
