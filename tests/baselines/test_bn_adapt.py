"""The source network untouched: statistics against those computed by hand, and nothing trained."""

import pytest
import torch
from torch import nn

from subtuning_lab.baselines.bn_adapt import SourceNetwork, with_readout_of, with_statistics
from subtuning_lab.nets.chain import Chain
from tests.helpers import tiny_chain, tiny_split, tiny_task


def source_chain(classes: int = 3) -> Chain:
    """A tiny chain with a readout of its own."""
    chain = tiny_chain()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        chain.source_head = nn.Linear(6, classes)
    return chain


def norms_of(chain: Chain) -> list[nn.BatchNorm2d]:
    return [module for module in chain.modules() if isinstance(module, nn.BatchNorm2d)]


def test_no_adaptation_is_the_source_network():
    chain, split = source_chain(), tiny_split()
    fitted = SourceNetwork().fit(chain, tiny_split(seed=4), 3)
    with torch.no_grad():
        expected = chain.source_head(chain.eval()(chain.normalize(split.images)))
    assert torch.allclose(fitted.logits(split), expected, atol=1e-6) and fitted.params == 0


def test_statistics_are_those_of_the_inputs_part_by_part():
    """By hand, one part after the other: what enters a BatchNorm has the mean and variance that it holds."""
    chain, images = source_chain(), tiny_split(30).images
    adapted, seen = with_statistics(chain, images), {}
    for norm in norms_of(adapted):
        norm.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0].detach()}))
        norm.training = True  # as when they were taken: with the batch's own
        norm.momentum = 0.0
    with torch.no_grad():
        x = chain.normalize(images)
        for part in adapted.parts:
            x = part(x)
    assert len(seen) == 4
    for norm, x in seen.items():
        assert norm.running_mean.tolist() == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-5)
        assert norm.running_var.tolist() == pytest.approx(x.var((0, 2, 3)).tolist(), rel=1e-4)


def test_nothing_else_changes():
    chain = source_chain()
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    adapted = with_statistics(chain, tiny_split().images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in chain.state_dict().items())
    moved = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all("running" in name or "num_batches" in name for name in moved)
    assert not any(module.training for module in adapted.modules())
    assert [norm.momentum for norm in norms_of(adapted)] == [norm.momentum for norm in norms_of(chain)]


def test_a_prior_of_as_many_images_is_half_way():
    chain, images = source_chain(), tiny_split(24).images
    new, half = with_statistics(chain, images), with_statistics(chain, images, prior=24)
    for old, full, own in zip(*(norms_of(network) for network in (chain, new, half)), strict=True):
        assert torch.allclose(own.running_mean, (old.running_mean + full.running_mean) / 2, atol=1e-6)
        assert torch.allclose(own.running_var, (old.running_var + full.running_var) / 2, atol=1e-6)


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
    with pytest.raises(ValueError, match="statistics is 'both'"):
        SourceNetwork("both")
    with pytest.raises(ValueError, match="prior is -1"):
        SourceNetwork("target", -1)
    with pytest.raises(TypeError, match="prior"):
        SourceNetwork("target", None)
