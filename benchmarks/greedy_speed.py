"""How much faster is a greedy search? Ratios of seconds, measured side by side in one run.

Greedy SubTuning up to 3 blocks, every score computed anew, by four searches:

    full      every candidate on all folds, by the one-pass engine
    lean      the same trainings one after another: `lean_way` of profile_speed, which doesn't even score them
    race      hopeless candidates are given up by tests (`Race`)
    halving   by rank after a short schedule (`Halving`)

Printed are the seconds of each search, what full needs more or less, and what each chose: mean accuracy over the folds
with its standard error (corrected for the folds' common images), and whether that is at most one standard error of
their difference, paired by fold, behind the full search's. With --records the searches
share their scores, which is quick on a machine that others use too: then the arithmetic is compared, and not seconds.

    python benchmarks/greedy_speed.py
    python benchmarks/greedy_speed.py --task digits --task glyphs --seed 0 --seed 1 --without-lean
    python benchmarks/greedy_speed.py --task digits --task glyphs --seed 0 --seed 1 --records runs/greedy.sqlite
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from profile_speed import lean_way

import subtuning_lab as lab
from subtuning_lab.report.machine import machine_line
from subtuning_lab.search.exhaustive import agreement_table
from subtuning_lab.search.greedy import GreedyResult, greedy_subtuning
from subtuning_lab.search.racing import Halving, Race
from subtuning_lab.search.statistics import overlap_factor

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SEARCHES = {"full": None, "race": Race(), "halving": Halving()}


def main() -> None:
    """Measures every task and seed that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="lab-resnet")
    parser.add_argument("--task", action="append", help="default: digits")
    parser.add_argument("--seed", type=int, action="append", help="of the task's images; default: 0")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--without-lean", action="store_true")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others use the machine too")
    parser.add_argument("--records", help="file in which the searches share their scores")
    parser.add_argument("--out", type=Path, help="CSV file for what was chosen")
    arguments = parser.parse_args()
    print(machine_line(), f"threads {torch.get_num_threads()}, {arguments.clock} clock")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = lab.load_backbone(arguments.backbone).to(device)
    recipe = lab.Recipe(epochs=arguments.epochs, lr=3e-3, head_lr=1e-2, batch_size=32)
    warm_up(backbone, recipe)
    found = {name: {} for name in SEARCHES}
    for name in arguments.task or ["digits"]:
        for seed in arguments.seed or [0]:
            task = lab.load_task(name, train_size=arguments.images, seed=seed)
            if arguments.records:
                results = search_all(backbone, task, recipe, arguments.records)
            else:
                results = measure(backbone, task, recipe, not arguments.without_lean, CLOCKS[arguments.clock])
            for search, result in results.items():
                found[search][f"{name}, seed {seed}"] = result
    table = report(found)
    if arguments.out:
        table.to_csv(arguments.out, index=False, float_format="%.6g")


def warm_up(backbone: lab.Chain, recipe: lab.Recipe) -> None:
    """One short pass: kernels are chosen, memory is taken."""
    task = lab.load_task("digits", train_size=64)
    short = lab.Recipe(epochs=1, batch_size=recipe.batch_size)
    lab.Study(backbone, task, short, folds=2, device=backbone.mean.device, progress=False).scores([[]])


def measure(
    backbone: lab.Chain, task: lab.Task, recipe: lab.Recipe, lean: bool, clock: Callable[[], float]
) -> dict[str, GreedyResult]:
    """Runs all searches, prints their seconds, and gives what they found."""
    found, seconds = {}, {}
    for search, race in SEARCHES.items():
        study = lab.Study(backbone, task, recipe, folds=5, device=backbone.mean.device, progress=False)

        def run(study=study, race=race) -> GreedyResult:
            return greedy_subtuning(study, epsilon=-math.inf, max_blocks=3, race=race)

        seconds[search], found[search] = timed(run, clock)
        if search == "full" and lean:
            subsets = list(found["full"].trace["blocks"])
            seconds["lean"], _ = timed(lambda subsets=subsets: lean_search(backbone, task, recipe, subsets), clock)
    print(f"\n{study.title}, 5 folds, {recipe.epochs} epochs, {len(found['full'].trace)} subsets of up to 3 blocks")
    for search, value in seconds.items():
        ratio = value / seconds["full"] if search == "lean" else seconds["full"] / value
        told = f"full is {ratio:.2f} x faster" if search == "lean" else f"{ratio:.2f} x faster than full"
        print(f"  {search:8} {value:7.1f} s" + ("" if search == "full" else f"  {told}"))
    return found


def search_all(backbone: lab.Chain, task: lab.Task, recipe: lab.Recipe, records: str) -> dict[str, GreedyResult]:
    """What all searches find, on shared scores."""
    study = lab.Study(backbone, task, recipe, folds=5, device=backbone.mean.device, records=records, progress=False)
    found = {search: greedy_subtuning(study, -math.inf, 3, race=race) for search, race in SEARCHES.items()}
    print(f"{study.title}, 5 folds, {recipe.epochs} epochs, {len(found['full'].trace)} subsets of up to 3 blocks")
    return found


def lean_search(backbone: lab.Chain, task: lab.Task, recipe: lab.Recipe, subsets: list[tuple[str, ...]]) -> None:
    """The trainings of a search one after another, on the same folds."""
    device = backbone.mean.device
    for rows, _ in task.folds(5):
        split = task.train.take(rows)
        lean_way(backbone, subsets, lab.Split(split.images.to(device), split.labels), recipe)


def timed(run: Callable[[], object], clock: Callable[[], float]) -> tuple[float, object]:
    """Seconds, and what came out."""
    gc.collect()
    start = clock()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start, result


def report(found: dict[str, dict[str, GreedyResult]]) -> pd.DataFrame:
    """Prints what the searches chose, and with epsilon = 0 would have chosen, of the same rounds."""
    tables = []
    for epsilon in (-math.inf, 0.0):
        own = {
            search: {label: result.replay(epsilon) for label, result in results.items()}
            for search, results in found.items()
        }
        print(f"\nepsilon {epsilon}: chosen blocks, accuracy and its standard error over 5 folds")
        tables.append(agreement_table(**own).assign(epsilon=epsilon))
        for row in tables[-1].sort_values("label", kind="stable").itertuples():
            score = f"{row.accuracy:.3f} +- {row.std * overlap_factor(row.n):.3f}  {' + '.join(row.blocks) or 'none'}"
            cheaper = f"  within 1 SE: {'yes' if row.within else 'no'}, {row.saved_flops:.1f} x fewer FLOPs"
            print(f"  {row.label:20} {row.search:8} {score}{'' if row.search == 'full' else cheaper}")
    return pd.concat(tables, ignore_index=True).drop(columns=["seconds", "saved"])


if __name__ == "__main__":
    main()
