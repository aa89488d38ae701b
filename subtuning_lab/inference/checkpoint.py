"""The file of a tuned task: tensors and a header in one .safetensors file, which notices when it was changed."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from subtuning_lab import __version__
from subtuning_lab.utils.files import expanded, replacing
from subtuning_lab.utils.hashing import hash_tensor
from subtuning_lab.utils.validation import shown

Weights = Mapping[str, Mapping[str, torch.Tensor]]
Header = Mapping[str, Any]

FORMAT = "subtuning-lab tuned task 4"
_OLDER = ("subtuning-lab tuned task 2", "subtuning-lab tuned task 3")  # read all the same
_ALWAYS_WAS = {"head_depth": 1, "pruned": [], "crop_size": None}  # what older headers lack
HEADER: dict[str, type] = {
    "base": str,
    "base_name": str,
    "mean": list,
    "std": list,
    "input_size": list,
    "blocks": list,
    "classes": list,
    "image_size": int | None,
    "crop_size": list | None,
    "siamese": bool,
    "head_depth": int,
    "pruned": list,
    "dtype": str | None,
    "scores": dict,
    "provenance": dict,
    "versions": dict,
}
STORED_DTYPES: dict[str | None, torch.dtype | None] = {None: None, "float16": torch.float16}
_LIBRARIES = ("torch", "timm", "safetensors")
_KEY = "tuned_task"  # one entry, since safetensors writes several in a random order
_SEPARATOR = "|"  # between the part and the tensor's own name; no part has it in its name
_LONGEST_HEADER = 16 * 2**20  # bytes
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16} | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool
}  # fmt: skip


def write_task(path: str | Path, weights: Weights, header: Header) -> Path:
    """Writes a tuned task's file, whole or not at all; equal contents give equal bytes.

    Args:
        path: ends in .safetensors; its folder is made when missing.
        weights: part name -> tensor name -> tensor, as they shall be stored.
        header: plain values with the names of `HEADER`; versions of the libraries are added.
    Raises:
        ValueError: another ending, or header values that JSON can't express.
        OSError: it can't be written there.
    """
    path = expanded(path)
    if path.suffix != ".safetensors":
        raise ValueError(f'path is "{path}"; a tuned task is a .safetensors file')
    tensors = {
        f"{part}{_SEPARATOR}{key}": tensor.detach().cpu().contiguous()
        for part, state in weights.items()
        for key, tensor in state.items()
    }
    header = {"format": FORMAT, "versions": _versions(), **header}
    text = _as_text({**header, "sha256": checksum(header, tensors)})
    with replacing(path) as unfinished:
        unfinished.write_bytes(save(tensors, metadata={_KEY: text}))
    return path


def read_task(
    path: str | Path, examine: Callable[[Header, Weights], object] = lambda header, outlines: None
) -> tuple[Header, Weights]:
    """Header and weights of a tuned task's file. Nothing in it is executed.

    Args:
        path: of the file.
        examine: called with the header and with tensors on the meta device before any data is read; it may raise.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or one that was changed since it was written.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tuned task at {path}")
    _check_length(path)
    try:
        with safe_open(path, framework="pt") as file:
            texts, names = file.metadata() or {}, list(file.keys())
            header, claimed = _header(path, texts)
            examine(_complete(path, header), _by_part({name: _outline(file.get_slice(name)) for name in names}))
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error
    if claimed != checksum(header, tensors) or texts != {_KEY: _as_text({**header, "sha256": claimed})}:
        raise ValueError(f"{path} was changed after it was written: its tensors and header have another SHA-256")
    return _complete(path, header), _by_part(tensors)


def checksum(header: Header, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over all header values and tensors.

    It finds accidents and careless edits. Whoever means harm can compute it anew, so it is no proof of origin.
    """
    digest = hashlib.sha256(_as_text(header).encode())
    for name in sorted(tensors):
        hash_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def stored(weights: Weights, dtype: str | None) -> dict[str, dict[str, torch.Tensor]]:
    """The weights as a file holds them.

    Args:
        weights: part name -> tensor name -> tensor.
        dtype: None leaves them as they are; "float16" stores floating ones in half precision: rounded to 11 bits,
            and below 6e-5 in steps of 6e-8. Integers stay as they are.
    Raises:
        ValueError: an unknown dtype, or a number that half precision can't hold.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(map(repr, STORED_DTYPES))}")
    return {
        part: {key: _narrowed(f"{key} of {part}", tensor, STORED_DTYPES[dtype]) for key, tensor in state.items()}
        for part, state in weights.items()
    }


def _versions() -> dict[str, str]:
    names = {name: version(name) for name in _LIBRARIES}
    return {"subtuning-lab": __version__, "python": platform.python_version(), **names}


def _narrowed(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    narrow = tensor.to(dtype)
    lost = narrow.isinf() & tensor.isfinite()
    if lost.any():
        raise ValueError(
            f"{name} holds {tensor[lost].abs().max().item():g}, and float16 ends at {torch.finfo(dtype).max:g}; "
            "save it with dtype=None"
        )
    return narrow


def _as_text(header: Header) -> str:
    """The one way in which a header is written."""
    try:
        return json.dumps(header, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the header of a tuned task takes plain finite values only: {error}") from error


def _check_length(path: Path) -> None:
    """Raises ValueError for a header that is too long to be read in a moment."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if _LONGEST_HEADER < length < path.stat().st_size:
        raise ValueError(f"{path} has a header of {length:,} bytes; a tuned task's has at most {_LONGEST_HEADER:,}")


def _header(path: Path, texts: Mapping[str, str]) -> tuple[dict[str, object], object]:
    """The header as it was written, and the checksum that it claims."""
    try:
        header = json.loads(texts.get(_KEY, ""), parse_constant=_refuse)
    except (ValueError, RecursionError):  # no JSON, or made to break its reader
        header = None
    if not isinstance(header, dict) or header.get("format") not in (FORMAT, *_OLDER):
        given = header.get("format") if isinstance(header, dict) else None
        raise ValueError(f"{path} holds no tuned task: its header says {shown(given)}, not {FORMAT!r}")
    lacking = {"sha256", *HEADER} - set(header) - set(_ALWAYS_WAS)
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(sorted(lacking))} in its header")
    claimed = header.pop("sha256")
    return header, claimed


def _complete(path: Path, header: Header) -> dict[str, object]:
    """The header with what older formats took for granted, its values of the right types."""
    header = _ALWAYS_WAS | dict(header)
    for name, kind in HEADER.items():
        _check_type(path, name, header[name], kind)
    return header


def _outline(piece: Any) -> torch.Tensor:
    """A tensor of the shape and dtype of one in a file, without its numbers."""
    if piece.get_dtype() not in _DTYPES:
        raise ValueError(f"it holds numbers of the type {piece.get_dtype()}, as no tuned task does")
    return torch.empty(piece.get_shape(), dtype=_DTYPES[piece.get_dtype()], device="meta")


def _by_part(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, key = name.partition(_SEPARATOR)
        weights.setdefault(part, {})[key] = tensor
    return weights


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no plain finite value")


def _check_type(path: Path, name: str, value: object, kind: type) -> None:
    # JSON's true would pass as a number
    fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    if name in ("blocks", "classes", "pruned"):
        fits = fits and all(isinstance(item, str) for item in value)
    if not fits:
        raise ValueError(f"{path}: {name} in its header is {shown(value)}, which is of the wrong type")
    if name == "dtype" and value not in STORED_DTYPES:
        raise ValueError(f"{path}: dtype in its header is {shown(value)}; it must be one of {[*STORED_DTYPES]}")
