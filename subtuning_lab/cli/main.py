"""The command line: `subtuning-lab COMMAND --help` tells each command's options."""

import json
from pathlib import Path
from typing import Annotated

import typer

from subtuning_lab.cli.bound import bound
from subtuning_lab.cli.merge import merge
from subtuning_lab.cli.output import Json, app, check_writable, file_path, tell, tell_names
from subtuning_lab.cli.search import greedy, profile, suggest

__all__ = ["app"]

FAILED_SECTION_CODE = 1


def _tell_version(asked: bool) -> None:
    if asked:
        import subtuning_lab as lab

        typer.echo(f"subtuning-lab {lab.__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors in the input.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Finetuning profiles and SubTuning of pretrained vision networks."""


@app.command()
def reproduce(
    sections: Annotated[
        list[str] | None, typer.Argument(help="Notebooks by number, name or stem; none means all.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Of notebooks/presets.toml: quick, real, gpu or paper.")] = "quick",
    jobs: Annotated[int, typer.Option(help="Notebooks to run at once; they share the cores.")] = 1,
    results: Annotated[
        Path, typer.Option(parser=file_path, help="Folder for executed notebooks, pages and the report.")
    ] = Path("results"),
    notebooks: Annotated[Path, typer.Option(parser=file_path, help="Folder of the numbered notebooks.")] = Path(
        "notebooks"
    ),
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="NAME=VALUE for a notebook; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run also what is done.")] = False,
    as_json: Json = False,
) -> None:
    """Run the notebooks of the paper's sections and build one report; what is done is skipped."""
    from dataclasses import asdict

    from subtuning_lab.report.presets import parse_parameter
    from subtuning_lab.report.run import report_path
    from subtuning_lab.report.run import reproduce as run_notebooks

    values = dict(parse_parameter(text) for text in parameter or [])
    runs = run_notebooks(sections or [], preset, notebooks, results, jobs, values, force)
    report = report_path(results, preset)
    if as_json:
        typer.echo(json.dumps({"report": str(report), "sections": [asdict(run) for run in runs]}, default=str))
    else:
        typer.echo(report)
    if any(run.state == "failed" for run in runs):
        raise typer.Exit(FAILED_SECTION_CODE)


app.command()(profile)
app.command()(greedy)
app.command()(suggest)
app.command()(merge)
app.command()(bound)


@app.command()
def backbones(
    check: Annotated[str | None, typer.Option(help="Prove of one, with random weights, that it is a chain.")] = None,
    as_json: Json = False,
) -> None:
    """List the backbones that can be named, or check one."""
    import subtuning_lab as lab

    if check is None:
        tell_names(lab.backbone_names(), as_json)
        return
    facts = lab.check_backbone(check)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        blocks, sizes = facts["blocks"], " and ".join(f"{height} x {width}" for height, width in facts["sizes"])
        typer.echo(
            f"{check} ({facts['class']}) works: {len(blocks)} blocks, {blocks[0]} to {blocks[-1]}, "
            f"{facts['num_features']} features, equal to the model's bit for bit at {sizes}; "
            f"gradients in float64 within {facts['gradient']:.0e}"
        )


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the tasks that can be named."""
    import subtuning_lab as lab

    tell_names(lab.task_names(), as_json)


@app.command()
def verdicts(
    results: Annotated[
        Path | None, typer.Option(parser=file_path, help="Folder of the tables; by default the package's own.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(parser=file_path, help="A page in Markdown to write, such as docs/verdicts.md.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what real networks say to each claim of the paper."""
    import subtuning_lab as lab
    from subtuning_lab.experiments.claims import verdict_page
    from subtuning_lab.utils.files import write_atomically

    cases = lab.claim_cases(results)
    if write:
        write_atomically(check_writable(write), verdict_page(cases).encode())
    tell({"verdicts": lab.verdicts(cases)}, as_json)


@app.command()
def records(
    path: Annotated[Path, typer.Argument(parser=file_path, help="A run store, such as runs/lab.sqlite.")],
    as_json: Json = False,
) -> None:
    """Show every finished score of a run store."""
    import subtuning_lab as lab

    if not path.is_file():
        raise FileNotFoundError(f"there is no run store {path}")
    tell({"records": lab.Records(path, readonly=True).table()}, as_json)


if __name__ == "__main__":
    app(prog_name="subtuning-lab")
