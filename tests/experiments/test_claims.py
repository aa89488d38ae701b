"""Verdicts follow from cases, cases from tables by Student's t, and what ships says what the page says."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from subtuning_lab.experiments.claims import CLAIMS, case_of, claim_cases, verdict_page, verdicts
from tests.project.test_project import ROOT

COLUMNS = {"claim": "c", "notebook": "04_low_data", "network": "net", "where": "here", "unit": "points"}


def cases(*intervals: tuple[float, float]) -> pd.DataFrame:
    return pd.DataFrame([COLUMNS | {"difference": sum(i) / 2, "low": i[0], "high": i[1], "n": 3} for i in intervals])


@pytest.mark.parametrize(
    "intervals, verdict, counts",
    [
        ([(0.01, 0.02), (-0.1, 0.3)], "shown", (1, 0, 1)),
        ([(0.01, 0.02), (-0.3, -0.1)], "mixed", (1, 1, 0)),
        ([(-0.01, 0.02)], "not shown", (0, 0, 1)),
        ([(-0.3, -0.1)], "not shown", (0, 1, 0)),
        ([(np.nan, np.nan)], "not tested", (0, 0, 0)),
    ],
)
def test_verdicts(intervals, verdict, counts):
    (row,) = verdicts(cases(*intervals)).itertuples()
    assert (row.verdict, (row.speak_for, row.against, row.undecided)) == (verdict, counts)


def test_a_case_has_scipys_interval():
    differences = np.array([0.01, 0.03, 0.02, -0.01])
    case = case_of("net", "here", differences)
    wanted = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (case.low, case.high) == pytest.approx((wanted.low, wanted.high)) and case.n == 4


def test_planted_results_give_planted_verdicts(tmp_path):
    """Greedy ahead of full finetuning in every repetition with few images, and behind with many."""
    for path in (ROOT / "docs" / "results").glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    what = {"network": "planted", "data": "d", "search": "full"}
    rows = [
        what | {"train_images": n, "seed": seed, "method": method, "test_accuracy": 0.5 + 0.01 * seed + ahead}
        for n, lead in ((100, 0.1), (5000, -0.1))
        for seed in range(3)
        for method, ahead in (("greedy", lead + 0.001 * seed), ("full finetuning", 0.0))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "low_data.csv", index=False)
    told = verdicts(claim_cases(tmp_path)).set_index("claim")["verdict"]
    assert told["Greedy SubTuning beats full finetuning with little data"] == "shown"
    assert told["With more data full finetuning wins"] == "shown"
    assert told["Greedy SubTuning beats LoRA"] == "not tested"


def test_the_shipped_page_is_what_the_tables_say():
    """Else run `subtuning-lab verdicts --write docs/verdicts.md`."""
    shipped = claim_cases(ROOT / "docs" / "results")
    assert (ROOT / "docs" / "verdicts.md").read_text() == verdict_page(shipped)
    assert [claim.text for claim in CLAIMS] == verdicts(shipped)["claim"].tolist()


def test_the_first_page_quotes_verdicts_of_today():
    quoted = dict(re.findall(r"^  - (.+): \*(.+)\*$", (ROOT / "README.md").read_text(), re.MULTILINE))
    told = verdicts(claim_cases(ROOT / "docs" / "results")).set_index("claim")["verdict"]
    assert len(quoted) == 5 and quoted == told[[*quoted]].to_dict()


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.csv")), ids=lambda path: path.stem)
def test_no_place_of_a_machine_is_shipped(path):
    text = path.read_text()
    assert "/work" not in text and "/tmp" not in text and "/home" not in text


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        claim_cases(tmp_path / "nowhere")
