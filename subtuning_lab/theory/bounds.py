"""What a generalization bound is, the paper's rates, prices of selection, and the test set's bound. No torch.

`rademacher` and `pac_bayes` have the bounds of the training set whose constants are all known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pandas as pd
from scipy import stats

from subtuning_lab.utils.containers import Either, Mapped
from subtuning_lab.utils.validation import Is, OneOf, Real, Several, Text, Whole, checked

COUNT, SHARE = Whole(1, 10**15), Real(0, 1)
SIZE, POSITIVE = Real(0, 1e100), Real(0, 1e100, above=True)  # no product of two of them overflows
CONFIDENCE = Real(0, 1, above=True, below=True)


@checked
@dataclass(frozen=True)
class Bound:
    """An upper bound on an error rate, or on the gap between it and the training error, and what it is made of.

    Args:
        name: for tables and figures.
        value: the bound, at least 0; 1 and more says nothing.
        terms: name -> share of `value`, in the order that a stacked bar shows them; they sum to `value`.
        inputs: the arguments that it was made of.
        confidence: probability over the training sample that the bound holds, in (0, 1).
        of: "error" or "gap".
        assumptions: what must be true for it to hold.
    """

    name: Annotated[str, Text()]
    value: Annotated[float, Real(0)]
    terms: Annotated[Mapping[str, float], Mapped(Real(0))]
    inputs: Mapping[str, object] = field(repr=False)
    confidence: Annotated[float, CONFIDENCE]
    of: Annotated[str, OneOf(("error", "gap"))] = "error"
    assumptions: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not math.isclose(math.fsum(self.terms.values()), self.value, rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(f"terms sum to {math.fsum(self.terms.values())}; it must be value, {self.value}")
        object.__setattr__(self, "terms", dict(self.terms))  # copies, so that the caller's can't change it
        object.__setattr__(self, "inputs", dict(self.inputs))

    @property
    def vacuous(self) -> bool:
        """Whether it says nothing: no error rate, and no gap, is above 1."""
        return self.value >= 1

    def __str__(self) -> str:
        sum_of = " + ".join(f"{name} {number:.3g}" for name, number in self.terms.items())
        says = " (vacuous)" if self.vacuous else ""
        return f"{self.name}: {self.of} <= {self.value:.3g}{says} with confidence {self.confidence:g} = {sum_of}"


@checked
def subtuning_bound(
    *,
    n: Annotated[int, COUNT],
    tuned_params: Annotated[int, Whole(0, 10**15)],
    delta: Annotated[float, SIZE],
    n_blocks: Annotated[int, Whole(1, 10**4)],
    max_blocks: Annotated[int, Whole(1)],
    confidence: Annotated[float, CONFIDENCE] = 0.95,
    empirical_error: Annotated[float | None, SHARE.or_none()] = None,
    constant: Annotated[float, POSITIVE] = 1.0,
) -> Bound:
    """The paper's rate for greedy SubTuning, C sqrt(r') Delta log(k L) / sqrt(n), to compare choices with.

    Its constant C is not known, so the number itself guarantees nothing; `rademacher_bound` has constants.

    Args:
        n: training examples.
        tuned_params: r', parameters that are tuned.
        delta: Euclidean distance between tuned and pretrained parameters.
        n_blocks: L, blocks of the backbone.
        max_blocks: k, blocks that greedy tunes at most.
        confidence: in (0, 1); adds sqrt(log(1 / (1 - confidence)) / 2n), which the paper's O hides.
        empirical_error: on the training examples, in [0, 1]; None bounds the gap alone.
        constant: C.
    Source: PAPER "Theorem 1". Where log(k L) < 1 it counts as 1: a product with log 1 = 0 would promise no error at
        all for the only block of a backbone. "price of selection" is the rate's excess over that with factor 1.
    """
    factor = max(1.0, selection_price(n_blocks, max_blocks, "evaluations"))
    inputs = {"n": n, "tuned_params": tuned_params, "delta": delta, "n_blocks": n_blocks, "max_blocks": max_blocks}
    inputs |= {"constant": constant}
    return _rate("SubTuning (paper's rate)", inputs, "tuned_params", factor, confidence, empirical_error)


@checked
def full_finetuning_bound(
    *,
    n: Annotated[int, COUNT],
    params: Annotated[int, Whole(0, 10**15)],
    delta: Annotated[float, SIZE],
    confidence: Annotated[float, CONFIDENCE] = 0.95,
    empirical_error: Annotated[float | None, SHARE.or_none()] = None,
    constant: Annotated[float, POSITIVE] = 1.0,
) -> Bound:
    """The paper's rate for full finetuning, C sqrt(r) Delta / sqrt(n).

    Args:
        n: training examples.
        params: r, all parameters.
        delta: Euclidean distance between tuned and pretrained parameters.
        confidence, empirical_error, constant: as for `subtuning_bound`.
    Source: PAPER "Theorem 1".
    """
    inputs = {"n": n, "params": params, "delta": delta, "constant": constant}
    return _rate("full finetuning (paper's rate)", inputs, "params", 1.0, confidence, empirical_error)


@checked(n_blocks=Whole(1, 10**4), max_blocks=Whole(1), how=OneOf(("adaptive", "evaluations")))
def selection_price(n_blocks: int, max_blocks: int, how: str = "adaptive") -> float:
    """Log of the number of subsets that a union bound pays for when a search has chosen the subset.

    Args:
        n_blocks: L, blocks of the backbone.
        max_blocks: k, blocks that the search tunes at most, from 1 to L.
        how: "adaptive", log of the sum over i <= k of C(L, i): every subset that the search could end with, none at
            all included. "evaluations", log(k L): as many as greedy looks at, as the paper counts.

    "evaluations" holds only if the k L subsets are known before the data are. Greedy's are not: which it looks at in
    round 2 depends on the scores of round 1. A subset that was chosen on other data costs 0; if the best of several
    starts was taken too, add the log of their number.

    Source: PAPER "Theorem 1" and "Algorithm 1".
    """
    Whole(1, int(n_blocks)).check("max_blocks", max_blocks)
    n_blocks, max_blocks = int(n_blocks), int(max_blocks)
    if how == "evaluations":
        return math.log(n_blocks * max_blocks)
    return math.log(sum(math.comb(n_blocks, i) for i in range(max_blocks + 1)))


@checked(low=POSITIVE, high=POSITIVE, factor=Real(1, 1e100, above=True))
def geometric_grid(low: float, high: float, factor: float = 2.0) -> tuple[float, ...]:
    """Numbers low, low * factor, ... up to the first that reaches high: candidates to fix before the data are seen."""
    Real(float(low)).check("high", high)
    steps = math.log(high / low) / math.log(factor)
    if steps > 10**4:
        raise ValueError(f"factor is {factor}; it makes more than 10000 steps from {low} to {high}")
    return tuple(float(low * factor**j) for j in range(math.ceil(steps - 1e-9) + 1))


@checked(errors=Whole(), n=COUNT, confidence=CONFIDENCE)
def test_set_bound(errors: int, n: int, confidence: float = 0.95) -> Bound:
    """What a test set of its own says (Clopper-Pearson): the yardstick for every other bound.

    Args:
        errors: test examples that are classified wrong, from 0 to n.
        n: test examples, which nothing was trained or chosen on.
        confidence: in (0, 1), one-sided.
    """
    Whole(0, int(n)).check("errors", errors)
    value = binomial_upper(errors, n, 1 - confidence)
    terms = {"empirical error": errors / n, "confidence": max(0.0, value - errors / n)}
    assumptions = ("the test examples were used once, and for nothing else",)
    return make_bound("test set", terms, {"errors": errors, "n": n}, confidence, assumptions)


test_set_bound.__test__ = False  # the name is no pytest function


def binomial_upper(errors: int, n: int, failure: float) -> float:
    """Clopper-Pearson: upper bound on an error probability that fails with probability `failure` at most."""
    return 1.0 if errors == n else float(stats.beta.isf(failure, errors + 1, n - errors))


@checked(bounds=Either(Mapped(Is(Bound), least=0), Several(Is(Bound), least=0)))
def bound_table(bounds: Sequence[Bound] | Mapping[str, Bound]) -> pd.DataFrame:
    """One row per bound and term, for a figure of stacked bars.

    Args:
        bounds: with different names, or label -> bound.
    Returns:
        Columns `bound`, `term`, `amount` (the term), `value` (of the whole bound), `of`, `confidence`, `vacuous`.
    """
    if not isinstance(bounds, Mapping):
        twice = sorted(name for name, count in Counter(bound.name for bound in bounds).items() if count > 1)
        if twice:
            raise ValueError(f"bounds holds {twice[0]!r} more than once; give a mapping of different labels instead")
        bounds = {bound.name: bound for bound in bounds}
    rows = [
        (label, term, amount, bound.value, bound.of, bound.confidence, bound.vacuous)
        for label, bound in bounds.items()
        for term, amount in bound.terms.items()
    ]
    return pd.DataFrame(rows, columns=["bound", "term", "amount", "value", "of", "confidence", "vacuous"])


def grid_price(name: str, value: float, grid: Sequence[float] | None) -> float:
    """Log of the number of candidates that `value` was chosen among; raises ValueError unless it is one of them."""
    if grid is None:
        return 0.0
    if not np.isclose(np.asarray(grid, dtype=float), value, rtol=1e-12, atol=0).any():
        raise ValueError(f"{name} is {value}; it must be one of {name}s, {', '.join(map(str, grid))}")
    return math.log(len(grid))


def make_bound(
    name: str,
    terms: Mapping[str, float],
    inputs: Mapping[str, object],
    confidence: float,
    assumptions: tuple[str, ...],
) -> Bound:
    """A `Bound` that is the sum of its terms; one of a gap where there is no "empirical error" among them."""
    of = "error" if "empirical error" in terms else "gap"
    return Bound(name, math.fsum(terms.values()), terms, inputs, confidence, of, assumptions)


SAME_SAMPLE = "the training examples are independent draws from what the error is about"
NOT_PRETRAINED_ON = "the backbone was not pretrained on the training examples, nor chosen by them"
_UNKNOWN_CONSTANT = (
    "the constant is unknown: the number compares choices and guarantees nothing",
    SAME_SAMPLE,
    NOT_PRETRAINED_ON,
)


def _rate(name: str, inputs: dict, params: str, factor: float, confidence: float, error: float | None) -> Bound:
    """constant * sqrt(params) * delta * factor / sqrt(n), and the confidence term; `params` is its name in `inputs`."""
    complexity = inputs["constant"] * inputs["delta"] * math.sqrt(inputs[params] / inputs["n"])
    terms = {
        **({} if error is None else {"empirical error": error}),
        "complexity": complexity,
        "price of selection": complexity * (factor - 1),
        "confidence": math.sqrt(-math.log(1 - confidence) / (2 * inputs["n"])),
    }
    return make_bound(name, terms, inputs, confidence, _UNKNOWN_CONSTANT)
