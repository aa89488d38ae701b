"""The alpha slider, in process: moved as a reader would move it, its numbers compared with the table."""

from __future__ import annotations

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from subtuning_lab.notebook import ablations as ablation_panels
from subtuning_lab.notebook import panel as panels

VALUES = {"target": {0.0: 0.5, 0.5: 0.9, 1.0: 0.8}, "clean": {0.0: 1.0, 0.5: 0.95, 1.0: 0.7}}


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch):
    """The panel asks pyplot for no figure, which would show twice; small pictures."""
    monkeypatch.setattr(panels, "_DPI", 50)
    monkeypatch.setattr(plt, "figure", None)
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


@pytest.fixture
def summary() -> pd.DataFrame:
    rows = [(alpha, images, own, 0.02, 3) for images, values in VALUES.items() for alpha, own in values.items()]
    return pd.DataFrame(rows, columns=["alpha", "images", "accuracy", "std", "n"])


def test_every_position_is_an_alpha_of_the_table(summary):
    panel = ablation_panels.browse_alphas(summary.sample(frac=1, random_state=0))
    assert [value for _, value in panel.choice._options_full] == [0.0, 0.5, 1.0] and panel.choice.value == 1.0
    for alpha in (0.5, 0.0):
        panel.choice.value = alpha
        own = {images: VALUES[images][alpha] for images in VALUES}
        told = f"the task {own['target']:.1%} ± 2.0%, n = 3; clean images {own['clean']:.1%} ± 2.0%, n = 3"
        assert panel.facts == f"alpha {alpha:g}: {told}" and told in panel.status.value


def test_both_pictures_follow_the_slider_and_come_back(summary):
    panel = ablation_panels.browse_alphas(summary, 0.0)
    first = panel.curves.value, panel.corner.value
    panel.choice.value = 0.5
    assert panel.curves.value != first[0] and panel.corner.value != first[1]
    panel.choice.value = 0.0
    assert (panel.curves.value, panel.corner.value) == first


def test_display_has_widgets_and_a_picture(summary):
    panel = ablation_panels.browse_alphas(summary)
    data, _ = panel._repr_mimebundle_()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("L"))
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert data["text/plain"] == panel.facts and picture.std() > 10  # something is drawn


def test_without_spread_none_is_told(summary):
    panel = ablation_panels.browse_alphas(summary.assign(std=np.nan, n=1))
    assert panel.facts == "alpha 1: the task 80.0%, n = 1; clean images 70.0%, n = 1"


def test_bad_tables_are_named(summary):
    with pytest.raises(TypeError, match="dict"):
        ablation_panels.browse_alphas(VALUES)
    with pytest.raises(ValueError, match="no column std"):
        ablation_panels.browse_alphas(summary.drop(columns="std"))
    with pytest.raises(ValueError, match="no rows of clean"):
        ablation_panels.browse_alphas(summary[summary["images"] == "target"])
    with pytest.raises(ValueError, match="fewer than two"):
        ablation_panels.browse_alphas(summary[summary["alpha"] == 1.0])
    with pytest.raises(ValueError, match="alpha is 0.3; the table has 0, 0.5, 1"):
        ablation_panels.browse_alphas(summary, 0.3)
