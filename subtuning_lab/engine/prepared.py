"""A pretrained network made ready for training once, however many calls follow."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from subtuning_lab.engine.memory import bytes_per_candidate, kept_for_backward
from subtuning_lab.engine.shared_forward import SharedForward
from subtuning_lab.nets.chain import Chain, fork_of, without_dropout
from subtuning_lab.nets.inputs import fast_layout


class Prepared:
    """What `fit_together` works out about a backbone; give it this instead, and it does so only once.

    Args:
        backbone: on the device to train on. Later changes of it are not seen.
    """

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

    def forks(self, subsets: Sequence[frozenset[str]]) -> list[int]:
        """Where each subset leaves the trunk: the position of its first part; behind the last one without any."""
        return [fork_of(self.backbone, blocks) for blocks in subsets]
