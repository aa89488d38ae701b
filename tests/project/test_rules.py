"""Every rule in the package, wherever it stands: what it forbids is refused by name, before any work."""

import importlib
import inspect
import pkgutil

import pytest

import subtuning_lab


def ruled():
    """Name -> function, method or making of a class that has rules, public or not."""
    found = {}
    for info in pkgutil.walk_packages(subtuning_lab.__path__, "subtuning_lab."):
        for thing in vars(importlib.import_module(info.name)).values():
            if getattr(thing, "__module__", None) == info.name:
                members = [thing.__init__, *vars(thing).values()] if inspect.isclass(thing) else [thing]
                functions = [getattr(member, "__func__", member) for member in members]
                found |= {f"{info.name}.{f.__qualname__}": f for f in functions if hasattr(f, "rules")}
    return found


RULED = ruled()


@pytest.mark.parametrize("name", RULED)
def test_what_a_rule_forbids_is_refused_before_anything_else(name):
    """Even before an argument is missed: nothing but the wrong value is given."""
    for parameter, rule in RULED[name].rules.items():
        wrong = [*rule.wrong()]
        assert wrong
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match=rf"^{parameter}(\[[^]]*\])* is .*; it must "):
                RULED[name](**{parameter: value})


def test_rules_are_found_everywhere():
    rooms = {name.split(".")[1] for name in RULED}
    assert {"nets", "data", "engine", "inference", "study", "search", "baselines", "theory", "plots"} <= rooms
    assert len(RULED) > 150 and "subtuning_lab.engine.recipe.Recipe.__init__" in RULED
