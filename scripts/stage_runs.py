"""Early or late blocks? Every block of a CIFAR ResNet tuned alone, where images shift and where classes are new.

Images come from CIFAR-10's test folder, which the network's pretraining never saw: 80 % to adapt on, 20 % to test on.
Under an input shift the pretrained readout is where the new one starts; new classes get a random one. Learning rate and
BatchNorm mode are chosen on the folds, for every block alike; scores are kept in --records.

    python scripts/stage_runs.py --weights cifar10_resnet20.safetensors --data .data/cifar10/test
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pandas as pd

import subtuning_lab as lab
from subtuning_lab.report.machine import commit, machine_line

NETWORK = "cifar_resnet20"
SHIFTS = ("gaussian_noise@5", "contrast@5", "defocus_blur@5")


def main() -> None:
    """Runs every shift and repetition, and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True, help="folder of CIFAR-10's test images, one folder a class")
    parser.add_argument("--new-task", default="digits")
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--test-size", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lrs", default="1e-3, 3e-3")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=Path, default=Path("runs/stages.sqlite"))
    parser.add_argument("--out", type=Path, default=Path("results/shift.csv"))
    given = parser.parse_args()
    given.records.parent.mkdir(parents=True, exist_ok=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    backbone = lab.load_backbone(NETWORK, given.weights)
    source = lab.load_task(f"folder:{given.data}", test_size=given.test_size, progress=False)
    new = lab.load_task(given.new_task, progress=False)
    recipe = lab.Recipe(epochs=given.epochs, batch_size=given.batch_size, head_lr=1e-2)
    lrs = [float(lr) for lr in given.lrs.split(",")]
    recipes = lab.recipe_grid(recipe, lr=lrs, bn=["batch", "frozen"], head_start=["source"])
    options = {"train_size": given.train_size, "repeats": given.repeats, "folds": given.folds, "progress": False}
    tables = []
    for place, study in lab.shift_studies(
        backbone, source, SHIFTS, recipes, new_tasks=[new], records=given.records, **options
    ):
        start = time.process_time()
        rows = tested(study).assign(network=NETWORK, shift=place["shift"], kind=place["kind"])
        rows = rows.assign(train_images=place["train_size"], seed=place["repeat"])
        rows = rows.assign(test_images=len(study.task.test), epochs=given.epochs, batch_size=given.batch_size)
        command = " ".join(["python", "scripts/stage_runs.py", *sys.argv[1:]])
        tables.append(rows.assign(machine=machine_line(), commit=commit(), command=command))
        pd.concat(tables).to_csv(given.out, index=False, float_format="%.6g")
        told = rows.groupby("stage")["test_accuracy"].mean().round(3).to_dict()
        print(place, told, f"{time.process_time() - start:.0f} s of processor time", flush=True)


def tested(study: lab.Study) -> pd.DataFrame:
    """Test accuracy of every block alone (stage 1, 2 and 3), of linear probing (0) and full finetuning (4)."""
    subsets = {"linear probing": ((), 0), "full finetuning": ("all", 4)}
    subsets |= {name: ((name,), int(name[len("layer")])) for name in study.block_names}
    rows = [
        {"label": label, "stage": stage, "test_accuracy": study.test(blocks).mean}
        for label, (blocks, stage) in subsets.items()
    ]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
