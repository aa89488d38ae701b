"""Active learning: a network that is tuned on few labels says which images to label next.

Strategies are margin, entropy, BADGE and chance, by what a tuned network makes of the images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from subtuning_lab.data.images import StreamedImages
from subtuning_lab.data.splits import stratified_choice
from subtuning_lab.data.task import Task
from subtuning_lab.engine.fit import ENGINE_VERSION
from subtuning_lab.experiments.low_data import GREEDY
from subtuning_lab.experiments.tables import group_summary, paired_differences
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import Chain, in_order
from subtuning_lab.nets.inputs import logits_of
from subtuning_lab.search.greedy import greedy_subtuning
from subtuning_lab.search.racing import Halving, Race
from subtuning_lab.study.records import Records, opened, record_key
from subtuning_lab.study.study import Blocks, Folds, Recipes, Shown, Store, Study
from subtuning_lab.utils.containers import Mapped, Table
from subtuning_lab.utils.validation import Is, OneOf, Several, Text, Whole, checked

RANDOM, MARGIN, ENTROPY, BADGE = "random", "margin", "entropy", "BADGE"
QUERY_VERSION = 1  # of the strategies; another one makes recorded queries void
_STRATEGY = OneOf((RANDOM, MARGIN, ENTROPY, BADGE))
_QUERIES = Table(("method", "strategy", "train_size", "repeat"), ("round", "test_accuracy", "balance", "seconds"))
METHODS: dict[str, Blocks] = {"linear probing": (), "full finetuning": "all", GREEDY: GREEDY}


@checked
def active_learning(
    backbone: Chain,
    task: Task,
    added_labels: Annotated[Sequence[int], Several(Whole(1))],
    recipes: Recipes,
    methods: Annotated[Mapping[str, Blocks] | None, Mapped(none=True)] = None,
    strategies: Annotated[Sequence[str], Several(_STRATEGY, unique=True)] = ("random", "margin"),
    *,
    folds: Folds = 2,
    repeats: Annotated[int, Whole(1)] = 3,
    max_blocks: Annotated[int | None, Whole(1, none=True)] = None,
    race: Annotated[Race | Halving | None, Is((Race, Halving), none=True)] = None,
    records: Store = None,
    progress: Shown = True,
) -> pd.DataFrame:
    """Labels images round by round, each time those that the network tuned on the labels so far asks for.

    A repetition's first images are the same for all methods and strategies: a stratified random choice, for which the
    labels must be known; an experiment may use them so, a real pool has none. Every round starts from the pretrained
    backbone again. Methods that ask at random see the same images, too.

    Args:
        backbone: the pretrained chain.
        task: its training images are the pool; its test images are the same throughout.
        added_labels: number of labels that each round adds, the first images' first.
        recipes: what every method chooses from, on folds of the images that have labels.
        methods: what to tune by name: part names, "all", or "greedy" for the subset that is chosen once on the first
            images of each repetition; by default `METHODS`.
        strategies: of `strategy_names()`; "random" is the control.
        folds: as for `Study`, but no more than there are labelled images of the rarest class.
        repeats: repetitions, each with its own first images and seed.
        max_blocks, race: for greedy.
        records, progress: as for `Study`. Queries are recorded, too: a killed run repeats no finished training.
    Returns:
        One row per repetition, method, strategy and round: `strategy`, `method`, `repeat`, `round` (from 0),
        `train_size` (labelled images), `blocks`, `test_accuracy` in [0, 1], `folds`; `queried`, the images that were
        labelled for this round (places in `task.train`, the most wanted first); `balance` of their classes in [0, 1]:
        entropy over its maximum, missing for a single image; `seconds` that choosing the recipe, searching and asking
        took, as recorded. Round 0 is the same for all strategies.
    Raises:
        ValueError: an unknown strategy, more labels than images, or first images with one of some class only.
    Source: PAPER, ablations, where one block is tuned and the margin asks.
    """
    methods = METHODS if methods is None else methods
    store = opened(records)
    pool = _Pool(backbone, task, recipes, folds, store, progress)
    _check_plan(pool, added_labels, methods)
    rows = []
    for repeat in range(repeats):
        first = stratified_choice(task.train.labels.numpy(), added_labels[0], repeat, "added_labels[0]").tolist()
        study = pool.study(first, repeat)
        for method, blocks in methods.items():
            spent = 0.0
            if isinstance(blocks, str) and blocks == GREEDY:
                search = greedy_subtuning(study, max_blocks=max_blocks, race=race)
                blocks, spent = search.blocks, search.cost.seconds
            start = pool.row(study, blocks, first, spent)
            for strategy in strategies:
                place = {"strategy": strategy, "method": method, "repeat": repeat}
                rounds = _rounds(pool, study, start, added_labels[1:], strategy)
                rows += [place | {"round": number} | row for number, row in enumerate(rounds)]
    return pd.DataFrame(rows)


@checked(table=_QUERIES)
def summarize_queries(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over repetitions per method, strategy and number of labels.

    Args:
        table: of `active_learning`.
    Returns:
        `method`, `strategy`, `train_size`, `accuracy` and `std` (on the test split), `n` (repetitions), `balance` and
        `seconds`, as means.
    """
    means = {"balance": "balance", "seconds": "seconds"}
    return group_summary(table, ["method", "strategy", "train_size"], means)


@checked(table=_QUERIES, strategy=Text(), other=Text())
def strategy_differences(table: pd.DataFrame, strategy: str = "margin", other: str = "random") -> pd.DataFrame:
    """How far one strategy is ahead of another per method and number of labels, paired by repetition.

    Args:
        table: of `active_learning`.
        strategy, other: names of strategies in it.
    Returns:
        Rows of `method_differences` with `method`, without those of the first images, which all strategies share.
    """
    return paired_differences(table[table["round"] > 0], strategy, other, "strategy", within=["method"])


@dataclass(frozen=True)
class _Pool:
    """Images to be labelled, and how networks are tuned on those that are; see `active_learning`."""

    backbone: Chain
    task: Task
    recipes: Recipes
    folds: int
    records: Records
    progress: Shown

    def study(self, labelled: Sequence[int], seed: int) -> Study:
        """A study of the images that have labels, in the pool's order whatever the order of asking."""
        train = self.task.train.take(torch.tensor(sorted(labelled)))
        counts = torch.bincount(train.labels, minlength=self.task.num_classes)
        rarest, fewest = self.task.classes[int(counts.argmin())], int(counts.min())
        if fewest < 2:
            raise ValueError(
                f"{len(labelled)} first images have {fewest} of class {rarest!r}; folds need 2 of every class: "
                f"raise added_labels[0], {len(labelled)}"
            )
        options = {"folds": min(self.folds, fewest), "records": self.records, "progress": self.progress}
        return Study(
            self.backbone, replace(self.task, train=train, validation=None), self.recipes, seeds=(seed,), **options
        )

    def row(self, study: Study, blocks: Blocks, queried: Sequence[int], spent: float) -> dict[str, Any]:
        """What one round came to; `spent` seconds went before."""
        names = in_order(self.backbone, blocks)
        if len(study.candidates([names])) > 1:
            spent += study.all_scores([names])["seconds"].sum()
        labels = self.task.train.labels[list(queried)].numpy()
        return {
            "train_size": len(study.task.train),
            "blocks": names,
            "test_accuracy": study.test(names).mean,
            "folds": study.n_folds,
            "queried": tuple(queried),
            "balance": _balance(labels, self.task.num_classes),
            "seconds": spent,
        }

    def ask(
        self, study: Study, blocks: tuple[str, ...], labelled: Sequence[int], size: int, strategy: str
    ) -> tuple[tuple[int, ...], float]:
        """The images to label next, from the records if they are there, and the seconds that it took to choose."""
        images, fixed = self.task.train.images, {"labelled": sorted(labelled), "seed": study.seeds[0]}
        if strategy == RANDOM:  # takes no training
            return query_images(None, images, size, strategy, **fixed), 0.0
        asked = fixed | {"query": strategy, "version": QUERY_VERSION, "size": size, "pool": self.task.fingerprint}
        asked |= {"backbone": self.backbone.fingerprint, "blocks": blocks, "engine": ENGINE_VERSION}
        asked |= {"recipe": study.recipe_of(blocks).as_dict(), "folds": study.n_folds}
        key = record_key(asked)
        answer = self.records.get_choice(key)
        if answer is None:
            start = time.perf_counter()
            chosen = query_images(study.fit(blocks), images, size, strategy, **fixed)
            answer = {"images": chosen, "seconds": time.perf_counter() - start}
            self.records.put_choice(key, answer, asked)
        return tuple(answer["images"]), answer["seconds"]


def _rounds(
    pool: _Pool, study: Study, start: dict[str, Any], added_labels: Sequence[int], strategy: str
) -> Iterator[dict[str, Any]]:
    """The rows of one method and strategy in one repetition, that of the first images first."""
    labelled = list(start["queried"])
    yield start
    for size in added_labels:
        queried, spent = pool.ask(study, start["blocks"], labelled, size, strategy)
        labelled += queried
        study = pool.study(labelled, study.seeds[0])
        yield pool.row(study, start["blocks"], queried, spent)


def _balance(labels: np.ndarray, num_classes: int) -> float:
    """Entropy of the labels' classes over the largest that so many labels can have; missing for a single one."""
    most = min(num_classes, len(labels))
    return float(stats.entropy(np.bincount(labels)) / np.log(most)) if most > 1 else np.nan


def _check_plan(pool: _Pool, added_labels: Sequence[int], methods: Mapping[str, Blocks]) -> None:
    """Raises for what `active_learning` can't do, before the first training."""
    for blocks in methods.values():
        if not (isinstance(blocks, str) and blocks == GREEDY):
            in_order(pool.backbone, blocks)
    n = len(pool.task.train)
    if sum(added_labels) > n:
        raise ValueError(f"added_labels is {list(added_labels)}; it must add up to 1 to {n}, the training images")


def strategy_names() -> tuple[str, ...]:
    """Names of the ways to choose what to label."""
    return tuple(_STRATEGY.options)


@checked
def query_images(
    tuned: TunedTask | None,
    images: Annotated[torch.Tensor | StreamedImages, Is((torch.Tensor, StreamedImages))],
    size: Annotated[int, Whole(1)],
    strategy: Annotated[str, _STRATEGY] = "margin",
    *,
    labelled: Annotated[Sequence[int], Several(Whole(), least=0, unique=True)] = (),
    seed: Annotated[int, Whole()] = 0,
) -> tuple[int, ...]:
    """The images to label next, by a network in eval mode that sees them without augmentation.

    Args:
        tuned: tuned on the labels so far; None is enough for "random".
        images: uint8 (n, 3, height, width).
        size: how many to choose.
        strategy: "margin" takes the smallest differences between the two largest class probabilities, "entropy" the
            largest entropies, "BADGE" gradients of the readout's loss that are large and point in different ways,
            "random" any.
        labelled: places of images that have labels; these are never chosen.
        seed: of "random" and "BADGE".
    Returns:
        Places in `images`, all different, the most wanted first.
    Raises:
        ValueError: an unknown strategy, fewer unlabelled images than `size`, wrong places, or logits that are not
            finite.
    Source: margin: Scheffer et al. 2001; BADGE: Ash et al. 2020, by k-means++ (Arthur and Vassilvitskii 2007).
    """
    open_places = _unlabelled(len(images), labelled)
    if size > len(open_places):
        raise ValueError(f"size is {size}; {len(open_places)} of {len(images)} images have no label yet")
    generator = np.random.default_rng((seed, len(labelled)))
    if strategy == RANDOM:
        return tuple(generator.choice(open_places, size, replace=False).tolist())
    if not isinstance(tuned, TunedTask):
        raise TypeError(f"tuned is a {type(tuned).__name__}; {strategy} needs a TunedTask")
    probabilities, features = _outputs(tuned, images, open_places)
    return tuple(open_places[_STRATEGIES[strategy](probabilities, features, size, generator)].tolist())


def _outputs(tuned: TunedTask, images: torch.Tensor | StreamedImages, places: np.ndarray) -> tuple[np.ndarray, ...]:
    """Class probabilities (n, classes) and the inputs (n, width) of the readout's last layer, float64."""
    network, features = tuned.network(), []
    last = [layer for layer in network.head.modules() if isinstance(layer, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda layer, inputs: features.append(inputs[0].cpu().double()))
    rows = torch.from_numpy(places)
    wanted = images.take(rows) if isinstance(images, StreamedImages) else images[rows.to(images.device)]
    logits = logits_of(network, wanted).double()
    if not logits.isfinite().all():
        raise ValueError(f"{tuned} gives logits that are not finite; it can't say what to label")
    return logits.softmax(1).numpy(), torch.cat(features).numpy()


def _by_margin(probabilities: np.ndarray, features: np.ndarray, size: int, generator: Any) -> np.ndarray:
    second, first = np.sort(probabilities, axis=1)[:, -2:].T
    return np.argsort(first - second, kind="stable")[:size]


def _by_entropy(probabilities: np.ndarray, features: np.ndarray, size: int, generator: Any) -> np.ndarray:
    return np.argsort(-stats.entropy(probabilities, axis=1), kind="stable")[:size]


def _by_gradients(
    probabilities: np.ndarray, features: np.ndarray, size: int, generator: np.random.Generator
) -> np.ndarray:
    """k-means++ on the loss's gradients by the readout's weight, the likeliest class taken for the label."""
    errors = probabilities - np.eye(probabilities.shape[1])[probabilities.argmax(1)]
    return spread_out(errors, features, size, generator)


def spread_out(errors: np.ndarray, features: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Seeds of k-means++ among outer products, which are never made: they would be (n, classes x width).

    scikit-learn's own seeding wants them all, and takes a point twice where no other is apart from those it has.

    Args:
        errors: (n, classes), features: (n, width); point i is the outer product of their rows i.
        size: how many, at most n.
        generator: the only source of chance.
    Returns:
        Places (size,), all different.
    """
    squares = (errors**2).sum(1) * (features**2).sum(1)
    chosen, nearest = [int(generator.choice(len(errors), p=np.full(len(errors), 1 / len(errors))))], np.inf
    while len(chosen) < size:
        last = chosen[-1]
        apart = squares + squares[last] - 2 * (errors @ errors[last]) * (features @ features[last])
        nearest = np.minimum(nearest, np.maximum(apart, 0.0))
        nearest[chosen] = 0.0
        weights = nearest if nearest.any() else 1.0 * ~np.isin(np.arange(len(errors)), chosen)
        chosen.append(int(generator.choice(len(errors), p=weights / weights.sum())))
    return np.array(chosen)


#: probabilities (n, classes), features (n, width), how many, chance -> places (size,) of the wanted images
_STRATEGIES = {MARGIN: _by_margin, ENTROPY: _by_entropy, BADGE: _by_gradients}


def _unlabelled(n: int, labelled: Sequence[int]) -> np.ndarray:
    """Places of n images that have no label yet, ascending."""
    known = np.asarray(labelled, dtype=np.int64)
    if not ((known >= 0) & (known < n)).all():
        raise ValueError(f"labelled is {list(labelled)}; it must hold places in 0..{n - 1}")
    return np.setdiff1d(np.arange(n), known)
