"""What every panel of widgets shares: pictures drawn without pyplot, and a display that also shows without a kernel."""

from __future__ import annotations

import base64
import html
import io
import threading
from collections.abc import Callable, Sequence
from functools import wraps

import ipywidgets as widgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

_DPI, _CSS_DPI = 160, 80  # twice the pixels that are shown, for sharp screens
_DRAWING = threading.Lock()  # matplotlib draws in one thread at a time
# A name like "layer1.0" must fit under its box of the picture.
_TICKS = """<style>
.subtuning-ticks .widget-label-basic { font-size: 11px; gap: 0; padding: 0 2px; }
.subtuning-ticks .widget-label-basic input[type="checkbox"] { flex-grow: 0; margin: 0 3px 0 0; }
</style>"""


class Picture(widgets.Image):
    """A PNG shown at half its pixels, and never wider than the notebook."""

    def __init__(self) -> None:
        super().__init__(format="png", layout=widgets.Layout(max_width="100%", height="auto"))

    def draw(self, paint: Callable[[Axes], object], width: float, height: float) -> None:
        """Shows a new figure, which pyplot never sees, so that nothing leaks or shows twice, in any thread.

        Args:
            paint: draws into the axes.
            width, height: of the figure in inches.
        """
        with _DRAWING:
            figure = Figure(figsize=(width, height), layout="constrained")
            paint(figure.subplots())
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=_DPI)
        png = file.getvalue()
        self.layout.width = f"{_css_size(png)[0]}px"
        self.value = png


class Panel:
    """Widgets over each other that show themselves in a notebook, and as one picture where there is no kernel.

    A panel says in `_redraw` what it shows, and lets `follow` call that at every change of its widgets.

    Args:
        children: widgets from top to bottom; the pictures among them make up the picture without a kernel, and the line
            of news stands above the first of these where `news_first`, beside the buttons that it is about.
    """

    def __init__(self, *children: widgets.Widget, news_first: bool = False):
        self.status = widgets.HTML()
        place = [isinstance(child, Picture) for child in children].index(True) if news_first else len(children)
        self.box = widgets.VBox([*children[:place], self.status, *children[place:]])
        self._holding = False

    @property
    def png(self) -> bytes:
        """All pictures of the panel, from top to bottom, as one PNG."""
        return _stacked([picture.value for picture in _pictures(self.box)])

    @property
    def facts(self) -> str:
        """The panel's state in words."""
        return type(self).__name__

    def follow(self, *controls: widgets.Widget) -> None:
        """Draws the panel now, and again whenever one of these widgets changes."""
        for control in controls:
            control.observe(self.shows_errors(self._changed), "value")
        self._changed()

    def say(self, text: str, error: bool = False) -> None:
        """Writes one line of news."""
        colour = "#B00020" if error else "#444444"
        self.status.value = f'<span style="color: {colour}">{html.escape(text)}</span>' if text else ""

    def shows_errors(self, callback: Callable[..., None]) -> Callable[..., None]:
        """The callback, with errors written in the panel: Jupyter would hide those of a callback in a log."""

        @wraps(callback)
        def shown(*args: object) -> None:
            try:
                callback(*args)
            except Exception as error:  # whatever it is, the reader must see it
                self.say(f"{type(error).__name__}: {error}", error=True)

        return shown

    def _changed(self, change: object = None) -> None:
        if self._holding:
            return
        self.say("")
        self._redraw()

    def _redraw(self) -> None:
        raise NotImplementedError

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        """The live widgets, and the picture for where they can't live."""
        data = dict(self.box._repr_mimebundle_(include=include, exclude=exclude))
        png = self.png
        width, height = _css_size(png)
        data |= {"text/plain": self.facts, "image/png": base64.b64encode(png).decode("ascii")}
        return data, {"image/png": {"width": width, "height": height}}


def described(width: int, label: int) -> dict[str, object]:
    """Options of a widget so many pixels wide, its description taking so many of them."""
    return {"style": {"description_width": f"{label}px"}, "layout": widgets.Layout(width=f"{width}px")}


def slider_or_list(options: Sequence[object], **settings: object) -> widgets.Widget:
    """A slider over some values; a list where there is one, since a slider of one position can't be shown."""
    kind = widgets.SelectionSlider if len(options) > 1 else widgets.Dropdown
    return kind(options=options, **settings)


def checkbox(name: str, value: bool = False) -> widgets.Checkbox:
    """A box to tick that takes no more room than its name."""
    box = widgets.Checkbox(value, description=name, indent=False, style={"background": "#EEEEEE"})
    box.layout = widgets.Layout(width="auto", min_width="0", margin="0")
    return box


def tick_grid(boxes: Sequence[widgets.Checkbox], columns: str, width: float, padding: str = "0") -> widgets.VBox:
    """Checkboxes in the columns of a CSS grid, `width` inches of a picture wide."""
    layout = {"grid_template_columns": columns, "grid_gap": "4px", "max_width": "100%", "padding": padding}
    grid = widgets.GridBox(boxes, layout=widgets.Layout(width=f"{_CSS_DPI * width:.0f}px", **layout))
    grid.add_class("subtuning-ticks")
    return widgets.VBox([grid, widgets.HTML(_TICKS, layout=widgets.Layout(display="none"))])


def _css_size(png: bytes) -> tuple[int, int]:
    """Width and height at which a PNG of `draw` is shown."""
    with Image.open(io.BytesIO(png)) as image:
        return tuple(round(side * _CSS_DPI / _DPI) for side in image.size)


def _pictures(widget: widgets.Widget) -> list[Picture]:
    if isinstance(widget, Picture):
        return [widget]
    return [picture for child in getattr(widget, "children", ()) for picture in _pictures(child)]


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
