"""The epsilon slider, in process: moved as a reader would move it, and compared with searches that are run anew."""

from __future__ import annotations

import base64
import io
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from subtuning_lab.notebook import browse as search_panels
from subtuning_lab.notebook import panel as panels
from subtuning_lab.search.greedy import greedy_subtuning

ACCURACY = {"": 0.5, "a": 0.6, "b": 0.7, "c": 0.62, "ab": 0.74, "ac": 0.8, "bc": 0.71, "abc": 0.75}


class Lookup:
    """Scores subsets of three blocks by a table, on two folds."""

    title = "a table"
    block_names = part_names = ("a", "b", "c")

    def scores(self, subsets):
        rows = [
            (tuple(blocks), fold, 0, ACCURACY["".join(blocks)] + sign * 0.02, len(blocks))
            for blocks in subsets
            for fold, sign in enumerate((-1, 1))
        ]
        return pd.DataFrame(rows, columns=["blocks", "fold", "seed", "accuracy", "params"])

    def count_parameters(self, blocks):
        return len(blocks)


@pytest.fixture(autouse=True)
def small_pictures_without_pyplot(monkeypatch):
    monkeypatch.setattr(panels, "_DPI", 50)
    monkeypatch.setattr(plt, "figure", None)


@pytest.fixture(scope="module")
def forward():
    return greedy_subtuning(Lookup(), epsilon=-math.inf)


@pytest.fixture(scope="module")
def backward():
    return greedy_subtuning(Lookup(), epsilon=math.inf, direction="backward")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_position_equals_a_search_of_its_own(direction, forward, backward):
    panel = search_panels.replay_trace(forward if direction == "forward" else backward)
    seen = set()
    for epsilon in (0.0, 0.01, 0.035, 0.05, 0.195, panel.choice.max):
        panel.choice.value = epsilon
        anew = greedy_subtuning(Lookup(), epsilon=panel.choice.value, direction=direction)
        assert panel.blocks == anew.blocks and panel.replayed.accuracy == anew.accuracy
        assert (" + ".join(anew.blocks) or "linear probing") in panel.facts and f"{anew.accuracy:.1%}" in panel.facts
        seen.add(panel.blocks)
    assert seen == ({("a", "b", "c"), ("a", "b"), ("b",), ()} if direction == "forward" else {("a", "c"), ()})


def test_slider_reaches_the_end_of_the_path(forward, backward):
    for found, end in ((forward, ()), (backward, ())):
        panel = search_panels.replay_trace(found)
        panel.choice.value = panel.choice.max
        assert panel.blocks == end


def test_pictures_change_with_the_path(forward):
    panel = search_panels.replay_trace(forward)
    assert panel.blocks == ("a", "b", "c")
    figure, network = panel.figure.value, panel.network.value
    panel.choice.value = 0.03
    assert panel.blocks == ("a", "b")
    assert panel.figure.value != figure and panel.network.value != network
    panel.choice.value = 0.0
    assert panel.figure.value == figure and panel.network.value == network


def test_display_has_widgets_and_a_picture(forward):
    panel = search_panels.replay_trace(forward, epsilon=0.02)
    data, _ = panel._repr_mimebundle_()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB"))
    assert picture.std() > 10 and data["text/plain"] == panel.facts
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert "epsilon 2.0%: a + b, 74.0% ± 2.8%, n = 2" in panel.facts


def test_says_where_the_trace_ends():
    found = greedy_subtuning(Lookup(), epsilon=0.03)  # stops after the third round is tried
    assert "not known" not in search_panels.replay_trace(found, epsilon=0.03).facts
    stopped = greedy_subtuning(Lookup(), epsilon=0.05)
    panel = search_panels.replay_trace(stopped, epsilon=0.05)
    assert panel.blocks == ("b",) and "not known" not in panel.facts
    panel.choice.value = 0.0
    assert panel.blocks == ("a", "b") and "not known" in panel.facts


def test_a_later_start_widens_the_slider(forward):
    panel = search_panels.replay_trace(forward, epsilon=0.4)
    assert panel.choice.value == pytest.approx(0.4) and panel.blocks == ()


def test_what_cannot_be_replayed_is_refused(forward):
    both = greedy_subtuning(Lookup(), direction="both")
    with pytest.raises(ValueError, match="both directions"):
        search_panels.replay_trace(both)
    with pytest.raises(TypeError, match="DataFrame"):
        search_panels.replay_trace(forward.trace)
    with pytest.raises(ValueError, match="at least 0"):
        search_panels.replay_trace(forward, epsilon=-0.1)
