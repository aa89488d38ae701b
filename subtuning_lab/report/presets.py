"""Parameters of notebooks: what a notebook declares, a preset sets and the command line overrides, all checked."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from subtuning_lab.utils.files import expanded
from subtuning_lab.utils.validation import shown

PRESETS = "presets.toml"
_VALUES = (bool, int, float, str, list, dict, tuple, type(None))
_CHECKED = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict}


def load_preset(notebooks: str | Path, preset: str) -> dict[str, dict[str, Any]]:
    """Reads one preset, a table of parameter values per notebook stem, from `presets.toml`."""
    path = expanded(notebooks) / PRESETS
    try:
        presets = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no TOML, or no UTF-8
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r}; {path} has: {', '.join(presets)}")
    return presets[preset]


def parse_parameter(text: str) -> tuple[str, Any]:
    """Splits "name=value"; the value is read as TOML or Python writes it, and else kept as a string.

    Numbers, true and True, lists and tables, None and quoted strings are read; "cifar10" and "folder:x=y" are kept.

    Raises:
        ValueError: if there is no "=" or the name is no Python name.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise ValueError(f"a parameter is written name=value, not {shown(text)}")
    return name.strip(), _value_of(value.strip())


def _value_of(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (lambda: tomllib.loads(f"value = {text}"), lambda: {"value": ast.literal_eval(text)}):
        try:
            document = read()
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # of another language
            continue
        # A document of more than this value was a text with line breaks; dates stay text.
        if set(document) == {"value"} and isinstance(document["value"], _VALUES):
            return document["value"]
    return text.strip(" \"'")


def declared_parameters(notebook: Path) -> dict[str, str]:
    """Reads the names and annotated types of a notebook's parameters.

    Returns:
        For each name its annotation, "None" where there is none.
    """
    import papermill

    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except Exception as error:  # nbformat's errors are of many kinds
        raise ValueError(f"{notebook} is no notebook: {shown(str(error))}") from error
    if not any("parameters" in cell.metadata.get("tags", []) for cell in cells):
        raise ValueError(f"{notebook} has no cell tagged 'parameters'")
    parameters = papermill.inspect_notebook(str(notebook))
    return {name: str(parameter["inferred_type_name"]) for name, parameter in parameters.items()}


def check_parameters(stem: str, values: Mapping[str, Any], declared: Mapping[str, str]) -> None:
    """Refuses values for parameters that a notebook does not declare, or of another type than it declares.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
        TypeError: for a value of a wrong type.
    """
    for name, value in values.items():
        if name not in declared:
            raise ValueError(f"{stem} has no parameter {name!r}; it has: {', '.join(declared)}")
        expected = declared[name].split("[")[0]
        wanted = _CHECKED.get(expected, object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and expected in ("int", "float")):
            raise TypeError(f"{stem}: parameter {name} must be {declared[name]}, not {shown(value)}")


def settle_parameters(
    chosen: Mapping[str, Path], preset: Mapping[str, dict[str, Any]], overrides: Mapping[str, Any], folder: Path
) -> dict[str, dict[str, Any]]:
    """Settles every notebook's parameters: the runner's paths, then the preset's values, then the overrides.

    An override goes to each chosen notebook that declares it.

    Raises:
        ValueError: for a parameter unknown to its notebook, or an override unknown to all.
        TypeError: for a value of a wrong type.
    """
    paths = {"results": str(folder), "records": str(folder / "records.sqlite")}
    declared = {stem: declared_parameters(path) for stem, path in chosen.items()}
    for name in overrides:
        if not any(name in names for names in declared.values()):
            known = sorted(set().union(*declared.values()))
            raise ValueError(f"no parameter {name!r} in {', '.join(chosen)}; there are: {', '.join(known)}")
    settled = {}
    for stem, names in declared.items():
        usual = {name: value for name, value in paths.items() if name in names}
        given = {name: _as_wanted(value, names[name]) for name, value in overrides.items() if name in names}
        settled[stem] = usual | preset.get(stem, {}) | given
        check_parameters(stem, settled[stem], names)
    return settled


def _as_wanted(value: Any, annotation: str) -> Any:
    """A number given where text is wanted is that text, as in `-p windows=2`."""
    return str(value) if annotation == "str" and type(value) in (int, float) else value
