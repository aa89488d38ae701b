"""The command line: `subtuning-lab COMMAND --help` tells each command's options."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    import pandas as pd

    from subtuning_lab.recipe import Recipe

USER_ERRORS = (ValueError, TypeError, FileNotFoundError, ConnectionError)
_ONLY_FOR_MACHINES = ["key", "recipe", "determined_by"]  # long columns of a run store
USER_ERROR_CODE = 2
FAILED_SECTION_CODE = 1


class OneLineErrors(TyperGroup):
    """A group of commands that tells a wrong input in one red line and exits with code 2, unless --debug is given."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            if ctx.params.get("debug"):
                raise
            typer.secho(" ".join(f"error: {error}".split()), fg="red", err=True)
            raise typer.Exit(USER_ERROR_CODE) from error


app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors in the input.")] = False,
) -> None:
    """Finetuning profiles and SubTuning of pretrained vision networks."""


@app.command()
def reproduce(
    sections: Annotated[
        list[str] | None, typer.Argument(help="Notebooks by number, name or stem; none means all.")
    ] = None,
    preset: Annotated[str, typer.Option(help="A table of notebooks/presets.toml: quick, gpu or paper.")] = "quick",
    jobs: Annotated[int, typer.Option(help="Notebooks to run at once; they share the cores.")] = 1,
    results: Annotated[Path, typer.Option(help="Folder for executed notebooks, pages and the report.")] = Path(
        "results"
    ),
    notebooks: Annotated[Path, typer.Option(help="Folder of the numbered notebooks.")] = Path("notebooks"),
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="NAME=VALUE for a notebook; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run also what is done.")] = False,
    as_json: Json = False,
) -> None:
    """Run the notebooks of the paper's sections and build one report; what is done is skipped."""
    from dataclasses import asdict

    from subtuning_lab.presets import parse_parameter
    from subtuning_lab.reproduce import report_path
    from subtuning_lab.reproduce import reproduce as run_notebooks

    values = dict(parse_parameter(text) for text in parameter or [])
    runs = run_notebooks(sections or [], preset, notebooks, results, jobs, values, force)
    report = report_path(results, preset)
    if as_json:
        typer.echo(json.dumps({"report": str(report), "sections": [asdict(run) for run in runs]}, default=str))
    else:
        typer.echo(report)
    if any(run.state == "failed" for run in runs):
        raise typer.Exit(FAILED_SECTION_CODE)


@app.command()
def profile(
    backbone: Annotated[str, typer.Option(help="A bundled backbone or a timm name.")] = "lab-resnet",
    weights: Annotated[
        str, typer.Option(help="pretrained, random, or the path of a .safetensors file.")
    ] = "pretrained",
    drop_block: Annotated[list[str] | None, typer.Option(help="A block that the weights lack.")] = None,
    model_option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the model's constructor.")] = None,
    task: Annotated[str, typer.Option(help="A task such as digits, cifar10, folder:DIR or vtab:DIR.")] = "digits",
    train_size: Annotated[int | None, typer.Option(help="Training images, all if not given.")] = None,
    window: Annotated[int, typer.Option(help="Consecutive blocks tuned together.")] = 1,
    pairs: Annotated[bool, typer.Option("--pairs", help="Score all pairs of blocks too.")] = False,
    folds: Annotated[int, typer.Option(help="Folds of the training images.")] = 5,
    seeds: Annotated[int, typer.Option(help="Repetitions, with the seeds 0, 1, ...")] = 1,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    lr: Annotated[
        list[float] | None, typer.Option(help="Peak learning rate of the tuned blocks; repeat it to choose per subset.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decoupled weight decay.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    bn: Annotated[
        list[str] | None, typer.Option(help="BatchNorm of tuned blocks, batch or frozen; repeat it likewise.")
    ] = None,
    head_lr: Annotated[float | None, typer.Option(help="Peak learning rate of the new readout.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bf16.")] = None,
    augment: Annotated[str | None, typer.Option(help="Augmentation of the training images.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels that images are resized to.")] = None,
    records: Annotated[Path, typer.Option(help="The run store; finished scores are read from it.")] = Path(
        "runs/lab.sqlite"
    ),
    out: Annotated[Path, typer.Option(help="Folder for the table and the figure.")] = Path("results/profile"),
    as_json: Json = False,
) -> None:
    """Measure a finetuning profile: accuracy on held-out folds when each block is tuned alone."""
    import subtuning_lab as lab
    from subtuning_lab.presets import parse_parameter

    fixed = {"epochs": epochs, "weight_decay": weight_decay, "batch_size": batch_size, "head_lr": head_lr}
    fixed |= {"augment": augment, "image_size": image_size, "precision": precision}
    recipes = _recipes(fixed, {"lr": lr, "bn": bn})
    if seeds < 1:
        raise ValueError(f"seeds must be 1 or more, not {seeds}")
    options = dict(parse_parameter(text) for text in model_option or [])
    network = lab.load_backbone(backbone, weights=weights, drop_blocks=drop_block or [], **options)
    data = lab.load_task(task, train_size=train_size, seed=0)
    study = lab.Study(network, data, recipes, folds=folds, seeds=tuple(range(seeds)), records=records)
    measured = lab.finetuning_profile(study, window=window)
    tables = {"profile": (measured.table, lab.plot_profile(measured))}
    if pairs:
        measured_pairs = lab.pair_profile(study)
        tables["pairs"] = (measured_pairs.table, lab.plot_pairs(measured_pairs))
    _tell({name: table for name, (table, _) in tables.items()}, as_json, _write(tables, out))


def _recipes(fixed: dict[str, Any], choices: dict[str, list | None]) -> "list[Recipe]":
    """Every combination of the choices; what is None keeps the recipe's default."""
    from itertools import product

    from subtuning_lab.recipe import Recipe

    given = {name: values for name, values in choices.items() if values}
    fixed = {name: value for name, value in fixed.items() if value is not None}
    return [Recipe(**fixed, **dict(zip(given, values, strict=True))) for values in product(*given.values())]


def _write(tables: dict[str, tuple["pd.DataFrame", Any]], out: Path) -> list[Path]:
    """Write each table as CSV and the figure of its Axes as PNG; return the paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (table, axes) in tables.items():
        paths += [out / f"{name}.csv", out / f"{name}.png"]
        table.assign(blocks=table["blocks"].map(" ".join)).to_csv(paths[-2], index=False)
        axes.figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
    return paths


def _tell(tables: dict[str, "pd.DataFrame"], as_json: bool, written: list[Path] | None = None) -> None:
    """Print tables and the paths that were written, as text or as one JSON document."""
    files = [str(path.absolute()) for path in written or []]
    if as_json:
        content = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        typer.echo(json.dumps(content | ({"files": files} if files else {})))
        return
    for table in tables.values():
        typer.echo(_short(table).to_string(index=False, float_format="{:.4g}".format) if len(table) else "(empty)")
    for path in files:
        typer.echo(path)


def _short(table: "pd.DataFrame") -> "pd.DataFrame":
    """Leave out what does not fit a terminal: long columns, and blocks where a label names them."""
    dropped = [*_ONLY_FOR_MACHINES, *(["blocks"] if "label" in table else [])]
    short = table.drop(columns=dropped, errors="ignore").astype(object)
    if "blocks" in short:
        names = [[*blocks] if len(blocks) < 4 else [blocks[0], "...", blocks[-1]] for blocks in short["blocks"]]
        short["blocks"] = [" ".join(blocks) for blocks in names]
    return short.where(short.notna(), "")


def _tell_names(names: dict[str, str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(names))
        return
    width = max(map(len, names))
    for name, description in names.items():
        typer.echo(f"{name:<{width}}  {description}")


@app.command()
def backbones(as_json: Json = False) -> None:
    """List the backbones that can be named."""
    import subtuning_lab as lab

    _tell_names(lab.backbone_names(), as_json)


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the tasks that can be named."""
    import subtuning_lab as lab

    _tell_names(lab.task_names(), as_json)


@app.command()
def records(
    path: Annotated[Path, typer.Argument(help="A run store, such as runs/lab.sqlite.")], as_json: Json = False
) -> None:
    """Show every finished score of a run store."""
    import subtuning_lab as lab

    if not path.is_file():
        raise FileNotFoundError(f"there is no run store {path}")
    _tell({"records": lab.Records(path).table()}, as_json)


if __name__ == "__main__":
    app(prog_name="subtuning-lab")
