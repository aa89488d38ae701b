"""The size slider, in process: moved as a reader would move it, its numbers compared with the table."""

from __future__ import annotations

import base64
import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from subtuning_lab.notebook import curves as curve_panels
from subtuning_lab.notebook import panel as panels

CURVES = {"linear probing": (0.5, 0.6, 0.7), "full finetuning": (0.4, 0.65, 0.9), "greedy": (0.55, 0.7, 0.8)}
SIZES = (20, 50, 100)


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch):
    """The panel asks pyplot for no figure, which would show twice; small pictures."""
    monkeypatch.setattr(panels, "_DPI", 50)
    monkeypatch.setattr(plt, "figure", None)
    before = plt.get_fignums(), matplotlib.get_backend()
    yield
    assert (plt.get_fignums(), matplotlib.get_backend()) == before


@pytest.fixture
def summary() -> pd.DataFrame:
    rows = [(size, name, own[i], 0.02, 3) for name, own in CURVES.items() for i, size in enumerate(SIZES)]
    return pd.DataFrame(rows, columns=["train_size", "method", "accuracy", "std", "n"])


def test_every_position_is_a_size_of_the_table(summary):
    panel = curve_panels.browse_sizes(summary.sample(frac=1, random_state=0))
    assert [value for _, value in panel.choice._options_full] == list(SIZES)
    for i, size in enumerate(SIZES):
        panel.choice.value = size
        best_first = sorted(CURVES, key=lambda name: -CURVES[name][i])
        assert panel.rows["method"].tolist() == best_first and set(panel.rows["train_size"]) == {size}
        assert panel.facts.startswith(f"{size} training images: {best_first[0]} {CURVES[best_first[0]][i]:.1%} ± 2.0%")


def test_both_pictures_follow_the_slider_and_come_back(summary):
    panel = curve_panels.browse_sizes(summary)
    first = panel.curves.value, panel.bars.value
    panel.choice.value = 100
    assert panel.curves.value != first[0] and panel.bars.value != first[1] and panel.status.value == ""
    panel.choice.value = 20
    assert (panel.curves.value, panel.bars.value) == first


def test_bars_of_all_sizes_share_one_axis(summary):
    figure = matplotlib.figure.Figure()
    panel, seen = curve_panels.browse_sizes(summary), set()
    for size in SIZES:
        panel.choice.value = size
        ax = figure.subplots()
        panel._paint_bars(ax)
        widths = {
            label.get_text(): bar.get_width() for label, bar in zip(ax.get_yticklabels(), ax.patches, strict=True)
        }
        assert widths == {name: own[SIZES.index(size)] for name, own in CURVES.items()}
        assert ax.get_xlim()[0] < 0.38 and ax.get_xlim()[1] > 0.92
        seen.add(ax.get_xlim())
    assert len(seen) == 1


def test_display_has_widgets_and_a_picture(summary):
    panel = curve_panels.browse_sizes(summary)
    data, _ = panel._repr_mimebundle_()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("L"))
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert data["text/plain"] == panel.facts and picture.std() > 10  # something is drawn


def test_one_size_and_no_spread_can_be_shown(summary):
    one = summary[summary["train_size"] == 50].assign(std=np.nan, n=1)
    panel = curve_panels.browse_sizes(one)
    assert panel.choice.value == 50 and "greedy 70.0%, n = 1" in panel.facts and "±" not in panel.facts


def test_bad_tables_are_named(summary):
    with pytest.raises(TypeError, match="dict"):
        curve_panels.browse_sizes(CURVES)
    with pytest.raises(ValueError, match="no column std"):
        curve_panels.browse_sizes(summary.drop(columns="std"))
    with pytest.raises(ValueError, match="empty"):
        curve_panels.browse_sizes(summary[:0])
    with pytest.raises(ValueError, match="linear probing is there twice for 20"):
        curve_panels.browse_sizes(pd.concat([summary, summary[:1]]))
