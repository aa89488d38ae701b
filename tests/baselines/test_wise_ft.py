"""Interpolated blocks: exact at both ends, what happens to buffers and readouts, one training for a whole curve."""

import gc
import weakref
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from subtuning_lab import Recipe, Records, Split, Study, load_backbone, prune_blocks
from subtuning_lab.baselines import wise_ft
from subtuning_lab.baselines.latest import Latest
from subtuning_lab.baselines.wise_ft import (
    Interpolated,
    best_alpha,
    interpolate,
    interpolated,
    interpolation_curve,
    summarize_interpolation,
)
from tests.helpers import tiny_chain, tiny_split, tiny_task

RECIPE = Recipe(epochs=2, batch_size=8, lr=3e-2)
SOURCE = replace(RECIPE, head_start="source")
BLOCKS = ("block1", "block3")


def sourced_chain(dtype=torch.float32):
    """A tiny chain with a pretrained readout of three classes."""
    chain = tiny_chain(dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        chain.source_head = nn.Linear(6, 3, dtype=dtype).requires_grad_(False)
    return chain


def tuned_task(recipe=RECIPE, blocks=BLOCKS):
    return Study(sourced_chain(), tiny_task(), recipe, folds=2, progress=False).fit(blocks)


def test_both_ends_are_exact():
    tuned = tuned_task(SOURCE)
    start, end = interpolate(tuned, 0), interpolate(tuned, 1)
    for name in BLOCKS:
        for key, tensor in tuned.backbone.part(name).state_dict().items():
            own = tuned.weights[name][key]
            assert torch.equal(end.weights[name][key], own)
            assert torch.equal(start.weights[name][key], tensor if tensor.is_floating_point() else own)
        assert not torch.equal(start.weights[name]["bn.running_mean"], end.weights[name]["bn.running_mean"])
        assert int(start.weights[name]["bn.num_batches_tracked"]) == 6  # a whole number is the tuned task's
    assert torch.equal(end.weights["head"]["weight"], tuned.weights["head"]["weight"])


def test_in_between_is_a_weighted_mean():
    tuned = tuned_task(SOURCE)
    middle = interpolate(tuned, 0.3).weights
    for name in (*BLOCKS, "head"):
        part = tuned.backbone.source_head if name == "head" else tuned.backbone.part(name)
        for key, tensor in part.state_dict().items():
            if tensor.is_floating_point():
                by_hand = 0.7 * tensor.double() + 0.3 * tuned.weights[name][key].double()
                torch.testing.assert_close(middle[name][key].double(), by_hand, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("siamese", [False, True])
def test_at_zero_the_network_is_the_pretrained_one(siamese):
    """With the readout kept, plain or Siamese."""
    tuned = tuned_task(replace(SOURCE, siamese=siamese))
    images = tiny_split(9, seed=5).images
    base = tuned.backbone.eval()
    with torch.no_grad():
        wanted = base.source_head(base(base.normalize(images)))
        assert not torch.allclose(tuned.network()(images), wanted, atol=1e-3)
        torch.testing.assert_close(interpolate(tuned, 0).network()(images), wanted, rtol=1e-5, atol=1e-5)


def test_a_new_readout_stays_as_it_was_tuned():
    for recipe in (RECIPE, replace(RECIPE, head_depth=2)):
        tuned = tuned_task(recipe)
        for key, tensor in interpolate(tuned, 0.4).weights["head"].items():
            assert torch.equal(tensor, tuned.weights["head"][key])


def test_the_task_is_not_changed_and_tells_its_alpha():
    tuned = replace(tuned_task(), scores={"fold accuracy": 0.5})
    before = {name: {key: tensor.clone() for key, tensor in own.items()} for name, own in tuned.weights.items()}
    middle = interpolate(tuned, 0.5)
    assert middle.provenance["alpha"] == 0.5 and "alpha" not in tuned.provenance
    assert middle.scores == {} and middle.blocks == tuned.blocks  # the scores were another network's
    assert all(
        torch.equal(tensor, before[name][key]) for name, own in tuned.weights.items() for key, tensor in own.items()
    )


def test_a_curve_is_what_its_points_are_by_hand():
    task, clean = tiny_task(n_test=6), tiny_split(30, seed=9)
    study = Study(sourced_chain(), task, SOURCE, folds=2, seeds=(0, 4), progress=False)
    curve = interpolation_curve(study, BLOCKS, clean, [0.0, 0.5, 1.0])
    assert len(curve) == 3 * (2 * 2 + 2)
    for row in curve[curve["images"] == "clean"].itertuples():
        by_hand = interpolate(study.fit(BLOCKS, row.seed), row.alpha).accuracy(clean)
        assert row.accuracy == pytest.approx(by_hand) and row.fold is pd.NA
    whole = curve[(curve["images"] == "target") & (curve["alpha"] == 1.0)]
    wanted = study.scores([BLOCKS]).set_index(["seed", "fold"])["accuracy"]
    assert [wanted[row.seed, row.fold] for row in whole.itertuples()] == pytest.approx(whole["accuracy"].tolist())
    summary = summarize_interpolation(curve).set_index(["images", "alpha"])
    assert summary.loc[("clean", 0.5), "n"] == 2 and summary.loc[("target", 0.5), "n"] == 4
    assert summary.loc[("target", 1.0), "accuracy"] == pytest.approx(wanted.mean())


@pytest.fixture
def counted_fits(monkeypatch):
    """The seeds of all trainings that interpolation makes."""
    trained, fit = [], wise_ft.fit_together
    monkeypatch.setattr(wise_ft, "fit_together", lambda *own, **how: (trained.append(how["seed"]), fit(*own, **how))[1])
    return trained


def test_a_curve_costs_one_training_per_fold_and_is_read_again(counted_fits):
    store, clean, task = Records(":memory:"), tiny_split(9, seed=9), tiny_task()
    study = Study(sourced_chain(), task, RECIPE, folds=2, records=store, progress=False)
    first = interpolation_curve(study, BLOCKS, clean, [0.0, 0.25, 1.0])
    assert len(counted_fits) == 2 + 1  # folds, and all training images
    again = Study(sourced_chain(), task, RECIPE, folds=2, records=store, progress=False)
    pd.testing.assert_frame_equal(interpolation_curve(again, BLOCKS, clean, [0.0, 0.25, 1.0]), first)
    assert len(counted_fits) == 3
    interpolation_curve(again, BLOCKS[:1], clean, [0.5])
    assert len(counted_fits) == 6


def test_a_copy_of_the_images_shares_the_training(counted_fits):
    """As on a GPU, where a study hands a new split to every method; and nothing outlives the methods."""
    split, chain, latest = tiny_split(), sourced_chain(), Latest()
    first = Interpolated(BLOCKS, RECIPE, 0.2, latest).fit(chain, split, 3)
    copied = Split(split.images.clone(), split.labels)
    again = Interpolated(BLOCKS, RECIPE, 0.2, latest).fit(chain, copied, 3)
    assert torch.equal(first.logits(split), again.logits(split)) and len(counted_fits) == 1
    Interpolated(BLOCKS, RECIPE, 0.2, latest).fit(chain, Split(255 - split.images, split.labels), 3)
    assert len(counted_fits) == 2
    kept = weakref.ref(chain)
    del first, again, latest, chain
    gc.collect()
    assert kept() is None


def test_another_pretrained_readout_is_another_curve():
    """The readout is no part of the backbone's fingerprint; neither records nor the latest training may mix them up."""
    store, task, clean = Records(":memory:"), tiny_task(), tiny_split(30, seed=9)
    found = []
    for sign in (1, -1):
        chain = sourced_chain()
        chain.source_head.weight.data.mul_(sign)
        study = Study(chain, task, SOURCE, folds=2, records=store, progress=False)
        found.append(interpolation_curve(study, BLOCKS, clean, [0.0])["accuracy"].tolist())
        assert found[-1][-1] == interpolate(study.fit(BLOCKS), 0.0).accuracy(clean)
    assert found[0] != found[1]


def test_the_chosen_alpha_is_the_best_on_the_folds_and_forgets_least():
    rows = [(alpha, "target", own) for alpha, own in ((0.0, 0.5), (0.4, 0.8), (0.7, 0.8), (1.0, 0.7))]
    rows += [(alpha, "clean", 1.0 - 0.1 * alpha) for alpha, *_ in rows]
    assert best_alpha(pd.DataFrame(rows, columns=["alpha", "images", "accuracy"])) == 0.4
    with pytest.raises(ValueError, match="target"):
        best_alpha(pd.DataFrame(rows[4:], columns=["alpha", "images", "accuracy"]))


def test_methods_are_tested_through_the_study():
    study = Study(sourced_chain(), tiny_task(), RECIPE, folds=2, progress=False)
    methods = interpolated(study, "all", [1.0, 0.0, 1.0])
    assert [own.alpha for own in methods] == [0.0, 1.0] and methods[0].blocks == study.part_names
    result = study.test(methods[1])
    assert result.uses == 1 and result.accuracies[0] == pytest.approx(study.test("all").accuracies[0])


def test_pruned_blocks_have_no_way_back():
    pytest.importorskip("torch_pruning")
    network = load_backbone("lab-resnet", "random")
    study = Study(network, tiny_task(), replace(RECIPE, epochs=1, image_size=32), folds=2, progress=False)
    with pytest.raises(ValueError, match="layer3.1 has another shape"):
        interpolate(prune_blocks(study.fit(["layer3.1"]), 0.5), 0.5)


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match='init "random"'):
        interpolate(tuned_task(replace(RECIPE, init="random")), 0.5)
    with pytest.raises(ValueError, match="patience is 3"):
        Interpolated(BLOCKS, replace(RECIPE, patience=3), 0.5)
    study = Study(sourced_chain(), tiny_task(), RECIPE, folds=2, progress=False)
    with pytest.raises(ValueError, match="test images"):
        interpolation_curve(study, BLOCKS, study.task.test, [0.5])
