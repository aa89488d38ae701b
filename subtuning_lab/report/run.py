"""Batches of notebooks by papermill: each runs once per code and parameters, and the report shows them all."""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from subtuning_lab.report.html import export_html
from subtuning_lab.report.page import REPORT, build_report, read_run, without_colours
from subtuning_lab.report.presets import load_preset, settle_parameters
from subtuning_lab.utils.files import write_atomically

_STEM = re.compile(r"(\d\d)_(\w+)")
_TRACEBACK_LINES = 6


@dataclass(frozen=True)
class SectionRun:
    """How the run of one notebook ended."""

    name: str  # stem of the notebook
    state: str  # "done" | "skipped" | "failed"
    seconds: float  # wall-clock, 0 where skipped
    notebook: Path  # executed copy
    page: Path | None  # static HTML, None where there is none
    error: str = ""  # short traceback of a failure


def find_sections(notebooks: str | Path) -> dict[str, Path]:
    """List the numbered notebooks `NN_name.ipynb` of a folder by their stems, in order.

    Raises:
        FileNotFoundError: if the folder is missing or has none.
    """
    folder = Path(notebooks)
    found = {path.stem: path for path in sorted(folder.glob("*.ipynb")) if _STEM.fullmatch(path.stem)}
    if not found:
        raise FileNotFoundError(f"there are no notebooks named NN_name.ipynb in {folder.absolute()}")
    return found


def select_sections(notebooks: str | Path, sections: Iterable[str] = ()) -> dict[str, Path]:
    """Pick notebooks by number ("01"), name ("finetuning_profiles") or stem; none asked for means all.

    Raises:
        ValueError: for a section that does not exist; the message lists those that do.
    """
    if isinstance(sections, str):
        raise TypeError(f"sections must be a list of names, not the string {sections!r}")
    found, chosen = find_sections(notebooks), set()
    for section in sections:
        stems = {stem for stem in found if section == stem or section in _STEM.fullmatch(stem).groups()}
        if not stems:
            raise ValueError(f"unknown section {section!r}; there are: {', '.join(found)}")
        chosen |= stems
    return {stem: path for stem, path in found.items() if not chosen or stem in chosen}


def fingerprint(notebook: Path, parameters: Mapping[str, Any]) -> str:
    """Hash all that determines a run: the notebook's cells, the parameters, every file of the package."""
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for cell in nbformat.read(notebook, as_version=4).cells:
        digest.update(f"\0{cell.cell_type}\0{cell.source}".encode())
    package = Path(__file__).parents[1]
    for source in sorted(path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        content = hashlib.sha256(source.read_bytes()).digest()
        digest.update(f"\0{source.relative_to(package).as_posix()}\0".encode() + content)
    return digest.hexdigest()


def is_done(executed: Path, mark: str) -> bool:
    """Tell whether an executed notebook finished without error from the same code and parameters.

    A run that wrote a section record counts only while the record is there.
    """
    if not executed.exists() or read_run(executed).state != "done":
        return False
    ours = nbformat.read(executed, as_version=4).metadata["subtuning_lab"]
    return ours["fingerprint"] == mark and (not ours["record"] or executed.with_suffix(".json").exists())


@contextmanager
def kernel_environment(jobs: int) -> Iterator[None]:
    """Give the kernels that start inside this block their share of the cores, and this environment's kernel."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    wanted = {"JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": str(threads)}
    if jobs == 1 and "OMP_NUM_THREADS" in os.environ:
        del wanted["OMP_NUM_THREADS"]
    before = {name: os.environ[name] for name in wanted if name in os.environ}
    os.environ |= wanted
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]
        os.environ |= before


def run_section(
    source: Path, parameters: dict[str, Any], folder: Path, bar: bool = False, force: bool = False
) -> SectionRun:
    """Execute one notebook into `folder`, or skip it where that is done already, and export its static page."""
    stem, executed = source.stem, folder / source.name
    page, mark = folder / "html" / f"{stem}.html", fingerprint(source, parameters)
    if not force and is_done(executed, mark) and page.exists():
        return SectionRun(stem, "skipped", 0.0, executed, page)
    for stale in (executed, page, folder / f"{stem}.json", folder / f"{stem}.png"):
        stale.unlink(missing_ok=True)
    start = time.perf_counter()
    error = _execute(source, executed, parameters, bar)
    if executed.exists():
        error = "\n".join(filter(None, [error, _export(executed, page)]))
    if not error:
        _mark_done(executed, mark)
    state = "failed" if error else "done"
    return SectionRun(stem, state, time.perf_counter() - start, executed, page if page.exists() else None, error)


def _execute(source: Path, executed: Path, parameters: dict[str, Any], bar: bool) -> str:
    """Run a notebook; return the short traceback of its failure, or an empty string."""
    import papermill

    progress = {"desc": source.stem, "leave": False} if bar else False
    kernel = {"kernel_name": "python3", "extra_arguments": ["--IPKernelApp.log_level=40"]}  # errors only
    try:
        papermill.execute_notebook(source, executed, parameters, progress_bar=progress, **kernel)
    except papermill.PapermillExecutionError as error:
        lines = without_colours("\n".join(error.traceback)).rstrip().splitlines()[-_TRACEBACK_LINES:]
        return "\n".join([f"in cell {error.exec_count}:", *lines])
    except Exception as error:  # a kernel that dies or does not start must not end the other notebooks' runs
        return f"{type(error).__name__}: {error}"
    return ""


def _export(executed: Path, page: Path) -> str:
    """Write the static page; return what went wrong, or an empty string."""
    try:
        export_html(executed, page)
    except Exception as error:  # for example a formula that cannot be converted: this notebook fails, not the batch
        return f"no page: {type(error).__name__}: {error}"
    return ""


def _mark_done(executed: Path, mark: str) -> None:
    page = nbformat.read(executed, as_version=4)
    page.metadata["subtuning_lab"] = {"fingerprint": mark, "record": executed.with_suffix(".json").exists()}
    write_atomically(executed, nbformat.writes(page).encode())


def reproduce(
    sections: Sequence[str] = (),
    preset: str = "quick",
    notebooks: str | Path = "notebooks",
    results: str | Path = "results",
    jobs: int = 1,
    parameters: Mapping[str, Any] | None = None,
    force: bool = False,
) -> list[SectionRun]:
    """Run notebooks with a preset's parameters and build the report in `results/<preset>/`.

    What finished before with the same code and parameters is skipped; a failure is kept and the rest go on.

    Args:
        sections: numbers, names or stems of notebooks; empty means all.
        preset: name of a table in the notebooks' `presets.toml`.
        notebooks: folder of the numbered notebooks.
        results: folder for executed notebooks, pages, records and the report.
        jobs: notebooks to run at once; they share the cores.
        parameters: values that override the preset's, for every chosen notebook that declares them.
        force: run also what is done.

    Returns:
        One SectionRun per chosen notebook, in order.

    Raises:
        ValueError, TypeError, FileNotFoundError: for wrong input, before anything runs.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs must be a whole number, 1 or more, not {jobs!r}")
    chosen = select_sections(notebooks, sections)
    folder = Path(results).absolute() / preset
    settled = settle_parameters(chosen, load_preset(notebooks, preset), parameters or {}, folder)
    folder.mkdir(parents=True, exist_ok=True)
    bar = jobs == 1 and sys.stderr.isatty()

    def run(stem: str) -> SectionRun:
        _say(f"{stem}: started")
        ended = run_section(chosen[stem], settled[stem], folder, bar, force)
        _say(_ending(ended))
        return ended

    with kernel_environment(jobs):
        if jobs == 1:
            runs = [run(stem) for stem in chosen]
        else:
            with ThreadPoolExecutor(jobs) as pool:
                runs = list(pool.map(run, chosen))
    _say(f"report: {build_report(folder, expected=find_sections(notebooks))}")
    return runs


def _ending(run: SectionRun) -> str:
    if run.state == "failed":
        return f"{run.name}: FAILED after {run.seconds:.0f} s, {run.error}\n  kept in {run.notebook}"
    return f"{run.name}: {run.state}" + (f" in {run.seconds:.0f} s" if run.seconds else " (already done)")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report_path(results: str | Path, preset: str) -> Path:
    """Name the report page that `reproduce` writes."""
    return Path(results).absolute() / preset / REPORT
