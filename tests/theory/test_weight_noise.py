"""Networks with noise: closed forms against sampling, draws that stay what they are, bounds recomputed by hand."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from subtuning_lab import Recipe, Study, TunedTask, tuned_distance
from subtuning_lab.theory.pac_bayes import kl_inverse, monte_carlo_upper
from subtuning_lab.theory.weight_noise import SIGMAS, half_prior_bound, noisy_bound, posterior_errors, readout_start
from tests.helpers import tiny_chain, tiny_split, tiny_task

RECIPE = Recipe(epochs=4, batch_size=12, lr=3e-3, head_lr=3e-2, bn="frozen")


def make_study(recipe=RECIPE, n=60, chain=None, **options):
    chain, task = chain or tiny_chain(), tiny_task(n)
    return Study(chain, task, recipe, folds=2, device="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def fitted():
    study = make_study()
    return {blocks: study.fit(blocks) for blocks in ((), ("block2",), ("stem", "block3", "tail"))}


def sampled_errors(tuned, split, sigma, head_sigma, draws, seed=0):
    """Error rates over all images of networks whose tuned parts and readout get noise, one network after another."""
    generator, rates = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        network = tuned.network()
        moved = [(network.head, head_sigma), *((network.backbone.part(name), sigma) for name in tuned.blocks)]
        for part, own in moved:
            for parameter in part.parameters():
                parameter.add_(own * torch.randn(parameter.shape, generator=generator))
        rates.append((network(split.images).argmax(1) != split.labels).double().mean())
    return torch.stack(rates)


@pytest.mark.parametrize(("blocks", "sigma"), [((), 0.0), (("block2",), 0.3), (("stem", "block3", "tail"), 0.15)])
def test_noise_equals_plain_sampling(fitted, blocks, sigma):
    tuned, split = fitted[blocks], tiny_split(20)
    found = posterior_errors(tuned, split, [sigma], [0.2, 0.8], draws=800)[0]
    for own, head_sigma in zip(found.T, (0.2, 0.8), strict=True):
        with torch.no_grad():
            expected = sampled_errors(tuned, split, sigma, head_sigma, 200)
        error = math.hypot(float(own.std()) / 800**0.5, float(expected.std()) / 200**0.5)
        assert float(own.mean()) == pytest.approx(float(expected.mean()), abs=4 * error)
        assert 0.005 < float(expected.mean()) < 0.7 and error < 0.03


def test_many_classes_and_no_noise_at_all():
    chain = tiny_chain()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(6, 8)
    tuned = TunedTask(chain, frozenset(), {"head": head.state_dict()}, tuple("abcdefgh"))
    split = tiny_split(32, classes=8)
    still = posterior_errors(tuned, split, [0.0], [1e-6], draws=2)
    assert still[0, 0, 0] == pytest.approx(1 - tuned.accuracy(split), abs=1e-9)
    lost = posterior_errors(tuned, split, [0.0], [1e6], draws=2)
    assert lost[0, 0, 0] == pytest.approx(7 / 8, abs=1e-4)  # all classes alike
    with torch.no_grad():
        expected = sampled_errors(tuned, split, 0.0, 0.3, 500)
    assert posterior_errors(tuned, split, [0.0], [0.3], draws=2)[0, 0, 0] == pytest.approx(
        float(expected.mean()), abs=4 * float(expected.std()) / 500**0.5
    )


def test_without_noise_in_the_blocks_the_mean_is_that_of_all_images(fitted):
    tuned, split = fitted[("block2",)], tiny_split(20)
    found = posterior_errors(tuned, split, [0.0], [1e-6], draws=4, images_per_draw=2000)
    assert found.mean() == pytest.approx(1 - tuned.accuracy(split), abs=0.03)


def test_draws_stay_the_same_and_the_task_too(fitted):
    tuned, split = fitted[("block2",)], tiny_split(20)
    before = copy.deepcopy(tuned.weights)
    many = posterior_errors(tuned, split, [0.1, 0.4], [0.1], draws=130)
    few = posterior_errors(tuned, split, [0.4], [0.1], draws=50)
    assert many.shape == (2, 130, 1) and torch.allclose(many[1:, :50], few, atol=1e-5)
    assert not torch.allclose(posterior_errors(tuned, split, [0.4], [0.1], draws=50, seed=1), few)
    assert many[0].mean() < many[1].mean()
    for part, tensors in before.items():
        assert all(torch.equal(tensor, tuned.weights[part][key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("head_start", ["random", "probe", "source"])
def test_the_start_of_a_readout_is_where_training_begins(head_start):
    chain = tiny_chain()
    chain.source_head = nn.Linear(6, 3)
    tiny_steps = Recipe(epochs=1, lr=1e-12, head_lr=1e-12, bn="frozen", head_start=head_start)
    tuned = make_study(tiny_steps, chain=chain, seeds=(3,)).fit(["block1"])
    start = readout_start(tuned)
    assert all(torch.allclose(start[key], tensor, atol=1e-8) for key, tensor in tuned.weights["head"].items())
    if head_start == "source":
        assert torch.equal(start["weight"], chain.source_head.weight)


def test_linear_probing_by_hand(fitted):
    tuned, split = fitted[()], tiny_split(60)
    start = readout_start(tuned)
    bound = noisy_bound(tuned, split, start, sigmas={"blocks": [1.0], "head": [0.25, 0.5]}, price=0.3, confidence=0.9)
    sigma = bound.inputs["sigma"]["head"]
    way = math.sqrt(sum(float((tuned.weights["head"][key] - start[key]).square().sum()) for key in start))
    assert set(bound.inputs["sigma"]) == {"head"} and bound.inputs["KL"] == pytest.approx(way**2 / (2 * sigma**2))
    error = float(posterior_errors(tuned, split, [0.0], [sigma], draws=2)[0, 0, 0])
    upper = monte_carlo_upper([error] * 10**5, 0.1 * 0.1)
    budget = (bound.inputs["KL"] + 0.3 + math.log(2) + math.log(2 * math.sqrt(60) / (0.9 * 0.1))) / 60
    assert bound.value == pytest.approx(kl_inverse(upper, budget), abs=1e-9) and upper - error < 0.01
    for other in (0.25, 0.5):  # the better candidate was taken
        own = float(posterior_errors(tuned, split, [0.0], [other], draws=2)[0, 0, 0])
        assert bound.value <= kl_inverse(own, budget + (way**2 / (2 * other**2) - bound.inputs["KL"]) / 60) + 0.01


def test_tuned_blocks_by_hand(fitted):
    tuned, split = fitted[("stem", "block3", "tail")], tiny_split(60)
    start, grid = readout_start(tuned), (0.1, 0.2, 0.4)
    bound = noisy_bound(tuned, split, start, sigmas=grid, posteriors=300, seed=5)
    way, sigma = tuned_distance(tuned, start)["distance"], bound.inputs["sigma"]
    kl = way["all"] ** 2 / (2 * sigma["blocks"] ** 2) + way["head"] ** 2 / (2 * sigma["head"] ** 2)
    assert bound.inputs["KL"] == pytest.approx(kl) and {*sigma.values()} <= {*grid}
    errors = posterior_errors(tuned, split, [sigma["blocks"]], [sigma["head"]], draws=300, seed=11).flatten().numpy()
    upper = monte_carlo_upper(errors, 0.1 * 0.05)
    budget = (kl + math.log(9) + math.log(2 * math.sqrt(60) / (0.9 * 0.05))) / 60
    assert bound.terms["empirical error"] == pytest.approx(errors.mean())
    assert bound.value == pytest.approx(kl_inverse(upper, budget))
    dearer = noisy_bound(tuned, split, start, sigmas=grid, posteriors=300, seed=5, price=4.0)
    assert dearer.value > bound.value
    assert noisy_bound(tuned, split, start, sigmas=grid, posteriors=300, seed=5).value == bound.value


def test_a_prior_of_half_the_images_is_worth_it_and_sees_no_test_image():
    study = make_study(replace(RECIPE, epochs=15), n=240)
    study = study.with_(task=replace(study.task, test=None))
    half = half_prior_bound(study, ["block2"], posteriors=300)
    assert half.inputs["n"] == 120 and half.value < 0.8 and not half.vacuous
    tuned = study.fit(["block2"])
    whole = noisy_bound(tuned, study.task.train, readout_start(tuned), posteriors=300)
    assert half.value < whole.value and half.inputs["KL"] < whole.inputs["KL"]
    paid = half_prior_bound(study.variant(lr=[3e-3, 1e-9]), ["block2"], posteriors=300)
    assert paid.inputs["price"] == pytest.approx(math.log(2))  # the recipe was chosen with the other half, too


def test_the_prior_does_not_see_the_other_half(monkeypatch):
    """Other labels in the second half change nothing of what the first training sees."""
    seen = []
    fit = Study.fit

    def noting(self, blocks, seed=None):
        seen.append(self.task.train)
        return fit(self, blocks, seed)

    monkeypatch.setattr(Study, "fit", noting)
    study = make_study(replace(RECIPE, epochs=1))
    first, second = study.task.folds(2, 0)[0]
    half_prior_bound(study, [], posteriors=50)
    assert torch.equal(seen[0].images, study.task.train.images[first]) and len(seen[1]) == 60
    assert not np.intersect1d(first, second).size


def test_candidates_are_checked(fitted):
    tuned, split = fitted[()], tiny_split(20)
    start = readout_start(tuned)
    with pytest.raises(ValueError, match='sigmas has groups head; they must be "blocks" and "head"'):
        noisy_bound(tuned, split, start, sigmas={"head": [1.0]})
    assert all(own == tuple(sorted(own)) for own in SIGMAS.values())


def test_siamese_tasks_are_refused():
    head = nn.Linear(12, 3).state_dict()
    tuned = TunedTask(tiny_chain(), frozenset(), {"head": head}, ("a", "b", "c"), siamese=True)
    with pytest.raises(ValueError, match="Siamese"):
        posterior_errors(tuned, tiny_split(20), [0.1], [0.1])
