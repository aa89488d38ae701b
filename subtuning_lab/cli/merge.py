"""The command `merge`: several tuned tasks answer for the same images in one forward pass."""

from pathlib import Path
from typing import Annotated

import typer

from subtuning_lab.cli.output import Json, file_path, tell
from subtuning_lab.cli.search import BackboneName, DropBlock, ModelOption, Weights, load_backbone


def merge(
    tasks: Annotated[list[Path], typer.Argument(parser=file_path, help="Files of tuned tasks, all of one backbone.")],
    image: Annotated[list[Path], typer.Option(parser=file_path, help="An image file; may be repeated.")],
    backbone: BackboneName = "lab-resnet",
    weights: Weights = "pretrained",
    drop_block: DropBlock = None,
    model_option: ModelOption = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels to bring images to; by default what the tasks were tuned on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge tuned tasks into one network and print each task's answer for each image."""
    import pandas as pd
    import torch

    import subtuning_lab as lab

    names = [path.stem for path in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two files are named {twice[0]}; a file's name is its task's name here")
    network = load_backbone(backbone, weights, drop_block, model_option)
    loaded = {name: lab.load_tuned(path, network) for name, path in zip(names, tasks, strict=True)}
    merged = lab.merge_tasks(network, loaded, keep_original=False)
    size = None if image_size is None else (image_size, image_size)
    rows = []
    for path in image:
        with torch.inference_mode():
            outputs = merged(merged.prepare(path, size))
        for name, (logits,) in outputs.items():
            best = int(logits.argmax())
            share = float(logits.softmax(0)[best])
            rows.append((str(path), name, loaded[name].classes[best], share))
    answers = pd.DataFrame(rows, columns=["image", "task", "answer", "probability"])
    tell({"answers": answers}, as_json)
