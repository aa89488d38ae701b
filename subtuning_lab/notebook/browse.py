"""Panels over finished results: another epsilon, another number of images, another way back. Nothing is trained."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import ipywidgets as widgets
import pandas as pd
from matplotlib.axes import Axes

from subtuning_lab.experiments.claims import NOT_TESTED, claim_cases, verdicts
from subtuning_lab.notebook.panel import Panel, Picture, slider_or_list
from subtuning_lab.plots import style
from subtuning_lab.plots.ablations import INTERPOLATION, check_kinds, plot_alphas, plot_interpolation
from subtuning_lab.plots.claims import CASES, plot_cases
from subtuning_lab.plots.comparison import name_rounds, plot_curves, plot_methods, plot_trace, trace_width
from subtuning_lab.plots.profiles import network_width, plot_network
from subtuning_lab.search.greedy import GreedyResult
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is, Real, Text, checked

_CASES = replace(CASES, none=True)
_STEP = 0.005  # half a point of accuracy: finer than what few images can tell
_IMAGES = {"target": "the task", "clean": "clean images"}


class TracePanel(Panel):
    """Drag epsilon, and see which rounds the search would have made and which blocks it would have chosen.

    Every position of the slider is `search.replay`.

    Args:
        search: in one direction; one with epsilon=-inf ("backward": inf) can be replayed with any epsilon.
        epsilon: where the slider stands at first.

    Raises:
        ValueError: a search in both directions, or an epsilon that `greedy_subtuning` does not take.
    """

    @checked(search=Is(GreedyResult), epsilon=Real(infinite=True))
    def __init__(self, search: GreedyResult, epsilon: float = 0.0):
        if search.direction == "both":
            raise ValueError("search went in both directions; it must be one with direction forward or backward")
        search.replay(epsilon)  # refuses a wrong one before anything is shown
        self.search, self._limits = search, _room(search)
        top = max(_top(search), math.ceil(epsilon / _STEP) * _STEP if math.isfinite(epsilon) else 0.0)
        start = max(0.0, min(epsilon, top))
        look = {"readout_format": ".1%", "description": "epsilon", "layout": widgets.Layout(width="480px")}
        self.choice = widgets.FloatSlider(start, min=0.0, max=top, step=_STEP, **look)
        self.network, self.figure = Picture(), Picture()
        super().__init__(self.choice, self.network, self.figure)
        self.follow(self.choice)

    @property
    def replayed(self) -> GreedyResult:
        """What the search gives with the slider's epsilon."""
        return self.search.replay(round(self.choice.value, 6))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that this epsilon chooses."""
        return self.replayed.blocks

    @property
    def facts(self) -> str:
        now = self.replayed
        chosen = " + ".join(now.blocks) or "no block (linear probing)"
        text = f"epsilon {now.epsilon:.1%}: {chosen}, {style.percent(now.accuracy, now.std)}, n = {now.n}"
        rounds, trainings = now.trace["round"].max(), now.cost.trainings
        text += f"; {rounds} of {self.search.trace['round'].max()} rounds, {trainings} trainings"
        return text if now.complete else f"{text}; the search ended here, later rounds are not known"

    def _redraw(self) -> None:
        now, names = self.replayed, self.search.block_names
        self.network.draw(lambda ax: plot_network(names, now.blocks, ax=ax), network_width(names), 1.4)
        width = trace_width(1 + self.search.trace["round"].max())
        self.figure.draw(lambda ax: self._paint(ax, now), width, 4.4)

    def _paint(self, ax: Axes, now: GreedyResult) -> None:
        """The rounds of this epsilon on the axes of the whole search, so that positions of the slider compare."""
        plot_trace(now.trace, now.block_names, now.epsilon if now.direction == "forward" else None, ax)
        last, rounds = now.trace["round"].max(), self.search.trace["round"].max()
        name_rounds(ax, range(rounds + 1))
        ax.set_ylim(*self._limits)
        for number in range(last + 1, rounds + 1):
            ax.text(number, sum(self._limits) / 2, "not needed", color=style.GREY, ha="center", fontsize=9)
        ax.set_title(self.facts, fontsize=10)


class SizePanel(Panel):
    """Drag the number of training images along finished curves, and see the bars of all methods there.

    Args:
        summary: of `summarize_repeats`, of one task: rows with `train_size`, `method`, `accuracy`, `std` and `n`.

    Raises:
        ValueError: a method that is there twice for one size.
    """

    @checked(summary=Table(("method",), ("train_size", "accuracy", "std", "n")))
    def __init__(self, summary: pd.DataFrame):
        twice = summary[summary.duplicated(["train_size", "method"])]
        if len(twice):
            row = twice.iloc[0]
            raise ValueError(f"{row['method']} is there twice for {row['train_size']} images; give one task at a time")
        self.summary, sizes = summary, sorted(summary["train_size"].unique().tolist())
        look = {"style": {"description_width": "initial"}, "layout": widgets.Layout(width="480px")}
        self.choice = slider_or_list(sizes, value=sizes[0], description="training images", **look)
        self.curves, self.bars = Picture(), Picture()
        super().__init__(self.choice, self.curves, self.bars)
        self.follow(self.choice)

    @property
    def rows(self) -> pd.DataFrame:
        """The methods at the chosen size, the best first."""
        rows = self.summary[self.summary["train_size"] == self.choice.value]
        return rows.sort_values("accuracy", ascending=False, kind="stable")

    @property
    def facts(self) -> str:
        methods = [f"{r.method} {style.percent(r.accuracy, r.std)}, n = {r.n}" for r in self.rows.itertuples()]
        return f"{self.choice.value} training images: " + "; ".join(methods)

    def _redraw(self) -> None:
        self.curves.draw(self._paint_curves, 8.6, 3.4)
        self.bars.draw(self._paint_bars, 8.6, 1.1 + 0.34 * self.summary["method"].nunique())

    def _paint_curves(self, ax: Axes) -> None:
        """The curves, with a line where the slider stands."""
        plot_curves(self.summary, ax=ax)
        ax.axvline(self.choice.value, color=style.GREY, linestyle=":", linewidth=1.5)

    def _paint_bars(self, ax: Axes) -> None:
        """The bars of one size on the axis of all sizes, so that positions of the slider compare."""
        plot_methods(self.rows, ax=ax)
        spread = style.spread_of(self.summary)
        low, high = (self.summary["accuracy"] - spread).min(), (self.summary["accuracy"] + spread).max()
        ax.set_xlim(max(0.0, float(low) - 0.1), float(high) + 0.02)
        ax.set_title(f"{self.choice.value} training images: {ax.get_title()}", fontsize=10)


class AlphaPanel(Panel):
    """Drag alpha from the pretrained blocks to the tuned ones, and see what is gained and what is forgotten.

    Every position of the slider is an alpha of the table.

    Args:
        summary: of `summarize_interpolation`, with both kinds of images.
        alpha: where the slider stands at first.

    Raises:
        ValueError: a kind of images that is missing, fewer than two alphas, or an alpha that isn't there.
    """

    @checked(summary=INTERPOLATION, alpha=Real())
    def __init__(self, summary: pd.DataFrame, alpha: float = 1.0):
        check_kinds(summary)
        self.summary, alphas = summary, sorted(summary["alpha"].unique().tolist())
        if len(alphas) < 2:
            raise ValueError("summary has fewer than two alphas; a slider needs at least two")
        if alpha not in alphas:
            raise ValueError(f"alpha is {alpha}; the table has {', '.join(f'{each:g}' for each in alphas)}")
        options = [(f"{each:g}", each) for each in alphas]
        self.choice = widgets.SelectionSlider(options=options, value=alpha, description="alpha")
        self.choice.layout = widgets.Layout(width="480px")
        self.curves, self.corner = Picture(), Picture()
        super().__init__(self.choice, widgets.HBox([self.curves, self.corner]))
        self.follow(self.choice)

    @property
    def facts(self) -> str:
        rows = self.summary[self.summary["alpha"] == self.choice.value].set_index("images").loc[[*_IMAGES]]
        scores = zip(_IMAGES.values(), rows["accuracy"], rows["std"], rows["n"], strict=True)
        texts = [f"{label} {style.percent(mean, std)}, n = {int(n)}" for label, mean, std, n in scores]
        return f"alpha {self.choice.value:g}: " + "; ".join(texts)

    def _redraw(self) -> None:
        alpha = self.choice.value
        self.curves.draw(lambda ax: plot_interpolation(self.summary, alpha, ax=ax), 6.0, 3.6)
        self.corner.draw(lambda ax: plot_alphas(self.summary, alpha, ax=ax), 4.4, 3.6)
        self.say(self.facts)


class RealPanel(Panel):
    """Choose a claim of the paper, and see what real networks on photographs say to it. Nothing is trained.

    Args:
        notebook: its number or name, e.g. "04_low_data": the claims that it tries.
        cases: of `claim_cases`; by default those that come with the package.

    Raises:
        ValueError: a notebook that tries no claim.
    """

    @checked
    def __init__(self, notebook: Annotated[str, Text()], cases: Annotated[pd.DataFrame | None, _CASES] = None):
        cases = claim_cases() if cases is None else cases
        self.cases = cases[cases["notebook"].str.startswith(notebook)]
        if self.cases.empty:
            known = ", ".join(cases["notebook"].unique())
            raise ValueError(f"notebook {notebook!r} tries no claim; there are {known}")
        look = {"description": "claim", "layout": widgets.Layout(width="640px")}
        self.choice = widgets.Dropdown(options=[*self.cases["claim"].unique()], **look)
        self.figure = Picture()
        super().__init__(self.choice, self.figure)
        self.follow(self.choice)

    @property
    def facts(self) -> str:
        row = next(verdicts(self._chosen).itertuples())
        if row.verdict == NOT_TESTED:
            return f"{row.claim}: not tested on a real network yet"
        counts = f"{row.speak_for} cases speak for it, {row.against} against, {row.undecided} are undecided"
        return f"{row.claim}: {row.verdict} on real networks ({counts})"

    @property
    def _chosen(self) -> pd.DataFrame:
        return self.cases[self.cases["claim"] == self.choice.value]

    def _redraw(self) -> None:
        tried = self._chosen.dropna(subset=["difference"])
        self.figure.layout.display = None if len(tried) else "none"
        if len(tried):
            self.figure.draw(lambda ax: plot_cases(tried, ax), 9.4, 1.6 + 0.34 * len(tried))
        self.say(self.facts)


def _room(search: GreedyResult) -> tuple[float, float]:
    """Limits for all candidates, the labels and error bars of those kept, and the line of the largest epsilon."""
    rows = search.trace
    spread = style.spread_of(rows).where(rows["kept"], 0.0)
    low, high = (rows["accuracy"] - spread).min(), (rows["accuracy"] + spread).max()
    room = max(0.05, high - low)
    return float(low - 0.05 * room), float(high + 0.2 * room)


def _top(search: GreedyResult) -> float:
    """The first step of the slider at which the path is decided for good: no gain, or loss, is larger."""
    steps = search.trace.loc[search.trace["kept"], "gain"].abs()
    largest = 0.0 if steps.dropna().empty else float(steps.max())
    return (math.floor(largest / _STEP + 1e-9) + 1) * _STEP
