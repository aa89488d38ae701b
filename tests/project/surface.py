"""The public surface: every callable that `lab`, `lab.notebook` and `lab.report` name, each with one right call."""

import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch import nn

import subtuning_lab as lab
from subtuning_lab import notebook, report
from subtuning_lab.utils.validation import Rule, shown
from tests.helpers import tiny_chain, tiny_split, tiny_task


@dataclass(frozen=True)
class Public:
    """A public function, class or method; `function` is what is called, a method without its object."""

    name: str
    function: Callable[..., Any]
    is_method: bool = False

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters; a method's first one is its object."""
        known = inspect.signature(self.function).parameters.values()
        named = [known.name for known in known if known.kind not in (known.VAR_POSITIONAL, known.VAR_KEYWORD)]
        return named[1:] if self.is_method else named

    @property
    def rules(self) -> Mapping[str, Rule]:
        """By parameter; of a class its own, or those of its making."""
        own = getattr(self.function, "rules", None)
        return own if own is not None else getattr(getattr(self.function, "__init__", None), "rules", {})


def surface() -> Iterator[Public]:
    """Every public callable. What only holds a result, and no one makes, is left out."""
    for room in (lab, notebook, report):
        for name in room.__all__:
            thing = getattr(room, name)
            if inspect.isclass(thing) and issubclass(thing, Exception):
                continue
            if not inspect.isclass(thing):
                yield from [Public(name, thing)] if callable(thing) else []
                continue
            if name not in RESULTS:
                yield Public(name, thing)
            for key, member in vars(thing).items():
                is_method = inspect.isfunction(member)
                if key[0] != "_" and (is_method or isinstance(member, classmethod | staticmethod)):
                    yield Public(f"{name}.{key}", getattr(thing, key), is_method)


#: dataclasses that functions return: whoever makes one by hand knows why
RESULTS = {"Bound", "Fit", "FoldDifference", "GreedyResult", "Latency", "Profile", "SearchResult", "TestResult"}
RESULTS |= {"Suggestion"}


def table(columns: str, *rows: tuple[object, ...]) -> pd.DataFrame:
    """A table of rows under names with spaces between them."""
    return pd.DataFrame(list(rows), columns=columns.split())


class Material:
    """What right calls are made of, made when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.recipe = lab.Recipe(epochs=1, batch_size=12)

    chain = cached_property(lambda self: tiny_chain())
    task = cached_property(lambda self: tiny_task(48))
    other = cached_property(lambda self: tiny_split(12, seed=7))
    study = cached_property(
        lambda self: lab.Study(self.source_chain, self.task, self.recipe, folds=2, device="cpu", progress=False)
    )
    frozen_study = cached_property(lambda self: self.study.variant(bn="frozen"))
    profile = cached_property(lambda self: lab.finetuning_profile(self.study))
    pairs = cached_property(lambda self: lab.pair_profile(self.study))
    greedy = cached_property(lambda self: lab.greedy_subtuning(self.study))
    tuned = cached_property(lambda self: self.study.fit(["block3"]))
    merged = cached_property(lambda self: lab.merge_tasks(self.source_chain, {"tiny": self.tuned}))
    bounds = cached_property(lambda self: {"test": lab.test_set_bound(3, 100)})
    fold_scores = cached_property(lambda self: self.study.scores([["block1"]]))
    official = cached_property(
        lambda self: lab.Task("tiny", self.task.classes, self.task.train, self.task.test, torch.arange(40, 48))
    )
    measured = cached_property(
        lambda self: lab.measure_bounds(self.frozen_study, {name: [name] for name in self.chain.block_names})
    )
    curve = cached_property(lambda self: lab.interpolation_curve(self.study, ["block3"], self.other, [0.0, 0.5, 1.0]))

    @cached_property
    def source_chain(self) -> lab.Chain:
        """With a readout of its own, and a block whose inner channels no frozen part reads."""
        plain, inner = tiny_chain(), nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1))
        blocks = {"block1": plain.blocks[0], "block2": plain.blocks[1], "block3": inner}
        options = {"input_size": (3, 8, 8), "source_head": nn.Linear(6, 3)}
        return lab.Chain(plain.stem, blocks, plain.tail, 6, **options)

    @cached_property
    def shifts(self) -> pd.DataFrame:
        methods, options = ["linear probing", "full finetuning", "greedy"], {"repeats": 2, "progress": False}
        return lab.shift_study(
            self.source_chain, self.task, ["contrast@5"], self.recipe, methods, train_size=24, **options
        )

    @cached_property
    def variants(self) -> pd.DataFrame:
        variants = {"bias": {"params": "bias"}, lab.SUBTUNING: {}}
        return lab.ablate(
            self.chain, self.task, {"b": ["block1"]}, variants, 24, [self.recipe], folds=2, repeats=2, progress=False
        )

    @cached_property
    def queries(self) -> pd.DataFrame:
        return lab.active_learning(self.chain, self.task, [12, 6], self.recipe, {"LP": []}, repeats=2, progress=False)

    @cached_property
    def curves(self) -> pd.DataFrame:
        methods = ["linear probing", "full finetuning"]
        return lab.low_data_curves(
            self.chain, self.task, [12, 24], [self.recipe], methods, folds=2, repeats=2, progress=False
        )

    @cached_property
    def vtab(self) -> pd.DataFrame:
        return lab.vtab_protocol(self.chain, self.official, self.recipe, CHOOSE, seeds=(0,), progress=False)

    @cached_property
    def notebooks(self) -> Path:
        folder = self.folder / "notebooks"
        folder.mkdir(exist_ok=True)
        import nbformat

        cell = nbformat.v4.new_code_cell("results: str = 'results'", metadata={"tags": ["parameters"]})
        page = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": KERNEL})
        nbformat.write(page, folder / "01_empty.ipynb")
        (folder / "presets.toml").write_text("[quick]\n")
        return folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def saved(self) -> Path:
        return self.tuned.save(self.path("tiny.safetensors"))

    def repository(self) -> Path:
        return lab.write_repository(self.tuned, self.path("repository"))


LAYOUT = torch.channels_last
MERGED = "Several merged tasks answer faster than separate networks"
CHOOSE = {"LP": lambda study: []}
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
ZEROS = {"weight": torch.zeros(3, 6), "bias": torch.zeros(3)}  # of a readout
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

M = Material
#: one right call of each: (material) -> keyword arguments; a method's first parameter is its object
RIGHT: dict[str, Callable[[Material], dict[str, Any]]] = {
    # nets
    "Chain": lambda m: dict(stem=nn.Conv2d(3, 4, 1), blocks=[nn.ReLU()], tail=nn.Flatten(), num_features=4),
    "Chain.forward": lambda m: dict(self=m.chain, x=torch.zeros(1, 3, 8, 8)),
    "Chain.from_module": lambda m: dict(
        model=nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        blocks=["1"], num_features=4, input_size=(3, 8, 8),
    ),
    "Chain.normalize": lambda m: dict(self=m.chain, images=IMAGES),
    "Chain.part": lambda m: dict(self=m.chain, name="block1"),
    "Chain.train": lambda m: dict(self=m.chain, mode=True),
    "count_parameters": lambda m: dict(backbone=m.chain, blocks=["block1"]),
    "part_table": lambda m: dict(backbone=m.chain),
    "set_trainable": lambda m: dict(backbone=tiny_chain(), blocks=["block1"]),
    "load_backbone": lambda m: dict(name="cifar_resnet8", weights="random"),
    "backbone_names": lambda m: {},
    "check_backbone": lambda m: dict(name="lab-resnet"),
    # data
    "Split": lambda m: dict(images=m.other.images, labels=m.other.labels),
    "Split.take": lambda m: dict(self=m.other, indices=torch.arange(3)),
    "Split.corrupted": lambda m: dict(self=m.other, corruptions=[("contrast", 5)], part=0),
    "Task": lambda m: dict(name="tiny", classes=("a", "b", "c"), train=m.task.train, test=m.task.test),
    "Task.folds": lambda m: dict(self=m.task, k=2),
    "Task.from_arrays": lambda m: dict(images=IMAGES, labels=[0, 1, 0, 1]),
    "Task.subset": lambda m: dict(self=m.task, train_size=12),
    "load_task": lambda m: dict(spec="glyphs", train_size=20, test_size=20, progress=False),
    "task_names": lambda m: {},
    # engine
    "Recipe": lambda m: {},
    "Recipe.as_dict": lambda m: dict(self=m.recipe),
    "Recipe.for_probing": lambda m: dict(self=m.recipe),
    "recipe_grid": lambda m: dict(recipe=m.recipe, lr=[1e-3, 1e-2]),
    "fit_together": lambda m: dict(
        backbone=m.chain, subsets=[["block1"]], train=m.task.train, recipe=m.recipe, num_classes=3
    ),
    "Prepared": lambda m: dict(backbone=m.chain),
    "Prepared.check": lambda m: dict(self=lab.Prepared(m.chain), example=IMAGES),
    "Prepared.check_adapters": lambda m: dict(
        self=lab.Prepared(m.chain), example=IMAGES, subsets=[frozenset(["block1"])], recipes=[lab.Recipe()]
    ),
    "Prepared.costs": lambda m: dict(self=lab.Prepared(m.chain), example=IMAGES, subsets=[frozenset()], batch_size=4),
    "Prepared.shared": lambda m: dict(self=lab.Prepared(m.chain), example=IMAGES, fold=True, layout=LAYOUT),
    # inference
    "TunedTask": lambda m: dict(backbone=m.chain, blocks=[], weights={"head": ZEROS}, classes=("a", "b", "c")),
    "TunedTask.accuracy": lambda m: dict(self=m.tuned, split=m.task.test),
    "TunedTask.empty_head": lambda m: dict(self=m.tuned),
    "TunedTask.network": lambda m: dict(self=m.tuned),
    "TunedTask.predict": lambda m: dict(self=m.tuned, images=IMAGES),
    "TunedTask.save": lambda m: dict(self=m.tuned, path=m.path("saved.safetensors")),
    "TunedTask.size_table": lambda m: dict(self=m.tuned),
    "TunedTask.prepare": lambda m: dict(self=m.tuned, images=IMAGES),
    "Preparation": lambda m: dict(crop_size=(8, 8), image_size=None, mean=(0.5,), std=(0.5,), file_size=(8, 8)),
    "Preparation.as_dict": lambda m: dict(self=m.tuned.preparation),
    "Preparation.fits": lambda m: dict(self=m.tuned.preparation, height=8, width=8),
    "Preparation.prepared": lambda m: dict(self=m.tuned.preparation, images=IMAGES),
    "load_tuned": lambda m: dict(path=m.saved(), backbone=m.source_chain),
    "MergedNetwork": lambda m: dict(backbone=m.source_chain, tasks={"tiny": m.tuned}),
    "MergedNetwork.forward": lambda m: dict(self=m.merged, images=IMAGES),
    "MergedNetwork.rows_table": lambda m: dict(self=m.merged),
    "MergedNetwork.prepare": lambda m: dict(self=m.merged, images=IMAGES),
    "MergedNetwork.train": lambda m: dict(self=m.merged),
    "merge_tasks": lambda m: dict(backbone=m.source_chain, tasks={"tiny": m.tuned}),
    "OneAfterAnother": lambda m: dict(networks={"tiny": m.tuned.network()}),
    "OneAfterAnother.forward": lambda m: dict(
        self=lab.OneAfterAnother({"tiny": m.tuned.network()}), images=IMAGES
    ),
    "plan_rows": lambda m: dict(part_names=("stem", "b", "tail"), subsets={"a": frozenset(["b"])}),
    "compare_latency": lambda m: dict(nets={"tiny": m.chain}, image_size=8, runs=2, warmup=1),
    "measure_latency": lambda m: dict(net=m.chain, image_size=8, runs=2, warmup=1),
    "export_merged": lambda m: dict(net=m.merged, path=m.path("merged.pt2"), image_size=8),
    "optimize": lambda m: dict(net=m.merged),
    "from_hub": lambda m: dict(repo_id=m.repository(), backbone=m.source_chain),
    "push_to_hub": lambda m: None,
    "write_repository": lambda m: dict(tuned=m.tuned, folder=m.path("written")),
    "prune_backbone": lambda m: dict(backbone=m.source_chain, blocks=["block3"], ratio=0.5),
    "prune_blocks": lambda m: dict(tuned=m.tuned, ratio=0.5),
    # study
    "Records": lambda m: dict(path=":memory:"),
    "Records.get": lambda m: dict(self=m.study.records, keys=["k"]),
    "Records.put": lambda m: dict(self=m.study.records, rows=[]),
    "Records.count_test": lambda m: dict(self=m.study.records, study="s"),
    "Records.test_uses": lambda m: dict(self=m.study.records, study="s"),
    "Records.get_choice": lambda m: dict(self=m.study.records, key="k"),
    "Records.put_choice": lambda m: dict(self=m.study.records, key="k", chosen={}, determined_by={}),
    "Records.table": lambda m: dict(self=m.study.records),
    "Records.close": lambda m: dict(self=m.study.records),
    "TestResult.per_class": lambda m: dict(self=m.study.test([])),
    "Study": lambda m: dict(backbone=m.chain, task=m.task, recipe=m.recipe, folds=2, device="cpu", progress=False),
    "Study.accuracy_on": lambda m: dict(self=m.study, what=["block1"], split=m.other),
    "Study.all_scores": lambda m: dict(self=m.study, subsets=[["block1"]]),
    "Study.candidate_scores": lambda m: dict(self=m.study, candidates=m.study.candidates([["block1"]])),
    "Study.candidates": lambda m: dict(self=m.study, subsets=[["block1"]]),
    "Study.with_": lambda m: dict(self=m.study),
    "Study.count_parameters": lambda m: dict(self=m.study, blocks=["block1"]),
    "Study.fit": lambda m: dict(self=m.study, blocks=["block1"]),
    "Study.method_scores": lambda m: dict(self=m.study, methods=[lab.Head2Toe(share=1.0)]),
    "Study.recipe_of": lambda m: dict(self=m.study, blocks=["block1"]),
    "Study.scores": lambda m: dict(self=m.study, subsets=[["block1"]]),
    "Study.test": lambda m: dict(self=m.study, what=["block1"]),
    "Study.variant": lambda m: dict(self=m.study, lr=1e-2),
    # search
    "GreedyResult.replay": lambda m: dict(self=m.greedy, epsilon=0.0),
    "Profile.best": lambda m: dict(self=m.profile),
    "finetuning_profile": lambda m: dict(study=m.study),
    "pair_profile": lambda m: dict(study=m.study),
    "summarize": lambda m: dict(scores=m.fold_scores),
    "compare_with_best": lambda m: dict(scores=m.fold_scores),
    "fold_difference": lambda m: dict(rows=m.fold_scores, others=m.fold_scores),
    "greedy_subtuning": lambda m: dict(study=m.study),
    "best_window": lambda m: dict(study=m.study),
    "exhaustive_search": lambda m: dict(study=m.study, size=1),
    "agreement_table": lambda m: dict(full={"one": m.greedy}, cheap={"one": m.greedy}),
    "Halving": lambda m: {},
    "Halving.scores": lambda m: dict(self=lab.Halving(), study=m.study, subsets=[("block1",), ("block2",)]),
    "Race": lambda m: {},
    "Race.scores": lambda m: dict(self=lab.Race(), study=m.study, subsets=[("block1",), ("block2",)]),
    "SignificantGain": lambda m: {},
    "SignificantGain.p_values": lambda m: dict(
        self=lab.SignificantGain(), current=m.fold_scores, candidates=[m.fold_scores], larger=True
    ),
    # criteria
    "criterion_names": lambda m: {},
    "score_blocks": lambda m: dict(study=m.study, criterion="parameters"),
    "select_blocks": lambda m: dict(scores=lab.score_blocks(m.study, "parameters"), k=1),
    "compare_criteria": lambda m: dict(study=m.study, scores=lab.score_blocks(m.study, "parameters"), resamples=10),
    "suggest_blocks": lambda m: dict(backbone=m.chain, task=m.task, budget=1.0, unit="flops", criterion="parameters"),
    # baselines
    "Head2Toe": lambda m: {},
    "Head2Toe.fit": lambda m: dict(self=lab.Head2Toe(share=1.0), backbone=m.chain, train=m.other, num_classes=3),
    "Head2Toe.grid": lambda m: {},
    "Head2Toe.settings": lambda m: dict(self=lab.Head2Toe()),
    "SourceNetwork": lambda m: {},
    "SourceNetwork.fit": lambda m: dict(
        self=lab.SourceNetwork(), backbone=m.source_chain, train=m.other, num_classes=3
    ),
    "SourceNetwork.settings": lambda m: dict(self=lab.SourceNetwork()),
    "with_readout_of": lambda m: dict(backbone=m.source_chain, task=m.task),
    "with_statistics": lambda m: dict(backbone=m.chain, images=m.other.images),
    "compare_methods": lambda m: dict(study=m.study, methods=["linear probing", "full finetuning"]),
    "grid_caption": lambda m: dict(study=m.study),
    "method_names": lambda m: {},
    "random_subsets": lambda m: dict(study=m.study, like=["block1"], draws=1, by="size"),
    "best_alpha": lambda m: dict(table=m.curve),
    "interpolate": lambda m: dict(tuned=m.tuned, alpha=0.5),
    "interpolated": lambda m: dict(study=m.study, blocks=["block3"], alphas=[0.0, 1.0]),
    "interpolation_curve": lambda m: dict(study=m.study, blocks=["block3"], clean=m.other, alphas=[0.0, 1.0]),
    "summarize_interpolation": lambda m: dict(table=m.curve),
    # theory
    "bound_table": lambda m: dict(bounds=m.bounds),
    "full_finetuning_bound": lambda m: dict(n=100, params=10, delta=1.0),
    "geometric_grid": lambda m: dict(low=1.0, high=8.0),
    "selection_price": lambda m: dict(n_blocks=4, max_blocks=2),
    "subtuning_bound": lambda m: dict(n=100, tuned_params=10, delta=1.0, n_blocks=4, max_blocks=2),
    "test_set_bound": lambda m: dict(errors=3, n=100),
    "empirical_rademacher": lambda m: dict(feature_norms=[1.0, 2.0], delta=1.0),
    "rademacher_bound": lambda m: dict(n=100, delta=1.0, feature_norms=1.0, margin=1.0),
    "ramp_error": lambda m: dict(margins=[0.5, -1.0], margin=1.0),
    "kl_inverse": lambda m: dict(q=0.1, budget=0.5),
    "pac_bayes_bound": lambda m: dict(errors=[0.1, 0.2], n=100, delta=1.0, sigma=0.1, sigmas=[0.1, 0.2]),
    "readout_start": lambda m: dict(tuned=m.tuned),
    "gradient_norms": lambda m: dict(backbone=m.chain, head=nn.Linear(6, 3), images=IMAGES),
    "tuned_distance": lambda m: dict(tuned=m.tuned),
    "linearization_gap": lambda m: dict(tuned=m.tuned, images=IMAGES),
    "measure_bounds": lambda m: dict(study=m.frozen_study, subsets={"one": ["block1"]}, posteriors=2),
    "rank_correlations": lambda m: dict(table=m.measured, bounds=["paper"], resamples=100),
    # experiments
    "ablate": lambda m: dict(
        backbone=m.chain, task=m.task, subsets={"b": ["block1"]}, variants={"bias": {"params": "bias"}}, size=24,
        recipes=[m.recipe], folds=2, repeats=1, progress=False,
    ),
    "summarize_variants": lambda m: dict(table=m.variants),
    "variant_differences": lambda m: dict(table=m.variants, variant="bias"),
    "active_learning": lambda m: dict(
        backbone=m.chain, task=m.task, added_labels=[12, 6], recipes=m.recipe, methods={"LP": []}, repeats=1,
        progress=False,
    ),
    "strategy_differences": lambda m: dict(table=m.queries),
    "summarize_queries": lambda m: dict(table=m.queries),
    "query_images": lambda m: dict(tuned=m.tuned, images=m.other.images, size=2),
    "strategy_names": lambda m: {},
    "low_data_curves": lambda m: dict(
        backbone=m.chain, task=m.task, sizes=[12], recipes=[m.recipe], methods=["linear probing"], folds=2, repeats=1,
        progress=False,
    ),
    "method_differences": lambda m: dict(table=m.curves, method="linear probing", other="full finetuning"),
    "summarize_repeats": lambda m: dict(table=m.curves),
    "shift_study": lambda m: dict(
        backbone=m.source_chain, source_task=m.task, corruptions=["contrast@5"], recipes=m.recipe,
        methods=["linear probing"], train_size=24, repeats=1, progress=False,
    ),
    "shift_studies": lambda m: dict(
        backbone=m.source_chain, source_task=m.task, corruptions=["contrast@5"], recipes=m.recipe, train_size=24
    ),
    "shift_profiles": lambda m: dict(studies=[({"shift": "contrast@5", "repeat": 0}, m.study)]),
    "average_shifts": lambda m: dict(table=m.shifts),
    "chosen_steps": lambda m: dict(table=m.shifts, block_names=m.chain.block_names),
    "corrupted": lambda m: dict(split=m.other, corruption="contrast@5", part=0),
    "shift_differences": lambda m: dict(table=m.shifts, method="greedy", other="linear probing"),
    "stage_subsets": lambda m: dict(backbone=m.chain),
    "summarize_shifts": lambda m: dict(table=m.shifts),
    "vtab_protocol": lambda m: dict(
        backbone=m.chain, task=m.official, recipes=m.recipe, choose=CHOOSE, seeds=(0,), progress=False
    ),
    "vtab_table": lambda m: dict(results=m.vtab),
    "profile_agreement": lambda m: dict(profiles={"a": m.profile, "b": m.profile}),
    "profile_stability": lambda m: dict(study=m.study, epochs=[1, 2], resamples=100),
    "fit_pruned": lambda m: dict(study=m.study, blocks=["block3"], ratio=0.5),
    "pruning_table": lambda m: dict(study=m.study, blocks=["block3"], ratios=[0.5], runs=1),
    "reported": lambda m: dict(section="finetuning_profiles"),
    "claim_cases": lambda m: {},
    "verdicts": lambda m: dict(cases=lab.claim_cases()),
    "official_recipe": lambda m: dict(run="vit_b16"),
    # plots
    "plot_network": lambda m: dict(part_names=("stem", "b", "tail")),
    "plot_pairs": lambda m: dict(pairs=m.pairs),
    "plot_profile": lambda m: dict(profile=m.profile),
    "share_limits": lambda m: dict(ax=lab.plot_profile(m.profile), tables=[m.profile.table]),
    "plot_curves": lambda m: dict(table=lab.summarize_repeats(m.curves)),
    "plot_methods": lambda m: dict(table=table("method accuracy std n params", ("LP", 0.5, 0.1, 3, 0))),
    "plot_tradeoff": lambda m: dict(table=table("method accuracy std n params", ("LP", 0.5, 0.1, 3, 0))),
    "plot_confusion": lambda m: dict(confusion=pd.DataFrame([[3, 1], [0, 4]], index=list("ab"), columns=list("ab"))),
    "plot_trace": lambda m: dict(trace=m.greedy.trace, block_names=m.chain.block_names),
    "plot_strategies": lambda m: dict(summary=lab.summarize_queries(m.queries)),
    "plot_choices": lambda m: dict(
        table=table("blocks label accuracy error n ms", (("b",), "b", 0.5, 0.1, 3, 1.0)), x="ms"
    ),
    "plot_fork": lambda m: dict(rows=m.merged.rows_table()),
    "plot_forgetting": lambda m: dict(average=lab.average_shifts(m.shifts)),
    "plot_shift_profiles": lambda m: dict(profiles={"contrast@5": m.profile}),
    "plot_shifts": lambda m: dict(summary=lab.summarize_shifts(m.shifts)),
    "plot_steps": lambda m: dict(steps=lab.chosen_steps(m.shifts, m.chain.block_names)),
    "plot_alphas": lambda m: dict(summary=lab.summarize_interpolation(m.curve), alpha=0.5),
    "plot_differences": lambda m: dict(differences=lab.variant_differences(m.variants, "bias")),
    "plot_interpolation": lambda m: dict(summary=lab.summarize_interpolation(m.curve)),
    "plot_stability": lambda m: dict(table=lab.profile_stability(m.study, epochs=[1, 2], resamples=100)),
    "plot_variants": lambda m: dict(summary=lab.summarize_variants(m.variants)),
    "plot_against_gap": lambda m: dict(table=m.measured, column="paper"),
    "plot_terms": lambda m: dict(table=lab.bound_table(m.bounds)),
    "plot_cases": lambda m: dict(cases=lab.claim_cases().dropna(subset=["n"]).groupby("claim").get_group(MERGED)),
    # notebook
    "AlphaPanel": lambda m: dict(summary=lab.summarize_interpolation(m.curve)),
    "ProfilePanel": lambda m: dict(profiles={"one": m.profile}),
    "RealPanel": lambda m: dict(notebook="04"),
    "ShiftPanel": lambda m: dict(task=m.task, profiles={"contrast@5": m.profile}, n_examples=2),
    "SizePanel": lambda m: dict(summary=lab.summarize_repeats(m.curves)),
    "StudyPanel": lambda m: dict(backbones=["lab-resnet"], tasks=["digits"]),
    "BoundPanel": lambda m: dict(n=100, tuned_params=10, params=100, delta=1.0, n_blocks=4),
    "MergePanel": lambda m: dict(backbone=m.source_chain, tasks={"tiny": m.tuned}, runs=1),
    "TracePanel": lambda m: dict(search=m.greedy),
    "CriterionPanel": lambda m: dict(
        profiles={"tiny": m.profile}, scores={"tiny": lab.score_blocks(m.study, "parameters")}
    ),
    "BlockPanel": lambda m: dict(study=m.study),
    "TrainPanel": lambda m: dict(study=m.study, profile=m.profile),
    "untrained_task": lambda m: dict(backbone=m.chain, blocks=["block1"]),
    "BlockPanel.tick": lambda m: dict(self=notebook.BlockPanel(m.study), blocks=["block1"]),
    "MergePanel.measure": lambda m: dict(self=notebook.MergePanel(m.source_chain, {"tiny": m.tuned}, runs=1)),
    "TrainPanel.join": lambda m: dict(self=notebook.TrainPanel(m.study, m.profile)),
    "TrainPanel.stop": lambda m: dict(self=notebook.TrainPanel(m.study, m.profile)),
    "TrainPanel.train": lambda m: dict(self=notebook.TrainPanel(m.study, m.profile)),
    # report
    "machine_line": lambda m: {},
    "reproduce": lambda m: dict(notebooks=m.notebooks, results=m.path("results")),
    "styled": lambda m: dict(table=m.profile.table),
    "write_section": lambda m: dict(
        folder=m.path("section"), name="01_empty", title="t", question="q", figure=lab.plot_profile(m.profile).figure,
        table=m.profile.table, paper=None, notes=["n"], n=1,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- wrong calls

#: what has no error of ours, and why: (name, parameter)
ALLOWED = {
    ("Chain.forward", "x"): "a module's forward: checks would cost every call, and break torch.export and compilation",
    ("active_learning", "records"): "any text but an empty one is the path of a file, which is made",
    ("push_to_hub", None): "needs the network",
}


@dataclass(frozen=True)
class WrongCall:
    """A right call but for one value."""

    public: Public
    parameter: str
    value: object

    def __str__(self) -> str:
        return f"{self.public.name}({self.parameter}={shown(self.value)})"

    def fault(self, material: Material) -> str:
        """What is wrong with how it is refused, or nothing; no optimizer can be made, so that no work begins."""

        def begun(*args: object, **kwargs: object) -> None:
            raise AssertionError("a training began")

        right = RIGHT[self.public.name](material)
        with mock.patch.object(torch.optim.Optimizer, "__init__", begun):
            return verdict(self.public, right | {self.parameter: self.value}, self.parameter)


def wrong_calls() -> list[WrongCall]:
    """All of them, but for those that are `ALLOWED`."""
    surely = (public for public in surface() if (public.name, None) not in ALLOWED)
    pairs = ((public, name) for public in surely for name in public.parameters if (public.name, name) not in ALLOWED)
    return [WrongCall(public, name, value) for public, name in pairs for value in nonsense(public, name)]


def nonsense(public: Public, parameter: str) -> list[object]:
    """Values that no parameter of its annotation can take, and those that its rule forbids."""
    known = inspect.signature(public.function).parameters[parameter]
    kind = str(known.annotation).removeprefix("Annotated[")
    wrong: list[object] = [object(), *(public.rules[parameter].wrong() if parameter in public.rules else ())]
    if known.default is not None and "None" not in kind:
        wrong.append(None)
    if kind.startswith(("int", "float")):
        wrong += ["1", float("nan"), [1], -(10**9)]
    elif kind.startswith(("str", "Literal")) and "Path" not in kind:
        wrong += [17, "", "no such"]
    elif kind.startswith(("Sequence", "Iterable", "tuple")):
        wrong += [[object()], *([] if "float" in kind else [5, 0.5])]
    elif kind.startswith("Mapping"):
        wrong += [5, [1], {object(): object()}]
    elif "DataFrame" in kind:
        wrong += [5, pd.DataFrame({"no such": [1]})]
    elif kind == "bool":
        wrong += ["yes", 2]
    rule = public.rules.get(parameter)
    return [value for value in wrong if rule is None or not _allows(rule, value)]


def _allows(rule: Rule, value: object) -> bool:
    try:
        rule.check("", value)
    except (TypeError, ValueError):
        return False
    return True


def verdict(public: Public, arguments: Mapping[str, Any], parameter: str) -> str:
    """What is wrong with how a call refuses its one wrong value; nothing if an error of ours names it."""
    value = arguments[parameter]
    try:
        answer = public.function(**arguments)
        if inspect.isgenerator(answer):
            next(answer)
    except (TypeError, ValueError, OSError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = "subtuning_lab" in frame.filename and "raise" in (frame.line or "")
        named = re.search(rf"\b{parameter}\b", str(error)) or shown(value).strip("[]")[:15] in str(error)
        return "" if ours and named else f"obscure: {type(error).__name__}: {str(error)[:120]} ({frame.name})"
    except Exception as error:
        return f"obscure: {type(error).__name__}: {str(error)[:120]}"
    return "accepted"
