"""The command `bound`: numbers by hand, what is vacuous, errors in one line, and no torch."""

import json
import math
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from subtuning_lab.cli.bound import bound
from subtuning_lab.cli.output import OneLineErrors

APP = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)
APP.callback()(lambda: None)
APP.command()(bound)
SIZES = {"--n": 10_000, "--tuned-params": 400, "--delta": 2.5, "--n-blocks": 9, "--max-blocks": 3}


def call(*flags, **changes):
    options = SIZES | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    words = [str(word) for pair in options.items() for word in pair]
    return CliRunner().invoke(APP, ["bound", *words, *flags])


def answers(**changes):
    answer = call("--json", **changes)
    assert answer.exit_code == 0, answer.output
    tables = json.loads(answer.stdout)
    return {row["bound"]: row for row in tables["bounds"]}, tables["terms"]


def test_the_rates_are_those_of_the_theorem():
    bounds, terms = answers(params=2500, confidence=0.9, full_delta=5)
    few, full = bounds["SubTuning (paper's rate)"], bounds["full finetuning (paper's rate)"]
    rest = math.sqrt(math.log(1 / 0.1) / 20_000)
    assert few["value"] == pytest.approx(20 * 2.5 * math.log(27) / 100 + rest)
    assert full["value"] == pytest.approx(50 * 5 / 100 + rest)
    for row in bounds.values():
        assert math.fsum(t["amount"] for t in terms if t["bound"] == row["bound"]) == pytest.approx(row["value"])
        assert "constant is unknown" in row["assumes"] and row["of"] == "gap" and row["confidence"] == 0.9


def test_full_finetuning_goes_as_far_unless_told_otherwise():
    same, given = (
        answers(params=2500, **more)[0]["full finetuning (paper's rate)"] for more in ({}, {"full_delta": 2.5})
    )
    assert same == given


def test_it_says_vacuous_only_where_it_is():
    bounds, _ = answers(params=160_000, tuned_params=4, training_error=0.1, errors=30, n_test=300)
    says = {name: row["says"] for name, row in bounds.items()}
    assert says.pop("full finetuning (paper's rate)") == "vacuous"
    assert [text.partition(" <= ")[0] for text in says.values()] == ["error", "error"]
    text = call("--params=160000", tuned_params=4).stdout
    assert text.count("vacuous") == 1 and "gap <= " in text and text.count("guarantees nothing") == 2


def test_the_test_set_is_the_yardstick():
    bounds, _ = answers(errors=0, n_test=100)
    assert bounds["test set"]["value"] == pytest.approx(1 - 0.05 ** (1 / 100))  # by hand for no error at all
    assert answers(errors=0)[0]["test set"]["value"] == pytest.approx(1 - 0.05 ** (1 / 10_000))
    assert "test set" not in answers()[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"max_blocks": 10}, "max_blocks is 10; it must be a whole number at least 1 and at most 9"),
        ({"confidence": 1}, "confidence is 1"),
        ({"delta": -1}, "delta is -1"),
        ({"training_error": 1.5}, "empirical_error is 1.5"),
        ({"errors": 11, "n_test": 10}, "errors is 11; it must be a whole number at least 0 and at most 10"),
        ({"full_delta": 3}, "--full-delta is 3.0, which means nothing without --params"),
        ({"n_test": 30}, "--n-test is 30, which means nothing without --errors"),
    ],
)
def test_wrong_input_is_one_line(changes, message):
    answer = call(**changes)
    assert answer.exit_code == 2 and answer.stdout == ""
    assert message in answer.stderr and answer.stderr.count("\n") == 1


def test_it_works_without_torch():
    code = (
        "import sys\n"
        "from subtuning_lab.cli.bound import bound\n"
        "bound(n=1000, tuned_params=10, delta=1.0, n_blocks=9, max_blocks=3, params=100, errors=3)\n"
        "sys.exit('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "price of selection" in answer.stdout and "test set" in answer.stdout
