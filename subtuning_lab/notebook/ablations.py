"""Panel for a finished interpolation: what each point between pretrained and tuned blocks knows of either task."""

from __future__ import annotations

import ipywidgets as widgets
import pandas as pd
from matplotlib.axes import Axes

from subtuning_lab.notebook.panel import Panel, Picture, check_columns, draw
from subtuning_lab.plots.ablations import plot_alphas, plot_interpolation

_COLUMNS = ("alpha", "images", "accuracy", "std", "n")
_IMAGES = {"target": "the task", "clean": "clean images"}


def browse_alphas(summary: pd.DataFrame, alpha: float = 1.0) -> AlphaPanel:
    """Drag alpha from the pretrained blocks to the tuned ones, and see what is gained and what is forgotten.

    Nothing is trained: every position of the slider is an alpha of the table.

    Args:
        summary: of `summarize_interpolation`, with both kinds of images.
        alpha: where the slider stands at first.

    Raises:
        TypeError: something that is no table.
        ValueError: a column or a kind of images that is missing, fewer than two alphas, or an alpha that isn't there.
    """
    return AlphaPanel(summary, alpha)


class AlphaPanel(Panel):
    """See `browse_alphas`."""

    def __init__(self, summary: pd.DataFrame, alpha: float):
        self.summary = _checked(summary)
        alphas = sorted(self.summary["alpha"].unique().tolist())
        if alpha not in alphas:
            raise ValueError(f"alpha is {alpha}; the table has {', '.join(f'{own:g}' for own in alphas)}")
        options = [(f"{own:g}", own) for own in alphas]
        self.choice = widgets.SelectionSlider(options=options, value=alpha, description="alpha")
        self.choice.layout = widgets.Layout(width="480px")
        self.curves, self.corner = Picture(), Picture()
        super().__init__(self.choice, widgets.HBox([self.curves, self.corner]))
        self.choice.observe(self.shows_errors(self._redraw), "value")
        self._redraw()

    @property
    def facts(self) -> str:
        rows = self.summary[self.summary["alpha"] == self.choice.value].set_index("images")
        told = []
        for images, label in _IMAGES.items():
            own = rows.loc[images]
            spread = "" if pd.isna(own["std"]) else f" ± {own['std']:.1%}"
            told.append(f"{label} {own['accuracy']:.1%}{spread}, n = {int(own['n'])}")
        return f"alpha {self.choice.value:g}: " + "; ".join(told)

    def _redraw(self, change: object = None) -> None:
        self.curves.show(draw(self._paint_curves, 6.0, 3.6))
        self.corner.show(draw(self._paint_corner, 4.4, 3.6))
        self.say(self.facts)

    def _paint_curves(self, ax: Axes) -> None:
        plot_interpolation(self.summary, self.choice.value, ax=ax)

    def _paint_corner(self, ax: Axes) -> None:
        plot_alphas(self.summary, self.choice.value, ax=ax)


def _checked(summary: object) -> pd.DataFrame:
    check_columns(summary, _COLUMNS)
    absent = [name for name in _IMAGES if name not in set(summary["images"])]
    if absent:
        raise ValueError(f"summary has no rows of {absent[0]} images; give a table of summarize_interpolation")
    if summary["alpha"].nunique() < 2:
        raise ValueError("summary has fewer than two alphas; a slider needs at least two")
    return summary
