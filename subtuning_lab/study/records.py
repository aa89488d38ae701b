"""The run store: one SQLite row per score, written when its pass ends, so that a killed run resumes. No torch."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pandas as pd

_COLUMNS = {
    "key": "TEXT PRIMARY KEY",
    "split": "TEXT NOT NULL CHECK (split IN ('fold', 'test'))",
    "backbone": "TEXT NOT NULL",
    "task": "TEXT NOT NULL",
    "blocks": "TEXT NOT NULL",
    "fold": "INTEGER",
    "seed": "INTEGER NOT NULL",
    "accuracy": "REAL NOT NULL CHECK (accuracy BETWEEN 0 AND 1)",
    "loss": "REAL",
    "n_train": "INTEGER NOT NULL",
    "n_scored": "INTEGER NOT NULL",
    "params": "INTEGER NOT NULL",
    "flops": "REAL NOT NULL",
    "epochs": "INTEGER NOT NULL",
    "seconds": "REAL NOT NULL",
    "device": "TEXT NOT NULL",
    "recipe": "TEXT NOT NULL",
    "determined_by": "TEXT NOT NULL",
    "created": "TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))",
}
_JSON_COLUMNS = ("blocks", "recipe", "determined_by")
_SCHEMA_VERSION = 1


def record_key(determined_by: Mapping[str, object]) -> str:
    """SHA-256 of everything that determines a score; equal mappings have equal keys in any order."""
    return hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()


class Records:
    """Scores that survive any crash.

    A row is there whole or not at all: rows of a pass are written in one transaction. Several processes may read
    while one writes (SQLite's write-ahead log).

    Args:
        path: of the SQLite file, made with its folder when missing; ":memory:" keeps records for this object only.

    Raises:
        ValueError: the file is not such a store, or of a newer version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._memory = sqlite3.connect(":memory:", check_same_thread=False) if str(path) == ":memory:" else None
        if self._memory is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._create()
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is not a records file: {error}") from error

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, object]]:
        """The rows that are there, by key."""
        found: dict[str, dict[str, object]] = {}
        with self._connection() as connection:
            for start in range(0, len(keys), 500):  # SQLite bounds the variables of a statement
                chunk = keys[start : start + 500]
                marks = ", ".join("?" * len(chunk))
                rows = connection.execute(f"SELECT * FROM scores WHERE key IN ({marks})", chunk)
                found |= {row["key"]: _decoded(row) for row in rows}
        return found

    def put(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Writes rows in one transaction; a key that is there already keeps its row.

        Args:
            rows: a value per column, `created` apart; `blocks`, `recipe` and `determined_by` are stored as JSON.

        Raises:
            ValueError: a missing or unknown column, or a value that a column does not allow; nothing is written.
        """
        names = [name for name in _COLUMNS if name != "created"]
        rows = [_encoded(row, names) for row in rows]
        marks = ", ".join(f":{name}" for name in names)
        known = "ON CONFLICT (key) DO NOTHING"  # OR IGNORE would drop forbidden values without a word
        try:
            with self._connection() as connection, connection:
                connection.executemany(f"INSERT INTO scores ({', '.join(names)}) VALUES ({marks}) {known}", rows)
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError) as error:
            raise ValueError(f"not a score: {error}") from error

    def count_test(self, study: str) -> int:
        """Notes one use of a study's test split; returns how many there have been."""
        with self._connection() as connection, connection:
            connection.execute("INSERT INTO test_uses (study) VALUES (?)", (study,))
        return self.test_uses(study)

    def test_uses(self, study: str | None = None) -> int:
        """How often the test split was used: by one study, or by all."""
        where, values = ("", ()) if study is None else (" WHERE study = ?", (study,))
        with self._connection() as connection:
            return connection.execute(f"SELECT count(*) FROM test_uses{where}", values).fetchone()[0]

    def get_choice(self, key: str) -> dict[str, object] | None:
        """What was noted under a key with `put_choice`, None if nothing."""
        with self._connection() as connection:
            row = connection.execute("SELECT chosen FROM choices WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row["chosen"])

    def put_choice(self, key: str, chosen: Mapping[str, object], determined_by: Mapping[str, object]) -> None:
        """Notes what a trained network chose, such as images to label; a key that is there already keeps its row.

        Args:
            key: `record_key` of what determines it.
            chosen, determined_by: plain values, stored as JSON.
        """
        values = (key, json.dumps(chosen, sort_keys=True), json.dumps(determined_by, sort_keys=True))
        with self._connection() as connection, connection:
            connection.execute(
                "INSERT INTO choices (key, chosen, determined_by) VALUES (?, ?, ?) ON CONFLICT (key) DO NOTHING", values
            )

    def table(self) -> pd.DataFrame:
        """All rows, oldest first."""
        with self._connection() as connection:
            rows = [_decoded(row) for row in connection.execute("SELECT * FROM scores ORDER BY created, rowid")]
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def _create(self) -> None:
        columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
        with self._connection() as connection:
            with connection:
                connection.execute("BEGIN IMMEDIATE")  # of several processes, one makes the tables
                if not self._is_made(connection):
                    connection.execute(f"CREATE TABLE scores ({columns})")
                    connection.execute(
                        "CREATE TABLE test_uses (study TEXT NOT NULL, "
                        "created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')))"
                    )
                    connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                connection.execute(  # stores of earlier releases lack it, and these read stores that have it
                    "CREATE TABLE IF NOT EXISTS choices (key TEXT PRIMARY KEY, chosen TEXT NOT NULL, "
                    "determined_by TEXT NOT NULL, "
                    "created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')))"
                )
            _use_write_ahead_log(connection)

    def _is_made(self, connection: sqlite3.Connection) -> bool:
        """Whether the tables are there; raises ValueError for a newer store, and for any other SQLite file."""
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = {row["name"] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if version > _SCHEMA_VERSION:
            raise ValueError(f"{self.path} has version {version}; this package reads up to {_SCHEMA_VERSION}")
        if version < _SCHEMA_VERSION and not tables:
            return False
        if version < _SCHEMA_VERSION or not {"scores", "test_uses"} <= tables:
            raise ValueError(f"{self.path} is not a records file: its tables are {', '.join(sorted(tables))}")
        return True

    @contextmanager
    def _connection(self):
        """A connection for one call, so that threads and forks never share one."""
        if self._memory is not None:
            self._memory.row_factory = sqlite3.Row
            yield self._memory
            return
        with closing(sqlite3.connect(self.path, timeout=60)) as connection:
            connection.row_factory = sqlite3.Row
            yield connection


def _use_write_ahead_log(connection: sqlite3.Connection, attempts: int = 200) -> None:
    """Switches the file's journal; SQLite doesn't wait for other processes here, so this does (up to 10 s)."""
    for attempt in range(attempts):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if attempt == attempts - 1:
                raise
            time.sleep(0.05)


def _encoded(row: Mapping[str, object], names: Sequence[str]) -> dict[str, object]:
    if set(row) != set(names):
        raise ValueError(f"not a score: columns {sorted(set(row) ^ set(names))} are missing or unknown")
    return {name: json.dumps(row[name], sort_keys=True) if name in _JSON_COLUMNS else row[name] for name in names}


def _decoded(row: sqlite3.Row) -> dict[str, object]:
    return {name: json.loads(row[name]) if name in _JSON_COLUMNS else row[name] for name in row.keys()}  # noqa: SIM118
