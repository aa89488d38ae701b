"""The panels where readers meet them: a real JupyterLab in headless Chromium."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from papermill import inspect_notebook
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Locator, Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),  # one worker, so that one server and one browser at a time are up
    pytest.mark.timeout(240),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed"),
]
PROFILES = Path(__file__).parents[2] / "notebooks" / "01_finetuning_profiles.ipynb"
#: for notebook 01: enough to see a figure, little to train
SMALL = {
    "tasks": "digits",
    "train_sizes": "40",
    "recipe": '{"epochs": 1, "batch_size": 20}',
    "bn_modes": "batch",
    "lrs": "3e-3",
}
SMALL |= {"folds": 2, "seeds": 1}
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
WAIT_MS = 120_000
PANELS = """
import numpy as np
from torch import nn
import subtuning_lab as lab
import subtuning_lab.notebook as controls
blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4)]
tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
chain = lab.Chain(nn.Conv2d(3, 8, 3, padding=1), blocks, tail, 8, name="tiny", input_size=(3, 8, 8))
images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
task = lab.Task.from_arrays(images, np.arange(40) % 2, name="noise")
study = lab.Study(chain, task, lab.Recipe(epochs=1, batch_size=8), folds=2, progress=False)
patient = lab.Study(chain, task, lab.Recipe(epochs=100_000), folds=2, progress=False)
profile = lab.finetuning_profile(study)
---
controls.ProfilePanel({1: profile, 2: lab.finetuning_profile(study, 2)}, "window")
---
controls.TrainPanel(study, profile, ["block1"])
---
controls.TrainPanel(patient, profile, ["block4"])
---
controls.StudyPanel(["lab-resnet", "lab-vit"], ["digits", "position"], train_size=40)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Folder of the notebooks, with settings that keep pop-ups away and every cell drawn."""
    root = tmp_path_factory.mktemp("lab")
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    for name, settings in {
        "apputils-extension/notification": quiet,
        "notebook-extension/tracker": {"windowingMode": "none"},
    }.items():
        path = root / "cfg" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[str]:
    """Address of a JupyterLab over `root`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
        "--IdentityProvider.token=t", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
        f"--LabApp.user_settings_dir={root}/cfg", f"--LabApp.workspaces_dir={root}/ws",
    ]  # fmt: skip
    folders = {"JUPYTER_DATA_DIR": f"{root}/data", "JUPYTER_CONFIG_DIR": f"{root}/jupyter"}
    environment = os.environ | folders | {"JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1"}
    log = root / "server.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "jupyterlab", *options]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token=t", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()  # its kernels end with it
            process.wait(30)


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a fresh browser."""
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(WAIT_MS)
        yield page
        browser.close()


def test_panels_answer_in_jupyterlab(server: str, root: Path, page: Page):
    cells = [new_code_cell(source.strip()) for source in PANELS.split("---\n")]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), root / "panels.ipynb")
    run_all(page, server, "panels.ipynb", panels=4)
    browse, train, patient, choose = (panel(page, number) for number in range(4))
    _slider_moves_picture(page, browse)
    _ticks_and_trains(train)
    _stops(patient)
    before = choose.locator("img").first.get_attribute("src")
    choose.locator("select").nth(1).select_option("position")
    expect(choose.locator("img").first).not_to_have_attribute("src", before, timeout=WAIT_MS)


@pytest.mark.skipif(not PROFILES.exists(), reason=f"{PROFILES.name} is not there")
def test_notebook_01_answers_in_jupyterlab(server: str, root: Path, page: Page):
    notebook, names = load_notebook_node(str(PROFILES)), inspect_notebook(str(PROFILES))
    small = SMALL | {"results": str(root / "results"), "records": str(root / "scores.sqlite")}
    assert small.keys() <= names.keys(), f"not among the notebook's parameters: {small.keys() - names.keys()}"
    nbformat.write(parameterize_notebook(notebook, small), root / PROFILES.name)
    run_all(page, server, PROFILES.name, panels=1)
    outputs = page.locator(".jp-OutputArea-output")
    ticks = outputs.filter(has=page.locator("input[type=checkbox]"))
    assert ticks.count() > 0, "the notebook has lost its panel"
    before = sources(ticks.first)
    ticks.first.get_by_label("layer3.2").check()
    wait_for_change(page, ticks.first, before)


def run_all(page: Page, server: str, name: str, panels: int) -> None:
    """Opens a notebook, runs all cells, and waits until so many panels show their pictures and the kernel rests."""
    page.goto(f"{server}/lab/tree/{name}?token=t&reset")
    idle = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status==='idle'"
    page.wait_for_function(f"() => {idle}")
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
    assert errors.all_inner_texts() == []
    expect(panel(page, panels - 1).locator("img").first).to_be_visible(timeout=WAIT_MS)
    page.wait_for_function(f"() => {idle}")


def panel(page: Page, number: int) -> Locator:
    """The output that holds a panel, counted from the top."""
    return page.locator(".jp-OutputArea-output").filter(has=page.locator(".widget-vbox img")).nth(number)


def sources(panel: Locator) -> list[str]:
    """Addresses of the panel's pictures; a new picture has a new one."""
    return [image.get_attribute("src") for image in panel.locator("img").all()]


def wait_for_change(page: Page, panel: Locator, before: list[str]) -> None:
    """Waits until a picture of the panel is another one."""
    end = time.monotonic() + WAIT_MS / 1000
    while sources(panel) == before:
        assert time.monotonic() < end, "the picture stayed as it was"
        page.wait_for_timeout(50)


def _slider_moves_picture(page: Page, panel: Locator) -> None:
    before = sources(panel)
    panel.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    wait_for_change(page, panel, before)


def _ticks_and_trains(panel: Locator) -> None:
    network, _, profile = panel.locator("img").all()
    before = network.get_attribute("src"), profile.get_attribute("src")
    panel.get_by_label("block3").check()
    expect(network).not_to_have_attribute("src", before[0], timeout=WAIT_MS)
    panel.get_by_role("button", name="Train").click()
    expect(panel).to_contain_text("block1 + block3: ", timeout=WAIT_MS)
    expect(profile).not_to_have_attribute("src", before[1], timeout=WAIT_MS)
    expect(panel.get_by_role("button", name="Stop")).to_be_disabled()


def _stops(panel: Locator) -> None:
    """A training that would take hours ends within seconds."""
    panel.get_by_role("button", name="Train").click()
    expect(panel.get_by_role("button", name="Stop")).to_be_enabled(timeout=WAIT_MS)
    expect(panel.get_by_role("button", name="Train")).to_be_disabled()
    panel.get_by_role("button", name="Stop").click()
    expect(panel).to_contain_text("Stopped", timeout=30_000)
    expect(panel.get_by_role("button", name="Train")).to_be_enabled()


def _wait_for(address: str, process: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    """Waits until a server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.3)
