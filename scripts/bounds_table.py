"""All bounds of every block of a network on a task: tables of values, terms and rank correlations, and a figure.

`python scripts/bounds_table.py --help` lists the options; docs/bounds.md has the commands of its tables. Fold scores
are kept in --records; the trainings that bounds are made of are not.
"""

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

import subtuning_lab as lab
from subtuning_lab.report.machine import machine_line
from subtuning_lab.report.presets import parse_parameter
from subtuning_lab.theory.measure import measure_bounds, rank_correlations

NAMES = {
    "paper": "paper's rate",
    "rademacher": "Rademacher",
    "pac_bayes": "PAC-Bayes",
    "half_prior": "PAC-Bayes, prior of half",
    "test_set": "test set",
}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="lab-resnet")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--drop-block", action="append", default=[])
    parser.add_argument("--model-option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--task", action="append", help="several are pooled in the rank correlations")
    parser.add_argument("--train-size", type=int, default=1000)
    parser.add_argument("--test-size", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--head-lr", type=float, default=1e-2)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1, help="of the fold scores")
    parser.add_argument("--greedy", type=int, default=0, metavar="K", help="add greedy's choice of at most K blocks")
    parser.add_argument("--n-jacobian", type=int, default=None)
    parser.add_argument("--posteriors", type=int, default=1000)
    parser.add_argument("--half-prior", action="store_true")
    parser.add_argument("--test", action="store_true", help="add the test set's bound, which uses the test images")
    parser.add_argument("--only", default=None, help="labels, comma-separated")
    parser.add_argument("--records", type=Path, default=Path("runs/bounds.sqlite"))
    parser.add_argument("--out", type=Path, default=Path("results/bounds"), help="path without its suffix")
    return parser.parse_args()


def main() -> None:
    """Measures every task and writes the tables and the figure."""
    given = arguments()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    table = pd.concat([measured(given, spec) for spec in given.task or ["digits"]], ignore_index=True)
    print(machine_line(), f"processor time {time.process_time() - start:.0f} s")
    table.drop(columns="bounds").to_csv(given.out.with_suffix(".csv"), index=False, float_format="%.6g")
    shown = [name for name in NAMES if name in table]
    ranks = rank_correlations(table, shown) if table["blocks"].map(len).eq(1).sum() > 2 else pd.DataFrame()
    ranks.to_csv(given.out.with_name(given.out.name + "_ranks.csv"), index=False, float_format="%.4g")
    figure(table, shown).savefig(given.out.with_suffix(".png"), dpi=150, bbox_inches="tight")
    print(table.drop(columns=["bounds", "blocks", "study"]).round(4).to_string(index=False))
    print(ranks.round(3).to_string(index=False))


def measured(given: argparse.Namespace, spec: str) -> pd.DataFrame:
    """The table of one task: linear probing, every block, greedy's choice and full finetuning."""
    options = dict(parse_parameter(text) for text in given.model_option)
    backbone = lab.load_backbone(given.backbone, given.weights, drop_blocks=given.drop_block, **options)
    task = lab.load_task(spec, train_size=given.train_size, test_size=given.test_size, image_size=given.image_size)
    rates = {"lr": given.lr, "head_lr": given.head_lr, "batch_size": given.batch_size}
    recipe = lab.Recipe(epochs=given.epochs, bn="frozen", **rates)
    given.records.parent.mkdir(parents=True, exist_ok=True)
    study = lab.Study(
        backbone, task, recipe, folds=given.folds, seeds=range(given.seeds), records=given.records, progress=False
    )
    subsets = {"linear probing": [], **{name: [name] for name in study.block_names}, "full finetuning": "all"}
    price = {}
    if given.greedy:
        subsets["greedy"] = lab.greedy_subtuning(study, max_blocks=given.greedy).blocks
        price["greedy"] = lab.selection_price(len(study.block_names), given.greedy)
    if given.only:
        subsets = {label: subsets[label] for label in given.only.split(",")}
    how = {"n_jacobian": given.n_jacobian, "posteriors": given.posteriors, "half_prior": given.half_prior}
    return measure_bounds(study, subsets, price=price, test=given.test, **how)


def figure(table: pd.DataFrame, shown: list[str]) -> plt.Figure:
    """Values of every subset, a panel for each task; what is above the line at 1 says nothing."""
    groups = list(table.groupby("study", sort=False))
    canvas, axes = plt.subplots(1, len(groups), figsize=(6 * len(groups), 4.5), squeeze=False, sharey=True)
    for (title, rows), axis in zip(groups, axes[0], strict=True):
        for name, marker in zip(shown, "osD^v", strict=False):
            axis.plot(rows["label"], rows[name], marker, label=NAMES[name])
        axis.plot(rows["label"], 1 - rows["accuracy"], "kx", label="error on the folds")
        axis.axhline(1, color="grey", linewidth=1)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="x", rotation=90)
    axes[0, 0].set_ylabel("bound on the error")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas


if __name__ == "__main__":
    main()
