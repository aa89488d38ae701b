"""Distances of tuned tasks and the way to them: by hand, against finite differences, where nothing bends."""

import copy
import math

import pytest
import torch
from torch import nn

from subtuning_lab import Chain, Recipe, Study, TunedTask, linearization_gap, load_backbone, tuned_distance
from tests.helpers import readout, tiny_chain, tiny_task

IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tuned_task(chain, ends, head=None):
    """A task whose tuned parts are the given ones."""
    head = head or readout(chain.num_features, 3, seed=1)
    states = {name: part.state_dict() for name, part in {**ends, "head": head}.items()}
    return TunedTask(chain, frozenset(ends), states, ("a", "b", "c"))


def moved(part, by, seed=0):
    """A copy whose parameters have moved at random."""
    part, generator = copy.deepcopy(part), torch.Generator().manual_seed(seed)
    for parameter in part.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return part


def test_distance_counts_parameters_and_tells_statistics_apart():
    chain = tiny_chain(dtype=torch.float64)
    first, last = copy.deepcopy(chain.part("block1")), copy.deepcopy(chain.part("block3"))
    first.conv.weight.data[0, 0, 0, 0] += 3
    first.bn.bias.data[2] -= 4
    last.bn.weight.data[1] += 12
    last.bn.running_mean[0] += 7
    last.bn.num_batches_tracked += 5
    head = readout(6, 3)
    tuned = tuned_task(chain, {"block3": last, "block1": first}, head)
    table = tuned_distance(tuned)
    assert list(table.index) == ["block1", "block3", "all", "head"]
    assert table["distance"][:3].tolist() == pytest.approx([5, 12, 13])
    assert table["statistics"].tolist() == pytest.approx([0, 7, 7, 0])
    squares = float((head.weight.square().sum() + head.bias.square().sum()).detach())
    assert table.loc["head", "distance"] == pytest.approx(math.sqrt(squares))
    start = {"weight": head.weight.detach() - 0.5, "bias": head.bias.detach()}
    assert tuned_distance(tuned, start).loc["head", "distance"] == pytest.approx(0.5 * math.sqrt(18))


def test_linear_probing_moves_the_readout_alone():
    tuned = tuned_task(tiny_chain(dtype=torch.float64), {})
    assert tuned_distance(tuned).loc["all"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="nothing moves"):
        linearization_gap(tuned, IMAGES)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in tuned.weights["head"].items()}
    gap = linearization_gap(tuned, IMAGES, head_start=zeros)  # a readout is linear in its weights
    assert gap["error"].max() < 1e-12 and gap["agreement"].eq(1).all()
    with torch.no_grad():
        logits = tuned.network()(IMAGES)
    assert gap["change"].iloc[-1] == pytest.approx(float(logits.square().sum(1).mean().sqrt()))


def test_a_network_that_is_linear_in_one_block_has_no_gap():
    chain = tiny_chain(dtype=torch.float64)
    linear = Chain(chain.stem, [nn.Conv2d(6, 6, 3, padding=1)] * 1, nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), 6)
    linear = linear.double()
    gap = linearization_gap(tuned_task(linear, {"block1": moved(linear.part("block1"), 0.5)}), IMAGES, batch_size=2)
    assert gap["error"].max() < 1e-12 and gap["change"].min() > 1e-3


def test_the_gap_vanishes_with_the_step_and_agrees_with_finite_differences():
    chain = tiny_chain(dtype=torch.float64)
    tuned = tuned_task(chain, {name: moved(chain.part(name), 0.2) for name in ("stem", "block2", "tail")})
    gap = linearization_gap(tuned, IMAGES, steps=[1e-6, 1e-3, 0.3, 1])
    assert gap["error"].iloc[0] < 1e-4 < gap["error"].iloc[2] and gap["error"].iloc[1] < 0.1
    assert gap["error"].is_monotonic_increasing and gap["agreement"].iloc[0] == 1
    ends = dict(tuned.network().named_parameters())

    @torch.no_grad()
    def logits(t):
        network = tuned.network()
        for name, start in chain.named_parameters():
            network.get_parameter(f"backbone.{name}").copy_((1 - t) * start + t * ends[f"backbone.{name}"])
        return network(IMAGES)

    slope = (logits(1e-6) - logits(-1e-6)) / 2e-6
    change = logits(1) - logits(0)
    assert gap["error"].iloc[-1] == pytest.approx(float((slope - change).norm() / change.norm()), rel=1e-4)
    assert gap["change"].iloc[-1] == pytest.approx(float(change.norm()) / math.sqrt(5))
    straight = logits(0) + slope
    assert gap["agreement"].iloc[-1] == float((straight.argmax(1) == logits(1).argmax(1)).double().mean())


def test_a_really_tuned_task_keeps_its_statistics_on_the_way():
    recipe = Recipe(epochs=2, batch_size=8, lr=1e-2)
    tuned = Study(tiny_chain(), tiny_task(), recipe, folds=2, device="cpu", progress=False).fit(["block2"])
    assert tuned_distance(tuned).loc["block2"].gt(0).all()
    gap = linearization_gap(tuned, IMAGES, steps=(1,))
    start = tuned.network()
    start.backbone.part("block2").load_state_dict(
        tuned.weights["block2"] | dict(tuned.backbone.part("block2").named_parameters())
    )
    with torch.no_grad():
        change = tuned.network()(IMAGES) - start(IMAGES)
    assert gap["change"].item() == pytest.approx(float(change.norm()) / math.sqrt(5), rel=1e-4)


def test_the_gap_of_attention():
    chain = load_backbone("lab-vit")
    tuned = tuned_task(chain, {"blocks.3": moved(chain.part("blocks.3"), 1e-3)}, readout(96, 3).float())
    images = torch.arange(2 * 3 * 32 * 32).mul(37).view(2, 3, 32, 32) % 256
    assert 0 < linearization_gap(tuned, images.to(torch.uint8), steps=[0.5])["error"].item() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.float()}, "outside"),
        ({"head_start": {"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}}, r"head_start has .*\(3, 5\)"),
        ({"head_start": {"weight": torch.zeros(3, 6)}}, "head_start has"),
    ],
)
def test_bad_ways_are_refused(change, message):
    chain = tiny_chain()
    tuned = tuned_task(chain, {"block1": moved(chain.part("block1"), 0.1)}, readout(6, 3).float())
    with pytest.raises(ValueError, match=message):
        linearization_gap(**{"tuned": tuned, "images": IMAGES} | change)


def test_siamese_tasks_are_refused():
    head = readout(12, 3).float().state_dict()
    tuned = TunedTask(tiny_chain(), frozenset(), {"head": head}, ("a", "b", "c"), siamese=True)
    with pytest.raises(ValueError, match="Siamese"):
        linearization_gap(tuned, IMAGES)
