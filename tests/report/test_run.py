"""The batch runner, on tiny notebooks that the tests write."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import papermill
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from subtuning_lab.report import run as batch
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
        ({"preset": "huge"}, ValueError, "unknown preset 'huge'.*quick, long"),
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
    write_notebook(lab.folder, "02b_beyond", "1")
    (lab.folder / "scratch.ipynb").write_text("not a section")
    for asked in ("02", "more", "02_more"):
        assert list(select_sections(lab.folder, [asked])) == ["02_more"]
    assert list(select_sections(lab.folder, ["more", "01"])) == ["01_good", "02_more"]
    assert list(select_sections(lab.folder, ["02b"])) == ["02b_beyond"]
    assert list(select_sections(lab.folder)) == ["01_good", "02_more", "02b_beyond"]


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
        ("a=False", ("a", False)),
        ("a=TRUE", ("a", True)),
        ("a=None", ("a", None)),
        ("a=(1, 2)", ("a", (1, 2))),
        ("a={'b': [True, None]}", ("a", {"b": [True, None]})),
        ("a=False alarm", ("a", "False alarm")),
        ("a=1\nb = 2", ("a", "1\nb = 2")),
        ("a=" + "[" * 9999, ("a", "[" * 9999)),
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
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for load, jobs, threads in ((0.2, 2, "8"), (10.0, 2, "3"), (10.0, 3, "2"), (50.0, 2, "1"), (0.0, 99, "1")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        with kernel_environment(jobs):
            assert os.environ["OMP_NUM_THREADS"] == threads, (load, jobs)
    assert dict(os.environ) == before


def test_a_number_is_as_good_as_its_text_where_text_is_wanted(tmp_path):
    declared = new_notebook(cells=[new_code_cell('widths: str = "1"', metadata={"tags": ["parameters"]})])
    declared.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path / "01_widths.ipynb"
    nbformat.write(declared, path)
    settled = settle_parameters({"01_widths": path}, {}, dict([parse_parameter("widths=2")]), tmp_path)
    assert settled == {"01_widths": {"widths": "2"}}


@given(st.text(max_size=40))
def test_any_text_is_a_parameter_or_refused(text):
    try:
        name, value = parse_parameter(text)
    except ValueError as error:
        assert "name=value" in str(error)
    else:
        assert name.isidentifier() and isinstance(value, bool | int | float | str | list | dict | tuple | type(None))


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@given(st.none() | st.booleans() | NUMBERS | st.lists(NUMBERS) | st.dictionaries(st.text(), st.booleans()))
def test_python_values_come_back_as_they_were_written(value):
    assert parse_parameter(f"name={value!r}") == ("name", value)


SLOW = "import pathlib, time\npathlib.Path(results, '01_good.json').write_text('half')\ntime.sleep(60)"


def contents(folder):
    """Path -> content of what is in its place."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "report.html"]
    return {path: path.read_bytes() for path in files if ".unfinished" not in str(path)}


def start_in_own_process(lab, jobs):
    """`reproduce` on the fixture's folder, once its first notebook runs."""
    options = f"notebooks={str(lab.folder)!r}, results={str(lab.results.parent)!r}, jobs={jobs}, force=True"
    code = f"from subtuning_lab.report.run import reproduce; reproduce({options})"
    # A shell that starts tests in the background makes them, and what they start, deaf to SIGINT.
    hearing = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    process = subprocess.Popen([sys.executable, "-c", hearing + code], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not list(lab.results.glob(".01_good*/01_good.json")):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("jobs", "how"), [(2, signal.SIGINT), (1, signal.SIGKILL)])
def test_an_interrupt_ends_at_once_and_leaves_the_last_result(lab, jobs, how):
    lab()
    before = contents(lab.results)
    write_notebook(lab.folder, "01_good", SLOW)
    for waiting in ("02_more", "03_more"):  # one runs beside it, one waits for its turn
        write_notebook(lab.folder, waiting, SLOW)
    process, start = start_in_own_process(lab, jobs), time.monotonic()
    process.send_signal(how)
    process.wait(30)
    assert time.monotonic() - start < 15
    left = contents(lab.results)
    assert left == before
    assert how == signal.SIGKILL or ".unfinished" not in " ".join(path.name for path in lab.results.iterdir())
    for waiting in ("02_more", "03_more"):
        (lab.folder / f"{waiting}.ipynb").unlink()
    write_notebook(lab.folder, "01_good", RECORD)
    assert lab()[0].state == "skipped" and not list(lab.results.glob(".*.unfinished"))  # swept


@pytest.mark.parametrize(("deaths", "state"), [(2, "done"), (3, "failed")])
def test_a_kernel_that_never_answers_is_started_anew(lab, monkeypatch, deaths, state):
    execute, starts = papermill.execute_notebook, []

    def dying(*arguments, **options):
        starts.append(options["km"])
        if len(starts) <= deaths:
            raise RuntimeError("Kernel died before replying to kernel_info")  # as papermill says it
        return execute(*arguments, **options)

    monkeypatch.setattr(papermill, "execute_notebook", dying)
    assert [run.state for run in lab()] == [state] and len({*map(id, starts)}) == 3


def test_two_runs_in_one_folder_do_not_meet(lab):
    lab()
    with batch._alone_in(lab.results), pytest.raises(BlockingIOError, match="another reproduce works in"):
        lab()
    assert lab()[0].state == "skipped"


def test_a_result_names_the_folder_that_it_lies_in(lab):
    write_notebook(lab.folder, "01_good", f"{RECORD}\nprint(results)")
    lab()
    assert str(lab.results) in (lab.results / "01_good.ipynb").read_text()
    assert "unfinished" not in (lab.results / "01_good.ipynb").read_text() + (lab.results / "report.html").read_text()
