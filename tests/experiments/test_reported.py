"""The reported numbers: complete sources, plausible ranges, and no invented values."""

import math

import pytest

from subtuning_lab.experiments.reported import official_recipe, reported

SECTIONS = ("finetuning_profiles", "low_data", "distribution_shift")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_has_a_source_and_is_a_share(section):
    table = reported(section)
    assert table.source.str.len().gt(5).all()
    known = table.accuracy.dropna()
    assert known.between(0.2, 1).all() and len(known) >= 2
    assert not table.duplicated(subset=[column for column in table if column not in ("accuracy", "source")]).any()


def test_known_facts():
    profile = reported("finetuning_profiles").set_index("subset").accuracy
    assert profile["B1"] == 0.94 and profile["B14"] == 0.955 and math.isnan(profile["B2 + B14 (best pair)"])
    vtab = reported("low_data").set_index(["method", "backbone", "task"]).accuracy
    assert vtab["LoRA", "ViT-B/16", "DMLab"] == 0.498 and vtab["full finetuning", "ResNet-50", "Caltech101"] == 0.91
    shift = reported("distribution_shift").set_index(["n_train", "tuned"]).accuracy
    assert shift[1000, "first stage"] < shift[1000, "all stages"]
    assert shift[3000, "first stage"] > shift[3000, "all stages"]


def test_the_papers_own_low_data_table_is_left_blank():
    table = reported("low_data")
    assert table[table.method == "SubTuning"].accuracy.isna().all() and "SubTuning" in set(table.method)


def test_official_recipes():
    profile = official_recipe("resnet50_profile")
    assert (profile["lr"], profile["weight_decay"], profile["epochs"], profile["repeats"]) == (1e-3, 1e-2, 20, 5)
    assert (profile["batch_size"], profile["precision"]) == (256, "fp16")
    assert official_recipe("vit_b16")["precision"] == "fp32"
    assert "epochs" not in official_recipe("resnet50_full_finetuning_older")
    assert "lr" not in official_recipe("latency")


def test_a_caller_cannot_change_the_facts():
    official_recipe("latency")["batch_size"] = 64
    table = reported("low_data")
    table["accuracy"] = 1.0
    assert official_recipe("latency")["batch_size"] == 1 and reported("low_data").accuracy.lt(1).any()
