"""Methods against training-set size on a real network and real images: one CSV, one figure of curves.

`python scripts/low_data_runs.py --help` lists the options; docs/low_data.md has the commands of its figures. Scores are
kept in --records: a killed run resumes where it stopped.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import subtuning_lab as lab
from subtuning_lab.baselines.compare import RANDOM_SIZE
from subtuning_lab.report.machine import machine_line
from subtuning_lab.report.presets import parse_parameter

METHODS = ["linear probing", "full finetuning", "LP-FT", "BitFit", "LoRA", RANDOM_SIZE, "best window", "greedy"]


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="lab-resnet")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--drop-block", action="append", default=[])
    parser.add_argument("--model-option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--task", default="digits")
    parser.add_argument("--sizes", default="20,50,100", help="training images, comma-separated")
    parser.add_argument("--test-size", type=int, default=None, help="test images; all by default")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--lrs", default="1e-3,3e-3")
    parser.add_argument("--augment", default="none")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-blocks", type=int, default=2)
    parser.add_argument("--max-window", type=int, default=2)
    parser.add_argument("--race", action="store_true", help="give up hopeless candidates of greedy and windows early")
    parser.add_argument("--pilot", action="store_true", help="recipes are chosen in the first repetition, for all")
    parser.add_argument("--methods", default=", ".join(METHODS))
    parser.add_argument("--records", type=Path, default=Path("runs/low_data.sqlite"))
    parser.add_argument("--out", type=Path, default=Path("results/low_data"), help="path without its suffix")
    return parser.parse_args()


def main() -> None:
    """Runs every size and repetition, and writes the table after each size."""
    given = arguments()
    options = dict(parse_parameter(text) for text in given.model_option)
    backbone = lab.load_backbone(given.backbone, given.weights, drop_blocks=given.drop_block, **options)
    task = lab.load_task(given.task, test_size=given.test_size)
    recipe = lab.Recipe(epochs=given.epochs, head_lr=1e-2, batch_size=given.batch_size, augment=given.augment)
    recipe = lab.recipe_grid(recipe, image_size=[given.image_size])[0]
    recipes = lab.recipe_grid(recipe, lr=[float(lr) for lr in given.lrs.split(",")], bn=["batch", "frozen"])
    how = {name: getattr(given, name) for name in ("folds", "repeats", "max_blocks", "max_window", "pilot", "records")}
    how["race"] = lab.Race(short=1 / given.epochs) if given.race else None
    methods = [name.strip() for name in given.methods.split(",")]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    sizes = [int(size) for size in given.sizes.split(",")]
    print(machine_line())
    for last in range(1, len(sizes) + 1):  # what is in the records is read
        table = lab.low_data_curves(backbone, task, sizes[:last], recipes, methods, draws=2, **how)
        summary = lab.summarize_repeats(table)
        table.to_csv(given.out.with_suffix(".csv"), index=False, float_format="%.6g")
        axes = lab.plot_curves(summary) if last > 1 else lab.plot_methods(summary)
        axes.figure.savefig(given.out.with_suffix(".png"), dpi=150, bbox_inches="tight")
        print(summary.round(4).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
