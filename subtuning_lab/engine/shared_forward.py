"""Many candidate subsets through one network: the frozen trunk once, frozen suffixes shared along the batch axis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.engine.trainable import plain_part, tune_parts
from subtuning_lab.nets.chain import Chain, copy_weights, fork_of, freeze_statistics, in_order
from subtuning_lab.nets.cut import examine_parts
from subtuning_lab.nets.fuse import fold_batchnorm, fuse_relu

Trunk = Mapping[int, torch.Tensor]  # position of a part -> its input (batch, ...)


class Branch(nn.Module):
    """What a candidate has to itself in a pass: copies of its tuned parts, and its readout.

    Args:
        backbone: the chain that the copies start from; left untouched.
        blocks: names of the tuned parts.
        recipe: what of the tuned parts is trained, their BatchNorm mode, and whether the readout is Siamese.
        head: the readout, taken over.
        seed: of what is new in the tuned parts.
    """

    def __init__(self, backbone: Chain, blocks: frozenset[str], recipe: Recipe, head: nn.Module, seed: int):
        super().__init__()
        self.blocks, self.recipe, self.siamese = blocks, recipe, recipe.siamese and bool(blocks)
        self.tuned, self.head = nn.ModuleList(tune_parts(backbone, blocks, recipe, seed).values()), head
        self.names = in_order(backbone, blocks)
        #: the tuned parts by position in the network
        self.parts = dict(zip(map(backbone.part_names.index, self.names), self.tuned, strict=True))
        #: position of the first tuned part: the candidate leaves the trunk there
        self.fork = fork_of(backbone, blocks)

    def train(self, mode: bool = True) -> Branch:
        """As for any module, except that frozen BatchNorm and InstanceNorm keep their statistics."""
        super().train(mode)
        if self.recipe.bn == "frozen":
            freeze_statistics(self)
        return self

    def snapshot(self) -> dict[str, dict[str, torch.Tensor]]:
        """Copies of all weights and buffers on the CPU: part name -> tensors, and "head"."""
        parts = {name: plain_part(part) for name, part in zip(self.names, self.tuned, strict=True)}
        return copy_weights(parts | {"head": self.head})


class SharedForward:
    """The frozen network as all candidates share it.

    Images of different candidates stand side by side on the batch axis. That equals separate networks because frozen
    parts don't mix images: their BatchNorm is in eval mode, everything else works image by image. Parts that do mix
    them, BatchNorm in train mode, are tuned, and see the images of one candidate alone.

    Args:
        backbone: the pretrained chain.
        example: normalized images (batch, 3, height, width), two or more, to check folded parts with.
        fold: whether frozen BatchNorm is folded into its convolution; equal up to rounding.
    Raises:
        ValueError: a frozen part that mixes the images of a batch, such as BatchNorm without running statistics.
    Source: PAPER "Efficient Multi-Task Inference", whose batch-axis concatenation is used here for training.
    """

    def __init__(self, backbone: Chain, example: torch.Tensor, fold: bool = True):
        parts = dict(zip(backbone.part_names, backbone.parts, strict=True))
        #: parts that write into their input, which others still need
        self.in_place, mixing = examine_parts(parts, example)
        if mixing:
            raise ValueError(
                f"{mixing[0]} mixes the images of a batch even when frozen, e.g. by BatchNorm without running "
                'statistics; such a network can\'t be trained in one pass: give engine="sequential"'
            )
        self.frozen: list[nn.Module] = []
        faster = fuse_relu if example.is_cuda else fold_batchnorm
        with torch.no_grad():
            for part in parts.values():
                self.frozen.append(faster(part, example) if fold else part)
                example = part(example.clone())

    def exits(self, candidates: Iterable[Branch]) -> set[int]:
        """Positions whose input the candidates take from the trunk; behind the last part stand the features."""
        return {c.fork for c in candidates} | {len(self.frozen) for c in candidates if c.siamese}

    @torch.no_grad()
    def trunk(self, x: torch.Tensor, exits: Collection[int]) -> Trunk:
        """The frozen network's activations (batch, ...) at some exits, of one batch of normalized images."""
        activations = {}
        for position in range(max(exits) + 1):
            x = self.frozen[position - 1](self._input(position - 1, x)) if position else x
            if position in exits:
                activations[position] = x
        return activations

    def logits(self, trunk: Trunk, candidates: Sequence[Branch]) -> list[torch.Tensor]:
        """Every candidate's logits (batch, classes) of one batch, whose activations `trunk` has at their exits."""
        end = len(self.frozen)
        features = {c: trunk[end] for c in candidates if c.fork == end}
        features |= self._branches(trunk, [c for c in candidates if c not in features])
        seen = [torch.cat([trunk[end], features[c]], 1) if c.siamese else features[c] for c in candidates]
        return [c.head(x) for c, x in zip(candidates, seen, strict=True)]

    def _input(self, position: int, x: torch.Tensor) -> torch.Tensor:
        """The input of a part, copied where the part would change it."""
        return x.clone() if position in self.in_place else x

    def _branches(self, trunk: Trunk, candidates: Sequence[Branch]) -> dict[Branch, torch.Tensor]:
        """Runs every candidate from its fork to the features (batch, num_features)."""
        on_board: list[Branch] = []  # whose images are in h, in this order
        h = None
        for position, frozen in enumerate(self.frozen):
            joining = [c for c in candidates if c.fork == position]
            tuning = [c for c in on_board if position in c.parts]
            sharing = [c for c in on_board if c not in tuning]
            inputs = dict(zip(on_board, h.chunk(len(on_board)), strict=True)) if tuning else {}
            inputs |= {c: trunk[position] for c in joining}
            outputs = []
            if sharing:
                x = torch.cat([inputs[c] for c in sharing]) if tuning else h
                outputs.append(frozen(self._input(position, x)))
            outputs += [c.parts[position](self._input(position, inputs[c])) for c in tuning + joining]
            on_board = sharing + tuning + joining
            h = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)) if outputs else None
            if h is not None and position == len(self.frozen) - 2:
                _keep_layout(h)
        return dict(zip(on_board, h.chunk(len(on_board)), strict=True)) if on_board else {}


def _keep_layout(h: torch.Tensor) -> None:
    """Hands the gradient on in the tensor's own memory layout; pooling gives it in another, and ReLU is then slow."""
    if h.requires_grad and h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last):
        h.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
