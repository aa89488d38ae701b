"""Panels in process: small pictures, and no figure that pyplot knows of, which would show twice."""

import matplotlib
import matplotlib.pyplot as plt
import pytest

import subtuning_lab as lab
from subtuning_lab.notebook import panel
from tests.notebook import tiny_study


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch):
    monkeypatch.setattr(panel, "_DPI", 50)
    monkeypatch.setattr(plt, "figure", None)
    before = plt.get_fignums(), matplotlib.get_backend()
    yield
    assert (plt.get_fignums(), matplotlib.get_backend()) == before


@pytest.fixture(scope="package")
def study() -> lab.Study:
    return tiny_study()


@pytest.fixture(scope="package")
def profile(study) -> lab.Profile:
    return lab.finetuning_profile(study)
