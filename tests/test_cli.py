"""The command line: output for people and machines, errors in one line, exit codes."""

import json
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

from subtuning_lab.cli import app

QUICK_PROFILE = [
    "--backbone",
    "cifar_resnet20",
    "--weights",
    "random",
    "--train-size",
    "60",
    "--folds",
    "2",
    "--epochs",
    "1",
    "--batch-size",
    "30",
]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def notebooks(tmp_path):
    """A folder with one good and one failing notebook."""
    for stem, code in (("01_good", "print(steps)"), ("02_bad", "raise RuntimeError('lost')")):
        cells = [nbformat.v4.new_code_cell("steps: int = 1"), nbformat.v4.new_code_cell(code)]
        cells[0].metadata["tags"] = ["parameters"]
        page = nbformat.v4.new_notebook(cells=cells)
        page.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(page, tmp_path / f"{stem}.ipynb")
    (tmp_path / "presets.toml").write_text("[quick]\n[other]\n")
    return tmp_path


def test_reproduce_ends_with_the_report_and_fails_if_a_section_fails(notebooks):
    paths = ["--notebooks", notebooks, "--results", notebooks / "out"]
    good = call("reproduce", "good", "-p", "steps=41", *paths)
    report = notebooks / "out" / "quick" / "report.html"
    assert good.exit_code == 0 and good.stdout.splitlines()[-1] == str(report) and report.exists()
    assert "41" in (notebooks / "out" / "quick" / "01_good.ipynb").read_text()
    both = call("reproduce", "--json", "-p", "steps=41", *paths)
    assert both.exit_code == 1
    told = json.loads(both.stdout)
    assert [(run["name"], run["state"]) for run in told["sections"]] == [("01_good", "skipped"), ("02_bad", "failed")]
    assert told["report"] == str(report) and "RuntimeError: lost" in told["sections"][1]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "99"], "unknown section '99'; there are: 01_good, 02_bad"),
        (["reproduce", "--preset", "mine"], "unknown preset 'mine'"),
        (["reproduce", "-p", "stepz=1"], "no parameter 'stepz'"),
        (["reproduce", "-p", "steps=many"], "steps must be int, not 'many'"),
        (["reproduce", "-p", "steps"], "name=value"),
        (["reproduce", "--jobs", "0"], "jobs must be"),
        (["records", "no.sqlite"], "no run store no.sqlite"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(notebooks, arguments, message):
    places = ["--notebooks", notebooks, "--results", notebooks / "out"] if arguments[0] == "reproduce" else []
    told = call(*arguments, *places)
    assert told.exit_code == 2 and told.stdout == ""
    assert told.stderr.startswith("error: ") and message in told.stderr and len(told.stderr.splitlines()) == 1
    assert not (notebooks / "out").exists()


def test_debug_shows_the_error_itself(notebooks):
    told = call("--debug", "records", notebooks / "no.sqlite")
    assert isinstance(told.exception, FileNotFoundError)


@pytest.mark.parametrize("command", ["backbones", "tasks"])
def test_names_are_listed_for_people_and_machines(command):
    names = json.loads(call(command, "--json").stdout)
    assert {"backbones": "lab-resnet", "tasks": "digits"}[command] in names
    lines = call(command).stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(names)
    assert all(description for description in names.values())


def test_profile_prints_its_table_and_writes_csv_and_figure(tmp_path):
    store, out = tmp_path / "runs" / "lab.sqlite", tmp_path / "out"
    options = [*QUICK_PROFILE, "--records", store, "--out", out]
    first = call("profile", *options)
    assert first.exit_code == 0, first.stderr
    assert [line for line in first.stdout.splitlines() if line.startswith("/")] == [
        str(out / "profile.csv"),
        str(out / "profile.png"),
    ]
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG")
    again = json.loads(call("profile", *options, "--json").stdout)
    written = pd.read_csv(out / "profile.csv")
    assert written.accuracy.tolist() == pytest.approx([row["accuracy"] for row in again["profile"]])
    assert len(written) == 9 + 2 and {"linear probing", "full finetuning"} <= set(written.label)
    scores = json.loads(call("records", store, "--json").stdout)["records"]
    assert len(scores) == 2 * len(written)
    told = call("records", store).stdout
    assert "cifar_resnet20" in told and "determined_by" not in told


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--backbone", "resnet_none"),
        ("--task", "no-such-task"),
        ("--task", "folder:no/such/folder"),
        ("--weights", "missing.safetensors"),
        ("--bn", "maybe"),
        ("--epochs", 0),
        ("--lr", -1),
        ("--seeds", 0),
        ("--folds", 0),
        ("--window", 99),
    ],
)
def test_a_wrong_profile_leaves_nothing(tmp_path, option, value):
    places = ["--records", tmp_path / "lab.sqlite", "--out", tmp_path / "out"]
    told = call("profile", *QUICK_PROFILE, *places, option, value)
    assert told.exit_code == 2 and told.stderr.count("error: ") == 1 and "Traceback" not in told.stderr, told.stderr
    assert str(value).removeprefix("folder:") in told.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch():
    code = "import sys; from subtuning_lab.cli import app; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"
