"""The panels, in process: their widgets are set as a reader would set them, their pictures and numbers looked at."""

import threading
import time

import pandas as pd
import pytest

import subtuning_lab as lab
from subtuning_lab.nets.flops import training_flops
from subtuning_lab.notebook import BlockPanel, ProfilePanel, StudyPanel, TrainPanel, block_panels
from subtuning_lab.search.profiles import LINEAR_PROBING
from tests.notebook import made_profile, tiny_study

NAMES = ("stem", "block1", "block2", "block3", "tail")


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_ticking_changes_picture_and_numbers_at_once(study):
    panel = BlockPanel(study)
    assert panel.blocks == () and panel.parameters == 0
    seen = {panel.network.value}
    for k, name in enumerate(("block2", "stem"), start=1):
        costs = panel.costs.value
        panel.boxes[name].value = True
        seen.add(panel.network.value)
        assert len(seen) == k + 1 and panel.costs.value != costs
        assert panel.parameters == lab.count_parameters(study.backbone, panel.blocks)
        assert f"{panel.parameters:,} of {lab.count_parameters(study.backbone, 'all'):,}" in panel.facts
        assert panel.flops == sum(training_flops(study.parts, panel.blocks).values())
    assert panel.blocks == ("stem", "block2")


def test_presets_are_the_two_references(study):
    panel = BlockPanel(study, ["block1"])
    full = sum(training_flops(study.parts, NAMES).values())
    panel.presets[1].click()
    assert panel.blocks == NAMES and panel.flops == full and "100% of the FLOPs" in panel.facts
    panel.presets[0].click()
    assert panel.blocks == () and panel.flops == study.parts["flops"].sum() < full


def test_unknown_part_is_refused_and_named(study):
    with pytest.raises(ValueError, match="block9.*block1, block2"):
        BlockPanel(study, ["block9"])


def test_a_profile_of_another_network_is_refused(study):
    with pytest.raises(ValueError, match="profile is of another network: the study's has no part b1"):
        TrainPanel(study, made_profile([0.5] * 4))


def test_training_lands_in_the_profile_figure(study, profile):
    panel = TrainPanel(study, profile, ["stem", "block3"])
    before = panel.figure.value
    tried = panel.train()
    assert panel.figure.value != before and panel.bar.value == 1.0 and not panel.training
    (row,) = tried.to_dict("records")
    scores = study.scores([("stem", "block3")])["accuracy"]
    assert (row["accuracy"], row["std"], row["n"]) == (scores.mean(), scores.std(), 3)
    assert row["params"] == lab.count_parameters(study.backbone, ["stem", "block3"])
    assert row["label"] == "stem + block3" and "stem + block3" in panel.status.value
    panel.train()  # again: from the records, and still one bar
    panel.ticks.tick([])
    panel.train()
    assert list(panel.tried["label"]) == ["stem + block3", LINEAR_PROBING]
    assert len(profile.table) == 5  # the given profile is left as it was


def test_button_trains_in_a_thread(study, profile):
    panel = TrainPanel(study, profile, ["block1", "tail"])
    before = panel.figure.value
    panel.train_button.click()
    panel.join(20)
    assert panel.figure.value != before and list(panel.tried["blocks"]) == [("block1", "tail")]
    assert not panel.train_button.disabled and panel.stop_button.disabled


def test_stop_keeps_finished_folds_and_train_goes_on(profile, monkeypatch, tmp_path):
    monkeypatch.setattr(block_panels, "_REPORT_S", 0.0)
    study = tiny_study(tmp_path / "scores.sqlite")
    panel = TrainPanel(study, profile, ["stem", "block1", "block2"])
    held = threading.Event()

    def hold(change: dict) -> None:
        """Keeps the training at its half until Stop has been pressed."""
        if change["new"] >= 0.5 and not held.is_set():
            held.set()
            wait_until(lambda: panel._stopping.is_set())

    panel.bar.observe(hold, "value")
    panel.train_button.click()
    assert held.wait(20)
    assert panel.training and not panel.stop_button.disabled
    assert all(box.disabled for box in panel.ticks.boxes.values())
    panel.stop_button.click()
    panel.join(20)
    kept = study.records.table()
    assert 0 < len(kept) < 3 and "Stopped" in panel.status.value
    assert not panel.training and panel.tried.empty
    assert not any(box.disabled for box in panel.ticks.boxes.values())
    tried = panel.train()
    everything = study.records.table()
    assert list(tried["n"]) == [3] and len(everything) == 3
    assert set(kept["key"]) < set(everything["key"])
    finished = everything.set_index("key").loc[kept["key"], "seconds"]
    assert list(finished) == list(kept["seconds"])  # not computed again


def test_errors_of_training_are_shown(study, profile, monkeypatch):
    def fail(self, subsets):
        raise ValueError("no <numbers> today")

    monkeypatch.setattr(lab.Study, "scores", fail)
    panel = TrainPanel(study, profile)
    panel.train_button.click()
    panel.join(20)
    assert "ValueError: no &lt;numbers&gt; today" in panel.status.value and not panel.training
    with pytest.raises(ValueError, match="no <numbers> today"):
        panel.train()
    assert "no &lt;numbers&gt; today" in panel.status.value and not panel.training


def test_two_trainings_at_once_are_refused(study, profile):
    panel = TrainPanel(study, profile, ["block3"])
    release = threading.Event()
    panel.bar.observe(lambda change: release.wait(20), "value")
    panel._declare(training=True)
    with pytest.raises(RuntimeError, match="press Stop"):
        panel.train()
    release.set()


def test_choice_is_plain_values_for_a_study():
    panel = StudyPanel(["lab-resnet", "lab-vit"], ["digits", "position"], train_size=40)
    assert (panel.backbone, panel.task, panel.train_size) == ("lab-resnet", "digits", 40)
    assert panel.severity_choice.disabled
    changes = [
        (panel.task_choice, "position", panel.examples),
        (panel.corruption_choice, "contrast", panel.examples),
        (panel.severity_choice, 5, panel.examples),
        (panel.size_choice, 60, panel.examples),
        (panel.backbone_choice, "lab-vit", panel.network),
    ]
    for control, value, picture in changes:
        before = picture.value
        control.value = value
        assert picture.value != before, control.description
    assert (panel.backbone, panel.task, panel.train_size) == ("lab-vit", "position+contrast@5", 60)
    assert not panel.severity_choice.disabled
    assert lab.load_task(panel.task, train_size=panel.train_size, test_size=8, progress=False).num_classes == 8


def test_choice_that_cannot_be_is_shown_and_left_again():
    panel = StudyPanel(tasks=["digits", "source"], train_size=60)
    panel.size_choice.value = 20
    assert panel.status.value == ""
    panel.task_choice.value = "source"  # 40 classes
    assert "ValueError" in panel.status.value and "one image of each of 40 classes" in panel.status.value
    panel.task_choice.value = "digits"
    assert panel.status.value == ""


def test_browsing_takes_tables_by_name(profile):
    table = profile.table.assign(accuracy=profile.table["accuracy"] / 2)
    panel = ProfilePanel({"as it was": profile, "halved": table})
    first = panel.figure.value
    panel.choice.value = "halved"
    assert panel.figure.value != first
    pd.testing.assert_frame_equal(panel.profile.table, table)
    for profiles, message in (
        ({}, "at least one"),
        ({"a": table.drop(columns="std")}, "without column std"),
        ({"a": table[-2:]}, "no rows of blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            ProfilePanel(profiles)
