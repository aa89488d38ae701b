"""Head2Toe: features of every part, the right ones chosen, and a readout that is plain logistic regression."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from subtuning_lab import Chain, Split, set_trainable
from subtuning_lab.baselines import head2toe
from subtuning_lab.baselines.head2toe import Head2Toe, pooled, relevance
from subtuning_lab.baselines.latest import Latest
from subtuning_lab.nets.cifar_resnet import lab_vit
from subtuning_lab.nets.families import as_chain
from tests.helpers import tiny_chain, tiny_split


def noise_split(n: int, classes: int, seed: int = 0, side: int = 8) -> Split:
    """Images that say nothing about their labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(0, classes, (n,), generator=generator))


def hits(fitted, split: Split) -> float:
    return float((fitted.logits(split).argmax(1) == split.labels).double().mean())


# ---------------------------------------------------------------- the readout


def features_by_hand(chain: Chain, images: torch.Tensor, size: int | None = None, scaling: str = "image") -> np.ndarray:
    """One mean per channel of what forward hooks see at every part; norm 1 per image, or mean variance 1 per part."""
    seen, images = [], images / 255
    hooks = [part.register_forward_hook(lambda _, __, out: seen.append(out.clone())) for part in chain.parts]
    if size is not None:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    with torch.no_grad():
        chain.eval()((images - chain.mean) / chain.std)
    for hook in hooks:
        hook.remove()
    parts = [(x.mean((2, 3)) if x.dim() == 4 else x).double().numpy() for x in seen]
    if scaling == "part":
        return np.concatenate([one / np.sqrt(one.var(0).mean()) for one in (part - part.mean(0) for part in parts)], 1)
    features = np.concatenate([part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts], axis=1)
    return (features - features.mean(0)) / np.sqrt(
        features.var(0).mean()
    )  # one factor for all, so that C keeps its scale


@pytest.mark.parametrize("scaling", ["image", "part"])
@pytest.mark.parametrize(("classes", "size"), [(2, None), (3, 12), (3, 5)])
def test_with_all_features_it_is_logistic_regression(classes, size, scaling):
    chain, train = tiny_chain(), tiny_split(40, classes)
    fitted = Head2Toe(pool=1, share=1, C=0.3, scaling=scaling).fit(chain, train, classes, image_size=size)
    features, labels = features_by_hand(chain, train.images, size, scaling), train.labels.numpy()
    plain = LogisticRegression(C=0.3, max_iter=10_000, tol=1e-8).fit(features, labels)
    assert fitted.chosen.tolist() == list(range(features.shape[1])) == list(range(5 * 6))
    probabilities = fitted.logits(train).softmax(1)
    assert np.abs(probabilities.numpy() - plain.predict_proba(features)).max() < 1e-3
    assert fitted.params == (30 + 1) * classes


def test_two_classes_have_logits_of_the_right_sign():
    train = tiny_split(60, 2)
    logits = Head2Toe(share=0.5).fit(tiny_chain(), train, 2).logits(train)
    assert logits.shape == (60, 2) and (logits.argmax(1) == train.labels).double().mean() > 0.95


def test_a_class_without_training_images_is_never_predicted():
    train = tiny_split(30, 3)
    logits = Head2Toe().fit(tiny_chain(), train, 5).logits(train)
    assert logits.shape == (30, 5)
    assert (logits[:, 3:] == -torch.inf).all() and logits[:, :3].isfinite().all()


# ---------------------------------------------------------------- the choice of features


class Keep(nn.Module):
    """Lets the first three channels through, and sets all others to 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :3], torch.zeros_like(x[:, 3:])], dim=1)


class Interaction(nn.Module):
    """Writes the product of two brightnesses, which no linear readout of them has, into channel 3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x[:, 0].mean((1, 2)) * x[:, 1].mean((1, 2))
        return torch.cat([x[:, :3], product.view(-1, 1, 1, 1).expand_as(x[:, :1])], dim=1)


def planted_chain() -> Chain:
    """The label shows behind block2 alone: block1 hasn't made it yet, block3 wipes it out."""
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stem = nn.ZeroPad2d((0, 0, 0, 0, 0, 1))  # a fourth channel of zeros
    return Chain(stem, [Keep(), Interaction(), Keep()], tail, 4, mean=(0.5,) * 3, std=(0.25,) * 3, name="planted")


def planted_split(n: int, seed: int) -> Split:
    """Label 1 where the first two channels are both bright or both dark."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n, 3), generator=generator)
    images = 60 + 100 * signs[:, :, None, None] + torch.randint(0, 36, (n, 3, 8, 8), generator=generator)
    return Split(images.to(torch.uint8), (signs[:, 0] == signs[:, 1]).long())


def test_a_feature_that_one_part_alone_carries_is_found():
    train, held = planted_split(80, seed=0), planted_split(80, seed=1)
    fitted = Head2Toe(pool=4, share=1e-6).fit(planted_chain(), train, 2)
    assert fitted.features["part"].tolist() == [p for p in planted_chain().part_names for _ in range(4)]
    assert fitted.features.index[fitted.features["chosen"]].tolist() == fitted.chosen.tolist() == [2 * 4 + 3]
    assert hits(fitted, held) == 1
    at_the_end = LogisticRegression().fit(features_by_hand(planted_chain(), train.images)[:, -4:], train.labels)
    assert at_the_end.score(features_by_hand(planted_chain(), train.images)[:, -4:], train.labels) < 0.75


class Pick(nn.Module):
    """The first two pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :2]


@pytest.mark.parametrize(("scaling", "first"), [("image", {"tail"}), ("part", {"stem", "block1"})])
def test_narrow_parts_come_first_as_published(scaling, first):
    """Every pixel says as much about the label; norm 1 makes those few large that the tail hands on."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    images = torch.randint(40, 140, (200, 3, 8, 8), generator=generator) + 80 * labels.view(-1, 1, 1, 1)
    chain = Chain(nn.Identity(), [nn.Identity()], Pick(), 2, mean=(0.5,) * 3, std=(0.25,) * 3, name="narrow")
    fitted = Head2Toe(pool=192, share=2 / 386, scaling=scaling).fit(chain, Split(images.to(torch.uint8), labels), 2)
    chosen = fitted.features[fitted.features["chosen"]]
    assert len(fitted.features) == 2 * 192 + 2 and len(chosen) == 2 and set(chosen["part"]) <= first


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.5, 0.99])
def test_the_share_is_kept_and_one_feature_at_least(share):
    fitted = Head2Toe(pool=24, share=share).fit(tiny_chain(), tiny_split(), 3)
    n = 4 * 6 * 4 + 6  # stem and three blocks at 2 x 2 cells, and the tail
    assert len(fitted.features) == n
    assert len(fitted.chosen) == max(1, round(share * n)) == fitted.features["chosen"].sum()
    assert (np.diff(fitted.chosen) > 0).all() and fitted.chosen.min() >= 0 and fitted.chosen.max() < n
    assert fitted.params == 3 * (len(fitted.chosen) + 1)


def test_a_smaller_share_is_a_subset_of_a_larger_one():
    train = tiny_split()
    chosen = [set(Head2Toe(share=share).fit(tiny_chain(), train, 3).chosen) for share in (0.02, 0.2, 0.6, 1)]
    assert all(small < large for small, large in zip(chosen, chosen[1:], strict=False))


def test_relevance_satisfies_the_group_lassos_conditions():
    """Against proximal gradient descent written out: the same features are in, and they come first."""
    generator = np.random.default_rng(0)
    X, labels = generator.normal(size=(60, 12)), np.arange(60) % 3
    X[:, 4] += 2.0 * (labels == 1)
    X[:, 7] -= 0.8 * labels
    X -= X.mean(0)
    Y = np.eye(3)[labels] - 1 / 3
    penalty = 0.2 * np.linalg.norm(X.T @ Y / 60, axis=1).max()
    W, step = np.zeros((12, 3)), 60 / np.linalg.norm(X, 2) ** 2
    for _ in range(5000):
        W = W + step * X.T @ (Y - X @ W) / 60
        norms = np.linalg.norm(W, axis=1, keepdims=True)
        W = W * np.maximum(0, 1 - step * penalty / np.maximum(norms, 1e-300))
    scores = relevance(X, labels, 0.2)
    inside = np.linalg.norm(W, axis=1) > 0
    assert 2 <= inside.sum() < 12
    assert scores[inside] == pytest.approx(np.linalg.norm(W[inside], axis=1) + penalty, rel=0.05)
    assert scores[~inside].max() < scores[inside].min()
    assert set(np.argsort(-scores)[:2]) == {4, 7}


def test_features_that_say_nothing_have_no_relevance():
    assert relevance(np.ones((6, 4)), np.array([0, 1] * 3), 0.1).tolist() == [0, 0, 0, 0]


def test_labels_at_random_give_chance():
    train, held = noise_split(120, 3, seed=0), noise_split(300, 3, seed=1)
    accuracy = hits(Head2Toe(C=0.1).fit(tiny_chain(), train, 3), held)
    assert abs(accuracy - 1 / 3) < 4 * (2 / 9 / 300) ** 0.5


# ---------------------------------------------------------------- pooling


def test_feature_maps_are_pooled_to_at_most_the_number_asked_for():
    x = torch.rand(2, 6, 8, 8)
    assert torch.allclose(pooled(x, 6, (8, 8)), x.mean((2, 3)))
    assert pooled(x, 1, (8, 8)).shape == (2, 6)
    quarters = torch.stack([x[:, :, i : i + 4, j : j + 4].mean((2, 3)) for i in (0, 4) for j in (0, 4)], dim=2)
    assert torch.allclose(pooled(x, 24, (8, 8)), quarters.flatten(1))
    assert torch.equal(pooled(x, 10_000, (8, 8)), x.flatten(1))


@pytest.mark.parametrize("pool", [1, 7, 50, 512, 100_000])
@pytest.mark.parametrize("shape", [(6, 8, 8), (5, 4, 8), (3, 1, 9), (64, 2, 2)])
def test_pooling_stays_within_its_number(pool, shape):
    channels, height, width = shape
    n = pooled(torch.rand(2, *shape), pool, (height * 4, width * 4)).shape[1]
    assert n <= max(pool, channels) and n % channels == 0
    assert n == channels * height * width or pool < channels * height * width


@pytest.mark.parametrize("size", [(8, 8), (4, 8), (8, 4)])
@pytest.mark.parametrize("channels", [3, 20])
def test_channels_are_found_first_or_last(size, channels):
    x = torch.rand(2, channels, *size)
    image = (size[0] * 4, size[1] * 4)
    expected = x.mean((2, 3))
    assert torch.allclose(pooled(x, 1, image), expected)
    assert torch.allclose(pooled(x.permute(0, 2, 3, 1), 1, image), expected)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", [(14, 14), (2, 4)])
def test_tokens_before_the_grid_are_kept_apart(prefix, grid):
    height, width = grid
    first, patches = torch.rand(2, prefix, 6), torch.rand(2, height * width, 6)
    features = pooled(torch.cat([first, patches], 1), 6 * (prefix + 1), (height * 16, width * 16))
    assert torch.allclose(features, torch.cat([first.flatten(1), patches.mean(1)], 1), atol=1e-6)
    halves = pooled(torch.cat([first, patches], 1), 6 * (prefix + 4), (height * 16, width * 16))[:, 6 * prefix :]
    by_hand = patches.unflatten(1, grid).unflatten(2, (2, -1)).unflatten(1, (2, -1)).mean((2, 4))  # (2, 2, 2, 6)
    assert torch.allclose(halves, by_hand.permute(0, 3, 1, 2).flatten(1), atol=1e-6)


def test_tokens_without_a_grid_are_pooled_in_their_order():
    tokens = torch.rand(2, 35, 4)
    features = pooled(tokens, 20, (32, 32))
    assert torch.allclose(features, tokens.unflatten(1, (5, 7)).mean(2).transpose(1, 2).flatten(1), atol=1e-6)


def test_an_activation_of_five_axes_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4, 4, 4\).*2 to 4 axes"):
        pooled(torch.zeros(2, 3, 4, 4, 4), 8, (8, 8))


def swin() -> Chain:
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    model = SwinTransformer(img_size=32, patch_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2), window_size=4)
    return as_chain(model, name="swin")


def vision_transformer() -> Chain:
    torch.manual_seed(0)
    return as_chain(lab_vit(), name="vit")


@pytest.mark.parametrize("network", [swin, vision_transformer])
def test_transformers_are_read_at_every_part(network):
    """An untrained one keeps the colours that tell the classes apart."""
    train, held = tiny_split(60, side=32), tiny_split(60, side=32, seed=1)
    chain = network()
    fitted = Head2Toe(pool=16, share=0.2).fit(chain, train, 3)
    assert fitted.features["part"].drop_duplicates().tolist() == list(chain.part_names)
    widths = fitted.features.groupby("part", sort=False).size()
    assert widths["tail"] == chain.num_features
    assert hits(fitted, held) > 0.9


# ---------------------------------------------------------------- repeats, and what is refused


def test_the_same_call_gives_the_same_numbers_whatever_the_seed():
    train, held = tiny_split(60), tiny_split(30, seed=1)
    first = Head2Toe().fit(tiny_chain(), train, 3, seed=0)
    again = Head2Toe().fit(tiny_chain(), tiny_split(60), 3, seed=5)  # another split object: nothing is remembered
    assert torch.equal(first.logits(held), again.logits(held)) and first.chosen.tolist() == again.chosen.tolist()


def test_what_is_remembered_of_a_split_is_of_one_backbone_pool_and_size():
    train = tiny_split(40)
    latest = Latest()
    ways = [{"pool": 6}, {"pool": 24}, {"sparsity": 0.5}, {"share": 0.5}, {"scaling": "part"}]
    places = [(tiny_chain(), None), (tiny_chain(seed=3), None), (tiny_chain(), 12)]
    cases = [(Head2Toe(**how, latest=latest), chain, size) for how in ways for chain, size in places]
    warm = [method.fit(chain, train, 3, image_size=size).logits(train) for method, chain, size in cases]
    cold = [
        replace(method, latest=Latest()).fit(chain, train, 3, image_size=size).logits(train)
        for method, chain, size in cases
    ]
    assert all(torch.equal(a, b) for a, b in zip(warm, cold, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(warm) for b in warm[:i])


def test_a_grid_computes_features_and_relevance_once(monkeypatch):
    """A GPU hands every method a new copy of the images."""
    calls = []
    for home, name in ((head2toe._Features, "of_all"), (head2toe, "relevance")):
        real = getattr(home, name)
        monkeypatch.setattr(home, name, lambda *given, name=name, real=real: (calls.append(name), real(*given))[1])
    for method in Head2Toe.grid():
        method.fit(tiny_chain(), tiny_split(40), 3)
    assert calls == ["of_all", "relevance"]


def test_the_backbone_stays_as_it_was(chain):
    set_trainable(chain, ["block2"]).train()
    before = chain.fingerprint
    fitted = Head2Toe().fit(chain, tiny_split(), 3)
    assert chain.fingerprint == before and chain.trainable == {"block2"} and chain.training
    expected = Head2Toe().fit(tiny_chain(), tiny_split(), 3).logits(tiny_split())  # BatchNorm in eval mode
    assert torch.equal(fitted.logits(tiny_split()), expected)
    chain.blocks[0].conv.weight.data.zero_()
    assert torch.equal(fitted.logits(tiny_split()), expected)


def test_logits_do_not_depend_on_the_batch():
    train, held = tiny_split(40), tiny_split(130, seed=1)
    fitted = Head2Toe().fit(tiny_chain(), train, 3)
    whole, one = fitted.logits(held), torch.cat([fitted.logits(held.take(torch.tensor([i]))) for i in (0, 64, 129)])
    assert whole.shape == (130, 3) and torch.allclose(whole[[0, 64, 129]], one, atol=1e-4)


def test_solvers_converge_on_the_usual_settings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in Head2Toe.grid():
            method.fit(tiny_chain(), tiny_split(60), 3)


def test_settings_are_plain_values_that_make_the_method_again():
    grid = [*Head2Toe.grid(shares=(0.1, 1.0), Cs=(1.0, 2.0), pool=64), Head2Toe(scaling="part")]
    assert len(set(grid)) == 5 and all(Head2Toe(**method.settings()) == method for method in grid)
    assert {type(value) for method in grid for value in method.settings().values()} <= {int, float, str}


def test_bad_training_images_are_named(chain):
    train = tiny_split()
    with pytest.raises(ValueError, match="train label 2 at index 2"):
        Head2Toe().fit(chain, train, 2)
    with pytest.raises(ValueError, match="the one label 1"):
        Head2Toe().fit(chain, train.take(torch.tensor([1, 4])), 3)
