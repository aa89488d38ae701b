"""The panels, in process: their widgets are set as a reader would set them, their pictures and numbers looked at."""

from __future__ import annotations

import base64
import io
import threading
import time

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torch import nn

import subtuning_lab as lab
from subtuning_lab.nets.flops import training_flops
from subtuning_lab.notebook import block_panels
from subtuning_lab.notebook import panel as panels
from subtuning_lab.notebook import study_panels as controls
from subtuning_lab.search.profiles import LINEAR_PROBING

NAMES = ("stem", "block1", "block2", "block3", "tail")


def tiny_backbone() -> lab.Chain:
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)]
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return lab.Chain(nn.Conv2d(3, 4, 3, padding=1), blocks, tail, 4, name="tiny", input_size=(3, 8, 8))


def tiny_study(records=None) -> lab.Study:
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    task = lab.Task.from_arrays(images, np.arange(24) % 2, name="noise")
    recipe = lab.Recipe(epochs=1, batch_size=8)
    return lab.Study(tiny_backbone(), task, recipe, folds=3, records=records, device="cpu", progress=False)


@pytest.fixture(scope="module")
def study() -> lab.Study:
    return tiny_study()


@pytest.fixture(scope="module")
def profile(study) -> lab.Profile:
    return lab.finetuning_profile(study)


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch):
    """Panels never ask pyplot for a figure, which would show twice, and leave its backend alone; small pictures."""
    monkeypatch.setattr(panels, "_DPI", 50)
    monkeypatch.setattr(plt, "figure", None)
    backend, before = matplotlib.get_backend(), plt.get_fignums()
    yield
    assert plt.get_fignums() == before
    assert matplotlib.get_backend() == backend


def bundle_of(panel) -> tuple[dict, np.ndarray]:
    data, metadata = panel._repr_mimebundle_()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB"))
    assert metadata["image/png"]["width"] == round(picture.shape[1] * 80 / 50)
    return data, picture


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_ticking_changes_picture_and_numbers_at_once(study):
    panel = controls.tick_blocks(study)
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
    panel = controls.tick_blocks(study, ["block1"])
    full = sum(training_flops(study.parts, NAMES).values())
    panel.presets[1].click()
    assert panel.blocks == NAMES and panel.flops == full and "100% of the FLOPs" in panel.facts
    panel.presets[0].click()
    assert panel.blocks == () and panel.flops == study.parts["flops"].sum() < full


def test_unknown_part_is_refused_and_named(study):
    with pytest.raises(ValueError, match="block9.*block1, block2"):
        controls.tick_blocks(study, ["block9"])


def test_display_has_widgets_and_a_picture(study, profile):
    shown = [
        controls.tick_blocks(study),
        controls.train_ticked(study, profile),
        controls.browse_profile({"all": profile}),
        controls.choose_study(tasks=["digits"]),
    ]
    for panel in shown:
        data, picture = bundle_of(panel)
        assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
        assert data["text/plain"] == panel.facts
        assert picture.std() > 10  # something is drawn
    assert bundle_of(shown[1])[1].shape[0] > bundle_of(shown[0])[1].shape[0]  # network and profile


def test_training_lands_in_the_profile_figure(study, profile):
    panel = controls.train_ticked(study, profile, ["stem", "block3"])
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
    panel = controls.train_ticked(study, profile, ["block1", "tail"])
    before = panel.figure.value
    panel.train_button.click()
    panel.join(20)
    assert panel.figure.value != before and list(panel.tried["blocks"]) == [("block1", "tail")]
    assert not panel.train_button.disabled and panel.stop_button.disabled


def test_stop_keeps_finished_folds_and_train_goes_on(profile, monkeypatch, tmp_path):
    monkeypatch.setattr(block_panels, "_REPORT_S", 0.0)
    study = tiny_study(tmp_path / "scores.sqlite")
    panel = controls.train_ticked(study, profile, ["stem", "block1", "block2"])
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
    panel = controls.train_ticked(study, profile)
    panel.train_button.click()
    panel.join(20)
    assert "ValueError: no &lt;numbers&gt; today" in panel.status.value and not panel.training
    with pytest.raises(ValueError, match="no <numbers> today"):
        panel.train()
    assert "no &lt;numbers&gt; today" in panel.status.value and not panel.training


def test_two_trainings_at_once_are_refused(study, profile):
    panel = controls.train_ticked(study, profile, ["block3"])
    release = threading.Event()
    panel.bar.observe(lambda change: release.wait(20), "value")
    panel._declare(training=True)
    with pytest.raises(RuntimeError, match="press Stop"):
        panel.train()
    release.set()


def test_choice_is_plain_values_for_a_study():
    panel = controls.choose_study(["lab-resnet", "lab-vit"], ["digits", "position"], train_size=40)
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
    panel = controls.choose_study(tasks=["digits", "source"], train_size=60)
    panel.size_choice.value = 20
    assert panel.status.value == ""
    panel.task_choice.value = "source"  # 40 classes
    assert "ValueError" in panel.status.value and "has no training images" in panel.status.value
    panel.task_choice.value = "digits"
    assert panel.status.value == ""


def test_browsing_swaps_finished_figures(study, profile):
    windows = {1: profile, 2: lab.finetuning_profile(study, 2)}
    panel = controls.browse_profile(windows, "window")
    first = panel.figure.value
    panel.choice.value = "2"
    assert panel.figure.value != first and panel.profile is windows[2]
    panel.choice.value = "1"
    assert panel.figure.value == first


def test_browsing_takes_tables_by_name(profile):
    table = profile.table.assign(accuracy=profile.table["accuracy"] / 2)
    panel = controls.browse_profile({"as it was": profile, "halved": table})
    first = panel.figure.value
    panel.choice.value = "halved"
    assert panel.figure.value != first
    pd.testing.assert_frame_equal(panel.profile.table, table)
    with pytest.raises(ValueError, match="at least one"):
        controls.browse_profile({})
