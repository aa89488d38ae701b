"""The chain view computes exactly what the model does, for every family, and loses nothing of it."""

import copy
import inspect
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from subtuning_lab.data.task import Task
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.nets.chain import set_trainable
from subtuning_lab.nets.cifar_resnet import CifarResNet
from subtuning_lab.nets.families import FAMILIES, TORCHVISION, as_chain
from subtuning_lab.nets.ghosts import _Gate
from subtuning_lab.nets.registry import check_backbone, load_backbone
from subtuning_lab.study.study import Study
from tests.helpers import randomize_norms

SMALL = {"input_size": (3, 64, 64)}
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
TINY_SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2)}
TINY_CNN = {"pretrained_cfg_overlay": SMALL}

# timm name, options, class, number of blocks, features
MODELS = {
    "basic blocks": ("resnet10t", TINY_CNN, ResNet, 4, 512),
    "bottlenecks": ("test_resnet", TINY_CNN, ResNet, 4, None),
    "deep stem, antialiasing": (
        "resnet10t",
        TINY_CNN | {"aa_layer": nn.AvgPool2d, "stem_type": "deep"},
        ResNet,
        4,
        512,
    ),
    "class token": ("vit_tiny_patch16_224", TINY_VIT, VisionTransformer, 3, 16),
    "average pool": ("vit_tiny_patch16_224", TINY_VIT | {"global_pool": "avg"}, VisionTransformer, 3, 16),
    "gap without class token": (
        "vit_tiny_patch16_224",
        TINY_VIT | {"class_token": False, "global_pool": "avg"},
        VisionTransformer,
        3,
        16,
    ),
    "norm before pooling": (
        "vit_tiny_patch16_224",
        TINY_VIT | {"global_pool": "avg", "fc_norm": False},
        VisionTransformer,
        3,
        16,
    ),
    "register tokens": ("vit_tiny_patch16_224", TINY_VIT | {"reg_tokens": 3}, VisionTransformer, 3, 16),
    "no_embed_class": (
        "vit_tiny_patch16_224",
        TINY_VIT | {"no_embed_class": True, "reg_tokens": 1},
        VisionTransformer,
        3,
        16,
    ),
    "pre-norm": ("vit_tiny_patch16_224", TINY_VIT | {"pre_norm": True}, VisionTransformer, 3, 16),
    "attention pool": ("vit_tiny_patch16_224", TINY_VIT | {"global_pool": "map"}, VisionTransformer, 3, 16),
    "layer scale": ("deit3_small_patch16_224", TINY_VIT, VisionTransformer, 3, 16),
    "deit": ("deit_tiny_patch16_224", TINY_VIT, VisionTransformer, 3, 16),
    "distilled deit": ("deit_tiny_distilled_patch16_224", TINY_VIT, VisionTransformerDistilled, 3, 16),
    "timm's small vit": ("test_vit", {}, VisionTransformer, None, None),
    "convnext": ("convnext_atto", TINY_CNN | {"depths": (2, 1, 2, 1), "dims": (8, 8, 16, 16)}, ConvNeXt, 6, 16),
    "convnext, head norm first": (
        "convnext_atto",
        TINY_CNN | {"depths": (1, 1, 1, 2), "dims": (8, 8, 8, 16), "head_norm_first": True},
        ConvNeXt,
        5,
        16,
    ),
    "swin": ("swin_tiny_patch4_window7_224", TINY_SWIN, SwinTransformer, 3, 16),
    "efficientnet": ("test_efficientnet", TINY_CNN, EfficientNet, None, None),
    "efficientnet b0": ("efficientnet_b0", TINY_CNN, EfficientNet, 16, 1280),
    "mobilenet v1": ("mobilenetv1_100", TINY_CNN, EfficientNet, 13, None),
    "mobilenet v2": ("mobilenetv2_035", TINY_CNN, EfficientNet, 17, None),
    "mobilenet v3": ("mobilenetv3_small_050", TINY_CNN, MobileNetV3, 12, 1024),
    "mobilenet v3 large": ("mobilenetv3_large_075", TINY_CNN, MobileNetV3, 16, 1280),
    "regnet x": ("regnetx_002", TINY_CNN, RegNet, 13, None),
    "regnet y": ("regnety_002", TINY_CNN, RegNet, 13, None),
}


def new_model(case: str) -> nn.Module:
    name, options, kind, _, _ = MODELS[case]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).eval()
    assert isinstance(model, kind)
    randomize_norms(model)
    for parameter in model.parameters():  # zero-initialized biases, tokens and layer scales would hide mistakes
        if parameter.dim() == 1 or not parameter.any():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("case", MODELS)
def test_the_chain_is_the_model(case):
    model = new_model(case)
    _, _, _, n_blocks, num_features = MODELS[case]
    size = model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 64
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        logits = model(images)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    chain = as_chain(copy.deepcopy(model), name=case)
    with torch.no_grad():
        assert torch.equal(chain(images), expected)
        if chain.source_head is not None:
            assert torch.allclose(chain.source_head(expected), logits, atol=1e-5)
    assert (chain.source_head is None) == (case == "distilled deit")  # it has two
    assert chain.num_features == expected.shape[1] == (num_features or expected.shape[1])
    assert len(chain.block_names) == (n_blocks or len(chain.block_names)) >= 3
    own = [p for module in (*chain.parts, chain.source_head) if module is not None for p in module.parameters()]
    readout = (
        0 if chain.source_head is not None else sum(p.numel() for name, p in before.items() if name.startswith("head"))
    )
    assert sum(p.numel() for p in own) + readout == sum(p.numel() for p in before.values())
    assert len({id(p) for p in own}) == len(own)  # nothing is in two parts


@pytest.mark.parametrize("case", ["bottlenecks", "register tokens", "convnext", "swin", "mobilenet v3", "regnet y"])
def test_block_names_are_the_models_own(case):
    model = new_model(case)
    chain = as_chain(copy.deepcopy(model), name=case)
    for name, block in zip(chain.block_names, chain.blocks, strict=True):
        own = model.get_submodule(name).state_dict()
        ours = list(block.state_dict().values())
        assert all(any(torch.equal(tensor, other) for other in ours) for tensor in own.values())


@pytest.mark.parametrize("case", ["bottlenecks", "class token", "convnext", "swin", "mobilenet v3", "efficientnet"])
def test_every_part_can_be_tuned_alone(case):
    """A gradient reaches all parameters of the tuned part, and none of another."""
    chain = as_chain(new_model(case), name=case)
    images = torch.randn(2, *chain.input_size)[:, :, : chain.input_size[1], : chain.input_size[2]]
    for name in chain.part_names:
        parameters = list(chain.part(name).parameters())
        if not parameters:
            continue
        set_trainable(chain, [name])
        chain(images).square().sum().backward()
        reached = {id(p) for p in chain.parameters() if p.grad is not None}
        assert reached <= {id(p) for p in parameters}
        assert len(reached) == len(parameters)


def test_normalization_and_size_come_from_timm():
    model = timm.create_model("test_vit")
    chain = as_chain(model, name="v")
    assert chain.input_size == model.pretrained_cfg["input_size"]
    assert chain.mean.flatten().tolist() == pytest.approx(model.pretrained_cfg["mean"])
    assert chain.std.flatten().tolist() == pytest.approx(model.pretrained_cfg["std"])
    assert as_chain(timm.create_model("vit_tiny_patch16_224", **TINY_VIT), name="v").input_size == (3, 32, 32)


def test_cifar_resnet_is_a_family_too():
    model = CifarResNet(14, stem_stride=2, shortcut="B").eval()
    randomize_norms(model)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        config = {"input_size": (3, 16, 16), "mean": (0, 0, 0), "std": (1, 1, 1)}
        chain = as_chain(copy.deepcopy(model), name="c", config=config)
        assert torch.equal(chain(images), expected)
    assert chain.block_names == tuple(f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1))
    assert isinstance(chain.source_head, nn.Linear) and chain.source_head.out_features == 10


def test_a_model_whose_blocks_are_not_all_there_is_noticed(monkeypatch):
    """The classic slip: a stage is forgotten, and its blocks stay frozen without a word."""
    forgetful = {ResNet: replace(FAMILIES[ResNet], stages=("layer1", "layer2", "layer3"))}
    monkeypatch.setattr("subtuning_lab.nets.families.FAMILIES", forgetful)
    with pytest.raises((ValueError, AttributeError)):
        as_chain(new_model("bottlenecks"), name="r")


def test_what_is_no_chain_says_why_and_how_to_build_one():
    message = r"is no chain, blocks.0 gives a list; .*ResNet.*Chain\(stem, blocks, tail, num_features\)"
    with pytest.raises(TypeError, match=message):
        load_backbone("crossvit_9_240", weights="random")
    with pytest.raises(TypeError, match=r"Chain\(stem, blocks, tail, num_features\)"):
        as_chain(nn.Linear(2, 2), name="mine")


def test_a_vision_transformer_works_through_a_study():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    task = Task.from_arrays(images, [0, 1] * 6)
    chain = as_chain(new_model("swin"), name="swin")
    study = Study(chain, task, Recipe(epochs=1, batch_size=8), folds=2, device="cpu", progress=False)
    table = study.scores([[], [chain.block_names[0]], "all"])
    assert len(table) == 6 and table["accuracy"].between(0, 1).all() and table["loss"].notna().all()


# name, options, blocks, first block, sizes: proposals, of whole stages and of blocks that take more than one tensor
PROPOSED = {
    "test_byobnet": (TINY_CNN, 4, "stages.0.0", [(64, 64), (96, 96)]),
    "test_mambaout": (TINY_CNN, 6, "stages.0.blocks.0", [(64, 64), (96, 96)]),
    "eva02_tiny_patch14_224": (TINY_VIT, 3, "blocks.0", [(32, 32)]),
    "xcit_nano_12_p16_224": (
        {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2},
        5,  # two of the class token among them
        "blocks.0",
        [(32, 32), (64, 64)],
    ),
}


@pytest.mark.parametrize("name", PROPOSED)
def test_a_timm_model_of_no_family_is_cut_where_timm_declares_blocks(name):
    options, n_blocks, first, sizes = PROPOSED[name]
    facts = check_backbone(name, **options)
    assert (len(facts["blocks"]), facts["blocks"][0], facts["sizes"]) == (n_blocks, first, sizes)
    assert facts["gradient"] < 1e-12


def test_a_chain_that_computes_something_else_is_refused(monkeypatch):
    """A gate that lets a little more through than it should."""
    original = _Gate.forward
    monkeypatch.setattr(_Gate, "forward", lambda self, *args: 1.001 * original(self, *args))
    with pytest.raises(TypeError, match="features differ from the model's by up to"):
        load_backbone("xcit_nano_12_p16_224", weights="random", **PROPOSED["xcit_nano_12_p16_224"][0])


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_torchvisions_networks_are_theirs(name, tmp_path):
    """The chain of a saved state dict is torchvision's model before its last layer, with its own normalization."""
    torch.manual_seed(1)
    model = torchvision.models.get_model(name, weights=None).eval()
    randomize_norms(model)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    chain = load_backbone(f"torchvision:{name}", tmp_path / "w.safetensors")
    published = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert chain.mean.flatten().tolist() == pytest.approx(published.mean)
    assert chain.std.flatten().tolist() == pytest.approx(published.std)
    assert chain.input_size == (3, *published.crop_size * 2)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = chain(images) if chain.source_head is None else chain.source_head(chain(images))
        assert torch.equal(logits, model(images))
    assert (chain.source_head is None) == (name == "squeezenet1_1")


def test_names_and_weights_of_torchvision_are_checked():
    with pytest.raises(ValueError, match=r"no classifier 'resnet51'; did you mean .*resnet50"):
        load_backbone("torchvision:resnet51", weights="random")
    with pytest.raises(ValueError, match=r'"random", a path, or IMAGENET1K_V1, IMAGENET1K_V2'):
        load_backbone("torchvision:resnet50", weights="IMAGENET1K_V3")


def test_every_classifier_of_torchvision_has_a_row():
    builders = map(torchvision.models.get_model_builder, torchvision.models.list_models(torchvision.models))
    kinds = {inspect.signature(builder).return_annotation for builder in builders}
    assert {getattr(kind, "__name__", kind) for kind in kinds} == {kind.__name__ for kind in TORCHVISION}
