"""The panel of the paper's rate, in process: sliders are moved, pictures and numbers looked at."""

import math

import pytest

from subtuning_lab.notebook import BoundPanel
from subtuning_lab.notebook.bounds import FULL, SUBTUNING
from subtuning_lab.theory.bounds import full_finetuning_bound, subtuning_bound
from tests.notebook import RATES


def test_it_starts_with_the_numbers_given():
    bounds = BoundPanel(**RATES).bounds
    own = {name: value for name, value in RATES.items() if name != "params"}
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
    panel = BoundPanel(**RATES)
    picture, before, facts = panel.figure.value, panel.bounds, panel.facts
    getattr(panel, slider).value = value
    assert panel.figure.value != picture and panel.status.value == ""
    for name, larger in grows.items():
        old, new = before[name].value, panel.bounds[name].value
        assert old == new if larger is None else (new > old) == larger
    assert (panel.facts != facts) == (slider != "confidence")


def test_k_is_never_above_l():
    panel = BoundPanel(**RATES)
    panel.n_blocks.value = 2
    assert panel.max_blocks.value == 2 and panel.max_blocks.max == 2 and panel.status.value == ""
    assert panel.bounds[SUBTUNING].inputs["max_blocks"] == 2
    panel.n_blocks.value = 20
    assert panel.max_blocks.max == 20


def test_the_turning_point_in_words_is_where_the_rates_cross():
    panel = BoundPanel(**RATES)
    most = 278_000 / math.log(27) ** 2
    assert f"{most:,.0f}" in panel.facts and f"smaller rate: {SUBTUNING}" in panel.facts
    for factor, better in ((0.95, SUBTUNING), (1.05, FULL)):
        panel.tuned_params.value = factor * most
        assert f"smaller rate: {better}" in panel.facts
        rates = {name: bound.value for name, bound in panel.bounds.items()}
        assert min(rates, key=rates.get) == better


def test_full_finetuning_may_go_farther():
    panel = BoundPanel(**RATES, full_delta=7.5)
    fixed = panel.bounds[FULL].value
    panel.delta.value = 1.0
    assert panel.bounds[FULL].value == fixed > BoundPanel(**RATES).bounds[FULL].value


def test_numbers_beyond_the_usual_fit_the_sliders():
    for change in ({"n": 5}, {"n": 10**9}, {"delta": 1e-4}, {"delta": 900.0}, {"n_blocks": 300}, {"confidence": 0.2}):
        panel = BoundPanel(**RATES | change)
        ((name, value),) = change.items()
        assert getattr(panel, name).value == pytest.approx(value)
        shown = panel.bounds[SUBTUNING]
        assert (shown.confidence if name == "confidence" else shown.inputs[name]) == pytest.approx(value)


@pytest.mark.parametrize(("name", "value"), [("tuned_params", 278_001), ("max_blocks", 10)])
def test_more_than_there_is_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be a whole number at least 1 and at most"):
        BoundPanel(**RATES | {name: value})
