"""The whole public surface: every name has a right call."""

import matplotlib
import pytest

from tests.project.surface import RIGHT, Material, surface

matplotlib.use("Agg")
PUBLIC = {public.name: public for public in surface()}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    return Material(tmp_path_factory.mktemp("surface"))


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
