"""The paper's comparisons on a whole ImageNet network and photographs: tidy tables, one row per method and repetition.

A job is one training set of one task: the finetuning profile, greedy SubTuning, the best window and the methods that
they are compared with, all choosing among the same recipes on the same folds, and then tested once. Jobs run side by
side (`--jobs`), in order of value until `--minutes` are over; what is finished is in --out, and every score in
--records, so that the same call goes on where the last one stopped.

    python scripts/real_runs.py --weights tf_efficientnet_lite0_in1k.safetensors --data .data --jobs 2
    python scripts/real_runs.py --tiny      # a rehearsal in small, with lab-resnet on the digits
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

import subtuning_lab as lab
from subtuning_lab.baselines.compare import RANDOM_SIZE
from subtuning_lab.report.machine import commit, machine_line

NETWORK = "tf_efficientnet_lite0"
METHODS = ("linear probing", "full finetuning", "LP-FT", "BitFit", RANDOM_SIZE)
PROFILE, BEST_BLOCK, BEST_WINDOW, GREEDY = "profile", "best block", "best window", "greedy"
#: of the tables, after what the rows are about and before who computed them
COLUMNS = ["method", "label", "kind", "position", "blocks", "params", "accuracy", "std", "n", "trainings", "settings"]
COLUMNS += ["test_accuracy"]


@dataclass(frozen=True)
class Job:
    """One training set: `train` images of a task, at a size in pixels, drawn by a seed."""

    table: str
    task: str
    train: int
    seed: int
    pixels: int = 96

    @property
    def name(self) -> str:
        """Names its records, e.g. "caltech101-505-0"."""
        return "-".join([self.task.replace("+", "-").replace("@", ""), str(self.train), str(self.seed)])


def plan() -> list[Job]:
    """All jobs, the most telling ones first."""
    kinds = ("gaussian_noise", "contrast", "defocus_blur")
    shifts = [f"caltech101+{kind}@{severity}" for severity in (5, 3) for kind in kinds]
    groups = [
        [("low_data", "caltech101", 505, 96)],
        [("low_data", "caltech101", 202, 96), ("low_data", "caltech101", 1010, 96)],
        [("low_data", "cifar10", n, 64) for n in (100, 1000)],
        [("low_data_shifted", task, 505, 96) for task in shifts[:3]],
        [("low_data", "cifar10", 300, 64), ("low_data", "caltech101", 2020, 96)],
        [("low_data_shifted", task, 505, 96) for task in shifts[3:]],
        [("low_data", "cifar10", 5000, 64)],
    ]
    return [
        Job(table, task, n, seed, pixels)
        for group in groups
        for seed in range(3)
        for table, task, n, pixels in group
    ]


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="package", help="of EfficientNet-Lite0: a file, or the extra [imagenet]")
    parser.add_argument("--data", type=Path, default=Path(".data"), help="folder with caltech101/ and cifar10/")
    parser.add_argument("--out", type=Path, default=Path("results/real"), help="folder of the tables")
    parser.add_argument("--records", type=Path, default=Path("runs/real"), help="folder of the records")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--minutes", type=float, default=600.0, help="no job goes on for longer")
    parser.add_argument("--only", default="", help="jobs whose names begin so, e.g. caltech101-505-,cifar10-")
    parser.add_argument("--pixels", type=int, help="side of the images; by default as planned, 96 or 64")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lrs", default="1e-3, 3e-3")
    parser.add_argument("--head-lrs", default="1e-2, 3e-2")
    parser.add_argument("--memory", type=float, help="GiB that a pass may take; by default a third of what is free")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--max-blocks", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Runs the plan, and writes the tables after every job."""
    given, start = arguments(), time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    given.records.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in plan() if job.name.startswith(tuple(given.only.split(",")))]
    if given.pixels:
        jobs = [replace(job, pixels=given.pixels) for job in jobs]
    if given.tiny:
        jobs = [Job(job.table, job.task.replace(job.task.split("+")[0], "digits"), 20, 0, 32) for job in jobs]
        jobs = list(dict.fromkeys(jobs))
        given.epochs, given.folds, given.lrs, given.head_lrs, given.max_blocks = 1, 2, "1e-3", "1e-2", 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=context) as pool:
        running: dict[Future, Job] = {pool.submit(run, job, given): job for job in jobs}
        while running:
            left = 60 * given.minutes - (time.monotonic() - start)
            done, _ = wait(running, timeout=max(0.0, left), return_when=FIRST_COMPLETED)
            if not done:
                print(f"time is over; {len(running)} of {len(jobs)} jobs are left: call again", flush=True)
                pool.terminate_workers() if hasattr(pool, "terminate_workers") else _kill(pool)
                break
            for future in done:
                job = running.pop(future)
                report(job, future, given.out, time.monotonic() - start)


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):  # Python before 3.14 has no other way
        process.kill()


def report(job: Job, future: Future, out: Path, seconds: float) -> None:
    """Writes a finished job's rows into its table, in place of older ones of the same job; an error is told."""
    if future.exception() is not None:
        print(f"{seconds:6.0f} s  {job.name}: failed: {future.exception()!r}", flush=True)
        return
    rows: pd.DataFrame = future.result()
    path = out / f"{job.table}.csv"
    if path.exists():
        known = pd.read_csv(path)
        same = (known["data"] == job.task) & (known["train_images"] == job.train) & (known["seed"] == job.seed)
        rows = pd.concat([known[~same], rows], ignore_index=True)
    rows.to_csv(path, index=False, float_format="%.6g")
    tested = future.result().dropna(subset=["test_accuracy"]).set_index("method")["test_accuracy"]
    told = ", ".join(f"{name} {100 * value:.1f}" for name, value in tested.items())
    print(f"{seconds:6.0f} s  {job.name}: {told}", flush=True)


def run(job: Job, given: argparse.Namespace) -> pd.DataFrame:
    """The rows of one job."""
    torch.set_num_threads(1)  # jobs run side by side
    start = time.perf_counter()
    network = "lab-resnet" if given.tiny else NETWORK
    backbone = lab.load_backbone(network, "pretrained" if given.tiny else given.weights)
    spec = job.task if given.tiny else f"folder:{given.data}/{job.task}"
    task = lab.load_task(spec, test_size=20 if given.tiny else None, progress=False).subset(job.train, seed=job.seed)
    study = lab.Study(
        backbone,
        task,
        recipes(given, job.pixels),
        folds=given.folds,
        seeds=(job.seed,),
        records=given.records / f"{job.name}.sqlite",
        memory_limit=None if given.memory is None else int(given.memory * 2**30),
        progress=False,
    )
    race = lab.Race(short=1 / 3, most=4)
    profile = lab.finetuning_profile(study)
    searches = {
        GREEDY: lab.greedy_subtuning(study, max_blocks=given.max_blocks, race=race),
        BEST_WINDOW: lab.best_window(study, 2, race),
    }
    table = lab.compare_methods(
        study, METHODS, searches, subsets={BEST_BLOCK: profile.best()}, draws=2, test=True, seed=job.seed
    )
    rows = pd.concat([table, profile.table.assign(method=PROFILE)], ignore_index=True).reindex(columns=COLUMNS)
    rows = rows.rename(columns={"accuracy": "fold_accuracy", "std": "fold_std", "n": "folds"})
    rows["blocks"] = [" + ".join(value) if isinstance(value, tuple | list) else value for value in rows["blocks"]]
    facts = {
        "network": network,
        "data": job.task,
        "pixels": job.pixels,
        "train_images": job.train,
        "test_images": len(task.test),
        "seed": job.seed,
        "epochs": given.epochs,
        "batch_size": given.batch_size,
        "search": "raced",
    }
    how = {"seconds": round(time.perf_counter() - start, 1), "machine": machine_line(), "commit": commit()}
    how["command"] = " ".join(["python", "scripts/real_runs.py", *sys.argv[1:]])
    return pd.DataFrame(facts, index=rows.index).join(rows).assign(**how)


def recipes(given: argparse.Namespace, pixels: int) -> list[lab.Recipe]:
    """The grid that every method chooses from; without augmentation the frozen trunk is computed once."""
    recipe = lab.Recipe(
        epochs=given.epochs, batch_size=given.batch_size, image_size=pixels, precision=given.precision
    )
    lrs, head_lrs = ([float(rate) for rate in text.split(",")] for text in (given.lrs, given.head_lrs))
    return lab.recipe_grid(recipe, lr=lrs, head_lr=head_lrs, bn=["batch", "frozen"])


if __name__ == "__main__":
    main()
