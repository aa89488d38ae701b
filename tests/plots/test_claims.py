"""Cases of a claim: places, intervals and colours as the table says."""

import pandas as pd
import pytest

from subtuning_lab.plots import style
from subtuning_lab.plots.claims import plot_cases


def table(*rows: tuple) -> pd.DataFrame:
    common = {"claim": "a claim", "notebook": "04", "network": "net", "unit": "points", "n": 3}
    return pd.DataFrame([common | dict(zip(("where", "difference", "low", "high"), row, strict=True)) for row in rows])


def test_cases_stand_from_top_to_bottom_in_points():
    ax = plot_cases(table(("first", 0.02, 0.01, 0.03), ("second", -0.02, -0.05, 0.01), ("third", -0.2, -0.3, -0.1)))
    assert [label.get_text() for label in ax.get_yticklabels()][::-1] == [
        f"{name}  (n = 3)" for name in ("first", "second", "third")
    ]
    drawn = {float(bar.lines[0].get_ydata()[0]): bar for bar in ax.containers}
    assert [float(drawn[place].lines[0].get_xdata()[0]) for place in (2, 1, 0)] == pytest.approx([2, -2, -20])
    assert [drawn[place].lines[0].get_color() for place in (2, 1, 0)] == [style.BLUE, style.DARK, style.ORANGE]
    (ends,) = drawn[0].lines[2][0].get_segments()
    assert ends[:, 0] == pytest.approx([-30, -10])


def test_cases_of_several_networks_name_theirs():
    rows = pd.concat([table(("here", 0.1, 0.0, 0.2)).assign(network="one large"), table(("there", 0.1, 0.0, 0.2))])
    ax = plot_cases(rows)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["net: there  (n = 3)", "one: here  (n = 3)"]
    assert ax.get_title().split("\n")[1:3] == ["one large", "net"]


def test_only_one_claim_that_was_tried_is_drawn():
    with pytest.raises(ValueError, match="nothing was tried"):
        plot_cases(table(("nowhere", float("nan"), float("nan"), float("nan"))))
    two = pd.concat([table(("here", 0.1, 0.0, 0.2)), table(("there", 0.1, 0.0, 0.2)).assign(claim="another")])
    with pytest.raises(ValueError, match="2 claims"):
        plot_cases(two)
