"""Static pages of executed notebooks that need no network and run no script, and tables that are safe to show."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.files import write_atomically
from subtuning_lab.utils.validation import Is, checked

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

#: what a page may do: show what it holds itself, and nothing else
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:"
POLICY += "; base-uri 'none'; form-action 'none'"
_META = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
_HEAD = re.compile(r"<head\b[^>]*>", re.IGNORECASE)
_SCRIPT = re.compile(r"<script\b.*?</script\s*>", re.DOTALL | re.IGNORECASE)
# Code spans and fences come first, so that a dollar sign inside them is left alone.
_MATH = re.compile(
    r"(```.*?```|`[^`\n]*`)|(?<![\\$])\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", re.DOTALL
)
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_LIVE_ONLY = "(An interactive panel: open the notebook in JupyterLab to use it.)"


def export_html(notebook: str | Path, target: str | Path) -> Path:
    """Writes an executed notebook as one static page that needs no network and runs no script.

    Formulas become MathML; a widget is shown by the picture in its own output.

    Args:
        notebook: path of the executed `.ipynb` file.
        target: path of the page to write.
    Returns:
        The path of the page.
    """
    from nbconvert import HTMLExporter

    page = nbformat.read(notebook, as_version=4)
    page.metadata.pop("widgets", None)
    page.metadata["title"] = Path(notebook).stem
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = _MATH.sub(_math_to_mathml, cell.source)
        for output in cell.get("outputs", []):
            _show_widget_as_picture(output)
    exporter = HTMLExporter(template_name="lab", mathjax_url="", require_js_url="")
    body, _ = exporter.from_notebook_node(page)
    body = _HEAD.sub(lambda head: head[0] + _META, _SCRIPT.sub("", body), count=1)
    write_atomically(target, body.encode())
    return Path(target)


@checked(table=Table(rows=0), formats=Is((str, Mapping), none=True), caption=Is(str), missing=Is(str))
def styled(
    table: pd.DataFrame, formats: str | Mapping[str, str] | None = None, *, caption: str = "", missing: str = ""
) -> Styler:
    """A table for a notebook, in the formats of its columns; names in it are text, whatever they hold.

    Args:
        table: names of tasks and classes in it may come from a file.
        formats: one for all columns, or by column, as for `Styler.format`; others stay as they are.
        caption: a line above the table.
        missing: what stands for a missing value.
    """
    safe = table.copy()
    for name in safe.select_dtypes(exclude=["number", "bool"]):
        safe[name] = safe[name].map(_escaped)
    safe = safe.rename(index=_escaped, columns=_escaped).rename_axis(index=_escaped, columns=_escaped)
    by_column = {_escaped(name): form for name, form in formats.items()} if isinstance(formats, Mapping) else formats
    style = safe.style.format(by_column, na_rep=missing)
    return style.set_caption(html.escape(caption)) if caption else style


def _escaped(value: Any) -> Any:
    return html.escape(value) if isinstance(value, str) else value


def _math_to_mathml(part: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    code, block, inline = part.groups()
    if code:
        return code
    return convert(" ".join((block or inline).split()), display="block" if block else "inline")


def _show_widget_as_picture(output: dict[str, Any]) -> None:
    data = output.get("data", {})
    if data.pop(_WIDGET_VIEW, None) is not None and not any(mime.startswith(("image/", "text/html")) for mime in data):
        data["text/plain"] = _LIVE_ONLY
