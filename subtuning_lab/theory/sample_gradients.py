"""Gradients of a chain's parameters, image by image: what scores of blocks are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.inputs import network_input
from subtuning_lab.theory.per_sample_grads import by_vmap, gradients_in, matrices, plans_of, trace_parts


class SampleGradients(NamedTuple):
    """One part's gradients on a chunk of images.

    Args:
        part: its name.
        rows: numbers of the images.
        x, output: what entered and left the part, (batch, ...).
        at_output: gradients at the output, (batch, ...) per direction.
        tensors: parameter name -> (batch, directions, numel), in an order of its elements that is always the same.
    """

    part: str
    rows: torch.Tensor
    x: torch.Tensor
    output: torch.Tensor
    at_output: Sequence[torch.Tensor]
    tensors: dict[str, torch.Tensor]


@torch.enable_grad()
def sample_gradients(
    network: Chain,
    head: nn.Linear,
    images: torch.Tensor,
    at_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    image_size: int | None = None,
    chunk: int = 16,
) -> Iterator[SampleGradients]:
    """Gradients of every parameter for every image, a chunk of images and a part at a time, the last part first.

    Args:
        network: frozen, in eval mode and in its fastest layout.
        head: the readout, on its device.
        images: as tasks have them.
        at_logits: logits (batch, classes) and rows -> gradients at the logits, (directions, batch, classes).
        image_size: side in pixels that images are resized to.
        chunk: images at a time.
    """
    with sdpa_kernel(SDPBackend.MATH):
        plans = plans_of(network, network_input(network, torch.cat([images[:1], 255 - images[:1]]), image_size))
        for rows in torch.arange(len(images)).split(chunk):
            traces = trace_parts(network, network_input(network, images[rows], image_size))
            g: Sequence[torch.Tensor] = [*at_logits(head(traces[-1].output.detach()), rows) @ head.weight]
            for trace, plan in zip(reversed(traces), reversed(plans), strict=True):
                before, gradients = gradients_in(trace, g)
                tensors = by_vmap(trace, plan.others, g, lambda gradient: gradient.flatten(1))
                for (module, x, _), gradient in zip(trace.calls, gradients, strict=True):
                    if module in plan.modules:
                        tensors |= _of_module(trace.part, module, *matrices(module, x, gradient))
                yield SampleGradients(trace.name, rows, trace.x.detach(), trace.output.detach(), g, tensors)
                g = before


def _of_module(part: nn.Module, module: nn.Module, a: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients (batch, directions, numel) of a module's own parameters, by their names in the part."""
    names = {id(parameter): name for name, parameter in part.named_parameters()}
    found = {}
    if module.weight is not None:
        found[names[id(module.weight)]] = (g @ a.mT[:, None]).flatten(2)
    if module.bias is not None:
        found[names[id(module.bias)]] = g.sum(-1).flatten(2)
    return found
