"""Section records, the report page and static pages of notebooks."""

import json
import re

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from subtuning_lab.report.html import export_html
from subtuning_lab.report.page import build_report, machine_line, read_run, write_section

matplotlib.use("Agg")
PNG = b"\x89PNG\r\n\x1a\n" + b"not checked further"
LOADS = re.compile(r"""(src|href)=["']?\s*(https?:|//)|url\(\s*["']?(https?:|//)|@import|import\(""", re.IGNORECASE)


def a_figure():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [0.2, 0.9])
    return figure


def a_section(**changes):
    return {
        "name": "01_profiles",
        "title": "Profiles <of> blocks",
        "question": "Which block?",
        "figure": a_figure(),
        "table": pd.DataFrame({"subset": ["a", "b"], "accuracy": [0.5, np.nan], "seeds": [3, 3]}),
        "paper": pd.DataFrame({"subset": ["B1"], "accuracy": [0.94]}),
        "notes": ["5 < 6 & so on"],
        "n": 200,
        "machine": "an abacus",
    } | changes


def executed_notebook(path, outputs=(), end_time="2026-01-01", markdown="# Title"):
    page = nbformat.v4.new_notebook()
    page.cells = [nbformat.v4.new_markdown_cell(markdown), nbformat.v4.new_code_cell("1 + 1", outputs=list(outputs))]
    page.metadata["papermill"] = {"end_time": end_time, "duration": 12.3, "exception": None}
    page.metadata["subtuning_lab"] = {"fingerprint": "f", "record": True}
    nbformat.write(page, path)
    return path


def test_section_record_keeps_values_and_blanks(tmp_path):
    path = write_section(tmp_path, **a_section())
    record = json.loads(path.read_text())
    assert record["table"] == {"columns": ["subset", "accuracy", "seeds"], "rows": [["a", 0.5, 3], ["b", None, 3]]}
    assert (tmp_path / "01_profiles.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["01_profiles.json", "01_profiles.png"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=5))
def test_numbers_survive_the_record(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("record")
    (folder / "f.png").write_bytes(PNG)
    path = write_section(folder, **a_section(figure=folder / "f.png", table=pd.DataFrame({"x": values})))
    rows = json.loads(path.read_text())["table"]["rows"]
    assert [row[0] for row in rows] == pytest.approx(values, rel=1e-6, abs=1e-9)


def test_index_becomes_columns(tmp_path):
    table = pd.DataFrame({"accuracy": [0.1]}, index=pd.Index(["layer1.0"], name="block"))
    record = json.loads(write_section(tmp_path, **a_section(table=table)).read_text())
    assert record["table"] == {"columns": ["block", "accuracy"], "rows": [["layer1.0", 0.1]]}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"name": "../escape"}, ValueError),
        ({"name": ""}, ValueError),
        ({"n": 0}, ValueError),
        ({"n": True}, ValueError),
        ({"n": 1.5}, ValueError),
        ({"table": [[1]]}, TypeError),
        ({"paper": "none"}, TypeError),
        ({"notes": "one string"}, TypeError),
        ({"figure": 3}, TypeError),
        ({"figure": "missing.png"}, FileNotFoundError),
        ({"figure": __file__}, ValueError),
    ],
)
def test_wrong_sections_are_refused_and_leave_nothing(tmp_path, change, error):
    with pytest.raises(error):
        write_section(tmp_path, **a_section(**change))
    assert list(tmp_path.iterdir()) == []


def test_machine_line_names_python_and_torch():
    assert re.fullmatch(r".+, Python 3\.\d+, torch \d+\.\d+\.\d+\S*", machine_line())


def test_report_shows_figure_tables_time_and_escapes(tmp_path):
    write_section(tmp_path, **a_section())
    executed_notebook(tmp_path / "01_profiles.ipynb")
    page = build_report(tmp_path).read_text()
    assert "Profiles &lt;of&gt; blocks" in page and "<of>" not in page and "5 &lt; 6 &amp; so on" in page
    assert page.count("<table>") == 2 and "94.0%" in page and "not available" in page
    assert 'src="data:image/png;base64,' in page and 'alt="Figure: ' in page
    assert "done in 12 s" in page and "n = 200" in page and "an abacus" in page
    assert not LOADS.search(page)


def test_report_lists_failed_unfinished_silent_and_missing_sections(tmp_path):
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="\x1b[31mno\x1b[0m such <block>", traceback=[])
    executed_notebook(tmp_path / "02_fails.ipynb", [error])
    executed_notebook(tmp_path / "03_killed.ipynb", end_time=None)
    executed_notebook(tmp_path / "04_silent.ipynb")
    (tmp_path / "05_torn.ipynb").write_text('{"cells": [')
    page = build_report(tmp_path, expected=["06_absent", "02_fails"]).read_text()
    sections = dict(re.findall(r'<section id="(\w+)" class="bad"(.*?)</section>', page, re.DOTALL))
    assert list(sections) == ["02_fails", "03_killed", "04_silent", "05_torn", "06_absent"]
    assert "failed" in sections["02_fails"] and "ValueError: no such &lt;block&gt;" in sections["02_fails"]
    assert "unfinished" in sections["03_killed"] and "unfinished" in sections["05_torn"]
    assert "no section record" in sections["04_silent"] and "not run" in sections["06_absent"]


def test_a_record_from_a_failed_run_is_not_shown_as_good(tmp_path):
    write_section(tmp_path, **a_section())
    executed_notebook(tmp_path / "01_profiles.ipynb", [nbformat.v4.new_output("error", ename="E", evalue="x")])
    assert read_run(tmp_path / "01_profiles.ipynb").state == "failed"
    assert '<section id="01_profiles" class="bad"' in build_report(tmp_path).read_text()


def test_report_of_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_report(tmp_path / "nowhere")


def test_static_page_needs_no_network_and_no_script(tmp_path):
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "m", "version_major": 2, "version_minor": 0}}
    outputs = [
        nbformat.v4.new_output("display_data", widget | {"text/plain": "VBox()", "image/png": "aGFsbG8="}),
        nbformat.v4.new_output("display_data", widget | {"text/plain": "IntSlider()"}),
    ]
    text = r"Costs \$5; `$x$` is code; inline $\epsilon > 0$ and $$\sum_i x_i$$ <details>42</details>"
    source = executed_notebook(tmp_path / "01_a.ipynb", outputs, markdown=text)
    page = export_html(source, tmp_path / "html" / "01_a.html").read_text()
    assert not LOADS.search(page) and "<script" not in page and "require" not in page
    assert page.count("<math") == 2 and "<details>" in page and "$x$" in page
    assert "data:image/png;base64,aGFsbG8=" in page and "interactive panel" in page and "VBox()" not in page
