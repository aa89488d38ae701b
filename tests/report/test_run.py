"""The batch runner, on tiny notebooks that the tests write."""

import json
import os
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from subtuning_lab.report.presets import check_parameters, declared_parameters, parse_parameter, settle_parameters
from subtuning_lab.report.run import kernel_environment, reproduce, select_sections

RECORD = """
import json, pathlib
pathlib.Path(results, "01_good.json").write_text(json.dumps({
    "section": "01_good", "title": "Good", "question": "?", "figure": "01_good.png", "n": 1, "machine": "m",
    "table": {"columns": ["steps"], "rows": [[steps]]}, "paper": None, "notes": []}))
pathlib.Path(results, "01_good.png").write_bytes(b"\\x89PNG")
"""
PARAMETERS = "steps: int = 1  # how many\nrate: float = 0.5\nname: str = 'a'\nfast: bool = True\nresults: str = 'r'"
PRESETS = "[quick]\n[quick.01_good]\nsteps = 2\n[long.01_good]\nsteps = 9\n"


def write_notebook(folder, stem, code, parameters=PARAMETERS, tag="parameters"):
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, code)]
    cells[0].metadata["tags"] = [tag]
    page = nbformat.v4.new_notebook(cells=cells)
    page.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(page, folder / f"{stem}.ipynb")


@pytest.fixture
def lab(tmp_path):
    """A folder of notebooks, and the call that runs them into a folder of results."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "presets.toml").write_text(PRESETS)
    write_notebook(folder, "01_good", RECORD)

    def run(*sections, **options):
        return reproduce(sections, notebooks=folder, results=tmp_path / "results", **options)

    run.folder, run.results = folder, tmp_path / "results" / "quick"
    return run


def table_of(lab):
    return json.loads((lab.results / "01_good.json").read_text())["table"]["rows"][0][0]


def test_runs_once_per_parameters_and_code(lab):
    def run_again(**options):
        return lab(**options)[0].state, table_of(lab)

    assert run_again() == ("done", 2)
    assert run_again() == ("skipped", 2)
    assert run_again(parameters={"steps": 7}) == ("done", 7)
    write_notebook(lab.folder, "01_good", RECORD.replace("[[steps]]", "[[-steps]]"))
    assert run_again(parameters={"steps": 7}) == ("done", -7)
    (lab.results / "01_good.json").unlink()
    assert run_again(parameters={"steps": 7}) == ("done", -7)


def test_a_failure_is_kept_and_the_rest_go_on_in_two_jobs(lab, capsys):
    write_notebook(lab.folder, "00_bad", "print('before')\nraise RuntimeError('no blocks left')")
    write_notebook(lab.folder, "02_dead", "import os\nos._exit(3)")
    bad, good, dead = lab(jobs=2)
    assert (bad.state, good.state, dead.state) == ("failed", "done", "failed")
    assert "RuntimeError: no blocks left" in bad.error and bad.error.count("\n") < 8
    assert "before" in bad.notebook.read_text() and bad.page.exists()
    told = capsys.readouterr().err
    assert "00_bad: FAILED" in told and "01_good: done" in told and "no blocks left" in told
    report = (lab.results / "report.html").read_text()
    classes = dict(re.findall(r'<section id="(\w+)" class="(\w+)"', report))
    assert classes == {"00_bad": "bad", "01_good": "good", "02_dead": "bad"}
    assert "RuntimeError: no blocks left" in report and "data:image/png" in report and "<table>" in report
    assert 'href="html/01_good.html"' in report
    page = good.page.read_text()
    assert "<script" not in page and not re.search(r"""src=["']http""", page)
    assert [run.state for run in lab("01", "02", jobs=2)] == ["skipped", "failed"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sections": ["99"]}, ValueError, "unknown section '99'.*01_good"),
        ({"sections": "01"}, TypeError, "list"),
        ({"preset": "huge"}, ValueError, "unknown preset 'huge'.*quick, long"),
        ({"jobs": 0}, ValueError, "jobs"),
        ({"jobs": True}, ValueError, "jobs"),
        ({"parameters": {"stepz": 1}}, ValueError, "'stepz'.*steps"),
        ({"parameters": {"steps": 1.5}}, TypeError, "steps must be int, not 1.5"),
        ({"parameters": {"steps": True}}, TypeError, "steps must be int, not True"),
        ({"parameters": {"rate": "much"}}, TypeError, "rate must be float"),
        ({"parameters": {"name": True}}, TypeError, "name must be str"),
        ({"parameters": {"fast": 1}}, TypeError, "fast must be bool"),
        ({"notebooks": "no/such/folder"}, FileNotFoundError, "such"),
    ],
)
def test_wrong_calls_run_nothing(lab, options, error, message):
    with pytest.raises(error, match=message):
        reproduce(**{"notebooks": lab.folder, "results": lab.results.parent} | options)
    assert not lab.results.exists()


def test_broken_notebooks_and_presets_are_refused(lab):
    write_notebook(lab.folder, "02_untagged", "1", tag="other")
    with pytest.raises(ValueError, match="02_untagged.* no cell tagged 'parameters'"):
        lab()
    (lab.folder / "presets.toml").write_text("[quick.01_good]\nunknown = 1")
    with pytest.raises(ValueError, match="01_good has no parameter 'unknown'"):
        lab("01")
    (lab.folder / "presets.toml").write_text("[quick")
    with pytest.raises(ValueError, match="not valid TOML"):
        lab("01")
    (lab.folder / "presets.toml").unlink()
    with pytest.raises(FileNotFoundError, match="presets.toml"):
        lab("01")
    assert not lab.results.exists()


def test_sections_are_found_by_number_name_and_stem(lab):
    write_notebook(lab.folder, "02_more", "1")
    (lab.folder / "scratch.ipynb").write_text("not a section")
    for asked in ("02", "more", "02_more"):
        assert list(select_sections(lab.folder, [asked])) == ["02_more"]
    assert list(select_sections(lab.folder, ["more", "01"])) == ["01_good", "02_more"]
    assert list(select_sections(lab.folder)) == ["01_good", "02_more"]


def test_a_float_parameter_takes_a_whole_number(lab):
    declared = declared_parameters(lab.folder / "01_good.ipynb")
    assert declared == {"steps": "int", "rate": "float", "name": "str", "fast": "bool", "results": "str"}
    check_parameters("01_good", {"rate": 1}, declared)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=3", ("a", 3)),
        ("a=1e-3", ("a", 1e-3)),
        ("a=true", ("a", True)),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=cifar10", ("a", "cifar10")),
        ("a='3'", ("a", "3")),
        ("a=folder:x=y", ("a", "folder:x=y")),
        ("a=2024-01-01", ("a", "2024-01-01")),
        ("a=", ("a", "")),
    ],
)
def test_parameters_are_read_as_toml_or_text(text, expected):
    name, value = parse_parameter(text)
    assert (name, value) == expected and type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["steps", "=3", "2x=3", "a b=3"])
def test_malformed_parameters_are_refused(text):
    with pytest.raises(ValueError, match="name=value"):
        parse_parameter(text)


def test_kernels_share_the_cores_and_the_environment_is_restored(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("JUPYTER_PREFER_ENV_PATH", raising=False)
    before = dict(os.environ)
    with kernel_environment(jobs=1):
        assert os.environ["OMP_NUM_THREADS"] == "3" and os.environ["JUPYTER_PREFER_ENV_PATH"] == "1"
    with kernel_environment(jobs=1000):
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert dict(os.environ) == before


def test_a_number_is_as_good_as_its_text_where_text_is_wanted(tmp_path):
    declared = new_notebook(cells=[new_code_cell('widths: str = "1"', metadata={"tags": ["parameters"]})])
    declared.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path / "01_widths.ipynb"
    nbformat.write(declared, path)
    settled = settle_parameters({"01_widths": path}, {}, dict([parse_parameter("widths=2")]), tmp_path)
    assert settled == {"01_widths": {"widths": "2"}}
