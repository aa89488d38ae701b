"""The separate network of one task: a chain and its readout, and beside them a frozen chain for a Siamese readout."""

from __future__ import annotations

import torch
from torch import nn

from subtuning_lab.data.augment import resize_to
from subtuning_lab.nets.chain import Chain


class TaskNetwork(nn.Module):
    """Images in [0, 1] or uint8 to logits."""

    def __init__(self, backbone: Chain, head: nn.Module, image_size: int | None):
        super().__init__()
        self.backbone, self.head, self.image_size = backbone, head, image_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.backbone.mean.dtype) / (255 if images.dtype == torch.uint8 else 1)
        return self.head(self.features(self.backbone.normalize(resize_to(images, self.image_size))))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)


class SiameseNetwork(TaskNetwork):
    """The frozen features beside the tuned ones; parts before the first tuned one run once for both."""

    def __init__(self, backbone: Chain, head: nn.Module, image_size: int | None, frozen: Chain, fork: int):
        super().__init__(backbone, head, image_size)
        self.frozen, self.fork = frozen, fork

    def features(self, x: torch.Tensor) -> torch.Tensor:
        self.eval()  # what the two chains' own forward would see to
        for part in self.frozen.parts[: self.fork]:
            x = part(x)
        sides = [x.clone(), x]  # a part may write into its input
        for side, chain in enumerate((self.frozen, self.backbone)):
            for part in chain.parts[self.fork :]:
                sides[side] = part(sides[side])
        return torch.cat(sides, dim=1)
