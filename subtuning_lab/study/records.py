"""The run store: one SQLite row per score, written when its pass ends, so that a killed run resumes. No torch."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from subtuning_lab.study.schema import (
    COLUMNS,
    JSON_COLUMNS,
    SCHEMA_VERSION,
    create_tables,
    is_sound,
    migrate,
    now,
    stored_row,
    version_of,
    with_checksum,
)
from subtuning_lab.utils.files import expanded, replacing
from subtuning_lab.utils.validation import Is, Several, Text, checked

Row = dict[str, Any]
_WAITS_S = (0.2, 1.0)  # before a failed write is tried again
_LOCK_S = 60  # how long SQLite waits for another process's writing
_ADVICE = {
    "locked": "another process is writing to it: wait for it, or give another file",
    "readonly": "Records(path, readonly=True) reads it; to write, give a file in a folder of your own",
    "full": "the disk is full: free some space, and ask again",
    "unable to open": "it was moved or deleted, or its folder can't be written to: put it back, or give another file",
    "malformed": "it is damaged: take a copy of it from before, or save what is left with `sqlite3 FILE .recover`",
    "no such column": "it is damaged: take a copy of it from before, or save what is left with `sqlite3 FILE .recover`",
}


class RecordsError(OSError, ValueError):
    """A records file that can't be read or written, with the path and what to do."""


def record_key(determined_by: Mapping[str, object]) -> str:
    """SHA-256 of everything that determines a score; equal mappings have equal keys in any order."""
    return hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()


class Records:
    """Scores that survive any crash.

    A row is there whole or not at all: rows of a pass are written in one transaction. Several processes may read
    while one writes (SQLite's write-ahead log). While a process writes, and after it was killed, a file of the same
    name that ends in `-wal` holds the newest rows and belongs to the file: copy or move both, or `close` first, which
    puts everything into the one file. Rows carry a checksum: one that was damaged on the disk is named in a warning,
    set aside, and computed again.

    Args:
        path: of the SQLite file, made with its folder when missing; ":memory:" keeps records for this object only.
        readonly: nothing is written, so that the file may be one that can't be, or of an earlier release.
    Raises:
        RecordsError: a file that is no such store, an empty one, one of a newer version, or one that can't be written
            though it is to be; before anything is trained. It is an OSError and a ValueError.
    """

    @checked(path=Is((str, Path)))
    def __init__(self, path: str | Path, readonly: bool = False):
        self.path, self.readonly = expanded(path), readonly
        self._kept: dict[str, Row] = {}  # finished rows that could not be written yet
        self._memory: sqlite3.Connection | None = None
        self._options = "mode=ro" if readonly else "mode=rw"
        if str(path) == ":memory:":
            self._memory = sqlite3.connect(":memory:", check_same_thread=False)
            create_tables(self._memory)
        elif not self.path.exists() and not readonly:
            self._create()
        self._examine()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @checked(keys=Several(Text(), least=0))
    def get(self, keys: Sequence[str]) -> dict[str, Row]:
        """The rows that are there, by key."""
        self._write_kept()
        rows: list[sqlite3.Row] = []
        with self._connection() as connection:
            for start in range(0, len(keys), 500):  # SQLite bounds the variables of a statement
                chunk = keys[start : start + 500]
                marks = ", ".join("?" * len(chunk))
                rows += connection.execute(f"SELECT rowid, * FROM scores WHERE key IN ({marks})", chunk)
        return {row["key"]: row for row in self._sound(rows)}

    @checked(rows=Is(Iterable))
    def put(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Writes rows in one transaction; a key that is there already keeps its row.

        Args:
            rows: a value per column, `created` and those that may be missing apart; `blocks`, `recipe`, `confusion` and
                `determined_by` are stored as JSON.
        Raises:
            ValueError: a missing or unknown column, or a value that a column does not allow; nothing is written.
            RecordsError: the file can't be written. The rows are kept, and written with the next call that can.
        """
        rows = [stored_row(row) for row in rows]
        self._kept |= {row["key"]: row for row in rows}
        try:
            self._write_kept()
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, OverflowError) as error:
            for row in rows:
                del self._kept[row["key"]]
            raise ValueError(f"not a score: {error}") from error

    @checked(study=Text())
    def count_test(self, study: str) -> int:
        """Notes one use of a study's test split; returns how many there have been."""
        use = with_checksum({"study": study, "created": now()})
        self._write("INSERT INTO test_uses (study, created, checksum) VALUES (:study, :created, :checksum)", [use])
        return self.test_uses(study)

    @checked(study=Text(none=True))
    def test_uses(self, study: str | None = None) -> int:
        """How often the test split was used: by one study, or by all. A damaged note counts for every study."""
        with self._connection() as connection:
            rows = connection.execute("SELECT * FROM test_uses").fetchall()
        return sum(study in (None, row["study"]) or not is_sound(row) for row in rows)

    @checked(key=Text())
    def get_choice(self, key: str) -> dict[str, object] | None:
        """What was noted under a key with `put_choice`, None if nothing."""
        with self._connection() as connection:
            row = connection.execute("SELECT rowid, * FROM choices WHERE key = ?", (key,)).fetchone()
        if row is None or is_sound(row):
            return None if row is None else json.loads(row["chosen"])
        self._set_aside("choices", [row])
        return None

    @checked(key=Text(), chosen=Is(Mapping), determined_by=Is(Mapping))
    def put_choice(self, key: str, chosen: Mapping[str, object], determined_by: Mapping[str, object]) -> None:
        """Notes what a trained network chose, such as images to label; a key that is there already keeps its row.

        Args:
            key: `record_key` of what determines it.
            chosen, determined_by: plain values, stored as JSON.
        """
        row = {"key": key, "chosen": json.dumps(chosen, sort_keys=True)}
        row |= {"determined_by": json.dumps(determined_by, sort_keys=True), "created": now()}
        self._write(_insertion("choices", row), [with_checksum(row)])

    def table(self) -> pd.DataFrame:
        """All rows, oldest first."""
        with self._connection() as connection:
            rows = connection.execute("SELECT rowid, * FROM scores ORDER BY created, rowid").fetchall()
        return pd.DataFrame(self._sound(rows), columns=list(COLUMNS))

    def close(self) -> None:
        """Writes what is kept, and puts the write-ahead log into the file, which then is whole by itself."""
        self._write_kept()
        if not self.readonly and self._memory is None:
            with self._connection() as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _create(self) -> None:
        """A new store, which appears at its path whole; of several processes, the first one's stays."""
        try:
            with replacing(self.path, keep=True) as part, closing(sqlite3.connect(part)) as connection:
                create_tables(connection)
                connection.execute("PRAGMA journal_mode = WAL")
        except (OSError, sqlite3.Error) as error:
            raise RecordsError(f"{self.path} can't be made: {error}; give a file in a folder of your own") from error

    def _examine(self) -> None:
        """Raises unless it is a sound store that can be used as asked; an earlier release's is brought up to date."""
        if self._memory is None and self.path.is_file() and self.path.stat().st_size == 0:
            raise RecordsError(
                f"{self.path} is empty: no records file, but perhaps a copy that failed; to begin a new one, delete it"
            )
        if self._memory is None and self.path.exists() and not self.path.is_file():  # reading a pipe would not end
            kind = "a folder" if self.path.is_dir() else "a pipe or a device"
            raise RecordsError(f"{self.path} is not a records file but {kind}")
        self._options += self._without_log()
        with self._connection() as connection:
            version = version_of(connection, self.path)
            faults = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if faults != "ok":
                raise sqlite3.DatabaseError(f"malformed: {' '.join(faults.split())}")
            if not self.readonly:
                migrate(connection, version)
                with connection:  # a write, so that a file that can't be written is told before any training
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _without_log(self) -> str:
        """What reads a store in a folder that can't be written to: SQLite wants a log there otherwise."""
        if not self.readonly:
            return ""
        try:
            with closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
                connection.execute("SELECT name FROM sqlite_master").fetchall()
        except sqlite3.OperationalError:
            return "&immutable=1" if self.path.is_file() and not Path(f"{self.path}-wal").exists() else ""
        except sqlite3.Error:
            return ""
        return ""

    def _write_kept(self) -> None:
        """Writes rows that wait for it, once more where that fails at first."""
        if self._kept:
            self._write(_insertion("scores", [*COLUMNS, "checksum"]), list(self._kept.values()))
            self._kept.clear()

    def _write(self, statement: str, rows: Sequence[Mapping[str, object]]) -> None:
        if self.readonly:
            raise RecordsError(f"{self.path} was opened with readonly=True; nothing can be written to it")
        for wait in (*_WAITS_S, None):
            try:
                with self._connection() as connection, connection:
                    connection.executemany(statement, rows)
                return
            except RecordsError as error:
                if wait is None:
                    waiting = f"; {len(self._kept)} finished scores wait, and are written as soon as that is possible"
                    raise RecordsError(f"{error}{waiting if self._kept else ''}") from error
                time.sleep(wait)

    def _sound(self, rows: Sequence[sqlite3.Row]) -> list[Row]:
        """Rows as they were written; damaged ones are set aside."""
        damaged = [row for row in rows if not is_sound(row)]
        if damaged:
            self._set_aside("scores", damaged)
        return [_decoded(row) for row in rows if is_sound(row)] if damaged else [_decoded(row) for row in rows]

    def _set_aside(self, table: str, rows: Sequence[sqlite3.Row]) -> None:
        names = "; ".join(f"{str(row['key'])[:12]} ({', '.join(map(repr, tuple(row)[2:8]))})"[:160] for row in rows[:5])
        warnings.warn(f"{self.path}: {len(rows)} damaged rows are not used: {names}", stacklevel=4)
        if not self.readonly:
            with self._connection() as connection, connection:
                kept = [(table, repr(tuple(row)), now()) for row in rows]
                connection.executemany("INSERT INTO damaged (source, content, created) VALUES (?, ?, ?)", kept)
                connection.executemany(f"DELETE FROM {table} WHERE rowid = ?", [(row["rowid"],) for row in rows])

    @contextmanager
    def _connection(self):
        """A connection for one call, so that threads and forks never share one; SQLite's errors are told as ours."""
        try:
            if self._memory is not None:
                yield _prepared(self._memory)
                return
            source = f"{self.path.absolute().as_uri()}?{self._options}"
            with closing(sqlite3.connect(source, uri=True, timeout=_LOCK_S)) as connection:
                yield _prepared(connection)
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise
        except sqlite3.Error as error:
            advice = [words for word, words in _ADVICE.items() if word in str(error)]
            what = "is not a records file" if "not a database" in str(error) else "can't be used"
            raise RecordsError(f"{self.path} {what}: {error}{f'; {advice[0]}' if advice else ''}") from error


@checked(records=Is((str, Path, Records), none=True))
def opened(records: str | Path | Records | None) -> Records:
    """The records themselves, those in a file, or new ones for this session only."""
    return records if isinstance(records, Records) else Records(":memory:" if records is None else records)


def _prepared(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.row_factory = sqlite3.Row
    connection.text_factory = lambda content: content.decode(errors="replace")  # a damaged one is found by its checksum
    return connection


def _insertion(table: str, names: Iterable[str]) -> str:
    names = list(dict.fromkeys([*names, "checksum"]))
    marks = ", ".join(f":{name}" for name in names)
    known = "ON CONFLICT (key) DO NOTHING"  # OR IGNORE would drop forbidden values without a word
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks}) {known}"


def _decoded(row: sqlite3.Row) -> Row:
    values = {name: row[name] if name in row.keys() else None for name in COLUMNS}  # noqa: SIM118
    values["status"] = values["status"] or "ok"  # an earlier release's row
    for name in JSON_COLUMNS:
        values[name] = None if values[name] is None else json.loads(values[name])
    return values
