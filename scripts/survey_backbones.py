"""Writes docs/backbones.md: every architecture of timm and torchvision, whether it works as a chain, and if not why.

    python scripts/survey_backbones.py [--rows FILE] [--most N]

One small member of each class is checked with random weights by `check_backbone`, in a process of its own. Rows are
kept in FILE, so that a run that is broken off goes on where it was; --most checks N more and writes what is known.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import warnings
from collections import defaultdict
from pathlib import Path

import timm

from subtuning_lab.nets.registry import check_backbone

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "backbones.md"
SECONDS = 900
# Marks of small members, from the smallest.
SMALL = (
    "test_", "zepto", "atto", "femto", "pico", "nano", "xxs", "xxtiny", "xx_small", "_m0", "_050", "_035", "xs", "_t0",
    "_t1", "_t8", "_s0", "_s1", "_b0", "tiny", "_n", "_t", "small", "_s", "18", "19", "26", "42",
)  # fmt: skip
# What keeps the check of one network small, tried in this order: options of its constructor.
OPTIONS = (
    {"img_size": 64}, {"img_size": 128}, {"img_size": 224}, {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}},
    {"pretrained_cfg_overlay": {"input_size": (3, 128, 128)}}, {},
)  # fmt: skip
# Networks all of whose kind are large: with fewer blocks.
_DEEP = ("deepseek_vit", "gemma4_vit", "qwen3_vit", "samvit", "naflexvit", "beit", "vit_relpos")
SHALLOW = dict.fromkeys(_DEEP, {"depth": 3})
TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
    "swin_v2_t", "vgg11", "vit_b_16",
)  # fmt: skip


def members() -> dict[tuple[str, str], list[str]]:
    """(module, class) -> names of timm's networks, as timm's source has it: nothing is made for that."""
    found = defaultdict(list)
    for path in sorted((Path(timm.__file__).parent / "models").glob("*.py")):
        functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        for name, function in functions.items():
            if any("register_model" in ast.unparse(decorator) for decorator in function.decorator_list):
                for kind in _classes(functions, name, set()) or {"?"}:
                    found[path.stem, kind].append(name)
    return found


def _classes(functions: dict[str, ast.FunctionDef], name: str, seen: set[str]) -> set[str]:
    kinds = set()
    for call in (node for node in ast.walk(functions[name]) if isinstance(node, ast.Call)):
        called = getattr(call.func, "id", getattr(call.func, "attr", None))
        if called == "build_model_with_cfg":
            kinds.add(ast.unparse(call.args[0]))
        elif called in functions and called not in seen:
            kinds |= _classes(functions, called, {*seen, name})
    return kinds


def smallest(names: list[str]) -> str:
    """The network that its name says to be the smallest."""
    return min(
        names, key=lambda name: (next((i for i, mark in enumerate(SMALL) if mark in name), len(SMALL)), len(name))
    )


def row_of(name: str, shrink: dict[str, object]) -> dict[str, object]:
    """What `check_backbone` says of a network at the smallest images that it takes."""
    warnings.simplefilter("ignore")
    for options in OPTIONS if ":" not in name else ({},):
        try:
            return {"name": name, **check_backbone(name, **shrink, **options), "options": str(shrink | options)}
        except (TypeError, ValueError) as error:
            said = str(error)
            if "can't be made with" not in said and "can't take images" not in said:
                break
    reason = said.partition("has no chain view here: ")[2].partition(". Families known")[0] or said
    return {
        "name": name,
        "refused": " ".join(reason.split())[:300],
        "class": said.partition(" is a ")[2].partition(",")[0],
    }


def _send(pipe: object, name: str, shrink: dict[str, object]) -> None:
    try:
        pipe.send(row_of(name, shrink))
    except Exception as error:
        pipe.send({"name": name, "refused": f"{type(error).__name__}: {error}"[:300], "class": "", "broken": True})


def checked_row(name: str, shrink: dict[str, object]) -> dict[str, object]:
    """`row_of` in a process of its own, which may take `SECONDS` and die."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_send, args=(theirs, name, shrink))
    process.start()
    row = {"name": name, "refused": f"no answer within {SECONDS} seconds", "class": "", "broken": True}
    if ours.poll(SECONDS):
        row = ours.recv()
    process.kill()
    process.join()
    return row


def document(rows: list[dict[str, object]], known: dict[str, str]) -> str:
    """The table, and how many of each source work."""
    works = [row for row in rows if "refused" not in row]
    lines = [
        "# Which networks read as a chain",
        "",
        "`load_backbone` takes every network of this table that works; `subtuning-lab backbones --check NAME` says it",
        "of any other. Made by `python scripts/survey_backbones.py`, which checks one small member of each class with",
        f"random weights, timm {timm.__version__}. *Works* means that features were equal to the model's bit for bit",
        "on images of the sizes named, and gradients of all parameters in float64 as near as given, relative to the",
        "largest of each.",
        "",
    ]
    for source in ("timm", "torchvision"):
        own = [row for row in rows if known[row["name"]].startswith("torchvision") == (source == "torchvision")]
        good = [row for row in own if row in works]
        lines += [f"## {source}: {len(good)} of {len(own)} classes work", ""]
        lines += [
            "| class | checked | blocks | first and last | image sizes | gradients |",
            "|---|---|---|---|---|---|",
        ]
        for row in sorted(good, key=lambda row: str(row["class"]).lower()):
            blocks, sizes = row["blocks"], ", ".join(f"{h} x {w}" for h, w in row["sizes"])
            facts = (
                f"`{row['class']}` ({known[row['name']]})", f"`{row['name']}`", str(len(blocks)),
                f"`{blocks[0]}` `{blocks[-1]}`", sizes, f"{row['gradient']:.0e}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(facts)} |")
        if refused := [row for row in own if row not in works]:
            lines += ["", "| refused | checked | why |", "|---|---|---|"]
            lines += [
                f"| {row['class']} ({known[row['name']]}) | `{row['name']}` | {row['refused']} |" for row in refused
            ]
        if unknown := [name for name in known if name not in {row["name"] for row in rows}]:
            waiting = [f"`{name}`" for name in unknown if name.startswith("torchvision:") == (source == "torchvision")]
            lines += ["", f"Not checked yet ({len(waiting)}): {', '.join(waiting)}."] if waiting else []
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Checks what is not checked yet, and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "runs" / "backbones.jsonl")
    parser.add_argument("--most", type=int)
    options = parser.parse_args()
    known = {smallest(names): module for (module, _), names in members().items()}
    known |= {f"torchvision:{name}": "torchvision" for name in TORCHVISION}
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    options.rows.touch()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    missing = [name for name in known if name not in {row["name"] for row in rows}]
    for name in missing[: options.most]:
        shrink = next((less for mark, less in SHALLOW.items() if name.startswith(mark)), {})
        row = checked_row(name, shrink)
        rows.append(row)
        with options.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, row.get("refused", "works"), flush=True)
    DOCUMENT.write_text(document([row for row in rows if row["name"] in known], known))
    print(DOCUMENT)


if __name__ == "__main__":
    main()
