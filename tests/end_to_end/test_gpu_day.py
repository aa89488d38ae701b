"""The day with a GPU, rehearsed on the CPU: every stage runs, what is done is not run again, and nothing hangs."""

import json
import subprocess
import sys

import gpu_day
import pytest
from gpu_day import Stage

from tests.project.test_project import ROOT

STATES = "print('told'); import sys, time; time.sleep({seconds}); sys.exit({code})"


def rehearse(folder) -> str:
    command = [sys.executable, "scripts/gpu_day.py", "--tiny", "run", "--folder", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.timeout(280)
def test_the_whole_day_in_small(tmp_path):
    told = rehearse(tmp_path)
    names = [stage.name for stage in gpu_day.stages(tmp_path, tmp_path / "out")]
    done = json.loads((tmp_path / "done.json").read_text())
    assert {name: done[name]["state"] for name in names} == dict.fromkeys(names, "done"), told
    tables = [path.name for path in (tmp_path / "out" / "real").glob("*.csv")]
    assert tables == ["low_data.csv"] and len([*(tmp_path / "out").glob("*.log")]) == len(names)
    again = rehearse(tmp_path)
    assert again.count("done before") == len(names)


def python(seconds: float, code: int) -> tuple[str, ...]:
    return ("-c", STATES.format(seconds=seconds, code=code))


def test_stages_that_fail_or_take_too_long_do_not_end_the_day(tmp_path, capsys):
    chosen = [
        Stage("fails", python(0, 3), 20),
        Stage("hangs", python(60, 0), 6),
        Stage("resumes", python(60, 0), 6, resumes=True),
        Stage("works", python(0, 0), 20),
    ]
    results = gpu_day.run(chosen, tmp_path / "done.json", tmp_path, seconds=60, tiny=False)
    states = [results[stage.name]["state"] for stage in chosen]
    assert states == ["failed", "cut off", "goes on", "done"]
    assert "told" in (tmp_path / "works.log").read_text() and "works" in gpu_day.table(results)
    assert gpu_day.run(chosen[3:], tmp_path / "done.json", tmp_path, 60, False)["works"]["state"] == "done before"
    assert gpu_day.run(chosen[:1], tmp_path / "done.json", tmp_path, 0, False)["fails"]["state"] == "left"


def test_what_is_packed_stays_within_the_limit(tmp_path, monkeypatch):
    source = tmp_path / "source"
    for name in (*(f"data/{archive}" for archive in gpu_day.ARCHIVES), f"weights/{gpu_day.WEIGHTS}"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(bytes(1000))
    folder = tmp_path / "travels"
    folder.mkdir()
    gpu_day.pack(source, folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) == 3000
    monkeypatch.setattr(gpu_day, "LIMIT", 2999)
    with pytest.raises(SystemExit, match="too much"):
        gpu_day.pack(source, folder)
