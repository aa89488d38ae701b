"""Many candidate subsets through one network: the frozen trunk once, frozen suffixes shared along the batch axis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.engine.trainable import plain_part, tune_parts
from subtuning_lab.nets.chain import Chain, copy_weights, examine_parts, fork_of, subset_of
from subtuning_lab.nets.fuse import fold_batchnorm

Trunk = Mapping[int, torch.Tensor]  # position of a part -> its input (batch, ...)


class Candidate(nn.Module):
    """One subset in training: its own copies of the tuned parts, and its own readout.

    Args:
        backbone: the chain that the copies start from; left untouched.
        subset: names of the tuned parts.
        head: the readout, taken over.
        recipe: what of the tuned parts is trained, their BatchNorm mode, and whether the readout is Siamese.
        seed: of what is new in the tuned parts.
    """

    def __init__(self, backbone: Chain, subset: frozenset[str], head: nn.Module, recipe: Recipe, seed: int = 0):
        super().__init__()
        self.subset = subset_of(backbone, subset)
        self.positions = {name: i for i, name in enumerate(backbone.part_names) if name in self.subset}
        parts = tune_parts(backbone, subset, recipe, seed)
        self.tuned = nn.ModuleDict({str(i): parts[name] for name, i in self.positions.items()})
        self.head, self.bn, self.siamese = head, recipe.bn, recipe.siamese and bool(subset)
        #: position of the first tuned part: the candidate leaves the trunk there
        self.fork = fork_of(backbone, subset)

    @property
    def parts(self) -> dict[int, nn.Module]:
        """The tuned parts by position."""
        return {int(i): part for i, part in self.tuned.items()}

    def owns(self, position: int) -> bool:
        """Whether the part at this position is tuned."""
        return str(position) in self.tuned

    def train(self, mode: bool = True) -> Candidate:
        """As for any module, except that frozen BatchNorm keeps its statistics."""
        super().train(mode)
        if self.bn == "frozen":
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.training = False
        return self

    def snapshot(self) -> dict[str, dict[str, torch.Tensor]]:
        """Copies of all weights and buffers on the CPU: part name -> tensors, and "head"."""
        parts = {name: plain_part(self.tuned[str(i)]) for name, i in self.positions.items()}
        return copy_weights(parts | {"head": self.head})


class SharedForward:
    """The frozen network as all candidates share it.

    Rows of different candidates stand side by side on the batch axis. That equals separate networks because frozen
    parts don't mix rows: their BatchNorm is in eval mode, everything else works image by image. Parts that do mix
    rows, BatchNorm in train mode, are tuned, and see the rows of their own candidate alone.

    Args:
        backbone: the pretrained chain.
        example: normalized images (batch, 3, height, width), two or more, to check folded parts with.
        fold: whether frozen BatchNorm is folded into its convolution; equal up to rounding.

    Raises:
        ValueError: a frozen part that mixes the rows of a batch, such as BatchNorm without running statistics.

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
        with torch.no_grad():
            for part in parts.values():
                self.frozen.append(fold_batchnorm(part, example) if fold else part)
                example = part(example.clone())

    def exits(self, candidates: Iterable[Candidate]) -> set[int]:
        """Positions whose input the candidates take from the trunk; behind the last part stand the features."""
        return {c.fork for c in candidates} | {len(self.frozen) for c in candidates if c.siamese}

    @torch.no_grad()
    def trunk(self, x: torch.Tensor, exits: Collection[int]) -> Trunk:
        """The frozen network's activations (batch, ...) at some exits, of one batch of normalized images."""
        activations = {}
        for position in range(max(exits) + 1):
            x = self.frozen[position - 1](self._own(position - 1, x)) if position else x
            if position in exits:
                activations[position] = x
        return activations

    def features(self, trunk: Trunk, candidates: Sequence[Candidate]) -> dict[Candidate, torch.Tensor]:
        """What every candidate's readout sees of one batch, whose activations `trunk` has at their exits.

        Returns:
            Features (batch, num_features); of a Siamese candidate (batch, 2 num_features), the frozen ones first.
        """
        end = len(self.frozen)
        at_end = {c: trunk[end] for c in candidates if c.fork == end}
        features = at_end | self._branches(trunk, [c for c in candidates if c not in at_end])
        return {c: torch.cat([trunk[end], h], dim=1) if c.siamese else h for c, h in features.items()}

    def _own(self, position: int, x: torch.Tensor) -> torch.Tensor:
        """The input of a part, copied where the part would change it."""
        return x.clone() if position in self.in_place else x

    def _branches(self, trunk: Trunk, candidates: Sequence[Candidate]) -> dict[Candidate, torch.Tensor]:
        """Runs every candidate from its fork to the features."""
        on_board: list[Candidate] = []  # whose rows are in h, in this order
        h = None
        for position, frozen in enumerate(self.frozen):
            joining = [c for c in candidates if c.fork == position]
            own = [c for c in on_board if c.owns(position)]
            shared = [c for c in on_board if c not in own]
            rows = dict(zip(on_board, h.chunk(len(on_board)), strict=True)) if own else {}
            rows |= {c: trunk[position] for c in joining}
            outputs = []
            if shared:
                x = torch.cat([rows[c] for c in shared]) if own else h
                outputs.append(frozen(self._own(position, x)))
            outputs += [c.tuned[str(position)](self._own(position, rows[c])) for c in own + joining]
            on_board = shared + own + joining
            h = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)) if outputs else None
            if h is not None and position == len(self.frozen) - 2:
                _keep_layout(h)
        return dict(zip(on_board, h.chunk(len(on_board)), strict=True)) if on_board else {}


def _keep_layout(h: torch.Tensor) -> None:
    """Hands the gradient on in the tensor's own memory layout; pooling gives it in another, and ReLU is then slow."""
    if h.requires_grad and h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last):
        h.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
