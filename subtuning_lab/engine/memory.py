"""How many candidates fit into one pass, and what of a backbone is worked out once for many calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import psutil
import torch
from torch import nn

from subtuning_lab.engine.shared_forward import SharedForward
from subtuning_lab.nets.chain import Chain, fork_of, without_dropout
from subtuning_lab.nets.inputs import fast_layout
from subtuning_lab.utils.validation import Is, checked

_SHARE_OF_FREE = 0.6  # the rest is for temporary results of single operations, and for everybody else
_OUT_OF_MEMORY = ("can't allocate memory", "ALLOC_FAILED")  # of the CPU's allocator; of cuBLAS and cuDNN
_STATES_PER_WEIGHT = 4  # weight, gradient and AdamW's two moments


class Prepared:
    """What `fit_together` works out about a backbone; give it this instead, and it does so only once.

    Args:
        backbone: on the device to train on. Later changes of it are not seen.
    """

    @checked(backbone=Is("Chain"))
    def __init__(self, backbone: Chain):
        self.backbone = without_dropout(backbone)
        self._shared: dict[tuple[torch.Size, bool], SharedForward] = {}
        self._kept: dict[torch.Size, list[int]] = {}

    def shared(self, example: torch.Tensor, fold: bool) -> SharedForward:
        """The frozen network for images (batch, 3, height, width) like these, its BatchNorm folded or not."""
        key = (example.shape, fold)
        if key not in self._shared:
            self._shared[key] = SharedForward(fast_layout(copy.deepcopy(self.backbone).eval()), example, fold)
        return self._shared[key]

    def costs(self, example: torch.Tensor, subsets: Sequence[frozenset[str]], batch_size: int) -> list[int]:
        """Bytes that each subset needs in training on images like these; see `bytes_per_candidate`."""
        if example.shape not in self._kept:
            self._kept[example.shape] = kept_for_backward(self.backbone, example)
        return bytes_per_candidate(self.backbone, example, subsets, batch_size, self._kept[example.shape])


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
    tuned = [[i for i, name in enumerate(backbone.part_names) if name in subset] for subset in subsets]
    return [
        sum(kept[fork_of(backbone, subset) :]) + _STATES_PER_WEIGHT * sum(weights[i] for i in positions)
        for subset, positions in zip(subsets, tuned, strict=True)
    ]


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
        return tensor.detach()  # the tensor itself would hold the graph that holds it, beyond the collector's reach

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = part(x.requires_grad_().clone())  # a part may write into its input
    return output.detach(), sum(storages.values())


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


def free_bytes(device: torch.device) -> int:
    """Bytes that one pass may take on the device: a safe share of what is free now."""
    if device.type != "cuda":
        return int(_SHARE_OF_FREE * psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, ready for reuse
    return int(_SHARE_OF_FREE * (free + cached))


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device, or the CPU's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)
