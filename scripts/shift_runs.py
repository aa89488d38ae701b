"""A source network adapted to each corruption of its images with few labels: one CSV, three figures per size.

`python scripts/shift_runs.py --help` lists the options; `--race` gives up hopeless blocks early. Scores are kept in
--records: a killed run resumes where it stopped.
"""

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

import subtuning_lab as lab
from subtuning_lab.data.corruptions.registry import corruption_names
from subtuning_lab.experiments.shift import SHIFT_METHODS
from subtuning_lab.report.machine import machine_line


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="lab-resnet")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--task", default="source", help="the source task, e.g. folder:.data/cifar10")
    parser.add_argument("--pool", type=int, default=None, help="clean training images to choose from; all by default")
    parser.add_argument("--test-size", type=int, default=None, help="test images; all by default")
    parser.add_argument("--corruptions", default=",".join(corruption_names()), help="names, or name@severity")
    parser.add_argument("--severity", type=int, default=5, help="of corruptions that don't say it")
    parser.add_argument("--new-task", action="append", default=[], help="a label shift, e.g. digits")
    parser.add_argument("--sizes", default="100,1000", help="labelled images, comma-separated")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lrs", default="1e-3,3e-3")
    parser.add_argument("--head-lr", type=float, default=1e-2)
    parser.add_argument("--head-start", default="source", help="source or random, or both")
    parser.add_argument("--augment", default="none")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-blocks", type=int, default=3)
    parser.add_argument("--race", action="store_true", help="race the candidates of a round")
    parser.add_argument("--short", type=float, default=0.3, help="of a race; one epoch alone prefers late blocks")
    parser.add_argument("--most", type=int, default=4, help="of a race: candidates that are trained in full")
    parser.add_argument("--methods", default=",".join(SHIFT_METHODS))
    parser.add_argument("--records", type=Path, default=Path("runs/shifts.sqlite"))
    parser.add_argument("--out", type=Path, default=Path("results/shifts"), help="path without its suffix")
    return parser.parse_args()


def main() -> None:
    """Runs every size and shift, and writes tables and figures after each."""
    given = arguments()
    backbone = lab.load_backbone(given.backbone, given.weights)
    task = lab.load_task(given.task, train_size=given.pool, test_size=given.test_size)
    new_tasks = [lab.load_task(spec, test_size=given.test_size) for spec in given.new_task]
    recipe = lab.Recipe(given.epochs, head_lr=given.head_lr, batch_size=given.batch_size, augment=given.augment)
    choices = {"lr": [float(lr) for lr in given.lrs.split(",")], "bn": ["batch", "frozen"]}
    recipes = lab.recipe_grid(recipe, **choices, head_start=given.head_start.split(","))
    how = {"folds": given.folds, "repeats": given.repeats, "max_blocks": given.max_blocks, "records": given.records}
    how["race"] = lab.Race(short=given.short, most=given.most) if given.race else None
    methods = [name.strip() for name in given.methods.split(",")]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(machine_line())
    tables = []
    for size in map(int, given.sizes.split(",")):
        for shift in [*given.corruptions.split(","), *new_tasks]:
            start, old = time.process_time(), isinstance(shift, str)
            names = [shift if "@" in shift else f"{shift}@{given.severity}"] if old else []
            own = how | {"new_tasks": [] if old else [shift], "train_size": size}
            tables.append(lab.shift_study(backbone, task, names, recipes, methods, **own))
            print(f"{tables[-1]['shift'].iloc[0]}: {time.process_time() - start:.0f} s of processor time", flush=True)
            write(pd.concat(tables, ignore_index=True), given.out, size, backbone.block_names)


def write(table: pd.DataFrame, out: Path, size: int, block_names: tuple[str, ...]) -> None:
    """Writes the whole table, and what it says of one size as a summary and as figures."""
    table.to_csv(out.with_suffix(".csv"), index=False, float_format="%.6g")
    own = table[table["train_size"] == size]
    summary = lab.summarize_shifts(own)
    lab.summarize_shifts(table).to_csv(f"{out}_summary.csv", index=False, float_format="%.6g")
    figures = {"methods": lab.plot_shifts(summary)}
    if "greedy" in set(own["method"]):
        figures["steps"] = lab.plot_steps(lab.chosen_steps(own, block_names))
    if (own["kind"] == "input").any():
        average = lab.average_shifts(own)
        figures["forgetting"] = lab.plot_forgetting(average, summary[summary["kind"] == "input"])
        print(average.round(4).to_string(index=False), flush=True)
    for name, ax in figures.items():
        ax.figure.savefig(f"{out}_{size}_{name}.png", dpi=150, bbox_inches="tight")
        plt.close(ax.figure)


if __name__ == "__main__":
    main()
