"""Figures of active learning: every method has its panel, every strategy its line, with spread and n."""

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from subtuning_lab.plots.active import plot_strategies

matplotlib.use("Agg")
SUMMARY = pd.DataFrame(
    [
        (method, strategy, size, start + size / 200 + bonus, 0.02, 3)
        for method, start in (("linear probing", 0.5), ("SubTuning", 0.2))
        for strategy, bonus in (("random", 0.0), ("margin", 0.1))
        for size in (20, 40, 80)
    ],
    columns=["method", "strategy", "train_size", "accuracy", "std", "n"],
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_every_method_has_a_panel_and_every_strategy_a_line():
    axes = plot_strategies(SUMMARY)
    assert [ax.get_title().split("\n")[0] for ax in axes] == ["linear probing", "SubTuning"]
    for ax, (_, own) in zip(axes, SUMMARY.groupby("method", sort=False), strict=True):
        assert "n = 3" in ax.get_title() and ax.get_xlabel() == "labelled images"
        lines = {line.get_label(): line for line in ax.lines}
        for strategy in ("random", "margin"):
            rows = own[own["strategy"] == strategy]
            assert lines[strategy].get_xdata().tolist() == rows["train_size"].tolist()
            assert lines[strategy].get_ydata().tolist() == rows["accuracy"].tolist()
        assert len(ax.collections) == 2
    assert axes[0].get_legend() is None
    low, high = axes[0].get_ylim()
    assert axes[1].get_ylim() == (low, high) and low < SUMMARY["accuracy"].min() and high > SUMMARY["accuracy"].max()
    assert max(axes[0].get_yticks()) <= 1.0
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["random", "margin"]


def test_given_axes_are_used_if_there_are_enough():
    _, axes = plt.subplots(1, 2)
    assert plot_strategies(SUMMARY, axes) == list(axes)
    with pytest.raises(ValueError, match="1 axes for 2 methods: linear probing, SubTuning"):
        plot_strategies(SUMMARY, axes[:1])
