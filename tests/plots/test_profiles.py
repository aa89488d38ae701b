"""Figures of profiles and networks: what stands in them is what the tables say."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.patches import FancyBboxPatch

from subtuning_lab.plots.profiles import (
    plot_examples,
    plot_flops,
    plot_network,
    plot_pairs,
    plot_profile,
    plot_tried,
    share_limits,
)
from subtuning_lab.plots.style import BLUE, GREEN, LIGHT, PALE_BLUE, PURPLE
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, Profile
from tests.plots import texts, ticks

PARTS = ("stem", "b1", "b2", "tail")


def profile(rows, window=1) -> Profile:
    """Of (blocks, accuracy, std); linear probing and full finetuning stand last."""
    rows = [*rows, ((), 0.3, 0.01), (PARTS, 0.8, np.nan)]
    table = pd.DataFrame(rows, columns=["blocks", "accuracy", "std"])
    table["kind"] = ["blocks"] * (len(rows) - 2) + [LINEAR_PROBING, FULL_FINETUNING]
    table["label"] = [" + ".join(blocks) or LINEAR_PROBING for blocks, *_ in rows[:-1]] + [FULL_FINETUNING]
    return Profile(table.assign(params=1500, n=[4] * (len(rows) - 1) + [1]), table.iloc[:0], window, "tiny")


SINGLES = [(("b1",), 0.5, 0.1), (("b2",), 0.7, np.nan)]


def bars(ax) -> list:
    return next(drawn for drawn in ax.containers if isinstance(drawn, BarContainer)).patches


def test_a_profile_has_a_bar_per_block_and_a_line_per_reference():
    ax = plot_profile(profile(SINGLES), highlight=["b2"])
    assert [bar.get_height() for bar in bars(ax)] == [0.5, 0.7] and ticks(ax.xaxis) == ["b1", "b2"]
    assert [to_hex(bar.get_facecolor()) for bar in bars(ax)] == [PALE_BLUE.lower(), BLUE.lower()]
    assert ax.get_title().endswith("n = 1 to 4 scores each") and texts(ax) == ["1.5 k", "1.5 k"]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["linear probing: 30.0% ± 1.0%", "full finetuning: 80.0%"]  # one score has no spread


def test_blocks_that_the_profile_does_not_know_are_refused():
    with pytest.raises(ValueError, match="highlight names b9, which is not in the profile; it has b1, b2, stem, tail"):
        plot_profile(profile(SINGLES), highlight=["b1", "b9"])
    with pytest.raises(ValueError, match="no blocks"):
        plot_profile(profile([]))


def test_tried_subsets_are_further_bars_in_their_own_colour():
    whole = profile(SINGLES)
    tried = whole.table.iloc[[0]].assign(label="b1 + b2", blocks=[("b1", "b2")], accuracy=0.9)
    ax = plot_tried(whole, tried)
    assert [bar.get_height() for bar in bars(ax)] == [0.5, 0.7, 0.9] and ticks(ax.xaxis)[-1] == "b1 +\nb2"
    assert to_hex(bars(ax)[-1].get_facecolor()) == PURPLE.lower()
    assert len(bars(plot_tried(whole, tried.iloc[:0]))) == 2


def test_shared_limits_fit_all_profiles():
    high = profile([(("b1",), 0.95, 0.02)])
    low = high.table.assign(accuracy=0.1, std=0.05)
    assert share_limits(plot_profile(high), [high.table, low]).get_ylim() == (0.0, 1.0)
    with pytest.raises(ValueError, match="tables is"):
        share_limits(plot_profile(high), [])


def test_pairs_stand_below_the_diagonal_and_the_best_is_framed():
    rows = [*SINGLES, (("stem",), 0.2, 0.1), (("b1", "b2"), 0.6, 0.1), (("b1", "stem"), 0.9, 0.1)]
    pairs = profile([*rows, (("b2", "stem"), 0.4, 0.1)], window=2)
    ax = plot_pairs(pairs)
    values = ax.collections[0].get_array().reshape(3, 3)
    assert np.ma.is_masked(values[0, 1]) and values[2, 0] == 0.9 and values[1, 1] == 0.7
    assert ax.patches[-1].get_xy() == (0, 2) and [text for text in texts(ax) if text][0] == "50"
    for wrong in (profile(SINGLES), profile(rows, window=2)):
        with pytest.raises(ValueError, match="it must be one of pair_profile"):
            plot_pairs(wrong)


def test_a_deep_networks_figures_fit_a_page():
    names = [f"b{i}" for i in range(45)]
    blocks = [(name,) for name in names] + [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    ax = plot_pairs(profile([(subset, 0.5, 0.1) for subset in blocks], window=2))
    assert max(ax.figure.get_size_inches()) <= 18 and not texts(ax)
    wide = plot_profile(profile([((name,), 0.5, 0.1) for name in names]))
    assert wide.figure.get_size_inches()[0] <= 16


def test_a_network_is_a_row_of_boxes():
    ax = plot_network(PARTS, ["b1"], [1, 2000, 3_000_000, 0])
    colours = [to_hex(box.get_facecolor()) for box in ax.patches if isinstance(box, FancyBboxPatch)]
    assert colours == [colour.lower() for colour in (LIGHT, BLUE, LIGHT, LIGHT, GREEN)]
    assert texts(ax)[:4] == ["stem", "1", "b1", "2 k"] and texts(ax)[-2:] == ["readout", "new"]
    for arguments, message in (
        ((PARTS, ["b9"]), "tuned names b9; the parts are stem, b1, b2, tail"),
        ((PARTS, [], [1, 2]), "counts is "),
        ((PARTS, [], [1] * 5), "counts has 5 numbers for 4 parts"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_network(*arguments)


def test_costs_are_shares_of_the_last_row():
    step = {"trunk": 100, "forward": 200, "backward": 300}
    ax = plot_flops({"ticked": step, "full": {name: 2 * cost for name, cost in step.items()}})
    assert texts(ax) == ["full: 1.2 kFLOPs per image, 100%", "ticked: 600FLOPs per image, 50%"]


def test_examples_have_a_column_per_class_and_gaps():
    images = np.full((3, 4, 4, 3), [[[[7]]], [[[8]]], [[[9]]]], np.uint8)
    sheet = plot_examples(images, np.array([0, 0, 1]), ["day", "night"], 2).images[0].get_array()
    assert sheet.shape == (12, 12, 3)
    assert [sheet[y, x, 0] for y, x in ((2, 2), (8, 2), (2, 8), (8, 8))] == [7, 8, 9, 255]
