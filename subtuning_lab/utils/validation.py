"""What an argument may be, declared once: rules check values, word the errors, and make wrong values for the tests.

    @checked(epochs=Whole(1), lr=Real(0, above=True))
    def train(epochs, lr): ...

    @checked
    def train(epochs: Annotated[int, Whole(1)], lr: Annotated[float, Real(0, above=True)]): ...

No torch.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from numbers import Real as RealNumber
from typing import Any, TypeVar

import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])
_PACKAGE = __name__.partition(".")[0]


class Rule:
    """What one value may be.

    A subclass says in words what is `allowed`, tells by `error_of` what is wrong with a value, and makes values that
    are `wrong`.
    """

    none: bool = False  # whether None is allowed, too
    allowed: str

    def check(self, name: str, value: object) -> None:
        """Raises TypeError for a value of another type, ValueError for one that is not allowed."""
        if value is None and self.none:
            return
        error = self.error_of(value)
        if error is not None:
            raise error(f"{name} is {shown(value)}; it must be {self.allowed}{' or None' if self.none else ''}")

    def error_of(self, value: object) -> type[Exception] | None:
        """The kind of error that a value deserves; None for an allowed one."""
        raise NotImplementedError

    def wrong(self) -> Iterator[object]:
        """Values that `check` refuses."""
        if not self.none:
            yield None

    def or_none(self) -> Rule:
        """The same rule, with None allowed, too."""
        return replace(self, none=True)


@dataclass(frozen=True)
class Whole(Rule):
    """A whole number (numpy's too, no bool) from `low` to `high`, both allowed."""

    low: int | None = 0
    high: int | None = None
    none: bool = False

    @property
    def allowed(self) -> str:
        """The limits in words."""
        return f"a whole number{limits(self.low, self.high)}"

    def error_of(self, value: object) -> type[Exception] | None:
        if _is_bool(value) or not isinstance(value, Integral):
            return TypeError
        return None if _within(value, self.low, self.high) else ValueError

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield from ("1", 1.5, True, math.nan, [1])
        yield from beyond(self.low, self.high)


@dataclass(frozen=True)
class Sides(Whole):
    """Height and width in pixels: one whole number if they are equal, or a pair."""

    low: int | None = 1
    pairs_only: bool = False

    @property
    def allowed(self) -> str:
        """One number or two in words."""
        pair = f"(height, width), each {super().allowed}"
        return pair if self.pairs_only else f"{super().allowed}, or {pair}"

    def error_of(self, value: object) -> type[Exception] | None:
        if isinstance(value, tuple | list):
            return ValueError if len(value) != 2 else next(filter(None, map(super().error_of, value)), None)
        return TypeError if self.pairs_only else super().error_of(value)

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield from ((8, 8, 8), (8, 0), (8, "8"))


@dataclass(frozen=True)
class Real(Rule):
    """A finite number (numpy's too, no bool) from `low` to `high`; `above` and `below` leave these out themselves."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    infinite: bool = False
    none: bool = False

    @property
    def allowed(self) -> str:
        """The limits in words."""
        return f"a {'' if self.infinite else 'finite '}number{limits(self.low, self.high, self.above, self.below)}"

    def error_of(self, value: object) -> type[Exception] | None:
        if _is_bool(value) or not isinstance(value, RealNumber):
            return TypeError
        try:
            number = float(value)  # numpy's float32 would overflow in comparisons
        except OverflowError:
            return ValueError
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            return ValueError
        outside = (self.above and number <= self.low) or (self.below and number >= self.high)
        return ValueError if outside or not _within(number, self.low, self.high) else None

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield from ("1", True, math.nan, [1.0])
        yield from () if self.infinite else (math.inf, -math.inf)
        yield from beyond(self.low, self.high)
        yield from (limit for limit, out in ((self.low, self.above), (self.high, self.below)) if out)


@dataclass(frozen=True)
class OneOf(Rule):
    """One of some plain values."""

    options: Collection[object]
    none: bool = False

    @property
    def allowed(self) -> str:
        """The options in words."""
        return f"one of {', '.join(map(str, self.options))}"

    def error_of(self, value: object) -> type[Exception] | None:
        same = [option for option in self.options if type(option) is type(value) and option == value]
        return None if same else ValueError

    def wrong(self) -> Iterator[object]:
        if not self.none and None not in self.options:
            yield None
        yield from ("no such option", 17, [])


@dataclass(frozen=True)
class Flag(Rule):
    """True or False, and nothing that merely counts as them."""

    none: bool = False
    allowed = "True or False"

    def error_of(self, value: object) -> type[Exception] | None:
        return None if _is_bool(value) else TypeError

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield from (1, "yes", [])


@dataclass(frozen=True)
class Text(Rule):
    """A string, not empty."""

    none: bool = False
    allowed = "a string, not empty"

    def error_of(self, value: object) -> type[Exception] | None:
        if not isinstance(value, str):
            return TypeError
        return None if value else ValueError

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield from ("", 3, b"bytes")


@dataclass(frozen=True)
class Is(Rule):
    """An instance of a class, or of one of several; given by name ("Chain") where its module is not to be imported."""

    kinds: type | str | tuple[type | str, ...]
    none: bool = False

    @property
    def allowed(self) -> str:
        """The classes in words."""
        names = [kind if isinstance(kind, str) else kind.__name__ for kind in self._kinds]
        return f"a {' or '.join(names)}"

    @property
    def _kinds(self) -> tuple[type | str, ...]:
        return self.kinds if isinstance(self.kinds, tuple) else (self.kinds,)

    def error_of(self, value: object) -> type[Exception] | None:
        ancestors = {kind.__name__ for kind in type(value).__mro__}
        known = (kind in ancestors if isinstance(kind, str) else isinstance(value, kind) for kind in self._kinds)
        return None if any(known) else TypeError

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield object()


@dataclass(frozen=True)
class Has(Rule):
    """Anything that has some attributes, such as whatever scores subsets as a study does.

    Args:
        names: of the attributes.
        allowed: what that is, in words.
    """

    names: tuple[str, ...]
    allowed: str
    none: bool = False

    def error_of(self, value: object) -> type[Exception] | None:
        is_class = isinstance(value, type)
        return TypeError if is_class or any(not hasattr(value, name) for name in self.names) else None

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield from (object(), "text", 5)


@dataclass(frozen=True)
class Several(Rule):
    """A list, tuple or alike of values that fit a rule; no string, and no generator, which could be read only once.

    Args:
        each: rule of every value.
        least, most: fewest and most values.
        unique: whether no value may come twice.
    """

    each: Rule
    least: int = 1
    unique: bool = False
    none: bool = False
    most: int | None = None

    @property
    def allowed(self) -> str:
        """What the values may be in words."""
        count = f"at least {self.least}" if self.least else "any number of"
        if self.most is not None:
            count = f"{self.least} to {self.most}" if self.least < self.most else f"{self.most}"
        values = "value" if count in ("1", "at least 1") else "values"
        return f"a list of {count} {values}, {'none twice, ' if self.unique else ''}each {self.each.allowed}"

    def check(self, name: str, value: object) -> None:
        if value is not None and self._list_error(value) is None:
            for i, item in enumerate(value):
                self.each.check(f"{name}[{i}]", item)
        super().check(name, value)

    def error_of(self, value: object) -> type[Exception] | None:
        error = self._list_error(value)
        items = () if error else (item for item in value if not (item is None and self.each.none))
        return error or next(filter(None, map(self.each.error_of, items)), None)

    def _list_error(self, value: object) -> type[Exception] | None:
        listed = isinstance(value, Collection) or hasattr(value, "__array__")
        if isinstance(value, str | bytes | Mapping) or not listed:
            return TypeError
        if self.unique and len({*map(repr, value)}) < len(value):
            return ValueError
        return None if self.least <= len(value) <= (self.most or len(value)) else ValueError

    def wrong(self) -> Iterator[object]:
        yield from super().wrong()
        yield from ("text", 5, (item for item in ()))
        yield from ([],) if self.least > 0 else ()
        yield from ([item] * max(1, self.least) for item in self.each.wrong())


IMAGE_SIZE = Whole(1, 4096)  # pixels; above it memory ends before anything is learned
SEED = Whole(0, 2**63 - 1)


def checked(thing: Function | None = None, /, **rules: Rule) -> Any:
    """Checks the arguments of a function, or of a class's `__init__`, before it starts; `.rules` holds their rules.

    A rule stands in the decorator, or beside its argument where arguments have lines of their own:
    `epochs: Annotated[int, Whole(1)]`; an alias of such, like `Blocks`, hands its rule on. An argument that is
    annotated as a class of this package, or as bool, has its rule by that. Numbers of numpy's are handed on as
    Python's, which libraries ask for.

    Args:
        thing: what is decorated, where the decorator has no rules.
        rules: by argument; those without one are the function's own to check.
    """
    if thing is None:
        return functools.partial(_checking, rules=rules)
    if not isinstance(thing, type):
        return _checking(thing, {})
    thing.__init__ = _checking(thing.__init__, {})
    thing.rules = thing.__init__.rules
    return thing


def _checking(function: Function, rules: Mapping[str, Rule]) -> Function:
    signature = inspect.signature(function)
    unknown = set(rules) - set(signature.parameters)
    if unknown:
        raise TypeError(f"{function.__name__} has no parameter {', '.join(sorted(unknown))}")
    rules = _annotated(function) | dict(rules)

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs)
        given = {name: bound.arguments[name] for name in rules if name in bound.arguments}
        check_all(given, rules)
        bound.arguments |= {name: value.item() for name, value in given.items() if isinstance(value, np.generic)}
        return function(*bound.args, **bound.kwargs)

    checking.rules = rules
    return checking


def _annotated(function: Callable[..., Any]) -> dict[str, Rule]:
    """The rules that annotations carry. Only the rules are evaluated: a type may be imported for its checker alone."""
    rules, names = {}, inspect.unwrap(function).__globals__
    for name, annotation in function.__annotations__.items():
        if not isinstance(annotation, str):  # a module without postponed annotations
            continue
        node = ast.parse(annotation, mode="eval").body
        none = isinstance(node, ast.BinOp) and ast.unparse(node.right) == "None"
        node = node.left if none else node
        known = names.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated":
            rules[name] = eval(ast.unparse(node.slice.elts[1]), names)
        elif hasattr(known, "__metadata__"):  # an alias, such as `Blocks`
            rules[name] = known.__metadata__[0].or_none() if none else known.__metadata__[0]
        elif isinstance(known, type) and known.__module__.startswith(f"{_PACKAGE}."):
            rules |= {} if getattr(known, "_is_protocol", False) else {name: Is(known, none)}
        elif ast.unparse(node) == "bool":
            rules[name] = Flag(none)
    return {name: rule for name, rule in rules.items() if name != "return"}


def check_all(values: Mapping[str, object], rules: Mapping[str, Rule]) -> None:
    """Checks values by name, each against the rule of that name; for the fields of a dataclass: `vars(self)`."""
    for name, rule in rules.items():
        if name in values:
            rule.check(name, values[name])


def shown(value: object, most: int = 80) -> str:
    """A value as messages show it: on one line, and short; of large objects the class alone."""
    text = " ".join(repr(value).split())
    if len(text) <= most:
        return text
    return f"{text[: most - 3]}..." if type(value).__module__ == "builtins" else f"a {type(value).__name__}"


def is_number(value: object) -> bool:
    """Whether it is a real number of python's or numpy's."""
    return isinstance(value, RealNumber)


def _is_bool(value: object) -> bool:
    return type(value).__name__ in ("bool", "bool_")  # numpy's is no Python bool


def _within(value: Any, low: Any, high: Any) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def beyond(low: Any, high: Any) -> Iterator[object]:
    """A number just outside of each limit."""
    yield from () if low is None else (low - 1,)
    yield from () if high is None else (high + 1 if high + 1 > high else 2 * high,)  # 1e100 + 1 is 1e100


def limits(low: Any, high: Any, above: bool = False, below: bool = False) -> str:
    """Limits in words, with a space before them."""
    first = "" if low is None else f"{'above' if above else 'at least'} {low:g}"
    last = "" if high is None else f"{'below' if below else 'at most'} {high:g}"
    words: Sequence[str] = [word for word in (first, last) if word]
    return f" {' and '.join(words)}" if words else ""
