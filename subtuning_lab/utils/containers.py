"""Rules for values that hold others: subsets, lists of numbers, mappings and tables. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from subtuning_lab.utils.validation import Rule, beyond, is_number, limits


@dataclass(frozen=True)
class Blocks(Rule):
    """A subset of a network: names of its parts, or "all". Whether a network has them it can say alone."""

    none: bool = False
    allowed = 'a list of names of parts, e.g. ["layer3.0"], or "all"'

    def error_of(self, value: object) -> type[Exception] | None:
        if value is None or isinstance(value, str | bytes | Mapping):
            return None if value == "all" else TypeError
        if not isinstance(value, Iterable):
            return TypeError
        listed = value if isinstance(value, Collection) else ()  # a generator is read once, and not here
        return None if all(isinstance(name, str) for name in listed) else TypeError

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield from ("layer3.0", 5, [3], [None])


@dataclass(frozen=True)
class Numbers(Rule):
    """A list or array (n,) of finite numbers from `low` to `high`, at least one; numpy checks all at once."""

    low: float | None = None
    high: float | None = None
    none: bool = False

    @property
    def allowed(self) -> str:
        """The limits in words."""
        return f"a list or array (n,) of at least 1 finite number{limits(self.low, self.high)}"

    def error_of(self, value: object) -> type[Exception] | None:
        listed = isinstance(value, Sequence) or hasattr(value, "__array__")
        if isinstance(value, str | bytes) or not listed:
            return TypeError
        try:
            array = np.asarray(value)
        except ValueError:  # lists of different lengths
            return ValueError
        if array.dtype.kind not in "iuf":
            return TypeError
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        fits = array.ndim == 1 and array.size and (np.isfinite(array) & (array >= low) & (array <= high)).all()
        return None if fits else ValueError

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield from ("text", 5, [], ["a"], [True], [[1.0]], [[1.0], [1.0, 2.0]], [math.nan], [math.inf])
        yield from ([limit] for limit in beyond(self.low, self.high))


@dataclass(frozen=True)
class Mapped(Rule):
    """A mapping of names to values that fit a rule.

    Args:
        each: rule of every value; None leaves them to the function.
        least: fewest names.
    """

    each: Rule | None = None
    least: int = 1
    none: bool = False

    @property
    def allowed(self) -> str:
        """What the values may be in words."""
        each = f", each to {self.each.allowed}" if self.each else ""
        return f"a mapping of at least {self.least} name{'s' * (self.least != 1)}{each}"

    def check(self, name: str, value: object) -> None:
        super().check(name, value)
        for key, item in (value or {}).items():
            if self.each is not None:
                self.each.check(f"{name}[{key!r}]", item)

    def error_of(self, value: object) -> type[Exception] | None:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return TypeError
        return None if len(value) >= self.least else ValueError

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield from ("text", 5, ["a"])
        yield from ({},) if self.least else ()
        if self.each is not None:
            yield from ({f"name {i}": item for i in range(max(1, self.least))} for item in self.each.wrong())


@dataclass(frozen=True)
class Either(Rule):
    """What one rule or another allows."""

    first: Rule
    second: Rule
    none: bool = False

    @property
    def allowed(self) -> str:
        """Both in words."""
        return f"{self.first.allowed}, or {self.second.allowed}"

    def check(self, name: str, value: object) -> None:
        errors = [rule.error_of(value) for rule in (self.first, self.second)]
        for rule, error in zip((self.first, self.second), errors, strict=True):
            if error is None or (error is ValueError and errors.count(TypeError)):
                return rule.check(name, value)  # a list's rule looks at its values there
        return super().check(name, value)

    def error_of(self, value: object) -> type[Exception] | None:
        errors = (self.first.error_of(value), self.second.error_of(value))
        return None if None in errors else min(errors, key=[ValueError, TypeError].index)

    def wrong(self) -> Iterator[object]:
        for rule, other in ((self.first, self.second), (self.second, self.first)):
            yield from (value for value in rule.wrong() if other.error_of(value) and not (value is None and self.none))


@dataclass(frozen=True)
class Table(Rule):
    """A pandas table with some columns.

    Args:
        columns: names that it must have.
        numbers: those that hold numbers, or are missing; they need not be among `columns` again.
        rows: fewest rows.
    """

    columns: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    rows: int = 1
    none: bool = False

    @property
    def allowed(self) -> str:
        """Columns and rows in words."""
        names = ", ".join((*self.columns, *self.numbers))
        count = f"at least {self.rows} row{'s' * (self.rows > 1)}" if self.rows else "any number of rows"
        return f"a table with {f'columns {names} and ' if names else ''}{count}"

    def check(self, name: str, value: object) -> None:
        fault = self._fault(value) if self.error_of(value) is ValueError else ""
        if fault:
            raise ValueError(f"{name} is a table {fault}; it must be {self.allowed}{' or None' if self.none else ''}")
        super().check(name, value)

    def error_of(self, value: object) -> type[Exception] | None:
        if "DataFrame" not in {kind.__name__ for kind in type(value).__mro__}:
            return TypeError
        return ValueError if self._fault(value) else None

    def _fault(self, table: Any) -> str:
        missing = [name for name in (*self.columns, *self.numbers) if name not in table]
        if missing:
            return f"without column {missing[0]}"
        words = [name for name in self.numbers if not all(map(is_number, table[name].dropna()))]
        if words:
            return f"whose column {words[0]} holds something else than numbers"
        return "" if len(table) >= self.rows else f"of {len(table)} rows"

    def wrong(self) -> Iterator[object]:
        import pandas as pd

        yield from super().wrong()
        yield from ("text", 5, {"accuracy": [0.5]}, [[0.5]])
        names = (*self.columns, *self.numbers)
        yield from (pd.DataFrame({name: [0.5] for name in names if name != absent}) for absent in names[:2])
        yield from (pd.DataFrame(dict.fromkeys(names, ["text"])),) if self.numbers else ()
        yield from (pd.DataFrame(columns=names),) if self.rows else ()
