"""Recipes: the learning rate's course, and ranges."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subtuning_lab.engine.optim import lr_factor
from subtuning_lab.engine.recipe import Recipe, check_recipes


@given(st.integers(1, 200), st.floats(0, 0.99))
def test_the_learning_rate_rises_to_its_peak_and_falls_towards_zero(total, warmup):
    factors = [lr_factor(step, total, warmup) for step in range(total)]
    peak = max(1, round(warmup * total)) - 1
    assert all(0 < f <= 1 for f in factors)
    assert factors[peak] == 1
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert lr_factor(total, total, warmup) == pytest.approx(0, abs=1e-12) or peak == total - 1


def test_the_course_at_known_points():
    assert [lr_factor(step, 20, 0.2) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(12, 20, 0.2) == pytest.approx(0.5)  # half way down
    assert lr_factor(8, 20, 0.2) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_a_recipe_is_a_plain_value():
    assert Recipe() == Recipe() and len({Recipe(), Recipe(), Recipe(lr=2)}) == 2
    assert Recipe(**Recipe(epochs=3, patience=2).as_dict()) == Recipe(epochs=3, patience=2)


def test_recipes_of_a_pass_share_their_steps():
    assert check_recipes([Recipe(), Recipe(lr=1, bn="frozen", head_lr=3, weight_decay=0, label_smoothing=0.1)])
    for name, value in {
        "epochs": 3,
        "batch_size": 3,
        "warmup": 0.5,
        "augment": "flip",
        "image_size": 8,
        "precision": "bf16",
    }.items():
        with pytest.raises(ValueError, match=f"differ in {name}"):
            check_recipes([Recipe(), Recipe(**{name: value})])
