"""Convolution, BatchNorm and ReLU as one module: the same outputs and gradients, where the order allows it."""

import pytest
import torch
from timm.models.resnet import Bottleneck
from torch import nn

from subtuning_lab.nets.fuse import ConvReLU, fuse_relu
from tests.helpers import randomize_norms


class Shared(nn.Module):
    """Its one ReLU acts behind the sum, too: nothing can be fused by the order of the children."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.conv(x)) + x - 1)


def parts() -> dict[str, tuple[nn.Module, int, int]]:
    plain = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return {"plain": (plain, 1, 4), "bottleneck": (Bottleneck(16, 4), 2, 16), "shared": (Shared(), 0, 4)}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", parts())
def test_fused_parts_give_the_same_outputs_and_gradients(name, fresh):
    """A fresh bottleneck's last BatchNorm gives zeros, so that a ReLU before the sum would do no harm to its output."""
    torch.manual_seed(0)
    part, fused_count, channels = parts()[name]
    if not fresh:
        randomize_norms(part)
    elif name == "bottleneck":
        nn.init.zeros_(part.bn3.weight)
    part = part.double().eval().requires_grad_(False)
    x, weights = torch.rand(3, channels, 6, 6).double(), torch.randn(3, 1, 1, 1).double()
    fused = fuse_relu(part, x)
    assert sum(isinstance(module, ConvReLU) for module in fused.modules()) == fused_count
    (output, gradient), (other, other_gradient) = (value_and_gradient(net, x, weights) for net in (part, fused))
    torch.testing.assert_close(other, output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-10, atol=1e-10)


def value_and_gradient(net: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = net(x)
    (output * weights).sum().backward()
    return output.detach(), x.grad


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    conv = ConvReLU(nn.Conv2d(2, 3, 3, 2, 1).double().requires_grad_(False))
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(conv, (x,))
