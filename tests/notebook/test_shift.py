"""The shift panel, in process: moved as a reader would move it, its images compared with `corrupt`."""

from __future__ import annotations

import base64
import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.notebook import panel as panels
from subtuning_lab.notebook import shift as shift_panels
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, Profile
from tests.helpers import tiny_task


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch):
    """The panel asks pyplot for no figure, which would show twice; small pictures."""
    monkeypatch.setattr(panels, "_DPI", 50)
    monkeypatch.setattr(plt, "figure", None)
    before = plt.get_fignums(), matplotlib.get_backend()
    yield
    assert (plt.get_fignums(), matplotlib.get_backend()) == before


def profile(accuracies: list[float]) -> Profile:
    labels = ["b1", "b2", LINEAR_PROBING, FULL_FINETUNING]
    table = pd.DataFrame({"label": labels, "kind": ["blocks", "blocks", *labels[2:]], "position": [1, 2, None, None]})
    blocks = [("b1",), ("b2",), (), ("stem", "b1", "b2", "tail")]
    return Profile(table.assign(blocks=blocks, params=10, accuracy=accuracies, std=0.02, n=4), table[:0], 1, "tiny")


@pytest.fixture
def profiles() -> dict[str, Profile]:
    return {
        "contrast@5": profile([0.9, 0.5, 0.3, 0.8]),
        "gaussian_noise@2": profile([0.4, 0.6, 0.2, 0.7]),
        "digits": profile([0.1, 0.2, 0.3, 0.4]),
    }


def test_every_position_shows_its_corruption(profiles):
    task, panel = tiny_task(), shift_panels.browse_shifts(tiny_task(), profiles)
    clean = task.train.images[:3]  # the first image of each class
    assert panel.shift == "contrast@5" and torch.equal(panel.images, clean)
    for name, severity in (("contrast", 1), ("impulse_noise", 4), ("brightness", 5)):
        panel.corruption_choice.value, panel.severity_choice.value = name, severity
        assert panel.shift == f"{name}@{severity}" and torch.equal(panel.corrupted, corrupt(clean, name, severity))


def test_the_profile_follows_where_there_is_one(profiles):
    panel = shift_panels.browse_shifts(tiny_task(), profiles)
    first = panel.examples.value, panel.figure.value
    assert panel.facts == "contrast@5: best single block b1, 90.0% ± 2.0%" and panel.status.value == ""
    panel.severity_choice.value = 4
    assert panel.profile is None and "no profile was made; there are contrast@5, gaussian_noise@2" in panel.status.value
    assert panel.examples.value != first[0] and panel.figure.value != first[1]
    panel.corruption_choice.value = "gaussian_noise"
    panel.severity_choice.value = 2
    assert panel.profile is profiles["gaussian_noise@2"] and "best single block b2" in panel.facts
    panel.corruption_choice.value, panel.severity_choice.value = "contrast", 5
    assert (panel.examples.value, panel.figure.value) == first


def test_display_has_widgets_and_a_picture(profiles):
    panel = shift_panels.browse_shifts(tiny_task(), profiles)
    data, _ = panel._repr_mimebundle_()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("L"))
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert data["text/plain"] == panel.facts and picture.std() > 10  # something is drawn


def test_bad_input_is_named(profiles):
    with pytest.raises(TypeError, match="task is a str"):
        shift_panels.browse_shifts("source", profiles)
    with pytest.raises(ValueError, match="no profile is under a corruption.*there are digits"):
        shift_panels.browse_shifts(tiny_task(), {"digits": profiles["digits"]})
    with pytest.raises(TypeError, match="the profile under contrast@5 is a DataFrame"):
        shift_panels.browse_shifts(tiny_task(), {"contrast@5": profiles["contrast@5"].table})
