"""Every command in the README does what the README says."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import subtuning_lab as lab
from subtuning_lab.cli.main import app
from subtuning_lab.report.presets import load_preset, parse_parameter, settle_parameters
from subtuning_lab.report.run import select_sections
from tests.project.test_project import FLOORS

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[2]
README, BEYOND = (ROOT / "README.md").read_text(), (ROOT / "docs" / "beyond.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
(EXAMPLE,), (BEYOND_EXAMPLE,) = (re.findall(r"```python\n(.*?)```", text, re.S) for text in (README, BEYOND))
SHELL = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in SHELL if line.startswith("subtuning-lab") and " reproduce" not in line]
REPRODUCE = [line for line in SHELL if line.startswith("subtuning-lab reproduce")]
MAKE = [line for line in [*SHELL, *re.findall(r"`(make [a-z]+)`", README)] if line.startswith("make")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with `photos/`: two classes of twenty small pictures, one bright, one dark."""
    generator = np.random.default_rng(0)
    for name, low in (("day", 128), ("night", 0)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_test():
    assert len(COMMANDS) >= 4 and len(REPRODUCE) >= 2 and len(MAKE) >= 3


def test_the_example_runs_as_printed(workplace, capsys):
    offline = EXAMPLE.replace('"resnet18", weights="pretrained"', '"lab-resnet"').replace("epochs=10", "epochs=15")
    assert offline.count('"lab-resnet"') == 2
    exec(compile(offline, "README", "exec"), {})
    assert {"photos.safetensors", "profile.png", "runs"} <= {path.name for path in workplace.iterdir()}
    accuracy = float(re.search(r"mean=([\d.]+)", capsys.readouterr().out)[1])
    assert accuracy > 0.8  # bright against dark is easy; chance is 0.5


def test_what_lies_beyond_the_search_runs_as_printed_but_smaller():
    example = BEYOND_EXAMPLE
    for whole, small in {
        'load_task("digits")': 'load_task("digits", train_size=60, test_size=20)',
        'load_task("source")': 'load_task("source", train_size=80, test_size=40)',
        "train_size=100": "train_size=80, max_blocks=1, repeats=1",
        "[20, 40, 80]": "[20, 10]",
    }.items():
        assert example.count(whole) == 1
        example = example.replace(whole, small)
    given = {"lab": lab, "recipes": [lab.Recipe(epochs=1, batch_size=20, bn="frozen", lr=1e-3)]}
    exec(compile(example, "README", "exec"), given)
    assert given["shifts"]["shift"].unique().tolist() == ["gaussian_noise@5", "contrast@5"]
    assert given["asked"].groupby("strategy")["train_size"].max().to_dict() == {"random": 30, "margin": 30}
    assert given["smaller"].pruned == {"layer3.0"} and given["between"].provenance["alpha"] == 0.5


def test_every_public_name_has_an_example_that_runs(workplace):
    page = (ROOT / "docs" / "examples.md").read_text()
    assert set(re.findall(r"\blab\.(\w+)", page)) == set(lab.__all__)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    exec(compile(code, "examples.md", "exec"), {})
    plt.close("all")


def test_the_other_commands_run_as_printed(workplace):
    runner = CliRunner()
    for command in COMMANDS:
        result = runner.invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"


@pytest.mark.parametrize("command", REPRODUCE)
def test_reproduce_commands_name_sections_presets_and_parameters_that_exist(command):
    words = shlex.split(command)[2:]
    preset = words[words.index("--preset") + 1]
    overrides = dict(parse_parameter(words[i + 1]) for i, word in enumerate(words) if word == "-p")
    sections = [word for word in words if re.fullmatch(r"\d\d[a-z]?", word)]
    chosen = select_sections(ROOT / "notebooks", sections)
    settled = settle_parameters(chosen, load_preset(ROOT / "notebooks", preset), overrides, Path("results"))
    assert all(str(settled[stem][name]) == str(value) for stem in settled for name, value in overrides.items())


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_figure_is_left_open():
    assert not re.search(r"@[A-Z0-9]+@|TODO", README)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page):
    places = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert not [place for place in places if not place.exists() or not place.stat().st_size]


def test_the_first_screen_is_short():
    assert README.count("\n") <= 120
    assert README.index("![") < README.index("```sh") < README.index("```python") < 5_000


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "scripts" / "draw_rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_and_lists_of_the_package_are_up_to_date(drawing):
    """Else run `make docs`."""
    assert drawing.PICTURE.read_text() == drawing.picture() and drawing.API.read_text() == drawing.api()
    assert [*drawing.FLOORS.values()][::-1] == list(FLOORS)


def test_an_arrow_is_an_import_that_no_other_implies(drawing):
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()} | {room: set() for room in drawing.ROOMS}
    drawing.ROOMS[:] = ["c", "b", "a"]
    assert drawing.arrows(graph) == [("b", "c"), ("a", "b")]
