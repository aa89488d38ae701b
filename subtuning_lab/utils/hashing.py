"""Which network this is: a hash over weights and settings, made to outlive releases of the libraries below."""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import nn

# Modules of these packages are described by the settings below only, so that a release that gives them a new
# attribute, or prints them another way, leaves fingerprints as they are. Of any other module, which its owner
# changes knowingly, all public plain values count.
_LIBRARIES = ("torch", "torchvision", "timm", "peft", "subtuning_lab")
# What is read off the shapes of weights, or changes speed only (inplace, fused_attn), is left out.
_SETTINGS = """
    stride padding dilation kernel_size output_padding groups padding_mode ceil_mode count_include_pad divisor_override
    output_size eps momentum normalized_shape num_groups approximate negative_slope start_dim end_dim dim p dropout
    drop_prob drop_rate scale_by_keep alpha beta lambd threshold value min_val max_val lower upper upscale_factor
    downscale_factor scale_factor size mode align_corners num_heads norm_first add_zero_attn activation global_pool pool
    pool_type filt_size pad_mode num_prefix_tokens pool_include_prefix window_size shift_size has_skip channel_dim
    spatial_dim keepdim norm_type
"""
_INTERNAL = frozenset(vars(nn.Module()))
_FUNCTIONS = types.FunctionType | types.BuiltinFunctionType | type


def fingerprint_of(parts: Mapping[str, nn.Module], mean: Sequence[float], std: Sequence[float]) -> str:
    """SHA-256 of a network in parts: equal networks have equal fingerprints, and others have others.

    It covers names, normalization, weights and buffers, and of every module its class name and its settings. It does
    not see what `forward` does with them: two classes of one name and equal settings count as the same.

    Args:
        parts: modules by name, in order.
        mean, std: the normalization, one number a channel.
    """
    digest = hashlib.sha256(json.dumps([list(parts), list(mean), list(std)]).encode())
    for name, part in parts.items():
        digest.update(json.dumps(list(_described(part))).encode())
        for key, tensor in sorted(part.state_dict().items()):
            hash_tensor(digest, f"{name}/{key}", tensor)
    return digest.hexdigest()


def hash_tensor(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    """Takes a tensor's name, dtype, shape and bytes into a hash."""
    digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _described(part: nn.Module) -> Iterator[list[object]]:
    """Class name and settings of every module that computes something, without the names that modules have in it."""
    for _, module in part.named_modules(remove_duplicate=False):
        if not _does_nothing(module):
            settings = {name: _plain(value) for name, value in sorted(_values(module).items())}
            # A release's new option is off where it was unknown before.
            known = {name: value for name, value in settings.items() if value is not None and value is not False}
            yield [type(module).__qualname__, known]


def _does_nothing(module: nn.Module) -> bool:
    """Whether it hands on its input even in training; releases add such modules for options that are off."""
    chance = getattr(module, "p", getattr(module, "drop_prob", None))
    return type(module) is nn.Identity or (type(module).__name__.startswith("Drop") and chance in (0, 0.0))


def _values(module: nn.Module) -> dict[str, object]:
    if type(module).__module__.partition(".")[0] in _LIBRARIES:
        return {name: getattr(module, name, None) for name in _SETTINGS.split()}
    attributes = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in _INTERNAL}
    return attributes | {name: module.get_buffer(name) for name in module._non_persistent_buffers_set}


def _plain(value: object) -> object:
    """A value as JSON has it, the same in every process; None for anything else."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Integral | Real):  # numpy's
        return int(value) if isinstance(value, Integral) else float(value)
    if type(value) is torch.Tensor:
        digest = hashlib.sha256()
        hash_tensor(digest, "", value)
        return digest.hexdigest()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return sorted([str(key), _plain(item)] for key, item in value.items())
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, _FUNCTIONS):
        return f"function {value.__qualname__}"
    return None
