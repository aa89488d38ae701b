"""What scores are worth, by hand; the prior over searches; and the suggestion within a budget."""

import numpy as np
import pandas as pd
import pytest

import subtuning_lab as lab
from subtuning_lab.criteria.compare import CEILING
from subtuning_lab.criteria.prior import earlier_ranks
from subtuning_lab.study.study import Study
from tests.helpers import tiny_chain, tiny_task

NAMES = ("block1", "block2", "block3")


class Known(Study):
    """A study whose fold scores are given: (folds, blocks)."""

    def __init__(self, folds: np.ndarray):
        self.n_folds, self.given = len(folds), folds

    block_names = NAMES

    def all_scores(self, subsets):
        table = pd.DataFrame(self.given, columns=[(name,) for name in NAMES]).rename_axis("fold")
        rows = table.melt(var_name="blocks", value_name="accuracy", ignore_index=False).reset_index()
        return rows.assign(seed=0, flops=10.0, recipe=0)


def ranked(**ranks: list[int]) -> pd.DataFrame:
    rows = [(name, block, rank, 12.0) for name, own in ranks.items() for block, rank in zip(NAMES, own, strict=True)]
    return pd.DataFrame(rows, columns=["criterion", "block", "rank", "flops"])


def test_correlation_regret_and_share_by_hand():
    folds = np.array([[0.5, 0.6, 0.9], [0.5, 0.8, 0.9]])
    scores = ranked(right=[3, 2, 1], wrong=[1, 2, 3], half=[3, 1, 2])
    table = lab.compare_criteria(Known(folds), scores).set_index("criterion")
    assert table["spearman"].round(6).to_dict() == {"right": 1.0, "wrong": -1.0, "half": 0.5, CEILING: 1.0}
    assert table["regret"].round(6).to_dict() == {"right": 0.0, "wrong": 0.4, "half": 0.2, CEILING: 0.0}
    assert table.loc["half", "block"] == "block2"
    assert table.loc["half", "std"] == pytest.approx(np.std([0.3, 0.1], ddof=1))
    assert table.loc["right", "share"] == pytest.approx(12 / 60) and table["n"].eq(2).all()


def test_the_interval_is_of_the_folds():
    """Where each fold alone would say the opposite, the interval spans both answers."""
    table = lab.compare_criteria(Known(np.array([[0.1, 0.5, 0.9], [0.9, 0.5, 0.2]])), ranked(right=[3, 2, 1])).iloc[0]
    assert table["low"] == pytest.approx(-1) and table["high"] == pytest.approx(1)


def test_one_fold_is_too_few():
    with pytest.raises(ValueError, match="at least 2"):
        lab.compare_criteria(Known(np.ones((1, 3))), ranked(right=[3, 2, 1]))


def records_of(*rows: tuple[str, str, str, float]) -> pd.DataFrame:
    """Rows (backbone, task, block, accuracy)."""
    own = [("fold", task, [block], value, {}, {"backbone": net, "task": task}) for net, task, block, value in rows]
    return pd.DataFrame(own, columns=["split", "task", "blocks", "accuracy", "recipe", "determined_by"])


def test_the_prior_is_the_mean_rank_on_other_tasks():
    values = {"one": [0.5, 0.6, 0.7], "two": [0.9, 0.2, 0.5], "own": [0.0, 1.0, 0.0]}
    rows = [("net", task, name, value) for task, own in values.items() for name, value in zip(NAMES, own, strict=True)]
    rows += [("net", "unfinished", "block1", 1.0), ("other net", "three", "block1", 1.0)]
    table = earlier_ranks(records_of(*rows), NAMES, "net", "own")
    assert table.index.get_level_values("task").tolist() == ["one", "two"]
    assert table.mean().to_dict() == {"block1": 2.0, "block2": 2.5, "block3": 1.5}


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> lab.Records:
    """Records of a profile on one task."""
    records = lab.Records(tmp_path_factory.mktemp("prior") / "lab.sqlite")
    options = {"folds": 2, "device": "cpu", "progress": False, "records": records}
    lab.finetuning_profile(lab.Study(tiny_chain(), tiny_task(seed=5), lab.Recipe(epochs=1), **options))
    return records


def test_the_prior_reads_the_studys_records(searched):
    options = {"folds": 2, "device": "cpu", "progress": False, "records": searched}
    study = lab.Study(tiny_chain(), tiny_task(), lab.Recipe(epochs=1), **options)
    table = lab.score_blocks(study, "prior")
    known = searched.table()
    best = known[known["blocks"].map(len) == 1].assign(block=known["blocks"].str[0]).groupby("block")["accuracy"].mean()
    assert table.set_index("block")["score"].to_dict() == best.rank(ascending=False).to_dict()
    assert table["flops"].eq(0).all()
    same = lab.Study(tiny_chain(), tiny_task(seed=5), lab.Recipe(epochs=1), **options)
    with pytest.raises(ValueError, match="no complete profile of this backbone on another task"):
        lab.score_blocks(same, "prior")


@pytest.mark.parametrize(
    ("plan", "by"), [*[(way, way) for way in ("profile", "race", "race of the better half")], ("score", "parameters")]
)
def test_a_budget_decides_how_blocks_are_chosen(plan, by):
    network, task = tiny_chain(6), tiny_task()
    options = {"unit": "flops", "recipe": lab.Recipe(epochs=40, batch_size=24), "folds": 3, "criterion": "parameters"}
    costs = lab.suggest_blocks(network, task, 1.0, **options).plans.set_index("plan")["flops"]
    assert list(costs.index) == ["profile", "race", "race of the better half", "score"]
    assert costs.is_monotonic_decreasing
    suggestion = lab.suggest_blocks(network, task, max(1.0, costs[plan]), **options)
    assert suggestion.by == by and set(suggestion.blocks) <= set(network.block_names)
    assert suggestion.confidence.split(":")[0] == "low" or by != "parameters"
    assert ("FLOPs" in suggestion.more) == (by != "profile")
    trained = suggestion.table["accuracy"].notna().sum() if by != "parameters" else 0
    assert trained == {"profile": 6, "race": 6, "race of the better half": 3, "parameters": 0}[by]
    if by == "profile":
        best = lab.finetuning_profile(suggestion.study)
        assert suggestion.blocks in (best.best(), ())
