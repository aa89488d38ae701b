"""What all figures share: they draw where they are told, refuse wrong tables, and write numbers in one way."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import subtuning_lab as lab
from subtuning_lab.plots import style
from subtuning_lab.theory.bounds import bound_table
from tests.plots import test_ablations, test_bounds, test_claims, test_comparison, test_merge, test_profiles, test_shift

VARIANTS = pd.DataFrame({"subset": ["a"], "method": ["x"], "accuracy": [0.5], "std": [0.1], "n": [3]})
GAPS = pd.DataFrame({"subset": ["a"], "variant": ["x"], "difference": [0.1], "error": [np.nan], "n": [2]})
CURVE = pd.concat([VARIANTS.assign(alpha=0.5, images=images) for images in ("target", "clean")])
CALLS = {
    "plot_alphas": (CURVE, 0.5),
    "plot_against_gap": (test_bounds.GAPS, "paper"),
    "plot_cases": (test_claims.table(("here", 0.1, 0.0, 0.2)),),
    "plot_choices": (test_merge.CHOICES, "ratio"),
    "plot_confusion": (test_comparison.CONFUSION,),
    "plot_curves": (test_comparison.TABLE.assign(train_size=5),),
    "plot_differences": (GAPS,),
    "plot_forgetting": (VARIANTS.assign(train_size=5, clean_accuracy=0.5, clean_std=np.nan),),
    "plot_fork": (test_merge.table({"a": ["block1"]}),),
    "plot_interpolation": (CURVE,),
    "plot_methods": (test_comparison.TABLE,),
    "plot_network": (["stem", "tail"],),
    "plot_pairs": (test_profiles.profile([(("a",), 0.5, 0.1), (("b",), 0.5, 0.1), (("a", "b"), 0.5, 0.1)], 2),),
    "plot_profile": (test_profiles.profile(test_profiles.SINGLES),),
    "plot_shift_profiles": ({"noise@5": test_shift.profile([0.9, 0.5, 0.4, 0.3, 0.8])},),
    "plot_shifts": (VARIANTS.assign(train_size=5, shift="noise@5"),),
    "plot_stability": (test_ablations.STABILITY,),
    "plot_steps": (GAPS.assign(train_size=5, shift="noise@5", block="b1", step=1.0, chosen=1),),
    "plot_terms": (bound_table(test_bounds.BOUNDS),),
    "plot_trace": (test_comparison.TRACE, test_comparison.NAMES),
    "plot_tradeoff": (test_comparison.TABLE,),
    "plot_variants": (VARIANTS,),
}


def test_every_public_figure_is_here():
    assert {name for name in lab.plots.__all__ if name.startswith("plot_")} == {*CALLS, "plot_strategies"}


@pytest.mark.parametrize("name", CALLS)
def test_a_figure_draws_where_it_is_told_and_else_on_one_page(name):
    draw = getattr(lab.plots, name)
    ax = draw(*CALLS[name])
    assert len(plt.get_fignums()) == 1 and ax.figure.get_size_inches()[0] <= 16
    _, given = plt.subplots()
    assert draw(*CALLS[name], ax=given) is given and len(plt.get_fignums()) == 2


@pytest.mark.parametrize("name", CALLS)
def test_a_figure_refuses_what_it_cannot_draw(name):
    """Wrong tables, and wrong values of everything else, before a figure is opened."""
    draw, good = getattr(lab.plots, name), CALLS[name]
    for place, (parameter, rule) in enumerate(draw.rules.items()):
        for value in rule.wrong():
            given = good[:place] if place < len(good) else good
            with pytest.raises((TypeError, ValueError), match=parameter):
                draw(*given, **{parameter: value}, **{"alpha": 0.5} if name == "plot_alphas" and place == 0 else {})
    assert not plt.get_fignums()


def test_numbers_are_written_in_one_way():
    assert style.percent(0.9549, 0.039) == "95.5% ± 3.9%"
    assert style.percent(0.5) == style.percent(0.5, np.nan) == style.percent(0.5, pd.NA) == "50.0%"
    assert style.percent(np.nan, np.nan) == "not available"
    assert style.count([3, 3]) == "n = 3" and style.count(pd.Series([6, 3])) == "n = 3 to 6"


def test_ticks_are_percents_that_need_no_rounding():
    _, ax = plt.subplots()
    ax.plot([0, 1], [0.9, 1.1])
    style.accuracy_axis(ax)
    assert max(ax.get_yticks()) <= 1.0 and all(abs(100 * tick - round(100 * tick)) < 1e-9 for tick in ax.get_yticks())
