"""The shift panel: its images compared with `corrupt`, its profile with the one given."""

import pytest
import torch

from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.notebook import ShiftPanel
from tests.helpers import tiny_task
from tests.notebook import shift_profiles


def test_every_position_shows_its_corruption():
    task, panel = tiny_task(), ShiftPanel(tiny_task(), shift_profiles())
    clean = task.train.images[:3]  # the first image of each class
    assert panel.shift == "contrast@5" and torch.equal(panel.images, clean)
    for name, severity in (("contrast", 1), ("impulse_noise", 4), ("brightness", 5)):
        panel.corruption_choice.value, panel.severity_choice.value = name, severity
        assert panel.shift == f"{name}@{severity}" and torch.equal(panel.corrupted, corrupt(clean, name, severity))


def test_the_profile_follows_where_there_is_one():
    profiles = shift_profiles()
    panel = ShiftPanel(tiny_task(), profiles)
    assert panel.facts == "contrast@5: best single block b1, 90.0% ± 2.0%" and panel.status.value == ""
    panel.severity_choice.value = 4
    assert panel.profile is None and "no profile was made; there are contrast@5, gaussian_noise@2" in panel.status.value
    panel.corruption_choice.value, panel.severity_choice.value = "gaussian_noise", 2
    assert panel.profile is profiles["gaussian_noise@2"] and "best single block b2" in panel.facts


def test_profiles_under_no_corruption_are_named():
    with pytest.raises(ValueError, match="profiles has none under a corruption.*there are digits"):
        ShiftPanel(tiny_task(), {"digits": shift_profiles()["digits"]})
    with pytest.raises(TypeError, match=r"profiles\['contrast@5'\] is "):
        ShiftPanel(tiny_task(), {"contrast@5": shift_profiles()["contrast@5"].table})
