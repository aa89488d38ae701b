"""What every panel keeps to: it shows itself live and saved, follows its widgets and back, and refuses wrong values."""

import base64
import io

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from subtuning_lab import notebook
from subtuning_lab.criteria.score import score_blocks
from subtuning_lab.search.profiles import Profile
from tests.helpers import tiny_chain, tiny_task
from tests.notebook import MERGED, RATES, alpha_table, search, shift_profiles, size_table
from tests.plots.test_claims import table

#: name -> arguments, given a study and its profile
CLAIMS = [table(("here", 0.1, 0.0, 0.2)), table(("there", 0.3, 0.1, 0.5)).assign(claim="another")]
PANELS = {
    "StudyPanel": lambda study, profile: {"tasks": ["digits", "position"], "train_size": 40},
    "ProfilePanel": lambda study, profile: {"profiles": {1: profile, 2: profile.table.assign(accuracy=0.4)}},
    "BlockPanel": lambda study, profile: {"study": study},
    "TrainPanel": lambda study, profile: {"study": study, "profile": profile},
    "TracePanel": lambda study, profile: {"search": search(), "epsilon": 0.03},
    "SizePanel": lambda study, profile: {"summary": size_table()},
    "AlphaPanel": lambda study, profile: {"summary": alpha_table(), "alpha": 0.0},
    "ShiftPanel": lambda study, profile: {"task": tiny_task(), "profiles": shift_profiles()},
    "BoundPanel": lambda study, profile: RATES,
    "MergePanel": lambda study, profile: {"backbone": tiny_chain(), "tasks": MERGED, "image_size": 8},
    "RealPanel": lambda study, profile: {"notebook": "04", "cases": pd.concat(CLAIMS)},
    "CriterionPanel": lambda study, profile: {
        "profiles": {"t": profile, "u": Profile(profile.table.assign(accuracy=0.4), profile.scores, 1, "u")},
        "scores": dict.fromkeys("tu", score_blocks(study, ["parameters", "cka"])),
    },
}


@pytest.fixture(params=PANELS)
def panel(request, study, profile):
    return getattr(notebook, request.param)(**PANELS[request.param](study, profile))


def inner(widget) -> list:
    """A widget and all that it holds."""
    return [widget, *(deeper for child in getattr(widget, "children", ()) for deeper in inner(child))]


def another_value(control):
    """A value beside the present one, for a slider, a list or a box to tick."""
    if isinstance(control, widgets.Checkbox):
        return not control.value
    if hasattr(control, "options"):
        values = [value for _, value in control._options_full]
        return values[values.index(control.value) - 1]
    if isinstance(control, widgets.FloatLogSlider):
        return control.value * 1.5
    return control.max if control.value < control.max else control.min


def test_every_panel_is_here():
    assert {name for name in notebook.__all__ if name.endswith("Panel")} == set(PANELS)


def test_it_displays_widgets_and_a_picture(panel):
    data, metadata = panel._repr_mimebundle_()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB"))
    assert picture.std() > 10  # something is drawn
    assert metadata["image/png"]["width"] == round(picture.shape[1] * 80 / 50)
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert data["text/plain"] == panel.facts != type(panel).__name__


def test_every_widget_moves_the_picture_and_back(panel):
    kinds = (widgets.Checkbox, widgets.Dropdown, widgets.SelectionSlider, widgets.IntSlider, widgets.FloatSlider)
    controls = [part for part in inner(panel.box) if isinstance(part, (*kinds, widgets.FloatLogSlider))]
    controls = [control for control in controls if not control.disabled]
    first, news, text = panel.png, panel.status.value, panel.facts
    assert controls
    for control in controls:
        before = control.value
        control.value = another_value(control)
        assert control.value != before and panel.png != first, control.description
        assert "Error" not in panel.status.value
        control.value = before
        assert (panel.png, panel.status.value, panel.facts) == (first, news, text), control.description


@pytest.mark.parametrize("name", PANELS)
def test_it_refuses_what_its_rules_refuse(name, study, profile):
    kind, good = getattr(notebook, name), PANELS[name](study, profile)
    for parameter, rule in kind.__init__.rules.items():
        for value in rule.wrong():
            with pytest.raises((TypeError, ValueError), match=parameter):
                kind(**good | {parameter: value})
