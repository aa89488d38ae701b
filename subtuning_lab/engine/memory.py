"""How many candidates fit into one pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import psutil
import torch
from torch import nn

from subtuning_lab.nets.chain import Chain

_SHARE_OF_FREE = 0.6  # the rest is for temporary results of single operations, and for everybody else
_OUT_OF_MEMORY = ("can't allocate memory", "ALLOC_FAILED")  # of the CPU's allocator; of cuBLAS and cuDNN
_STATES_PER_WEIGHT = 4  # weight, gradient and AdamW's two moments


def free_bytes(device: torch.device) -> int:
    """Bytes that one pass may take on the device: a safe share of what is free now."""
    if device.type != "cuda":
        return int(_SHARE_OF_FREE * psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, ready for reuse
    return int(_SHARE_OF_FREE * (free + cached))


def bytes_per_candidate(
    backbone: Chain,
    example: torch.Tensor,
    subsets: Sequence[frozenset[str]],
    batch_size: int,
    kept: Sequence[int] | None = None,
) -> list[int]:
    """Bytes that each subset needs in training: its copies with optimizer states, and activations kept for backward.

    Args:
        backbone: the pretrained chain.
        example: a few normalized images (batch, 3, height, width); what they leave for backward is measured.
        subsets: the candidates.
        batch_size: images per step.
        kept: of `kept_for_backward` for the same images, where it is known.
    """
    kept = kept_for_backward(backbone, example) if kept is None else kept
    kept = [bytes_ * batch_size // len(example) for bytes_ in kept]
    weights = [sum(p.numel() * p.element_size() for p in part.parameters()) for part in backbone.parts]
    costs = []
    for subset in subsets:
        tuned = [i for i, name in enumerate(backbone.part_names) if name in subset]
        activations = sum(kept[tuned[0] :]) if tuned else 0
        costs.append(activations + _STATES_PER_WEIGHT * sum(weights[i] for i in tuned))
    return costs


def pack(costs: Sequence[int], forks: Sequence[int], limit: int) -> list[list[int]]:
    """Candidates by number, in passes whose cost stays within the limit; one that exceeds it alone has its own pass.

    Neighbours fork at neighbouring places, so that the early forks' pass has a short trunk.
    """
    passes: list[list[int]] = []
    room = 0
    for i in sorted(range(len(costs)), key=lambda i: forks[i]):
        if not passes or costs[i] > room:
            passes.append([])
            room = limit
        passes[-1].append(i)
        room -= costs[i]
    return passes


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device, or the CPU's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def kept_for_backward(backbone: Chain, example: torch.Tensor) -> list[int]:
    """Bytes of activations that autograd keeps for each part when everything is trained."""
    kept = []
    x = example.detach()
    for part in backbone.parts:
        part = copy.deepcopy(part).requires_grad_()
        weights = {p.untyped_storage().data_ptr() for p in [*part.parameters(), *part.buffers()]}
        x, bytes_ = _run_and_measure(part, x, weights)
        kept.append(bytes_)
    return kept


def _run_and_measure(part: nn.Module, x: torch.Tensor, weights: set[int]) -> tuple[torch.Tensor, int]:
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = part(x.requires_grad_().clone())  # a part may write into its input
    return output.detach(), sum(storages.values())
