"""The short version of the faults; `python -m tests.end_to_end.faults` tries them as often as one likes."""

import os
import tempfile

import pytest

from tests.end_to_end.faults import FAULTS, Scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    folder = tmp_path_factory.mktemp("faults")
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.getuid() and parent.is_relative_to(tempfile.gettempdir()):
            parent.chmod(parent.stat().st_mode | 0o055)  # another user reads it, too
    return Scene(folder)


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("name", [*FAULTS][:-1])  # wrong calls are among tests/project/test_surface.py
def test_a_fault_loses_nothing_and_is_told(scene, name):
    task, tries, _ = FAULTS[name]
    for outcome in task(scene, tries):
        assert outcome.good, f"{outcome.fault}: {outcome.notes}"
        if "skipped" in outcome.fault:
            pytest.skip(outcome.fault)
