"""Properties of the source tree: one set of pins, one direction of imports, small functions, clean notebooks."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import subtuning_lab as lab
from subtuning_lab.cli.main import app
from subtuning_lab.report.presets import check_parameters, declared_parameters
from tests.helpers import tiny_chain, tiny_task

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "subtuning_lab"
MODULES = sorted(PACKAGE.rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Rooms by floor, from the ground up. A room imports from lower floors; within a floor only where no arrow comes back.
FLOORS = (
    ("utils",),
    ("nets", "data"),
    ("engine", "inference"),
    ("study", "search"),
    ("baselines", "theory", "criteria"),
    ("experiments",),
    ("plots",),
    ("notebook", "report"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
STRANGERS = {("engine", "inference"), ("inference", "engine"), ("search", "study"), ("data", "nets")}
WITHOUT_TORCH = ("search", "plots", "study.records", "inference.schedule", "experiments.reported")
WITHOUT_TORCH += ("theory.bounds", "theory.pac_bayes", "theory.rademacher")


def name_of(path):
    """A module's name inside the package: "nets.chain"; "nets" for a room's own `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


BY_NAME = {name_of(path): path for path in MODULES}


def imports_of(path):
    """Names of all modules that a file imports at run time, whatever the place."""
    skipped = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
        elif id(node) in skipped:
            continue
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write subtuning_lab.NAME"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path):
    """The package's modules that a file imports, by their names inside the package."""
    found = set()
    for name in imports_of(path):
        inside = name.removeprefix("subtuning_lab.")
        while inside != name and inside and inside not in BY_NAME:
            inside = inside.rpartition(".")[0]
        found |= {inside} - {name, ""}
    return found


def room_of(name):
    return name.split(".")[0]


@pytest.mark.parametrize("name", [name for name in BY_NAME if name])
def test_imports_point_downwards(name):
    room = room_of(name)
    others = {room_of(other) for other in own_imports(BY_NAME[name])} - {room}
    upwards = {other for other in others if FLOOR_OF[other] > FLOOR_OF[room] or (room, other) in STRANGERS}
    assert not upwards, f"{name} knows rooms above it: {upwards}"


def test_imports_have_no_cycle():
    order = list(TopologicalSorter({name: own_imports(path) - {name} for name, path in BY_NAME.items()}).static_order())
    assert set(BY_NAME) <= set(order)


def test_a_room_has_at_most_twelve_files():
    rooms = Counter(path.parent for path in MODULES if path.stem != "__init__")
    assert set(FLOOR_OF) == {room_of(name) for name in BY_NAME if name}
    assert not {room.name: n for room, n in rooms.items() if n > 12}


@pytest.mark.parametrize("start", WITHOUT_TORCH)
def test_no_torch_where_none_is_needed(start):
    waiting = {name for name in BY_NAME if name == start or name.startswith(f"{start}.")}
    reached = set()
    assert waiting
    while waiting:
        name = waiting.pop()
        reached.add(name)
        heavy = {other for other in imports_of(BY_NAME[name]) if re.match(r"(torch|torchvision|timm)\b", other)}
        assert not heavy, f"{start} reaches {heavy} through {name}"
        waiting |= own_imports(BY_NAME[name]) - reached


def test_the_package_itself_needs_no_torch():
    code = "import sys, subtuning_lab as lab; dir(lab), lab.__all__, lab.plot_profile; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


def test_there_are_at_most_two_protocols():
    """Who scores, and what a method is."""
    classes = [
        node for path in MODULES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    ]
    protocols = [node.name for node in classes if any("Protocol" in ast.unparse(base) for base in node.bases)]
    assert len(protocols) <= 2, protocols


def test_a_profile_reaches_the_optimizer_in_six_calls(monkeypatch):
    ways = []

    def step(*arguments, **options):
        frames, frame = [], sys._getframe(1)
        while frame is not None:
            code, frame = frame.f_code, frame.f_back
            if Path(code.co_filename).is_relative_to(PACKAGE) and code.co_name != "checking":
                frames.append(code.co_name)
        ways.append(frames)
        raise InterruptedError

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    study = lab.Study(tiny_chain(), tiny_task(), lab.Recipe(epochs=1), folds=2, device="cpu", progress=False)
    with pytest.raises(InterruptedError):
        lab.finetuning_profile(study)
    (way,) = ways
    assert way[-1] == "finetuning_profile" and len(way) <= 6, " <- ".join(way)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            lines = node.end_lineno - node.lineno + 1
            lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            assert lines <= 50, f"{path.stem}.{node.name} has {lines} lines of code"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.stem} has no docstring"
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not [node.name for node in public if not ast.get_docstring(node)]


def test_public_names_are_there_and_none_is_a_rooms():
    """A name that a room has, too, would mean the room as soon as that is imported."""
    assert not set(lab.__all__) & set(FLOOR_OF)
    defined = [getattr(lab, name) for name in lab.__all__ if not name.isupper()]
    assert all(thing.__module__.startswith("subtuning_lab.") for thing in defined)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean_and_told_in_prose(path):
    page = nbformat.read(path, as_version=4)
    assert "widgets" not in page.metadata and page.metadata.kernelspec.name == "python3"
    assert page.cells[0].cell_type == "markdown" and page.cells[0].source.startswith("# ")
    for before, cell in zip(page.cells, page.cells[1:], strict=False):
        if cell.cell_type != "code":
            continue
        assert cell.outputs == [] and cell.execution_count is None, cell.source
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert before.cell_type == "markdown", f"no prose above: {cell.source}"


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem[2] == "_"], ids=lambda path: path.stem)
def test_a_notebook_is_one_sitting(path):
    """What goes beyond stands in `NNb_...`, or below a line "Going further"."""
    texts = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    further = [number for number, text in enumerate(texts) if re.search(r"^# Going further", text, re.MULTILINE)]
    assert min([len(texts), *further]) <= 30


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_numbered_and_presets_fit_them(path):
    assert re.fullmatch(r"\d\d[a-z]?_\w+", path.stem)
    declared = declared_parameters(path)
    assert declared.get("results") == "str" and "None" not in declared.values()
    for preset in tomllib.loads((ROOT / "notebooks" / "presets.toml").read_text()).values():
        check_parameters(path.stem, preset.get(path.stem, {}), declared)


def test_presets_name_only_notebooks_that_exist():
    presets = tomllib.loads((ROOT / "notebooks" / "presets.toml").read_text())
    assert {"quick", "real", "gpu", "paper"} <= set(presets)
    if NOTEBOOKS:
        assert {stem for preset in presets.values() for stem in preset} <= {path.stem for path in NOTEBOOKS}


def requirements():
    """All requirements of the project, extras included."""
    extras = PROJECT["optional-dependencies"].values()
    found = [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def test_every_requirement_is_a_range_with_one_exact_pin():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert len(versions) == len(pins) and all(re.fullmatch(r"==[^*,]+", version) for version in versions.values())
    for requirement in requirements():
        assert not str(requirement.specifier).startswith("=="), f"{requirement} is a pin; pyproject.toml holds ranges"
        version = versions[canonicalize_name(requirement.name)].removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} excludes its pin {version}"


def test_one_constraints_file_serves_conda_make_and_continuous_integration():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert "-c constraints.txt" in next(item["pip"] for item in conda if isinstance(item, dict))
    makefile = (ROOT / "Makefile").read_text()
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    assert installs and all("-c constraints.txt" in line for line in installs)
    assert re.search(r"^\$\(STAMP\):.*pyproject.toml.*constraints.txt", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def imported_by_the_package():
    return {name.split(".")[0] for path in MODULES for name in imports_of(path)} - set(sys.stdlib_module_names)


def test_everything_that_is_imported_is_required():
    provides = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
    names = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    names |= {Requirement(text).name for extra in set(extras) - {"test", "dev"} for text in extras[extra]}
    imported = {provides.get(name, name) for name in imported_by_the_package() - {"subtuning_lab"}}
    assert {canonicalize_name(name) for name in imported} <= names


def text_files():
    """Files that a reader of the repository sees; environments, results and caches are left out."""
    kinds = (".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".ipynb", ".cff")
    folders = ("subtuning_lab", "tests", "notebooks", "scripts", "benchmarks", "docs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.iterdir())
    return [path for path in files if path.is_file() and (path.suffix in kinds or path.name in ("Makefile", "run"))]


def test_no_machine_and_no_package_index_is_named():
    folders, indexes = (
        r"/ro[o]t/|/wor[k]/|/hom[e]/\w|/User[s]/\w",
        r"pypi[.]org|pythonhoste[d]|index-ur[l]|find-link[s]",
    )
    forbidden = re.compile(f"{folders}|{indexes}")
    found = {path.name: forbidden.findall(path.read_text(errors="replace")) for path in text_files()}
    assert len(found) > 10 and not {name: hits for name, hits in found.items() if hits}


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"] == "MIT"
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert "2302.06354" in str(citation["preferred-citation"])
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    command = ["make", "--no-print-directory", "help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"make ([a-z-]+)", told.stdout)) == set(targets)
    assert {"setup", "reproduce", "test", "test-fast", "lab", "bench", "clean"} <= set(targets)


def test_commands_in_the_documents_exist():
    text = "\n".join(path.read_text() for path in text_files() if path.suffix == ".md")
    blocks = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"(?:^|`)(?:\$ )?make ([a-z-]+)", blocks, re.MULTILINE)) <= targets
    assert set(re.findall(r"subtuning-lab ([a-z]+)", blocks)) <= commands


def test_make_reproduce_passes_section_and_preset():
    def told(*arguments):
        command = ["make", "--dry-run", "--no-print-directory", "reproduce", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]

    assert re.search(r"subtuning-lab reproduce\s+--preset quick", told())
    assert "reproduce 01 02 --preset gpu --jobs 3" in told("SECTION=01 02", "PRESET=gpu", "JOBS=3")


def test_ruff_is_clean():
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
