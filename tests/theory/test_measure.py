"""Does a bound rank blocks: one row by hand, the door to the test images, rank correlations against scipy."""

import copy
import math
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from subtuning_lab import Bound, Recipe, Study, linearization_gap
from subtuning_lab.theory.measure import BOUNDS, RADII, measure_bounds, rank_correlations
from subtuning_lab.theory.weight_noise import noisy_bound, readout_start
from tests.helpers import tiny_chain, tiny_task

RECIPE = Recipe(epochs=3, batch_size=12, lr=1e-2, head_lr=3e-2, bn="frozen")
SUBSETS = {"linear probing": [], "second": ["block2"], "two": ["block3", "stem"], "full finetuning": "all"}
QUICK = {"posteriors": 60, "sigmas": (0.05, 0.2)}
FACTS = ["study", "label", "blocks", "n", "params", "delta", "head_delta", "feature_norm", "train_accuracy"]
FACTS += ["accuracy", "std", "n_scores", "gap", "linearization_error", "kl"]


def make_study(recipe=RECIPE, n=48, **options):
    return Study(tiny_chain(), tiny_task(n), recipe, folds=2, seeds=(0, 1), device="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def study():
    return make_study()


@pytest.fixture(scope="module")
def table(study):
    return measure_bounds(study, SUBSETS, **QUICK)


def row_of(table, label):
    return table.set_index("label").loc[label]


def test_columns_and_rows_are_in_order(study, table):
    gaps = [f"{name}_gap" for name in BOUNDS]
    assert list(table) == [*FACTS, *BOUNDS, *gaps, "bounds"]
    assert list(table["label"]) == list(SUBSETS) and list(table["blocks"])[1:3] == [("block2",), ("stem", "block3")]
    assert table["study"].eq(study.title).all() and table["n"].eq(48).all() and table["n_scores"].eq(4).all()
    for _, row in table.iterrows():
        for name, bound in row["bounds"].items():
            assert isinstance(bound, Bound) and bound.value == row[name] and bound.confidence == 0.95
            assert row[f"{name}_gap"] == pytest.approx(math.fsum(bound.terms.values()) - bound.terms["empirical error"])


def squared_jacobian(chain, head, images, parameters):
    """Mean over images of the squared norm of d logits / d parameters, one backward per image and logit."""
    total = 0.0
    for image in images:
        for logit in head(chain(chain.normalize(image[None])))[0]:
            gradients = torch.autograd.grad(logit, parameters, retain_graph=True)
            total += sum(float(gradient.square().sum()) for gradient in gradients)
    return total / len(images)


def test_one_row_by_hand(study, table):
    row, train = row_of(table, "second"), study.task.train
    tuned = study.fit(["block2"])
    start = readout_start(tuned)
    before, after = dict(study.backbone.part("block2").named_parameters()), tuned.weights["block2"]
    delta = math.sqrt(sum(float((after[key] - p).square().sum()) for key, p in before.items()))
    head_delta = math.sqrt(sum(float((tuned.weights["head"][key] - p).square().sum()) for key, p in start.items()))
    assert row["delta"] == pytest.approx(delta, rel=1e-5) and row["head_delta"] == pytest.approx(head_delta, rel=1e-5)
    assert row["params"] == 6 * 6 * 9 + 12
    with torch.no_grad():
        hits = (tuned.network()(train.images).argmax(1) == train.labels).double().mean()
    scores = study.scores([["block2"]])["accuracy"]
    assert row["train_accuracy"] == pytest.approx(float(hits)) and row["accuracy"] == pytest.approx(scores.mean())
    assert row["std"] == pytest.approx(scores.std())
    chain, head = copy.deepcopy(study.backbone).eval(), torch.nn.Linear(6, 3)
    head.load_state_dict(start)
    parameters = [*chain.part("block2").requires_grad_().parameters(), *head.parameters()]
    norm = math.sqrt(squared_jacobian(chain, head, train.images, parameters))
    assert row["feature_norm"] == pytest.approx(norm, rel=1e-4)
    gap = linearization_gap(tuned, train.images, [1.0], head_start=start)
    assert row["linearization_error"] == pytest.approx(gap["error"].item(), rel=1e-4)
    paper = 1 - float(hits) + delta * math.sqrt(336 / 48) * math.log(5) + math.sqrt(math.log(20) / 96)
    assert row["paper"] == pytest.approx(paper, rel=1e-5)
    radius = min(own for own in RADII if own >= math.hypot(delta, head_delta))
    price = math.log(2 / 0.05) + math.log(len(RADII))
    assert row["rademacher_gap"] == pytest.approx(
        4 * radius * norm / math.sqrt(48) + 3 * math.sqrt(price / 96), rel=1e-4
    )
    noisy = noisy_bound(tuned, train, start, **QUICK)
    assert row["pac_bayes"] == noisy.value and row["kl"] == noisy.inputs["KL"]


def test_the_gap_is_that_of_one_network(study, table):
    """Each fold's own training images are a task of their own, and its fit is scored on both sides."""
    gaps = []
    for train, held_out in (map(study.task.train.take, rows) for rows in study.task.folds(2)):
        part = replace(study.task, train=train, test=None)
        tuned = Study(tiny_chain(), part, RECIPE, folds=2, device="cpu", progress=False).fit(["block2"])
        gaps.append(tuned.accuracy(train) - tuned.accuracy(held_out))
    assert row_of(table, "second")["gap"] == pytest.approx(np.mean(gaps), abs=1e-9)
    first = study.scores([["block2"]]).query("seed == 0")["accuracy"]
    everything = row_of(table, "second")["train_accuracy"]
    assert row_of(table, "second")["gap"] != pytest.approx(everything - first.mean())  # other networks, another number


def test_the_rademacher_bound_counts_the_linearized_networks_errors(study, table):
    """By a finite difference: f(x) + (f at theta + h w - f at theta) / h, its ramp loss with margin 1."""
    row, train, tuned = row_of(table, "second"), study.task.train, study.fit(["block2"])
    start, network = readout_start(tuned), tuned.network().double()
    ends = {"backbone.blocks.1." + key: p for key, p in tuned.weights["block2"].items()}
    ends |= {f"head.{key}": p for key, p in tuned.weights["head"].items()}
    starts = {f"backbone.{key}": p for key, p in study.backbone.named_parameters()}
    starts |= {f"head.{key}": p for key, p in start.items()}

    @torch.no_grad()
    def logits(t):
        for key, parameter in network.named_parameters():
            if key in ends and key in starts:
                parameter.copy_(starts[key].double() + t * (ends[key].double() - starts[key].double()))
        return network(train.images)

    straight = logits(0) + (logits(1e-5) - logits(-1e-5)) / 2e-5
    right = straight.gather(1, train.labels[:, None])[:, 0]
    others = straight.scatter(1, train.labels[:, None], -math.inf).amax(1)
    ramp = (1 - (right - others)).clamp(0, 1).mean()
    assert row["bounds"]["rademacher"].terms["empirical error"] == pytest.approx(float(ramp), abs=1e-4)
    assert 0 < float(ramp) < 1


def test_linear_probing_and_full_finetuning(table):
    probing, full = row_of(table, "linear probing"), row_of(table, "full finetuning")
    assert probing["params"] == probing["delta"] == 0 and probing["linearization_error"] < 1e-4
    assert probing["bounds"]["paper"].terms["complexity"] == 0
    assert full["delta"] > row_of(table, "two")["delta"] > 0 and full["feature_norm"] > probing["feature_norm"]
    assert full["bounds"]["paper"].name.startswith("full finetuning") and set(full["blocks"]) > {"stem", "tail"}


def test_prices_and_margins_are_passed_on(study, table):
    paid = measure_bounds(study, {"second": ["block2"]}, **QUICK, price={"second": 3.0}, margins=(0.5, 2.0))
    row, before = paid.iloc[0], row_of(table, "second")
    assert row["bounds"]["rademacher"].inputs["margin"] in (0.5, 2.0)
    assert all(row["bounds"][name].inputs["price"] == 3.0 for name in ("rademacher", "pac_bayes"))
    assert row["pac_bayes"] >= before["pac_bayes"] and row["paper"] == before["paper"]
    single = measure_bounds(study, {"second": ["block2"]}, **QUICK, price=3.0, n_jacobian=5)
    assert single["pac_bayes"].item() == row["pac_bayes"] and single["feature_norm"].item() != row["feature_norm"]


def test_the_test_split_is_used_only_when_asked(study, monkeypatch):
    blind = make_study()
    blind.task = replace(blind.task, test=None)  # nothing of it could be read
    monkeypatch.setattr(Study, "test", lambda *_: pytest.fail("the test split was used"))
    quiet = measure_bounds(blind, {"second": ["block2"]}, **QUICK, half_prior=True)
    assert "test_set" not in quiet and quiet["half_prior"].item() == quiet["bounds"].item()["half_prior"].value
    monkeypatch.undo()
    open_study = make_study()
    row = measure_bounds(open_study, {"second": ["block2"]}, **QUICK, test=True).iloc[0]
    result = open_study.test(["block2"])
    assert result.uses == 2 and row["test_accuracy"] == result.accuracies[0]
    errors = round((1 - result.accuracies[0]) * 12)
    assert row["test_set"] == pytest.approx(stats.beta.ppf(0.95, errors + 1, 12 - errors) if errors < 12 else 1.0)


BAD = {
    "unknown block": ({"subsets": {"a": ["block9"]}}, ValueError, "no block block9"),
    "unknown label": ({"price": {"b": 1.0}}, ValueError, "price has 'b'; the labels are a"),
    "too many images": ({"n_jacobian": 49}, ValueError, "n_jacobian"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(study, monkeypatch, change, error, message):
    arguments = {"subsets": {"a": []}, **QUICK, **change}
    monkeypatch.setattr(Study, "fit", lambda *_: pytest.fail("something was trained"))
    with pytest.raises(error, match=message):
        measure_bounds(study, **arguments)


@pytest.mark.parametrize(
    ("recipe", "message"), [(replace(RECIPE, bn="batch"), "bn="), (replace(RECIPE, siamese=True), "Siamese")]
)
def test_recipes_without_a_bound_are_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        measure_bounds(make_study(recipe), {"a": []}, **QUICK)


@pytest.mark.parametrize(
    ("source", "warned"), [("cifar10/train", True), ("cifar10", True), ("cifar10/test", False), (None, False)]
)
def test_images_of_the_pretraining_are_warned_of(source, warned):
    """A prior that knows the sample makes every bound too small."""
    chain = tiny_chain()
    chain.name, chain.source_head = "cifar_resnet20", nn.Linear(6, 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Study(chain, replace(tiny_task(48), source=source), RECIPE, folds=2, progress=False)
    told = [str(own.message) for own in caught if "pretrained on cifar10/train" in str(own.message)]
    assert len(told) == warned and all("bounds don't hold" in text for text in told)


# ---- rank correlations ---------------------------------------------------------------------------------------------


def made_table(n=9, study="one", seed=0, **columns):
    """Single blocks with columns at random, unless they are given."""
    random = np.random.default_rng(seed)
    names = ("params", "gap", "accuracy", *BOUNDS)
    values = {name: columns.get(name, random.normal(size=n)) for name in names}
    values |= {name: column for name, column in columns.items() if name not in names}
    return pd.DataFrame({"study": study, "label": range(n), "blocks": [(f"block{i}",) for i in range(n)], **values})


def test_correlations_are_scipys():
    table = made_table(gap=np.array([1, 1, 2, 3, 3, 3, 4, 5, 0.0]))
    found = rank_correlations(table).set_index(["bound", "against"])
    for bound, against in [("paper", "gap"), ("rademacher", "accuracy"), ("pac_bayes", "params"), ("params", "gap")]:
        row = found.loc[(bound, against)]
        assert row["spearman"] == pytest.approx(stats.spearmanr(table[bound], table[against]).statistic)
        assert row["kendall"] == pytest.approx(stats.kendalltau(table[bound], table[against]).statistic)
        assert -1 <= row["low"] <= row["spearman"] <= row["high"] <= 1 and row["n"] == 9
    assert len(found) == 3 * 3 + 2 and ("params", "params") not in found.index
    again = rank_correlations(table).set_index(["bound", "against"])
    pd.testing.assert_frame_equal(found, again)


def test_a_known_order_and_the_bound_that_only_counts_parameters():
    truth = np.array([0.1, 0.4, 0.2, 0.9, 0.6])
    params = np.array([5, 1, 4, 2, 3])
    table = made_table(5, params=params, gap=truth, accuracy=-truth, rademacher=truth**3, paper=params * 10.0)
    found = rank_correlations(table).set_index(["bound", "against"])["spearman"]
    assert found["rademacher", "gap"] == pytest.approx(1) and found["rademacher", "accuracy"] == pytest.approx(-1)
    assert found["paper", "params"] == pytest.approx(1) and found["paper", "gap"] == pytest.approx(
        found["params", "gap"]
    )
    assert found["paper", "gap"] < 0 < found["paper", "accuracy"]


def test_the_gap_is_compared_with_the_bound_of_the_gap():
    table = made_table()
    table["paper_gap"] = table["gap"]
    found = rank_correlations(table, ("paper",)).set_index(["bound", "against"])["spearman"]
    assert found["paper", "gap"] == pytest.approx(1)
    assert found["paper", "accuracy"] == pytest.approx(stats.spearmanr(table["paper"], table["accuracy"]).statistic)


def test_studies_are_ranked_one_by_one_and_averaged():
    one, two = made_table(), made_table(7, "two", seed=1)
    two[["gap", "paper"]] += 1000  # other levels, which would make any two columns agree when they are pooled
    found = rank_correlations(pd.concat([one, two]), ("paper",), ("gap",)).set_index(["study", "bound", "against"])
    rhos = [stats.spearmanr(own["paper"], own["gap"]).statistic for own in (one, two)]
    row = found.loc[("all", "paper", "gap")]
    assert row["spearman"] == pytest.approx(np.mean(rhos)) and row["n"] == 16
    assert found.index.get_level_values("study").unique().tolist() == ["one", "two", "all"]


def test_intervals_hold_the_truth_about_as_often_as_promised():
    random, held, truth = np.random.default_rng(2), 0, 6 / math.pi * math.asin(0.7 / 2)  # Spearman's rho of a Gaussian
    for _ in range(60):
        x = random.normal(size=60)
        y = 0.7 * x + math.sqrt(1 - 0.49) * random.normal(size=60)
        row = rank_correlations(made_table(60, paper=x, gap=y), ("paper",), ("gap",), resamples=300).iloc[0]
        held += row["low"] <= truth <= row["high"]
    assert held / 60 > 0.85 and stats.binomtest(held, 60, 0.95, alternative="less").pvalue > 0.001


@pytest.mark.parametrize("change", [{"pac_bayes": np.ones(9)}, {"pac_bayes": np.array([np.nan] + [1.0, 2] * 4)}])
def test_what_has_no_order_has_no_correlation(change):
    found = rank_correlations(made_table(**change)).set_index(["bound", "against"])
    assert found.loc["pac_bayes"][["spearman", "low", "high"]].isna().to_numpy().all()
    assert found.loc["paper", "spearman"].notna().all()
    assert rank_correlations(made_table(2))["spearman"].isna().all()


def test_single_blocks_are_chosen():
    table = pd.concat([made_table(), made_table(1, params=[10**9]).assign(blocks=[("block1", "block2")])])
    assert rank_correlations(table)["n"].eq(9).all() and rank_correlations(table, single=False)["n"].eq(10).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bounds": ["best"]}, "the table has no 'best'"),
        ({"against": ["luck"]}, "the table has no 'luck'"),
        ({"table": made_table().assign(blocks=[("a", "b")] * 9)}, "no such rows"),
    ],
)
def test_bad_tables_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rank_correlations(**{"table": made_table()} | change)
