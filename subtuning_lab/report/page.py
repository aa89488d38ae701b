"""Records of finished sections, and the one report page that shows them all."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from subtuning_lab.experiments.claims import claim_cases, verdicts
from subtuning_lab.report.html import POLICY
from subtuning_lab.report.machine import machine_line
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.files import expanded, write_atomically
from subtuning_lab.utils.text import lines, without_colours
from subtuning_lab.utils.validation import Is, Several, Text, Whole, checked

REPORT, TEMPLATE = "report.html", "report.html"
_SECTION_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_PNG = b"\x89PNG"
_COLUMNS_AND_ROWS = {"columns": list, "rows": list}
_RECORD = {"title": str, "question": str, "machine": str, "n": int, "figure": str, "notes": list, "table": dict}


@checked
def write_section(
    folder: Annotated[str | Path, Is((str, Path))],
    *,
    name: Annotated[str, Text()],
    title: Annotated[str, Text()],
    question: Annotated[str, Text()],
    figure: Annotated[Figure | str | Path, Is((Figure, str, Path))],
    table: Annotated[pd.DataFrame, Table(rows=0)],
    paper: Annotated[pd.DataFrame | None, Table(rows=0, none=True)],
    notes: Annotated[Sequence[str], Several(Text(), least=0)],
    n: Annotated[int, Whole(1)],
    machine: Annotated[str | None, Text(none=True)] = None,
) -> Path:
    """Writes one section's result, `<folder>/<name>.json` and `<name>.png`, for the report.

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
        ValueError: a name that is no file stem, or a file that is no PNG image.
        FileNotFoundError: the figure's file does not exist.
    """
    if not _SECTION_NAME.fullmatch(name):
        raise ValueError(f"name is {name!r}; it must be a notebook's stem such as '01_finetuning_profiles'")
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
    path = expanded(folder) / f"{name}.json"
    write_atomically(path.with_suffix(".png"), _png_bytes(figure))
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False).encode())
    return path


@dataclass(frozen=True)
class RunState:
    """What an executed notebook says about its run."""

    state: str  # "done" | "failed" | "unfinished" | "unreadable"
    seconds: float | None = None
    error: str = ""
    mark: Mapping[str, Any] = field(default_factory=dict)  # what `reproduce` wrote into a finished one


def read_run(notebook: str | Path) -> RunState:
    """Reads from an executed notebook whether its run finished, in how many seconds, and its error's last line.

    A file that was cut, or is no notebook at all, is "unreadable"; whatever it holds, this raises nothing.
    """
    try:
        return _run_state(json.loads(Path(notebook).read_text(encoding="utf-8")))
    except Exception as error:  # a foreign file may hold anything, and must not end the report
        return RunState("unreadable", None, f"not a whole notebook: {lines(error)}"[:300])


def build_report(folder: str | Path, expected: Iterable[str] = ()) -> Path:
    """Writes `report.html`: every section's figure and table beside the paper's numbers, in one page without network.

    Args:
        folder: holds the executed notebooks, the section records and `html/`.
        expected: names of sections to list even where nothing of them is there yet.
    Returns:
        The path of the page.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no results folder {folder}")
    names = {path.stem for path in folder.glob("*.ipynb")} | set(expected)
    names |= {path.stem for path in folder.glob("*.json") if path.with_suffix(".png").exists()}
    places = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=places, autoescape=True, undefined=jinja2.StrictUndefined)
    pages.filters["cell"] = _cell
    page = pages.get_template(TEMPLATE).render(
        policy=POLICY,
        preset=folder.name,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        sections=[_section(folder, name) for name in sorted(names)],
        verdicts=_verdicts(),
    )
    write_atomically(folder / REPORT, page.encode(errors="backslashreplace"))
    return folder / REPORT


def _verdicts() -> dict[str, Any] | None:
    """What ships of real networks, as the page shows it; None where the package stands without its documents."""
    try:
        table = verdicts(claim_cases())
    except FileNotFoundError:
        return None
    return _table_to_json(table.rename(columns={"speak_for": "cases for it", "against": "against it"}))


def _run_state(page: dict[str, Any]) -> RunState:
    metadata = page["metadata"]
    run, mark = metadata.get("papermill", {}), metadata.get("subtuning_lab")
    outputs = [output for cell in page["cells"] for output in cell.get("outputs", [])]
    errors = [output for output in outputs if output["output_type"] == "error"]
    seconds = None if run.get("duration") is None else float(run["duration"])
    if errors or run.get("exception"):
        message = f"{errors[-1]['ename']}: {errors[-1]['evalue']}" if errors else "stopped without a traceback"
        return RunState("failed", seconds, without_colours(message).strip().splitlines()[-1])
    if not run.get("end_time") or not isinstance(mark, dict):
        return RunState("unfinished", seconds, "the run did not reach its end")
    return RunState("done", seconds, mark=mark)


def _section(folder: Path, name: str) -> dict[str, Any]:
    """What the page tells of one section."""
    record, picture, fault = None, "", ""
    if (folder / f"{name}.json").exists():
        try:
            record, picture = _read_record(folder, name)
        except Exception as error:  # as for a foreign notebook
            fault = f"the section record {name}.json can't be read: {lines(error)}"[:300]
    notebook = folder / f"{name}.ipynb"
    run = read_run(notebook) if notebook.exists() else RunState("not run" if record is None else "run by hand")
    if run.state == "done" and record is None and not fault:
        fault = "the notebook wrote no section record"
    pages = [(f"html/{name}.html", "the executed notebook as a page"), (f"{name}.ipynb", "as a notebook")]
    return {
        "name": name,
        "record": record,
        "picture": picture,
        "good": record is not None and run.state in ("done", "run by hand"),
        "state": run.state if run.seconds is None else f"{run.state} in {run.seconds:.0f} s",
        "error": "\n".join(filter(None, [run.error, fault])),
        "links": [(path, text) for path, text in pages if (folder / path).exists()],
    }


def _read_record(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """A section's record and its figure in base64; raises ValueError for what `write_section` did not write."""
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    _check_fields("the record", record, _RECORD)
    for table in filter(None, (record["table"], record.get("paper"))):
        _check_fields("a table", table, _COLUMNS_AND_ROWS)
        if any(len(row) != len(table["columns"]) for row in table["rows"]):
            raise ValueError("a table has rows of another length than its columns")
    figure = (folder / f"{name}.png").resolve()
    if record["figure"] != f"{name}.png" or figure.parent != folder.resolve():
        raise ValueError(f"its figure is {record['figure']!r}; it must be {name}.png in the same folder")
    content = figure.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError(f"{name}.png is not a PNG image")
    return {"paper": None} | record, base64.b64encode(content).decode()


def _check_fields(what: str, value: object, kinds: Mapping[str, type]) -> None:
    given = value if isinstance(value, dict) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(given.get(name), kind)]
    if wrong:
        raise ValueError(f"{what} has no {wrong[0]}, or one of another type")


def _table_to_json(table: pd.DataFrame) -> dict[str, Any]:
    """Columns and rows of a table; a named or non-trivial index becomes columns, NaN becomes null."""
    plain = table if isinstance(table.index, pd.RangeIndex) else table.reset_index()
    split = json.loads(plain.to_json(orient="split", index=False))
    return {"columns": [str(column) for column in split["columns"]], "rows": split["data"]}


def _png_bytes(figure: Figure | str | Path) -> bytes:
    if isinstance(figure, Figure):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
        return buffer.getvalue()
    content = Path(figure).read_bytes()
    if not content.startswith(_PNG):
        raise ValueError(f"figure is {str(figure)!r}, which is not a PNG image")
    return content


def _cell(value: Any, column: str = "") -> str:
    """One value as a reader wants it: accuracies and their spread in percent, counts with thousands apart."""
    if value is None:
        return "not available"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(partial(_cell, column=column), value))
    if isinstance(value, float):
        return f"{value:.1%}" if "accuracy" in column or column == "std" else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else lines(value)
