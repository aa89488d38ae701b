"""Rules refuse what they say they refuse, and every wrong value that they make is one."""

import math

import numpy as np
import pandas as pd
import pytest

from subtuning_lab.utils.containers import Blocks, Either, Mapped, Numbers, Table
from subtuning_lab.utils.validation import Flag, Has, Is, OneOf, Real, Several, Text, Whole, check_all, checked, shown

RULES = {
    "whole": Whole(1, 5),
    "whole or none": Whole(1, none=True),
    "any whole": Whole(None),
    "share": Real(0, 1, below=True),
    "above": Real(0, above=True),
    "infinite": Real(0, infinite=True),
    "choice": OneOf(("a", "b", None)),
    "flag": Flag(),
    "text": Text(none=True),
    "class": Is((dict, "Chain")),
    "attributes": Has(("items", "keys"), "a mapping"),
    "list": Several(Whole(1), least=2, unique=True),
    "empty list": Several(Text(), least=0),
    "pair": Several(Real(0), least=2, most=2),
    "blocks": Blocks(),
    "table": Table(("method",), ("accuracy", "std")),
    "any table": Table(rows=0, none=True),
    "numbers": Numbers(0, 1),
    "mapping": Mapped(Real(0)),
    "any mapping": Mapped(least=0, none=True),
    "either": Either(Real(0), Mapped(Real(0, above=True)), none=True),
}
ALLOWED = {
    "whole": [1, 5, np.int64(3)],
    "whole or none": [1, None],
    "any whole": [-3, 0],
    "share": [0, 0.999, np.float32(0.5)],
    "above": [1e-9, 1e300, np.float64(2)],
    "infinite": [math.inf, 0],
    "choice": ["a", None],
    "flag": [True, np.bool_(False)],
    "text": ["x", None],
    "class": [{}, type("Chain", (), {})()],
    "attributes": [{}],
    "list": [[1, 2], (3, 4), np.array([5, 6])],
    "empty list": [[], ["x"], {"x": 1}.keys()],
    "pair": [(0, 1.5), np.zeros(2)],
    "blocks": ["all", [], ["a"], {"a"}, (name for name in "ab")],
    "table": [pd.DataFrame({"method": ["a"], "accuracy": [1], "std": [None]})],
    "any table": [pd.DataFrame(), None],
    "numbers": [[0, 0.5], (1,), np.array([0.2], dtype=np.float32)],
    "mapping": [{"a": 0.0, "b": 3}],
    "any mapping": [{}, {"a": object()}, None],
    "either": [0, {"a": 1.0}, None],
}


@pytest.mark.parametrize("name", RULES)
def test_allowed_values_pass_and_wrong_ones_are_named(name):
    rule, wrong = RULES[name], [*RULES[name].wrong()]
    for value in ALLOWED[name]:
        rule.check("it", value)
    assert len(wrong) >= 2
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=r"^it(\[[^]]*\])* is .*; it must be ") as caught:
            rule.check("it", value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_type_is_a_type_error_and_a_limit_a_value_error():
    for rule, value, kind in [
        (Whole(1), 1.5, TypeError),
        (Whole(1), True, TypeError),
        (Whole(1), 0, ValueError),
        (Real(0), "1", TypeError),
        (Real(0), math.nan, ValueError),
        (Real(0, above=True), 0, ValueError),
        (Several(Whole(1)), "12", TypeError),
        (Several(Whole(1)), (i for i in [1]), TypeError),
        (Several(Whole(1)), [], ValueError),
        (Several(Whole(1), unique=True), [1, 1], ValueError),
        (Several(Whole(1), least=2, most=2), [1, 1, 1], ValueError),
        (Blocks(), "layer1", TypeError),
        (Real(0), 10**400, ValueError),
        (Numbers(0), -1.0, TypeError),
        (Numbers(0), [-1.0], ValueError),
        (Either(Real(0), Numbers(0)), -1.0, ValueError),
        (Either(Real(0), Mapped(Real(0))), {"a": -1.0}, ValueError),
        (Either(Real(0), Mapped(Real(0))), "1", TypeError),
    ]:
        with pytest.raises(kind):
            rule.check("it", value)


def test_messages_say_the_limits():
    with pytest.raises(ValueError, match=r"^lr is 0; it must be a finite number above 0 and at most 1$"):
        Real(0, 1, above=True).check("lr", 0)
    with pytest.raises(ValueError, match=r"^sizes\[1\] is 0; it must be a whole number at least 1$"):
        Several(Whole(1)).check("sizes", [2, 0])


def test_a_checked_function_refuses_before_it_starts():
    started = []

    @checked(n=Whole(1), names=Several(Text()))
    def run(n, names=("a",), free=None):
        started.append((n, free))
        return n

    assert run(2, free=[]) == 2 and run.rules["n"] == Whole(1) and run.__name__ == "run"
    for wrong in ({"n": 0}, {"n": 1, "names": "text"}, {"names": []}):  # a missing argument hides nothing
        with pytest.raises((TypeError, ValueError), match="it must be"):
            run(**wrong)
    assert started == [(2, [])]
    with pytest.raises(TypeError, match="missing"):
        run()
    with pytest.raises(TypeError, match="no parameter m"):
        checked(m=Whole())(lambda n: n)


def test_numbers_of_numpys_become_pythons():
    @checked(n=Whole(1), share=Real(0))
    def kinds(n, *rest, share=0.5, free=None):
        return type(n), type(share), rest, type(free)

    assert kinds(np.int64(2), 3, share=np.float32(0.5), free=np.int8(1)) == (int, float, (3,), np.int8)
    assert kinds(n=np.uint8(2)) == (int, float, (), type(None))


def test_fields_are_checked_by_name():
    check_all({"epochs": 1, "other": object()}, {"epochs": Whole(1)})
    with pytest.raises(ValueError, match="epochs is 0"):
        check_all({"epochs": 0}, {"epochs": Whole(1), "absent": Whole(1)})


def test_shown_values_are_short_and_on_one_line():
    assert shown("a\x1b\nb") == "'a\\x1b\\nb'" and len(shown(["x" * 500])) == 80
