"""Does a generalization bound rank subsets? Bounds and what they are made of, beside the gaps that were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from scipy import stats

from subtuning_lab.engine.fit import fit_together
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import in_order, keeps_statistics
from subtuning_lab.nets.heads import Start
from subtuning_lab.nets.inputs import logits_of
from subtuning_lab.search.candidates import summarize
from subtuning_lab.search.statistics import rank_correlation
from subtuning_lab.study.study import Blocks, Study
from subtuning_lab.theory.bounds import (
    CONFIDENCE,
    POSITIVE,
    SIZE,
    Bound,
    full_finetuning_bound,
    geometric_grid,
    subtuning_bound,
    test_set_bound,
)
from subtuning_lab.theory.linearization import taylor_logits, tuned_distance
from subtuning_lab.theory.per_sample_grads import GradientNorms, gradient_norms
from subtuning_lab.theory.rademacher import rademacher_bound, ramp_error
from subtuning_lab.theory.weight_noise import (
    SIGMA_CHOICES,
    Sigmas,
    half_prior_bound,
    noise_grid,
    noisy_bound,
    readout_start,
)
from subtuning_lab.utils.containers import Blocks as BlocksRule
from subtuning_lab.utils.containers import Either, Mapped, Table
from subtuning_lab.utils.random import Stream, seeded
from subtuning_lab.utils.validation import Several, Text, Whole, checked

BOUNDS: tuple[str, ...] = ("paper", "rademacher", "pac_bayes")
RADII = geometric_grid(1e-2, 1e4, math.sqrt(2))


@checked
def measure_bounds(
    study: Study,
    subsets: Annotated[Mapping[str, Blocks], Mapped(BlocksRule())],
    *,
    n_jacobian: Annotated[int | None, Whole(1, none=True)] = None,
    margins: Annotated[Sequence[float], Several(POSITIVE)] = (1.0,),
    sigmas: Annotated[Sigmas, SIGMA_CHOICES] = None,
    posteriors: Annotated[int, Whole(2)] = 1000,
    confidence: Annotated[float, CONFIDENCE] = 0.95,
    price: Annotated[Mapping[str, float] | float, Either(SIZE, Mapped(SIZE, least=0))] = 0.0,
    half_prior: bool = False,
    test: bool = False,
    seed: Annotated[int, Whole()] = 0,
) -> pd.DataFrame:
    """Trains each subset on all training images, and says what was measured and what the bounds promise.

    Args:
        study: whose recipes have bn="frozen" where the backbone has BatchNorm: statistics of the training images
            would be no start that was fixed before them. Its backbone must not have been pretrained on its training
            images, which a prior and a start would then know: every bound would be too small.
        subsets: label -> part names; [] is linear probing, "all" full finetuning.
        n_jacobian: training images that feature norms are taken of, chosen at random; None takes all. With fewer
            they are an estimate, and so is the Rademacher bound.
        margins: candidates of the Rademacher bound's margin; the best is taken and all are paid for. A large one makes
            every bound about 1, which ranks nothing.
        sigmas: candidates of the PAC-Bayes noise for "blocks" and "head", or the same ones for both; None: `SIGMAS`.
        posteriors: networks that are drawn from the posterior.
        confidence: of each bound alone, in (0, 1).
        price: log of the number of subsets that one was chosen among on these images, see `selection_price`; or label
            -> price. 0 says that it was fixed before.
        half_prior: whether to add the bound of `half_prior_bound`, which trains every subset twice more.
        test: whether to add the test set's bound, by one use of `study.test` per subset.
        seed: of draws and of the choice of images; trainings have the study's first seed.
    Returns:
        One row per subset: `study` (title), `label`, `blocks`, `n` training images, `params` (the readout's not
        counted), `delta`, `head_delta` (from the readout's own random start), `feature_norm` (root mean square of
        ||psi|| over images, tuned parts and readout, at the start), `train_accuracy` (of this fit), `accuracy`, `std`,
        `n_scores` (of the folds), `gap` (training less validation accuracy of the same fits, mean over the folds of
        the first seed), `linearization_error` (as in `linearization_gap`), `kl`; `paper`, `rademacher`, `pac_bayes`
        and, where asked for, `half_prior`, `test_accuracy` and `test_set`, the values; each with `_gap` the value less
        its empirical error; and `bounds`, column -> `Bound` with its terms.

        What they bound differs: "rademacher" the linearized network's error, "pac_bayes" that of the network with
        noise, "test_set" the network's own; "paper", whose constant is unknown, none. Fold fits have fewer training
        images than the fit that is bounded. `train_accuracy - accuracy` is no gap: it has different networks.
    Raises:
        ValueError: recipes that are Siamese or update BatchNorm statistics, or a price for an unknown label.
    Source: PAPER "Theorem 1"; the question is its reviewers'.
    """
    names, prices = _check_call(study, subsets), _prices(subsets, price)
    Whole(1, len(study.task.train), none=True).check("n_jacobian", n_jacobian)
    noise = {"sigmas": noise_grid(sigmas), "posteriors": posteriors, "confidence": confidence, "seed": seed}
    scores = summarize(study.scores(list(names.values()))).to_dict("index")
    gaps = _fold_gaps(study, list(dict.fromkeys(names.values())))
    norms: dict[bool, GradientNorms] = {}
    rows = []
    for label, blocks in names.items():
        tuned = study.fit(blocks)
        start, from_source = readout_start(tuned), tuned.provenance["recipe"]["head_start"] == "source"
        if from_source not in norms:
            norms[from_source] = _norms_at_start(study, start, n_jacobian, seed)
        facts, logits = _facts(study, tuned, start, norms[from_source]), _linear_margins(study, tuned, start)
        score = scores[blocks]
        facts |= {"accuracy": score["accuracy"], "std": score["std"], "n_scores": int(score["n"])}
        facts |= {"gap": gaps[blocks], "linearization_error": logits[1]}
        bounds = {
            "paper": _paper(study, blocks, facts, confidence),
            "rademacher": _rademacher(facts, logits[0], margins, prices[label], confidence),
            "pac_bayes": noisy_bound(tuned, study.task.train, start, price=prices[label], **noise),
        }
        facts["kl"] = bounds["pac_bayes"].inputs["KL"]
        if half_prior:
            bounds["half_prior"] = half_prior_bound(study, blocks, price=prices[label], **noise)
        if test:
            facts["test_accuracy"] = study.test(blocks).accuracies[0]
            n_test = len(study.task.test)
            bounds["test_set"] = test_set_bound(round((1 - facts["test_accuracy"]) * n_test), n_test, confidence)
        rows.append({"study": study.title, "label": label, "blocks": blocks} | facts | _columns(bounds))
    return pd.DataFrame(rows)


@checked
def rank_correlations(
    table: Annotated[pd.DataFrame, Table(("study", "blocks"), ("params",))],
    bounds: Annotated[Sequence[str], Several(Text())] = BOUNDS,
    against: Annotated[Sequence[str], Several(Text())] = ("gap", "accuracy"),
    *,
    single: bool = True,
    resamples: Annotated[int, Whole(1)] = 2000,
    confidence: Annotated[float, CONFIDENCE] = 0.95,
    seed: Annotated[int, Whole()] = 0,
) -> pd.DataFrame:
    """How well bounds rank subsets: rank correlations within each study, and their mean over studies.

    A bound that ranks well has a high correlation with "gap", for which its value less the empirical error counts,
    and a low one with "accuracy". One that correlates with "params", which is always looked at, favours small blocks
    whatever the task; "params" is a row of its own, too, as what a bound has to beat.

    Args:
        table: of `measure_bounds`, for several studies one below the other.
        bounds: columns to rank by.
        against: columns to compare with.
        single: whether to take the rows of single blocks only.
        resamples: of the bootstrap over subsets, each study's own.
        confidence: of its percentile interval.
        seed: of the bootstrap.
    Returns:
        One row per study and "all" (where there are several), bound and quantity: `study`, `bound`, `against`,
        `spearman`, `low`, `high`, `kendall` (tau-b), `n` subsets. Missing where one side is constant, e.g. where a
        bound is 1 throughout, and where fewer than 3 subsets are left.
    """
    rows = table[table["blocks"].map(len) == 1] if single else table
    unknown = [name for name in (*bounds, *against) if name not in table]
    if unknown or rows.empty:
        raise ValueError(f"the table has no {unknown[0]!r}" if unknown else "the table has no such rows")
    groups = dict(list(rows.groupby("study", sort=False)))
    scopes = {title: [group] for title, group in groups.items()}
    scopes |= {"all": [*groups.values()]} if len(groups) > 1 else {}
    results = []
    for title, tables in scopes.items():
        for bound in dict.fromkeys((*bounds, "params")):
            for quantity in dict.fromkeys((*against, "params")):
                if bound != quantity:
                    column = f"{bound}_gap" if quantity == "gap" and f"{bound}_gap" in table else bound
                    pairs = [part[[column, quantity]].to_numpy(float) for part in tables]
                    results.append((title, bound, quantity, *_correlation(pairs, resamples, confidence, seed)))
    return pd.DataFrame(results, columns=["study", "bound", "against", "spearman", "low", "high", "kendall", "n"])


def _correlation(pairs: list[np.ndarray], resamples: int, confidence: float, seed: int) -> tuple[float, ...]:
    """Mean over studies of Spearman's rho with its interval, and of Kendall's tau-b; number of subsets."""
    rho, low, high = rank_correlation([columns[None] for columns in pairs], resamples, confidence, seed)
    kendall = np.mean([stats.kendalltau(*columns.T).statistic for columns in pairs]) if math.isfinite(rho) else math.nan
    return rho, low, high, kendall, sum(map(len, pairs))


def _check_call(study: Study, subsets: Mapping[str, Blocks]) -> dict[str, tuple[str, ...]]:
    has_norms = any(map(keeps_statistics, study.backbone.modules()))
    if has_norms and any(recipe.bn != "frozen" for recipe in study.recipes):
        raise ValueError('recipes have bn="batch"; a bound needs bn="frozen": study.variant(bn="frozen")')
    if any(recipe.siamese for recipe in study.recipes):
        raise ValueError("recipes are Siamese; a bound is there for plain tasks only")
    if any(recipe.head_depth > 1 for recipe in study.recipes):
        raise ValueError("recipes have head_depth above 1; a bound is there for linear readouts only")
    return {label: in_order(study.backbone, blocks) for label, blocks in subsets.items()}


def _prices(subsets: Mapping[str, Blocks], price: Mapping[str, float] | float) -> dict[str, float]:
    """The price of every label, 0 where a mapping names none."""
    given = price if isinstance(price, Mapping) else dict.fromkeys(subsets, price)
    for label in given:
        if label not in subsets:
            raise ValueError(f"price has {label!r}; the labels are {', '.join(subsets)}")
    return dict.fromkeys(subsets, 0.0) | given


def _fold_gaps(study: Study, subsets: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
    """Training less validation accuracy of each subset's fold fits, which are trained once more for it."""
    recipes, task, gaps = [study.recipe_of(blocks) for blocks in subsets], study.task, []
    options, size = {"num_classes": task.num_classes, "seed": study.seeds[0]}, recipes[0].image_size
    for fold in task.folds(study.n_folds):
        train, held_out = map(task.train.take, fold)
        fits = fit_together(study.backbone, subsets, train, recipes, validation=held_out, **options)
        tuned = [TunedTask(study.backbone, fit.blocks, fit.weights, task.classes, size) for fit in fits]
        gaps.append([one.accuracy(train) - fit.accuracy for one, fit in zip(tuned, fits, strict=True)])
    return dict(zip(subsets, np.mean(gaps, axis=0).tolist(), strict=True))


def _norms_at_start(study: Study, start: Start, n_jacobian: int | None, seed: int) -> GradientNorms:
    """Gradient norms of training images, all or some, at the weights that every subset starts from."""
    train, recipe = study.task.train, study.recipes[0]
    rows = torch.randperm(len(train), generator=seeded(Stream.SAMPLE, seed))[: n_jacobian or len(train)].sort().values
    head = torch.nn.utils.skip_init(torch.nn.Linear, study.backbone.num_features, study.task.num_classes)
    head.load_state_dict(start)
    return gradient_norms(study.backbone, head, train.images[rows], image_size=recipe.image_size)


def _facts(study: Study, tuned: TunedTask, start: Start, norms: GradientNorms) -> dict[str, float]:
    """What is measured of one fit."""
    way = tuned_distance(tuned, start)["distance"]
    return {
        "n": len(study.task.train),
        "params": study.count_parameters(tuned.blocks),
        "delta": float(way["all"]),
        "head_delta": float(way["head"]),
        "feature_norm": float(norms.of(tuned.blocks, head=True).mean().sqrt()),
        "train_accuracy": tuned.accuracy(study.task.train),
    }


def _linear_margins(study: Study, tuned: TunedTask, start: Start) -> tuple[np.ndarray, float]:
    """Margins (n,) of the linearized network on the training images, and how wrong its logits are."""
    images, labels = study.task.train.images[torch.arange(len(study.task.train))], study.task.train.labels[:, None]
    first, slope = taylor_logits(tuned, images, head_start=start)
    last = logits_of(tuned.network(), images, 250).double()
    straight = first + slope
    others = straight.scatter(1, labels, -math.inf).amax(1)
    right_by = straight.gather(1, labels)[:, 0] - others
    return right_by.numpy(), float((straight - last).norm() / (last - first).norm())


def _paper(study: Study, blocks: Sequence[str], facts: Mapping[str, float], confidence: float) -> Bound:
    """The paper's rate, of the tuned blocks alone; full finetuning has its own."""
    shared = {"n": facts["n"], "delta": facts["delta"], "confidence": confidence}
    shared["empirical_error"] = 1 - facts["train_accuracy"]
    if len(blocks) == len(study.part_names):
        return full_finetuning_bound(params=facts["params"], **shared)
    most, size = len(study.part_names), min(max(1, len(blocks)), len(study.part_names))
    return subtuning_bound(tuned_params=facts["params"], n_blocks=most, max_blocks=size, **shared)


def _rademacher(
    facts: Mapping[str, float], right_by: np.ndarray, margins: Sequence[float], price: float, confidence: float
) -> Bound:
    """The smallest over the candidates for the margin; `right_by` are the linearized network's margins (n,)."""
    delta = math.hypot(facts["delta"], facts["head_delta"])
    shared = {"n": facts["n"], "delta": delta, "deltas": RADII, "feature_norms": facts["feature_norm"]}
    shared |= {"margins": margins, "price": price, "confidence": confidence}
    errors = {margin: ramp_error(right_by, margin) for margin in margins}
    bounds = [rademacher_bound(margin=margin, empirical_error=error, **shared) for margin, error in errors.items()]
    return min(bounds, key=lambda bound: bound.value)


def _columns(bounds: Mapping[str, Bound]) -> dict[str, object]:
    """Values, values less the empirical error, and the bounds themselves."""
    gaps = {f"{name}_gap": bound.value - bound.terms["empirical error"] for name, bound in bounds.items()}
    return {name: bound.value for name, bound in bounds.items()} | gaps | {"bounds": dict(bounds)}
