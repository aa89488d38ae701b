"""How many candidates fit into one pass, and what of a backbone is worked out once for many calls."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.engine.shared_forward import SharedForward
from subtuning_lab.engine.trainable import check_merging
from subtuning_lab.nets.chain import Chain, check_still, fork_of, without_dropout
from subtuning_lab.nets.inputs import fast_layout
from subtuning_lab.utils.containers import Blocks
from subtuning_lab.utils.memory import free_main_memory
from subtuning_lab.utils.validation import Flag, Is, Several, Whole, checked

_SHARE_OF_FREE = 1 / 3  # others live on the machine, too, and more makes a pass hardly faster
_STATES_PER_WEIGHT = 4  # weight, gradient and AdamW's two moments
_OUT_OF_MEMORY = (
    "allocate memory",  # the CPU's allocator, and the system's own words
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "alloc_failed",  # cuBLAS and cuDNN
    "could not create a memory",  # oneDNN, which has no words of its own for it
    "could not create a primitive",
    "could not execute a primitive",
)


class NotEnoughMemoryError(MemoryError):
    """Memory ran out where nothing smaller could be tried; the message says for what."""


class Prepared:
    """What `fit_together` works out about a backbone; give it this instead, and it does so only once.

    Args:
        backbone: on the device to train on. Later changes of it are not seen.
    """

    @checked
    def __init__(self, backbone: Chain):
        with memory_for(f"a copy of {backbone.name}"):
            self.backbone = without_dropout(backbone)
        self._is_still = False
        self._merging: set[tuple[str, Recipe]] = set()  # parts with adapters that are known to merge
        self._shared: dict[tuple[torch.Size, bool, torch.memory_format], SharedForward] = {}
        self._kept: dict[tuple[torch.Size, bool], list[int]] = {}

    @checked(example=Is(torch.Tensor))
    def check(self, example: torch.Tensor) -> None:
        """Raises ValueError, the first time, for a network that draws from chance although its dropout is off."""
        if not self._is_still:
            with memory_for(f"a trial of {self.backbone.name}"):
                check_still(self.backbone, example if len(example) > 1 else example.repeat(2, 1, 1, 1))
            self._is_still = True

    @checked(example=Is(torch.Tensor), subsets=Several(Blocks(), least=0), recipes=Several(Is("Recipe"), least=0))
    def check_adapters(
        self, example: torch.Tensor, subsets: Sequence[Collection[str]], recipes: Sequence[Recipe]
    ) -> None:
        """Raises ValueError, the first time, for tuned parts in which a recipe's adapter can't be merged."""
        pairs = zip(subsets, recipes, strict=True)
        new = {(name, r) for subset, r in pairs if r.adapter for name in subset} - self._merging
        for recipe in dict.fromkeys(recipes):
            blocks = {name for name, other in new if other == recipe}
            if blocks:
                with memory_for(f"a trial of {recipe.adapter} on {self.backbone.name}"):
                    check_merging(self.backbone, blocks, recipe, example)
        self._merging |= new

    @checked(example=Is(torch.Tensor), fold=Flag(), layout=Is(torch.memory_format))
    def shared(self, example: torch.Tensor, fold: bool, layout: torch.memory_format) -> SharedForward:
        """The frozen network for images (batch, 3, height, width) like these, its BatchNorm folded or not.

        Where memory has no room for folded copies, it is not folded.
        """
        key = (example.shape, fold, layout)
        if key not in self._shared:
            try:
                with memory_for(f"a frozen copy of {self.backbone.name}"):
                    frozen = fast_layout(copy.deepcopy(self.backbone).eval(), layout)
                    self._shared[key] = SharedForward(frozen, example, fold)
            except NotEnoughMemoryError:
                if not fold:
                    raise
        return self._shared[key] if key in self._shared else self.shared(example, False, layout)

    @checked(example=Is(torch.Tensor), subsets=Several(Blocks(), least=0), batch_size=Whole(1), bf16=Flag())
    def costs(
        self, example: torch.Tensor, subsets: Sequence[frozenset[str]], batch_size: int, bf16: bool = False
    ) -> list[float]:
        """Bytes that each subset needs in training on images like these; see `bytes_per_candidate`.

        Infinite, so that each has a pass to itself, where memory doesn't even suffice to measure them.
        """
        key = (example.shape, bf16)
        if key not in self._kept:
            try:
                self._kept[key] = kept_for_backward(self.backbone, example, bf16)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return [math.inf if subset else 0 for subset in subsets]
        return bytes_per_candidate(self.backbone, example, subsets, batch_size, self._kept[key])


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


def kept_for_backward(backbone: Chain, example: torch.Tensor, bf16: bool = False) -> list[int]:
    """Bytes of activations that autograd keeps for each part when everything is trained, in autocast to bf16 or not."""
    kept = []
    x = example.detach()
    for part in backbone.parts:
        part = copy.deepcopy(part).requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            x, bytes_ = _run_and_measure(part, x)
        kept.append(bytes_)
    return kept


def _run_and_measure(part: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    tensors = [*part.parameters(), *part.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    shapes = [sorted(tensor.shape) for tensor in tensors]
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cast = tensor.dtype == torch.bfloat16 and sorted(tensor.shape) in shapes  # autocast's copy of a weight
        if storage.data_ptr() not in weights and not cast:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it, beyond the collector's reach

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = part(x.requires_grad_().clone())  # a part may write into its input
    return output.detach(), sum(storages.values())


def pack(costs: Sequence[float], forks: Sequence[int], limit: int) -> list[list[int]]:
    """Candidates by number, in passes whose cost stays within the limit; one that exceeds it alone has its own pass.

    Neighbours fork at neighbouring places, so that the early forks' pass has a short trunk.
    """
    passes: list[list[int]] = []
    room: float = 0
    for i in sorted(range(len(costs)), key=lambda i: forks[i]):
        if not passes or costs[i] > room:
            passes.append([])
            room = limit
        passes[-1].append(i)
        room -= costs[i]
    return passes


def free_bytes(device: torch.device) -> int:
    """Bytes that one pass may take on the device: a third of what is free now, within a container's limit.

    More hardly helps: 33 candidates of EfficientNet-Lite0, two batches of 64 photographs of 96 px, took 51, 41, 38 and
    39 seconds of a CPU with limits of 0.25, 1, 4 and 12 GiB, and 0.65, 0.8, 3.0 and 6.8 GiB at their peak.
    """
    if device.type != "cuda":
        return int(_SHARE_OF_FREE * free_main_memory())
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, ready for reuse
    return int(_SHARE_OF_FREE * (free + cached))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, a library or the CPU's allocator had no memory left."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in words for sign in _OUT_OF_MEMORY)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turns a lack of memory in here into a `NotEnoughMemoryError` that says what it was for."""
    try:
        yield
    except NotEnoughMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotEnoughMemoryError(
            f"not enough memory for {what} ({reason}); smaller images or a smaller batch_size take less"
        ) from error


def release(device: torch.device) -> None:
    """Gives back what a failed pass has left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
