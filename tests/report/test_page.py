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

from subtuning_lab.report.html import POLICY, export_html, styled
from subtuning_lab.report.machine import machine_line
from subtuning_lab.report.page import build_report, read_run, write_section

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
    assert page.count("<table>") == 3 and "On real networks" in page and "94.0%" in page and "not available" in page
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
    assert "unfinished" in sections["03_killed"] and "unreadable" in sections["05_torn"]
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


FOREIGN = ["", "[]", "null", "{}", '{"cells": [', '{"cells": 3, "metadata": {}}', '{"metadata": {"papermill": []}}']
FOREIGN += ["[" * 9999, "\x00\xff", '{"title": 1}', '{"metadata": {"papermill": {"duration": "x"}}, "cells": [{}]}']
FOREIGN += ['{"metadata": {}, "cells": [{"outputs": [7]}]}']


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_is_named_and_the_report_goes_on(tmp_path, content):
    write_section(tmp_path, **a_section())
    executed_notebook(tmp_path / "01_profiles.ipynb")
    write_section(tmp_path, **a_section(name="02_cut"))
    (tmp_path / "02_cut.json").write_bytes(content.encode("latin-1"))
    (tmp_path / "03_cut.ipynb").write_bytes(content.encode("latin-1"))
    page = build_report(tmp_path).read_text()
    sections = dict(re.findall(r'<section id="(\w+)" class="(\w+)"', page))
    assert sections == {"01_profiles": "good", "02_cut": "bad", "03_cut": "bad"}
    assert "record 02_cut.json can&#39;t be read" in page and page.count("unreadable") == 1


KEYS = st.sampled_from(["cells", "metadata", "papermill", "outputs", "title", "table", "columns", "rows"])
PLAIN = st.none() | st.booleans() | st.floats() | st.text()


@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=10))
@settings(max_examples=30, deadline=None)
def test_no_content_breaks_the_report(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    for name in ("01_any.ipynb", "01_any.json"):
        (folder / name).write_text(json.dumps(content))
    (folder / "01_any.png").write_bytes(PNG)
    assert "01_any" in build_report(folder).read_text()


EVIL = "<img src=x onerror=alert(1)>\x1b[2J"


def test_names_from_files_are_text_wherever_they_stand(tmp_path):
    table = pd.DataFrame({EVIL: [EVIL], "accuracy": [0.5]})
    (tmp_path / f"{EVIL.replace('/', '')}.ipynb").write_text("{}")
    texts = {"title": EVIL, "question": EVIL, "notes": [EVIL], "machine": EVIL}
    write_section(tmp_path, **a_section(**texts, table=table, paper=table))
    page = build_report(tmp_path, expected=['05"><script>alert(1)</script>']).read_text()
    assert "<img src=x" not in page and "<script" not in page and "&lt;img src=x onerror" in page
    assert (
        POLICY in page.replace("&#39;", "'") and "script-src" not in POLICY and POLICY.startswith("default-src 'none'")
    )


@pytest.mark.parametrize("figure", ["../secret.png", "/etc/hostname", "02_other.png", "", None])
def test_a_record_shows_only_its_own_figure(tmp_path, figure):
    (tmp_path / "secret.png").write_bytes(PNG + b"secret")
    folder = tmp_path / "quick"
    path = write_section(folder, **a_section())
    (folder / "02_other.png").write_bytes(PNG)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"figure": figure}))
    page = build_report(folder).read_text()
    assert 'class="bad"' in page and "data:image/png" not in page


def test_a_figure_that_leads_out_of_the_folder_is_not_shown(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    folder = tmp_path / "quick"
    write_section(folder, **a_section())
    (folder / "01_profiles.png").unlink()
    (folder / "01_profiles.png").symlink_to(tmp_path / "secret.png")
    assert "data:image/png" not in build_report(folder).read_text()


def test_cells_are_told_in_words(tmp_path):
    table = pd.DataFrame({"recipe": [{"lr": 0.001, "bn": "batch"}], "blocks": [["a", "b"]], "std": [np.nan]})
    page = (write_section(tmp_path, **a_section(table=table)), build_report(tmp_path).read_text())[1]
    assert "<td>lr 0.001, bn batch</td><td>a, b</td><td>not available</td>" in page and "nan%" not in page


def test_a_styled_table_escapes_names_and_formats_numbers():
    table = pd.DataFrame({EVIL: [EVIL], "accuracy": [np.nan], "std": [0.25]}, index=pd.Index([EVIL], name=EVIL))
    shown = styled(table, {"accuracy": "{:.1%}", "std": "{:.1%}", EVIL: None}, caption=EVIL, missing="none").to_html()
    assert "<img" not in shown and shown.count("&lt;img src=x onerror") == 5 and "25.0%" in shown and ">none<" in shown
    many = pd.DataFrame({"a": [1, 2]}, index=pd.MultiIndex.from_tuples([("x", EVIL), ("y", "z")]))
    assert "<img" not in styled(many, "{:,}").to_html()
    assert table.columns[0] == EVIL  # the table itself is left as it was


def test_a_page_runs_nothing_that_an_output_brings(tmp_path):
    output = nbformat.v4.new_output("display_data", {"text/html": f"{EVIL}<SCRIPT >alert(1)</SCRIPT >"})
    page = export_html(executed_notebook(tmp_path / "01_a.ipynb", [output]), tmp_path / "01_a.html").read_text()
    assert "<script" not in page.lower() and page.index(POLICY) < page.index("<body")
