"""One command for a day with a GPU: tests, speed, latency and the paper's comparisons, in order of value.

    python scripts/gpu_day.py pack      # here: data and weights, at most 64 MiB, into .gpu, which can travel
    python scripts/gpu_day.py run       # there: all stages, each with its own time limit; results and logs in .gpu/out
    python scripts/gpu_day.py --tiny run    # a rehearsal on a CPU

Stages that are finished are not run again while the code is the same: a second call goes on where the first stopped.
The last lines are a short table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 64 * 2**20  # bytes that may travel
ARCHIVES = ("caltech101-96px.tar.xz", "cifar10-jpeg.tar.xz")
WEIGHTS = "tf_efficientnet_lite0_in1k.safetensors"


@dataclass(frozen=True)
class Stage:
    """One command, its time limit in seconds, and what it is called with in a rehearsal."""

    name: str
    command: tuple[str, ...]
    seconds: int
    tiny: tuple[str, ...] | None = None
    resumes: bool = False  # whether it goes on by itself where it was cut off


def stages(folder: Path, out: Path) -> list[Stage]:
    """In order of value."""
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=")
    records = ("--out", str(out / "real"), "--records", str(folder / "records"))
    return [
        Stage(
            "tests",
            (*pytest, "-m", "gpu", "tests/engine", "tests/inference", "tests/end_to_end/test_gpu.py"),
            120,
            (*pytest, "-k", "frozen and cpu", "tests/end_to_end/test_gpu.py"),
        ),
        Stage(
            "speed",
            ("benchmarks/profile_speed.py", "--case", "resnet50-224", "--case", "lite0-96"),
            150,
            ("benchmarks/profile_speed.py", "--case", "tiny", "--repeats", "1"),
        ),
        Stage(
            "latency",
            ("benchmarks/merged_latency.py", "--case", "resnet50", "--case", "vit_base_patch16_224", "--size", "224")
            + ("--tasks", "1", "4", "--batches", "1", "--runs", "100", "--mode", "cuda_graph")
            + ("--device", "cuda"),
            90,
            ("benchmarks/merged_latency.py", "--case", "resnet18", "--size", "32", "--tasks", "2", "--batches", "1")
            + ("--runs", "2"),
        ),
        Stage(
            "real",
            ("scripts/real_runs.py", "--weights", str(folder / WEIGHTS), "--data", str(folder / "data"), *records)
            + ("--jobs", "8"),
            240,
            ("scripts/real_runs.py", "--tiny", "--only", "caltech101-505-0", *records),
            resumes=True,
        ),
    ]


def main() -> int:
    """Packs or runs; returns 1 where a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "run"))
    parser.add_argument("--folder", type=Path, default=ROOT / ".gpu", help="what travels, and what goes on")
    parser.add_argument("--out", type=Path, help="logs and tables; by default a folder out within --folder")
    parser.add_argument("--source", type=Path, help="for pack: folder with data/ and weights/")
    parser.add_argument("--only", nargs="+", help="names of stages")
    parser.add_argument("--seconds", type=float, default=480, help="for all stages together")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.what == "pack":
        pack(given.source, given.folder)
        return 0
    out = given.out or given.folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    if not given.tiny:
        unpack(given.folder)
    chosen = [stage for stage in stages(given.folder, out) if given.only is None or stage.name in given.only]
    results = run(chosen, given.folder / "done.json", out, given.seconds, given.tiny)
    print(table(results))
    return int(any(result["state"] == "failed" for result in results.values()))


def pack(source: Path | None, folder: Path) -> None:
    """Copies archives of images and the weights into the folder."""
    if source is None:
        raise SystemExit("give --source, the folder with data/ and weights/")
    for path in (*(source / "data" / name for name in ARCHIVES), source / "weights" / WEIGHTS):
        shutil.copyfile(path, folder / path.name)
    total = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"{folder}: {total / 2**20:.1f} of {LIMIT / 2**20:.0f} MiB")
    if total > LIMIT:
        raise SystemExit("that is too much to travel")


def unpack(folder: Path) -> None:
    """Unpacks the archives, once."""
    for name in ARCHIVES:
        target = folder / "data" / name.split("-")[0]
        if not target.exists() and (folder / name).exists():
            with tarfile.open(folder / name) as archive:
                archive.extractall(folder / "data", filter="data")


def run(chosen: list[Stage], done_file: Path, out: Path, seconds: float, tiny: bool) -> dict[str, dict]:
    """Runs the stages one after another, each into a log of its own, and keeps what is finished."""
    end, code = time.monotonic() + seconds, fingerprint()
    done = json.loads(done_file.read_text()) if done_file.exists() else {}
    results = {}
    for stage in chosen:
        command = stage.tiny or stage.command if tiny else stage.command
        known = done.get(stage.name)
        if known and known["code"] == code and known["command"] == list(command) and known["state"] == "done":
            results[stage.name] = known | {"state": "done before"}
            continue
        start, limit = time.monotonic(), min(stage.seconds, end - time.monotonic())
        state = called(command, out / f"{stage.name}.log", limit) if limit > 5 else "left"
        if state == "cut off" and stage.resumes:
            state = "goes on"
        results[stage.name] = {"state": state, "seconds": round(time.monotonic() - start), "code": code}
        done[stage.name] = results[stage.name] | {"command": list(command)}
        done_file.write_text(json.dumps(done))
        print(f"{stage.name}: {state} after {results[stage.name]['seconds']} s", flush=True)
    return results


def called(command: tuple[str, ...], log: Path, limit: float) -> str:
    """Runs a Python command, and all its children, for a limited time; what it prints goes into the log and here."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "cut off"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    print(log.read_text()[-6000:], flush=True)
    return state


def fingerprint() -> str:
    """Of the package's, the benchmarks' and the tests' code."""
    digest = hashlib.sha256()
    for folder in ("subtuning_lab", "benchmarks", "scripts", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def table(results: dict[str, dict]) -> str:
    """A short table of all stages."""
    lines = [f"{name:10} {result['state']:12} {result['seconds']:4} s" for name, result in results.items()]
    return "\n".join(["stage      state        seconds", *lines])


if __name__ == "__main__":
    sys.exit(main())
