"""Panel for finished curves: what every method comes to with so many training images."""

from __future__ import annotations

import ipywidgets as widgets
import pandas as pd
from matplotlib.axes import Axes

from subtuning_lab.notebook.panel import Panel, Picture, check_columns, draw
from subtuning_lab.plots.comparison import plot_curves, plot_methods
from subtuning_lab.plots.profiles import GREY

_COLUMNS = ("train_size", "method", "accuracy", "std", "n")


def browse_sizes(summary: pd.DataFrame) -> SizePanel:
    """Drag the number of training images along finished curves, and see the bars of all methods there.

    Nothing is trained: every position of the slider is a size of the table.

    Args:
        summary: of `summarize_repeats`, of one task: rows with `train_size`, `method`, `accuracy`, `std` and `n`.

    Raises:
        TypeError: something that is no table.
        ValueError: no rows, a column that is missing, or a method that is there twice for one size.
    """
    return SizePanel(summary)


class SizePanel(Panel):
    """See `browse_sizes`."""

    def __init__(self, summary: pd.DataFrame):
        self.summary = _checked(summary)
        sizes = sorted(self.summary["train_size"].unique().tolist())
        wide = {"style": {"description_width": "initial"}, "layout": widgets.Layout(width="480px")}
        # A slider of one position can't be shown.
        kind = widgets.SelectionSlider if len(sizes) > 1 else widgets.Dropdown
        self.choice = kind(options=sizes, value=sizes[0], description="training images", **wide)
        self.curves, self.bars = Picture(), Picture()
        super().__init__(self.choice, self.curves, self.bars)
        self.choice.observe(self.shows_errors(self._redraw), "value")
        self._redraw()

    @property
    def rows(self) -> pd.DataFrame:
        """The methods at the chosen size, the best first."""
        own = self.summary[self.summary["train_size"] == self.choice.value]
        return own.sort_values("accuracy", ascending=False, kind="stable")

    @property
    def facts(self) -> str:
        told = [
            f"{row.method} {row.accuracy:.1%}" + ("" if pd.isna(row.std) else f" ± {row.std:.1%}") + f", n = {row.n}"
            for row in self.rows.itertuples()
        ]
        return f"{self.choice.value} training images: " + "; ".join(told)

    def _redraw(self, change: object = None) -> None:
        self.say("")
        methods = self.summary["method"].nunique()
        self.curves.show(draw(self._paint_curves, 8.6, 3.4))
        self.bars.show(draw(self._paint_bars, 8.6, 1.1 + 0.34 * methods))

    def _paint_curves(self, ax: Axes) -> None:
        """The curves, with a line where the slider stands."""
        plot_curves(self.summary, ax=ax)
        ax.axvline(self.choice.value, color=GREY, linestyle=":", linewidth=1.5)

    def _paint_bars(self, ax: Axes) -> None:
        """The bars of one size on the axis of all sizes, so that positions of the slider compare."""
        plot_methods(self.rows, ax=ax)
        low, high = _limits(self.summary)
        ax.set_xlim(low, high)
        ax.set_title(f"{self.choice.value} training images: {ax.get_title()}", fontsize=10)


def _limits(summary: pd.DataFrame) -> tuple[float, float]:
    """Room for the bars and spreads of all sizes."""
    spread = summary["std"].fillna(0.0)
    low, high = (summary["accuracy"] - spread).min(), (summary["accuracy"] + spread).max()
    return max(0.0, float(low) - 0.1), float(high) + 0.02


def _checked(summary: object) -> pd.DataFrame:
    check_columns(summary, _COLUMNS)
    if summary.empty:
        raise ValueError("summary is empty; give at least one method at one size")
    twice = summary[summary.duplicated(["train_size", "method"])]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(f"{row['method']} is there twice for {row['train_size']} images; give one task at a time")
    return summary
