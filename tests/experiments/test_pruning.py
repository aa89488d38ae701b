"""Pruned subsets: what is scored is what was trained and pruned, on the same folds, and the backbone stays whole."""

import pytest
import torch

from subtuning_lab import Recipe, Study, TunedTask, fit_pruned, fit_together, load_tuned, merge_tasks, pruning_table
from subtuning_lab.experiments import pruning as pruning_study
from subtuning_lab.inference.prune import prune_backbone, prune_blocks
from subtuning_lab.nets.chain import copy_weights, count_parameters
from tests.helpers import tiny_task
from tests.inference.test_prune import chain_of

pytest.importorskip("torch_pruning")

BLOCKS = ("block1", "block3")


def study_of(folds=2, seeds=(0,), **recipe) -> Study:
    recipe = Recipe(**{"epochs": 2, "batch_size": 8, "lr": 1e-2, "bn": "frozen"} | recipe)
    return Study(chain_of(), tiny_task(), recipe, folds=folds, seeds=seeds, device="cpu", progress=False)


def same(first, second, atol=0.0) -> bool:
    return all(
        torch.allclose(tensor, second[part][key], rtol=0, atol=atol)
        for part, state in first.items()
        for key, tensor in state.items()
    )


def test_pruned_before_tuning_is_the_pruned_backbone_tuned():
    study = study_of()
    tuned = fit_pruned(study, BLOCKS, 0.5)
    small = prune_backbone(study.backbone, BLOCKS, 0.5)
    (fit,) = fit_together(small, [BLOCKS], study.task.train, study.recipes[0], num_classes=3)
    assert same(tuned.weights, fit.weights) and tuned.pruned == set(BLOCKS)
    assert tuned.backbone is study.backbone and study.backbone.fingerprint == chain_of().fingerprint
    assert not same({"block1": copy_weights({"": small.part("block1")})[""]}, tuned.weights)  # it was trained
    assert tuned.provenance["pruning"]["ratio"] == 0.5 and tuned.provenance["task"] == "tiny"


def test_pruned_after_tuning_is_the_tuned_task_pruned():
    study = study_of()
    tuned = fit_pruned(study, BLOCKS, 0.5, when="after", importance="l2", scope="global")
    assert same(tuned.weights, prune_blocks(study.fit(BLOCKS), 0.5, "global", "l2").weights)


def test_tuning_on_starts_from_the_pruned_blocks_and_their_readout():
    still = study_of(lr=1e-9, head_lr=1e-2)  # the readout, too, goes on at the blocks' rate
    pruned, tuned_on = (fit_pruned(still, BLOCKS, 0.5, when="after", tune_on=n) for n in (0, 1))
    assert same(tuned_on.weights, pruned.weights, atol=1e-7)
    moving = study_of()
    pruned, tuned_on = (fit_pruned(moving, BLOCKS, 0.5, when="after", tune_on=n) for n in (0, 5))
    assert not same(tuned_on.weights, pruned.weights, atol=1e-3)
    images, labels = moving.task.train.images, moving.task.train.labels
    losses = [torch.nn.functional.nll_loss(task.predict(images).log(), labels) for task in (pruned, tuned_on)]
    assert losses[1] < losses[0] and tuned_on.provenance["tuned_on"] == 5


@pytest.mark.parametrize("options", [{}, {"when": "after"}, {"when": "after", "tune_on": 1}])
def test_every_kind_is_saved_and_merged(options, tmp_path):
    study = study_of()
    tuned = fit_pruned(study, BLOCKS, 0.5, **options)
    loaded = load_tuned(tuned.save(tmp_path / "t.safetensors"), chain_of())
    images = study.task.test.images
    with torch.no_grad():
        expected = tuned.network()(images)
        merged = merge_tasks(loaded.backbone, {"loaded": loaded})(images)["loaded"]
    assert torch.allclose(merged, expected, rtol=0, atol=1e-10)


def test_the_table_has_a_row_for_every_way_and_counts_by_hand():
    study = study_of(epochs=1)
    table = pruning_table(study, BLOCKS, [0.25, 0.5], importances=["l1", "random"], tune_on=1, runs=2, clock="cpu")
    assert table["pruned"].tolist() == ["no", *["before tuning"] * 4, *["after tuning", "after, tuned on"] * 4]
    assert table.loc[1:, "ratio"].tolist() == [0.25, 0.25, 0.5, 0.5] + [0.25] * 4 + [0.5] * 4
    whole = 2 * (8 * 6 * 9 + 2 * 8 + 6 * 8 * 9 + 6)
    half = 2 * (4 * 6 * 9 + 2 * 4 + 6 * 4 * 9 + 6)
    assert table.loc[0, "params"] == whole == count_parameters(study.backbone, BLOCKS)
    assert set(table.loc[table["ratio"] == 0.5, "params"]) == {half}
    saved = 2 * 4 * 2 * (6 * 9) * 8 * 8 * 2  # two blocks, 4 channels made and read, 8 x 8 pixels, multiply and add
    assert table.loc[0, "flops"] - table.loc[table["ratio"] == 0.5, "flops"].iloc[0] == saved
    assert (table["accuracy"].between(0, 1) & (table["n"] == 2) & (table["median_ms"] > 0)).all()
    assert table.loc[0, "ratio_ms"] == 1 and (table.loc[1:, "file_bytes"] < table.loc[0, "file_bytes"]).all()


def test_fold_scores_are_those_of_the_pruned_network():
    study = study_of(seeds=(0, 1))
    table = pruning_table(study, BLOCKS, [0.75], tune_on=0, runs=1)
    expected = {"before tuning": [], "after tuning": []}
    for seed in (0, 1):
        for rows, held_out in study.task.folds(2):
            train, validation = study.task.train.take(rows), study.task.train.take(held_out)
            for when, chain in (
                ("before tuning", prune_backbone(study.backbone, BLOCKS, 0.75)),
                ("after tuning", study.backbone),
            ):
                (fit,) = fit_together(chain, [BLOCKS], train, study.recipes[0], num_classes=3, seed=seed)
                task = TunedTask(chain, fit.blocks, fit.weights, study.task.classes)
                task = prune_blocks(task, 0.75) if when == "after tuning" else task
                expected[when].append(task.accuracy(validation))
    for when, scores in expected.items():
        row = table[table["pruned"] == when].iloc[0]
        assert row["accuracy"] == pytest.approx(torch.tensor(scores).mean().item(), abs=1e-6)
        assert row["std"] == pytest.approx(torch.tensor(scores).std().item(), abs=1e-6) and row["n"] == 4


def test_recorded_scores_are_read_and_one_training_serves_all_ways(monkeypatch):
    study, calls, train = study_of(), [], pruning_study.fit_together
    monkeypatch.setattr(pruning_study, "fit_together", lambda *a, **k: calls.append(a) or train(*a, **k))
    options = {"scopes": ["local", "global"], "when": ["after"], "runs": 1}
    first = pruning_table(study, BLOCKS, [0.25, 0.5], **options)
    assert len(calls) == 2  # one a fold, for four ways to prune
    again = pruning_table(study, BLOCKS, [0.25, 0.5], **options)
    assert len(calls) == 2 and again["accuracy"].equals(first["accuracy"])


def test_test_images_are_used_when_asked_only():
    study = study_of()
    plain = pruning_table(study, BLOCKS, [0.5], runs=1)
    assert "test_accuracy" not in plain and study.test(BLOCKS).uses == 1
    table = pruning_table(study, BLOCKS, [0.5], test=True, runs=1)
    assert table["test_accuracy"].between(0, 1).all() and set(table["test_n"]) == {1}
    assert study.test(BLOCKS).uses == 4  # the whole subset, and the one that is pruned after tuning
    before = fit_pruned(study, BLOCKS, 0.5).accuracy(study.task.test)
    assert table.loc[table["pruned"] == "before tuning", "test_accuracy"].item() == pytest.approx(before)
    after = fit_pruned(study, BLOCKS, 0.5, when="after").accuracy(study.task.test)
    assert table.loc[table["pruned"] == "after tuning", "test_accuracy"].item() == pytest.approx(after)


@pytest.mark.parametrize("recipe", [{"siamese": True}, {"head_depth": 2}, {"bn": "batch"}, {"head_start": "probe"}])
def test_other_recipes_are_pruned_after_tuning(recipe):
    table = pruning_table(study_of(**recipe), BLOCKS, [0.5], when=["after"], runs=1)
    assert table["accuracy"].between(0, 1).all()


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ({}, {"tune_on": 2}, 'tune_on is 2, but a subset is tuned on where it is pruned "after"'),
        ({"patience": 1}, {"when": "after"}, "patience is 1"),
        ({"siamese": True}, {}, "siamese is True"),
        ({"siamese": True}, {"when": "after", "tune_on": 1}, "siamese is True"),
        ({"head_depth": 2}, {"when": "after", "tune_on": 1}, "head_depth is 2"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        fit_pruned(study_of(**recipe), BLOCKS, 0.5, **options)


def test_unknown_blocks_are_refused():
    with pytest.raises(ValueError, match="no block block9"):
        pruning_table(study_of(), ["block9"], [0.5])
