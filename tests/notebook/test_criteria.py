"""The panel of criteria, in process: choices are made, pictures and blocks looked at."""

import pytest

import subtuning_lab as lab
from subtuning_lab.notebook import CriterionPanel


@pytest.fixture(scope="module")
def panel_of(study, profile):
    scores = lab.score_blocks(study, ["parameters", "random", "cka"])
    return lambda: CriterionPanel({"tiny": profile}, {"tiny": scores})


def test_every_choice_changes_blocks_and_picture(panel_of, study):
    panel = panel_of()
    picture = panel.figure.value
    assert panel.blocks == ("block1",) and "parameters tunes block1" in panel.facts  # equal sizes: the first one
    panel.count.value = 2
    assert panel.blocks == ("block1", "block2") and panel.figure.value != picture
    panel.criterion.value = "cka"
    expected = lab.select_blocks(lab.score_blocks(study, "cka"), k=2)
    assert panel.blocks == expected and "cka tunes" in panel.status.value


def test_tasks_must_be_the_same(profile, panel_of):
    with pytest.raises(ValueError, match="it must be of the profiles' tasks tiny"):
        CriterionPanel({"tiny": profile}, {"other": panel_of().scores["tiny"]})
