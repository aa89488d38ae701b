"""The CIFAR ResNets as published, and the two bundled backbones with their weights."""

import json
from functools import partial
from importlib import resources

import pytest
import torch
from pretraining_images import SOURCE_CLASSES, source_images
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

from subtuning_lab.data.synthetic import NEW_GLYPHS, synthetic_images
from subtuning_lab.nets.cifar_resnet import LAB_MEAN, LAB_STD, CifarResNet, lab_resnet, lab_vit
from subtuning_lab.nets.registry import BUNDLED, load_backbone

WEIGHTS = resources.files("subtuning_lab.nets") / "weights"


def published_keys(depth: int) -> set[str]:
    """The keys of public CIFAR ResNet checkpoints, which leave out `num_batches_tracked`."""
    batch_norm = ("weight", "bias", "running_mean", "running_var")
    keys = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{name}" for name in batch_norm)}
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            for i in (1, 2):
                keys.add(f"layer{stage}.{block}.conv{i}.weight")
                keys.update(f"layer{stage}.{block}.bn{i}.{name}" for name in batch_norm)
    return keys


@torch.no_grad()
def predictions(name: str, images: torch.Tensor) -> torch.Tensor:
    chain = load_backbone(name)
    return chain.source_head(chain(chain.normalize(images))).argmax(dim=1)


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_keys_are_those_of_published_checkpoints(depth: int) -> None:
    keys = {key for key in CifarResNet(depth).state_dict() if not key.endswith("num_batches_tracked")}
    assert keys == published_keys(depth)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_parameter_counts_are_those_of_the_paper(depth: int, millions: float) -> None:
    """He et al. 2015, table 6."""
    count = sum(parameter.numel() for parameter in CifarResNet(depth).parameters())
    assert round(count / 1e6, 2) == millions


def test_option_a_shortcut_subsamples_and_pads_and_has_no_parameters() -> None:
    block = CifarResNet(8).layer2[0].eval()
    assert list(block.shortcut.parameters()) == []
    torch.nn.init.zeros_(block.conv2.weight)  # the residual branch vanishes: the shortcut is all that is left
    x = torch.rand(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    output = block(x)
    assert output.shape == (2, 32, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(output[:, 8:24, row, column], x[:, :, 2 * row, 2 * column])
    assert output[:, :8].abs().max() == 0
    assert output[:, 24:].abs().max() == 0


def test_option_b_shortcut_is_a_projection_where_the_shape_changes() -> None:
    model = CifarResNet(8, shortcut="B")
    owners = {key.rsplit(".shortcut", 1)[0] for key in model.state_dict() if ".shortcut" in key}
    assert owners == {"layer2.0", "layer3.0"}
    assert model.layer3[0].shortcut[0].weight.shape == (64, 32, 1, 1)


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_resolution_follows_the_strides(stem_stride: int) -> None:
    features = CifarResNet(8, stem_stride=stem_stride).forward_features(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 64, 8 // stem_stride, 8 // stem_stride)


@pytest.mark.parametrize("build", [lambda: CifarResNet(8, num_classes=7), lambda: lab_resnet(7), lambda: lab_vit(7)])
def test_head_and_features_compose_to_the_network(build) -> None:
    model = build().eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        readout = model.get_submodule("head" if isinstance(model, VisionTransformer) else "linear")
        assert features.shape == (2, model.num_features)
        assert torch.equal(readout(features), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, "depth.*21"),
        ({"depth": 2}, "depth.*2.*at least 8"),
        ({"depth": 200_006}, "depth is 200006.*at most 2000"),
        ({"num_classes": 0}, "num_classes.*0"),
        ({"stem_stride": 0}, "stem_stride.*0"),
        ({"shortcut": "C"}, "shortcut is 'C'; it must be one of A, B"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CifarResNet(**arguments)


def test_lab_vit_is_a_plain_timm_vision_transformer() -> None:
    model = lab_vit()
    assert type(model) is VisionTransformer
    assert isinstance(model.norm, torch.nn.LayerNorm)
    assert len(model.blocks) == 6


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("images_of", [source_images, partial(synthetic_images, "source")], ids=["all", "glyphs"])
def test_bundled_weights_know_their_source(name: str, images_of) -> None:
    images, labels = images_of(200, seed=123_456)
    assert predictions(name, images).eq(labels).float().mean() > 0.9


@pytest.mark.parametrize("name", BUNDLED)
def test_new_glyph_classes_are_learnable_from_bundled_features(name: str) -> None:
    """The nearest class mean, far above the 5 % of chance: images of a class share something."""
    chain = load_backbone(name)
    images, labels = synthetic_images("glyphs", 600, seed=5)
    with torch.no_grad():
        features = chain(chain.normalize(images))
    means = torch.stack([features[:400][labels[:400] == label].mean(dim=0) for label in range(NEW_GLYPHS)])
    assert torch.cdist(features[400:], means).argmin(dim=1).eq(labels[400:]).float().mean() > 0.4


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_files_are_small_and_describe_themselves(name: str) -> None:
    path = WEIGHTS / f"{name}.safetensors"
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
    assert len(path.read_bytes()) < 2_000_000
    assert header["architecture"] == name
    assert int(header["classes"]) == SOURCE_CLASSES
    assert tuple(json.loads(header["mean"])) == LAB_MEAN
    assert tuple(json.loads(header["std"])) == LAB_STD
    card = (WEIGHTS / f"{name}.md").read_text(encoding="utf-8")
    assert f"{float(header['source_accuracy']):.3f}" in card
