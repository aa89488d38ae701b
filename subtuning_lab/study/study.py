"""What scores subsets: a backbone, a task and a recipe, over folds and seeds, every score recorded."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch

from subtuning_lab.data.task import Split, Task
from subtuning_lab.engine.fit import ENGINES
from subtuning_lab.engine.memory import Prepared
from subtuning_lab.engine.recipe import Recipe, check_recipes, recipe_grid
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import BN_MODES, Chain, count_parameters, frozen_copy, in_order, keeps_statistics
from subtuning_lab.nets.flops import part_table
from subtuning_lab.nets.inputs import check_images
from subtuning_lab.nets.registry import pretraining_images
from subtuning_lab.search.candidates import chosen_rows
from subtuning_lab.study.keys import Candidate, Keys, Method, OtherImages, Trial, check_other
from subtuning_lab.study.records import Records, Row, opened
from subtuning_lab.study.results import TestResult, confusion_table
from subtuning_lab.study.runner import Runner, usable_device
from subtuning_lab.utils.containers import Blocks as BlocksRule
from subtuning_lab.utils.containers import Either
from subtuning_lab.utils.validation import SEED, Flag, Has, Is, OneOf, Several, Whole, checked

SCORES = ("accuracy", "balanced_accuracy", "loss")
Blocks = Annotated[Iterable[str] | Literal["all"], BlocksRule()]
Subsets = Annotated[Sequence[Blocks], Several(BlocksRule(), least=0)]
Recipes = Annotated[Recipe | Sequence[Recipe], Either(Is(Recipe), Several(Is(Recipe)))]
Seeds = Annotated[Sequence[int], Several(SEED, unique=True)]
Folds = Annotated[int, Whole(1)]
Store = Annotated[str | Path | Records | None, Is((str, Path, Records), none=True)]
Shown = Annotated[bool | Callable[[int, int], None], Either(Flag(), Is(Callable))]
_COLUMNS = ["fold", "seed", "accuracy", "loss", "params", "flops", "epochs", "seconds"]
_OF_RECIPE = ["lr", "head_lr", "weight_decay", "bn"]
_OF_ROW = ["balanced_accuracy", "status", "device", "threads"]
_METHOD = Has(("fit", "settings", "name"), "a method such as Head2Toe()")
_Score = Annotated[str, OneOf(SCORES)]
_Tested = Annotated[Blocks | Method, Either(BlocksRule(), _METHOD)]


@checked
class Study:
    """Scores subsets of one backbone on one task by cross-validation on the training split.

    Selection sees folds of `task.train` only; `test` is the one door to the test split.

    Args:
        backbone: the pretrained chain; a frozen copy is taken.
        task: images and labels.
        recipe: how subsets are trained; or several, of which each subset is trained with all and counts with the one
            that scores best on the folds: the same choice for every subset, full finetuning included.
        folds: at least 2 for cross-validation; 1 for a single split (the task's validation part, or 20 %).
        seeds: of readout, order and augmentation; every subset is trained once per fold and seed.
        records: SQLite file, a `Records`, or None for this session only. What is there is not computed again.
        device: by default the GPU if there is one ("mps" for float32 only).
        engine: "one_pass" or "sequential".
        memory_limit: bytes for one pass; by default a third of what is free.
        progress: whether to show it; a function is called with (trained, total) steps instead, and may raise to stop.
        score: what recipes and blocks are chosen by: "accuracy", "balanced_accuracy" (mean over the classes of each
            one's accuracy: where some are rare), or "loss" (cross-entropy, of which less is better).
    Raises:
        TypeError, ValueError: wrong arguments; images that the backbone can't take; weights that give no numbers.
    Warns:
        UserWarning: training images that the backbone is known to have been pretrained on.
        RecordsError: records that can't be read or written.
    """

    def __init__(
        self,
        backbone: Chain,
        task: Task,
        recipe: Recipes,
        *,
        folds: Folds = 5,
        seeds: Seeds = (0,),
        records: Store = None,
        device: Annotated[str | torch.device | None, Is((str, torch.device), none=True)] = None,
        engine: Annotated[str, OneOf(ENGINES)] = "one_pass",
        memory_limit: Annotated[int | None, Whole(none=True)] = None,
        progress: Shown = True,
        score: _Score = "accuracy",
    ):
        self.recipes, self.seeds = check_recipes(recipe), tuple(map(int, seeds))
        self.task, self.n_folds, self.progress, self.score = task, int(folds), progress, score
        self.device = usable_device(device, backbone.mean.dtype)
        self.backbone = frozen_copy(backbone).to(self.device)
        size = self.recipes[0].image_size
        check_images(self.backbone, task.train.images[:1], size)
        self.records = opened(records)
        self.parts, parts = part_table(backbone, size or task.image_size), task.folds(self.n_folds)
        keys, prepared = Keys(backbone, task, parts, size), Prepared(self.backbone)
        shared = (self.backbone, prepared, task, parts, self.records, keys, self.parts, size)
        self._runner = Runner(*shared, engine, memory_limit)
        self._others: dict[Split, OtherImages] = {}
        seen = pretraining_images(backbone)
        if seen and task.source in (seen, seen.partition("/")[0]):
            warnings.warn(
                f"{backbone.name} was pretrained on {seen}, and task {task.name} has its training images from there: "
                "scores on them are optimistic, and bounds don't hold; adapt to images that it never saw",
                stacklevel=4,
            )

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the backbone's blocks, from input to output."""
        return self.backbone.block_names

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the stem, the blocks and the tail."""
        return self.backbone.part_names

    @property
    def epochs(self) -> int:
        """Epochs of a full training."""
        return self.recipes[0].epochs

    @property
    def title(self) -> str:
        """One line for figures: backbone, task, number of training images."""
        return f"{self.backbone.name} on {self.task.name}, {len(self.task.train)} training images"

    @checked
    def count_parameters(self, blocks: Blocks) -> int:
        """Parameters of a subset, the readout not counted."""
        return count_parameters(self.backbone, blocks)

    @checked
    def with_(
        self,
        *,
        task: Task | None = None,
        recipe: Recipes | None = None,
        folds: Folds | None = None,
        seeds: Seeds | None = None,
        progress: Shown | None = None,
        score: _Score | None = None,
    ) -> Study:
        """The same study with other arguments; backbone and records are shared, and this one stays as it is.

        Args:
            task: another one; with the same training images, scores on folds stay known, so that
                `with_(task=replace(task, test=None))` is a study that holds no test images and does the same.
            recipe, folds, seeds, progress, score: as for `Study`; None keeps this study's.
        """
        other = copy.copy(self)
        other.recipes = self.recipes if recipe is None else check_recipes(recipe)
        other.seeds = self.seeds if seeds is None else tuple(map(int, seeds))
        other.progress = self.progress if progress is None else progress
        other.score, other.n_folds, other.task = score or self.score, int(folds or self.n_folds), task or self.task
        size, known = other.recipes[0].image_size, self._runner
        if other.task is self.task and other.n_folds == self.n_folds and size == known.image_size:
            return other
        check_images(self.backbone, other.task.train.images[:1], size)
        hidden = other.task.test is None and replace(self.task, test=None).fingerprint == other.task.fingerprint
        parts = other.task.folds(other.n_folds)
        same = hidden and other.n_folds == self.n_folds and size == known.image_size
        keys = known.keys if same else Keys(self.backbone, other.task, parts, size)
        other.parts = part_table(self.backbone, size or other.task.image_size)
        changed = {"task": other.task, "folds": parts, "keys": keys, "parts": other.parts, "image_size": size}
        other._runner, other._others = replace(known, **changed), {}
        return other

    def variant(self, **choices: Any) -> Study:
        """The same study with other values in every recipe; records are shared.

        Args:
            choices: fields of the recipe with a value each, or a list of values to choose among on the folds, e.g.
                `variant(params="bias", lr=[1e-3, 1e-2])`.
        """
        lists = {name: value if isinstance(value, list) else [value] for name, value in choices.items()}
        recipes = dict.fromkeys(one for recipe in self.recipes for one in recipe_grid(recipe, **lists))
        return self.with_(recipe=list(recipes))

    @checked
    def scores(self, subsets: Subsets, nested: bool = True) -> pd.DataFrame:
        """Fold scores of subsets, each with its best recipe, computed where no record has them.

        Args:
            subsets: part names each; [] is linear probing, "all" full finetuning.
            nested: of several recipes, each fold's is chosen on the other folds, so that subsets are compared by scores
                that nothing was chosen by. False: the one that is best on all folds, with its optimistic scores; so it
                is for one fold, too.
        Returns:
            One row per subset, seed and fold, in this order: `blocks` (tuple in the network's order), `fold`, `seed`,
            `accuracy` in [0, 1], `loss`, `params` that were trained, `flops` of the training, `epochs`, `seconds`,
            the recipe's `lr`, `head_lr`, `weight_decay` and `bn`, `balanced_accuracy`, `status` ("ok", or "diverged"
            with no accuracy), `device` and `threads` that the training ran with, and `score`: what is chosen by, larger
            is better (minus the loss).
        """
        candidates = self.candidates(subsets)
        trials = self._trials(candidates)
        table = self._table(trials, self._runner.on_folds(trials, self.progress))
        return chosen_rows(self._with_recipes(table, candidates), nested=nested)

    @checked
    def all_scores(self, subsets: Subsets) -> pd.DataFrame:
        """As `scores`, with the rows of every recipe; `recipe` is its place among the distinct ones of a subset."""
        candidates = self.candidates(subsets)
        trials = self._trials(candidates)
        return self._with_recipes(self._table(trials, self._runner.on_folds(trials, self.progress)), candidates)

    @checked
    def candidates(self, subsets: Subsets) -> list[Candidate]:
        """Every distinct subset with each of its recipes."""
        distinct = dict.fromkeys(in_order(self.backbone, blocks) for blocks in subsets)
        return [Candidate(blocks, recipe) for blocks in distinct for recipe in self._recipes_of(blocks)]

    @checked
    def candidate_scores(
        self,
        candidates: Annotated[Sequence[Candidate], Several(Is(Candidate), least=0)],
        folds: Annotated[Sequence[int] | None, Several(Whole(), none=True)] = None,
        seeds: Annotated[Sequence[int] | None, Several(Whole(), none=True)] = None,
        epochs: Annotated[int | None, Whole(1, none=True)] = None,
    ) -> pd.DataFrame:
        """Fold scores of candidates, computed where no record has them.

        Args:
            candidates: of `candidates`.
            folds, seeds: which of the study's; None means all.
            epochs: of a shorter training with a schedule of its own; None means all.
        Returns:
            Rows as of `scores`, for each candidate, seed and fold; `candidate` is the candidate's place in the list.
        """
        Whole(1, self.epochs, none=True).check("epochs", epochs)
        trials = self._trials(candidates, folds, seeds, epochs)
        table = self._table(trials, self._runner.on_folds(trials, self.progress))
        return table.assign(candidate=_places(len(trials), len(candidates)))

    @checked(methods=Several(_METHOD, least=0))
    def method_scores(self, methods: Sequence[Method]) -> pd.DataFrame:
        """Fold scores of methods that are no subsets, computed where no record has them.

        Returns:
            Rows as of `scores`, for each method, seed and fold; `method` is the method's place in the list.
        """
        folds = range(self.n_folds)
        trials = [Trial((), None, seed, fold, method) for method in methods for seed in self.seeds for fold in folds]
        table = self._table(trials, self._runner.on_folds(trials, self.progress))
        return table.assign(method=_places(len(trials), len(methods)))

    @checked
    def recipe_of(self, blocks: Blocks) -> Recipe:
        """The recipe that a subset counts with: the best on all folds, where there are several."""
        names = in_order(self.backbone, blocks)
        recipes = self._recipes_of(names)
        if len(recipes) == 1:
            return recipes[0]
        rows = self.all_scores([names])
        return recipes[chosen_rows(rows.assign(place=rows["recipe"]), nested=False)["place"].iloc[0]]

    @checked
    def fit(self, blocks: Blocks, seed: Annotated[int | None, Whole(none=True)] = None) -> TunedTask:
        """Trains a subset on all training images.

        With early stopping, the first fold's validation images are held out to decide when to stop.

        Args:
            blocks: the subset; [] is linear probing, "all" full finetuning.
            seed: by default the study's first.
        Raises:
            ValueError: the training diverged.
        """
        names, seed = in_order(self.backbone, blocks), self.seeds[0] if seed is None else int(seed)
        trial = Trial(names, self.recipe_of(names), seed, None)
        return replace(self._runner.tuned(trial, self.progress), scores=self._known_scores(trial))

    @checked
    def test(self, what: _Tested, also_on: Split | None = None) -> TestResult:
        """Trains a subset, or a method, on all training images, once per seed, and scores it on the test split.

        Every call counts as a use of the test split, also where records already hold its score.

        Args:
            what: the subset or the method.
            also_on: further images, scored by the same trainings; `accuracy_on` then reads what they say.
        Raises:
            ValueError: the task has no test split, or `also_on` is what `accuracy_on` refuses.
        """
        if self.task.test is None:
            raise ValueError(f"task {self.task.name} has no test split")
        return self._at_last(what, [None] if also_on is None else [None, self._other(also_on)])

    @checked
    def accuracy_on(self, what: _Tested, split: Split) -> TestResult:
        """As `test`, on other images with the same classes: what an adapted network still does elsewhere.

        Every call counts as a use of these images; the test split's own count stays as it is.

        Raises:
            ValueError: labels that the task doesn't have, images of another size, or more than a tenth of them test
                images of the task, which only `test` reaches.
        """
        return self._at_last(what, [self._other(split)])

    def _other(self, split: Split) -> OtherImages:
        if split not in self._others:  # every image is hashed: once
            check_other(split, self.task)
            self._others[split] = OtherImages(split)
        return self._others[split]

    def _at_last(self, what: _Tested, others: Sequence[OtherImages | None]) -> TestResult:
        """Scores on the first of these images, None being the test split; what is trained is scored on all of them."""
        if hasattr(what, "fit"):
            trainings = [Trial((), None, seed, None, what) for seed in self.seeds]
        else:
            names = in_order(self.backbone, what)
            trainings = [Trial(names, self.recipe_of(names), seed, None) for seed in self.seeds]
        uses = self.records.count_test(self._runner.keys.key_of_uses(others[0]))
        trials = [replace(training, other=other) for other in others for training in trainings]
        scored = self._runner.at_last(trials, self.progress)
        rows, n_test = [scored[trial] for trial in trials[: len(trainings)]], len(self._runner.scored(trials[0]))
        accuracies, *further = (tuple(math.nan if row[name] is None else row[name] for row in rows) for name in SCORES)
        confusion = confusion_table([row["confusion"] for row in rows], self.task.classes)
        return TestResult(trials[0].blocks, accuracies, n_test, uses, *further, confusion)

    def _known_scores(self, trial: Trial) -> dict[str, float]:
        """Mean, spread and number of a subset's fold scores, where the records have them all."""
        trials = [replace(trial, seed=seed, fold=fold) for seed in self.seeds for fold in range(self.n_folds)]
        rows, missing = self._runner.known(trials)
        values = pd.Series([row["accuracy"] for row in rows.values()], dtype=float)
        if missing or len(values) < 2 or values.isna().any():
            return {}
        return {"fold accuracy": values.mean(), "fold std": values.std(), "n": len(values)}

    def _trials(
        self,
        candidates: Sequence[Candidate],
        folds: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        epochs: int | None = None,
    ) -> list[Trial]:
        folds, seeds = _some("folds", folds, range(self.n_folds)), _some("seeds", seeds, self.seeds)
        shorter = {} if epochs is None else {"epochs": int(epochs)}
        trained = [(one.blocks, replace(one.recipe, **shorter) if shorter else one.recipe) for one in candidates]
        return [Trial(blocks, recipe, seed, fold) for blocks, recipe in trained for seed in seeds for fold in folds]

    def _table(self, trials: Sequence[Trial], rows: dict[Trial, Row]) -> pd.DataFrame:
        """One row per trial with what it was and its score."""
        content = [rows[trial] for trial in trials]
        table = pd.DataFrame([[row[name] for name in _COLUMNS] for row in content], columns=_COLUMNS)
        table.insert(0, "blocks", [trial.blocks for trial in trials])
        for name in _OF_RECIPE:
            table[name] = [getattr(trial.recipe, name, None) for trial in trials]
        for name in _OF_ROW:
            table[name] = [row[name] for row in content]
        numbers = ["accuracy", "loss", "balanced_accuracy"]
        table[numbers] = table[numbers].astype(float)
        _warn_of_mixture(table)
        return table.assign(score=-table["loss"] if self.score == "loss" else table[self.score])

    def _with_recipes(self, table: pd.DataFrame, candidates: Sequence[Candidate]) -> pd.DataFrame:
        """The table of candidates with the number of each one's recipe among those of its subset."""
        numbers = [self._recipes_of(one.blocks).index(one.recipe) for one in candidates]
        return table.assign(recipe=[numbers[i] for i in _places(len(table), len(candidates))])

    def _recipes_of(self, blocks: tuple[str, ...]) -> list[Recipe]:
        """The distinct recipes for a subset: what it doesn't depend on is set to one value."""
        norms = any(keeps_statistics(m) for name in blocks for m in self.backbone.part(name).modules())
        recipes = [one if norms else replace(one, bn=BN_MODES[0]) for one in self.recipes]
        return list(dict.fromkeys(recipes if blocks else [one.for_probing() for one in recipes]))


def _some(name: str, chosen: Sequence[int] | None, known: Sequence[int]) -> list[int]:
    """The chosen folds or seeds, all of them for None."""
    if set(() if chosen is None else chosen) - set(known):
        raise ValueError(f"{name} is {list(chosen)!r}; this study has {', '.join(map(str, known))}")
    return list(known) if chosen is None else [int(one) for one in chosen]


def _places(rows: int, groups: int) -> list[int]:
    """The number of each row's group, all groups being of one size."""
    return [i * groups // rows for i in range(rows)]


def _warn_of_mixture(table: pd.DataFrame) -> None:
    """Says where one table holds scores that were computed on other devices, or with other numbers of threads."""
    threads = table["threads"].where(table["device"] == "cpu")  # a GPU's results don't depend on them
    kinds = pd.DataFrame({"device": table["device"], "threads": threads}).value_counts(dropna=False, sort=False)
    if len(kinds) > 1:
        origins = [
            f"{count} on {device}" + ("" if pd.isna(threads) else f" with {int(threads)} threads")
            for (device, threads), count in kinds.items()
        ]
        warnings.warn(
            f"scores computed in different ways stand in one table: {', '.join(origins)}. They agree but for rounding, "
            "which training can magnify; the columns device and threads tell which is which",
            stacklevel=4,
        )
