"""Scores by hand on two linear blocks, a planted answer for each criterion, and what scores must not depend on."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import subtuning_lab as lab
from subtuning_lab.criteria import formulas
from subtuning_lab.criteria.evidence import Evidence, fitted_readout
from subtuning_lab.criteria.score import CRITERIA

N, CLASSES = 12, 3
WITHOUT_TRAINING = tuple(name for name in CRITERIA if name not in ("displacement", "ist", "prior"))


def pixels(n: int = N, width: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 1, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def two_blocks() -> lab.Chain:
    """Features B A x of three pixels, in double precision."""
    generator = torch.Generator().manual_seed(1)
    a, b = nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)
    for layer in (a, b):
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
    options = {"mean": (0, 0, 0), "std": (1, 1, 1), "input_size": (3, 1, 1), "name": "two"}
    return lab.Chain(nn.Flatten(), {"a": a, "b": b}, nn.Identity(), 2, **options).double()


def study_of(chain: lab.Chain, images: torch.Tensor, labels: torch.Tensor, **options) -> lab.Study:
    task = lab.Task("tiny", ("x", "y", "z")[: int(labels.max()) + 1], lab.Split(images, labels), None)
    recipe = lab.Recipe(epochs=2, batch_size=len(labels), lr=1e-2, **options)
    return lab.Study(chain, task, recipe, folds=2, device="cpu", progress=False)


@pytest.fixture(scope="module")
def study() -> lab.Study:
    return study_of(two_blocks(), pixels(), torch.arange(N) % CLASSES)


@pytest.fixture(scope="module")
def by_hand(study) -> dict[str, np.ndarray]:
    """Every quantity of the chain from its definition, in numpy."""
    a, b = (study.backbone.part(name).weight.detach().numpy() for name in "ab")
    x = study.task.train.images.flatten(1).numpy() / 255
    head = fitted_readout(torch.from_numpy(x @ a.T @ b.T), study.task.train.labels, CLASSES)
    w, c = head.weight.numpy(), head.bias.numpy()
    h = x @ a.T
    f = h @ b.T
    p = np.exp(f @ w.T + c)
    p /= p.sum(1, keepdims=True)

    def gradients(errors: np.ndarray) -> list[np.ndarray]:
        """Of A and of B for errors at the logits, (n, 2, 3) and (n, 2, 2)."""
        return [np.einsum("ni,nj->nij", errors @ w @ b, x), np.einsum("ni,nj->nij", errors @ w, h)]

    errors = p - np.eye(CLASSES)[study.task.train.labels]
    g = gradients(errors)
    gates = np.stack([((errors @ w @ b) * h).sum(1), ((errors @ w) * (f - h)).sum(1)], 1)
    expected = [gradients(p - np.eye(CLASSES)[np.full(N, y)]) for y in range(CLASSES)]
    top = [np.linalg.eigvalsh(m @ m.T)[-1] for m in (w @ b, x, w, h)]  # kernels here are Kronecker products
    ntk = np.array([top[0] * top[1], top[2] * top[3]])
    mean = [own.mean(0) for own in g]
    gain = np.array([(own**2).sum() for own in mean]) / [(x**2).mean(), (h**2).mean()]
    coupled = abs(gates[:, 0] @ gates[:, 1]) / np.prod(np.linalg.norm(gates, axis=0))
    return {
        "parameters": np.array([6, 4]),
        "rgn": np.array([np.linalg.norm(own) / np.linalg.norm(m) for own, m in zip(mean, (a, b), strict=True)]),
        "snr": np.array([(own.mean(0) ** 2 / own.var(0)).mean() for own in g]),
        "gradient": np.array([(own**2).sum() for own in mean]),
        "empirical_fisher": np.array([(own**2).sum((1, 2)).mean() for own in g]),
        "fisher": sum((p[:, y] * [(own**2).sum((1, 2)) for own in expected[y]]).mean(1) for y in range(CLASSES)),
        "gate_fisher": (gates**2).mean(0),
        "ntk": ntk / ntk.sum(),
        "cka": np.array([cka_by_kernels(x, h), cka_by_kernels(h, f)]),
        "cosine": np.array([np.nan, ((h * f).sum(1) / np.linalg.norm(h, axis=1) / np.linalg.norm(f, axis=1)).mean()]),
        "coupling": gain * (1 - coupled),
        "bound": np.array(
            [lab.subtuning_bound(n=N, tuned_params=r, delta=1, n_blocks=2, max_blocks=1).value for r in (6, 4)]
        ),
    }


def cka_by_kernels(x: np.ndarray, y: np.ndarray) -> float:
    """From the images' kernels (Kornblith et al. 2019, equation 3), where ours is from the features' covariances."""
    center = np.eye(len(x)) - 1 / len(x)
    k, m = (center @ one @ one.T @ center for one in (x, y))
    return float((k * m).sum() / np.linalg.norm(k) / np.linalg.norm(m))


def scores_of(study: lab.Study, criterion: str, **options) -> np.ndarray:
    return lab.score_blocks(study, criterion, **options)["score"].to_numpy()


@pytest.mark.parametrize("name", [name for name in WITHOUT_TRAINING if name not in ("random", "spectrum", "fisher")])
def test_two_linear_blocks_score_what_the_formulas_say(study, by_hand, name):
    np.testing.assert_allclose(scores_of(study, name), by_hand[name], rtol=1e-3 if name == "ntk" else 1e-7)


def test_the_true_fisher_is_the_mean_over_drawn_labels(study, by_hand):
    drawn = np.mean([scores_of(study, "fisher", seed=seed) for seed in range(60)], axis=0)
    np.testing.assert_allclose(drawn, by_hand["fisher"], rtol=0.1)


def test_the_readout_is_the_one_of_logistic_regression(study):
    features = np.random.default_rng(0).normal(size=(30, 4)) * 3
    labels = np.arange(30) % 3
    scale = np.sqrt((features**2).mean())
    reference = LogisticRegression(C=1 / (1e-2 * 30), tol=1e-10, max_iter=2000).fit(features / scale, labels)
    head = fitted_readout(torch.from_numpy(features), torch.from_numpy(labels), 3)
    np.testing.assert_allclose(head.weight, reference.coef_ / scale, atol=1e-4)


def test_singular_values_above_the_noise_by_hand():
    """8, 2, 1, 1: quartiles 1 and 3.5, edge 2.5 / 1.349 * 2 = 3.7; 8 above, 4 below, over the largest."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.diag(torch.tensor([8.0, 2, 1, 1]))
    assert formulas.spectral_ratio(layer.weight.detach().numpy()) == pytest.approx(8 / 4 / 8)
    flat = nn.Linear(4, 4, bias=False)
    flat.weight.data = torch.diag(torch.tensor([4.0, 3, 2, 1]))  # edge 1.5 / 1.349 * 2 = 2.2: 7 / 3 / 4
    assert formulas.spectral_ratio(flat.weight.detach().numpy()) == pytest.approx(7 / 12)
    np.testing.assert_allclose(formulas.spectrum([layer, flat]), [0.5, 1.0])


def test_displacement_by_hand(study):
    seen = Evidence(study, study.task.train)
    own = {name: study.backbone.part(name).weight.detach() for name in "ab"}
    weights = {"a": {"weight": 1.5 * own["a"]}, "b": {"weight": 3 * own["b"]}}
    np.testing.assert_allclose(seen.displacement(weights), [0.5, 2.0])


def test_importance_of_a_suppressed_change_by_hand():
    """Losses 0 and ln 2 give rewards +-1/4; the first step is 10 r / 4 for the suppressed."""
    draws = [[np.array([True, False]), np.array([False, True])]]
    importance = formulas.suppressed_importance(lambda shares: 0.0 if shares[0] < 1 else np.log(2), 2, draws)
    np.testing.assert_allclose(importance, [0.625, -0.625])


class Gated(nn.Module):
    """x + gate * layer(x): without its gate nothing that is done to it matters."""

    def __init__(self, weight: torch.Tensor, gate: float, bias: bool = False):
        super().__init__()
        self.layer = nn.Linear(*weight.shape, bias=bias)
        self.layer.weight.data = weight.clone()
        self.register_buffer("gate", torch.tensor(gate))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate * self.layer(x)


@pytest.fixture(scope="module")
def planted() -> lab.Study:
    """The classes are told by the first pixel, which block2 hides; the other blocks reach nothing."""
    noise = 0.01 * torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    hides = noise[1].clone()
    hides[0, 0] = -0.97
    others = [Gated(100 * noise[i], 0.0) for i in (0, 2)]
    blocks = {"block1": others[0], "block2": Gated(hides, 1.0, bias=True), "block3": others[1]}
    options = {"mean": (0.5,) * 3, "std": (0.3,) * 3, "input_size": (3, 1, 2), "name": "planted"}
    chain = lab.Chain(nn.Flatten(), blocks, nn.Identity(), 6, **options)
    images, labels = pixels(48, width=2), torch.arange(48) % 2
    images[:, 0, 0, 0] = (60 + 130 * labels).to(torch.uint8)
    return study_of(chain, images, labels)


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in ("random", "bound", "prior")])
def test_the_planted_block_comes_first(planted, name):
    table = lab.score_blocks(planted, name).set_index("block")
    assert table["rank"].idxmin() == "block2"
    assert lab.select_blocks(table.reset_index(), k=1) == ("block2",)


def test_a_profile_finds_the_planted_block_too(planted):
    profile = lab.finetuning_profile(planted.variant(lr=0.1, epochs=15))
    assert profile.best() == ("block2",)


def test_the_bound_is_the_parameter_count_upside_down(planted):
    table = lab.score_blocks(planted, ["parameters", "bound"])
    largest, least = (table[table["criterion"] == name].set_index("block")["rank"] for name in ("parameters", "bound"))
    assert largest.idxmin() == "block2" and least.idxmax() == "block2"


def test_random_scores_know_nothing(planted):
    firsts = [lab.score_blocks(planted, "random", seed=seed).set_index("block")["rank"].idxmin() for seed in range(60)]
    counts = pd.Series(firsts).value_counts()
    assert len(counts) == 3 and counts.min() >= 10


@pytest.mark.parametrize("name", WITHOUT_TRAINING)
def test_scores_depend_on_no_batch_no_order_and_no_repetition(study, name):
    train = study.task.train
    turned, twice = torch.arange(N).flip(0), torch.arange(N).repeat(2)
    usual = scores_of(study, name)
    others = [scores_of(study, name, chunk=5)]
    others.append(scores_of(study_of(two_blocks(), train.images[turned], train.labels[turned]), name))
    if name not in ("bound", "ntk"):  # which grow less or more with n by what they are
        others.append(scores_of(study_of(two_blocks(), train.images[twice], train.labels[twice]), name))
    for other in others:
        np.testing.assert_allclose(other, usual, rtol=1e-5)


def test_costs_are_those_of_the_evidence(study):
    table = lab.score_blocks(study, ["spectrum", "cka", "fisher", "gate_fisher"]).groupby("criterion").first()
    assert table["forwards"].to_dict() == {"spectrum": 0, "cka": N, "fisher": 2 * N, "gate_fisher": 2 * N}
    assert table["labels"].to_dict() == {"spectrum": 0, "cka": 0, "fisher": N, "gate_fisher": N}
    assert table["backwards"]["fisher"] == 2 * N and table["flops"]["fisher"] > table["flops"]["cka"] > 0


def test_chosen_blocks_keep_every_budget(study):
    table = lab.score_blocks(study, "parameters")
    assert lab.select_blocks(table, k=2) == ("a", "b")
    assert lab.select_blocks(table, max_params=5) == ("b",)  # "a" comes first and doesn't fit
    assert lab.select_blocks(table, max_params=3) == ()
    for blocks in (["a"], ["b"], ["a", "b"]):
        flops = sum(lab.nets.flops.training_flops(study.parts, blocks).values())
        ranked = table.assign(rank=[1, 2] if "a" in blocks else [2, 1])
        assert lab.select_blocks(ranked, max_flops=flops) == tuple(blocks)


def test_one_table_is_of_one_criterion(study):
    with pytest.raises(ValueError, match="several criteria"):
        lab.select_blocks(lab.score_blocks(study, ["parameters", "random"]), k=1)
    with pytest.raises(ValueError, match="give max_params"):
        lab.select_blocks(lab.score_blocks(study, "random"))


@pytest.mark.parametrize("name", ["lab-resnet", "lab-vit"])
def test_a_pass_agrees_with_plain_backwards(name):
    """Norms, convolutions, attention: mean gradient and squared norms, image by image."""
    task = lab.load_task("digits", train_size=10, image_size=32)
    study = lab.Study(lab.load_backbone(name), task, lab.Recipe(epochs=1), folds=2, device="cpu", progress=False)
    seen = Evidence(study, task.train, chunk=4)
    network = lab.set_trainable(study.backbone, "all").eval()
    last = network.block_names[-1]
    squares, total = [], 0
    for image, label in zip(task.train.images, task.train.labels, strict=True):
        loss = nn.functional.cross_entropy(seen.readout(network(network.normalize(image[None]))), label[None])
        gradients = torch.autograd.grad(loss, [*network.part(last).parameters()])
        squares.append(float(sum(g.square().sum() for g in gradients)))
        total = total + torch.cat([g.flatten() for g in gradients]) / 10
    lab.set_trainable(network, [])
    np.testing.assert_allclose(seen.gradients.squared[:, -1], squares, rtol=1e-3)
    magnitude = formulas.gradient_magnitude(seen.gradients.tensors[-1])
    assert magnitude == pytest.approx(float(total.square().sum()), rel=1e-3)
