"""Readouts: the new layers that turn a backbone's features into a task's logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

Start = Mapping[str, torch.Tensor]  # weights of a readout by tensor name


def empty_readout(
    num_features: int, num_classes: int, depth: int = 1, siamese: bool = False, device: torch.device | str = "cpu"
) -> nn.Linear | nn.Sequential:
    """A readout whose weights are not set yet: one linear layer, or several with ReLU between them.

    Args:
        num_features: width of one network's features, and of the hidden layers.
        num_classes: number of logits.
        depth: number of linear layers, at least 1.
        siamese: whether it sees the frozen features beside the tuned ones.
        device: "meta" gives names, shapes and dtypes alone.
    """
    widths = [(1 + siamese) * num_features, *[num_features] * (depth - 1), num_classes]
    with torch.device("meta"):
        linear = [nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False)]
    first, *others = linear
    layers = [first, *(layer for linear in others for layer in (nn.ReLU(), linear))]
    readout = first if depth == 1 else nn.Sequential(*layers)
    return readout if torch.device(device).type == "meta" else readout.to_empty(device=device)


@torch.no_grad()
def fill_readout(
    readout: nn.Linear | nn.Sequential, generator: torch.Generator, start: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Sets a readout's weights in place: random ones as of a new linear layer, or those of a trained readout.

    Args:
        readout: on the CPU, of `empty_readout`.
        generator: of the random weights; drawn from even if there is a start.
        start: weights by tensor name, of a readout that saw the features once. A Siamese readout's two halves are
            equal before training, so that each half of a given start does half of its work.
    """
    for layer in readout.modules():
        for parameter in layer.parameters(recurse=False):
            uniform = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * uniform - 1) * layer.in_features**-0.5)
    for name, parameter in readout.named_parameters() if start is not None else ():
        copies = parameter.shape[-1] // start[name].shape[-1] if parameter.dim() == 2 else 1
        own = start[name]
        parameter.copy_(own.repeat(1, copies) / copies if copies > 1 else own)
