"""Figures of shifts: what stands in them is what the tables say."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from subtuning_lab.plots.shift import plot_forgetting, plot_shift_profiles, plot_shifts, plot_steps
from subtuning_lab.plots.style import ORANGE
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, Profile
from tests.plots import texts, ticks

SCORES = {
    ("noise@5", "no adaptation"): (0.2, 0.9),
    ("noise@5", "stage 1"): (0.7, 0.8),
    ("noise@5", "greedy"): (0.6, 0.5),
    ("contrast@5", "no adaptation"): (0.1, 0.9),
    ("contrast@5", "stage 1"): (0.3, 0.7),
    ("contrast@5", "greedy"): (0.8, 0.6),
    ("digits", "greedy"): (0.5, np.nan),
}


@pytest.fixture
def summary() -> pd.DataFrame:
    rows = [(100, *place, accuracy, 0.02, clean, 0.01, 3) for place, (accuracy, clean) in SCORES.items()]
    columns = ["train_size", "shift", "method", "accuracy", "std", "clean_accuracy", "clean_std", "n"]
    return pd.DataFrame(rows, columns=columns)


def test_every_shift_and_method_has_its_cell_and_the_best_is_framed(summary):
    ax = plot_shifts(summary)
    assert ticks(ax.xaxis) == ["no adaptation", "stage 1", "greedy"]
    assert ticks(ax.yaxis) == ["noise@5", "contrast@5", "digits"]
    assert {"20 ± 2", "70 ± 2", "80 ± 2"} <= set(texts(ax)) and "n = 3" in ax.get_title()
    framed = [patch.get_xy() for patch in ax.patches if patch.get_edgecolor() == to_rgba(ORANGE)]
    assert framed == [(1, 0), (2, 1), (2, 2)]
    values = ax.collections[0].get_array().reshape(3, 3)
    assert np.ma.is_masked(values[2, 0]) and values[1, 2] == pytest.approx(0.8)


def test_one_score_has_no_spread(summary):
    assert {"20", "70", "80"} <= set(texts(plot_shifts(summary.assign(std=np.nan, n=1))))


def test_steps_are_coloured_by_when_and_written_by_how_often():
    rows = [
        (50, "noise@5", "b1", 1.0, 3, 3),
        (50, "noise@5", "b2", 2.5, 2, 3),
        (50, "noise@5", "b3", np.nan, 0, 3),
        (50, "contrast@5", "b1", np.nan, 0, 3),
        (50, "contrast@5", "b2", np.nan, 0, 3),
        (50, "contrast@5", "b3", 1.0, 1, 3),
    ]
    ax = plot_steps(pd.DataFrame(rows, columns=["train_size", "shift", "block", "step", "chosen", "n"]))
    assert sorted(filter(None, texts(ax))) == ["1/3", "2/3", "3/3"]
    values = ax.collections[0].get_array().reshape(2, 3)
    assert values.mask.tolist() == [[False, False, True], [True, True, False]] and values[0, 1] == 2.5
    assert ax.get_xlabel() == "block, from input to output" and "50 labelled images" in ax.get_title()


def test_no_chosen_block_can_be_drawn():
    rows = [(50, "noise@5", "b1", np.nan, 0, 1), (50, "noise@5", "b2", np.nan, 0, 1)]
    ax = plot_steps(pd.DataFrame(rows, columns=["train_size", "shift", "block", "step", "chosen", "n"]))
    assert not list(filter(None, texts(ax)))


def test_forgetting_has_a_point_per_method_and_a_line_at_the_source(summary):
    inputs = summary[summary["shift"] != "digits"]
    numbers = ["accuracy", "std", "clean_accuracy", "clean_std", "n"]
    average = inputs.groupby("method", sort=False)[numbers].mean().reset_index().assign(train_size=100)
    ax = plot_forgetting(average, inputs)
    points = {bar.get_label(): bar.lines[0].get_xydata()[0].tolist() for bar in ax.containers}
    assert points == {row.method: pytest.approx([row.clean_accuracy, row.accuracy]) for row in average.itertuples()}
    assert sum(len(own.get_offsets()) for own in ax.collections if len(own.get_offsets()) == 2) == 6
    assert any(line.get_xdata() == [0.9, 0.9] for line in ax.lines if len(line.get_xdata()) == 2)
    assert "dotted: before" in ax.get_xlabel()


def profile(accuracies: list[float]) -> Profile:
    labels = ["b1", "b2", "b3", LINEAR_PROBING, FULL_FINETUNING]
    kinds, places = ["blocks"] * 3 + labels[3:], [1, 2, 3, None, None]
    columns = {"label": labels, "kind": kinds, "position": places, "accuracy": accuracies, "std": 0.01, "n": 4}
    columns["blocks"] = [("b1",), ("b2",), ("b3",), (), ("stem", "b1", "b2", "b3", "tail")]
    return Profile(pd.DataFrame(columns), pd.DataFrame(), 1, "tiny")


def test_profiles_share_axes_with_probing_left_and_finetuning_right():
    ax = plot_shift_profiles(
        {"noise@5": profile([0.9, 0.5, 0.4, 0.3, 0.8]), "digits": profile([0.1, 0.2, 0.6, 0.05, 0.7])}, ["digits"]
    )
    assert ticks(ax.xaxis) == [LINEAR_PROBING, "b1", "b2", "b3", FULL_FINETUNING]
    noise, digits = (line for line in ax.lines if len(line.get_xdata()) == 3)
    ends = next(line for line in ax.lines if line.get_marker() == noise.get_marker() and line is not noise)
    assert noise.get_ydata().tolist() == [0.9, 0.5, 0.4] and ends.get_xydata().tolist() == [[0, 0.3], [4, 0.8]]
    assert (noise.get_linestyle(), digits.get_linestyle()) == ("-", "--") and "n = 4" in ax.get_title()


def test_bad_tables_are_named(summary):
    two = pd.concat([summary, summary.assign(train_size=300)])
    for draw in (plot_shifts, plot_forgetting):
        with pytest.raises(ValueError, match="sizes 100, 300; draw one"):
            draw(two)
    with pytest.raises(ValueError, match="no adaptation is there twice under noise@5"):
        plot_shifts(pd.concat([summary, summary[:1]]))
    with pytest.raises(ValueError, match="profiles is empty"):
        plot_shift_profiles({})
    one = profile([0.9, 0.5, 0.4, 0.3, 0.8])
    other = Profile(one.table.assign(label=one.table["label"].str.upper()), one.scores, 1, "other")
    with pytest.raises(ValueError, match="different parts"):
        plot_shift_profiles({"a": one, "b": other})
    with pytest.raises(TypeError, match=r"profiles\['b'\] is .*; it must be a Profile"):
        plot_shift_profiles({"a": one, "b": one.table})
