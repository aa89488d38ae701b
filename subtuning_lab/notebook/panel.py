"""What every panel of widgets shares: pictures drawn without pyplot, and a display that also shows without a kernel."""

from __future__ import annotations

import base64
import html
import io
import threading
from collections.abc import Callable, Sequence
from functools import wraps

import ipywidgets as widgets
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

_DPI, _CSS_DPI = 160, 80  # twice the pixels that are shown, for sharp screens
_DRAWING = threading.Lock()  # matplotlib draws in one thread at a time


def draw(paint: Callable[[Axes], object], width: float, height: float) -> bytes:
    """The PNG of a figure that pyplot never sees, so that nothing leaks or shows twice, in any thread.

    Args:
        paint: draws into the axes.
        width, height: of the figure in inches.
    """
    with _DRAWING:
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def network_width(names: Sequence[str]) -> float:
    """Inches that `plot_network` needs."""
    return max(6.0, 0.95 * (len(names) + 1))


def profile_width(bars: int) -> float:
    """Inches that `plot_profile` needs."""
    return max(6.0, 1.2 + 0.62 * bars)


class Picture(widgets.Image):
    """A PNG shown at half its pixels, and never wider than the notebook."""

    def __init__(self, png: bytes = b""):
        super().__init__(format="png", layout=widgets.Layout(max_width="100%", height="auto"))
        if png:
            self.show(png)

    def show(self, png: bytes) -> None:
        """Replaces what is shown."""
        self.layout.width = f"{css_size(png)[0]}px"
        self.value = png


class Panel:
    """Widgets over each other that show themselves in a notebook, and as one picture where there is no kernel.

    Args:
        children: widgets from top to bottom; the pictures among them make up the picture without a kernel.
    """

    def __init__(self, *children: widgets.Widget):
        self.status = widgets.HTML()
        self.box = widgets.VBox([*children, self.status])

    @property
    def png(self) -> bytes:
        """All pictures of the panel, from top to bottom, as one PNG."""
        return _stacked([picture.value for picture in _pictures(self.box)])

    @property
    def facts(self) -> str:
        """The panel's state in words."""
        return type(self).__name__

    def say(self, text: str, error: bool = False) -> None:
        """Writes one line under the panel."""
        colour = "#B00020" if error else "#444444"
        self.status.value = f'<span style="color: {colour}">{html.escape(text)}</span>' if text else ""

    def shows_errors(self, callback: Callable[..., None]) -> Callable[..., None]:
        """The callback, with errors written under the panel: Jupyter would hide those of a callback in a log."""

        @wraps(callback)
        def shown(*args: object) -> None:
            try:
                callback(*args)
            except Exception as error:  # whatever it is, the reader must see it
                self.say(f"{type(error).__name__}: {error}", error=True)

        return shown

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        """The live widgets, and the picture for where they can't live."""
        data = dict(self.box._repr_mimebundle_(include=include, exclude=exclude))
        png = self.png
        width, height = css_size(png)
        data |= {"text/plain": self.facts, "image/png": base64.b64encode(png).decode("ascii")}
        return data, {"image/png": {"width": width, "height": height}}


def css_size(png: bytes) -> tuple[int, int]:
    """Width and height at which a PNG of `draw` is shown."""
    with Image.open(io.BytesIO(png)) as image:
        return tuple(round(side * _CSS_DPI / _DPI) for side in image.size)


def _pictures(widget: widgets.Widget) -> list[Picture]:
    if isinstance(widget, Picture):
        return [widget]
    return [picture for child in getattr(widget, "children", ()) for picture in _pictures(child)]


def check_columns(summary: object, columns: Sequence[str]) -> None:
    """Raises TypeError unless it is a table, and ValueError unless it has these columns."""
    if not isinstance(summary, pd.DataFrame):
        raise TypeError(f"summary is a {type(summary).__name__}; it must be a table")
    missing = [name for name in columns if name not in summary]
    if missing:
        raise ValueError(f"summary has no column {missing[0]}; it must have {', '.join(columns)}")


def _stacked(pngs: list[bytes]) -> bytes:
    """Pictures over each other, on white."""
    if len(pngs) == 1:
        return pngs[0]
    images = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs]
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    file = io.BytesIO()
    sheet.save(file, format="png")
    return file.getvalue()
