"""Records survive crashes, several processes and foreign files; a row is there whole or not at all."""

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import subtuning_lab.study.records
from subtuning_lab import Recipe, Study, finetuning_profile
from subtuning_lab.study.records import Records, RecordsError, record_key
from tests.helpers import tiny_chain, tiny_task

ROW = {
    "key": "k",
    "split": "fold",
    "backbone": "tiny",
    "task": "tiny",
    "blocks": ["block1"],
    "fold": 0,
    "seed": 0,
    "accuracy": 0.5,
    "loss": 1.25,
    "n_train": 8,
    "n_scored": 4,
    "params": 10,
    "flops": 1e15,
    "epochs": 2,
    "seconds": 0.5,
    "device": "cpu",
    "recipe": {"lr": 0.1},
    "determined_by": {"engine": 1},
}


@pytest.fixture(params=["file", "memory"])
def records(request, tmp_path):
    return Records(tmp_path / "new" / "folder" / "r.sqlite" if request.param == "file" else ":memory:")


def test_rows_come_back_as_they_went_in(records):
    records.put([ROW, ROW | {"key": "t", "split": "test", "fold": None, "loss": None, "accuracy": 1.0}])
    rows = records.get(["k", "t", "absent"])
    assert set(rows) == {"k", "t"}
    missing = {"status": "ok", "balanced_accuracy": None, "confusion": None, "threads": None}
    assert {name: value for name, value in rows["k"].items() if name != "created"} == ROW | missing
    assert rows["t"]["fold"] is None and rows["t"]["loss"] is None
    table = records.table()
    assert table["key"].tolist() == ["k", "t"] and set(table) == {*ROW, *missing, "created"}
    assert table["blocks"].tolist() == [["block1"]] * 2


def test_thousands_of_keys_are_found(records):
    records.put(ROW | {"key": f"k{i}"} for i in range(1500))
    assert len(records.get([f"k{i}" for i in range(2000)])) == 1500
    assert records.get([]) == {}


def test_the_first_row_of_a_key_stays(records):
    records.put([ROW])
    records.put([ROW | {"accuracy": 0.9}, ROW | {"key": "new"}])
    assert records.get(["k"])["k"]["accuracy"] == 0.5 and len(records.table()) == 2


WRONG_ROWS = {
    "accuracy above 1": {"accuracy": 1.5},
    "accuracy below 0": {"accuracy": -0.1},
    "no accuracy": {"accuracy": None},
    "accuracy that is no number": {"accuracy": math.nan},
    "unknown split": {"split": "train"},
    "no task": {"task": None},
    "unknown column": {"speed": 3},
    "an object": {"params": object()},
}


@pytest.mark.parametrize("change", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_wrong_row_is_refused_with_all_rows_of_its_pass(records, change):
    with pytest.raises(ValueError, match=r"not a score: .*\w"):
        records.put([ROW, ROW | {"key": "second"} | change])
    assert len(records.table()) == 0
    records.put([ROW])  # the store still works
    assert len(records.table()) == 1


def test_a_missing_column_is_named(records):
    with pytest.raises(ValueError, match="seconds"):
        records.put([{name: value for name, value in ROW.items() if name != "seconds"}])
    assert len(records.table()) == 0


def test_a_loss_that_is_no_number_reads_as_missing(records):
    records.put([ROW | {"loss": math.nan}])
    assert records.table()["loss"].isna().all()
    assert records.get(["k"])["k"]["accuracy"] == 0.5


def test_test_uses_are_counted_per_study(records):
    assert records.test_uses() == records.test_uses("a") == 0
    assert [records.count_test(study) for study in ("a", "b", "a")] == [1, 1, 2]
    assert (records.test_uses("a"), records.test_uses("b"), records.test_uses()) == (2, 1, 3)


def test_a_key_follows_values_not_their_order():
    base = {"a": 1, "b": {"c": 2.0, "d": [1, 2]}}
    assert record_key(base) == record_key({"b": {"d": [1, 2], "c": 2.0}, "a": 1})
    others = [
        {"a": 2, "b": base["b"]},
        {"a": 1, "b": {"c": 2.5, "d": [1, 2]}},
        {"a": 1, "b": {"c": 2.0, "d": [2, 1]}},
        {"a": 1},
    ]
    assert len({record_key(value) for value in (base, *others)}) == 5


# ---------------------------------------------------------------- files


def test_a_store_is_found_again(tmp_path):
    Records(tmp_path / "r.sqlite").put([ROW])
    assert Records(str(tmp_path / "r.sqlite")).get(["k"])["k"]["blocks"] == ["block1"]


def foreign_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE recipes_for_cakes (name TEXT)")


def newer_store(path: Path) -> None:
    Records(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:  # the last one writes all into the file
        connection.execute("PRAGMA user_version = 99")


def changed_store(path: Path, change: str) -> None:
    Records(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"ALTER TABLE scores {change}")


FOREIGN = {
    "text": (lambda path: path.write_text("not a database " * 100), "is not a records file"),
    "another database": (foreign_database, "recipes_for_cakes"),
    "a newer version": (newer_store, "version 99; this package reads up to 2"),
    "a lost column": (lambda path: changed_store(path, "DROP COLUMN loss"), "missing or unknown are loss"),
    "a column more": (lambda path: changed_store(path, "ADD COLUMN mark"), "missing or unknown are mark"),
    "a folder": (Path.mkdir, "is not a records file but a folder"),
    "a pipe": (os.mkfifo, "is not a records file but a pipe"),
}


@pytest.mark.parametrize(("make", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused_and_left_alone(tmp_path, make, message):
    path = tmp_path / "r.sqlite"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for readonly in (False, True):
        with pytest.raises(ValueError, match=message):
            Records(path, readonly=readonly)
    assert before is None or path.read_bytes() == before


WRITER = """
import sys
from subtuning_lab.study.records import Records
path, name = sys.argv[1:]
sys.stdin.readline()
records = Records(path)
for i in range(40):
    records.put([{row} | {{"key": f"{{name}}-{{i}}-{{j}}", "backbone": name}} for j in range(3)])
    records.put([{row} | {{"key": f"both-{{i}}"}}])
    records.count_test("shared")
"""


def environment() -> dict[str, str]:
    """For a further process: the same modules, and as many threads, whose number decides the last bits of sums."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_two_processes_write_at_once(tmp_path):
    path = tmp_path / "r.sqlite"
    command = [sys.executable, "-c", WRITER.format(row=repr(ROW)), path]
    writers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True)
        for name in ("a", "b")
    ]
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(lambda writer: writer.communicate("go\n", timeout=120)[1], writers))
    assert [writer.returncode for writer in writers] == [0, 0], errors
    table = Records(path).table()
    assert len(table) == 2 * 40 * 3 + 40 and table["key"].is_unique
    assert Records(path).test_uses("shared") == 80


def test_threads_may_make_a_store_at_once(tmp_path):
    for attempt in range(5):
        path = tmp_path / f"{attempt}.sqlite"
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda i, path=path: Records(path).put([ROW | {"key": str(i)}]), range(12)))
        assert len(Records(path).table()) == 12


# ---------------------------------------------------------------- kill -9

KILLED = """
import os, signal, sys
from tests.helpers import tiny_chain, tiny_task
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.study.study import Study
from subtuning_lab.search.profiles import finetuning_profile

def kill(trained, total):
    if trained == {steps}:
        os.kill(os.getpid(), signal.SIGKILL)

study = Study(
    tiny_chain(), tiny_task(), Recipe(epochs=2, batch_size=4), folds=3, device="cpu", records=sys.argv[1],
    memory_limit=1, progress=kill,
)
finetuning_profile(study)
"""
STEPS = 2 * 4  # of one training: 16 of 24 images, in batches of 4, twice


def profile_of(path, progress=False, **options):
    study = Study(
        tiny_chain(),
        tiny_task(),
        Recipe(epochs=2, batch_size=4),
        folds=3,
        device="cpu",
        records=path,
        progress=progress,
        **options,
    )
    return finetuning_profile(study)


def without_times(table):
    return table.drop(columns=["seconds"], errors="ignore").reset_index(drop=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    finished = 4  # trainings, then killed within the fifth
    code = KILLED.format(steps=finished * STEPS + 3)
    path = tmp_path / "r.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = Records(path).table()
    assert finished - 1 <= len(kept) <= finished  # linear probing shares its pass, so it may end with another
    assert kept.drop(columns=["confusion"]).notna().all(axis=None)

    trained = []
    resumed = profile_of(path, progress=lambda now, total: trained.append((now, total)), memory_limit=1)
    n_subsets, n_folds = 5, 3
    assert trained[-1] == ((n_subsets * n_folds - len(kept)) * STEPS,) * 2
    uninterrupted = profile_of(None, memory_limit=1)
    assert without_times(resumed.scores).equals(without_times(uninterrupted.scores))
    assert resumed.table.equals(uninterrupted.table)
    assert Records(path).table().iloc[: len(kept)].equals(kept)

    trained.clear()
    assert profile_of(path, progress=lambda *step: trained.append(step)).table.equals(resumed.table)
    assert trained == []


def test_a_run_that_is_stopped_keeps_finished_passes(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(trained, total):
        if trained > 3 * STEPS:
            raise StoppedError

    path = tmp_path / "r.sqlite"
    with pytest.raises(StoppedError):
        profile_of(path, progress=stop, memory_limit=1)
    kept = len(Records(path).table())
    assert 2 <= kept <= 3
    trained = []
    profile_of(path, progress=lambda *step: trained.append(step))
    assert trained[-1] == ((15 - kept) * STEPS,) * 2


def test_a_training_that_diverges_is_a_row_that_says_so(tmp_path):
    recipe = Recipe(epochs=2, batch_size=4, lr=1e30)
    options = {"folds": 2, "device": "cpu", "records": tmp_path / "r.sqlite", "progress": False}
    study = Study(tiny_chain(), tiny_task(), recipe, **options)
    table = study.scores([["block1"]])
    assert table[["accuracy", "loss", "balanced_accuracy", "score"]].isna().all(axis=None)
    assert table["status"].tolist() == ["diverged"] * 2 == study.records.table()["status"].tolist()
    trained = []
    again = Study(tiny_chain(), tiny_task(), recipe, **options | {"progress": lambda *step: trained.append(step)})
    assert again.scores([["block1"]]).equals(table) and trained == [], "it is not tried again"
    with pytest.raises(ValueError, match="training of block1 diverged; give a lower learning rate than 1e"):
        study.fit(["block1"])
    result = study.test(["block1"])
    assert math.isnan(result.mean) and result.confusion is None


def test_choices_come_back_and_keep_their_first_value(tmp_path):
    records = Records(tmp_path / "r.sqlite")
    assert records.get_choice("q") is None
    records.put_choice("q", {"images": [5, 2]}, {"seed": 0})
    records.put_choice("q", {"images": [1]}, {"seed": 0})
    assert Records(tmp_path / "r.sqlite").get_choice("q") == {"images": [5, 2]}


# ---------------------------------------------------------------- damage, full disks and other misfortune


def filled(path, rows=40):
    """A store with rows, a choice and a use of the test split, and everything that it says."""
    records = Records(path)
    records.put(ROW | {"key": record_key({"i": i}), "seed": i, "accuracy": i / rows} for i in range(rows))
    records.put_choice("q", {"images": [5, 2]}, {"seed": 0})
    records.count_test("s")
    records.close()
    return said(path)


def said(path):
    """All that a store says; None for a row that it lost."""
    records = Records(path)
    rows = records.get([record_key({"i": i}) for i in range(40)])
    everything = [rows.get(record_key({"i": i})) for i in range(40)]
    return everything, records.table(), records.get_choice("q"), records.test_uses("s")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*damaged rows")
def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    """Noticed: the file is refused, or a row is missing and computed again. No number is another one."""
    path, random = tmp_path / "r.sqlite", np.random.default_rng(0)
    rows, table, choice, uses = filled(path)
    sound, refused, recomputed = path.read_bytes(), 0, 0
    for byte, bit in zip(random.integers(len(sound), size=300), random.integers(8, size=300), strict=True):
        content = bytearray(sound)
        content[byte] ^= 1 << bit
        path.write_bytes(content)
        try:
            found, now, chosen, used = said(path)
        except RecordsError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        for row, expected in zip(found, rows, strict=True):
            assert row is None or row == expected
        recomputed += found.count(None)
        assert now.merge(table[["key", "accuracy", "seed"]], on=["key", "accuracy", "seed"]).shape[0] == len(now)
        assert len(now) == 40 - found.count(None) and chosen in (choice, None) and used == uses
    assert refused > 30 and recomputed > 30


def test_a_damaged_row_is_named_set_aside_and_computed_again(tmp_path):
    path = tmp_path / "r.sqlite"
    Records(path).put([ROW, ROW | {"key": "other", "accuracy": 0.25}])
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE scores SET accuracy = 0.75 WHERE key = 'other'")
    records = Records(path)
    with pytest.warns(UserWarning, match=r"r.sqlite: 1 damaged rows are not used: other"):
        assert set(records.get(["k", "other"])) == {"k"}
    records.put([ROW | {"key": "other", "accuracy": 0.25}])
    assert Records(path).get(["other"])["other"]["accuracy"] == 0.25
    with sqlite3.connect(path) as connection:
        assert "0.75" in connection.execute("SELECT content FROM damaged").fetchone()[0]


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_file_the_message_is_ours(tmp_path, data):
    path = tmp_path / "r.sqlite"
    for name in ("r.sqlite", "r.sqlite-wal", "r.sqlite-shm"):  # of the last example
        (tmp_path / name).unlink(missing_ok=True)
    filled(path, rows=3)
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content)))
    kind, extra = data.draw(st.sampled_from(["cut", "write", "insert"])), data.draw(st.binary(min_size=1, max_size=300))
    end = {"cut": len(content), "write": start + len(extra), "insert": start}[kind]
    content[start:end] = b"" if kind == "cut" else extra
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            said(path)
        except ValueError as error:  # of what the file is; or of its reading, which is a RecordsError
            assert str(path) in str(error)


def test_the_first_releases_store_opens_with_its_rows(tmp_path):
    fixture = Path(__file__).parents[1] / "fixtures" / "records_of_0.1.0.sqlite"
    path = tmp_path / "old.sqlite"
    shutil.copy(fixture, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        before = [dict(row) for row in connection.execute("SELECT * FROM scores ORDER BY created, rowid")]
        uses = connection.execute("SELECT count(*) FROM test_uses").fetchone()[0]
    assert len(before) == 4
    for readonly in (True, False):
        records = Records(path, readonly=readonly)
        table = records.table()
        for row, old in zip(table.to_dict("records"), before, strict=True):
            assert {name: row[name] for name in old if name not in ("blocks", "recipe", "determined_by", "fold")} == {
                name: old[name] for name in old if name not in ("blocks", "recipe", "determined_by", "fold")
            }
            assert row["recipe"] == json.loads(old["recipe"]) and row["status"] == "ok" and row["confusion"] is None
        assert records.test_uses() == uses and set(records.get([row["key"] for row in before])) == set(table["key"])
    records.put([ROW])
    assert len(Records(path).table()) == 5


def test_an_empty_file_is_no_new_store(tmp_path):
    path = tmp_path / "r.sqlite"
    path.touch()
    with pytest.raises(RecordsError, match="r.sqlite is empty: no records file.*to begin a new one, delete it"):
        Records(path)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Records("~/lab/r.sqlite").put([ROW])
    assert len(Records(tmp_path / "lab" / "r.sqlite").table()) == 1


def test_what_is_only_read_may_be_read_only(tmp_path):
    path = tmp_path / "folder" / "r.sqlite"
    with Records(path) as records:
        records.put([ROW])
    assert [file.name for file in path.parent.iterdir()] == ["r.sqlite"], "the log is in the file"
    before = path.read_bytes()
    reader = Records(path, readonly=True)
    assert reader.get(["k"])["k"]["accuracy"] == 0.5 and len(reader.table()) == 1
    for write in (lambda: reader.put([ROW | {"key": "n"}]), lambda: reader.count_test("s")):
        with pytest.raises(RecordsError, match="readonly=True; nothing can be written"):
            write()
    assert path.read_bytes() == before
    with pytest.raises(RecordsError, match="can't be used: unable to open.*moved or deleted"):
        Records(tmp_path / "absent.sqlite", readonly=True)
    assert not (tmp_path / "absent.sqlite").exists()


FAULTS = {
    "attempt to write a readonly database": "readonly=True.* reads it",
    "database or disk is full": "free some space",
    "database is locked": "another process",
    "disk I/O error": "I/O error",
}


class Failing:
    """SQLite's connections, of which writes fail while they are told to."""

    def __init__(self, monkeypatch):
        self.message, real, failing = None, sqlite3.connect, self

        class Connection(sqlite3.Connection):
            def executemany(self, *given):
                if failing.message is not None:
                    raise sqlite3.OperationalError(failing.message)
                return super().executemany(*given)

            def execute(self, statement, *given):
                if failing.message is not None and statement.startswith(("BEGIN", "PRAGMA user_version =")):
                    raise sqlite3.OperationalError(failing.message)
                return super().execute(statement, *given)

        monkeypatch.setattr(sqlite3, "connect", lambda *given, **options: real(*given, factory=Connection, **options))
        monkeypatch.setattr(subtuning_lab.study.records, "_WAITS_S", (0.0, 0.0))


@pytest.mark.parametrize(("message", "advice"), FAULTS.items())
def test_a_file_that_cannot_be_written_is_told_before_any_training(tmp_path, monkeypatch, message, advice):
    path, failing = tmp_path / "r.sqlite", Failing(monkeypatch)
    Records(path)
    failing.message = message
    with pytest.raises(
        RecordsError, match=f"r.sqlite can't be used: {message}.*{advice if advice not in message else ''}"
    ):
        Records(path)


@pytest.mark.parametrize("message", FAULTS)
def test_a_finished_pass_outlives_a_failed_write(tmp_path, monkeypatch, message):
    path, failing = tmp_path / "r.sqlite", Failing(monkeypatch)
    records, steps = Records(path), []
    options = {"folds": 2, "device": "cpu", "records": records, "progress": lambda *step: steps.append(step)}
    study = Study(tiny_chain(), tiny_task(), Recipe(epochs=1), **options)
    failing.message = message
    with pytest.raises(RecordsError, match=f"{message}.*1 finished scores wait"):
        study.scores([["block1"]])
    trained = steps[-1][0]
    with pytest.raises(RecordsError):
        study.scores([["block1"]])
    assert steps[-1][0] == trained, "before more is trained"
    failing.message = None
    expected = Study(tiny_chain(), tiny_task(), Recipe(epochs=1), folds=2, device="cpu", progress=False)
    table = study.scores([["block1"]])
    assert without_times(table).equals(without_times(expected.scores([["block1"]])))
    assert steps[-1] == (1, 1) and len(Records(path).table()) == 2, "the second fold alone was trained"


def test_a_write_that_fails_once_is_tried_again(tmp_path, monkeypatch):
    path, failing = tmp_path / "r.sqlite", Failing(monkeypatch)
    records, failing.message = Records(path), "database is locked"
    monkeypatch.setattr(subtuning_lab.study.records.time, "sleep", lambda seconds: setattr(failing, "message", None))
    records.put([ROW])
    assert len(records.table()) == 1


def test_a_file_that_is_moved_away_is_told_and_found_again(tmp_path):
    path, aside = tmp_path / "r.sqlite", tmp_path / "moved.sqlite"
    records = Records(path)
    path.rename(aside)
    with pytest.raises(RecordsError, match="moved or deleted.*put it back.*1 finished scores wait"):
        records.put([ROW])
    assert not path.exists(), "no empty store in its place"
    aside.rename(path)
    assert records.get(["k"])["k"]["accuracy"] == 0.5


@pytest.mark.slow
def test_ten_thousand_scores_are_read_in_a_second(tmp_path):
    records, keys = Records(tmp_path / "r.sqlite"), [record_key({"i": i}) for i in range(10_000)]
    values = {"recipe": Recipe().as_dict(), "determined_by": {"recipe": Recipe().as_dict(), "backbone": "f" * 64}}
    records.put(ROW | values | {"key": key} for key in keys)
    best = math.inf
    for _ in range(3):
        start = time.process_time()  # others work on this machine, too
        assert len(Records(records.path).get(keys)) == 10_000
        best = min(best, time.process_time() - start)
    assert best < 1
