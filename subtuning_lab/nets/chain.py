"""A backbone as a chain, `features = tail(block_L(... block_1(stem(x))))`, and which of its parts are trained.

Everything else in the package reads off this one view: finetuning profiles, one-pass training, merged inference,
the generalization bound.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from subtuning_lab.utils.hashing import fingerprint_of

BatchNormMode = Literal["batch", "frozen"]
BN_MODES: tuple[str, ...] = ("batch", "frozen")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Chain(nn.Module):
    """A pretrained network as stem -> blocks -> tail, which knows what is frozen.

    A new chain is frozen throughout, which is the state of linear probing; `set_trainable` declares another one.

    Args:
        stem: maps normalized images (batch, 3, height, width) to the first block's input.
        blocks: the L blocks in order; a mapping gives them names, a sequence names them "block1", "block2", ...
            Every activation must be one tensor whose first axis is the batch.
        tail: maps the last block's output to features (batch, num_features).
        num_features: width of the features.
        mean, std: per-channel normalization that the backbone was pretrained with, for images in [0, 1].
        input_size: (channels, height, width) that the backbone was pretrained with.
        name: what messages, tables and records call it.
        source_head: the pretrained readout on the features, kept beside the chain; no part of it.

    Raises:
        ValueError: no blocks, reserved block names, num_features below 1, or parameters that two parts share.

    Source: PAPER "SubTuning", where a residual block or a transformer layer is the unit of choice.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Mapping[str, nn.Module] | Sequence[nn.Module],
        tail: nn.Module,
        num_features: int,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        input_size: tuple[int, int, int] = (3, 224, 224),
        name: str = "custom",
        source_head: nn.Linear | None = None,
    ):
        super().__init__()
        if not isinstance(blocks, Mapping):
            blocks = {f"block{i}": block for i, block in enumerate(blocks, start=1)}
        _check_block_names(blocks)
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}; a chain has at least 1 feature")
        self.stem, self.blocks, self.tail = stem, nn.ModuleList(blocks.values()), tail
        self.block_names = tuple(blocks)
        self.num_features, self.input_size, self.name = num_features, tuple(input_size), name
        self.source_head = source_head
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)  # (3, 1, 1)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        _check_parameters(self)
        set_trainable(self, [])

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of everything that can be tuned, in order: "stem", the blocks, "tail"."""
        return ("stem", *self.block_names, "tail")

    @property
    def parts(self) -> list[nn.Module]:
        """The modules of `part_names`, in the same order."""
        return [self.stem, *self.blocks, self.tail]

    def part(self, name: str) -> nn.Module:
        """The module of one part. Raises ValueError for an unknown name."""
        return self.parts[_position(self, name)]

    @property
    def trainable(self) -> frozenset[str]:
        """Names of the parts that `set_trainable` declared trainable."""
        return self._trainable

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, buffers, normalization and settings: equal networks, equal fingerprint."""
        parts = dict(zip(self.part_names, self.parts, strict=True))
        return fingerprint_of(parts, self.mean.flatten().tolist(), self.std.flatten().tolist())

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Images (batch, 3, height, width), uint8 or float in [0, 1], as the backbone wants them."""
        scaled = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        return (scaled - self.mean) / self.std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (batch, num_features) of normalized images (batch, 3, height, width)."""
        self._declare_modes()
        for part in self.parts:
            x = part(x)
        return x

    def train(self, mode: bool = True) -> Chain:
        """Sets train mode where it is allowed: frozen parts stay in eval mode, so their statistics cannot drift."""
        super().train(mode)
        self._declare_modes()
        return self

    def _declare_modes(self) -> None:
        """Puts every frozen part, and every frozen BatchNorm, back into eval mode."""
        for name, part in zip(self.part_names, self.parts, strict=True):
            tuned = name in self._trainable
            for module in part.modules():
                if module.training and (not tuned or (self._bn == "frozen" and isinstance(module, _BatchNorm))):
                    module.training = False


def set_trainable(backbone: Chain, blocks: Iterable[str] | Literal["all"], bn: BatchNormMode = "batch") -> Chain:
    """Declares the WHOLE trainable state of the backbone, in place: `blocks` are trained, all else is frozen.

    Args:
        blocks: names out of `backbone.part_names` ("stem" and "tail" count); [] is linear probing; "all" is full
            finetuning, stem and tail included. `backbone.block_names` is every block WITHOUT stem and tail.
        bn: "batch" lets the BatchNorm of tuned blocks use and update batch statistics in train mode; "frozen" keeps
            their pretrained statistics (their weight and bias are trained all the same).

    Returns:
        The same backbone.

    Raises:
        ValueError: an unknown name or BatchNorm mode; the message lists the allowed ones.
    """
    backbone._trainable, backbone._bn = subset_of(backbone, blocks), check_bn(bn)
    for name, part in zip(backbone.part_names, backbone.parts, strict=True):
        part.requires_grad_(name in backbone._trainable)
        if name not in backbone._trainable:
            part.zero_grad(set_to_none=True)  # an optimizer that still holds the part would apply what is left there
    if backbone.source_head is not None:
        backbone.source_head.requires_grad_(False)
    return backbone.train(backbone.training)


def subset_of(backbone: Chain, blocks: Iterable[str] | Literal["all"]) -> frozenset[str]:
    """The subset as a frozenset of part names; "all" is every part. Raises as `set_trainable` does."""
    if blocks == "all":
        return frozenset(backbone.part_names)
    if isinstance(blocks, str):
        raise TypeError(f'blocks is the string "{blocks}"; give a list of names, e.g. ["{blocks}"], or "all"')
    subset = frozenset(blocks)
    unknown = sorted(str(name) for name in subset - set(backbone.part_names))
    if unknown:
        raise ValueError(f"{backbone.name} has no block {', '.join(unknown)}; it has {', '.join(backbone.part_names)}")
    return subset


def in_order(backbone: Chain, blocks: Iterable[str]) -> tuple[str, ...]:
    """The subset's names from the input to the output of the network."""
    subset = subset_of(backbone, blocks)
    return tuple(name for name in backbone.part_names if name in subset)


def count_parameters(backbone: Chain, blocks: Iterable[str] | Literal["all"]) -> int:
    """Parameters of a subset, the new readout not counted."""
    return sum(p.numel() for name in subset_of(backbone, blocks) for p in backbone.part(name).parameters())


def frozen_copy(backbone: Chain) -> Chain:
    """A copy of the chain that is frozen throughout and in eval mode."""
    return set_trainable(copy.deepcopy(backbone), []).eval()


def fork_of(backbone: Chain, blocks: Iterable[str]) -> int:
    """Position of a subset's first part, stem 0: where it leaves the trunk; behind the last part for the empty one."""
    subset = subset_of(backbone, blocks)
    return min((i for i, name in enumerate(backbone.part_names) if name in subset), default=len(backbone.part_names))


def examine_parts(parts: Mapping[str, nn.Module], example: torch.Tensor) -> tuple[frozenset[int], list[str]]:
    """What frozen parts do besides computing.

    Args:
        parts: in the network's order, in eval mode.
        example: two or more normalized images (batch, 3, height, width).

    Returns:
        Positions of parts that write into their input, and names of parts in which an image's output depends on its
        neighbours in the batch, far beyond rounding (which is coarse in TF32).
    """
    in_place, mixing = set(), []
    with torch.no_grad():
        for position, (name, part) in enumerate(parts.items()):
            x, first = example.clone(), example[:1].clone()
            before = x._version
            output = part(x)
            if x._version > before:
                in_place.add(position)
            if (part(first) - output[:1]).abs().amax() > 1e-2 * output.abs().amax():
                mixing.append(name)
            example = output
    return frozenset(in_place), mixing


def copy_weights(parts: Mapping[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of all weights and buffers of some modules on the CPU: module name -> tensor name -> tensor."""
    return {
        name: {key: tensor.detach().cpu().clone() for key, tensor in part.state_dict().items()}
        for name, part in parts.items()
    }


def without_dropout(backbone: Chain) -> Chain:
    """A frozen copy whose dropout and stochastic depth are off; they would draw from chance that candidates share."""
    still = set_trainable(copy.deepcopy(backbone), [])
    for module in still.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):  # timm's DropPath and DropBlock
            module.drop_prob = 0.0
        if isinstance(getattr(module, "drop_rate", None), float):  # timm's heads call the function with it
            module.drop_rate = 0.0
    return still


def check_bn(bn: str) -> BatchNormMode:
    """The BatchNorm mode itself, or a ValueError that lists the modes."""
    if bn not in BN_MODES:
        raise ValueError(f"bn is {bn!r}; it must be one of {', '.join(BN_MODES)}")
    return bn


def _position(backbone: Chain, name: str) -> int:
    (name,) = subset_of(backbone, [name])
    return backbone.part_names.index(name)


def _check_block_names(blocks: Mapping[str, nn.Module]) -> None:
    if not blocks:
        raise ValueError("blocks is empty; a chain has at least 1 block")
    reserved = {"stem", "tail", "all", "head"} & set(blocks)
    if reserved:
        raise ValueError(f"block name {', '.join(sorted(reserved))} is reserved for the chain's own parts")
    wrong = [name for name in blocks if not isinstance(name, str) or not name or "|" in name]
    if wrong:
        raise ValueError(f"block name {wrong[0]!r} must be a string, not empty, without |")


def _check_parameters(backbone: Chain) -> None:
    """A parameter that two parts share could not be frozen in one of them only."""
    owner: dict[int, str] = {}
    for name, part in zip(backbone.part_names, backbone.parts, strict=True):
        for parameter in part.parameters():
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"{owner[id(parameter)]} and {name} share parameters; each part must have its own")


def put_parts(network: Chain, parts: Mapping[str, nn.Module]) -> Chain:
    """Puts modules in the place of the chain's own parts of those names, in place; returns the chain."""
    for name, module in parts.items():
        if name in ("stem", "tail"):
            setattr(network, name, module)
        else:
            network.blocks[network.block_names.index(name)] = module
    return network
