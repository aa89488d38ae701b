"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"  # how the names of files end that are still being written


def expanded(path: str | Path) -> Path:
    """The path, with the home folder for "~". Raises FileNotFoundError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path}: there is no home folder of that name") from error


@contextmanager
def replacing(path: str | Path, keep: bool = False) -> Iterator[Path]:
    """A new file beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Readers see the old content or the new, never a part of it; threads and processes that write the same path at once
    don't disturb each other, and the last one's content stays; with `keep` it is the first one's, for files that are
    only made where there is none. A kill leaves a file that ends in `UNFINISHED`.

    Raises:
        OSError: of the kind that the system gave, with the path and what to do.
    """
    path, part = expanded(path), None
    if "\0" in str(path):
        raise ValueError(f"path is {str(path)!r}; a file's name can't hold a zero byte")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
        os.close(handle)
        part = Path(name)
        yield part
        part.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        _sync(part)
        if keep:
            _link(part, path)
        else:
            os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        reason = error.strerror or error
        failure = type(error)(f"{path} can't be written: {reason}; make room for it or name another path")
        failure.errno = error.errno
        raise failure from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file by `replacing` it."""
    with replacing(path) as part:
        part.write_bytes(content)


def sweep(folder: str | Path) -> list[Path]:
    """Removes what killed processes left unfinished in a folder; returns what it was."""
    left = sorted(Path(folder).glob(f".*{UNFINISHED}"))
    for path in left:
        path.unlink(missing_ok=True)
    return left


def _link(part: Path, path: Path) -> None:
    """Gives a file its name unless there is such a file; not every file system knows links."""
    try:
        os.link(part, path)
    except FileExistsError:
        return
    except OSError:
        if not path.exists():
            os.replace(part, path)


def _sync(path: Path) -> None:
    """Waits until the disk has it; folders can't be opened on every system."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
