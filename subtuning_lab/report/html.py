"""Static pages of executed notebooks that need no network and run no script."""

import re
from pathlib import Path
from typing import Any

import nbformat

from subtuning_lab.utils.files import write_atomically

_SCRIPT = re.compile(r"<script\b.*?</script\s*>", re.DOTALL | re.IGNORECASE)
# Code spans and fences come first, so that a dollar sign inside them is left alone.
_MATH = re.compile(
    r"(```.*?```|`[^`\n]*`)|(?<![\\$])\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", re.DOTALL
)
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_LIVE_ONLY = "(An interactive panel: open the notebook in JupyterLab to use it.)"


def export_html(notebook: str | Path, target: str | Path) -> Path:
    """Write an executed notebook as one static page that needs no network and runs no script.

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
    target = Path(target)
    write_atomically(target, _SCRIPT.sub("", body).encode())
    return target


def _math_to_mathml(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    code, block, inline = found.groups()
    if code:
        return code
    return convert(" ".join((block or inline).split()), display="block" if block else "inline")


def _show_widget_as_picture(output: dict[str, Any]) -> None:
    data = output.get("data", {})
    if data.pop(_WIDGET_VIEW, None) is not None and not any(mime.startswith(("image/", "text/html")) for mime in data):
        data["text/plain"] = _LIVE_ONLY
