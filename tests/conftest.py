"""Fixtures that every test can ask for."""

import pytest

from subtuning_lab.nets.chain import Chain
from tests.helpers import tiny_chain


@pytest.fixture
def chain() -> Chain:
    """A fresh `tiny_chain`."""
    return tiny_chain()
