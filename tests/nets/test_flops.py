"""FLOPs are those of real passes: by hand for a small chain, and as torch counts them for six families."""

from math import prod

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from subtuning_lab.nets.chain import count_parameters, set_trainable
from subtuning_lab.nets.cifar_resnet import CifarBlock
from subtuning_lab.nets.flops import part_table, training_flops
from subtuning_lab.nets.registry import load_backbone
from tests.helpers import Residual, tiny_chain

TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
TINY_SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2)}
FAMILIES = {
    "resnet10t": {},
    "vit_tiny_patch16_224": TINY_VIT,
    "convnext_atto": {"depths": (2, 1, 2, 1), "dims": (8, 8, 16, 16)},
    "swin_tiny_patch4_window7_224": TINY_SWIN,
    "mobilenetv2_035": {},
    "regnety_002": {},
}


def test_flops_are_counted_by_hand(chain):
    """A product and a sum count as two; convolutions are all that the network has."""
    table = part_table(chain, 8)
    stem, block = 2 * 6 * 3 * 9 * 4 * 4, 2 * 6 * 6 * 9 * 4 * 4
    forward = {"stem": stem, "block1": block, "block2": block, "block3": block, "tail": 0}
    for column in ("flops", "backward", "backward_weights"):
        assert table[column].to_dict() == forward
    assert not table["backward_first"].any()  # each part has one convolution, whose input needs no gradient
    assert table.loc["stem", "output_shape"] == (6, 4, 4) and table.loc["tail", "output_shape"] == (6,)
    assert table["position"].tolist() == [0, 1, 2, 3, 4]
    assert table["params"].sum() == count_parameters(chain, "all")
    everything = training_flops(table, chain.part_names)
    assert everything == {"trunk": 0, "forward": stem + 3 * block, "backward": 2 * (stem + 3 * block) - stem}
    assert everything == training_flops(table, "all")
    assert training_flops(table, ["block2"]) == {"trunk": stem + block, "forward": 2 * block, "backward": 2 * block}
    assert training_flops(table, ["block2"], weight_gradients=False)["backward"] == block
    assert training_flops(table, []) == {"trunk": stem + 3 * block, "forward": 0, "backward": 0}


def test_inside_the_first_tuned_part_later_layers_hand_gradients_back(chain):
    """Two convolutions and a projection around them: the second one's input needs a gradient, the others' does not."""
    chain.blocks[1] = CifarBlock(6, 6, stride=2, shortcut="B")
    table = part_table(chain, 8)
    first = second = later = 2 * 6 * 6 * 9 * 4
    around = 2 * 6 * 6 * 4
    assert table.loc["block2", "flops"] == first + second + around
    assert table.loc["block2", "backward_first"] == second
    assert training_flops(table, ["block2"])["backward"] == first + second + around + second + later


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def real_backward(chain: nn.Module, images: torch.Tensor) -> int:
    """FLOPs of a backward pass as torch counts it, but for the weight gradients of grouped convolutions.

    Those torch takes for whole convolutions' with as many channels; by hand each is its forward's FLOPs.
    """
    too_many = []

    def hook(conv, inputs, output):
        if conv.weight.requires_grad:
            forward = 2 * output.numel() * conv.in_channels // conv.groups * prod(conv.kernel_size)
            too_many.append((conv.groups - 1) * forward)

    hooks = [m.register_forward_hook(hook) for m in chain.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    features = chain(images)
    for handle in hooks:
        handle.remove()
    return counted(lambda: features.sum().backward()) - sum(too_many)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_flops_are_those_of_real_passes(name):
    chain = load_backbone(name, weights="random", **FAMILIES[name])
    size = chain.input_size[1] if chain.input_size[1] < 64 else 64
    table, images = part_table(chain, size), torch.randn(1, 3, size, size)
    names = chain.block_names
    with sdpa_kernel(SDPBackend.MATH):  # the products of fused attention are not counted on CPUs
        for subset in ([names[-1]], [names[len(names) // 2]], [names[1], names[-1]], ["stem"], "all"):
            set_trainable(chain, subset)
            flops = training_flops(table, subset)
            assert flops["trunk"] + flops["forward"] == counted(lambda: chain(images))
            assert flops["backward"] == pytest.approx(real_backward(chain, images), rel=0.01)
        for parameter in set_trainable(chain, [names[1]]).parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.dim() == 1)  # biases and norms
        flops = training_flops(table, [names[1]], weight_gradients=False)
        assert flops["backward"] == pytest.approx(real_backward(chain, images), rel=0.01)


def test_sizes_are_whole_numbers_of_any_kind_within_limits(chain):
    assert part_table(chain, (8, 16))["flops"].tolist() == [2 * f for f in part_table(chain, np.int64(8))["flops"]]
    assert part_table(chain)["flops"].equals(part_table(chain, [8, 8])["flops"])
    for size, message in [(20_000, "at most 4096"), (0, "at least 1"), ("8", "whole number"), ((8, 8, 8), "height")]:
        with pytest.raises((TypeError, ValueError), match=f"^image_size is .*{message}"):
            part_table(chain, size)


@pytest.mark.parametrize(
    "added",
    [lambda x: x + torch.ones(()), lambda x: x / x.abs().max().item(), lambda x: x if x.sum() > 0 else -x],
)
def test_a_forward_that_needs_values_is_counted_all_the_same(added):
    class Needy(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return added(super().forward(x))

    plain, chain = tiny_chain(), tiny_chain()
    chain.blocks[1] = Needy(6)
    assert part_table(chain, 8).equals(part_table(plain, 8))
