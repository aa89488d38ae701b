"""How fast are gradient norms per image and part? Seconds and their ratios, measured side by side in one run.

Three ways to have ||d logits / d theta_b||^2 of every part b for the same network:

    ours       gradient_norms, exact: formulas per module, all classes in one batched backward
    rows       one backward per image and logit, the plain loop
    func       torch.func: vmap over images of jacrev with respect to all parameters

The slow ways do the first `--slow-images` images, and their time is scaled up. Each way runs `--runs` times, the ways
alternating; printed are medians with the smallest and largest value, of wall-clock time and of processor time (which
other programs on the machine disturb less), and how far the ways' results are apart.

    python benchmarks/gradient_norms.py                                   # lab-resnet, 1,000 images, 10 classes
    python benchmarks/gradient_norms.py --backbone lab-vit --images 200
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

import subtuning_lab as lab
from subtuning_lab.report.machine import machine_line
from subtuning_lab.theory.per_sample_grads import gradient_norms

FUNC_CHUNK = 5  # images at a time: their Jacobians of all parameters are in memory together


def main() -> None:
    """Measures the network that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="lab-resnet")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--slow-images", type=int, default=20)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    backbone = lab.load_backbone(arguments.backbone)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (arguments.images, *backbone.input_size), generator=generator, dtype=torch.uint8)
    torch.manual_seed(0)
    head = nn.Linear(backbone.num_features, arguments.classes)
    few = images[: arguments.slow_images]
    network = Network(backbone, head)
    ways = {
        "ours": (images, lambda: gradient_norms(backbone, head, images).squared),
        "rows": (few, lambda: rows(network, few)),
        "func": (few, lambda: func(network, few)),
    }
    print(machine_line(), f"threads {torch.get_num_threads()}")
    params = sum(p.numel() for p in network.parameters())
    print(f"{arguments.backbone}: {params} parameters, {len(images)} images, {arguments.classes} classes")
    measure(ways, arguments.runs, len(images))


class Network(nn.Module):
    """Backbone and readout as plain parts that all want gradients."""

    def __init__(self, backbone: lab.Chain, head: nn.Linear):
        super().__init__()
        backbone = copy.deepcopy(backbone)
        self.normalize = backbone.normalize
        self.parts = nn.ModuleList([*backbone.parts, copy.deepcopy(head)]).requires_grad_().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def sums(self, squares: list[torch.Tensor]) -> torch.Tensor:
        """Sums over each part of one value (images,) per parameter, as (images, parts)."""
        columns, squares = [], iter(squares)
        for part in self.parts:
            own = [next(squares) for _ in part.parameters()]
            columns.append(torch.stack(own).sum(0) if own else torch.zeros(()))
        return torch.stack(torch.broadcast_tensors(*columns), 1)


def rows(network: Network, images: torch.Tensor) -> torch.Tensor:
    """One backward per image and logit."""
    parameters, norms = list(network.parameters()), []
    for image in images:
        logits = network(network.normalize(image[None]))[0]
        squares = torch.zeros(len(parameters), 1)
        for logit in logits:
            gradients = torch.autograd.grad(logit, parameters, retain_graph=True)
            squares[:, 0] += torch.stack([gradient.square().sum() for gradient in gradients])
        norms.append(network.sums(list(squares)))
    return torch.cat(norms)


def func(network: Network, images: torch.Tensor) -> torch.Tensor:
    """All rows of the Jacobian of a few images at a time."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def logits(parameters: dict, image: torch.Tensor) -> torch.Tensor:
        return functional_call(network, parameters, (image[None],))[0]

    norms = []
    for few in images.split(FUNC_CHUNK):
        jacobian = vmap(jacrev(logits), in_dims=(None, 0))(parameters, network.normalize(few))
        norms.append(network.sums([own.flatten(1).square().sum(1) for own in jacobian.values()]))
    return torch.cat(norms)


def measure(ways: dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]], runs: int, n: int) -> None:
    """Runs the ways in turn and prints what each took for all images."""
    seconds, processor = ({way: [] for way in ways} for _ in range(2))
    results = {way: run() for way, (_, run) in ways.items()}  # warm-up, too
    for _ in range(runs):
        for way, (images, run) in ways.items():
            start, busy = time.perf_counter(), time.process_time()
            run()
            seconds[way].append((time.perf_counter() - start) * n / len(images))
            processor[way].append((time.process_time() - busy) * n / len(images))
    for way, values in seconds.items():
        print(f"  {way}: {spread(values)} s, processor {spread(processor[way])} s")
        if way == "ours":
            continue
        by_wall, by_processor = (
            spread([slow / fast for slow, fast in zip(own[way], own["ours"], strict=True)])
            for own in (seconds, processor)
        )
        reference = results[way].double()
        ours = results["ours"][: len(reference)]
        apart = ((ours - reference).abs() / reference.clamp(min=1e-12)).max()
        print(f"      ours is {by_wall} x faster, by processor time {by_processor} x; largest difference {apart:.1e}")


def spread(values: list[float]) -> str:
    """Median, smallest and largest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
