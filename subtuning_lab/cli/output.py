"""What every command shares: the group with its one-line errors, and tables on the screen and in files."""

import json
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from subtuning_lab.utils.files import expanded, replacing, write_atomically
from subtuning_lab.utils.text import lines

if TYPE_CHECKING:
    import pandas as pd

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, sqlite3.Error)
_ONLY_FOR_MACHINES = ["key", "recipe", "determined_by"]  # long columns of a run store
USER_ERROR_CODE = 2


class OneLineErrors(TyperGroup):
    """A group of commands that tells a wrong input in one red line and exits with code 2, unless --debug is given."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of the output has left; click ends quietly
            raise
        except USER_ERRORS as error:
            if ctx.params.get("debug"):
                raise
            text = f"error: {error}" if str(error) else f"error: {type(error).__name__}"
            typer.secho(lines(" ".join(text.split())), fg="red", err=True)
            raise typer.Exit(USER_ERROR_CODE) from error


app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def file_path(text: str) -> Path:
    """A path as typed; the shell leaves the "~" of --out=~/x as it is."""
    return expanded(text)


def check_writable(path: Path, folder: bool = False) -> Path:
    """Raises OSError now, rather than after the work, where a file (or a folder of files) can't be made."""
    if not folder and path.is_dir():
        raise IsADirectoryError(f"{path} can't be written: it is a folder")
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    there = there.parent if there == path and not folder else there
    if not there.is_dir():
        raise NotADirectoryError(f"{path} can't be written: {there} is no folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise PermissionError(f"{path} can't be written: nothing can be made in {there}") from error
    return path


def write(tables: dict[str, tuple["pd.DataFrame", Any]], out: Path) -> list[Path]:
    """Writes each table as CSV and the figure of its Axes as PNG; returns the paths."""
    paths = []
    for name, (table, axes) in tables.items():
        paths += [out / f"{name}.csv", out / f"{name}.png"]
        write_atomically(paths[-2], table.assign(blocks=table["blocks"].map(" ".join)).to_csv(index=False).encode())
        with replacing(paths[-1]) as picture:
            axes.figure.savefig(picture, format="png", dpi=150, bbox_inches="tight")
    return paths


def tell(tables: dict[str, "pd.DataFrame"], as_json: bool, written: list[Path] | None = None) -> None:
    """Prints tables and the paths that were written, as text or as one JSON document."""
    files = [str(path.absolute()) for path in written or []]
    if as_json:
        content = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        typer.echo(json.dumps(content | ({"files": files} if files else {})))
        return
    for table in tables.values():
        text = _short(table).to_string(index=False, float_format="{:.4g}".format) if len(table) else "(empty)"
        typer.echo(lines(text))
    for path in files:
        typer.echo(lines(path))


def tell_names(names: dict[str, str], as_json: bool) -> None:
    """Prints names with what they mean."""
    if as_json:
        typer.echo(json.dumps(names))
        return
    width = max(map(len, names))
    for name, description in names.items():
        typer.echo(lines(f"{name:<{width}}  {description}"))


def _short(table: "pd.DataFrame") -> "pd.DataFrame":
    """Leaves out what does not fit a terminal: long columns, and blocks where a label names them."""
    dropped = [*_ONLY_FOR_MACHINES, *(["blocks"] if "label" in table else [])]
    short = table.drop(columns=dropped, errors="ignore").astype(object)
    if "blocks" in short:
        names = [[*blocks] if len(blocks) < 4 else [blocks[0], "...", blocks[-1]] for blocks in short["blocks"]]
        short["blocks"] = [" ".join(blocks) for blocks in names]
    return short.where(short.notna(), "")
