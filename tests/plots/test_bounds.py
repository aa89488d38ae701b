"""Figures of bounds show every term, every value and every subset."""

import numpy as np
import pandas as pd
import pytest

from subtuning_lab.plots.bounds import plot_against_gap, plot_terms
from subtuning_lab.theory.bounds import bound_table, full_finetuning_bound, subtuning_bound, test_set_bound
from tests.plots import texts, ticks

SMALL = subtuning_bound(n=10**6, tuned_params=100, delta=2.0, n_blocks=9, max_blocks=3)
LARGE = full_finetuning_bound(n=100, params=100_000, delta=2.0)
TESTED = test_set_bound(30, 100)
BOUNDS = {"small": SMALL, "large": LARGE, "tested": TESTED}
GAPS = pd.DataFrame(
    {
        "label": ["linear probing", "block1", "block2", "greedy", "full finetuning"],
        "paper": [0.0, 0.5, 2.0, 3.0, 80.0],
        "gap": [0.05, 0.1, 0.2, 0.15, 0.3],
        "std": [0.01, 0.02, np.nan, 0.02, 0.03],
    }
)


def drawn(ax, place):
    """(left, width) of the pieces of the bar at a place."""
    bars = [patch for bars in ax.containers for patch in bars.patches]
    return sorted((b.get_x(), b.get_width()) for b in bars if abs(b.get_y() + b.get_height() / 2 - place) < 0.1)


def test_terms_are_stacked_without_gaps_up_to_the_value():
    ax = plot_terms(bound_table(BOUNDS))
    assert ticks(ax.yaxis) == list(BOUNDS)
    for place, bound in enumerate(BOUNDS.values()):
        pieces = drawn(ax, place)
        assert sorted(width for _, width in pieces) == pytest.approx(sorted(bound.terms.values()))
        ends = np.cumsum([width for _, width in pieces])
        assert [left for left, _ in pieces[1:]] == pytest.approx(ends[:-1]) and ends[-1] == pytest.approx(bound.value)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    assert ax.get_xlim()[1] > LARGE.value


def test_vacuous_bounds_and_their_values_are_named():
    written = texts(plot_terms(bound_table(BOUNDS)))
    assert f"{LARGE.value:.3g} (vacuous)" in written and f"{SMALL.value:.3g}" in written
    assert sum("(vacuous)" in text for text in written) == 1


def test_the_axis_says_what_is_bounded_and_the_legend_every_term():
    ax = plot_terms(bound_table(BOUNDS))
    assert ax.get_xlabel() == "bound on the gap or error, with confidence 95%"
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["complexity", "price of selection", "confidence", "empirical error"]
    colours = {bars.get_label(): bars.patches[0].get_facecolor() for bars in ax.containers}
    assert len(set(colours.values())) == len(colours)
    alone = plot_terms(bound_table({"tested": TESTED}))
    again = {bars.get_label(): bars.patches[0].get_facecolor() for bars in alone.containers}
    assert again["confidence"] == colours["confidence"]  # a term keeps its colour in every figure


def test_unknown_terms_get_colours_of_their_own():
    table = bound_table({"tested": TESTED})
    table = pd.concat([table, table.assign(term=["new", "newer"])])
    ax = plot_terms(table)
    assert len({bars.patches[0].get_facecolor() for bars in ax.containers}) == 4


def test_a_limit_cuts_long_bars_and_says_so():
    ax = plot_terms(bound_table(BOUNDS), limit=1.0)
    left, width = drawn(ax, 1)[-1]
    assert left + width <= 1.0 and sum(width for _, width in drawn(ax, 1)) == pytest.approx(1.0)
    assert f"... {LARGE.value:.3g} (vacuous)" in texts(ax) and f"{TESTED.value:.3g}" in texts(ax)
    assert sum(width for _, width in drawn(ax, 2)) == pytest.approx(TESTED.value)


def test_every_subset_with_a_bound_is_a_point():
    ax = plot_against_gap(GAPS, "paper", spread="std", name_points=["block2"])
    points = sorted((float(bar.lines[0].get_xdata()[0]), float(bar.lines[0].get_ydata()[0])) for bar in ax.containers)
    assert points == [(0.5, 0.1), (2.0, 0.2), (3.0, 0.15), (80.0, 0.3)]
    assert sum(bar.has_yerr for bar in ax.containers) == 3  # one has no spread
    assert sorted(text.get_text() for text in ax.get_legend().get_texts()) == [
        "full finetuning",
        "greedy",
        "single blocks",
    ]
    assert texts(ax) == ["block2"] and "4 subsets" in ax.get_title()


def test_the_correlation_stands_in_the_title_with_its_interval():
    ax = plot_against_gap(GAPS, "paper", correlation={"spearman": -0.3, "low": -0.8, "high": 0.25, "n": 9}, name="rate")
    assert "-0.30" in ax.get_title() and "-0.80 to +0.25" in ax.get_title()
    assert ax.get_title().startswith("rate: 4 subsets") and "n = 9" in ax.get_title()
    nothing = dict.fromkeys(("spearman", "low", "high"), np.nan)
    assert "no rank correlation" in plot_against_gap(GAPS, "paper", correlation=nothing).get_title()


def test_nothing_to_plot_is_said():
    with pytest.raises(ValueError, match="no subset has a paper above 0"):
        plot_against_gap(GAPS.assign(paper=0.0), "paper")
