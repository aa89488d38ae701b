"""Merged networks made ready for use: folded, packed, compiled, or written as a file for another runtime."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from subtuning_lab.inference.merge import MergedNetwork, shell
from subtuning_lab.inference.preparation import NetworkInput, random_images, trained_size
from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.fuse import fold_batchnorm
from subtuning_lab.utils.files import expanded, replacing
from subtuning_lab.utils.validation import Is, OneOf, Sides, Whole, checked

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPH = "cuda_graph"
ABOUT = "subtuning_lab.json"  # what is told in an exported file
_SUFFIXES, _INPUT = (".pt2", ".onnx"), "images"


@checked
def optimize(
    net: Annotated[nn.Module, Is(nn.Module)],
    *,
    fold: bool = True,
    channels_last: bool = False,
    pack: bool = False,
    mode: Annotated[str | None, OneOf((None, *MODES, GRAPH))] = None,
    images: Annotated[torch.Tensor | None, Is(torch.Tensor).or_none()] = None,
) -> nn.Module:
    """A network that computes the same with less work; the given one stays as it is.

    Args:
        net: of `merge_tasks` or `TunedTask.network`, or a Chain.
        fold: BatchNorm of frozen and tuned convolutions folded into them, where that leaves a part's output the same.
        channels_last: memory layout of the convolutions' weights, and with them of the activations.
        pack: weights of convolutions in oneDNN's own layout, which is otherwise made anew in every call; for the CPU in
            float32. What is packed can't be moved, saved or exported.
        mode: of `torch.compile`, which is applied where one is given; or "cuda_graph", for a GPU, which compiles
            nothing and is ready at once: one pass over `images` is captured, and replayed for all that come. With it,
            and with "reduce-overhead", the outputs of one call are overwritten by the next.
        images: (batch, 3, height, width) to check folded parts with, of the size that packed weights are laid out
            for; by default two random ones of the size that `prepare` gives, or of a Chain's `input_size`.
    Raises:
        TypeError: another kind of network.
        ValueError: an unknown mode, or packing of what is compiled, on a GPU or not in float32.

    Deviation: up to rounding, which folding changes.
    """
    paths = _part_paths(net)
    images = _random_images(net, 2) if images is None else images
    ready = shell(net)
    if fold:
        _fold(ready, paths, images)
    if channels_last:
        ready = ready.to(memory_format=torch.channels_last)
    if pack:
        _check_packable(ready, mode)
        _pack(ready, images)
    if mode == GRAPH:
        return CapturedNetwork(ready, images)
    return ready if mode is None else torch.compile(ready, mode=mode, fullgraph=True)


class CapturedNetwork(nn.Module):
    """A network on a GPU whose pass over one batch is captured as a CUDA graph; a call replays it without Python.

    Args:
        net: computes without waiting for the GPU, and without chance.
        images: (batch, 3, height, width) on the GPU, of the shape and kind that will come.

    Raises:
        ValueError: images on another device; in a call, images of another shape or kind.
    """

    def __init__(self, net: nn.Module, images: torch.Tensor):
        super().__init__()
        if not images.is_cuda:
            raise ValueError(f'mode="{GRAPH}" is for a GPU, and the images are on {images.device}; give another mode')
        self.net, self.images, self.graph = net, images.clone(), torch.cuda.CUDAGraph()
        apart = torch.cuda.Stream()  # where kernels are chosen before anything is captured
        apart.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(apart):
            for _ in range(3):
                net(self.images)
        torch.cuda.current_stream().wait_stream(apart)
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.outputs = net(self.images)

    def forward(self, images: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the network gives for images; the next call overwrites it."""
        if images.shape != self.images.shape or images.dtype != self.images.dtype:
            made = f"{tuple(self.images.shape)} of {self.images.dtype}"
            raise ValueError(f"images are {tuple(images.shape)} of {images.dtype}; the graph was captured for {made}")
        self.images.copy_(images)
        self.graph.replay()
        return self.outputs


@checked
def export_merged(
    net: MergedNetwork,
    path: Annotated[str | Path, Is((str, Path))],
    *,
    image_size: Annotated[int | tuple[int, int] | None, Sides().or_none()] = None,
    batch_size: Annotated[int | None, Whole(1).or_none()] = None,
    dtype: Annotated[torch.dtype, Is(torch.dtype)] = torch.float32,
) -> Path:
    """Writes a merged network as a file that runs without this package.

    Squashing and normalization are inside. What comes before them (`Preparation`), the outputs' names and the classes
    are in the file as JSON named "subtuning_lab.json": an ONNX model's metadata, or an extra file of a .pt2.

    Args:
        net: of `merge_tasks`, or its `optimize`d version that is neither packed nor compiled.
        path: "name.pt2" for `torch.export.load`, "name.onnx" for ONNX runtimes. The input is called `images`; outputs
            are a dict by task in the first case, and named like the tasks in the second.
        image_size: height and width of the images in pixels, one number if they are equal; by default those that
            `net.prepare` gives to files. Another size is squashed inside where the tasks have an `image_size`.
        batch_size: fixed, or None for any.
        dtype: of the images: a floating point type for [0, 1], or uint8.
    Raises:
        ValueError: a packed one, another file name, images of another type, or a task whose name ONNX can't take.
        ImportError: ONNX without the extra `onnx`.
        OSError: it can't be written there.
    """
    path = expanded(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f'path is "{path}"; its name must end in {" or ".join(_SUFFIXES)}')
    if any(isinstance(module, PackedConv2d) for module in net.modules()):
        raise ValueError("net has packed weights, which no file can hold; export it before they are packed")
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; images are torch.uint8 or floating point")
    if path.suffix == ".onnx":
        _require_onnx()
        if _INPUT in net.output_names:
            raise ValueError(f'a task is named "{_INPUT}", which is the input\'s name in ONNX; rename it')
    images = _random_images(net, batch_size or 2, image_size)
    images = (images * 255 if dtype == torch.uint8 else images).to(dtype)
    shapes = {_INPUT: {0: torch.export.Dim("batch")} if batch_size is None else None}
    about = json.dumps(_about(net, images))
    with torch.no_grad(), replacing(path) as unfinished:
        program = torch.export.export(net, (images,), dynamic_shapes=shapes)
        if path.suffix == ".pt2":
            with unfinished.open("wb") as file:
                torch.export.save(program, file, extra_files={ABOUT: about})
        else:
            onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[_INPUT])
            _name_outputs(onnx.model, net.output_names)
            onnx.model.metadata_props[ABOUT] = about
            onnx.save(unfinished)
    return path


def _name_outputs(model: Any, names: Sequence[str]) -> None:
    """Names an ONNX model's outputs in place; what has such a name inside of it gets another one."""
    inner = {*(value for node in model.graph for value in node.outputs), *model.graph.initializers.values()}
    for value in (value for value in inner if value.name in names):
        value.name = f"{max(names, key=len)} {value.name}"
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name


def _about(net: MergedNetwork, images: torch.Tensor) -> dict[str, object]:
    """What whoever runs an exported network must know."""
    return {
        "input": {"name": _INPUT, "dtype": str(images.dtype).removeprefix("torch."), "size": list(images.shape[2:])},
        "preparation": net.preparation.as_dict(),
        "outputs": list(net.output_names),
        "classes": {name: list(classes) for name, classes in net.classes.items()},
    }


class PackedConv2d(nn.Module):
    """A convolution whose weight is in the layout that oneDNN computes with, as torch's own compiler leaves it.

    Args:
        conv: on the CPU in float32, with padding in numbers and zeros in it.
        shape: of its usual input (batch, channels, height, width).
    """

    def __init__(self, conv: nn.Conv2d, shape: torch.Size):
        super().__init__()
        self.geometry = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)
        plain = conv.weight.detach().to_mkldnn()
        # No buffer: such a tensor has no storage to move, convert or write.
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(plain, *self.geometry, [*shape])
        self.bias = conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the convolution gives, up to rounding."""
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")


def _part_paths(net: nn.Module) -> list[str]:
    """Where a network keeps the parts of chains, frozen and tuned."""
    if isinstance(net, MergedNetwork):
        frozen = [f"frozen.{i}" for i in net.frozen]
        return frozen + [f"tuned.{i}.{j}" for i, parts in net.tuned.items() for j in range(len(parts))]
    chains = {name: module for name, module in net.named_modules() if isinstance(module, Chain)}
    if not chains:
        raise TypeError(f"net is a {type(net).__name__}; it must be of merge_tasks or TunedTask.network, or a Chain")
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, chain in chains.items()
        for name in ("stem", *(f"blocks.{i}" for i in range(len(chain.blocks))), "tail")
    ]


def _random_images(net: nn.Module, batch_size: int, size: int | tuple[int, int] | None = None) -> torch.Tensor:
    """Images in [0, 1] of the size and on the device that the network was made for."""
    if size is None:
        size = trained_size(net) or next(m for m in net.modules() if isinstance(m, Chain)).input_size[1:]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    images = random_images(batch_size, height, width)
    return images.to(next(m for m in net.modules() if isinstance(m, Chain | NetworkInput)).mean)


def _inputs(net: nn.Module, paths: Iterable[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each of the modules takes in when the network sees the images; those that don't run are left out."""
    inputs: dict[str, torch.Tensor] = {}

    def note(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, arguments: tuple) -> None:
            inputs[path] = arguments[0].clone()  # the module may write into it

        return net.get_submodule(path).register_forward_pre_hook(hook)

    hooks = [note(path) for path in paths]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    return inputs


def _fold(net: nn.Module, paths: list[str], images: torch.Tensor) -> None:
    """Puts folded parts in the place of the network's own, in place."""
    folded: dict[nn.Module, nn.Module] = {}  # a Siamese network has parts in two places
    for path, x in _inputs(net, paths, images).items():
        part = net.get_submodule(path)
        if part not in folded:
            folded[part] = fold_batchnorm(part, x)
        net.set_submodule(path, folded[part])
    net.eval()


def _pack(net: nn.Module, images: torch.Tensor) -> None:
    """Puts packed convolutions in the place of the network's own, in place."""
    modules = dict(net.named_modules(remove_duplicate=False))
    convs = {path: module for path, module in modules.items() if type(module) is nn.Conv2d}
    paths = [p for p, c in convs.items() if c.padding_mode == "zeros" and not isinstance(c.padding, str)]
    packed: dict[nn.Module, nn.Module] = {}
    for path, x in _inputs(net, paths, images).items():
        conv = modules[path]
        if conv not in packed:
            packed[conv] = PackedConv2d(conv, x.shape)
        net.set_submodule(path, packed[conv])
    net.eval()


def _check_packable(net: nn.Module, mode: str | None) -> None:
    weight = next(net.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        raise ValueError(f"pack is for float32 on a CPU with oneDNN; this network is {weight.dtype} on {weight.device}")
    if mode is not None:
        raise ValueError(f'pack and mode="{mode}" exclude each other')


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f'ONNX needs the package {name}: pip install "subtuning-lab[onnx]"') from error
