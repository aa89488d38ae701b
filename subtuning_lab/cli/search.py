"""Commands that choose blocks: `profile` and `greedy`."""

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subtuning_lab.cli.output import Json, tell, write

if TYPE_CHECKING:
    from subtuning_lab.study.study import Study

Backbone = Annotated[str, typer.Option(help="A bundled backbone or a timm name.")]
Weights = Annotated[str, typer.Option(help="pretrained, random, or the path of a .safetensors file.")]
DropBlock = Annotated[list[str] | None, typer.Option(help="A block that the weights lack.")]
ModelOption = Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the model's constructor.")]
TaskName = Annotated[str, typer.Option(help="A task such as digits, digits+snow@3, cifar10, folder:DIR or vtab:DIR.")]
TrainSize = Annotated[int | None, typer.Option(help="Training images, all if not given.")]
Folds = Annotated[int, typer.Option(help="Folds of the training images.")]
Seeds = Annotated[int, typer.Option(help="Repetitions, with the seeds 0, 1, ...")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images.")]
Lr = Annotated[
    list[float] | None, typer.Option(help="Peak learning rate of the tuned blocks; repeat it to choose per subset.")
]
WeightDecay = Annotated[list[float] | None, typer.Option(help="Decoupled weight decay; repeat it likewise.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per step.")]
BatchNorm = Annotated[
    list[str] | None, typer.Option(help="BatchNorm of tuned blocks, batch or frozen; repeat it likewise.")
]
HeadLr = Annotated[float | None, typer.Option(help="Peak learning rate of the new readout.")]
Precision = Annotated[str | None, typer.Option(help="float32 or bf16.")]
Augment = Annotated[str | None, typer.Option(help="Augmentation of the training images.")]
ImageSize = Annotated[int | None, typer.Option(help="Side in pixels that images are resized to.")]
RecordsFile = Annotated[Path, typer.Option(help="The run store; finished scores are read from it.")]
Out = Annotated[Path, typer.Option(help="Folder for the table and the figure.")]
_RECORDS = Path("runs/lab.sqlite")


def profile(
    backbone: Backbone = "lab-resnet",
    weights: Weights = "pretrained",
    drop_block: DropBlock = None,
    model_option: ModelOption = None,
    task: TaskName = "digits",
    train_size: TrainSize = None,
    window: Annotated[int, typer.Option(help="Consecutive blocks tuned together.")] = 1,
    pairs: Annotated[bool, typer.Option("--pairs", help="Score all pairs of blocks too.")] = False,
    folds: Folds = 5,
    seeds: Seeds = 1,
    epochs: Epochs = None,
    lr: Lr = None,
    weight_decay: WeightDecay = None,
    batch_size: BatchSize = None,
    bn: BatchNorm = None,
    head_lr: HeadLr = None,
    precision: Precision = None,
    augment: Augment = None,
    image_size: ImageSize = None,
    records: RecordsFile = _RECORDS,
    out: Out = Path("results/profile"),
    as_json: Json = False,
) -> None:
    """Measure a finetuning profile: accuracy on held-out folds when each block is tuned alone."""
    import subtuning_lab as lab

    study = _study(locals())
    measured = lab.finetuning_profile(study, window=window)
    tables = {"profile": (measured.table, lab.plot_profile(measured))}
    if pairs:
        measured_pairs = lab.pair_profile(study)
        tables["pairs"] = (measured_pairs.table, lab.plot_pairs(measured_pairs))
    tell({name: table for name, (table, _) in tables.items()}, as_json, write(tables, out))


def greedy(
    backbone: Backbone = "lab-resnet",
    weights: Weights = "pretrained",
    drop_block: DropBlock = None,
    model_option: ModelOption = None,
    task: TaskName = "digits",
    train_size: TrainSize = None,
    epsilon: Annotated[float, typer.Option(help="Accuracy in [0, 1] that a further block must gain.")] = 0.0,
    max_blocks: Annotated[int | None, typer.Option(help="Most blocks that may be chosen.")] = None,
    direction: Annotated[str, typer.Option(help="forward, backward or both.")] = "forward",
    significance: Annotated[
        float | None, typer.Option(help="Keep a block only if it is better at this level of a paired test.")
    ] = None,
    race: Annotated[str | None, typer.Option(help="Cheaper rounds: race or halving.")] = None,
    folds: Folds = 5,
    seeds: Seeds = 1,
    epochs: Epochs = None,
    lr: Lr = None,
    weight_decay: WeightDecay = None,
    batch_size: BatchSize = None,
    bn: BatchNorm = None,
    head_lr: HeadLr = None,
    precision: Precision = None,
    augment: Augment = None,
    image_size: ImageSize = None,
    save: Annotated[Path | None, typer.Option(help="Train the chosen blocks on all images into this file.")] = None,
    records: RecordsFile = _RECORDS,
    out: Out = Path("results/greedy"),
    as_json: Json = False,
) -> None:
    """Choose a subset of blocks by greedy SubTuning; test images are not used."""
    import pandas as pd

    import subtuning_lab as lab

    races = {None: None, "race": lab.Race(), "halving": lab.Halving()}
    if race not in races:
        raise ValueError(f"race is {race!r}; it must be race or halving")
    keep = None if significance is None else lab.SignificantGain(significance)
    study = _study(locals())
    found = lab.greedy_subtuning(study, epsilon, max_blocks, direction, keep=keep, race=races[race])
    traces = [trace for _, trace in found.trace.groupby("direction")]
    tables = {f"trace_{trace['direction'].iloc[0]}": trace for trace in traces}
    written = write({name: (t, lab.plot_trace(t, study.block_names)) for name, t in tables.items()}, out)
    if save is not None:
        written.append(study.fit(found.blocks).save(save))
    chosen = {"blocks": found.blocks, "accuracy": found.accuracy, "std": found.std, "n": found.n}
    chosen |= {"trainings": found.cost.trainings, "seconds": found.cost.seconds}
    tell(tables | {"chosen": pd.DataFrame([chosen])}, as_json, written)


def _study(options: dict[str, Any]) -> "Study":
    """The study that a command's options describe."""
    import subtuning_lab as lab
    from subtuning_lab.report.presets import parse_parameter

    if options["seeds"] < 1:
        raise ValueError(f"seeds must be 1 or more, not {options['seeds']}")
    names = ("epochs", "batch_size", "head_lr", "augment", "image_size", "precision")
    fixed = {name: options[name] for name in names if options[name] is not None}
    choices = {name: options[name] for name in ("lr", "weight_decay", "bn") if options[name]}
    recipes = [lab.Recipe(**fixed, **dict(zip(choices, values, strict=True))) for values in product(*choices.values())]
    model = dict(parse_parameter(text) for text in options["model_option"] or [])
    drop = options["drop_block"] or []
    network = lab.load_backbone(options["backbone"], weights=options["weights"], drop_blocks=drop, **model)
    data = lab.load_task(options["task"], train_size=options["train_size"], seed=0)
    seeds = tuple(range(options["seeds"]))
    return lab.Study(network, data, recipes, folds=options["folds"], seeds=seeds, records=options["records"])
