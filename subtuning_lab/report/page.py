"""Records of finished sections, and the one report page that shows them all."""

import base64
import html
import io
import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from matplotlib.figure import Figure

from subtuning_lab.utils.files import write_atomically

REPORT = "report.html"
_SECTION_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")  # colours of a traceback

_CSS = """
:root{color-scheme:light}
body{font:16px/1.55 system-ui,sans-serif;color:#1b1f24;background:#fff;max-width:76rem;margin:0 auto;padding:1.5rem}
h1{font-size:1.8rem;margin:.2rem 0}h2{font-size:1.35rem;margin:0}a{color:#0b57a4}
section{border:1px solid #d5dae0;border-radius:8px;padding:1.2rem;margin:1.4rem 0}
section.bad{border-left:6px solid #a3341b}.state{font-weight:600}.bad .state{color:#a3341b}
.question{font-style:italic;margin:.3rem 0}.facts{color:#4a5560;font-size:.92rem;margin:.3rem 0 1rem}
img{max-width:100%;height:auto}.tables{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:flex-start}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding-bottom:.3rem}
th,td{text-align:left;padding:.25rem .7rem;border-bottom:1px solid #e3e7eb;vertical-align:top}
pre{background:#f6f7f9;padding:.7rem;overflow-x:auto;white-space:pre-wrap}
"""


def machine_line() -> str:
    """Name the machine that computes, for example "2 CPU cores (x86_64), Python 3.11, torch 2.14.1"."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores} CPU cores ({platform.machine()})"
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{device}, Python {python}, torch {torch.__version__.split('+')[0]}"


def write_section(
    folder: str | Path,
    *,
    name: str,
    title: str,
    question: str,
    figure: Figure | str | Path,
    table: pd.DataFrame,
    paper: pd.DataFrame | None,
    notes: Sequence[str],
    n: int,
    machine: str | None = None,
) -> Path:
    """Write one section's result, `<folder>/<name>.json` and `<name>.png`, for the report.

    Args:
        folder: where the results of this preset lie; made if it is missing.
        name: stem of the notebook, for example "01_finetuning_profiles".
        title: heading of the section.
        question: what the section asks, one sentence.
        figure: a matplotlib Figure, or the path of a PNG file.
        table: our numbers, tidy; accuracies in [0, 1].
        paper: the numbers to compare with, or None where there are none.
        notes: what was seen and what differs, one plain sentence each.
        n: number of training images behind each number.
        machine: where it ran; read from this process if None.

    Returns:
        The path of the JSON file.

    Raises:
        ValueError: for a name that is no file stem, or n below 1.
        TypeError: for a figure, table, paper or notes of another type.
        FileNotFoundError: if the figure's file does not exist.
    """
    _check_section(name, table, paper, notes, n)
    folder = Path(folder)
    record = {
        "section": name,
        "title": title,
        "question": question,
        "figure": f"{name}.png",
        "table": _table_to_json(table),
        "paper": None if paper is None else _table_to_json(paper),
        "notes": list(notes),
        "n": int(n),
        "machine": machine or machine_line(),
    }
    write_atomically(folder / f"{name}.png", _png_bytes(figure))
    path = folder / f"{name}.json"
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False).encode())
    return path


def _check_section(name: object, table: object, paper: object, notes: Sequence[str], n: int) -> None:
    if not isinstance(name, str) or not _SECTION_NAME.fullmatch(name):
        raise ValueError(f"name must be a notebook's stem such as '01_finetuning_profiles', not {name!r}")
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"table must be a pandas DataFrame, not {type(table).__name__}")
    if paper is not None and not isinstance(paper, pd.DataFrame):
        raise TypeError(f"paper must be a pandas DataFrame or None, not {type(paper).__name__}")
    if isinstance(notes, str) or not all(isinstance(note, str) for note in notes):
        raise TypeError(f"notes must be a list of sentences, not {notes!r}")
    if isinstance(n, bool) or int(n) != n or n < 1:
        raise ValueError(f"n must be a number of images, 1 or more, not {n!r}")


def _table_to_json(table: pd.DataFrame) -> dict[str, Any]:
    """Turn a table into columns and rows; a named or non-trivial index becomes columns, NaN becomes null."""
    plain = table if isinstance(table.index, pd.RangeIndex) else table.reset_index()
    split = json.loads(plain.to_json(orient="split", index=False))
    return {"columns": [str(column) for column in split["columns"]], "rows": split["data"]}


def _png_bytes(figure: Figure | str | Path) -> bytes:
    if isinstance(figure, Figure):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
        return buffer.getvalue()
    if not isinstance(figure, str | Path):
        raise TypeError(f"figure must be a matplotlib Figure or the path of a PNG, not {type(figure).__name__}")
    content = Path(figure).read_bytes()
    if not content.startswith(b"\x89PNG"):
        raise ValueError(f"{figure} is not a PNG image")
    return content


def without_colours(text: str) -> str:
    """Remove the terminal's colour codes, which tracebacks carry."""
    return _ANSI.sub("", text)


@dataclass(frozen=True)
class RunState:
    """What an executed notebook says about its run."""

    state: str  # "done" | "failed" | "unfinished"
    seconds: float | None = None
    error: str = ""


def read_run(notebook: str | Path) -> RunState:
    """Read from an executed notebook whether its run finished, in how many seconds, and its error's last line."""
    try:
        page = nbformat.read(notebook, as_version=4)
    except nbformat.reader.NotJSONError:  # killed while it wrote
        return RunState("unfinished", None, "the run did not reach its end")
    run = page.metadata.get("papermill", {})
    errors = [out for cell in page.cells for out in cell.get("outputs", []) if out.output_type == "error"]
    if errors or run.get("exception"):
        message = f"{errors[-1].ename}: {errors[-1].evalue}" if errors else "stopped without a traceback"
        return RunState("failed", run.get("duration"), without_colours(message).strip().splitlines()[-1])
    if not run.get("end_time") or "subtuning_lab" not in page.metadata:
        return RunState("unfinished", run.get("duration"), "the run did not reach its end")
    return RunState("done", run.get("duration"))


def build_report(folder: str | Path, expected: Iterable[str] = ()) -> Path:
    """Write `report.html`: every section's figure and table beside the paper's numbers, in one page without network.

    Args:
        folder: holds the executed notebooks, the section records and `html/`.
        expected: names of sections to list even where nothing of them is there yet.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no results folder {folder}")
    names = {path.stem for path in folder.glob("*.ipynb")} | set(expected)
    names |= {path.stem for path in folder.glob("*.json") if path.with_suffix(".png").exists()}
    sections = "".join(_section_html(folder, name) for name in sorted(names))
    links = "".join(f'<li><a href="#{name}">{html.escape(name)}</a></li>' for name in sorted(names))
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>SubTuning Lab: {html.escape(folder.name)}'
        '</title><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_CSS}</style></head><body><header><h1>SubTuning Lab: what was reproduced</h1>"
        f"<p>Preset <b>{html.escape(folder.name)}</b>, written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>"
        f'</header><nav aria-label="Sections"><ul>{links}</ul></nav>'
        f"<main>{sections}</main></body></html>\n"
    )
    write_atomically(folder / REPORT, page.encode())
    return folder / REPORT


def _section_html(folder: Path, name: str) -> str:
    notebook, record_path = folder / f"{name}.ipynb", folder / f"{name}.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else None
    run = read_run(notebook) if notebook.exists() else RunState("not run" if record is None else "run by hand")
    if run.state == "done" and record is None:
        run = RunState("done", run.seconds, "the notebook wrote no section record")
    good = record is not None and run.state in ("done", "run by hand")
    seconds = "" if run.seconds is None else f" in {run.seconds:.0f} s"
    pages = [(f"html/{name}.html", "the executed notebook as a page"), (f"{name}.ipynb", "as a notebook")]
    links = ", ".join(f'<a href="{page}">{text}</a>' for page, text in pages if (folder / page).exists())
    return (
        f'<section id="{name}" class="{"good" if good else "bad"}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{html.escape(record["title"] if record else name)}</h2>'
        f'<p><span class="state">{run.state}{seconds}</span>{". See " + links if links else ""}.</p>'
        f"{f'<pre>{html.escape(run.error)}</pre>' if run.error else ''}"
        f"{_record_html(folder, record) if record else ''}</section>\n"
    )


def _record_html(folder: Path, record: dict[str, Any]) -> str:
    picture = base64.b64encode((folder / record["figure"]).read_bytes()).decode()
    title, question = html.escape(record["title"]), html.escape(record["question"])
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in record["notes"])
    return (
        f'<p class="question">{question}</p><p class="facts">n = {record["n"]} training images; '
        f'{html.escape(record["machine"])}</p><img alt="Figure: {title}" src="data:image/png;base64,{picture}">'
        f'<div class="tables">{_table_html(record["table"], "Measured here")}{_table_html(record["paper"], "Reported")}'
        f"</div>{f'<ul>{notes}</ul>' if notes else ''}"
    )


def _table_html(table: dict[str, Any] | None, caption: str) -> str:
    if table is None:
        return ""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table["columns"])
    rows = "".join(
        "<tr>" + "".join(f"<td>{_cell(*cell)}</td>" for cell in zip(table["columns"], row, strict=True)) + "</tr>"
        for row in table["rows"]
    )
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(column: str, value: Any) -> str:
    """One value as a reader wants it: accuracies and their spread in percent, counts with thousands apart."""
    if value is None:
        return "not available"
    if isinstance(value, float):
        return f"{value:.1%}" if "accuracy" in column or column == "std" else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else html.escape(str(value))
