"""Folded, compiled and exported networks give what the separate networks give."""

import json
import sys
import warnings

import pytest
import torch
from PIL import Image
from torch import nn

from subtuning_lab import MergedNetwork, TunedTask, merge_tasks
from subtuning_lab.inference.export import ABOUT, PackedConv2d, export_merged, optimize
from tests.helpers import tiny_chain
from tests.inference.test_merge import (
    BACKBONES,
    images_for,
    largest_difference,
    residual_network,
    separate_logits,
    tuned,
)

LISTS = ("crop_size", "mean", "std", "file_size", "other_sizes")  # JSON has no tuples


def some_tasks(chain, **options) -> dict[str, TunedTask]:
    a, b, c, *_ = chain.block_names
    subsets = {"one": [b], "gap": [a, c], "probing": [], "ends": ["stem", "tail"]}
    return {name: tuned(chain, blocks, 2 + i, i, **options) for i, (name, blocks) in enumerate(subsets.items())}


def norms(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("siamese", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_folding_keeps_all_outputs(name, siamese):
    chain = BACKBONES[name]().double()
    tasks = some_tasks(chain, siamese=siamese)
    net = merge_tasks(chain, tasks)
    folded = optimize(net)
    assert largest_difference(folded, tasks, images_for(chain, 3)) < 1e-10
    assert not norms(folded) and len(norms(net)) == len(norms(merge_tasks(chain, tasks)))


@pytest.mark.parametrize("siamese", [False, True])
def test_separate_networks_are_optimized_alike(siamese):
    chain = residual_network().double()
    images = images_for(chain, 3)
    for task in some_tasks(chain, siamese=siamese).values():
        network = task.network()
        ready = optimize(network, channels_last=True)
        assert norms(network) and not norms(ready)
        assert torch.allclose(ready(images), separate_logits(task, images), rtol=1e-10, atol=1e-10)
    assert not norms(optimize(chain)) and norms(chain)


def test_float32_agrees_to_rounding_when_folded_and_channels_last():
    chain = residual_network()
    tasks = some_tasks(chain)
    ready = optimize(merge_tasks(chain, tasks), channels_last=True)
    assert largest_difference(ready, tasks, images_for(chain, 7, torch.float32)) < 1e-5
    convolution = next(module for module in ready.modules() if isinstance(module, nn.Conv2d) and module.in_channels > 3)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert chain.blocks[0].conv1.weight.is_contiguous()  # the backbone keeps its own layout


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_packed_convolutions_give_the_same(name, channels_last):
    chain = BACKBONES[name]()
    tasks = some_tasks(chain) | {"siamese": tuned(chain, chain.block_names[:1], 3, 9, siamese=True)}
    net = merge_tasks(chain, tasks)
    ready = optimize(net, channels_last=channels_last, pack=True)
    convolutions = [module for module in net.modules() if type(module) is nn.Conv2d]
    assert sum(isinstance(module, PackedConv2d) for module in ready.modules()) == len(convolutions) > 0
    for batch in (1, 2, 7):  # laid out for two images
        assert largest_difference(ready, tasks, images_for(chain, batch, torch.float32)) < 1e-5
    network = optimize(tasks["siamese"].network(), pack=True)
    images = images_for(chain, 3, torch.float32)
    assert torch.allclose(network(images), separate_logits(tasks["siamese"], images), rtol=1e-4, atol=1e-4)


def test_convolutions_that_cannot_be_packed_stay():
    plain = tiny_chain()
    blocks = [nn.Conv2d(6, 6, 3, padding="same"), nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), nn.Identity()]
    chain = type(plain)(plain.stem, blocks, plain.tail, 6, input_size=(3, 8, 8))
    tasks = some_tasks(chain)
    ready = optimize(merge_tasks(chain, tasks), pack=True)
    assert sum(type(module) is nn.Conv2d for module in ready.modules()) == 4
    assert largest_difference(ready, tasks, images_for(chain, 3, torch.float32)) < 1e-5


def test_without_folding_nothing_is_copied():
    chain = tiny_chain()
    tasks = some_tasks(chain)
    net, before = merge_tasks(chain, tasks), chain.fingerprint
    ready = optimize(net, fold=False)
    assert [p.data_ptr() for p in ready.parameters()] == [p.data_ptr() for p in net.parameters()]
    optimize(net)
    assert chain.fingerprint == before and all(p.data_ptr() for p in net.parameters())


def test_a_part_that_cannot_be_folded_stays():
    class Odd(nn.Module):
        """Declares a BatchNorm behind its convolution, and applies it before."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x):
            return self.conv(torch.relu(self.bn(x)))

    plain = tiny_chain()
    torch.manual_seed(0)
    chain = type(plain)(plain.stem, [Odd(), Odd(), Odd()], plain.tail, 6, input_size=(3, 8, 8)).double()
    tasks = some_tasks(chain)
    folded = optimize(merge_tasks(chain, tasks))
    assert norms(folded) and largest_difference(folded, tasks, images_for(chain, 3)) < 1e-10


def test_bad_arguments_of_optimize():
    with pytest.raises(TypeError, match="net is a Linear; it must be of merge_tasks"):
        optimize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pack is for float32 on a CPU with oneDNN; this network is torch.float64"):
        optimize(tiny_chain().double(), pack=True)
    with pytest.raises(ValueError, match='pack and mode="default" exclude each other'):
        optimize(tiny_chain(), pack=True, mode="default")


@pytest.fixture
def merged() -> tuple[MergedNetwork, dict[str, TunedTask]]:
    chain = tiny_chain()
    a, b, c = chain.block_names
    tasks = {"one": tuned(chain, [b], 2), "a.b": tuned(chain, [a, c], 3, 1), "siamese": tuned(chain, [c], 4, 2, True)}
    return merge_tasks(chain, tasks), tasks


def agree(outputs: dict, net: MergedNetwork, images: torch.Tensor) -> bool:
    expected = net(images)
    return list(outputs) == list(expected) and all(
        torch.allclose(torch.as_tensor(outputs[name]), logits, rtol=1e-4, atol=1e-5)
        for name, logits in expected.items()
    )


def test_torch_export(merged, tmp_path):
    net, _ = merged
    assert export_merged(optimize(net), tmp_path / "new" / "net.pt2") == tmp_path / "new" / "net.pt2"
    program = torch.export.load(tmp_path / "new" / "net.pt2").module()
    for batch in (1, 2, 7):
        images = torch.rand(batch, 3, 8, 8)
        with torch.no_grad():
            assert agree(program(images), net, images)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["net.pt2"]


def test_torch_export_of_bytes_and_a_fixed_batch(tmp_path):
    chain = tiny_chain()
    net = merge_tasks(chain, {"small": tuned(chain, ["block2"], image_size=8)})
    path = export_merged(net, tmp_path / "net.pt2", image_size=(12, 10), batch_size=3, dtype=torch.uint8)
    program = torch.export.load(path).module()
    images = torch.randint(0, 256, (3, 3, 12, 10), dtype=torch.uint8)  # resized inside
    with torch.no_grad():
        assert agree(program(images), net, images)
    with pytest.raises(AssertionError, match="image"):
        program(images[:2])


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"crop_size": (8, 24), "image_size": 8}, (8, 24)),
        ({"crop_size": (10, 14)}, (10, 14)),
        ({"provenance": {"pixels": [6, 10]}}, (6, 10)),
        ({"image_size": 12}, (12, 12)),
        ({}, (8, 8)),
    ],
)
def test_files_go_through_what_was_exported(options, size, tmp_path):
    chain = tiny_chain()
    net = merge_tasks(chain, {"one": tuned(chain, ["block2"], **options)})
    Image.new("RGB", (30, 20), (10, 200, 90)).save(tmp_path / "i.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some don't tell how their images were cut
        images = net.prepare([tmp_path / "i.png"] * 2)
    extra = {ABOUT: ""}
    program = torch.export.load(export_merged(net, tmp_path / "net.pt2", dtype=torch.uint8), extra_files=extra)
    with torch.no_grad():
        assert agree(program.module()(images), net, images) and images.shape[2:] == size
    about = json.loads(extra[ABOUT])
    assert tuple(about["input"]["size"]) == tuple(about["preparation"]["crop_size"] or size) == size
    if torch.backends.mkldnn.is_available():
        assert agree(optimize(net, pack=True)(images), net, images)


def test_onnx(merged, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, _ = merged
    path = export_merged(optimize(net), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert [image.name for image in session.get_inputs()] == ["images"]
    for batch in (1, 2, 7):
        images = torch.rand(batch, 3, 8, 8)
        with torch.no_grad():
            assert agree(dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True)), net, images)


@pytest.mark.parametrize("name", ["relu", "frozen.0.0.weight", "cat", "relu relu", "é / b\n"])
def test_onnx_takes_tasks_with_the_names_of_its_own_values(name, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    chain = tiny_chain()
    net = merge_tasks(chain, {name: tuned(chain, ["block2"], crop_size=(8, 8)), "relu_1": tuned(chain, ["block1"])})
    path = export_merged(net, tmp_path / "net.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert agree(dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True)), net, images)
    about = json.loads(session.get_modelmeta().custom_metadata_map[ABOUT])
    assert about["outputs"] == names == ["original", name, "relu_1"] and about["classes"][name] == ["a", "b", "c"]
    assert about["preparation"]["crop_size"] == [8, 8] and about["input"]["dtype"] == "float32"


def test_a_task_named_as_the_input_is_refused_for_onnx_alone(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    chain = tiny_chain()
    net = merge_tasks(chain, {"images": tuned(chain, ["block2"], crop_size=(8, 8))})
    with pytest.raises(ValueError, match='a task is named "images", which is the input\'s name in ONNX; rename it'):
        export_merged(net, tmp_path / "net.onnx")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export_merged(net, "~/net.pt2") == tmp_path / "net.pt2"
    extra = {ABOUT: ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    about = json.loads(extra[ABOUT])
    assert about["preparation"] == net.preparation.as_dict() | {k: list(about["preparation"][k]) for k in LISTS}
    with pytest.raises(ValueError, match="a task's name is ''; it must be a string, not empty"):
        merge_tasks(chain, {"": tuned(chain, ["block2"])})


def test_onnx_without_its_packages(merged, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)  # whether or not it is there
    with pytest.raises(ImportError, match=r'onnxscript: pip install "subtuning-lab\[onnx\]"'):
        export_merged(merged[0], tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_bad_arguments_of_export(merged, tmp_path):
    net, tasks = merged
    with pytest.raises(ValueError, match=r'"net.pth"; its name must end in .pt2 or .onnx'):
        export_merged(net, "net.pth")
    with pytest.raises(ValueError, match="net has packed weights"):
        export_merged(optimize(net, pack=True), tmp_path / "net.pt2")
    with pytest.raises(ValueError, match="torch.int64; images are torch.uint8"):
        export_merged(net, tmp_path / "net.pt2", dtype=torch.int64)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_compiler_takes_it_as_one_graph(merged):
    net, _ = merged
    compiled = torch.compile(net, backend="eager", fullgraph=True)  # traced as for any backend, without a C++ compiler
    for batch in (1, 3):
        images = torch.rand(batch, 3, 8, 8)
        with torch.no_grad():
            assert agree(compiled(images), net, images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs(merged):
    net = merged[0].cuda()
    ready = optimize(net, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            images = torch.rand(2, 3, 8, 8, device="cuda")
            assert agree({name: logits.clone() for name, logits in ready(images).items()}, net, images)
