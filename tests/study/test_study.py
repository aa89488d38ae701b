"""A study: honest folds, complete keys, and numbers that anyone can recompute."""

import math
import sys
import warnings
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics

import subtuning_lab.study.runner
from subtuning_lab import Head2Toe, Recipe, Records, Split, Study, Task, TunedTask, fit_together, greedy_subtuning
from subtuning_lab.search.candidates import chosen_rows
from subtuning_lab.search.profiles import finetuning_profile
from subtuning_lab.study.runner import usable_device
from tests.helpers import Forbidden, tiny_chain, tiny_split, tiny_task

RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-2)


def new_study(backbone=None, task=None, recipe=RECIPE, **options) -> Study:
    options = {"folds": 2, "device": "cpu", "progress": False} | options
    return Study(backbone or tiny_chain(), task or tiny_task(), recipe, **options)


def numbers(table):
    return table.drop(columns=["seconds"])


def test_rows_are_subsets_times_seeds_times_folds():
    study = new_study(folds=3, seeds=(0, 4))
    table = study.scores([["block3", "block1"], [], "all", ["block1", "block3"]])
    assert len(table) == 3 * 3 * 2  # the first and the last are one subset
    assert table["blocks"].drop_duplicates().tolist() == [("block1", "block3"), (), study.part_names]
    places = table.set_index("blocks").loc[[()], ["seed", "fold"]].to_numpy().tolist()
    assert places == [[seed, fold] for seed in (0, 4) for fold in range(3)]
    assert (table["params"] == [study.count_parameters(blocks) for blocks in table["blocks"]]).all()
    assert (table["epochs"] == 2).all()


def test_no_subsets_give_an_empty_table():
    table = new_study().scores([])
    assert len(table) == 0 and {"blocks", "accuracy"} <= set(table)


def test_a_score_is_the_accuracy_of_a_training_on_the_other_folds():
    """By hand: train on what the fold leaves, count hits on the fold, with the sequential engine."""
    study, task, chain = new_study(folds=3, seeds=(7,)), tiny_task(), tiny_chain()
    table = study.scores([["block2"]])
    held = []
    for (train, validation), row in zip(task.folds(3), table.itertuples(), strict=True):
        held += validation.tolist()
        (fit,) = fit_together(
            chain, [["block2"]], task.train.take(train), RECIPE, num_classes=3, seed=7, engine="sequential"
        )
        tuned = tiny_chain()
        tuned.part("block2").load_state_dict(fit.weights["block2"])
        with torch.no_grad():
            features = tuned.eval()(tuned.normalize(task.train.images[validation]))
        logits = features @ fit.weights["head"]["weight"].T + fit.weights["head"]["bias"]
        hits = (logits.argmax(1) == task.train.labels[validation]).float().mean()
        assert row.accuracy == pytest.approx(float(hits), abs=1e-6)
        loss = torch.nn.functional.cross_entropy(logits, task.train.labels[validation])
        assert row.loss == pytest.approx(float(loss), rel=1e-3)
    assert sorted(held) == list(range(len(task.train)))


def test_the_same_call_gives_the_same_numbers_and_seeds_change_them():
    subsets = [["block1"], [], "all"]
    first, again = (new_study(seeds=(0, 1)).scores(subsets) for _ in range(2))
    assert numbers(first).equals(numbers(again))
    per_seed = [first.loc[first["seed"] == seed, "loss"].tolist() for seed in (0, 1)]
    assert all(a != b for a, b in zip(*per_seed, strict=True))


def test_engines_and_packing_agree():
    subsets = [["block1"], ["block2", "block3"], [], "all"]
    tables = [new_study(**how).scores(subsets) for how in ({}, {"engine": "sequential"}, {"memory_limit": 1})]
    for other in tables[1:]:
        assert other["accuracy"].tolist() == tables[0]["accuracy"].tolist()
        assert other["loss"].tolist() == pytest.approx(tables[0]["loss"].tolist(), rel=1e-3)


# ---------------------------------------------------------------- selection never sees the test split


def test_scores_and_profiles_never_touch_the_test_split():
    task = tiny_task()
    study = new_study(task=task)
    object.__setattr__(task, "test", Forbidden())
    table = finetuning_profile(study).table
    assert len(table) == 5
    study.fit(["block1"])
    with pytest.raises(AssertionError, match="selection read test"):
        study.test(["block1"])


def test_scores_do_not_depend_on_the_test_split():
    """Not even through its labels, its size, or its absence."""
    task = tiny_task()
    others = [tiny_task(test_seed=9), tiny_task(n_test=3), replace(task, test=None)]
    expected = numbers(new_study(task=task).scores([["block1"], []]))
    assert all(numbers(new_study(task=other).scores([["block1"], []])).equals(expected) for other in others)


def test_folds_are_disjoint_from_their_training_images(monkeypatch):
    seen = []

    def spy(backbone, subsets, train, recipe, **options):
        seen.append((train, options["validation"]))
        return fit_together(backbone, subsets, train, recipe, **options)

    monkeypatch.setattr(subtuning_lab.study.runner, "fit_together", spy)
    new_study(folds=3).scores([[]])
    assert len(seen) == 3
    for train, validation in seen:
        images = [{image.numpy().tobytes() for image in split.images} for split in (train, validation)]
        assert not images[0] & images[1] and len(images[0]) + len(images[1]) == 24


def test_the_test_split_is_scored_by_hand_and_its_uses_are_counted():
    task, chain = tiny_task(), tiny_chain()
    study = new_study(task=task, seeds=(0, 5))
    result = study.test(["block3"])
    assert (result.blocks, result.n_test, result.uses) == (("block3",), 12, 1)
    by_hand = []
    for seed in (0, 5):
        (fit,) = fit_together(chain, [["block3"]], task.train, RECIPE, num_classes=3, seed=seed)
        tuned = tiny_chain().eval()
        tuned.part("block3").load_state_dict(fit.weights["block3"])
        with torch.no_grad():
            logits = (
                tuned(tuned.normalize(task.test.images)) @ fit.weights["head"]["weight"].T + fit.weights["head"]["bias"]
            )
        by_hand.append(float((logits.argmax(1) == task.test.labels).double().mean()))
    assert result.accuracies == pytest.approx(by_hand)
    assert result.mean == pytest.approx(sum(by_hand) / 2)
    assert result.std == pytest.approx(abs(by_hand[0] - by_hand[1]) / 2**0.5)
    again = study.test(["block3"])
    assert again.uses == 2 and again.accuracies == result.accuracies
    assert new_study(task=task, records=study.records).test([]).uses == 3
    assert new_study(task=tiny_task(seed=3), records=study.records).test([]).uses == 1  # another task's own count
    assert study.records.test_uses() == 4


def test_a_task_without_a_test_split_cannot_be_tested():
    study = new_study(task=replace(tiny_task(), test=None))
    with pytest.raises(ValueError, match="tiny has no test split"):
        study.test([])
    assert study.records.test_uses() == 0


# ---------------------------------------------------------------- keys


def count_trainings(study: Study, subsets) -> int:
    """How many trainings the study needs for these subsets."""
    steps = []
    study.with_(progress=lambda trained, total: steps.append(total)).scores(subsets)
    return (steps[-1] if steps else 0) // (RECIPE.epochs * 2)  # 12 of 24 images, in batches of 8


CHANGED_FIELDS = {
    "epochs": 3,
    "lr": 2e-2,
    "weight_decay": 0.0,
    "batch_size": 6,
    "bn": "frozen",
    "head_lr": 0.5,
    "warmup": 0.3,
    "label_smoothing": 0.1,
    "augment": "flip",
    "image_size": 12,
    "precision": "bf16",
    "patience": 2,
    "params": "norm",
    "adapter": "lora",
    "rank": 2,
    "lr_decay": 0.5,
    "lr_scaling": "rgn",
    "head_start": "probe",
    "siamese": True,
    "init": "random",
    "head_depth": 2,
    "lora_targets": "attention",
    "class_weights": "balanced",
}


def test_every_field_of_a_recipe_is_tried():
    assert set(CHANGED_FIELDS) == {f.name for f in fields(Recipe)}


@pytest.mark.parametrize(("name", "value"), CHANGED_FIELDS.items())
def test_a_recipe_field_changes_the_key(name, value):
    store = Records(":memory:")
    new_study(records=store).scores([["block1"]])
    new_study(records=store, recipe=replace(RECIPE, **{name: value})).scores([["block1"]])
    assert len(store.table()) == 4


def changed_weight():
    chain = tiny_chain()
    chain.blocks[2].conv.weight.data[0, 0, 0, 0] += 1e-3
    return {"backbone": chain}


def changed_statistic():
    chain = tiny_chain()
    chain.stem[1].running_mean[0] += 1e-3
    return {"backbone": chain}


def changed_pixel():
    split = tiny_split()
    split.images[3, 0, 0, 0] ^= 1
    return {"task": Task("tiny", ("a", "b", "c"), split, tiny_split(12, seed=1))}


def changed_label():
    split = tiny_split()
    labels = split.labels.clone()
    labels[0] = 1
    return {"task": Task("tiny", ("a", "b", "c"), Split(split.images, labels), tiny_split(12, seed=1))}


@pytest.mark.parametrize(
    "change",
    [changed_weight, changed_statistic, changed_pixel, changed_label, lambda: {"folds": 3}, lambda: {"seeds": (1,)}],
    ids=["weight", "statistic", "pixel", "label", "folds", "seed"],
)
def test_whatever_determines_a_score_changes_its_key(change):
    store = Records(":memory:")
    before = new_study(records=store)
    assert count_trainings(before, [["block1"]]) == 2
    assert count_trainings(new_study(records=store), [["block1"]]) == 0  # the same study reads
    n = len(store.table())
    new_study(records=store, **change()).scores([["block1"]])
    assert len(store.table()) >= n + 2


def test_what_does_not_determine_a_score_does_not_change_its_key():
    store = Records(":memory:")
    new_study(records=store).scores([["block1"], []])
    renamed = replace(tiny_task(), name="another name")
    backbone = tiny_chain().train()
    for how in ({"engine": "sequential"}, {"memory_limit": 1}, {"task": renamed}, {"backbone": backbone}):
        assert count_trainings(new_study(records=store, **how), [["block1"], []]) == 0
    assert count_trainings(new_study(records=store, seeds=(0, 1)), [["block1"], []]) == 4  # seed 1 alone


def test_rows_tell_where_they_come_from():
    study = new_study()
    study.scores([["block2"]])
    study.test(["block2"])
    table = study.records.table()
    assert table["split"].tolist() == ["fold", "fold", "test"]
    assert table["fold"].tolist()[:2] == [0, 1] and table["fold"].isna().tolist() == [False, False, True]
    assert table["n_train"].tolist() == [12, 12, 24] and table["n_scored"].tolist() == [12, 12, 12]
    assert table["recipe"].tolist() == [RECIPE.as_dict()] * 3
    assert table["blocks"].tolist() == [["block2"]] * 3 and set(table["backbone"]) == set(table["task"]) == {"tiny"}


# ---------------------------------------------------------------- several recipes


def test_each_subset_counts_with_its_best_recipe():
    recipes = [replace(RECIPE, lr=lr, bn=bn) for lr in (1e-1, 1e-5) for bn in ("batch", "frozen")]
    study = new_study(recipe=recipes, folds=3)
    subsets = [["block1"], [], "all"]
    everything, best = study.all_scores(subsets), study.scores(subsets, nested=False)
    assert everything.groupby("blocks")["recipe"].nunique().to_dict() == {("block1",): 4, (): 2, study.part_names: 4}
    for blocks, rows in everything.groupby("blocks"):
        mean = rows.groupby("recipe")["accuracy"].mean()
        assert best.loc[[own == blocks for own in best["blocks"]], "accuracy"].mean() == pytest.approx(mean.max())
        assert len(best.loc[[own == blocks for own in best["blocks"]]]) == 3
        chosen = study.recipe_of(blocks)
        alone = new_study(recipe=chosen, folds=3).scores([blocks])["accuracy"].mean()
        assert alone == pytest.approx(mean.max())


def test_a_tuned_task_carries_the_fold_scores_that_are_known():
    study = new_study(folds=3, recipe=[RECIPE, replace(RECIPE, lr=1e-1)])
    assert new_study().fit(["block1"]).scores == {}
    scores = study.scores([["block1"]])["accuracy"]
    told = study.fit(["block1"]).scores
    assert told == pytest.approx({"fold accuracy": scores.mean(), "fold std": scores.std(), "n": 3})


def test_candidates_run_on_some_folds_and_for_fewer_epochs():
    store = Records(":memory:")
    study = new_study(folds=3, seeds=(0, 1), recipe=[RECIPE, replace(RECIPE, lr=1e-1)], records=store)
    candidates = study.candidates([["block1"], []])
    assert [one.blocks for one in candidates] == [("block1",), ("block1",), (), ()]
    some = study.candidate_scores(candidates[1:], folds=[2, 0], seeds=[1], epochs=1)
    assert some[["candidate", "seed", "fold", "epochs"]].to_numpy().tolist() == [
        [place, 1, fold, 1] for place in range(3) for fold in (2, 0)
    ]
    assert len(store.table()) == 6
    short = new_study(folds=3, seeds=(1,), recipe=replace(RECIPE, lr=1e-1, epochs=1)).scores([["block1"]])
    assert some["accuracy"].tolist()[:2] == short["accuracy"].tolist()[2::-2]
    everything = study.candidate_scores(candidates)
    assert everything.drop(columns=["candidate"]).equals(study.all_scores([["block1"], []]).drop(columns=["recipe"]))
    for wrong in ({"folds": [3]}, {"epochs": 9}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
            study.candidate_scores(candidates, **wrong)


class Majority:
    """A method that always says the commonest label."""

    name = "majority"

    def settings(self):
        return {"strength": 1}

    def fit(self, backbone, train, num_classes, seed, image_size):
        self.params, counts = num_classes, torch.bincount(train.labels, minlength=num_classes)
        self.logits = lambda split: counts.float().expand(len(split), -1)
        return self


def test_methods_are_scored_on_the_same_folds_and_tested_through_the_same_door():
    store = Records(":memory:")
    study, method = new_study(folds=3, records=store), Majority()
    table = study.method_scores([method])
    labels = study.task.train.labels
    commonest = [torch.bincount(labels[trained]).argmax() for trained, _ in study.task.folds(3)]
    folds = zip(study.task.folds(3), commonest, strict=True)
    expected = [(labels[held] == label).double().mean().item() for (_, held), label in folds]
    assert table["accuracy"].tolist() == pytest.approx(expected) and table["params"].tolist() == [3] * 3
    assert study.test(method).mean == pytest.approx(1 / 3) and store.test_uses() == 1
    n = len(store.table())
    assert study.method_scores([method]).equals(table) and len(store.table()) == n


def test_methods_on_other_image_sizes_have_records_of_their_own():
    store, method = Records(":memory:"), Head2Toe(pool=6, share=1.0)
    for number, size in enumerate((None, 4), start=1):
        new_study(recipe=replace(RECIPE, image_size=size), records=store).method_scores([method])
        assert len(store.table()) == 2 * number


def test_of_recipes_that_tie_the_first_one_counts(monkeypatch):
    study = new_study(recipe=[replace(RECIPE, lr=lr) for lr in (1e-2, 1e-3)], folds=3)
    values = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1]  # whose sums differ by rounding
    table = study.all_scores([["block1"]]).assign(accuracy=values)
    table["score"] = table["accuracy"]
    monkeypatch.setattr(study, "all_scores", lambda subsets: table)
    assert sum(values[:3]) != sum(values[3:])
    assert study.recipe_of(["block1"]) == study.recipes[0]
    assert chosen_rows(table, nested=False)["lr"].tolist() == [1e-2] * 3


def test_the_caller_keeps_his_backbone():
    chain = tiny_chain()
    before = chain.fingerprint
    study = new_study(backbone=chain)
    study.scores(["all"])
    study.fit("all")
    assert chain.fingerprint == before == study.backbone.fingerprint
    chain.blocks[0].conv.weight.data.zero_()
    assert study.backbone.fingerprint == before


def test_early_stopping_holds_images_out_when_all_are_trained_on():
    study = new_study(recipe=replace(RECIPE, epochs=4, patience=1))
    assert set(study.fit(["block1"]).weights) == {"block1", "head"}
    assert 0 <= study.test(["block1"]).mean <= 1


def test_images_that_are_not_square_work():
    task = Task.from_arrays(torch.randint(0, 256, (12, 3, 8, 16), dtype=torch.uint8), [0, 1] * 6)
    study = new_study(task=task)
    square = new_study()
    assert study.parts["flops"].tolist() == [2 * flops for flops in square.parts["flops"]]
    assert len(study.scores([["block1"]])) == 2


# ---------------------------------------------------------------- other images than the test split


def test_other_images_are_scored_by_hand_and_leave_the_test_splits_count_alone():
    task, chain, other = tiny_task(), tiny_chain(), tiny_split(18, seed=8)
    study = new_study(task=task, seeds=(0, 5))
    result = study.accuracy_on(["block3"], other)
    by_hand = [study.fit(["block3"], seed).accuracy(other) for seed in (0, 5)]
    assert result.accuracies == pytest.approx(by_hand)
    assert (result.blocks, result.n_test, result.uses) == (("block3",), 18, 1)
    assert study.accuracy_on(["block1"], tiny_split(18, seed=8)).uses == 2  # equal images are the same images
    assert study.test(["block3"]).uses == 1
    assert chain.fingerprint == tiny_chain().fingerprint


def test_other_images_have_records_of_their_own(monkeypatch):
    study, others = new_study(), [tiny_split(18, seed=8), tiny_split(18, seed=9)]
    scores = [study.accuracy_on([], other).accuracies for other in others] + [study.test([]).accuracies]
    table = study.records.table()
    assert table["key"].nunique() == 3 and table["n_scored"].tolist() == [18, 18, 12]
    assert table["task"].tolist() == ["tiny, scored on other images"] * 2 + ["tiny"]
    monkeypatch.setattr(subtuning_lab.study.runner, "fit_together", None)
    again = [study.accuracy_on([], other).accuracies for other in others] + [study.test([]).accuracies]
    assert again == scores


def test_images_beside_the_test_split_share_its_trainings(monkeypatch):
    study, other = new_study(), tiny_split(18, seed=8)
    study.test(["block2"], also_on=other)
    expected = new_study().accuracy_on(["block2"], other).accuracies
    monkeypatch.setattr(subtuning_lab.study.runner, "fit_together", None)
    assert study.accuracy_on(["block2"], other).accuracies == expected


def test_the_test_split_has_no_other_door():
    task = tiny_task(n_test=20)
    study, test, fresh = new_study(task=task), task.test, tiny_split(27, seed=8)
    mixed = [
        Split(torch.cat([fresh.images, test.images[:n]]), torch.cat([fresh.labels, test.labels[:n]])) for n in (3, 4)
    ]
    for split in (test, test.take(torch.arange(5)), mixed[1]):
        with pytest.raises(ValueError, match="test images of tiny; only Study.test"):
            study.accuracy_on([], split)
        with pytest.raises(ValueError, match="test images of tiny"):
            study.test([], also_on=split)
    assert study.records.test_uses() == 0
    study.accuracy_on([], mixed[0])  # a tenth: what a corruption may leave as it is
    with pytest.raises(ValueError, match=r"\(4, 4\); those of tiny are \(8, 8\)"):
        study.accuracy_on([], tiny_split(side=4))
    with pytest.raises(ValueError, match="label 3 at index 3"):
        study.accuracy_on([], tiny_split(classes=4))


def test_another_pretrained_readout_is_another_score_where_it_is_read():
    """The readout is no part of a backbone's fingerprint."""
    store, networks = Records(":memory:"), [tiny_chain(), tiny_chain()]
    for network, sign in zip(networks, (1, -1), strict=True):
        network.source_head = torch.nn.Linear(6, 3)
        torch.nn.init.constant_(network.source_head.weight, sign)
    recipe = replace(RECIPE, head_start="source")
    studies = [new_study(network, recipe=recipe, records=store) for network in networks]
    losses = [study.scores([[]])["loss"].tolist() for study in studies]
    assert losses[0] != losses[1]
    with_random = [new_study(network, records=store).scores([[]])["loss"].tolist() for network in networks]
    assert with_random[0] == with_random[1] and len(store.table()) == 3 * 2


# ---------------------------------------------------------------- the same study with other arguments


def reachable(thing, seen):
    """Every tensor that can be reached from an object."""
    if id(thing) in seen or isinstance(thing, type | str | bytes | int | float):
        return
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        yield thing
    inside = thing.items() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple | set) else ()
    for inner in [*inside, getattr(thing, "__dict__", None)]:
        if inner is not None:
            yield from reachable(inner, seen)


def test_a_blind_study_holds_no_test_images_and_knows_every_score():
    task = tiny_task(n_test=14)
    study = new_study(task=task, seeds=(0, 1))
    scores, steps = study.scores([["block1"], []]), []
    blind = study.with_(task=replace(task, test=None), progress=lambda *step: steps.append(step))
    assert not any(tensor.shape[:1] == (14,) for tensor in reachable(blind, {}))
    assert any(tensor.shape[:1] == (14,) for tensor in reachable(study, {})), "the walk finds them where they are"
    assert blind.scores([["block1"], []]).equals(scores) and steps == []
    with pytest.raises(ValueError, match="no test split"):
        blind.test([])
    assert blind.with_(task=task).test([]).uses == 1 and study.test([]).uses == 2


def test_a_study_with_other_arguments_is_what_a_new_one_is():
    store = Records(":memory:")
    study = new_study(records=store)
    changes = {"folds": 3, "seeds": (5,), "recipe": replace(RECIPE, image_size=12), "task": tiny_task(seed=4)}
    for name, value in changes.items():
        other, new = study.with_(**{name: value}), new_study(**{name: value})
        assert numbers(other.scores([["block2"]])).equals(numbers(new.scores([["block2"]]))), name
        assert other.records is store and other.parts.equals(new.parts)
    assert (study.n_folds, study.seeds, study.recipes, study.task.name) == (2, (0,), (RECIPE,), "tiny")


def test_every_score_is_looked_up_once(monkeypatch):
    asked = []
    get = Records.get
    monkeypatch.setattr(Records, "get", lambda records, keys: asked.extend(keys) or get(records, keys))
    study = new_study(recipe=[RECIPE, replace(RECIPE, lr=1e-1)], folds=3)
    result = greedy_subtuning(study, -math.inf)
    assert len(asked) == len(set(asked)) == 3 * 2 * len(result.trace)


def test_from_a_profile_to_the_optimizers_step_are_six_calls(monkeypatch):
    depths = []
    real = torch.optim.AdamW.step

    def step(optimizer, *given):
        names = [frame.f_code.co_name for frame in frames() if "subtuning_lab" in frame.f_code.co_filename]
        calls = [name for name in names if name != "checking"]  # what checks arguments around a function
        depths.append(calls.index("finetuning_profile") + 1)
        return real(optimizer, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    finetuning_profile(new_study())
    assert max(depths) <= 6


def frames():
    """Those of the running call, innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


# ---------------------------------------------------------------- recipes chosen on other folds


def test_a_nested_score_is_of_the_recipe_that_is_best_on_the_other_folds():
    recipes = [replace(RECIPE, lr=lr) for lr in (1e-1, 1e-2, 1e-5)]
    study = new_study(recipe=recipes, folds=4, seeds=(0, 1))
    rows, nested = study.all_scores([["block1"]]), study.scores([["block1"]])
    assert nested[["seed", "fold"]].to_numpy().tolist() == [[seed, fold] for seed in (0, 1) for fold in range(4)]
    by_recipe = rows.pivot_table(index=["seed", "fold"], columns="recipe", values="accuracy")
    for row in nested.itertuples():
        others = by_recipe[by_recipe.index.get_level_values("fold") != row.fold].mean().round(12)
        assert row.accuracy == by_recipe.loc[(row.seed, row.fold), others.idxmax()]
        assert row.lr == recipes[others.idxmax()].lr
    best = study.scores([["block1"]], nested=False)["accuracy"].mean()
    assert best == pytest.approx(by_recipe.mean().max())
    one = new_study(recipe=recipes, folds=1)
    assert one.scores([["block1"]]).equals(one.scores([["block1"]], nested=False)), "there are no other folds"


def test_nested_scores_of_chance_are_no_better_than_chance():
    """20 equal recipes: the best on all folds looks better than all are, the one chosen on other folds does not."""
    random, optimistic, honest = np.random.default_rng(0), [], []
    for _ in range(200):
        values = random.normal(0.5, 0.05, size=(20, 5))
        places = pd.MultiIndex.from_product([range(20), range(5)], names=["recipe", "fold"]).to_frame(index=False)
        rows = places.assign(blocks=[("b",)] * 100, seed=0, accuracy=values.ravel())
        optimistic.append(chosen_rows(rows, nested=False)["accuracy"].mean())
        honest.append(chosen_rows(rows)["accuracy"].mean())
    assert np.mean(optimistic) > 0.53 and abs(np.mean(honest) - 0.5) < 0.005


def test_a_recipe_that_diverges_never_counts():
    study = new_study(recipe=[replace(RECIPE, lr=1e30), RECIPE, replace(RECIPE, lr=1e25)])
    subsets = [["block1"], ["block2"], []]
    every = study.all_scores([["block1"]])
    assert every["status"].tolist() == ["diverged"] * 2 + ["ok"] * 2 + ["diverged"] * 2
    for nested in (True, False):
        assert set(study.scores(subsets[:2], nested)["lr"]) == {RECIPE.lr}
    assert study.recipe_of(["block1"]) == RECIPE and study.test(["block1"]).mean >= 0
    profile = finetuning_profile(study.with_(recipe=replace(RECIPE, lr=1e30, head_lr=1e-2)))
    shown = profile.table.set_index("kind")["accuracy"]
    assert shown["blocks"].isna().all() and shown["linear probing"] > 0, "what diverged stands in the table"
    with pytest.raises(ValueError, match="every training of 3 subsets diverged"):
        profile.best()
    greedy = greedy_subtuning(study.with_(recipe=replace(RECIPE, lr=1e30, head_lr=1e-2)), -math.inf)
    assert greedy.blocks == () and greedy.trace["accuracy"].isna().tolist() == [False, True, True, True]


# ---------------------------------------------------------------- what is chosen by


def uneven_task():
    """20 images of class a, 6 of b, 6 of c."""
    everything = tiny_split(60)
    rows = torch.cat([(everything.labels == label).nonzero()[:count, 0] for label, count in enumerate((20, 6, 6))])
    return Task("uneven", ("a", "b", "c"), everything.take(rows), tiny_split(21, seed=3))


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "loss"])
def test_scores_are_scikit_learns(name):
    study = new_study(task=uneven_task(), folds=2, score=name)
    table, task = study.scores([["block2"]]), study.task
    for row, (train, held_out) in zip(table.itertuples(), task.folds(2), strict=True):
        options = {"num_classes": 3, "validation": task.train.take(held_out), "seed": 0}
        (fit,) = fit_together(tiny_chain(), [["block2"]], task.train.take(train), RECIPE, **options)
        tuned = TunedTask(tiny_chain(), fit.blocks, fit.weights, task.classes)
        said, true = tuned.predict(task.train.images[held_out]).double().numpy(), task.train.labels[held_out].numpy()
        expected = {
            "accuracy": metrics.accuracy_score(true, said.argmax(1)),
            "balanced_accuracy": metrics.balanced_accuracy_score(true, said.argmax(1)),
            "loss": metrics.log_loss(true, said / said.sum(1, keepdims=True), labels=[0, 1, 2]),
        }
        assert {key: getattr(row, key) for key in expected} == pytest.approx(expected, abs=1e-5)
        assert row.score == pytest.approx(-expected["loss"] if name == "loss" else expected[name], abs=1e-5)


def test_blocks_and_recipes_are_chosen_by_the_score():
    rows = pd.DataFrame(
        [(("b1",), fold, 0, recipe, [0.9, 0.5][recipe], [0.4, 0.6][recipe]) for recipe in (0, 1) for fold in (0, 1)],
        columns=["blocks", "fold", "seed", "recipe", "accuracy", "score"],
    )
    assert chosen_rows(rows)["accuracy"].tolist() == [0.5, 0.5]
    studies = {name: new_study(task=uneven_task(), score=name, folds=3) for name in ("accuracy", "loss")}
    for name, study in studies.items():
        table = finetuning_profile(study).table
        blocks = table[table["kind"] == "blocks"]
        assert finetuning_profile(study).best() == blocks.loc[blocks["score"].idxmax(), "blocks"]
        trace = greedy_subtuning(study, -math.inf, 1).trace
        assert trace.loc[trace["kept"], "blocks"].iloc[1] == finetuning_profile(study).best(), name
    rules = studies["loss"].scores([[]])
    assert (rules["score"] == -rules["loss"]).all()


def test_what_the_test_says_of_each_class_is_scikit_learns():
    study = new_study(task=uneven_task(), seeds=(0, 1))
    result = study.test(["block2"])
    said = torch.cat([study.fit(["block2"], seed).predict(study.task.test.images).argmax(1) for seed in (0, 1)])
    true = study.task.test.labels.repeat(2)
    assert result.confusion.to_numpy().tolist() == metrics.confusion_matrix(true, said).tolist()
    table = result.per_class()
    assert table["accuracy"].tolist() == pytest.approx(metrics.recall_score(true, said, average=None))
    precision = metrics.precision_score(true, said, average=None, zero_division=np.nan)
    assert table["precision"].tolist() == pytest.approx(precision, nan_ok=True)
    assert table["images"].tolist() == [7, 7, 7] and table.index.tolist() == ["a", "b", "c"]
    assert np.mean(result.balanced_accuracies) == pytest.approx(metrics.balanced_accuracy_score(true, said))
    assert study.test(["block2"]).confusion.equals(result.confusion), "from the records, too"


# ---------------------------------------------------------------- devices, threads, arguments


def test_a_table_says_what_computed_it_and_warns_of_a_mixture(monkeypatch):
    store = Records(":memory:")
    table = new_study(records=store).scores([["block1"]])
    assert set(table["device"]) == {"cpu"} and set(table["threads"]) == {torch.get_num_threads()}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new_study(records=store).scores([["block1"]])
        new_study(records=store).scores([["block2"]])
    with pytest.warns(UserWarning, match="2 on cpu with 7 threads.*rounding"):
        mixed = new_study(records=store).scores([["block1"], ["block2"]])
    assert mixed["threads"].nunique() == 2


def test_apples_device_is_picked_where_it_can_be(monkeypatch):
    tried = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device, dtype: tried.append(device.type))
    assert usable_device(None).type == "mps" and usable_device(None, torch.float64).type == "cpu"
    assert usable_device("cpu").type == "cpu" and tried == ["mps", "cpu", "cpu"]


@pytest.mark.parametrize("device", ["meta", "abacus"])
def test_devices_that_compute_nothing_are_named(device):
    with pytest.raises(ValueError, match="^device is .*must be"):
        new_study(device=device)


def test_numpys_integers_are_integers():
    study = new_study(folds=np.int64(2), seeds=np.array([0, 3]), memory_limit=np.int32(2**30))
    table = study.scores([["block1"]])
    assert table["seed"].tolist() == [0, 0, 3, 3]
    assert new_study(seeds=(0, 3), records=study.records).scores([["block1"]]).equals(table)


def test_images_much_larger_than_the_backbones_are_told_with_their_cost():
    images = torch.zeros(12, 3, 32, 32, dtype=torch.uint8)
    large = Task.from_arrays(images, [0, 1, 2] * 4)
    with pytest.warns(UserWarning, match=r"tiny was made for 8 pixels and gets 32: about 16 times the work"):
        Study(tiny_chain(), large, Recipe(epochs=1), folds=2, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Study(tiny_chain(), large, Recipe(epochs=1, image_size=8), folds=2, progress=False)
