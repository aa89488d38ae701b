"""Figures of ablations: what is drawn is what the tables say."""

import numpy as np
import pandas as pd
import pytest

from subtuning_lab import plot_alphas, plot_differences, plot_interpolation, plot_stability, plot_variants
from tests.plots import texts, ticks


@pytest.fixture
def curve():
    rows = [
        (a, images, mean, 0.02, n) for images, n in (("target", 6), ("clean", 3)) for a, mean in VALUES[images].items()
    ]
    return pd.DataFrame(rows, columns=["alpha", "images", "accuracy", "std", "n"])


VALUES = {"target": {0.0: 0.5, 0.5: 0.9, 1.0: 0.8}, "clean": {0.0: 1.0, 0.5: 0.95, 1.0: 0.7}}


def test_variants_stand_side_by_side():
    rows = [(s, m, 0.5 + 0.1 * i + 0.01 * j, 0.02, 3) for i, s in enumerate("ab") for j, m in enumerate(("x", "y"))]
    ax = plot_variants(pd.DataFrame(rows, columns=["subset", "method", "accuracy", "std", "n"]))
    lines = {bars.get_label(): bars[0].get_xydata() for bars in ax.containers}
    assert ticks(ax.xaxis) == ["a", "b"]
    for j, (name, sign) in enumerate((("x", -1), ("y", 1))):
        np.testing.assert_allclose(lines[name][:, 1], [0.5 + 0.01 * j, 0.6 + 0.01 * j])
        assert np.all(np.sign(lines[name][:, 0] - [0, 1]) == sign)
    assert "n = 3" in ax.get_title()


def test_differences_show_one_and_two_errors_and_name_what_varies():
    rows = [("a", "deep", 0.10, 0.02, 4), ("b", "deep", -0.10, 0.02, 4), ("c", "deep", 0.01, 0.02, 4)]
    table = pd.DataFrame(rows, columns=["subset", "variant", "difference", "error", "n"])
    ax = plot_differences(table)
    assert ticks(ax.yaxis) == ["c", "b", "a"]  # the first row on top
    assert ax.get_xlabel().startswith("deep")
    thin, thick = (bars.get_segments() for bars in ax.collections[:2])
    np.testing.assert_allclose(thin[2][:, 0], [0.06, 0.14])
    np.testing.assert_allclose(thick[2][:, 0], [0.08, 0.12])
    colours = [tuple(colour) for colour in ax.collections[2].get_facecolors()]
    assert len(set(colours)) == 3  # ahead, behind, and neither beyond two errors
    both = pd.concat([table, table.assign(variant="wide")])
    assert plot_differences(both).get_yticklabels()[-1].get_text() == "deep, a"
    assert plot_differences(both[both["subset"] == "a"]).get_yticklabels()[0].get_text() == "wide"


def test_interpolation_has_a_line_for_each_kind_of_images(curve):
    ax = plot_interpolation(curve.sample(frac=1, random_state=0), 0.5)
    for line, images, n in zip(ax.lines, ("target", "clean"), (6, 3), strict=False):
        np.testing.assert_allclose(line.get_xydata(), list(VALUES[images].items()))
        assert f"n = {n}" in line.get_label()
    assert list(ax.lines[2].get_xdata()) == [0.5, 0.5]


def test_the_chosen_alpha_is_filled(curve):
    ax = plot_alphas(curve, 0.5)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [(1.0, 0.5), (0.95, 0.9), (0.7, 0.8)])
    assert ax.containers[0][0].get_xydata().tolist() == [[0.95, 0.9]]
    assert set(texts(ax)) == {"alpha 0", "alpha 1"}
    with pytest.raises(ValueError, match="alpha is 0.3; the table has 0, 0.5, 1"):
        plot_alphas(curve, 0.3)


STABILITY = pd.DataFrame(
    [("long", True, 1.0, 0.7, 0.2, 0.9, 9, 4), ("short", False, 0.8, 0.4, -0.1, 0.8, 9, 4)],
    columns=["setting", "reference", "spearman", "halves", "halves_low", "halves_high", "n", "scores"],
)


def test_stability_shows_the_ceiling_of_the_reference():
    ax = plot_stability(STABILITY)
    with pytest.raises(ValueError, match="table has 0 references"):
        plot_stability(STABILITY.iloc[1:])
    assert ticks(ax.yaxis) == ["short", "long (reference)"]
    filled, hollow = (points.get_offsets() for points in ax.collections[1:3])
    np.testing.assert_allclose(filled, [(0.4, 0), (0.7, 1)])
    np.testing.assert_allclose(hollow, [(0.8, 0)])  # the reference against itself says nothing
    assert list(ax.lines[0].get_xdata()) == [0.7, 0.7]
