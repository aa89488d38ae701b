"""Backbones by name: what is loaded, what is refused, and what to do about it."""

import os
import pickle
import subprocess
import sys
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


def test_half_a_classifier_is_refused(weights):
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*fc.bias"):
        load_backbone(NAME, weights(without=["fc.bias"]))


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
        ("layer1.0", TypeError, "list of block names"),
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
    for path in (pickled, "pretraind"):
        with pytest.raises(ValueError, match=r'"pretrained", "random", or the path of a .safetensors'):
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
    with pytest.raises(TypeError, match="no_such_option"):
        load_backbone(NAME, weights="random", no_such_option=1)


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


def test_offline_pretrained_names_the_alternatives(tmp_path):
    code = (
        "from subtuning_lab import load_backbone\n"
        "try:\n    load_backbone('test_resnet.r160_in1k')\n"
        "except ConnectionError as error:\n    print(error)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for alternative in ("lab-resnet", "lab-vit", "test_resnet.safetensors", 'weights="random"'):
        assert alternative in done.stdout


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnt18", ValueError, r"'resnt18'; did you mean .*resnet18"),
        ("lab-resnt", ValueError, "did you mean lab-resnet"),
        ("", ValueError, "no backbone is called ''"),
        ("resnet18.no_such_weights", ValueError, r"'resnet18.no_such_weights'; timm has .*resnet18.a1_in1k"),
        ("cifar_resnet", ValueError, "6n \\+ 2"),
        ("cifar_resnet21", ValueError, "6n \\+ 2.*21"),
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
