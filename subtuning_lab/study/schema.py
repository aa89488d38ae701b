"""The tables of a records file: columns, checksums, and what becomes of an earlier release's file. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

SCHEMA_VERSION = 2
COLUMNS = {
    "key": "TEXT PRIMARY KEY",
    "split": "TEXT NOT NULL CHECK (split IN ('fold', 'test'))",
    "backbone": "TEXT NOT NULL",
    "task": "TEXT NOT NULL",
    "blocks": "TEXT NOT NULL",
    "fold": "INTEGER",
    "seed": "INTEGER NOT NULL",
    "status": "TEXT NOT NULL CHECK (status IN ('ok', 'diverged'))",
    "accuracy": "REAL CHECK ((accuracy IS NULL) = (status = 'diverged') AND ifnull(accuracy BETWEEN 0 AND 1, 1))",
    "balanced_accuracy": "REAL CHECK (ifnull(balanced_accuracy BETWEEN 0 AND 1, 1))",
    "loss": "REAL",
    "confusion": "TEXT",
    "n_train": "INTEGER NOT NULL",
    "n_scored": "INTEGER NOT NULL",
    "params": "INTEGER NOT NULL",
    "flops": "REAL NOT NULL",
    "epochs": "INTEGER NOT NULL",
    "seconds": "REAL NOT NULL",
    "device": "TEXT NOT NULL",
    "threads": "INTEGER",
    "recipe": "TEXT NOT NULL",
    "determined_by": "TEXT NOT NULL",
    "created": "TEXT NOT NULL",
}
JSON_COLUMNS = ("blocks", "confusion", "recipe", "determined_by")
_MAY_BE_MISSING = {"status": "ok", "balanced_accuracy": None, "confusion": None, "threads": None}
_TABLES = {
    "damaged": "source TEXT NOT NULL, content TEXT NOT NULL, created TEXT NOT NULL",
    "scores": ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items()) + ", checksum TEXT NOT NULL",
    "test_uses": "study TEXT NOT NULL, created TEXT NOT NULL, checksum TEXT NOT NULL",
    "choices": "key TEXT PRIMARY KEY, chosen TEXT NOT NULL, determined_by TEXT NOT NULL, created TEXT NOT NULL, "
    "checksum TEXT NOT NULL",
}


def now() -> str:
    """The time in UTC, as rows have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def create_tables(connection: sqlite3.Connection) -> None:
    """Makes the tables of a new store, in one transaction."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for name, columns in _TABLES.items():
            connection.execute(f"CREATE TABLE {name} ({columns})")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def version_of(connection: sqlite3.Connection, path: Path) -> int:
    """The schema's version; raises ValueError for a newer store, and for any other SQLite file."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = {row["name"] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version > SCHEMA_VERSION:
        raise ValueError(f"{path} has version {version}; this package reads up to {SCHEMA_VERSION}")
    if version < 1 or not {"scores", "test_uses"} <= tables:
        names = ", ".join(sorted(tables)) or "none"
        raise ValueError(f"{path} is not a records file: its version is {version}, its tables are {names}")
    columns = {row["name"] for row in connection.execute("PRAGMA table_info(scores)")}
    if version == SCHEMA_VERSION and (other := columns ^ {*COLUMNS, "checksum"}):
        raise ValueError(f"{path} has other columns of scores: missing or unknown are {', '.join(sorted(other))}")
    return version


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Brings an earlier release's store up to date, in one transaction: its rows stay as they are."""
    if version == SCHEMA_VERSION:
        return
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
            return  # another process was faster
        present = {row["name"] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for name, columns in _TABLES.items():
            rows = connection.execute(f"SELECT * FROM {name} ORDER BY rowid").fetchall() if name in present else []
            connection.execute(f"DROP TABLE IF EXISTS {name}")
            connection.execute(f"CREATE TABLE {name} ({columns})")
            for row in rows:
                values = dict(zip(row.keys(), row, strict=True))
                if not is_sound(row):
                    fault = {"source": name, "content": repr(tuple(row)), "created": now()}
                    connection.execute("INSERT INTO damaged VALUES (:source, :content, :created)", fault)
                    continue
                values = with_checksum(_MAY_BE_MISSING | values if name == "scores" else values)
                marks = ", ".join(f":{column}" for column in values)
                connection.execute(f"INSERT INTO {name} ({', '.join(values)}) VALUES ({marks})", values)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def stored_row(row: Mapping[str, object]) -> dict[str, object]:
    """A score's values as its columns store them, with time and checksum.

    Raises:
        ValueError: a missing or unknown column, or a number column that holds none.
    """
    row = _MAY_BE_MISSING | dict(row)
    names = set(COLUMNS) - {"created"}
    if set(row) != names:
        raise ValueError(f"not a score: columns {sorted(set(row) ^ names)} are missing or unknown")
    row["created"] = now()
    try:
        return with_checksum({name: _stored(name, row[name]) for name in COLUMNS})
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a score: {error}") from error


def _stored(name: str, value: object) -> object:
    kind = COLUMNS[name].split()[0]
    if value is None or (kind != "TEXT" and isinstance(value, float) and math.isnan(value)):
        return None  # SQLite stores no NaN
    if name in JSON_COLUMNS:
        return json.dumps(value, sort_keys=True)
    return {"INTEGER": int, "REAL": float, "TEXT": str}[kind](value)


def with_checksum(values: Mapping[str, object]) -> dict[str, object]:
    """Values by column with a checksum over all of them."""
    return dict(values) | {"checksum": _checksum(values)}


def is_sound(row: sqlite3.Row) -> bool:
    """Whether a row is what was written; those of the first release carry no checksum."""
    values = dict(zip(row.keys(), row, strict=True))
    if "checksum" not in values:
        return all(_is_json(values[name]) for name in JSON_COLUMNS if name in values)
    return values["checksum"] == _checksum(values)


def _checksum(values: Mapping[str, object]) -> str:
    content = sorted((name, value) for name, value in values.items() if name not in ("checksum", "rowid"))
    return hashlib.blake2b(repr(content).encode(errors="replace"), digest_size=8).hexdigest()


def _is_json(text: object) -> bool:
    try:
        json.loads(text)
    except (TypeError, ValueError):
        return False
    return True
