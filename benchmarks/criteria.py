"""Which blocks, without a search? Criteria beside the finetuning profile that each of them would save.

For every pair of network and task: the profile on folds, scores of all blocks by every criterion (and by the prior over
the other pairs' profiles of the same network), and on test images the criteria's first block and first two, beside the
profile's best block, greedy's two, linear probing and full finetuning. Trainings are read from `--records` where they
are known, and scores from `--out`, so that a stopped run goes on where it was.

    cd benchmarks
    python criteria.py --pair lab-resnet=digits --pair lab-resnet=count --records criteria.sqlite --out criteria
    python criteria.py --pair cifar_resnet20=digits --weights cifar_resnet20=cifar10_resnet20.safetensors

Written: OUT/scores/*.csv, OUT/criteria.csv (a row a pair and criterion), OUT/criteria_mean.csv, and OUT/criteria.png,
cost against regret.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import subtuning_lab as lab
from subtuning_lab.report.page import machine_line

STAGES = ("profile", "scores", "test", "greedy")
RECIPE = lab.Recipe(epochs=6, lr=3e-3, head_lr=1e-2, batch_size=20)  # as notebook 01's


def main() -> None:
    """Measures the pairs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", action="append", required=True, metavar="BACKBONE=TASK")
    parser.add_argument("--weights", action="append", default=[], metavar="BACKBONE=PATH")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--test-images", type=int, default=1000, help="of folders; other tasks have all of theirs")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--left-out", action="append", default=[], help="a criterion that would take long, e.g. ntk")
    parser.add_argument("--device")
    parser.add_argument("--records", type=Path, default=Path("criteria.sqlite"))
    parser.add_argument("--out", type=Path, default=Path("criteria"))
    parser.add_argument("--stage", choices=STAGES, action="append", help="what to do; all by default")
    arguments = parser.parse_args()
    (arguments.out / "scores").mkdir(parents=True, exist_ok=True)
    print(machine_line())
    stages, weights = arguments.stage or STAGES, dict(text.split("=", 1) for text in arguments.weights)
    tables = []
    for backbone, task in (text.split("=", 1) for text in arguments.pair):
        study = study_of(backbone, weights.get(backbone, "pretrained"), task, arguments)
        if "profile" in stages:
            profile = lab.finetuning_profile(study)
            print(f"{study.title}: best {profile.best()[0]}", flush=True)
        if "scores" in stages:
            compared = lab.compare_criteria(study, scores_of(study, arguments.out / "scores", arguments.left_out))
            if "test" in stages:
                compared = with_tests(study, compared, arguments.out / "scores", "greedy" in stages)
            tables.append(compared.assign(pair=f"{backbone} on {task}"))
            print(compared.to_string(float_format="{:.3f}".format), flush=True)
    if tables:
        write(pd.concat(tables, ignore_index=True), arguments.out)


def study_of(backbone: str, weights: str, task: str, arguments: argparse.Namespace) -> lab.Study:
    """Both BatchNorm modes for networks that have BatchNorm, two learning rates for those that have none."""
    network = lab.load_backbone(backbone, weights)
    test_size = arguments.test_images if task.startswith("folder:") else None
    images = lab.load_task(task, train_size=arguments.images, test_size=test_size, progress=False)
    norms = any("BatchNorm" in type(module).__name__ for module in network.modules())
    grid = {"bn": ["batch", "frozen"]} if norms else {"lr": [1e-3, 3e-3]}
    plan = lab.recipe_grid(RECIPE, **grid, image_size=[arguments.image_size])
    options = {"records": arguments.records, "device": arguments.device, "progress": False}
    return lab.Study(network, images, plan, folds=arguments.folds, **options)


def scores_of(study: lab.Study, folder: Path, left_out: Sequence[str] = ()) -> pd.DataFrame:
    """Scores by every criterion, and by the prior as far as the records have other tasks."""
    path = folder / f"{study.title.replace('/', '-')}.csv"
    if not path.exists():
        names = [name for name in lab.criterion_names() if name not in (*left_out, "prior")]
        lab.score_blocks(study, names).to_csv(path, index=False)
    tables = [pd.read_csv(path)]
    try:
        tables.append(lab.score_blocks(study, "prior"))
    except ValueError as error:
        print(error)
    return pd.concat(tables, ignore_index=True)


def with_tests(study: lab.Study, compared: pd.DataFrame, folder: Path, greedy: bool) -> pd.DataFrame:
    """Test accuracy of each criterion's first block and first two; the rivals are rows of their own."""
    scores = scores_of(study, folder)
    subsets = {
        (name, f"test_{k}"): lab.select_blocks(own, k=k)
        for name, own in scores.groupby("criterion", sort=False)
        for k in (1, 2)
    }
    best = lab.finetuning_profile(study).best()
    subsets |= {("linear probing", "test_1"): (), ("full finetuning", "test_1"): "all", ("profile", "test_1"): best}
    if greedy:
        chosen = lab.greedy_subtuning(study, epsilon=float("-inf"), max_blocks=2)
        subsets["profile", "test_2"] = chosen.blocks
    accuracy = {blocks: study.test(blocks).mean for blocks in dict.fromkeys(subsets.values())}
    rows = pd.Series({key: accuracy[blocks] for key, blocks in subsets.items()}).unstack()
    return compared.merge(rows.rename_axis("criterion").reset_index(), "outer", "criterion", sort=False)


def write(table: pd.DataFrame, out: Path) -> None:
    """The rows, their means over pairs, and cost against regret."""
    table.to_csv(out / "criteria.csv", index=False, float_format="{:.5g}".format)
    numbers = [name for name in ("spearman", "regret", "share", "test_1", "test_2") if name in table]
    groups = table.groupby("criterion", sort=False)
    means = groups[numbers].mean().join(groups[["spearman", "regret"]].std().add_suffix("_std"))
    means = means.assign(pairs=groups["pair"].nunique()).sort_values("spearman", ascending=False)
    means.to_csv(out / "criteria_mean.csv", float_format="{:.4g}".format)
    print(means.to_string(float_format="{:.3f}".format))
    shown = means.dropna(subset="regret").reset_index()
    shown = shown.rename(columns={"criterion": "method", "regret_std": "std"}).assign(n=means["pairs"].max())
    ax = lab.plot_tradeoff(shown, "share", "regret", xlabel="share of the profile's FLOPs")
    ax.set_ylabel("behind the best block, on the folds")
    ax.figure.savefig(out / "criteria.png", dpi=120)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
