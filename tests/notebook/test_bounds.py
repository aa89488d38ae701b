"""The panel of the paper's rate, in process: sliders are moved, pictures and numbers looked at."""

import base64
import io
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from subtuning_lab.notebook import panel as panels
from subtuning_lab.notebook.bounds import FULL, SUBTUNING, move_bound
from subtuning_lab.theory.bounds import full_finetuning_bound, subtuning_bound

SIZES = {"n": 1000, "tuned_params": 20_000, "params": 278_000, "delta": 2.5, "n_blocks": 9, "max_blocks": 3}


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch):
    """A panel never asks pyplot for a figure; small pictures."""
    monkeypatch.setattr(panels, "_DPI", 50)
    monkeypatch.setattr(plt, "figure", None)


def test_it_starts_with_the_numbers_given():
    bounds = move_bound(**SIZES).bounds
    own = {name: value for name, value in SIZES.items() if name != "params"}
    assert bounds[SUBTUNING].value == pytest.approx(subtuning_bound(**own).value)
    assert bounds[FULL].value == pytest.approx(full_finetuning_bound(n=1000, params=278_000, delta=2.5).value)


@pytest.mark.parametrize(
    ("slider", "value", "grows"),
    [
        ("n", 100_000.0, {SUBTUNING: False, FULL: False}),
        ("tuned_params", 100_000.0, {SUBTUNING: True, FULL: None}),
        ("delta", 10.0, {SUBTUNING: True, FULL: True}),
        ("n_blocks", 30, {SUBTUNING: True, FULL: None}),
        ("max_blocks", 8, {SUBTUNING: True, FULL: None}),
        ("confidence", 0.99, {SUBTUNING: True, FULL: True}),
    ],
)
def test_every_slider_moves_picture_and_values_the_right_way(slider, value, grows):
    panel = move_bound(**SIZES)
    picture, before, facts = panel.figure.value, panel.bounds, panel.facts
    getattr(panel, slider).value = value
    assert panel.figure.value != picture and panel.status.value == ""
    for name, larger in grows.items():
        old, new = before[name].value, panel.bounds[name].value
        assert old == new if larger is None else (new > old) == larger
    assert (panel.facts != facts) == (slider != "confidence")


def test_k_is_never_above_l():
    panel = move_bound(**SIZES)
    panel.n_blocks.value = 2
    assert panel.max_blocks.value == 2 and panel.max_blocks.max == 2 and panel.status.value == ""
    assert panel.bounds[SUBTUNING].inputs["max_blocks"] == 2
    panel.n_blocks.value = 20
    assert panel.max_blocks.max == 20


def test_the_turning_point_in_words_is_where_the_rates_cross():
    panel = move_bound(**SIZES)
    most = 278_000 / math.log(27) ** 2
    assert f"{most:,.0f}" in panel.facts and f"smaller rate: {SUBTUNING}" in panel.facts
    for factor, better in ((0.95, SUBTUNING), (1.05, FULL)):
        panel.tuned_params.value = factor * most
        assert f"smaller rate: {better}" in panel.facts
        rates = {name: bound.value for name, bound in panel.bounds.items()}
        assert min(rates, key=rates.get) == better


def test_full_finetuning_may_go_farther():
    panel = move_bound(**SIZES, full_delta=7.5)
    fixed = panel.bounds[FULL].value
    panel.delta.value = 1.0
    assert panel.bounds[FULL].value == fixed > move_bound(**SIZES).bounds[FULL].value


def test_numbers_beyond_the_usual_fit_the_sliders():
    for change in ({"n": 5}, {"n": 10**9}, {"delta": 1e-4}, {"delta": 900.0}, {"n_blocks": 300}, {"confidence": 0.2}):
        panel = move_bound(**SIZES | change)
        ((name, value),) = change.items()
        assert getattr(panel, name).value == pytest.approx(value)
        shown = panel.bounds[SUBTUNING]
        assert (shown.confidence if name == "confidence" else shown.inputs[name]) == pytest.approx(value)


def test_display_has_widgets_and_a_picture():
    panel = move_bound(**SIZES)
    data, _ = panel._repr_mimebundle_()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB"))
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert data["text/plain"] == panel.facts and picture.std() > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuned_params": 0}, "tuned_params is 0; it must be from 1 to params, 278000"),
        ({"tuned_params": 278_001}, "tuned_params is 278001"),
        ({"delta": 0.0}, "delta is 0.0; it must be above 0"),
        ({"full_delta": -1.0}, "full_delta is -1.0"),
        ({"n": 0}, "n is 0"),
        ({"max_blocks": 10}, "max_blocks is 10; it must be from 1 to 9"),
        ({"confidence": 1.0}, "confidence is 1.0"),
    ],
)
def test_wrong_numbers_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        move_bound(**SIZES | change)
