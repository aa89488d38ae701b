"""A file is there whole or not at all, whoever writes it and whatever goes wrong."""

import threading

import pytest

from subtuning_lab.utils.files import UNFINISHED, expanded, replacing, sweep, write_atomically


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old")
    with pytest.raises(OSError, match="full"), replacing(path) as part:
        part.write_bytes(b"half")
        raise OSError("the disk is full")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_new_file_is_as_readable_as_any_and_an_old_one_stays_as_it_was(tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "file"
    plain.write_bytes(b"")
    write_atomically(path, b"1")
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o600)
    write_atomically(path, b"2")
    assert path.stat().st_mode & 0o777 == 0o600


def test_threads_that_write_one_path_leave_one_whole_content(tmp_path):
    path, contents = tmp_path / "file", [bytes([i]) * 200_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and len(list(tmp_path.iterdir())) == 1


def test_sweep_takes_what_a_kill_left(tmp_path):
    (tmp_path / f".file.abc{UNFINISHED}").write_bytes(b"half")
    (tmp_path / "file").write_bytes(b"whole")
    assert len(sweep(tmp_path)) == 1 and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_names_that_no_file_can_have_are_refused_with_their_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a") == tmp_path / "a"
    with pytest.raises(FileNotFoundError, match="~nobody-lives-here/a: there is no home folder"):
        expanded("~nobody-lives-here/a")
    with pytest.raises(ValueError, match=r"path is 'a\\x00b'; a file's name can't hold a zero byte"):
        write_atomically("a\0b", b"")
