"""Panels over finished results: moved as a reader would move them, compared with searches run anew and with tables."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from subtuning_lab.notebook import AlphaPanel, RealPanel, SizePanel, TracePanel
from tests.notebook import ALPHAS, CURVES, SIZES, alpha_table, search, size_table
from tests.plots import ticks


@pytest.mark.parametrize(("direction", "start"), [("forward", -np.inf), ("backward", np.inf)])
def test_every_epsilon_equals_a_search_run_anew(direction, start):
    panel, seen = TracePanel(search(start, direction)), set()
    for epsilon in (0.0, 0.01, 0.035, 0.05, 0.195, panel.choice.max):
        panel.choice.value = epsilon
        anew = search(panel.choice.value, direction)
        assert panel.blocks == anew.blocks and panel.replayed.accuracy == anew.accuracy
        assert (" + ".join(anew.blocks) or "linear probing") in panel.facts and f"{anew.accuracy:.1%}" in panel.facts
        seen.add(panel.blocks)
    assert seen == ({("a", "b", "c"), ("a", "b"), ("b",), ()} if direction == "forward" else {("a", "c"), ()})
    assert panel.blocks == ()  # the slider reaches the end of the path


def test_a_trace_tells_its_spread_and_where_it_ends():
    assert "epsilon 2.0%: a + b, 74.0% ± 2.8%, n = 2" in TracePanel(search(), epsilon=0.02).facts
    assert "not known" not in TracePanel(search(0.03), epsilon=0.03).facts  # stopped after the third round was tried
    panel = TracePanel(search(0.05), epsilon=0.05)
    assert panel.blocks == ("b",) and "not known" not in panel.facts
    panel.choice.value = 0.0
    assert panel.blocks == ("a", "b") and "not known" in panel.facts


def test_a_later_start_widens_the_slider():
    panel = TracePanel(search(), epsilon=0.4)
    assert panel.choice.value == pytest.approx(0.4) and panel.blocks == ()


def test_what_cannot_be_replayed_is_refused():
    with pytest.raises(ValueError, match="both directions"):
        TracePanel(search(0.0, "both"))
    with pytest.raises(ValueError, match="epsilon is -0.1"):
        TracePanel(search(), epsilon=-0.1)


def test_every_size_shows_its_methods_the_best_first():
    panel = SizePanel(size_table().sample(frac=1, random_state=0))
    for i, size in enumerate(SIZES):
        panel.choice.value = size
        best_first = sorted(CURVES, key=lambda name: -CURVES[name][i])
        assert panel.rows["method"].tolist() == best_first and set(panel.rows["train_size"]) == {size}
        assert panel.facts.startswith(f"{size} training images: {best_first[0]} {CURVES[best_first[0]][i]:.1%} ± 2.0%")


def test_bars_of_all_sizes_share_one_axis():
    panel, seen = SizePanel(size_table()), set()
    for size in SIZES:
        panel.choice.value = size
        ax = matplotlib.figure.Figure().subplots()
        panel._paint_bars(ax)
        widths = dict(zip(ticks(ax.yaxis), (bar.get_width() for bar in ax.patches), strict=True))
        assert widths == {name: curve[SIZES.index(size)] for name, curve in CURVES.items()}
        seen.add(ax.get_xlim())
    ((low, high),) = seen
    assert low < 0.38 and high > 0.92


def test_one_size_and_no_spread_can_be_shown():
    table = size_table()
    panel = SizePanel(table[table["train_size"] == 50].assign(std=np.nan, n=1))
    assert panel.choice.value == 50 and "greedy 70.0%, n = 1" in panel.facts and "±" not in panel.facts


def test_every_alpha_tells_both_kinds_of_images():
    panel = AlphaPanel(alpha_table().sample(frac=1, random_state=0))
    assert panel.choice.value == 1.0
    for alpha in (0.5, 0.0):
        panel.choice.value = alpha
        task, clean = (f"{ALPHAS[images][alpha]:.1%} ± 2.0%, n = 3" for images in ("target", "clean"))
        assert panel.facts == f"alpha {alpha:g}: the task {task}; clean images {clean}"
        assert panel.facts in panel.status.value


@pytest.mark.parametrize(
    ("kind", "table", "message"),
    [
        (SizePanel, pd.concat([size_table(), size_table()[:1]]), "linear probing is there twice for 20"),
        (AlphaPanel, alpha_table()[:3], "no rows of clean"),
        (AlphaPanel, alpha_table().query("alpha == 1"), "fewer than two"),
        (AlphaPanel, alpha_table().assign(alpha=lambda t: t["alpha"] / 2), "alpha is 1.0; the table has 0, 0.25, 0.5"),
        (AlphaPanel, pd.concat([alpha_table()] * 2), "an alpha twice"),
    ],
)
def test_tables_that_a_slider_cannot_walk_are_named(kind, table, message):
    with pytest.raises(ValueError, match=message):
        kind(table)


def test_a_claim_is_shown_with_its_verdict_and_an_untested_one_without_a_figure():
    common = {"notebook": "04_low_data", "network": "net", "unit": "points", "n": 3}
    rows = [{"claim": "one", "where": "here", "difference": 0.02, "low": 0.01, "high": 0.03} | common]
    rows.append({"claim": "two", "where": None, "difference": np.nan, "low": np.nan, "high": np.nan} | common)
    panel = RealPanel("04", pd.DataFrame(rows))
    assert "one: shown on real networks (1 cases" in panel.facts and panel.figure.layout.display is None
    panel.choice.value = "two"
    assert "not tested" in panel.facts and panel.figure.layout.display == "none"
    with pytest.raises(ValueError, match="tries no claim"):
        RealPanel("99", pd.DataFrame(rows))
