"""The command line: output for people and machines, errors in one line, exit codes."""

import dataclasses
import json
import sqlite3
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import subtuning_lab as lab
from subtuning_lab.cli.main import app
from subtuning_lab.cli.output import tell

QUICK_PROFILE = ["--backbone", "cifar_resnet20", "--weights", "random", "--train-size", "60", "--folds", "2"]
QUICK_PROFILE += ["--epochs", "1", "--batch-size", "30"]


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
        (["reproduce", "--jobs", "0"], "jobs is 0"),
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


def test_backbones_check_says_whether_a_network_is_a_chain():
    facts = json.loads(call("backbones", "--check", "lab-resnet", "--json").stdout)
    assert facts["blocks"][0] == "layer1.0" and facts["sizes"] == [[32, 32], [64, 64]] and facts["gradient"] < 1e-9
    assert "lab-resnet (CifarResNet) works: 9 blocks, layer1.0 to layer3.2, 64 features" in call(
        "backbones", "--check", "lab-resnet"
    ).stdout.replace("\n", " ")


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
    code = "import sys; from subtuning_lab.cli.main import app; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


QUICK_GREEDY = ["--train-size", 40, "--folds", 2, "--epochs", 1, "--batch-size", 30, "--max-blocks", 1]


@pytest.fixture(scope="module")
def tuned_files(tmp_path_factory):
    """Two tuned tasks and an image, made on the command line."""
    folder = tmp_path_factory.mktemp("tuned")
    for task in ("digits", "glyphs"):
        kept = ["--records", folder / "runs.sqlite", "--out", folder / task, "--save", folder / f"{task}.safetensors"]
        told = call("greedy", "--task", task, *QUICK_GREEDY, *kept, "--epsilon", "-inf", "--json")
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout)["files"][-1] == str(folder / f"{task}.safetensors")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(folder / "x.png")
    return folder


def test_greedy_tells_its_trace_and_what_it_chose(tmp_path):
    kept = ["--records", tmp_path / "runs.sqlite", "--out", tmp_path]
    told = json.loads(call("greedy", *QUICK_GREEDY, *kept, "--direction", "both", "--max-blocks", 8, "--json").stdout)
    assert set(told) == {"trace_forward", "trace_backward", "chosen", "files"}
    assert len(told["trace_backward"]) >= 10 and told["trace_forward"][0]["blocks"] == []
    assert [file.rpartition("/")[2] for file in told["files"]] == [
        *("trace_backward.csv", "trace_backward.png", "trace_forward.csv", "trace_forward.png")
    ]
    assert told["chosen"][0]["n"] == 2


@pytest.mark.parametrize("budget", [1, 1e15])
def test_suggest_says_what_to_tune_and_how_sure_that_is(tmp_path, budget):
    plan = ["--criterion", "parameters", "--unit", "flops", "--budget", budget, "--records", tmp_path / "lab.sqlite"]
    told = json.loads(call("suggest", *QUICK_PROFILE, *plan, "--json").stdout)
    (suggestion,) = told["suggestion"]
    assert suggestion["by"] == ("parameters" if budget == 1 else "profile") and len(told["plans"]) == 4
    assert len(told["scores"]) == 9 and suggestion["confidence"].startswith("low") == (budget == 1)
    text = call("suggest", *QUICK_PROFILE, *plan).stdout
    assert f"(by {suggestion['by']})" in text and "a longer search: " in text


@pytest.mark.parametrize("rule", [["--race", "halving"], ["--race", "race"], ["--significance", "0.05"]])
def test_greedy_takes_races_and_a_significance_rule(tmp_path, rule):
    kept = ["--records", tmp_path / "runs.sqlite", "--out", tmp_path]
    told = call("greedy", *QUICK_GREEDY, *kept, *rule, "--json")
    assert told.exit_code == 0, told.output
    assert len(json.loads(told.stdout)["trace_forward"]) == 10


def test_merge_gives_the_answers_of_the_separate_networks(tuned_files):
    files = [tuned_files / "digits.safetensors", tuned_files / "glyphs.safetensors"]
    told = call("merge", *files, "--image", tuned_files / "x.png", "--image", tuned_files / "x.png", "--json")
    answers = json.loads(told.stdout)["answers"]
    assert [row["task"] for row in answers] == ["digits", "glyphs"] * 2 and answers[:2] == answers[2:]
    backbone = lab.load_backbone("lab-resnet")
    for row, file in zip(answers, files, strict=False):
        tuned = lab.load_tuned(file, backbone)
        with torch.no_grad():
            shares = tuned.network()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).softmax(1)[0]
        assert row["answer"] == tuned.classes[shares.argmax()]
        assert row["probability"] == pytest.approx(shares.max().item(), rel=1e-4)


def test_merge_brings_images_to_the_size_that_the_tasks_were_tuned_at(tuned_files, tmp_path):
    tuned = lab.load_tuned(tuned_files / "digits.safetensors", lab.load_backbone("lab-resnet"))
    assert tuned.pixels == (32, 32)
    small = dataclasses.replace(tuned, provenance=tuned.provenance | {"pixels": [16, 24]})
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    told = call("merge", small.save(tmp_path / "small.safetensors"), "--image", tmp_path / "x.png", "--json")
    (row,) = json.loads(told.stdout)["answers"]
    shares = tuned.predict(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    assert row["probability"] == pytest.approx(shares.max().item(), rel=1e-4)


def test_merge_tells_what_is_wrong_with_its_files(tuned_files):
    file, image = tuned_files / "digits.safetensors", ["--image", tuned_files / "x.png"]
    for arguments, message in (
        ([file, file, *image], "two files are named digits"),
        ([tuned_files / "none.safetensors", *image], "no tuned task at"),
        ([file, "--image", tuned_files / "none.png"], "image file not found"),
        ([tuned_files / "x.png", *image], "is not a readable .safetensors file"),
        ([file, *image, "--backbone", "lab-vit"], "was tuned from lab-resnet"),
    ):
        told = call("merge", *arguments)
        assert told.exit_code == 2 and message in " ".join(told.stderr.split()), told.output


def test_the_version_is_told_without_torch():
    code = "import sys; from subtuning_lab.cli.main import app; app(['--version'], standalone_mode=False)"
    told = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert told.stdout == f"subtuning-lab {lab.__version__}\nFalse\n"


def test_options_of_a_model_are_read_as_python_and_toml_write_them(monkeypatch):
    seen = {}
    monkeypatch.setattr(lab, "load_backbone", lambda name, **options: seen.update(options) or sys.exit(7))
    words = "class_token=False dynamic_img_size=true img_size=(96,96) drop_rate=0.1 pos_embed=None act_layer=gelu"
    call("profile", "--weights=~/x.safetensors", *(f"--model-option={word}" for word in words.split()))
    assert not seen["weights"].startswith("~") and seen["weights"].endswith("/x.safetensors")
    del seen["weights"], seen["drop_blocks"]
    assert seen == {
        **{"class_token": False, "dynamic_img_size": True, "img_size": (96, 96)},
        **{"drop_rate": 0.1, "pos_embed": None, "act_layer": "gelu"},
    }


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path / "none.sqlite") in "".join(call("records", "~/none.sqlite").stderr.splitlines())
    kept = ["--records=~/runs.sqlite", "--out=~/out", "--save=~/tuned.safetensors"]
    told = call("greedy", *QUICK_GREEDY, *kept, "--json")
    assert told.exit_code == 0, told.output
    assert {"runs.sqlite", "out", "tuned.safetensors"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save", "mytask"], "a tuned task is a .safetensors file"),
        (["--save", "file/x.safetensors"], "file is no folder"),
        (["--save", "folder.safetensors"], "it is a folder"),
        (["--save", "/proc/x.safetensors"], "nothing can be made in /proc"),
        (["--out", "file/out"], "file is no folder"),
        (["--out", "file"], "file is no folder"),
        (["--records", "file/lab.sqlite"], "file"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.safetensors").mkdir()
    monkeypatch.setattr(lab, "greedy_subtuning", lambda *args, **more: pytest.fail("worked before it looked"))
    told = call("greedy", *QUICK_GREEDY, *options)
    assert told.exit_code == 2 and told.stderr.startswith("error: ") and message in told.stderr, told.output


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), PermissionError(13, "no"), OSError()])
def test_errors_of_files_and_stores_are_one_line(monkeypatch, tmp_path, error):
    def refuse(path):
        raise error

    monkeypatch.setattr(lab, "Records", refuse)
    (tmp_path / "lab.sqlite").write_bytes(b"")
    told = call("records", tmp_path / "lab.sqlite")
    assert told.exit_code == 2 and len(told.stderr.splitlines()) == 1 and told.stderr.startswith("error: ")


def test_names_cannot_steer_the_terminal(capsys):
    evil = "cat\x1b[2J\x9b31m"
    tell({"answers": pd.DataFrame({"answer": [evil]})}, False)
    assert "cat\\x1b[2J\\x9b31m" in capsys.readouterr().out
    told = call("records", f"{evil}.sqlite")
    assert "\x1b" not in told.stderr and "\\x1b[2J" in told.stderr


def test_verdicts_are_told_and_written(tmp_path):
    page = tmp_path / "verdicts.md"
    run = CliRunner().invoke(app, ["verdicts", "--write", str(page), "--json"])
    assert run.exit_code == 0, run.output
    told = {row["claim"]: row["verdict"] for row in json.loads(run.stdout)["verdicts"]}
    assert all(f"| {claim} | **{verdict}** |" in page.read_text() for claim, verdict in told.items()) and len(told) > 9
