"""What faults do to a study, its records and its reports: kills, full disks, damaged files, lack of memory.

    python -m tests.end_to_end.faults --kills 200
    python -m tests.end_to_end.faults flips memory

Every fault says how often it was tried, how often the work came to its end or was refused with a message of ours, how
many rows were lost, and how many finished passes had to be repeated. Children are forked from this warm process, since
importing torch takes longer than the work; it runs one torch thread and trains nothing itself.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import argparse
import contextlib
import gc
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import subtuning_lab as lab
from subtuning_lab.cli.main import app
from subtuning_lab.report import reproduce
from tests.helpers import tiny_chain, tiny_task
from tests.project.surface import Material, wrong_calls

torch.set_num_threads(1)
RECIPE = lab.Recipe(epochs=2, batch_size=8)
VARIES = ["created", "seconds"]  # what two equal runs don't share
PATIENCE_S = 300


@dataclass
class Outcome:
    """What a fault did, over all tries."""

    fault: str
    tries: int = 0
    survived: int = 0  # the work came to its end, or was refused by a message of ours that names what is wrong
    lost: int = 0  # rows that were there once
    repeated: int = 0  # finished passes that were trained again, at most after one kill
    notes: list[str] = field(default_factory=list)

    def note(self, good: bool, what: str) -> None:
        """Counts one try."""
        self.tries, self.survived = self.tries + 1, self.survived + good
        self.notes += [] if good else [what]

    @property
    def good(self) -> bool:
        """Whether it is as promised in docs/reliability.md."""
        return self.survived == self.tries and self.lost == 0 and self.repeated <= 1


# ---------------------------------------------------------------- the work


def study(path: Path | str, recipe=RECIPE, **options) -> lab.Study:
    """A real but small study: four passes of five candidates."""
    options = {"folds": 2, "seeds": (0, 1), "device": "cpu", "progress": False} | options
    return lab.Study(tiny_chain(), tiny_task(), recipe, records=path, **options)


def work(path: Path) -> None:
    """What is killed and resumed."""
    lab.finetuning_profile(study(path))


def rows_of(path: Path) -> pd.DataFrame:
    """What the records hold, by key."""
    return lab.Records(path).table().set_index("key").drop(columns=VARIES).sort_index()


def same(rows: pd.DataFrame, others: pd.DataFrame, rounded: bool = False) -> bool:
    """Whether two tables hold the same rows bit for bit; or with losses that differ by rounding only."""
    if rounded and rows.index.equals(others.index):
        close = np.allclose(rows["loss"], others["loss"], rtol=1e-4, equal_nan=True)
        return close and same(rows.drop(columns="loss"), others.drop(columns="loss"))
    return rows.index.equals(others.index) and bool((rows.map(repr) == others.map(repr)).all(axis=None))


def start(task: Callable[[], object], log: Path) -> int:
    """Runs a task in a forked process with a group of its own, and returns its id; 0 is the status of success."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        task()
        status = 0
    except BaseException:  # whatever it is, it must not reach the parent's code
        traceback.print_exc()
        status = 3
    sys.stderr.flush()
    os._exit(status)


def end(pid: int, patience: float = PATIENCE_S) -> int:
    """Waits for a child; its status, negative after a signal."""
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -99


def run(task: Callable[[], object], log: Path) -> int:
    """Status of a task that runs in a child."""
    return end(start(task, log))


def last_line(log: Path) -> str:
    """What a child said last."""
    lines = [line for line in log.read_text().splitlines() if line.strip()] if log.exists() else []
    return lines[-1] if lines else ""


class Scene:
    """A folder, and the table that an undisturbed run of `work` gives."""

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.chance = folder, random.Random(seed)
        self.log = folder / "log.txt"
        self.whole = self.path("whole")
        begun = time.monotonic()
        status = run(lambda: work(self.whole), self.log)
        self.seconds = time.monotonic() - begun
        assert status == 0, self.log.read_text()
        self.reference = rows_of(self.whole)
        lab.Records(self.whole).close() if hasattr(lab.Records, "close") else None

    def path(self, name: str) -> Path:
        """A records file in a folder of its own."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder / "lab.sqlite"

    def copy(self, name: str) -> Path:
        """A copy of the whole store."""
        path = self.path(name)
        shutil.copy(self.whole, path)
        return path

    def ends_well(self, path: Path) -> str:
        """Resumes the work; what is wrong with its end, or nothing."""
        if run(lambda: work(path), self.log) != 0:
            return f"does not resume: {last_line(self.log)}"
        return "" if same(rows_of(path), self.reference) else "another table"


# ---------------------------------------------------------------- kills


@contextlib.contextmanager
def events(reached: Callable[[str], None]) -> Iterator[None]:
    """Calls `reached` before and after every commit and every rename of this process."""
    connect, replace, link = sqlite3.connect, os.replace, os.link

    class Connection(sqlite3.Connection):
        def __exit__(self, *error):
            reached("before a commit")
            super().__exit__(*error)
            reached("after a commit")

    def renaming(rename):
        def renamed(*arguments, **options):
            reached("before a rename")
            rename(*arguments, **options)
            reached("after a rename")

        return renamed

    sqlite3.connect = lambda *arguments, **options: connect(*arguments, **({"factory": Connection} | options))
    os.replace, os.link = renaming(replace), renaming(link)
    try:
        yield
    finally:
        sqlite3.connect, os.replace, os.link = connect, replace, link


def noting_passes(path: Path) -> None:
    """From now on this process writes down the keys of every pass before it stores them."""
    put = lab.Records.put

    def noted(self, rows):
        rows = list(rows)
        with (path.parent / "passes.jsonl").open("a") as file:
            file.write(json.dumps([row["key"] for row in rows]) + "\n")
        put(self, rows)

    lab.Records.put = noted


def killed_work(path: Path, at: int | None, count: Path | None = None) -> None:
    """The work, killed at its event number `at`; with `count` the number of events is written there."""
    reached = 0

    def event(name: str) -> None:
        nonlocal reached
        reached += 1
        if reached == at:
            os.kill(os.getpid(), signal.SIGKILL)

    noting_passes(path)
    with events(event):
        work(path)
    if count is not None:
        count.write_text(str(reached))


def after_kill(scene: Scene, path: Path, outcome: Outcome, what: str) -> None:
    """Resumes, and counts what was lost and what was repeated."""
    kept = rows_of(path) if path.exists() else scene.reference.iloc[:0]
    noted = path.parent / "passes.jsonl"
    passes = [json.loads(line) for line in noted.read_text().splitlines()] if noted.exists() else []
    repeated = sum(not set(keys) <= set(kept.index) for keys in passes)
    outcome.repeated = max(outcome.repeated, repeated)
    wrong = scene.ends_well(path)
    if not wrong:
        final = rows_of(path)
        outcome.lost += len(set(kept.index) - set(final.index))
        wrong = "" if same(final.loc[kept.index], kept) else "a row has changed"
    outcome.note(not wrong, f"{what}: {wrong}")


def kills(scene: Scene, n: int) -> Iterator[Outcome]:
    """kill -9 at every commit and rename, and then at random moments, `n` times in all."""
    count = scene.folder / "count.txt"
    path = scene.path("counting")
    assert run(lambda: killed_work(path, None, count), scene.log) == 0, scene.log.read_text()
    points = list(range(1, int(count.read_text()) + 1))
    if len(points) > n // 2:
        points = sorted(scene.chance.sample(points, max(1, n // 2)))
    outcome = Outcome("kill -9 at commits and renames")
    for point in points:
        path = scene.path("killed")
        run(lambda path=path, point=point: killed_work(path, point), scene.log)
        after_kill(scene, path, outcome, f"event {point}")
    yield outcome
    outcome = Outcome("kill -9 at random moments")
    while outcome.tries < n - len(points):
        path, wait = scene.path("killed"), scene.chance.uniform(0, scene.seconds)
        pid = start(lambda path=path: killed_work(path, None), scene.log)
        time.sleep(wait)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        end(pid)
        after_kill(scene, path, outcome, f"after {wait:.2f} s")
    yield outcome


SECTION = """
import json, pathlib, time
time.sleep(0.2)
pathlib.Path(results, "{stem}.png").write_bytes(b"png")
pathlib.Path(results, "{stem}.json").write_text(json.dumps({{
    "section": "{stem}", "title": "t", "question": "q", "figure": "{stem}.png", "n": 1, "machine": "m",
    "table": {{"columns": ["steps"], "rows": [[1]]}}, "paper": None, "notes": []}}))
"""


def reports(scene: Scene, n: int) -> Iterator[Outcome]:
    """kill -9 of `reproduce --force` over good results: these stay until new ones are whole."""
    notebooks, results = scene.folder / "notebooks", scene.folder / "results"
    notebooks.mkdir()
    (notebooks / "presets.toml").write_text("[quick]\n")
    for stem in ("01_first", "02_second"):
        cells = [nbformat.v4.new_code_cell("results: str = 'r'", metadata={"tags": ["parameters"]})]
        cells.append(nbformat.v4.new_code_cell(SECTION.format(stem=stem)))
        kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), notebooks / f"{stem}.ipynb"
        )

    def batch(force: bool) -> None:
        ended = reproduce(notebooks=notebooks, results=results, force=force)
        assert all(section.state in ("done", "skipped") for section in ended), ended

    begun = time.monotonic()
    assert run(lambda: batch(False), scene.log) == 0, scene.log.read_text()
    seconds, outcome = time.monotonic() - begun, Outcome("kill -9 of reproduce --force")
    for _ in range(n):
        pid, wait = start(lambda: batch(True), scene.log), scene.chance.uniform(0, seconds)
        time.sleep(wait)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        end(pid)
        files = [
            results / "quick" / f"{stem}{kind}" for stem in ("01_first", "02_second") for kind in (".json", ".ipynb")
        ]
        wrong = [file.name for file in [*files, results / "quick" / "report.html"] if not file.exists()]
        outcome.lost += len(wrong)
        resumed = run(lambda: batch(False), scene.log)
        left = [file.name for file in results.rglob("*.unfinished")]
        outcome.note(
            not wrong and resumed == 0 and not left, f"after {wait:.2f} s: {wrong or left or last_line(scene.log)}"
        )
    yield outcome


# ---------------------------------------------------------------- files


def refused(path: Path, call: Callable[[], object]) -> str:
    """What is wrong with how a call refuses a file, or nothing: our error, which names the file."""
    try:
        call()
    except (ValueError, OSError) as error:
        return "" if path.name in str(error) and not isinstance(error, sqlite3.Error) else f"obscure: {error!r}"
    except Exception as error:
        return f"obscure: {error!r}"
    return "accepted"


def flips(scene: Scene, n: int) -> Iterator[Outcome]:
    """Single bits of a records file: the change is told, or changes nothing that is read."""
    content, outcome = scene.whole.read_bytes(), Outcome("single bit flips in records")
    path, told, harmless = scene.path("flipped"), 0, 0
    for _ in range(n):
        place = scene.chance.randrange(8 * len(content))
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        for log in path.parent.glob("lab.sqlite-*"):
            log.unlink()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                rows = rows_of(path)
                wrong = "" if same(rows, scene.reference.loc[rows.index]) else "a wrong row"
                wrong = wrong or ("" if said or len(rows) == len(scene.reference) else "a row is gone without a word")
                told, harmless = told + bool(said), harmless + (not said and not wrong)
            except (ValueError, OSError) as error:
                wrong = "" if path.name in str(error) else f"obscure: {error!r}"
                told += 1
            except Exception as error:
                wrong = f"obscure: {error!r}"
        outcome.note(not wrong, f"bit {place}: {wrong}")
    outcome.fault += f" ({told} told, {harmless} harmless)"
    yield outcome


def damages(scene: Scene, n: int) -> Iterator[Outcome]:
    """Cut, empty, foreign and newer files are refused before anything is trained."""
    content, outcome = scene.whole.read_bytes(), Outcome("cut, empty, foreign or newer records")
    cut = [content[: scene.chance.randrange(1, len(content))] for _ in range(n)]
    for changed in [*cut, b"", b"text " * 300, b"\0" * 4096, (scene.folder / "log.txt").read_bytes() or b"log"]:
        path = scene.path("damaged")
        path.write_bytes(changed)
        outcome.note(not (wrong := refused(path, lambda path=path: study(path))), f"{len(changed)} bytes: {wrong}")
    for statement in ("PRAGMA user_version = 99", "DROP TABLE scores"):
        path = scene.copy("damaged")
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(statement)
        outcome.note(not (wrong := refused(path, lambda path=path: study(path))), f"{statement}: {wrong}")
    yield outcome


def moved(scene: Scene, n: int) -> Iterator[Outcome]:
    """A file that is moved while a study runs, and put back: the finished pass is kept, and nothing is lost."""
    outcome = Outcome("records moved while running")
    for number in range(n):
        path = scene.path("moved")
        away = path.with_name("away.sqlite")

        def disturbed(path=path, away=away, after=number % 4) -> None:
            put, passes = lab.Records.put, 0

            def moving(self, rows):
                nonlocal passes
                passes += 1
                if passes == after + 1:
                    self.close() if hasattr(self, "close") else None
                    path.rename(away)
                put(self, rows)

            lab.Records.put = moving
            scored = study(path)
            wrong = refused(path, lambda: lab.finetuning_profile(scored))
            assert not wrong and not path.exists(), wrong or "a new file was begun"
            away.rename(path)
            lab.Records.put = put
            lab.finetuning_profile(scored)

        good = run(disturbed, scene.log) == 0 and not scene.ends_well(path)
        outcome.note(good, f"pass {number % 4}: {last_line(scene.log)}")
    yield outcome


def locked(scene: Scene, n: int) -> Iterator[Outcome]:
    """Another process writes for a second, and two studies run on one file."""
    outcome = Outcome("locked records")
    for _ in range(n):
        path = scene.path("locked")
        pid = start(lambda path=path: work(path), scene.log)
        time.sleep(scene.chance.uniform(0, scene.seconds))
        if path.exists():
            with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                time.sleep(1)
                connection.rollback()
        good = end(pid) == 0
        wrong = scene.ends_well(path)
        outcome.note(good and not wrong, wrong or last_line(scene.log))
    yield outcome
    outcome = Outcome("two processes on one file")
    for _ in range(n):
        path = scene.path("shared")
        pids = [start(lambda path=path: work(path), scene.log) for _ in range(2)]
        good = [end(pid) for pid in pids] == [0, 0]
        wrong = scene.ends_well(path)
        outcome.note(good and not wrong, wrong or last_line(scene.log))
    yield outcome


def full(scene: Scene, n: int) -> Iterator[Outcome]:
    """A disk that is full when a pass ends, and then no more; needs root, for a small file system of its own."""
    outcome, disk = Outcome("full disk"), scene.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        outcome.fault += " (skipped: only root can mount a small file system)"
        yield outcome
        return
    try:
        for number in range(n):
            path = disk / f"{number}.sqlite"

            def disturbed(path=path, after=number % 4) -> None:
                put, passes, filler = lab.Records.put, 0, disk / "filler"

                def filling(self, rows):
                    nonlocal passes
                    passes += 1
                    if passes == after + 1:
                        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                            while file.write(b"\1" * 4096):
                                pass
                    put(self, rows)

                lab.Records.put = filling
                scored = study(path)
                wrong = refused(path, lambda: lab.finetuning_profile(scored))
                filler.unlink()
                # What fits into the log's free pages may still be written.
                assert wrong in ("", "accepted"), wrong
                lab.Records.put = put
                lab.finetuning_profile(scored)

            good = run(disturbed, scene.log) == 0 and not scene.ends_well(path)
            outcome.note(good, f"pass {number % 4}: {last_line(scene.log)}")
            for file in disk.glob("*"):
                file.unlink()
        yield outcome
    finally:
        subprocess.run(["umount", str(disk)], capture_output=True)


def readonly(scene: Scene, n: int) -> Iterator[Outcome]:
    """A folder and a file that may only be read: writing is refused before any training."""
    outcome = Outcome("read-only folder and file")
    for protect in ("folder", "file"):
        path = scene.copy(f"protected-{protect}")
        path.chmod(0o444)
        path.parent.chmod(0o555 if protect == "folder" else 0o777)

        def disturbed(path=path) -> None:
            if os.getuid() == 0:
                os.setuid(65534)  # root may write everywhere
            torch.optim.Optimizer.__init__ = None  # whoever trains fails
            wrong = refused(path, lambda: study(path))
            assert not wrong, wrong
            assert same(
                lab.Records(path, readonly=True).table().set_index("key").drop(columns=VARIES).sort_index(),
                scene.reference,
            )

        outcome.note(run(disturbed, scene.log) == 0, f"{protect}: {last_line(scene.log)}")
        path.parent.chmod(0o777)
    yield outcome


# ---------------------------------------------------------------- signals, numbers, memory


def signals(scene: Scene, n: int) -> Iterator[Outcome]:
    """SIGINT and SIGTERM while a study runs: it ends at once, and what was finished stays."""
    for name in ("SIGINT", "SIGTERM"):
        outcome = Outcome(name)
        for _ in range(n):
            path = scene.path("signalled")
            pid, wait = (
                start(lambda path=path: killed_work(path, None), scene.log),
                scene.chance.uniform(0, scene.seconds),
            )
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, name))
            begun = time.monotonic()
            end(pid)
            assert time.monotonic() - begun < 30, f"{name} is not heard"
            after_kill(scene, path, outcome, f"after {wait:.2f} s")
        yield outcome


def command_line(scene: Scene, n: int) -> Iterator[Outcome]:
    """SIGINT in `subtuning-lab profile`: no traceback, and the same command goes on."""
    outcome, path = Outcome("SIGINT in the command line"), scene.path("cli")
    words = ["profile", "--backbone", "lab-resnet", "--task", "digits", "--train-size", "20", "--epochs", "1"]
    words += ["--folds", "2", "--records", str(path)]

    def command(log: Path) -> None:
        result = CliRunner().invoke(app, words)
        log.write_text(result.output)
        os._exit(result.exit_code)

    for number in range(n):
        log, said = path.parent / f"{number}.txt", path.parent / "said.txt"
        pid = start(lambda said=said: command(said), log)
        time.sleep(scene.chance.uniform(0.2, 4))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
        status, text = end(pid), log.read_text() + (said.read_text() if said.exists() else "")
        outcome.note(status in (0, 1, 130) and "Traceback" not in text, f"status {status}: {last_line(log)}")
    log = path.parent / "last.txt"
    outcome.note(run(lambda: command(path.parent / "said.txt"), log) == 0, f"resumed: {last_line(log)}")
    yield outcome


KERNEL_WORK = """
import torch; torch.set_num_threads(1)
import subtuning_lab as lab
from tests.end_to_end.faults import study
patient = study({path!r}, lab.Recipe(epochs=100_000, batch_size=8))
print("ready", flush=True)
lab.finetuning_profile(patient)
"""


def kernel(scene: Scene, n: int) -> Iterator[Outcome]:
    """SIGINT in a notebook's kernel: KeyboardInterrupt within seconds, and the kernel works on."""
    from jupyter_client.manager import start_new_kernel

    outcome, path = Outcome("SIGINT in a kernel"), scene.path("kernel")
    manager, client = start_new_kernel(
        cwd=str(Path(__file__).parents[2]), extra_arguments=["--IPKernelApp.log_level=40"]
    )

    def answer(request: str) -> dict[str, object]:
        while (message := client.get_shell_msg(timeout=PATIENCE_S))["parent_header"]["msg_id"] != request:
            pass
        return message["content"]

    try:
        for _ in range(n):
            request = client.execute(KERNEL_WORK.format(path=str(path)), stop_on_error=False)
            while "ready" not in str(client.get_iopub_msg(timeout=PATIENCE_S)["content"].get("text")):
                pass
            time.sleep(scene.chance.uniform(0, 2))
            begun = time.monotonic()
            manager.interrupt_kernel()
            reply = answer(request)
            outcome.note(reply.get("ename") == "KeyboardInterrupt" and time.monotonic() - begun < 10, str(reply)[:200])
        went_on = answer(client.execute(f"from tests.end_to_end.faults import work; work({str(path)!r})"))
        outcome.note(went_on["status"] == "ok", f"the kernel does not go on: {went_on}")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    yield outcome


def divergence(scene: Scene, n: int) -> Iterator[Outcome]:
    """Recipes that diverge: the others' rows are written, and no other number changes."""
    outcome = Outcome("diverging candidates")
    for lr in [1e6, 1e18, 1e30][: max(1, n)]:
        path = scene.path("diverging")

        def disturbed(path=path, lr=lr) -> None:
            good, bad = RECIPE, lab.Recipe(epochs=2, batch_size=8, lr=lr, head_lr=lr)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                table = study(path, [good, bad]).scores([["block1"], ["block2"]])
            assert table["lr"].eq(RECIPE.lr).all() and table["accuracy"].between(0, 1).all(), table

        good = run(disturbed, scene.log) == 0
        rows = rows_of(path)
        sound = scene.reference.index.intersection(rows.index)
        good &= len(sound) == 8 and same(rows.loc[sound], scene.reference.loc[sound])
        outcome.note(good, f"lr {lr:g}: {last_line(scene.log)}")
    yield outcome


class Shortage(TorchDispatchMode):
    """Raises as the allocator does at the operation number `at` that makes a tensor; None notes where they are made.

    A site is a line of the package with an operation that is called there, or for it in a backward.
    """

    def __init__(self, at: int | None):
        super().__init__()
        self.at, self.made = at, 0
        self.sites: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and function not in _VIEWS:
            self.made += 1
            if self.at is None:
                self.sites.setdefault(f"{_line_of_ours()}: {function}", []).append(self.made)
            if self.made == self.at:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 1 bytes"
                )
        return made


def _line_of_ours() -> str:
    """The innermost line of the package that is being run."""
    frame = sys._getframe()
    while frame and "/subtuning_lab/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "outside"


_VIEWS = {getattr(torch.ops.aten, name).default for name in ("view", "t", "detach", "expand", "permute", "alias")}


def shortage(scene: Scene, n: int) -> Iterator[Outcome]:
    """Out of memory at one allocation of each site: the same table, or an error that says that memory is short."""
    noted = scene.folder / "sites.json"

    def disturbed(path: Path, at: int | None) -> None:
        scored = study(path, seeds=(0,))
        try:
            with Shortage(at) as mode:
                lab.finetuning_profile(scored)
            noted.write_text(json.dumps(mode.sites))
        except (RuntimeError, MemoryError) as error:
            assert str(error).startswith("not enough memory"), repr(error)
        lab.finetuning_profile(study(path, seeds=(0,)))

    assert run(lambda: disturbed(scene.path("measured"), None), scene.log) == 0, scene.log.read_text()
    sites = json.loads(noted.read_text())
    chosen = list(sites) if n >= len(sites) else scene.chance.sample(list(sites), n)
    made = sum(map(len, sites.values()))
    outcome = Outcome(f"out of memory at {len(chosen)} of {len(sites)} sites of {made} allocations")
    for site in chosen:
        path, at = scene.path("short"), scene.chance.choice(sites[site])
        good = run(lambda path=path, at=at: disturbed(path, at), scene.log) == 0
        rows = rows_of(path)  # a pass that is split, or stores no trunk, rounds otherwise
        good_rows = len(rows) == len(scene.reference) // 2 and same(rows, scene.reference.loc[rows.index], rounded=True)
        wrong = last_line(scene.log) if not good else "" if good_rows else "another table"
        outcome.note(not wrong, f"{site}, allocation {at}: {wrong}")
    yield outcome


def memory(scene: Scene, n: int) -> Iterator[Outcome]:
    """Resident memory over studies that train: it grows by less than 30 MB over 200."""
    outcome, grown = Outcome(f"resident memory over {n} studies"), scene.folder / "grown.txt"

    def studies() -> None:
        backbone, process = lab.load_backbone("lab-resnet"), psutil.Process()
        task = lab.load_task("digits", train_size=20, test_size=10, progress=False)
        for number in range(n + 5):
            options = {"folds": 2, "device": "cpu", "progress": False}
            lab.Study(backbone, task, lab.Recipe(epochs=1, batch_size=10), **options).scores([["layer3.2"], []])
            if number == 4:  # allocators have what they need
                gc.collect()
                before = process.memory_info().rss
        gc.collect()
        grown.write_text(str((process.memory_info().rss - before) / 2**20))

    status = end(start(studies, scene.log), patience=PATIENCE_S + 10 * n)
    size = float(grown.read_text()) if status == 0 else float("nan")
    outcome.fault += f": {size:+.1f} MB"
    outcome.note(size < 30, last_line(scene.log))
    yield outcome


def wrong(scene: Scene, n: int) -> Iterator[Outcome]:
    """Calls of the public surface with one wrong value: an error of ours that names it, before any training."""
    outcome, material = Outcome("wrong calls"), Material(scene.folder)
    calls = wrong_calls()
    for call in scene.chance.sample(calls, min(n, len(calls))):
        fault = call.fault(material)
        outcome.note(not fault, f"{call}: {fault}")
        plt.close("all")
    yield outcome


#: fault -> (what tries it, how often in the short version, how often for each kill of the long one)
FAULTS: dict[str, tuple[Callable[[Scene, int], Iterator[Outcome]], int, float]] = {
    "kills": (kills, 8, 1.0),
    "flips": (flips, 40, 6.0),
    "damages": (damages, 3, 0.2),
    "moved": (moved, 1, 0.08),
    "locked": (locked, 1, 0.1),
    "full": (full, 2, 0.08),
    "readonly": (readonly, 1, 0.1),
    "signals": (signals, 2, 0.2),
    "divergence": (divergence, 1, 0.06),
    "shortage": (shortage, 4, 8.0),
    "memory": (memory, 10, 4.0),
    "reports": (reports, 1, 0.2),
    "command_line": (command_line, 1, 0.1),
    "kernel": (kernel, 1, 0.1),
    "wrong_calls": (wrong, 20, 6.0),
}


def main() -> int:
    """Tries the faults, prints a table, and returns 1 where one is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; by default all")
    parser.add_argument("--kills", type=int, default=50, help="kills of a study; other faults in proportion")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.faults) - set(FAULTS):
        parser.error(f"unknown fault {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # another user reads it, too
        scene = Scene(Path(folder), options.seed)
        print(f"one undisturbed run: {scene.seconds:.2f} s, {len(scene.reference)} rows", flush=True)
        for name in options.faults or FAULTS:
            task, _, share = FAULTS[name]
            for outcome in task(scene, max(1, round(share * options.kills))):
                outcomes.append(outcome)
                print(
                    f"{outcome.fault}: {outcome.survived} of {outcome.tries} as promised, {outcome.lost} lost, "
                    f"at most {outcome.repeated} passes repeated",
                    *outcome.notes,
                    sep="\n    ",
                    flush=True,
                )
    return int(not all(outcome.good for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
