"""The source network untouched: statistics against those computed by hand, and nothing trained."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from subtuning_lab import Chain, SourceNetwork, with_readout_of, with_statistics
from tests.helpers import tiny_chain, tiny_split, tiny_task

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def source_chain(classes: int = 3) -> Chain:
    """A tiny chain with a readout of its own."""
    chain = tiny_chain()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        chain.source_head = nn.Linear(6, classes)
    return chain


def norms_by_name(chain: Chain) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in chain.named_modules() if isinstance(module, nn.BatchNorm2d)}


def norms_of(chain: Chain) -> list[nn.BatchNorm2d]:
    return [*norms_by_name(chain).values()]


def test_no_adaptation_is_the_source_network():
    chain, split = source_chain(), tiny_split()
    fitted = SourceNetwork().fit(chain, tiny_split(seed=4), 3)
    with torch.no_grad():
        expected = chain.source_head(chain.eval()(chain.normalize(split.images)))
    assert torch.allclose(fitted.logits(split), expected, atol=1e-6) and fitted.params == 0


class Mixing(nn.Module):
    """The published layer, written out: source and batch statistics are mixed, and the mixture normalizes."""

    def __init__(self, norm: nn.BatchNorm2d, weight: float) -> None:
        super().__init__()
        self.norm, self.weight = norm, weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.mean = self.weight * self.norm.running_mean + (1 - self.weight) * mean
        self.var = self.weight * self.norm.running_var + (1 - self.weight) * var
        x = (x - self.mean[:, None, None]) / (self.var[:, None, None] + self.norm.eps).sqrt()
        return x * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


@pytest.mark.parametrize("prior", [0, 8, 24, 512, 1e9])
def test_each_layer_is_mixed_before_the_next_one_sees_its_output(prior):
    """Against a plain network of layers that do so; numbers of images are weights: prior : 24."""
    chain, images = source_chain(), tiny_split(24).images
    plain = copy.deepcopy(chain).eval()
    layers = {name: Mixing(norm, prior / (prior + 24)) for name, norm in norms_by_name(plain).items()}
    for name, layer in layers.items():
        plain.set_submodule(name, layer)
    adapted = with_statistics(chain, images, prior)
    with torch.no_grad():
        torch.testing.assert_close(adapted(chain.normalize(images)), plain(chain.normalize(images)), **CLOSE)
    for name, layer in layers.items():
        torch.testing.assert_close(adapted.get_submodule(name).running_mean, layer.mean, **CLOSE)
        torch.testing.assert_close(adapted.get_submodule(name).running_var, layer.var, **CLOSE)


def test_nothing_else_changes():
    chain = source_chain()
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    adapted = with_statistics(chain, tiny_split().images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in chain.state_dict().items())
    moved = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all("running" in name or "num_batches" in name for name in moved)
    assert not any(module.training for module in adapted.modules())
    assert [norm.momentum for norm in norms_of(adapted)] == [norm.momentum for norm in norms_of(chain)]


def test_batches_are_averaged_and_a_large_prior_is_the_source():
    """By hand on the first BatchNorm, whose inputs no other one changes; 300 images come in two batches."""
    chain, images = source_chain(), tiny_split(300).images
    norm = with_statistics(chain, images, prior=100).stem[1]
    with torch.no_grad():
        halves = [chain.stem[0](chain.normalize(rows)) for rows in images.split(150)]
    by_hand = sum(0.75 * x.mean((0, 2, 3)) + 0.25 * chain.stem[1].running_mean for x in halves) / 2
    torch.testing.assert_close(norm.running_mean, by_hand, **CLOSE)
    for new, old in zip(*(norms_of(own) for own in (with_statistics(chain, images, 1e30), chain)), strict=True):
        torch.testing.assert_close(new.running_var, old.running_var, **CLOSE)


def test_a_norm_with_its_own_activation_is_mixed_likewise():
    """timm fuses BatchNorm and activation in one module."""
    chain, images = source_chain(), tiny_split().images
    fused = copy.deepcopy(chain)
    fused.stem = nn.Sequential(chain.stem[0], BatchNormAct2d(6, act_layer=nn.ReLU))
    fused.stem[1].load_state_dict(chain.stem[1].state_dict())
    wanted, adapted = (with_statistics(own, images, prior=24).eval() for own in (chain, fused))
    torch.testing.assert_close(adapted(chain.normalize(images)), wanted(chain.normalize(images)), **CLOSE)


def test_an_affine_shift_of_the_stems_output_is_undone():
    """Low contrast and more light scale and move every value: behind the first BatchNorm little of it is left."""
    chain, images = source_chain(), tiny_split(60).images
    faded = (images.float() * 0.5 + 40).round().to(torch.uint8)
    with torch.no_grad():
        clean, old, new = (
            network.stem[1](network.stem[0](network.normalize(own)))[..., 1:, 1:]
            for network, own in (
                (with_statistics(chain, images), images),
                (with_statistics(chain, images), faded),
                (with_statistics(chain, faded), faded),
            )
        )
    assert (new - clean).norm() < 0.4 * (old - clean).norm()  # the padding was not shifted


def test_labels_are_never_read():
    chain, split = source_chain(), tiny_split()
    other = tiny_split()
    object.__setattr__(other, "labels", None)
    how = SourceNetwork("target")
    assert torch.equal(how.fit(chain, split, 3).logits(split), how.fit(chain, other, 3).logits(split))


def test_a_wider_readout_is_narrowed_to_the_tasks_classes():
    chain = source_chain(classes=5)
    own = with_readout_of(chain, tiny_task())
    assert own.source_head.out_features == 3 and chain.source_head.out_features == 5
    assert torch.equal(own.source_head.weight, chain.source_head.weight[:3])
    assert own.fingerprint == chain.fingerprint


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="tiny has none"):
        SourceNetwork().fit(tiny_chain(), tiny_split(), 3)
    with pytest.raises(ValueError, match="has one of 5 classes"):
        SourceNetwork().fit(source_chain(5), tiny_split(), 3)
    with pytest.raises(ValueError, match="3 classes.*tiny has one of 2"):
        with_readout_of(source_chain(2), tiny_task())
    with pytest.raises(ValueError, match="more than one value per channel"):
        with_statistics(source_chain(), torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
