"""How much faster is one merged network than separate networks one after another? Ratios, side by side in one run.

Each of 1 to 8 tasks has one tuned block of its own in the last third of the blocks, all with different weights. Both
sides are treated alike: BatchNorm folded, weights packed on a CPU, the same memory layout and threads, inference mode;
they alternate, pass by pass. Printed are medians of the ratio with quartiles, beside the ratios that counting allows:
of floating point operations, which bind where batches are large, and of the weights that are read, which may bind where
they are small. The share is that of the operations. Then the cost of one extra task tuned in the middle, and the memory
of 20 tasks.

    python benchmarks/merged_latency.py                            # ResNet-18, ResNet-50, ViT-tiny at 64 px
    python benchmarks/merged_latency.py --case resnet18 --plain    # weights as torch keeps them
    OMP_NUM_THREADS=1 python benchmarks/merged_latency.py --clock cpu   # on a machine that is busy with other work
    python benchmarks/merged_latency.py --device cuda --size 224   # on a GPU
    python benchmarks/merged_latency.py --device cuda --size 224 --mode cuda_graph   # without Python's share
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

import subtuning_lab as lab
from subtuning_lab.inference.export import GRAPH, MODES, optimize
from subtuning_lab.inference.latency import OneAfterAnother, compare_latency
from subtuning_lab.inference.merge import merge_tasks
from subtuning_lab.report.machine import machine_line

CASES = ("resnet18", "resnet50", "vit_tiny_patch16_224", "vit_base_patch16_224")
DEFAULT = CASES[:3]
TASKS, BATCHES, MANY, CLASSES = (1, 2, 4, 8), (1, 8), 20, 10


def main() -> None:
    """Measures the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help=f"default: {', '.join(DEFAULT)}")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images in pixels")
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--runs", type=int, default=30, help="timed passes of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: computing time; use one thread")
    parser.add_argument("--layout", choices=("channels_last", "contiguous"), default="channels_last")
    parser.add_argument("--plain", action="store_true", help="weights of convolutions not packed (CPU)")
    parser.add_argument("--mode", choices=(*MODES, GRAPH), help="of `optimize`, for both sides; default: none")
    arguments = parser.parse_args()
    pack = arguments.device == "cpu" and arguments.mode is None and not arguments.plain
    layout = arguments.layout == "channels_last"
    both = Both(arguments.size, arguments.runs, arguments.device, layout, pack, arguments.mode, arguments.clock)
    print(machine_line(), f"threads {torch.get_num_threads()}; {both}")
    for name in arguments.case or DEFAULT:
        measure(name, both, arguments.tasks, arguments.batches)


@dataclass(frozen=True)
class Both:
    """How both sides are made ready and measured."""

    size: int
    runs: int
    device: str
    channels_last: bool
    pack: bool
    mode: str | None
    clock: str

    def ready(self, net: nn.Module, batch: int) -> nn.Module:
        """The network as it is measured."""
        images = self.images(batch)
        return optimize(net, channels_last=self.channels_last, pack=self.pack, mode=self.mode, images=images)

    def images(self, batch: int) -> torch.Tensor:
        return torch.rand(batch, 3, self.size, self.size, device=self.device)

    def compare(self, nets: Mapping[str, nn.Module], batch: int) -> pd.DataFrame:
        return compare_latency(nets, self.size, batch, runs=self.runs, warmup=5, clock=self.clock)


def measure(name: str, both: Both, counts: list[int], batches: list[int]) -> None:
    """Prints the lines of one backbone."""
    options = {"img_size": both.size} if name.startswith("vit") else {}
    backbone = lab.load_backbone(name, "random", **options).to(both.device)
    parts, n_blocks = lab.part_table(backbone, both.size), len(backbone.block_names)
    late, middle = backbone.block_names[-(n_blocks // 3) :], backbone.block_names[n_blocks // 2]
    tasks = {f"task {i}": tuned(backbone, late[i % len(late)], i) for i in range(MANY)}
    print(f"\n{name}, {both.size} px; tasks tuned in {', '.join(late)}, one block each")
    for batch in batches:
        for count in counts:
            compare(backbone, dict(list(tasks.items())[:count]), batch, both, parts)
        extra_task(backbone, tuned(backbone, middle, 0), batch, both, parts)
    memory(backbone, tasks)


def tuned(backbone: lab.Chain, block: str, seed: int) -> lab.TunedTask:
    """A task with weights of its own; training would give others, which take as long."""
    generator = torch.Generator().manual_seed(seed)
    state = {key: tensor.cpu().clone() for key, tensor in backbone.part(block).state_dict().items()}
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor *= 1 + 0.1 * torch.rand(tensor.shape, generator=generator)
    head = {"weight": torch.randn(CLASSES, backbone.num_features, generator=generator), "bias": torch.zeros(CLASSES)}
    return lab.TunedTask(backbone, frozenset([block]), {block: state, "head": head}, tuple(map(str, range(CLASSES))))


def compare(
    backbone: lab.Chain, tasks: Mapping[str, lab.TunedTask], batch: int, both: Both, parts: pd.DataFrame
) -> None:
    """Prints one line: separate networks against the merged one."""
    net = merge_tasks(backbone, tasks, keep_original=False)
    merged = both.ready(net, batch)
    separate = OneAfterAnother({name: both.ready(task.network(), batch) for name, task in tasks.items()})
    check(merged, separate, both.images(batch))
    table, allowed = both.compare({"merged": merged, "separate": separate}, batch), net.schedule.cost(parts)["ratio"]
    times, found = table["median_ms"], table.loc["separate"]
    print(
        f"  batch {batch}, {len(tasks)} tasks: merged {times['merged']:7.2f} ms, separate {times['separate']:7.2f} ms, "
        f"{found['ratio']:.2f} x ({found['ratio_q25']:.2f} to {found['ratio_q75']:.2f}); "
        f"operations allow {allowed['flops']:.2f} x, weights {allowed['bytes']:.2f} x: "
        f"share {found['ratio'] / allowed['flops']:.0%}"
    )


def check(merged: nn.Module, separate: nn.Module, images: torch.Tensor) -> None:
    """Raises unless both sides give the same logits, up to the coarsest rounding of products (TF32)."""
    with torch.inference_mode():
        ours = {name: logits.clone() for name, logits in merged(images).items()}  # CUDA graphs reuse their memory
        for name, logits in separate(images).items():
            torch.testing.assert_close(ours[name], logits, rtol=0, atol=1e-2 * float(logits.abs().max()))


def extra_task(backbone: lab.Chain, task: lab.TunedTask, batch: int, both: Both, parts: pd.DataFrame) -> None:
    """Prints what the pretrained network and a task tuned in the middle cost together, against one network."""
    net, alone = (merge_tasks(backbone, {"task": task}, keep_original=keep) for keep in (True, False))
    counted = net.schedule.cost(parts)["merged"] / alone.schedule.cost(parts)["merged"]
    table = both.compare({"single": both.ready(task.network(), batch), "two": both.ready(net, batch)}, batch)
    found = table.loc["two"]
    print(
        f"  batch {batch}, one more task tuned in {', '.join(task.blocks)}: {found['ratio']:.2f} x a single network "
        f"({found['ratio_q25']:.2f} to {found['ratio_q75']:.2f}); "
        f"operations {counted['flops']:.2f} x, weights {counted['bytes']:.2f} x"
    )


def memory(backbone: lab.Chain, tasks: Mapping[str, lab.TunedTask]) -> None:
    """Prints the bytes of many tasks merged, and in networks of their own."""
    merged, alone = held(merge_tasks(backbone, tasks)), held(backbone)
    separate = sum(held(task.network()) for task in tasks.values())
    print(
        f"  {len(tasks)} tasks hold {merged / 2**20:.1f} MiB merged, {separate / 2**20:.1f} MiB separate; "
        f"the backbone alone {alone / 2**20:.1f} MiB"
    )


def held(net: nn.Module) -> int:
    """Bytes of the distinct storages behind all weights and buffers."""
    storages = [tensor.untyped_storage() for tensor in (*net.parameters(), *net.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


if __name__ == "__main__":
    main()
