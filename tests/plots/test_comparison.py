"""Figures of searches and comparisons show every row, its spread and n."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from subtuning_lab.plots.comparison import plot_curves, plot_methods, plot_trace, plot_tradeoff

matplotlib.use("Agg")
NAMES = ("block1", "block2", "block3")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def row(direction, number, candidate, accuracy, kept, dropped=0):
    own = {"direction": direction, "round": number, "candidate": candidate, "accuracy": accuracy, "std": 0.05}
    return own | {"n": 6, "kept": kept, "dropped": dropped}


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


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_a_trace_shows_every_candidate_and_names_what_was_kept():
    ax = plot_trace(TRACE, NAMES, epsilon=0.05)
    points = [line for line in ax.lines if line.get_marker() in ("o", "x")]
    assert sorted(line.get_ydata()[0] for line in points) == sorted(TRACE["accuracy"])
    assert [line.get_ydata()[0] for line in points if line.get_marker() == "x"] == [0.4]  # dropped in a race
    assert "start\n50.0%" in texts(ax) and "+ block2\n70.0%" in texts(ax)
    assert any("must exceed 75.0%" in text for text in texts(ax)) and "n = 6" in ax.get_title()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["start", "round 1", "round 2"]


def test_within_a_round_candidates_stand_in_the_networks_order():
    ax = plot_trace(TRACE[TRACE["round"] < 2], NAMES)
    places = {line.get_ydata()[0]: line.get_xdata()[0] for line in ax.lines if line.get_marker() in ("o", "x")}
    assert places[0.5] < places[0.6] < places[0.7] < places[0.4]


def test_removals_are_told_as_such():
    trace = pd.DataFrame([row("backward", 0, "", 0.7, True), row("backward", 1, "block3", 0.75, True)])
    assert "− block3\n75.0%" in texts(plot_trace(trace, NAMES))


def test_a_trace_of_two_directions_is_refused():
    with pytest.raises(ValueError, match="directions \\['backward', 'forward'\\]; draw one at a time"):
        plot_trace(pd.concat([TRACE, TRACE.assign(direction="backward")]), NAMES)


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
    assert [label.get_text() for label in ax.get_yticklabels()] == ["linear probing", "LoRA", "greedy"]
    assert [bar.get_width() for bar in ax.patches] == [0.6, 0.7, 0.8] and "n = 1 to 6" in ax.get_title()


def test_a_method_keeps_its_colour_in_every_figure():
    curves = plot_curves(TABLE.assign(train_size=10))
    colour = {line.get_label(): line.get_color() for line in curves.lines}["greedy"]
    bars = plot_methods(TABLE.iloc[::-1])
    assert matplotlib.colors.to_hex(bars.patches[-1].get_facecolor()) == colour.lower()


def test_no_tick_is_above_all():
    ax = plot_tradeoff(TABLE.assign(accuracy=[0.9, 0.95, 1.0], std=0.1))
    assert max(ax.get_yticks()) <= 1.0 < ax.get_ylim()[1]
