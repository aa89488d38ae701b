"""Figures of searches and comparisons show every row, its spread and n."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from subtuning_lab import plot_confusion, plot_curves, plot_methods, plot_strategies, plot_trace, plot_tradeoff
from tests.plots import texts, ticks

NAMES = ("block1", "block2", "block3")


def row(direction, number, candidate, accuracy, kept, dropped=0):
    score = {"direction": direction, "round": number, "candidate": candidate, "accuracy": accuracy, "std": 0.05}
    return score | {"n": 6, "kept": kept, "dropped": dropped}


TRACE = pd.DataFrame(
    [
        row("forward", 0, "", 0.5, True),
        row("forward", 1, "block1", 0.6, False),
        row("forward", 1, "block2", 0.7, True),
        row("forward", 1, "block3", 0.4, False, dropped=1),
        row("forward", 2, "block1", 0.72, False),
        row("forward", 2, "block3", 0.71, False),
    ]
)
TABLE = pd.DataFrame(
    {
        "method": ["linear probing", "LoRA", "greedy"],
        "accuracy": [0.6, 0.7, 0.8],
        "std": [0.1, np.nan, 0.02],
        "n": [6, 1, 6],
        "params": [0, 1000, 50_000],
    }
)


def test_a_trace_shows_every_candidate_and_names_what_was_kept():
    ax = plot_trace(TRACE, NAMES, epsilon=0.05)
    points = [line for line in ax.lines if line.get_marker() in ("o", "x")]
    assert sorted(line.get_ydata()[0] for line in points) == sorted(TRACE["accuracy"])
    assert [line.get_ydata()[0] for line in points if line.get_marker() == "x"] == [0.4]  # dropped in a race
    assert "start\n50.0%" in texts(ax) and "+ block2\n70.0%" in texts(ax)
    assert any("must exceed 75.0%" in text for text in texts(ax)) and "n = 6" in ax.get_title()
    assert ticks(ax.xaxis) == ["start", "round 1", "round 2"]


def test_within_a_round_candidates_stand_in_the_networks_order():
    ax = plot_trace(TRACE[TRACE["round"] < 2], NAMES)
    places = {line.get_ydata()[0]: line.get_xdata()[0] for line in ax.lines if line.get_marker() in ("o", "x")}
    assert places[0.5] < places[0.6] < places[0.7] < places[0.4]


def test_removals_are_told_as_such():
    trace = pd.DataFrame([row("backward", 0, "", 0.7, True), row("backward", 1, "block3", 0.75, True)])
    assert "− block3\n75.0%" in texts(plot_trace(trace, NAMES))


def test_a_trace_of_two_directions_or_of_other_blocks_is_refused():
    with pytest.raises(ValueError, match="directions \\['backward', 'forward'\\]; draw one at a time"):
        plot_trace(pd.concat([TRACE, TRACE.assign(direction="backward")]), NAMES)
    with pytest.raises(ValueError, match="it must hold block3, which was a candidate"):
        plot_trace(TRACE, NAMES[:2])


def test_curves_have_a_line_and_a_band_per_method():
    table = pd.concat([TABLE.assign(train_size=size) for size in (100, 20)])
    ax = plot_curves(table)
    assert [line.get_label() for line in ax.lines] == TABLE["method"].tolist()
    assert all(line.get_xdata().tolist() == [20, 100] for line in ax.lines) and len(ax.collections) == 3
    assert ax.get_xscale() == "log" and ax.get_title().endswith("n = 1 to 6")
    assert len({line.get_color() for line in ax.lines}) == 3


def test_costs_of_zero_stand_at_the_left_edge():
    ax = plot_tradeoff(TABLE, xlabel="tuned parameters")
    places = [container[0].get_xdata()[0] for container in ax.containers]
    assert places[1:] == [1000, 50_000] and 0 < places[0] < 1000
    assert ax.get_xlabel() == "tuned parameters (left edge: 0)"


def test_bars_are_sorted_and_say_n():
    ax = plot_methods(TABLE)
    assert ticks(ax.yaxis) == ["linear probing", "LoRA", "greedy"]
    assert [bar.get_width() for bar in ax.patches] == [0.6, 0.7, 0.8] and "n = 1 to 6" in ax.get_title()


def test_a_method_keeps_its_colour_in_every_figure():
    curves = plot_curves(TABLE.assign(train_size=10))
    colour = {line.get_label(): line.get_color() for line in curves.lines}["greedy"]
    bars = plot_methods(TABLE.iloc[::-1])
    assert matplotlib.colors.to_hex(bars.patches[-1].get_facecolor()) == colour.lower()


def test_no_tick_is_above_all():
    ax = plot_tradeoff(TABLE.assign(accuracy=[0.9, 0.95, 1.0], std=0.1))
    assert max(ax.get_yticks()) <= 1.0 < ax.get_ylim()[1]


QUERIES = pd.DataFrame(
    [
        (method, strategy, size, start + size / 200 + bonus, 0.02, 3)
        for method, start in (("linear probing", 0.5), ("SubTuning", 0.2))
        for strategy, bonus in (("random", 0.0), ("margin", 0.1))
        for size in (20, 40, 80)
    ],
    columns=["method", "strategy", "train_size", "accuracy", "std", "n"],
)


def test_every_method_has_a_panel_and_every_strategy_a_line():
    axes = plot_strategies(QUERIES)
    assert [ax.get_title().split("\n")[0] for ax in axes] == ["linear probing", "SubTuning"]
    for ax, (_, group) in zip(axes, QUERIES.groupby("method", sort=False), strict=True):
        lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
        for strategy in ("random", "margin"):
            rows = group[group["strategy"] == strategy]
            assert lines[strategy] == rows[["train_size", "accuracy"]].to_numpy().tolist()
        assert len(ax.collections) == 2 and "n = 3" in ax.get_title()
    low, high = axes[0].get_ylim()
    assert axes[1].get_ylim() == (low, high) and low < QUERIES["accuracy"].min() and high > QUERIES["accuracy"].max()
    assert axes[0].get_legend() is None and max(axes[0].get_yticks()) <= 1.0


def test_given_panels_are_used_if_there_are_enough():
    _, axes = plt.subplots(1, 2)
    assert plot_strategies(QUERIES, axes) == list(axes)
    with pytest.raises(ValueError, match="1 axes for 2 methods: linear probing, SubTuning"):
        plot_strategies(QUERIES, axes[:1])


CLASSES = ["cat", "dog", "cow"]
CONFUSION = pd.DataFrame([[3, 1, 0], [0, 6, 0], [0, 0, 0]], CLASSES, CLASSES)


def test_a_confusion_matrix_shows_shares_of_each_true_class():
    ax = plot_confusion(CONFUSION)
    shares = ax.collections[0].get_array().reshape(3, 3)
    np.testing.assert_allclose(shares[:2], [[0.75, 0.25, 0], [0, 1, 0]])
    assert shares.mask[2].all() and [text for text in texts(ax) if text] == ["75", "25", "100"]
    assert ticks(ax.xaxis) == ticks(ax.yaxis) == CLASSES and ax.get_title().startswith("90.0% right, n = 10 images")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (CONFUSION.iloc[:2], "the same classes"),
        (CONFUSION[CLASSES[::-1]], "the same classes"),
        (-CONFUSION, "numbers of images"),
        (CONFUSION.astype(str), "something else than numbers"),
    ],
)
def test_what_is_no_confusion_matrix_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        plot_confusion(table)
