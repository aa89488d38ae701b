"""Small networks for 32 x 32 images: the CIFAR ResNets of He et al. and the two bundled backbones."""

from typing import Literal

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from subtuning_lab.utils.validation import OneOf, Whole, checked

LAB_MEAN = LAB_STD = (0.5, 0.5, 0.5)  # of both bundled backbones
STAGE_WIDTHS = (16, 32, 64)

Shortcut = Literal["A", "B"]


class ZeroPadShortcut(nn.Module):
    """Option-A shortcut: subsamples the image and adds zero channels, half on each side; it has no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        subsampled = x[:, :, :: self.stride, :: self.stride]
        # (batch, in_channels, H / stride, W / stride) -> (batch, out_channels, H / stride, W / stride)
        return F.pad(subsampled, (0, 0, 0, 0, self.padding, self.padding))


def _make_shortcut(in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> nn.Module:
    """The identity where shapes agree, else the shortcut of the named option."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if shortcut == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels))


class CifarBlock(nn.Module):
    """Basic residual block: two 3 x 3 convolutions, the first with the stride, and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _make_shortcut(in_channels, out_channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(residual)) + self.shortcut(x))


def _make_stage(in_channels: int, out_channels: int, stride: int, n_blocks: int, shortcut: Shortcut) -> nn.Sequential:
    """`n_blocks` blocks of which the first changes the width and the resolution."""
    first = CifarBlock(in_channels, out_channels, stride, shortcut)
    rest = (CifarBlock(out_channels, out_channels, 1, shortcut) for _ in range(n_blocks - 1))
    return nn.Sequential(first, *rest)


class CifarResNet(nn.Module):
    """ResNet for small images: a 3 x 3 stem, three stages of 16, 32 and 64 channels, average pooling, a linear readout.

    Args:
        depth: number of weighted layers, 6n + 2 with n blocks per stage (8, 14, 20, 32, 44, 56, 110, ...).
        num_classes: outputs of the readout.
        stem_stride: stride of the stem in pixels: 1 as published; 2 is four times cheaper.
        shortcut: "A" (no parameters, as published for CIFAR) or "B" (1 x 1 convolution and BatchNorm).

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), section 4.2.
    """

    @checked(depth=Whole(8, 2000), num_classes=Whole(1), stem_stride=Whole(1), shortcut=OneOf(("A", "B")))
    def __init__(self, depth: int = 20, num_classes: int = 10, stem_stride: int = 1, shortcut: Shortcut = "A") -> None:
        super().__init__()
        if (depth - 2) % 6 != 0:
            raise ValueError(f"depth is {depth}; it must be 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...)")
        n_blocks = (depth - 2) // 6
        narrow, middle, wide = STAGE_WIDTHS
        self.num_classes = num_classes
        self.num_features = wide
        self.conv1 = nn.Conv2d(3, narrow, kernel_size=3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.layer1 = _make_stage(narrow, narrow, 1, n_blocks, shortcut)
        self.layer2 = _make_stage(narrow, middle, 2, n_blocks, shortcut)
        self.layer3 = _make_stage(middle, wide, 2, n_blocks, shortcut)
        self.linear = nn.Linear(wide, num_classes)
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Draws convolutions from He's normal distribution; the linear layer keeps torch's own start."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (batch, 64, height, width), of normalized images (batch, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (batch, classes) of a feature map, or its pooled features (batch, 64) with `pre_logits`."""
        features = x.mean(dim=(2, 3))
        return features if pre_logits else self.linear(features)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of normalized images (batch, 3, height, width)."""
        return self.forward_head(self.forward_features(x))


def lab_resnet(num_classes: int = 100) -> CifarResNet:
    """An untrained `lab-resnet`: depth 20, stem stride 2, projection shortcuts, about 0.28 M parameters."""
    return CifarResNet(depth=20, num_classes=num_classes, stem_stride=2, shortcut="B")


@checked(num_classes=Whole(0))
def lab_vit(num_classes: int = 100) -> VisionTransformer:
    """An untrained `lab-vit`: timm's vision transformer, patch 4, width 96, 6 blocks, about 0.47 M parameters.

    Its features are the mean of the 64 normalized patch tokens.
    """
    return VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=96,
        depth=6,
        num_heads=3,
        mlp_ratio=2.0,
        num_classes=num_classes,
        global_pool="avg",
        class_token=False,
        fc_norm=False,  # keep `norm` before pooling, so that the tail is norm -> mean -> head
    )
