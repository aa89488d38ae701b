"""Figures of merged networks show every part, lane, row and choice."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyBboxPatch, PathPatch

from subtuning_lab.inference.schedule import plan_rows
from subtuning_lab.plots.merge import fork_size, plot_choices, plot_fork
from subtuning_lab.plots.style import BLUE, LIGHT
from tests.plots import texts

PARTS = ("stem", "block1", "block2", "block3", "tail")


def table(subsets, keep_original=True):
    return plan_rows(PARTS, {name: frozenset(blocks) for name, blocks in subsets.items()}, keep_original).table()


def boxes(ax, colour):
    """(column, top, bottom) of the wide boxes of a colour."""
    found = [p for p in ax.patches if isinstance(p, FancyBboxPatch) and to_hex(p.get_facecolor()) == colour.lower()]
    wide = [p for p in found if p.get_width() > 0.5]
    return [(round(p.get_x() + p.get_width() / 2), p.get_y(), p.get_y() + p.get_height()) for p in wide]


def test_rows_stand_under_every_part():
    ax = plot_fork(table({"a": ["block1"], "b": ["block2", "block3"]}))
    assert [text for text in texts(ax) if text.isdigit()] == ["1", "2", "3", "3", "3"]
    assert set(PARTS) | {"original", "a", "b", "image"} <= set(texts(ax))


def test_a_shared_part_spans_the_lanes_that_go_through_it():
    ax = plot_fork(table({"a": ["block1"], "b": ["block2"]}))
    (spanning,) = [box for box in boxes(ax, LIGHT) if box[0] == 3]
    assert spanning[1] < 0 and spanning[2] > 2  # the trunk in lane 0, and both tasks
    assert texts(ax).count("×3") == 2  # block3 and tail
    split = [box for box in boxes(ax, LIGHT) if box[0] == 2]
    assert len(split) == 2 and "×2" in texts(ax)  # b's own block lies between the trunk and a
    assert max(box[2] for box in boxes(ax, LIGHT) if box[0] < 2) < 1  # nobody to share with yet


def test_tuned_parts_have_their_tasks_colour_and_lane():
    ax = plot_fork(table({"a": ["block1", "block3"], "b": ["block2"]}))
    assert sorted(box[0] for box in boxes(ax, BLUE)) == [1, 3]  # a, the first task
    assert len({box[1:] for box in boxes(ax, BLUE)}) == 1


def test_lanes_leave_at_the_first_tuned_part_and_never_cross():
    ax = plot_fork(table({"early": ["block1"], "late": ["block3"]}))
    forks = [patch.get_path().vertices for patch in ax.patches if isinstance(patch, PathPatch)]
    starts = [(path[0, 0], path[-1, 1]) for path in forks]  # where it leaves, and its lane
    assert [round(x + 0.72) for x, _ in starts] == [1, 3]
    assert dict(zip(("early", "late"), (lane for _, lane in starts), strict=True)) == {"early": 2, "late": 1}


def test_task_that_tunes_nothing_is_drawn_where_it_is_named():
    rows = table({"a": ["block1"], "probe": []})
    assert "probe" not in texts(plot_fork(rows)) and "probe" in texts(plot_fork(rows, ["a", "probe"]))


def test_without_the_original_the_trunk_ends():
    ax = plot_fork(table({"a": ["block1"], "b": ["block2"]}, keep_original=False))
    assert "original" not in texts(ax) and {"a", "b"} <= set(texts(ax))
    assert max(box[0] for box in boxes(ax, LIGHT) if box[1] < 0) == 1  # block1, which b still reads
    assert ax.lines[0].get_xdata()[-1] < 2


def test_nothing_shared_at_all():
    ax = plot_fork(table({"a": PARTS, "b": PARTS}, keep_original=False))
    assert not boxes(ax, LIGHT) and [text for text in texts(ax) if text.isdigit()] == ["2"] * 5


def test_size_grows_with_parts_and_tasks():
    rows = table({"a": ["block1"]})
    wide = pd.concat([rows] * 4)
    assert fork_size(wide, 1)[0] > fork_size(rows, 1)[0] and fork_size(rows, 5)[1] > fork_size(rows, 1)[1]


CHOICES = pd.DataFrame(
    {
        "blocks": [(), ("block1",), ("block2",), ("block1", "block2")],
        "label": ["linear probing", "block1", "block2", "block1 + block2"],
        "accuracy": [0.5, 0.7, 0.8, 0.85],
        "error": [0.02, np.nan, 0.03, 0.01],
        "n": [6, 6, 6, 3],
        "ratio": [1.0, 1.8, 1.4, 1.9],
        "ratio_q25": [0.9, 1.7, 1.3, 1.8],
        "ratio_q75": [1.1, 1.9, 1.6, 2.1],
        "params": [0, 10, 20, 30],
    }
)


def test_every_choice_is_drawn_by_its_number_of_blocks():
    ax = plot_choices(CHOICES, "ratio", "latency")
    drawn = {
        container.get_label(): list(zip(*container.lines[0].get_data(), strict=True)) for container in ax.containers
    }
    assert drawn == {
        "linear probing": [(1.0, 0.5)],
        "1 block": [(1.8, 0.7), (1.4, 0.8)],
        "2 blocks": [(1.9, 0.85)],
    }
    assert ax.get_xlabel() == "latency" and "n = 3 to 6" in ax.get_title() and "quartiles" in ax.get_title()


def test_spread_of_both_axes_is_drawn():
    horizontal, vertical = plot_choices(CHOICES, "ratio").containers[2].lines[2]
    (x0, x1), (y0, y1) = horizontal.get_segments()[0][:, 0], vertical.get_segments()[0][:, 1]
    np.testing.assert_allclose([x0, x1, y0, y1], [1.8, 2.1, 0.84, 0.86])


def test_cost_without_spread_has_no_horizontal_bars():
    ax = plot_choices(CHOICES, "params")
    assert "quartiles" not in ax.get_title() and ax.get_xlabel() == "params"
    assert all(not container.has_xerr for container in ax.containers)


def test_chosen_blocks_are_ringed_and_named():
    ax = plot_choices(CHOICES, "ratio", chosen=["block2"])
    assert [text.get_text() for text in ax.texts] == ["block2"]
    assert ax.lines[-1].get_xdata()[0] == 1.4
    assert [text.get_text() for text in plot_choices(CHOICES, "ratio", chosen=()).texts] == [CHOICES["label"][0]]
    assert not plot_choices(CHOICES, "ratio").texts


def test_a_name_stands_where_there_is_room():
    for chosen, side in ((["block1", "block2"], "right"), ([], "left")):
        ax = plot_choices(CHOICES, "ratio", chosen=chosen)
        assert ax.texts[0].get_horizontalalignment() == side


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="without column speed"):
        plot_choices(CHOICES, "speed")
    with pytest.raises(ValueError, match="block9"):
        plot_choices(CHOICES, "ratio", chosen=["block9"])
