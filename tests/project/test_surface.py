"""The whole public surface under wrong values: each gives our error, which names the value, before any work."""

import time
from dataclasses import is_dataclass

import matplotlib
import pytest
import torch

from tests.project.surface import RIGHT, Material, Public, surface

matplotlib.use("Agg")
PUBLIC = {public.name: public for public in surface()}
RULED = [f"{name}: {parameter}" for name, public in PUBLIC.items() for parameter in public.rules]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    return Material(tmp_path_factory.mktemp("surface"))


@pytest.fixture
def untrained(monkeypatch):
    """No optimizer can be made: what gets this far has begun to work."""

    def begun(*args, **kwargs):
        raise AssertionError("a training began")

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", begun)


def arguments_of(public: Public, parameter: str, value: object, material: Material) -> dict[str, object]:
    """A call with one wrong value. Functions refuse it before they miss the rest; a dataclass needs all its fields."""
    if is_dataclass(public.function):
        return (RIGHT[public.name](material) or {}) | {parameter: value}
    return ({"self": object()} if public.is_method else {}) | {parameter: value}


@pytest.mark.parametrize("ruled", RULED)
def test_what_a_rule_forbids_is_refused_at_once(ruled, material, untrained):
    name, parameter = ruled.split(": ")
    public = PUBLIC[name]
    rule = public.rules[parameter]
    wrong = list(rule.wrong())
    assert wrong
    for value in wrong:
        arguments = arguments_of(public, parameter, value, material)
        start = time.process_time()
        with pytest.raises((TypeError, ValueError)) as raised:
            public.function(**arguments)
        message = str(raised.value)
        assert message.startswith((f"{parameter} is ", f"{parameter}[")) and "; it must " in message, message
        assert time.process_time() - start < 1


def test_every_public_callable_has_a_right_call():
    assert set(PUBLIC) == set(RIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_calls_are_right(name, material):
    """Else wrong ones might be refused for another reason than theirs."""
    arguments = RIGHT[name](material)
    if arguments is not None:
        PUBLIC[name].function(**arguments)
        matplotlib.pyplot.close("all")
