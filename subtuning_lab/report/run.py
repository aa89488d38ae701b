"""Batches of notebooks by papermill: each runs once per code and parameters, and the report shows them all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import nbformat

from subtuning_lab.report.html import export_html
from subtuning_lab.report.page import REPORT, build_report, read_run
from subtuning_lab.report.presets import load_preset, settle_parameters
from subtuning_lab.utils.files import UNFINISHED, expanded, sweep, write_atomically
from subtuning_lab.utils.text import lines, without_colours
from subtuning_lab.utils.validation import Is, Several, Text, Whole, checked

_STEM = re.compile(r"(\d\d[a-z]?)_(\w+)")  # "04b" goes beyond 04
_TRACEBACK_LINES = 6
# Kernels that start at once may choose the same port; the second one dies before it answers, and another is started.
_STARTS, _NEVER_ANSWERED = 3, "Kernel died before replying"


@dataclass(frozen=True)
class SectionRun:
    """How the run of one notebook ended."""

    name: str  # stem of the notebook
    state: str  # "done" | "skipped" | "failed"
    seconds: float  # wall-clock, 0 where skipped
    notebook: Path  # executed copy
    page: Path | None  # static HTML, None where there is none
    error: str = ""  # short traceback of a failure


class Kernels:
    """The kernels of a batch, one for each notebook that runs now, so that an interrupt can end them all."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._managers: list[Any] = []

    def new(self) -> Any:
        """A manager of a kernel that is not started yet."""
        from jupyter_client import AsyncKernelManager

        self._managers.append(AsyncKernelManager(kernel_name="python3"))
        return self._managers[-1]

    def check(self) -> None:
        """Raises KeyboardInterrupt once the kernels were stopped."""
        if self._stopping.is_set():
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Kills the kernels; papermill notices within a second, and ends their notebooks' runs."""
        import psutil

        self._stopping.set()
        for manager in self._managers:
            pid = getattr(manager.provisioner, "pid", None)
            if pid and psutil.pid_exists(pid):
                psutil.Process(pid).kill()


@checked
def reproduce(
    sections: Annotated[Sequence[str], Several(Text(), least=0)] = (),
    preset: Annotated[str, Text()] = "quick",
    notebooks: Annotated[str | Path, Is((str, Path))] = "notebooks",
    results: Annotated[str | Path, Is((str, Path))] = "results",
    jobs: Annotated[int, Whole(1)] = 1,
    parameters: Annotated[Mapping[str, Any] | None, Is(Mapping, none=True)] = None,
    force: bool = False,
) -> list[SectionRun]:
    """Runs notebooks with a preset's parameters and builds the report in `results/<preset>/`.

    What finished before with the same code and parameters is skipped; a failure is kept and the rest go on. A run
    writes beside the last result and replaces it at its end, so that an interrupt, or a kill, leaves the last one.

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
        BlockingIOError: another call works in the same folder.
    """
    chosen = select_sections(notebooks, sections)
    folder = report_path(results, preset).parent
    settled = settle_parameters(chosen, load_preset(notebooks, preset), parameters or {}, folder)
    folder.mkdir(parents=True, exist_ok=True)
    kernels, bar = Kernels(), jobs == 1 and sys.stderr.isatty()

    def run(stem: str) -> SectionRun:
        _say(f"{stem}: started")
        ended = run_section(chosen[stem], settled[stem], folder, kernels, bar=bar, force=force)
        _say(_ending(ended))
        return ended

    with _alone_in(folder), kernel_environment(jobs):
        _sweep(folder)
        with ThreadPoolExecutor(jobs) as pool:
            runs = [pool.submit(run, stem) for stem in chosen]
            try:
                return [each.result() for each in runs]
            except BaseException:  # an interrupt above all: the threads would wait for the ends of their notebooks
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(each.done() for each in runs):  # again and again: a kernel may be about to start
                    kernels.stop()
                    time.sleep(0.1)
                raise
            finally:
                _say(f"report: {build_report(folder, expected=find_sections(notebooks))}")


def find_sections(notebooks: str | Path) -> dict[str, Path]:
    """Lists the numbered notebooks `NN_name.ipynb` and `NNb_name.ipynb` of a folder by their stems, in order."""
    folder = expanded(notebooks)
    sections = {path.stem: path for path in sorted(folder.glob("*.ipynb")) if _STEM.fullmatch(path.stem)}
    if not sections:
        raise FileNotFoundError(f"there are no notebooks named NN_name.ipynb in {folder.absolute()}")
    return sections


def select_sections(notebooks: str | Path, sections: Iterable[str] = ()) -> dict[str, Path]:
    """Picks notebooks by number ("01"), name ("finetuning_profiles") or stem; none asked for means all."""
    known, chosen = find_sections(notebooks), set()
    for section in sections:
        stems = {stem for stem in known if section == stem or section in _STEM.fullmatch(stem).groups()}
        if not stems:
            raise ValueError(f"unknown section {section!r}; there are: {', '.join(known)}")
        chosen |= stems
    return {stem: path for stem, path in known.items() if not chosen or stem in chosen}


def report_path(results: str | Path, preset: str) -> Path:
    """Names the report page that `reproduce` writes."""
    return expanded(results).absolute() / preset / REPORT


def fingerprint(notebook: Path, parameters: Mapping[str, Any]) -> str:
    """Hashes all that determines a run: the notebook's cells, the parameters, every file of the package."""
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for cell in nbformat.read(notebook, as_version=4).cells:
        digest.update(f"\0{cell.cell_type}\0{cell.source}".encode())
    package = Path(__file__).parents[1]
    for source in sorted(path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        content = hashlib.sha256(source.read_bytes()).digest()
        digest.update(f"\0{source.relative_to(package).as_posix()}\0".encode() + content)
    return digest.hexdigest()


def is_done(executed: Path, mark: str) -> bool:
    """Tells whether an executed notebook finished without error from the same code and parameters.

    A run that wrote a section record counts only while the record is there.
    """
    run = read_run(executed) if executed.exists() else None
    if run is None or run.state != "done" or run.mark.get("fingerprint") != mark:
        return False
    return not run.mark.get("record") or executed.with_suffix(".json").exists()


@contextmanager
def kernel_environment(jobs: int) -> Iterator[None]:
    """Gives the kernels that start inside this block their share of the cores, and this environment's kernel.

    Threads that wait for cores which others keep busy cost more than they bring: each job gets its share of the idle
    cores, and at least one thread. With one job, the caller's own OMP_NUM_THREADS stays.
    """
    wanted = {"JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": str(max(1, _idle_cores() // jobs))}
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
    source: Path, parameters: dict[str, Any], folder: Path, kernels: Kernels, *, bar: bool = False, force: bool = False
) -> SectionRun:
    """Executes one notebook into `folder`, or skips it where that is done already, and exports its static page."""
    stem, executed, page = source.stem, folder / source.name, folder / "html" / f"{source.stem}.html"
    mark = fingerprint(source, parameters)
    kernels.check()
    if not force and is_done(executed, mark) and page.exists():
        return SectionRun(stem, "skipped", 0.0, executed, page)
    workplace, start = folder / f".{stem}{UNFINISHED}", time.perf_counter()
    (workplace / "html").mkdir(parents=True)
    try:
        ours = {name: str(workplace) if value == str(folder) else value for name, value in parameters.items()}
        error = _execute(source, workplace / source.name, ours, kernels, bar)
        kernels.check()
        if (workplace / source.name).exists():
            _name_folder(workplace / source.name, folder)
            error = "\n".join(filter(None, [error, _export(workplace / source.name, workplace / "html" / page.name)]))
        if not error:
            _mark_done(workplace / source.name, mark)
        _replace(workplace, folder, (page, folder / f"{stem}.json", folder / f"{stem}.png", executed))
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    state = "failed" if error else "done"
    return SectionRun(stem, state, time.perf_counter() - start, executed, page if page.exists() else None, error)


def _execute(source: Path, executed: Path, parameters: dict[str, Any], kernels: Kernels, bar: bool) -> str:
    """Runs a notebook; returns the short traceback of its failure, or an empty string."""
    import papermill

    progress = {"desc": source.stem, "leave": False} if bar else False
    options = {"kernel_name": "python3", "extra_arguments": ["--IPKernelApp.log_level=40"]}  # errors only
    for number in range(1, _STARTS + 1):
        kernels.check()
        try:
            papermill.execute_notebook(
                source, executed, parameters, progress_bar=progress, km=kernels.new(), **options
            )
        except papermill.PapermillExecutionError as error:
            trace = without_colours("\n".join(error.traceback)).rstrip().splitlines()[-_TRACEBACK_LINES:]
            return "\n".join([f"in cell {error.exec_count}:", *trace])
        except Exception as error:  # a kernel that dies or does not start must not end the other notebooks' runs
            if number < _STARTS and _NEVER_ANSWERED in str(error):
                continue
            return f"{type(error).__name__}: {error}"
        break
    return ""


def _name_folder(executed: Path, folder: Path) -> None:
    """Puts the folder that the result will lie in where the notebook tells the one that it was made in."""
    made, final = (json.dumps(str(path))[1:-1] for path in (executed.parent, folder))
    write_atomically(executed, executed.read_text(encoding="utf-8").replace(made, final).encode())


def _export(executed: Path, page: Path) -> str:
    """Writes the static page; returns what went wrong, or an empty string."""
    try:
        export_html(executed, page)
    except Exception as error:  # for example a formula that cannot be converted: this notebook fails, not the batch
        return f"no page: {type(error).__name__}: {error}"
    return ""


def _mark_done(executed: Path, mark: str) -> None:
    page = nbformat.read(executed, as_version=4)
    page.metadata["subtuning_lab"] = {"fingerprint": mark, "record": executed.with_suffix(".json").exists()}
    write_atomically(executed, nbformat.writes(page).encode())


def _replace(workplace: Path, folder: Path, last_result: Sequence[Path]) -> None:
    """Moves all that a run wrote to its place, the notebook last, which says that it is done."""
    fresh = {folder / path.relative_to(workplace): path for path in workplace.rglob("*") if path.is_file()}
    for stale in set(last_result) - set(fresh):
        stale.unlink(missing_ok=True)
    for target in sorted(fresh, key=last_result[-1].__eq__):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh[target], target)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder for this call; raises BlockingIOError where another call, in any process, holds it."""
    with open(folder / ".lock", "a+b") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BlockingIOError(f"another reproduce works in {folder}; wait for it, or give --results") from error
        yield


def _sweep(folder: Path) -> None:
    """Removes what killed runs left."""
    for left in folder.glob(f".*{UNFINISHED}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    sweep(folder)
    sweep(folder / "html")


def _idle_cores() -> int:
    """Cores that this process may use, less those that others keep busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores - round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else cores


def _ending(run: SectionRun) -> str:
    if run.state == "failed":
        return f"{run.name}: FAILED after {run.seconds:.0f} s, {run.error}\n  kept in {run.notebook}"
    return f"{run.name}: {run.state}" + (f" in {run.seconds:.0f} s" if run.seconds else " (already done)")


def _say(line: str) -> None:
    print(lines(line), file=sys.stderr, flush=True)
