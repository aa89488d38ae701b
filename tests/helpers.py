"""Small networks and tasks that the tests share."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from subtuning_lab.data.task import Split, Task
from subtuning_lab.nets.chain import Chain


class Residual(nn.Module):
    """A convolution with BatchNorm and a way around it; keeps the shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.bn(self.conv(x)))


def randomize_norms(module: nn.Module, seed: int = 0) -> None:
    """Gives every BatchNorm statistics, scales and shifts that are far from those of a new network."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low in (
                (norm.running_var, 0.5),
                (norm.weight, 0.5),
                (norm.running_mean, -0.5),
                (norm.bias, -0.5),
            ):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)


def tiny_chain(n_blocks: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Chain:
    """A chain of one's own, "block1" ..., for images of any size; its stem and tail have parameters too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        blocks = [Residual(6) for _ in range(n_blocks)]
        tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6))
        chain = Chain(stem, blocks, tail, 6, input_size=(3, 8, 8), name="tiny")
    randomize_norms(chain, seed)
    return chain.to(dtype)


def tiny_split(n: int = 24, classes: int = 3, side: int = 8, seed: int = 0) -> Split:
    """Noise whose channel number `label` is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 160, (n, 3, side, side), generator=generator)
    images[torch.arange(n), labels % 3] += 60
    return Split(images.to(torch.uint8), labels)


def tiny_task(n: int = 24, classes: int = 3, n_test: int = 12, seed: int = 0, test_seed: int = 1) -> Task:
    """A task of `tiny_split`s, named "tiny"."""
    names = tuple("abcdefgh"[:classes])
    return Task("tiny", names, tiny_split(n, classes, seed=seed), tiny_split(n_test, classes, seed=test_seed))


def own_blocks(*blocks: nn.Module) -> Chain:
    """The stem and tail of a `tiny_chain` around other blocks, float64."""
    plain = tiny_chain()
    torch.manual_seed(0)
    return Chain(plain.stem, list(blocks), plain.tail, plain.num_features, input_size=(3, 8, 8)).double()


def readout(width: int, classes: int = 4, seed: int = 0, **options) -> nn.Linear:
    """A random readout, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(width, classes, dtype=torch.float64, **options)


class Forbidden:
    """Stands where the test split was; whoever asks for anything of it fails."""

    def __getattr__(self, name):
        raise AssertionError(f"selection read test.{name}")

    def __len__(self):
        return 12


def unit_directions(n: int, radii: Iterable[float]) -> np.ndarray:
    """Points (n * len(radii), 2) on circles."""
    angles = np.arange(n) * 2 * np.pi / n
    return np.concatenate([r * np.stack([np.cos(angles), np.sin(angles)], 1) for r in radii])
