"""What real networks say to the paper's claims: verdicts computed from tables of runs, never written by hand.

A claim is tried in cases, such as one network on one data set at one size. A case speaks for it where the 95 % interval
(Student's t over repetitions) of a difference lies above 0, against it where it lies below, and is undecided else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from scipy import stats

from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is, checked

SHOWN, NOT_SHOWN, MIXED, NOT_TESTED = "shown", "not shown", "mixed", "not tested"
_CASE = ["network", "data", "train_images", "search"]  # what the repetitions of a comparison have in common
_FOLDER = Path("docs", "results")
_CASES = Table(("claim", "notebook", "network", "where", "unit"), ("difference", "low", "high", "n"))
_HEAD = """# What real networks say to the paper's claims

Made by `subtuning-lab verdicts --write docs/verdicts.md` from the tables in [results](results), whose rows name
network, data, seed, machine, commit and command. A case speaks for a claim where the interval of the difference lies
above 0, against it where it lies below; ± is half of the interval: 95 % by Student's t over n repetitions, for rank
correlations 95 % by bootstrap over n blocks, for times the quartiles of n passes of one run. *Not shown*
says that no case decides for the claim, which is no proof of the contrary: three repetitions tell apart differences of
about five points. Differences of accuracies are in points. The notebooks try each claim on small networks, too; what
they show there is not counted here.
"""
_LITTLE = 1020  # training images: the paper's low-data tables have about 1,000


@dataclass(frozen=True)
class Case:
    """One comparison: a difference with its 95 % interval.

    Args:
        network, where: the network, and data with its size.
        difference, low, high: the mean, and the interval's ends.
        n: repetitions, or what else the spread is over.
        unit: "points" of accuracy (differences are given as shares of 1), or what else the figure is in.
    """

    network: str
    where: str
    difference: float
    low: float
    high: float
    n: int
    unit: str = "points"


Judge = Callable[[Path], Iterator[Case]]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, the notebook that tries it, and what tries it on real networks; None: nothing does yet."""

    text: str
    notebook: str
    judge: Judge | None = None


@checked
def claim_cases(folder: Annotated[str | Path | None, Is((str, Path), none=True)] = None) -> pd.DataFrame:
    """What was tried of each claim of the paper on real networks and photographs.

    Args:
        folder: holds the tables of runs; by default docs/results beside the package, or above the working directory.

    Returns:
        One row per case: `claim`, `notebook`, `network`, `where`, `difference` with its interval `low` to `high` (in
        shares of 1 where `unit` is "points"), `n`, `unit`. A claim that nothing was tried of has one row, without
        these.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = _default_folder() if folder is None else Path(folder)
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder or _FOLDER} with tables of runs; name it")
    rows = []
    for claim in CLAIMS:
        cases = [asdict(case) for case in _tried(claim, folder)]
        rows += [{"claim": claim.text, "notebook": claim.notebook} | case for case in cases or [{}]]
    return pd.DataFrame(rows, columns=["claim", "notebook", *(field.name for field in fields(Case))])


@checked
def verdicts(cases: Annotated[pd.DataFrame, _CASES]) -> pd.DataFrame:
    """Every claim with its verdict.

    Args:
        cases: of `claim_cases`.

    Returns:
        One row per claim: `claim`, `verdict`, `speak_for`, `against` and `undecided` (numbers of cases), `networks`,
        `notebook`. The verdict is "not tested" without cases; "shown" where some speak for the claim and none against;
        "mixed" where some do either; else "not shown", which is no proof of the contrary.
    """
    rows = []
    for (claim, notebook), own in cases.groupby(["claim", "notebook"], sort=False):
        tried = own.dropna(subset=["difference"])
        speak_for, against = int((tried["low"] > 0).sum()), int((tried["high"] < 0).sum())
        verdict = MIXED if speak_for and against else SHOWN if speak_for else NOT_SHOWN
        counts = {"speak_for": speak_for, "against": against, "undecided": len(tried) - speak_for - against}
        networks = "; ".join(tried["network"].unique())
        rows.append({"claim": claim, "verdict": verdict if len(tried) else NOT_TESTED, **counts, "networks": networks})
        rows[-1]["notebook"] = notebook
    return pd.DataFrame(rows)


def _tried(claim: Claim, folder: Path) -> list[Case]:
    """The claim's cases; none where its table is not there."""
    try:
        return list(claim.judge(folder)) if claim.judge else []
    except FileNotFoundError:
        return []


def case_of(network: str, where: str, differences: np.ndarray) -> Case:
    """The case of paired differences (n,), one per repetition, n at least 2."""
    values = np.asarray(differences, dtype=float)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return Case(network, where, values.mean(), values.mean() - half, values.mean() + half, len(values))


def case_text(case: Any) -> str:
    """A row of `claim_cases` in words: the difference with half of its interval, and n."""
    times, after = (100, "") if case.unit == "points" else (1, f" {case.unit}")
    half = times * (case.high - case.low) / 2
    return f"{case.where}: {times * case.difference:+.1f} ± {half:.1f}{after} (n = {int(case.n)})"


def _default_folder() -> Path | None:
    places = (Path(__file__).resolve().parents[2], Path.cwd(), *Path.cwd().parents)
    return next((place / _FOLDER for place in places if (place / _FOLDER).is_dir()), None)


def _ahead(method: str, other: str, least: int = 0, most: int = 10**9) -> Judge:
    """Test accuracy of one method less another's, paired by repetition, for training sets within a range."""

    def judge(folder: Path) -> Iterator[Case]:
        table = pd.read_csv(folder / "low_data.csv")
        table = table[table["train_images"].between(least, most)]
        for (network, data, images, search), rows in table.groupby(_CASE, sort=False):
            wide = rows.pivot_table(index="seed", columns="method", values="test_accuracy")
            if {method, other} <= set(wide) and len(wide) > 1:
                where = f"{data}, {images:,} images" + (", full search" if search == "full" else "")
                yield case_of(network, where, (wide[method] - wide[other]).dropna().to_numpy())

    return judge


def _profiles_differ(folder: Path) -> Iterator[Case]:
    """What a task loses if it takes another task's best block; optimistic, since its own best was chosen there."""
    table = pd.read_csv(folder / "profiles.csv")
    table = table[table["kind"] == "blocks"]
    for network, rows in table.groupby("network", sort=False):
        profiles = {data: own.set_index("label") for data, own in rows.groupby("data", sort=False)}
        for data, profile in profiles.items():
            for other in profiles.keys() - {data}:
                here, there = profile["accuracy"].idxmax(), profiles[other]["accuracy"].idxmax()
                pair = profile.loc[[here, there]]
                n = int(pair["n"].min())
                half = stats.t.ppf(0.975, n - 1) * float(np.hypot(*pair["std"])) / n**0.5
                lost = pair["accuracy"].iloc[0] - pair["accuracy"].iloc[1]
                yield Case(network, f"{data} with {other}'s block", lost, lost - half, lost + half, n)


def _stages(kind: str, first: int, other: int) -> Judge:
    """Test accuracy of the blocks of one stage, each tuned alone, less that of another's, paired by repetition."""

    def judge(folder: Path) -> Iterator[Case]:
        table = pd.read_csv(folder / "shift.csv")
        table = table[(table["kind"] == kind) & table["stage"].isin([first, other])]
        for (network, shift, images), rows in table.groupby(["network", "shift", "train_images"], sort=False):
            wide = rows.pivot_table(index="seed", columns="stage", values="test_accuracy")
            where = f"{shift}, {images:,} images, stage {first} less stage {other}"
            yield case_of(network, where, (wide[first] - wide[other]).to_numpy())

    return judge


def _serves_faster(folder: Path) -> Iterator[Case]:
    """Times that a merged network of several tasks is faster than separate ones, less 1; quartiles for an interval."""
    table = pd.read_csv(folder / "latency.csv")
    for row in table[table["tasks"] > 1].itertuples():
        low, high = row.ratio_low - 1, row.ratio_high - 1
        where = f"{row.tasks} tasks, batch {row.batch}, {row.machine.split(',')[0]}"
        yield Case(row.network, where, row.ratio - 1, low, high, row.runs, "times faster than separate, less 1")


def _forgets(folder: Path) -> Iterator[Case]:
    """What full finetuning on a second task takes from the first; merging takes nothing."""
    table = pd.read_csv(folder / "forgetting.csv")
    for row in table[table["method"] == "full finetuning"].itertuples():
        half = stats.t.ppf(0.975, row.folds - 1) * float(np.hypot(row.before_std, row.after_std)) / row.folds**0.5
        lost = row.before - row.after
        yield Case(row.network, f"{row.first}, then {row.second}", lost, lost - half, lost + half, row.folds)


def _ranks_gaps(folder: Path) -> Iterator[Case]:
    """Rank correlation of the bound with the measured gap over blocks, with its bootstrap interval."""
    table = pd.read_csv(folder / "bounds_ranks.csv")
    for row in table[(table["bound"] == "paper") & (table["against"] == "gap")].itertuples():
        network, _, where = row.study.partition(" on ")
        yield Case(network, where, row.spearman, row.low, row.high, row.n, "rank correlation")


CLAIMS = (
    Claim("Which block is best depends on the task", "01_finetuning_profiles", _profiles_differ),
    Claim("The best block beats linear probing", "01_finetuning_profiles", _ahead("best block", "linear probing")),
    Claim(
        "Greedy SubTuning beats full finetuning with little data",
        "04_low_data",
        _ahead("greedy", "full finetuning", most=_LITTLE),
    ),
    Claim("With more data full finetuning wins", "04_low_data", _ahead("full finetuning", "greedy", least=_LITTLE + 1)),
    Claim("Greedy SubTuning beats linear probing", "04_low_data", _ahead("greedy", "linear probing")),
    Claim(
        "It matters which blocks: greedy beats as many random ones",
        "04_low_data",
        _ahead("greedy", "random subset of the same size"),
    ),
    Claim(
        "Freely chosen blocks beat a window of neighbours", "02_greedy_subtuning", _ahead("greedy", "best window")
    ),
    Claim("Greedy SubTuning beats LoRA", "04_low_data", _ahead("greedy", "LoRA")),
    Claim("Greedy SubTuning beats LP-FT", "04_low_data", _ahead("greedy", "LP-FT")),
    Claim("Where the images shift, early blocks beat late ones", "05_distribution_shift", _stages("input", 1, 3)),
    Claim("Where the classes are new, late blocks beat early ones", "05_distribution_shift", _stages("label", 3, 1)),
    Claim("Several merged tasks answer faster than separate networks", "06_multitask_inference", _serves_faster),
    Claim("Full finetuning forgets the first task, merged tasks don't", "06_multitask_inference", _forgets),
    Claim("The bound orders blocks by their generalization gap", "03_why_it_generalizes", _ranks_gaps),
    Claim("A Siamese readout, active learning, pruning and pretrained starts help", "07_ablations"),
)


def verdict_page(cases: pd.DataFrame) -> str:
    """The verdicts as a page in Markdown, with links as of docs/."""
    lines = [_HEAD, "| claim | verdict | for, against, undecided | cases | notebook |", "|---|---|---|---|---|"]
    for row in verdicts(cases).itertuples():
        tried = cases[(cases["claim"] == row.claim)].dropna(subset=["difference"])
        told = "; ".join(map(case_text, tried.itertuples()))
        link = f"[{row.notebook[:2]}](../notebooks/{row.notebook}.ipynb)"
        counts = f"{row.speak_for}, {row.against}, {row.undecided}"
        where = f"{row.networks}: {told}" if told else ""
        lines.append(f"| {row.claim} | **{row.verdict}** | {counts} | {where} | {link} |")
    return "\n".join(lines) + "\n"
