"""The panel for merged networks, in process: ticks change picture and numbers, only the button measures."""

from __future__ import annotations

import pytest
import torch

import subtuning_lab as lab
from subtuning_lab.notebook import MergePanel, untrained_task
from subtuning_lab.notebook import merge as merge_panels
from tests.helpers import tiny_chain
from tests.notebook import MERGED


@pytest.fixture
def never_measured(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("measured without the button")

    monkeypatch.setattr(merge_panels, "compare_latency", refuse)


def plan(tasks=MERGED, **options):
    return MergePanel(tiny_chain(), tasks, **{"image_size": 8, "runs": 3} | options)


def test_starts_with_the_given_blocks(never_measured):
    panel = plan()
    assert panel.blocks == {"a": ("block2",), "b": ("block1", "block3")}
    merged = lab.merge_tasks(
        panel.backbone, {name: untrained_task(panel.backbone, blocks) for name, blocks in MERGED.items()}
    )
    assert panel.schedule.table().equals(merged.rows_table())
    assert "at most 3 rows" in panel.facts and panel.measured is None


def test_ticks_change_picture_and_costs_at_once_and_measure_nothing(never_measured):
    panel = plan()
    fork, costs, facts = panel.fork.value, panel.costs.value, panel.facts
    panel.boxes["a"]["stem"].value = True
    assert panel.blocks["a"] == ("stem", "block2")
    assert panel.fork.value != fork and panel.costs.value != costs and panel.facts != facts
    expected = panel.schedule.cost(lab.part_table(panel.backbone, 8)).loc["flops", "merged"]
    assert f"flops: {expected:,.0f} merged" in panel.facts


def test_tasks_are_picked_and_the_original_left_out(never_measured):
    panel = plan()
    panel.picked["b"].value = False
    assert panel.blocks == {"a": ("block2",)} and list(panel.schedule.table()["frozen_rows"]) == [1, 1, 1, 2, 2]
    panel.keep_original.value = False
    assert not panel.schedule.keep_original and list(panel.schedule.table()["frozen_rows"]) == [1, 1, 0, 1, 1]


def test_no_task_is_told_and_can_be_undone(never_measured):
    panel = plan({"a": ["block2"]})
    panel.picked["a"].value = False
    assert "no task is picked" in panel.status.value and panel.measure_button.disabled
    assert panel.facts == "no task is picked"
    with pytest.raises(ValueError, match="no task is picked"):
        panel.measure()
    panel.picked["a"].value = True
    assert not panel.measure_button.disabled and panel.status.value == ""


def test_button_measures_and_a_tick_forgets_it():
    panel = plan()
    before = panel.costs.value
    panel.measure_button.click()
    assert list(panel.measured.index) == ["merged", "separate"] and set(panel.measured["n"]) == {3}
    assert panel.costs.value != before and not panel.measure_button.disabled
    ratio = panel.measured.loc["separate", "median_ms"]
    assert f"separate {ratio:.2f} ms" in panel.status.value and "quartiles" in panel.facts
    panel.boxes["a"]["block3"].value = True
    assert panel.measured is None and "quartiles" not in panel.facts and panel.status.value == ""


def test_merged_and_separate_do_the_same_work(monkeypatch):
    panel = plan()
    nets = {}
    monkeypatch.setattr(merge_panels, "compare_latency", lambda given, *rest, **more: nets.update(given) or fake())

    def fake():
        return lab.compare_latency({"merged": torch.nn.Identity(), "separate": torch.nn.Identity()}, 4, runs=1)

    panel.measure()
    images = torch.rand(2, 3, 8, 8)
    merged, separate = nets["merged"](images), nets["separate"](images)
    assert set(merged) == set(separate) == {"a", "b", "original"}
    for name in MERGED:
        torch.testing.assert_close(merged[name], separate[name])


def test_own_weights_are_measured_until_the_ticks_change():
    chain = tiny_chain()
    own = untrained_task(chain, ["block2"], classes=3, seed=7)
    panel = MergePanel(chain, {"a": own}, image_size=8, runs=1)
    assert panel._task("a", 0) is own
    panel.boxes["a"]["block3"].value = True
    assert panel._task("a", 0).blocks == {"block2", "block3"}


def test_untrained_weights_are_a_tasks_own():
    chain = tiny_chain(dtype=torch.float64)
    task = untrained_task(chain, ["block2"], classes=4)
    assert task.blocks == {"block2"} and len(task.classes) == 4 and task.weights["head"]["weight"].shape == (4, 6)
    for name, tensor in chain.part("block2").state_dict().items():
        mine = task.weights["block2"][name]
        assert mine.data_ptr() != tensor.data_ptr() and mine.dtype == tensor.dtype
        assert not tensor.is_floating_point() or not torch.equal(mine, tensor)
    same, other = (untrained_task(chain, ["block2"], seed=seed).weights["block2"] for seed in (0, 1))
    assert torch.equal(same["conv.weight"], task.weights["block2"]["conv.weight"])
    assert not torch.equal(same["conv.weight"], other["conv.weight"])


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ({}, {}, "tasks is empty"),
        ({"original": ["block1"]}, {}, "rename it"),
        ({"a": ["block9"]}, {}, "block9.*block1, block2"),
        ({"a": "block1"}, {}, "block1"),
        ({3: ["block1"]}, {}, "a task's name is 3"),
    ],
)
def test_bad_tasks_are_refused(tasks, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plan(tasks, **options)
