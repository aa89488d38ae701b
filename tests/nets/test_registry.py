"""Backbones by name: what is loaded, what is refused, and what to do about it."""

import pickle
from importlib.resources import files

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.registry import BUNDLED, backbone_names, load_backbone

NAME = "test_resnet"  # timm's smallest
BLOCKS = ("layer1.0", "layer2.0", "layer3.0", "layer4.0")


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(5)
    return timm.create_model(NAME).eval()


@pytest.fixture
def weights(reference, tmp_path):
    """Writes the reference's weights, less those whose key starts with a prefix, with some replaced."""

    def write(without=(), name="w.safetensors", **replaced):
        tensors = {
            key: t.clone() for key, t in reference.state_dict().items() if not key.startswith(tuple(without) or "?")
        }
        save_file(tensors | replaced, tmp_path / name)
        return tmp_path / name

    return write


def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images) if isinstance(model, Chain) else model.forward_head(model.forward_features(images), True)


IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_a_file_gives_the_same_network(reference, weights):
    for path in (weights(), str(weights())):
        chain = load_backbone(NAME, path)
        assert torch.equal(features(chain, IMAGES), features(reference, IMAGES))
        assert torch.equal(chain.source_head.weight, reference.fc.weight)
        assert chain.block_names == BLOCKS and chain.name == NAME and not chain.trainable
        assert not any(p.requires_grad for p in chain.parameters())


def test_a_file_without_the_classifier_or_counters_will_do(reference, weights):
    counters = [key for key in reference.state_dict() if key.endswith("num_batches_tracked")]
    chain = load_backbone(NAME, weights(without=("fc.", *counters)))
    assert torch.equal(features(chain, IMAGES), features(reference, IMAGES))
    assert chain.source_head is None  # one at random would look like a pretrained one


@pytest.mark.parametrize("bias", [True, False])
def test_the_files_own_classifier_is_taken_over(reference, weights, bias):
    """With however many classes; what it says is what a linear layer with the file's tensors says."""
    width = reference.fc.in_features
    classifier = {"fc.weight": torch.randn(7, width)} | ({"fc.bias": torch.randn(7)} if bias else {})
    chain = load_backbone(NAME, weights(without=["fc."], **classifier))
    x = features(chain, IMAGES)
    assert torch.equal(x, features(reference, IMAGES))
    torch.testing.assert_close(chain.source_head(x), x @ classifier["fc.weight"].T + classifier.get("fc.bias", 0))


@pytest.mark.parametrize(
    "classifier",
    [
        {"fc.bias": torch.zeros(7)},
        {"fc.weight": torch.zeros(7, 3, 1, 1)},
        {"fc.weight": torch.zeros(7, 5), "fc.bias": torch.zeros(7)},
        {"fc.0.weight": torch.zeros(9, 5), "fc.2.weight": torch.zeros(3, 9)},
        {"last_linear.weight": torch.zeros(7, 5)},
        {"head.proj.weight": torch.zeros(7, 5), "classifier.bias": torch.zeros(7)},
    ],
)
def test_a_classifier_that_is_no_linear_layer_is_left_out(reference, weights, classifier):
    chain = load_backbone(NAME, weights(without=["fc."], **classifier))
    assert torch.equal(features(chain, IMAGES), features(reference, IMAGES)) and chain.source_head is None


def test_numbers_that_are_not_finite_are_named(reference, weights):
    for wrong in (torch.nan, torch.inf):
        path = weights(**{"layer2.0.bn1.bias": torch.full_like(reference.layer2[0].bn1.bias, wrong).half()})
        with pytest.raises(ValueError, match=r"w.safetensors: layer2.0.bn1.bias holds numbers that are not finite"):
            load_backbone(NAME, path)


def test_whole_numbers_are_no_weights(reference, weights):
    path = weights(**{"layer2.0.bn1.bias": reference.layer2[0].bn1.bias.to(torch.int8)})
    with pytest.raises(ValueError, match=r"layer2.0.bn1.bias is torch.int8, test_resnet wants torch.float32"):
        load_backbone(NAME, path)


def test_a_path_may_start_at_home(weights, monkeypatch):
    monkeypatch.setenv("HOME", str(weights().parent))
    assert load_backbone(NAME, "~/w.safetensors").source_head is not None


TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
TINY_SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}


@pytest.mark.parametrize(
    ("name", "options", "other"),
    [
        ("vit_tiny_patch16_224", TINY_VIT, {"img_size": 48}),
        ("vit_tiny_patch16_224", TINY_VIT, {"img_size": (32, 48)}),
        ("vit_tiny_patch16_224", TINY_VIT | {"reg_tokens": 2, "no_embed_class": True}, {"img_size": 24}),
        ("deit_tiny_distilled_patch16_224", TINY_VIT, {"img_size": 48}),
        ("swin_tiny_patch4_window7_224", TINY_SWIN, {"img_size": 48, "window_size": 6}),
    ],
)
def test_another_image_size_resamples_positions_as_timm_does(tmp_path, name, options, other):
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=5, **options)
    for key, parameter in model.named_parameters():
        if "pos" in key:
            nn.init.normal_(parameter)
    save_file(model.state_dict(), tmp_path / "v.safetensors")
    overlay = {"file": str(tmp_path / "v.safetensors"), "hf_hub_id": None, "url": "", "num_classes": 5}
    reference = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, **options | other
    ).eval()
    chain = load_backbone(name, tmp_path / "v.safetensors", **options | other)
    images = torch.randn(2, *chain.input_size)
    assert torch.equal(features(chain, images), features(reference, images))
    without = {key: value for key, value in (options | other).items() if key != "img_size"}
    with pytest.raises(ValueError, match=r"wants .*; give img_size= for weights of another image size"):
        load_backbone(name, tmp_path / "v.safetensors", **without)


def test_dynamic_images_take_any_size():
    chain = load_backbone("vit_tiny_patch16_224", weights="random", dynamic_img_size=True, **TINY_VIT)
    for size in (32, 48):
        assert features(chain, torch.randn(1, 3, size, size)).shape == (1, 16)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (NAME, {"in_chans": 1}, ValueError, "in_chans is 1; it must be 3: images are RGB here"),
        (NAME, {"global_pool": ""}, ValueError, r"features of \(1, .*leave global_pool as it is"),
        (NAME, {"pretrained": True}, TypeError, "pretrained is no option here"),
        (NAME, {"features_only": True}, TypeError, "features_only is no option here"),
        (NAME, {"checkpoint_path": "w.pth"}, TypeError, "checkpoint_path is no option here"),
        (NAME, {"no_such_option": 1}, TypeError, "test_resnet can't be made with .*no_such_option"),
        (NAME, {"drop_rate": "much"}, TypeError, "drop_rate is 'much'; it must be a finite number"),
        (NAME, {"drop_path_rate": 2.0}, ValueError, "drop_path_rate is 2.0; .*at most 1"),
        (NAME, {"output_stride": 7}, ValueError, "test_resnet can't be made with .*: AssertionError"),
        ("vit_tiny_patch16_224", {"patch_size": 0}, ValueError, "vit_tiny_patch16_224 can't be made with"),
        ("lab-resnet", {"depth": 8}, TypeError, "lab-resnet can't be made with .*depth"),
        ("lab-vit", {"num_classes": -1}, ValueError, "lab-vit can't be made with .*num_classes is -1"),
        ("cifar_resnet8", {"stem_stride": 0}, ValueError, "cifar_resnet8 can't be made with .*stem_stride is 0"),
        ("vit_tiny_patch16_224", {"class_token": "False"}, TypeError, 'class_token is the text "False".*give False'),
        ("vit_tiny_patch16_224", {"class_token": "off"}, TypeError, 'class_token is the text "off".*give False'),
        ("vit_tiny_patch16_224", {"qkv_bias": "yes"}, TypeError, 'qkv_bias is the text "yes".*give True'),
        ("vit_tiny_patch16_224", {"fc_norm": "none"}, TypeError, 'fc_norm is the text "none".*give None'),
        ("vit_tiny_patch16_224", {"num_heads": 5}, ValueError, "vit_tiny_patch16_224 can't be made with .*5"),
        ("vit_tiny_patch16_224", {"depth": 0}, ValueError, "blocks is empty"),
    ],
)
def test_options_that_would_not_do_what_they_say_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        load_backbone(name, weights="random", **options)


@pytest.mark.parametrize("options", [{"drop_path_rate": 0.1}, {"drop_rate": 0.5}])
def test_options_that_trainings_override_are_told(options):
    (name,) = options
    with pytest.warns(UserWarning, match=f"{name}=.* has no effect in trainings of this package"):
        load_backbone(NAME, weights="random", **options)


def test_half_precision_files_are_brought_to_full(reference, tmp_path):
    save_file(
        {key: t.half() if t.is_floating_point() else t for key, t in reference.state_dict().items()},
        tmp_path / "h.safetensors",
    )
    chain = load_backbone(NAME, tmp_path / "h.safetensors")
    assert all(p.dtype == torch.float32 for p in chain.parameters())
    assert torch.allclose(chain.stem.model.conv1[0].weight, reference.conv1[0].weight, atol=1e-3)


def test_a_block_without_weights_is_named_and_can_be_left_out(weights):
    name, last = "mobilenetv1_100", "blocks.4.1"
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    assert isinstance(model.get_submodule(last), nn.Module)
    path = weights(name="other.safetensors")
    save_file({k: t for k, t in model.state_dict().items() if not k.startswith(f"{last}.")}, path)
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of mobilenetv1_100, e.g. blocks.4.1.*drop_blocks=\["):
        load_backbone(name, path)
    chain = load_backbone(name, path, drop_blocks=[last])
    assert last not in chain.block_names and len(chain.block_names) == 12
    model.set_submodule(last, nn.Identity())
    assert torch.equal(features(chain, IMAGES), features(model, IMAGES))
    assert not any(p.requires_grad for p in chain.parameters())


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (["layer9.0"], ValueError, r"no block layer9.0; it has layer1.0, layer2.0"),
        ("layer1.0", TypeError, "drop_blocks is 'layer1.0'; it must be a list"),
        (BLOCKS, ValueError, "blocks is empty"),
        (["layer2.0"], ValueError, "doesn't work without layer2.0"),  # it changes the width
    ],
)
def test_blocks_that_cannot_be_left_out(blocks, error, message):
    with pytest.raises(error, match=message):
        load_backbone(NAME, weights="random", drop_blocks=blocks)


def test_wrong_files_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match=r"layer1.0.conv1.weight has shape \(1, 2\), test_resnet wants \("):
        load_backbone(NAME, weights(**{"layer1.0.conv1.weight": torch.zeros(1, 2)}))
    with pytest.raises(ValueError, match=r"has 1 tensors that test_resnet lacks, e.g. extra"):
        load_backbone(NAME, weights(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of test_resnet, e.g. layer3.0.bn1.bias"):
        load_backbone(NAME, weights(without=["layer3.0"]))
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_backbone(NAME, tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="folder.safetensors"):
        (tmp_path / "folder.safetensors").mkdir()
        load_backbone(NAME, tmp_path / "folder.safetensors")
    pickled = tmp_path / "w.pth"
    pickled.write_bytes(pickle.dumps({}))
    with pytest.raises(TypeError, match="weights is None; it must be a str or PathLike"):
        load_backbone(NAME, None)
    for path in (pickled, "pretraind"):
        with pytest.raises(ValueError, match=r'"pretrained", "random", "package", or the path of a .safetensors'):
            load_backbone(NAME, path)


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty", "a pickle"])
def test_damaged_files_are_refused(weights, damage):
    path = weights()
    content = path.read_bytes()
    damaged = {
        "truncated": content[:-100],
        "overwritten": b"\xff" * 64 + content[64:],
        "empty": b"",
        "a pickle": pickle.dumps([1]),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match="w.safetensors is not a readable .safetensors file"):
        load_backbone(NAME, path)


def test_the_seed_decides_random_weights_and_leaves_the_callers_chance_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (load_backbone("cifar_resnet8", weights="random", seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    assert first.source_head is None


def test_model_options_reach_the_model():
    chain = load_backbone("vit_tiny_patch16_224", weights="random", img_size=32, patch_size=16, depth=2)
    assert chain.input_size == (3, 32, 32) and len(chain.block_names) == 2
    stride1, stride2 = (load_backbone("cifar_resnet8", weights="random", stem_stride=s) for s in (1, 2))
    assert stride1.fingerprint != stride2.fingerprint  # same weights, other features


def test_a_pool_of_another_kind_is_another_backbone():
    options = {"img_size": 32, "patch_size": 16, "depth": 1, "fc_norm": False}
    pools = [
        load_backbone("vit_tiny_patch16_224", weights="random", global_pool=p, **options) for p in ("avg", "token")
    ]
    images = torch.randn(1, 3, 32, 32)
    assert not torch.equal(features(pools[0], images), features(pools[1], images))
    assert pools[0].fingerprint != pools[1].fingerprint


def test_pretrained_goes_through_timm(reference, weights):
    overlay = {"file": str(weights()), "hf_hub_id": None, "url": "", "num_classes": 1000}
    chain = load_backbone(NAME, pretrained_cfg_overlay=overlay)
    assert torch.equal(features(chain, IMAGES), features(reference, IMAGES))
    assert torch.equal(chain.source_head.weight, reference.fc.weight)


def test_offline_pretrained_names_the_alternatives(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    alternatives = 'lab-resnet or lab-vit .*test_resnet.safetensors.*weights="random"'
    with pytest.raises(ConnectionError, match=alternatives):
        load_backbone("test_resnet.r160_in1k")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnt18", ValueError, r"'resnt18'; did you mean .*resnet18"),
        ("lab-resnt", ValueError, "did you mean lab-resnet"),
        ("", ValueError, "name is ''"),
        ("resnet18.no_such_weights", ValueError, r"'resnet18.no_such_weights'; timm has .*resnet18.a1_in1k"),
        ("cifar_resnet", ValueError, "6n \\+ 2"),
        ("cifar_resnet21", ValueError, r"depth is 21.*6n \+ 2"),
        ("cifar_resnetx", ValueError, "6n \\+ 2"),
        (18, TypeError, "name is 18"),
        (None, TypeError, "name is None"),
    ],
)
def test_unknown_names_are_refused(name, error, message):
    with pytest.raises(error, match=message):
        load_backbone(name, weights="random")


def test_cifar_networks_have_no_published_weights():
    with pytest.raises(ValueError, match=r'cifar_resnet20 .*"random" or the path'):
        load_backbone("cifar_resnet20")


def test_a_cifar_file_without_counters_loads(tmp_path):
    source = load_backbone("cifar_resnet8", weights="random", seed=3)
    from subtuning_lab.nets.cifar_resnet import CifarResNet

    torch.manual_seed(3)
    model = CifarResNet(8).eval()
    save_file(
        {k: t for k, t in model.state_dict().items() if not k.endswith("num_batches_tracked")},
        tmp_path / "c.safetensors",
    )
    chain = load_backbone("cifar_resnet8", tmp_path / "c.safetensors")
    assert chain.source_head.out_features == 10 and source.block_names == chain.block_names
    assert torch.equal(features(chain, IMAGES), features(model, IMAGES))


def test_names_are_listed_with_a_line_each():
    names = backbone_names()
    assert set(BUNDLED) <= set(names) and all(line and "\n" not in line for line in names.values())


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_backbones_load_offline(name):
    chain = load_backbone(name)
    assert chain.input_size == (3, 32, 32) and chain.name == name and chain.source_head is not None
    file = load_file(files("subtuning_lab.nets") / "weights" / f"{name}.safetensors")
    readout = "linear.weight" if name == "lab-resnet" else "head.weight"
    assert torch.equal(chain.source_head.weight, file[readout])
    with torch.no_grad():
        assert chain(torch.zeros(2, 3, 32, 32)).shape == (2, chain.num_features)
