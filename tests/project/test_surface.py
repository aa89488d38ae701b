"""The whole public surface: every name has a right call, and wrong ones are refused by an error of ours."""

import random

import matplotlib
import pytest

from tests.project.surface import ALLOWED, RIGHT, Material, surface, wrong_calls

matplotlib.use("Agg")
PUBLIC = {public.name: public for public in surface()}
pytestmark = pytest.mark.xdist_group("surface")  # what calls are made of takes a minute to train


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    return Material(tmp_path_factory.mktemp("surface"))


def test_every_public_callable_has_a_right_call():
    assert set(PUBLIC) == set(RIGHT)
    for name, parameter in ALLOWED:
        assert name in PUBLIC and parameter in (None, *PUBLIC[name].parameters)


def test_what_has_no_rule_is_refused_as_well(material):
    """These are all; `python -m tests.end_to_end.faults wrong_calls` draws from those with rules, too."""
    calls = [call for call in wrong_calls() if call.parameter not in call.public.rules]
    assert [fault for call in calls if (fault := call.fault(material))] == [] and calls


@pytest.mark.parametrize("seed", range(6))
def test_wrong_calls_are_refused_by_an_error_that_names_the_value(seed, material):
    for call in random.Random(seed).sample(wrong_calls(), 10):
        assert not call.fault(material), f"{call}: {call.fault(material)}"


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_calls_are_right(name, material):
    """Else wrong ones might be refused for another reason than theirs."""
    arguments = RIGHT[name](material)
    if arguments is not None:
        PUBLIC[name].function(**arguments)
        matplotlib.pyplot.close("all")
