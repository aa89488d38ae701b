"""Panels of closed forms: what the paper's rate is made of, while its numbers are moved by sliders."""

from __future__ import annotations

import math

import ipywidgets as widgets
import pandas as pd

from subtuning_lab.notebook.panel import Panel, Picture, described
from subtuning_lab.plots.bounds import plot_terms
from subtuning_lab.theory.bounds import Bound, bound_table, full_finetuning_bound, selection_price, subtuning_bound
from subtuning_lab.utils.validation import Real, Whole, checked

SUBTUNING, FULL = "SubTuning", "full finetuning"
_LARGEST_N = 10**7
_DELTA = Real(0, 1e6, above=True, below=True)


class BoundPanel(Panel):
    """Move sliders, and see the terms of the paper's rate for SubTuning and for full finetuning; constant 1 in both.

    Args:
        n: training examples, m in the paper.
        tuned_params: r', tuned parameters.
        params: r, all parameters; no slider.
        delta: distance of the tuned parameters from the pretrained ones.
        n_blocks: L, blocks of the backbone.
        max_blocks: k, blocks that greedy tunes at most.
        confidence: in (0, 1).
        full_delta: distance that full finetuning goes; None means always SubTuning's.

    Raises:
        ValueError: more tuned parameters than there are, or an argument that the bounds don't take.
    """

    @checked(
        **dict.fromkeys(("n", "tuned_params", "params"), Whole(1, 10**12)),
        **dict.fromkeys(("n_blocks", "max_blocks"), Whole(1, 10**6)),
        delta=_DELTA,
        confidence=Real(0, 1, above=True, below=True),
        full_delta=_DELTA.or_none(),
    )
    def __init__(
        self,
        *,
        n: int,
        tuned_params: int,
        params: int,
        delta: float,
        n_blocks: int,
        max_blocks: int = 1,
        confidence: float = 0.95,
        full_delta: float | None = None,
    ):
        Whole(1, params).check("tuned_params", tuned_params)
        Whole(1, n_blocks).check("max_blocks", max_blocks)
        self.params, self.full_delta = params, full_delta
        self.n = _log_slider("m, examples", n, min(10, n), max(_LARGEST_N, n))
        self.tuned_params = _log_slider("r', tuned", tuned_params, 1, params)
        self.delta = _log_slider("Δ, distance", delta, min(0.01, delta), max(100.0, delta))
        self.n_blocks = _slider(widgets.IntSlider, "L, blocks", n_blocks, 1, max(60, n_blocks), 1)
        self.max_blocks = _slider(widgets.IntSlider, "k, at most", max_blocks, 1, n_blocks, 1)
        low, high = min(0.5, confidence), max(0.999, confidence)
        self.confidence = _slider(widgets.FloatSlider, "confidence", confidence, low, high, 0.001)
        self.confidence.readout_format = ".3f"
        self.sliders = (self.n, self.tuned_params, self.delta, self.n_blocks, self.max_blocks, self.confidence)
        self.figure = Picture()
        columns = [widgets.VBox(self.sliders[:3]), widgets.VBox(self.sliders[3:])]
        super().__init__(widgets.HBox(columns), self.figure)
        self.follow(*self.sliders)

    @property
    def bounds(self) -> dict[str, Bound]:
        """The two bounds of the gap that are shown."""
        common, delta = {"n": round(self.n.value), "confidence": self.confidence.value}, self.delta.value
        choice = {"n_blocks": self.n_blocks.value, "max_blocks": self.max_blocks.value}
        few = subtuning_bound(delta=delta, tuned_params=round(self.tuned_params.value), **choice, **common)
        distance = delta if self.full_delta is None else self.full_delta
        return {SUBTUNING: few, FULL: full_finetuning_bound(params=self.params, delta=distance, **common)}

    @property
    def table(self) -> pd.DataFrame:
        """Of `bound_table`."""
        return bound_table(self.bounds)

    @property
    def facts(self) -> str:
        few, full = self.bounds.values()
        factor = max(1.0, selection_price(self.n_blocks.value, self.max_blocks.value, "evaluations"))
        most = self.params / (factor * few.inputs["delta"] / full.inputs["delta"]) ** 2
        better = SUBTUNING if few.value < full.value else FULL
        return (
            f"m = {few.inputs['n']:,}, r' = {few.inputs['tuned_params']:,} of {self.params:,}, "
            f"Δ = {few.inputs['delta']:.3g} and {full.inputs['delta']:.3g}, factor log(kL) = {factor:.2f}\n"
            f"smaller rate: {better}; SubTuning's is smaller as long as r' < {min(most, self.params):,.0f}"
        )

    def _redraw(self) -> None:
        self._holding = True
        self.max_blocks.max = self.n_blocks.value  # lowers k with it
        self._holding = False
        table, facts = self.table, self.facts
        self.figure.draw(lambda ax: plot_terms(table, ax=ax).set_title(facts, fontsize=9, pad=26), 9.6, 2.9)


def _slider(kind: type, name: str, value: float, low: float, high: float, step: float, **more: object):
    look = {"description": name, "continuous_update": False, **described(380, 90), **more}
    return kind(value=value, min=low, max=high, step=step, **look)


def _log_slider(name: str, value: float, low: float, high: float) -> widgets.FloatLogSlider:
    low, high = math.log10(low) - 1e-9, math.log10(high) + 1e-9  # a hair more, so that the ends themselves fit
    return _slider(widgets.FloatLogSlider, name, value, low, high, 0.01, base=10, readout_format=".3g")
