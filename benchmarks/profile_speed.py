"""How much faster is the one-pass profile? Ratios of seconds, measured side by side in one run.

Four ways to train the same candidates (every block alone and linear probing) on the same images for the same steps:

    one-pass     the engine: frozen trunk once, frozen suffixes shared, BatchNorm folded
    lean (a)     one candidate after another, images on the device, same augmentation
    usual (b)    one candidate after another with a DataLoader of PIL images, per-image transforms, a fresh model

Each case runs `--repeats` times, the ways alternating; printed are medians, the smallest and largest ratio, the peak of
memory above what was taken before, the ratio that the count of arithmetic allows when only the trunk is shared, and the
share of the machine's own rate (of one large matrix product) that each way reaches, counted on that arithmetic.

    python benchmarks/profile_speed.py                      # lab-resnet at 32 px, resnet50 at 64 px
    python benchmarks/profile_speed.py --case lite0-96      # EfficientNet-Lite0: depthwise convolutions
    python benchmarks/profile_speed.py --case resnet50-224  # the GPU's case: 1,000 images, bf16
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event, Thread

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import subtuning_lab as lab
from subtuning_lab.data.augment import augment
from subtuning_lab.nets.flops import training_flops
from subtuning_lab.nets.inputs import fast_layout, layout_of
from subtuning_lab.report.machine import machine_line
from subtuning_lab.utils.random import Stream, seeded


@dataclass(frozen=True)
class Case:
    """One backbone and one amount of work."""

    backbone: str
    pixels: int
    images: int
    batch_size: int
    epochs: int
    usual_images: int  # the usual way is slow: it does a part of the work, and its time is scaled up
    usual_every: int = 1  # and every so many candidates
    reference: bool = True  # whether the engine's plain loop is timed, too

    def recipe(self, device: str) -> lab.Recipe:
        precision = "bf16" if device == "cuda" else "float32"
        return lab.Recipe(epochs=self.epochs, batch_size=self.batch_size, augment="shift_flip", precision=precision)


WORKERS = min(8, os.cpu_count() or 1)  # of the usual way's DataLoader, on a GPU
CASES = {
    "lab-resnet": Case("lab-resnet", 32, 256, 32, 4, 256),
    "resnet50-64": Case("resnet50", 64, 64, 32, 2, 32),
    "lite0-96": Case("tf_efficientnet_lite0", 96, 64, 32, 2, 32),
    "resnet50-224": Case("resnet50", 224, 1000, 64, 1, 1000, usual_every=8, reference=False),
    "tiny": Case("lab-resnet", 32, 16, 16, 1, 16),
}


class PilImages(Dataset):
    """Decoded PIL images with per-image transforms, as a training script usually has them."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, backbone: lab.Chain):
        self.images = [Image.fromarray(np.moveaxis(image, 0, -1)) for image in images.numpy()]
        self.labels = labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[-1], padding=images.shape[-1] // 8, padding_mode="edge"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def main() -> None:
    """Measures the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="default: lab-resnet and resnet50-64")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(machine_line(), f"threads {torch.get_num_threads()}")
    for name in arguments.case or ["lab-resnet", "resnet50-64"]:
        measure(name, CASES[name], arguments.repeats)


def measure(name: str, case: Case, repeats: int) -> None:
    """Prints the ratios of one case."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = "pretrained" if case.backbone.startswith("lab-") else "random"
    backbone = lab.load_backbone(case.backbone, weights).to(device)
    subsets = [[], *([block] for block in backbone.block_names)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (case.images, 3, case.pixels, case.pixels), generator=generator, dtype=torch.uint8)
    train = lab.Split(images.to(device), torch.arange(case.images) % 10)
    recipe = case.recipe(device)

    def engine(kind: str) -> Callable[[], object]:
        return lambda: lab.fit_together(backbone, subsets, train, recipe, num_classes=10, engine=kind)

    few = lab.Split(images[: case.usual_images], train.labels[: case.usual_images])
    ways = {
        "one-pass": engine("one_pass"),
        "lean (a)": lambda: lean_way(backbone, subsets, train, recipe),
        "reference": engine("sequential"),
        "usual (b)": lambda: usual_way(backbone, subsets[:: case.usual_every], few, recipe),
    }
    if not case.reference:
        del ways["reference"]
    seconds = {way: [] for way in ways}
    memory = {}
    for run in [*ways.values()][:-1]:  # warm-up: kernels are chosen, memory is taken
        run()
    for _ in range(repeats):
        for way, run in ways.items():
            elapsed, peak = timed(run, device)
            memory[way] = max(peak, memory.get(way, 0.0))
            part = case.usual_images / case.images * len(subsets[:: case.usual_every]) / len(subsets)
            seconds[way].append(elapsed / part if way == "usual (b)" else elapsed)
            print(f"{name}: {way} {elapsed:.2f} s", file=sys.stderr, flush=True)
    rate = matrix_rate(device, recipe.precision)
    report(name, case, lab.part_table(backbone, case.pixels), subsets, seconds, memory, rate)


def lean_way(backbone: lab.Chain, subsets: list, train: lab.Split, recipe: lab.Recipe) -> None:
    """Per candidate the plain training loop; batches are cut and augmented on the device."""
    device, steps = backbone.mean.device, -(-len(train) // recipe.batch_size)
    for blocks in subsets:
        model = lab.set_trainable(copy.deepcopy(backbone), blocks)
        network = nn.Sequential(model, nn.Linear(model.num_features, 10).to(device)).train()
        network = fast_layout(network, layout_of(backbone, recipe.precision == "bf16"))
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, fused=True)
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(train), generator=seeded(Stream.ORDER, 0, epoch))
            for batch, rows in enumerate(order.tensor_split(steps)):
                chance = seeded(Stream.VIEW, 0, epoch, batch)
                views = augment(train.images[rows.to(device)] / 255, recipe.augment, None, chance)
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    loss = F.cross_entropy(network(model.normalize(views)), train.labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def usual_way(backbone: lab.Chain, subsets: list, train: lab.Split, recipe: lab.Recipe) -> None:
    """Per candidate a fresh model, a DataLoader of PIL images, a full forward, AdamW."""
    device = backbone.mean.device
    for blocks in subsets:
        weights = "pretrained" if backbone.name.startswith("lab-") else "random"
        model = lab.set_trainable(lab.load_backbone(backbone.name, weights), blocks).to(device)
        network = nn.Sequential(model, nn.Linear(model.num_features, 10).to(device)).train()
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=recipe.lr)
        loader = DataLoader(
            PilImages(train.images, train.labels, backbone),
            recipe.batch_size,
            shuffle=True,
            num_workers=WORKERS if device.type == "cuda" else 0,
        )
        for _ in range(recipe.epochs):
            for images, labels in loader:
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    loss = F.cross_entropy(network(images.to(device)), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def timed(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds, and the peak of memory in MiB above what was taken before (of the GPU, or of the process)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**20
    with PeakMemory() as peak:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    return seconds, peak.mebibytes


class PeakMemory(Thread):
    """Watches the process's resident memory every 10 ms while it is entered."""

    def __enter__(self) -> PeakMemory:
        self.process, self.done = psutil.Process(), Event()
        self.before = self.peak = self.process.memory_info().rss
        self.start()
        return self

    def run(self) -> None:
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.join()

    @property
    def mebibytes(self) -> float:
        """The peak above the start."""
        return (self.peak - self.before) / 2**20


def matrix_rate(device: str, precision: str, repeats: int = 10) -> float:
    """Operations a second of one large matrix product, the machine's own speed in that precision."""
    side = 8192 if device == "cuda" else 2048
    a = torch.rand(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = [timed(lambda: [a @ a for _ in range(repeats)], device)[0] for _ in range(3)]
    return 2 * side**3 * repeats / min(seconds)


def report(name: str, case: Case, parts, subsets: list, seconds: dict, memory: dict, rate: float) -> None:
    """Prints one case's table."""
    costs = [training_flops(parts, blocks) for blocks in subsets]
    alone = sum(sum(cost.values()) for cost in costs)
    shared = sum(cost["forward"] + cost["backward"] for cost in costs) + max(cost["trunk"] for cost in costs)
    print(f"\n{name}: {len(subsets)} candidates, {case.images} images of {case.pixels} px, {case.epochs} epochs")
    counts = f"{alone / 1e9:.2f} GFLOP per image and step alone, {shared / 1e9:.2f} with the trunk shared"
    print(f"  arithmetic: {counts}: {alone / shared:.2f} x")
    print(f"  the machine's own rate: {rate / 1e12:.2f} TFLOP/s")
    for way, values in seconds.items():
        share = shared * case.images * case.epochs / statistics.median(values) / rate
        print(f"  {way:9} {statistics.median(values):8.2f} s ({share:.1%})  peak {memory[way]:6.0f} MiB", end="")
        print("" if way == "one-pass" else "  " + ratio(values, seconds["one-pass"]))


def ratio(slow: list[float], fast: list[float]) -> str:
    """The ratio of two ways, run by run."""
    ratios = sorted(ratios_of(slow, fast))
    return f"one-pass is {statistics.median(ratios):.2f} x faster ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def ratios_of(slow: list[float], fast: list[float]) -> Iterator[float]:
    return (a / b for a, b in zip(slow, fast, strict=True))


if __name__ == "__main__":
    main()
