"""What is installed: a wheel with every room and every file that is no code, and a hash over all of it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from subtuning_lab.report import run

ROOT = Path(__file__).resolve().parents[2]
CACHES = shutil.ignore_patterns("__pycache__")


def files_of(package: Path) -> dict[str, Path]:
    """All files of the package, code or not, by their names in it."""
    found = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(package.parent).as_posix(): path for path in found}


FILES = files_of(ROOT / "subtuning_lab")


def test_a_wheel_holds_every_room_and_the_weights(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "subtuning_lab", source / "subtuning_lab", ignore=CACHES)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("subtuning_lab-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == set(FILES)
    assert {f"subtuning_lab/nets/weights/lab-{kind}.safetensors" for kind in ("resnet", "vit")} <= packed


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("notebook") / "01_empty.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), path)
    return path


def test_a_change_of_any_file_of_the_package_runs_notebooks_again(tmp_path, monkeypatch, notebook):
    package = tmp_path / "subtuning_lab"
    shutil.copytree(ROOT / "subtuning_lab", package, ignore=CACHES)
    monkeypatch.setattr(run, "__file__", str(package / "report" / "run.py"))
    before = run.fingerprint(notebook, {})
    assert {path.parent.name for path in package.glob("*/__init__.py")} >= {"nets", "engine", "study", "report"}
    for name, path in files_of(package).items():
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        assert run.fingerprint(notebook, {}) != before, f"a change in {name} would be skipped"
        path.write_bytes(content)
    assert run.fingerprint(notebook, {}) == before
    (package / "nets" / "chain.py").rename(package / "nets" / "other.py")
    assert run.fingerprint(notebook, {}) != before
    (package / "nets" / "other.py").rename(package / "nets" / "chain.py")
    (package / "nets" / "__pycache__").mkdir()
    (package / "nets" / "__pycache__" / "chain.pyc").write_bytes(b"compiled")
    assert run.fingerprint(notebook, {}) == before
