"""Commands that choose blocks: `profile`, `greedy` and `suggest`, on a study that their common options describe."""

import inspect
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subtuning_lab.cli.output import Json, check_writable, file_path, tell, write
from subtuning_lab.utils.validation import Whole

if TYPE_CHECKING:
    from subtuning_lab.nets.chain import Chain
    from subtuning_lab.study.study import Study

BackboneName = Annotated[str, typer.Option("--backbone", help="A bundled backbone or a timm name.")]
Weights = Annotated[str, typer.Option(help="pretrained, random, or the path of a .safetensors file.")]
DropBlock = Annotated[list[str] | None, typer.Option(help="A block that the weights lack.")]
ModelOption = Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the model's constructor.")]


def load_backbone(name: str, weights: str, drop_block: list[str] | None, model_option: list[str] | None) -> "Chain":
    """The backbone that a command's options describe."""
    import subtuning_lab as lab
    from subtuning_lab.report.presets import parse_parameter

    options = dict(parse_parameter(text) for text in model_option or [])
    path = str(file_path(weights)) if weights.startswith("~") else weights
    return lab.load_backbone(name, weights=path, drop_blocks=drop_block or [], **options)


def study_of(
    backbone: BackboneName = "lab-resnet",
    weights: Weights = "pretrained",
    drop_block: DropBlock = None,
    model_option: ModelOption = None,
    task: Annotated[
        str, typer.Option(help="A task such as digits, digits+snow@3, cifar10, folder:DIR or vtab:DIR.")
    ] = "digits",
    train_size: Annotated[int | None, typer.Option(help="Training images, all if not given.")] = None,
    folds: Annotated[int, typer.Option(help="Folds of the training images.")] = 5,
    seeds: Annotated[int, typer.Option(help="Repetitions, with the seeds 0, 1, ...")] = 1,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    lr: Annotated[
        list[float] | None, typer.Option(help="Peak learning rate of the tuned blocks; repeat it to choose per subset.")
    ] = None,
    weight_decay: Annotated[
        list[float] | None, typer.Option(help="Decoupled weight decay; repeat it likewise.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    bn: Annotated[
        list[str] | None, typer.Option(help="BatchNorm of tuned blocks, batch or frozen; repeat it likewise.")
    ] = None,
    head_lr: Annotated[float | None, typer.Option(help="Peak learning rate of the new readout.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bf16.")] = None,
    augment: Annotated[str | None, typer.Option(help="Augmentation of the training images.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels that images are resized to.")] = None,
    records: Annotated[
        Path, typer.Option(parser=file_path, help="The run store; finished scores are read from it.")
    ] = Path("runs/lab.sqlite"),
) -> "Study":
    """The study that a command's options describe: one recipe for each combination of repeated options."""
    import subtuning_lab as lab

    Whole(1, 10**6).check("seeds", seeds)
    given = {"epochs": epochs, "batch_size": batch_size, "head_lr": head_lr, "precision": precision}
    given |= {"augment": augment, "image_size": image_size}
    fixed = {name: value for name, value in given.items() if value is not None}
    choices = {name: values for name, values in (("lr", lr), ("weight_decay", weight_decay), ("bn", bn)) if values}
    recipes = [lab.Recipe(**fixed, **dict(zip(choices, values, strict=True))) for values in product(*choices.values())]
    network = load_backbone(backbone, weights, drop_block, model_option)
    data = lab.load_task(task, train_size=train_size, seed=0)
    return lab.Study(network, data, recipes, folds=folds, seeds=tuple(range(seeds)), records=records)


def on_a_study(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `study_of`, in front of its own; it gets the study that they describe.

    The options that name what a command writes are checked before the study is loaded.
    """
    shared = inspect.signature(study_of).parameters
    special = {name: option for name, option in inspect.signature(command).parameters.items() if name != "study"}

    def run(**options: Any) -> None:
        for name in ("out", "save"):
            if options.get(name) is not None:
                check_writable(options[name], folder=name == "out")
        if options.get("save") is not None and options["save"].suffix != ".safetensors":
            raise ValueError(f"--save is {options['save']}; a tuned task is a .safetensors file")
        study = study_of(**{name: options.pop(name) for name in shared})
        command(study, **options)

    parameters = [*shared.values(), *special.values()]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {option.name: option.annotation for option in parameters}
    run.__signature__ = inspect.Signature([option.replace(kind=option.KEYWORD_ONLY) for option in parameters])
    return run


@on_a_study
def profile(
    study: "Study",
    window: Annotated[int, typer.Option(help="Consecutive blocks tuned together.")] = 1,
    pairs: Annotated[bool, typer.Option("--pairs", help="Score all pairs of blocks too.")] = False,
    out: Annotated[Path, typer.Option(parser=file_path, help="Folder for the table and the figure.")] = Path(
        "results/profile"
    ),
    as_json: Json = False,
) -> None:
    """Measure a finetuning profile: accuracy on held-out folds when each block is tuned alone."""
    import subtuning_lab as lab

    measured = lab.finetuning_profile(study, window=window)
    tables = {"profile": (measured.table, lab.plot_profile(measured))}
    if pairs:
        measured_pairs = lab.pair_profile(study)
        tables["pairs"] = (measured_pairs.table, lab.plot_pairs(measured_pairs))
    tell({name: table for name, (table, _) in tables.items()}, as_json, write(tables, out))


@on_a_study
def greedy(
    study: "Study",
    epsilon: Annotated[float, typer.Option(help="Accuracy in [0, 1] that a further block must gain.")] = 0.0,
    max_blocks: Annotated[int | None, typer.Option(help="Most blocks that may be chosen.")] = None,
    direction: Annotated[str, typer.Option(help="forward, backward or both.")] = "forward",
    significance: Annotated[
        float | None, typer.Option(help="Keep a block only if it is better at this level of a paired test.")
    ] = None,
    race: Annotated[str | None, typer.Option(help="Cheaper rounds: race or halving.")] = None,
    save: Annotated[
        Path | None, typer.Option(parser=file_path, help="Train the chosen blocks on all images into this file.")
    ] = None,
    out: Annotated[Path, typer.Option(parser=file_path, help="Folder for the table and the figure.")] = Path(
        "results/greedy"
    ),
    as_json: Json = False,
) -> None:
    """Choose a subset of blocks by greedy SubTuning; test images are not used."""
    import pandas as pd

    import subtuning_lab as lab

    races = {None: None, "race": lab.Race(), "halving": lab.Halving()}
    if race not in races:
        raise ValueError(f"race is {race!r}; it must be race or halving")
    keep = None if significance is None else lab.SignificantGain(significance)
    search = lab.greedy_subtuning(study, epsilon, max_blocks, direction, keep=keep, race=races[race])
    traces = {f"trace_{way}": trace for way, trace in search.trace.groupby("direction")}
    figures = {name: (trace, lab.plot_trace(trace, study.block_names)) for name, trace in traces.items()}
    written = write(figures, out)
    if save is not None:
        written.append(study.fit(search.blocks).save(save))
    chosen = {"blocks": search.blocks, "accuracy": search.accuracy, "std": search.std, "n": search.n}
    chosen |= {"trainings": search.cost.trainings, "seconds": search.cost.seconds}
    tell(traces | {"chosen": pd.DataFrame([chosen])}, as_json, written)


@on_a_study
def suggest(
    study: "Study",
    budget: Annotated[float, typer.Option(help="What the choice may take, in --unit; foretold, no hard limit.")] = 60.0,
    unit: Annotated[str, typer.Option(help="seconds or flops.")] = "seconds",
    criterion: Annotated[
        str, typer.Option(help="What ranks blocks that are not trained, such as cka.")
    ] = "empirical_fisher",
    as_json: Json = False,
) -> None:
    """Suggest the block to tune within a budget, and say how far to trust that; test images are not used."""
    import pandas as pd

    import subtuning_lab as lab

    suggestion = lab.suggest_blocks(
        study.backbone, study.task, budget, unit, recipe=study.recipes, folds=study.n_folds, seeds=study.seeds,
        records=study.records, criterion=criterion, progress=study.progress,
    )  # fmt: skip
    names = ("blocks", "by", "confidence", "more")
    chosen = pd.DataFrame([{name: getattr(suggestion, name) for name in names}])
    tables = {"plans": suggestion.plans, "scores": suggestion.table, "suggestion": chosen}
    if as_json:
        tell(tables, as_json)
        return
    tell({name: tables[name] for name in ("plans", "scores")}, as_json)
    typer.echo(f"tune {' + '.join(suggestion.blocks) or 'the readout alone'} (by {suggestion.by})")
    typer.echo(f"confidence {suggestion.confidence}")
    typer.echo(f"a longer search: {suggestion.more}")
