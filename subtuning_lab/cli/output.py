"""What every command shares: the group with its one-line errors, and tables on the screen and in files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    import pandas as pd

USER_ERRORS = (ValueError, TypeError, FileNotFoundError, ConnectionError, ImportError)
_ONLY_FOR_MACHINES = ["key", "recipe", "determined_by"]  # long columns of a run store
USER_ERROR_CODE = 2


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


def write(tables: dict[str, tuple["pd.DataFrame", Any]], out: Path) -> list[Path]:
    """Write each table as CSV and the figure of its Axes as PNG; return the paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (table, axes) in tables.items():
        paths += [out / f"{name}.csv", out / f"{name}.png"]
        table.assign(blocks=table["blocks"].map(" ".join)).to_csv(paths[-2], index=False)
        axes.figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
    return paths


def tell(tables: dict[str, "pd.DataFrame"], as_json: bool, written: list[Path] | None = None) -> None:
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


def tell_names(names: dict[str, str], as_json: bool) -> None:
    """Print names with what they mean."""
    if as_json:
        typer.echo(json.dumps(names))
        return
    width = max(map(len, names))
    for name, description in names.items():
        typer.echo(f"{name:<{width}}  {description}")
