"""Sharing tuned tasks: what a repository holds is enough to load them, and everything that can go wrong is told."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.utils import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import subtuning_lab as lab
from subtuning_lab import Recipe, Study, TunedTask, load_backbone
from subtuning_lab.inference import hub
from subtuning_lab.inference.hub import from_hub, model_card, push_to_hub, write_repository
from subtuning_lab.utils.text import printable
from tests.helpers import tiny_chain, tiny_task

IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tuned():
    study = Study(tiny_chain(), tiny_task(), Recipe(epochs=1, lr=3e-3), folds=2, device="cpu", progress=False)
    return dataclasses.replace(study.fit(["block2"]), scores={"test accuracy": 0.75, "n": 12})


def equal(first, second):
    with torch.no_grad():
        return torch.equal(first.network()(IMAGES), second.network()(IMAGES))


def card_of(folder):
    """Metadata and text of a model card."""
    return parsed((Path(folder) / "README.md").read_text())


def parsed(card):
    _, metadata, text = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(metadata), text


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A hub that keeps repositories in a folder: what the two calls to the network are replaced by."""
    root, log = tmp_path / "hub", []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            log.append(("create", repo_id, self.token, private, exist_ok))
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
            log.append(("upload", commit_message))
            for name in allow_patterns:
                shutil.copy(Path(folder_path) / name, root / repo_id / name)

    def download(repo_id, *, revision, token, allow_patterns):
        log.append(("download", repo_id, revision, token))
        return str(root / repo_id)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return root, log


def test_what_is_pushed_is_what_comes_back(tuned, remote):
    root, log = remote
    assert push_to_hub(tuned, "owner/tiny-task", token="secret") == "https://hub.example/owner/tiny-task"
    loaded = from_hub("owner/tiny-task", tiny_chain(), revision="v1", token="other")
    assert equal(loaded, tuned) and loaded.scores == tuned.scores
    assert sorted(os.listdir(root / "owner/tiny-task")) == ["README.md", "tuned.safetensors"]
    assert log == [
        ("create", "owner/tiny-task", "secret", True, True),
        ("upload", "Tuned task tiny"),
        ("download", "owner/tiny-task", "v1", "other"),
    ]
    assert "secret" not in (root / "owner/tiny-task/README.md").read_text()


def test_a_folder_is_kept_where_one_is_named_and_only_our_files_are_uploaded(tuned, remote, tmp_path):
    root, _ = remote
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    push_to_hub(tuned, "owner/name", folder=tmp_path / "copy", private=False, dtype="float16")
    assert sorted(os.listdir(tmp_path / "copy")) == ["README.md", "notes.txt", "tuned.safetensors"]
    assert sorted(os.listdir(root / "owner/name")) == ["README.md", "tuned.safetensors"]
    full = write_repository(tuned, tmp_path / "full") / "tuned.safetensors"
    saved = (root / "owner/name/tuned.safetensors").stat().st_size
    assert full.stat().st_size - saved == pytest.approx(tuned.size_table()["saved_bytes"].sum() / 2, abs=100)


def test_a_local_folder_is_a_repository_too(tuned, tmp_path):
    folder = write_repository(tuned, str(tmp_path / "deep" / "folder"))
    for path in (folder, str(folder)):
        assert equal(from_hub(path, tiny_chain()), tuned)
    assert sorted(os.listdir(folder)) == ["README.md", "tuned.safetensors"]
    with pytest.raises(ValueError, match="revision is 'main', but .*folder.* has none"):
        from_hub(folder, tiny_chain(), revision="main")
    with pytest.raises(ValueError, match="this backbone is tiny with"):
        from_hub(folder, tiny_chain(seed=1))
    write_repository(dataclasses.replace(tuned, scores={"n": 3}), folder)  # once more, over the old one
    assert from_hub(folder, tiny_chain()).scores == {"n": 3}


# ---------------------------------------------------------------- the model card


def test_the_card_tells_what_the_file_is(tuned, tmp_path):
    metadata, text = card_of(write_repository(tuned, tmp_path, repo_id="owner/name"))
    assert "| images | scaled to cover 8 x 8 pixels, the centre cut out |" in text
    assert metadata["library_name"] == "subtuning-lab" and metadata["pipeline_tag"] == "image-classification"
    assert (metadata["backbone"], metadata["task"], metadata["blocks"]) == ("tiny", "tiny", ["block2"])
    assert metadata["classes"] == ["a", "b", "c"] and metadata["siamese"] is False
    assert metadata["backbone_fingerprint"] == tiny_chain().fingerprint
    assert metadata["scores"] == {"test accuracy": 0.75, "n": 12}
    assert metadata["recipe"]["lr"] == 3e-3 and metadata["recipe"]["epochs"] == 1
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE))
    assert rows["test accuracy"] == "0.750" and rows["n"] == "12" and rows["training images"] == "24"
    assert rows["tuned blocks"] == "block2" and "lr 0.003" in text
    size = (tmp_path / "tuned.safetensors").stat().st_size
    assert rows["size"].startswith(f"{size:,} bytes; the whole backbone takes")


def test_the_cards_lines_load_the_task(tmp_path, monkeypatch):
    backbone = load_backbone("lab-resnet")
    head = {"weight": torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), "bias": torch.zeros(2)}
    task = TunedTask(backbone, frozenset(), {"head": head}, ("no", "yes"))
    monkeypatch.chdir(tmp_path)
    write_repository(task, "owner/name", repo_id="owner/name")
    (code,) = re.findall(r"```python\n(.*?)```", card_of("owner/name")[1], re.DOTALL)
    monkeypatch.setattr(lab, "from_hub", from_hub, raising=False)
    names = {}
    exec(code, names)
    assert len(code.splitlines()) == 3 and torch.equal(names["tuned"].weights["head"]["weight"], head["weight"])


def test_the_card_holds_a_studys_own_scores(tmp_path):
    fitted = Study(tiny_chain(), tiny_task(), Recipe(epochs=1), folds=2, device="cpu", progress=False)
    expected = fitted.scores([["block2"]])["accuracy"].mean()
    metadata, _ = card_of(write_repository(fitted.fit(["block2"]), tmp_path))
    assert metadata["scores"]["fold accuracy"] == pytest.approx(expected) and metadata["scores"]["n"] == 2


def test_a_card_without_scores_or_with_odd_names_is_whole(tuned, tmp_path):
    odd = ('a "quoted" | class', "two\nlines: - [x]", "#3")
    bare = dataclasses.replace(tuned, classes=odd, provenance={}, scores={})
    metadata, text = card_of(write_repository(bare, tmp_path))
    assert metadata["classes"] == list(map(printable, odd)) and metadata["scores"] == {}
    assert "No scores were saved" in text and "Recipe: not recorded" in text and "your own Chain, tiny" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table) and len(table) == 10
    assert from_hub(tmp_path, tiny_chain()).classes == odd


ANY_TEXT = st.text(st.characters(exclude_categories=()), min_size=1, max_size=20)
MARK_UP = ["<img src=x onerror=alert(1)>", "](http://evil)", "| a | b |", "`x`", "\x1b[31mred", "\n---\n# Mine", "```"]


@settings(max_examples=60, deadline=None)
@given(st.lists(ANY_TEXT | st.sampled_from(MARK_UP), min_size=3, max_size=3, unique=True))
def test_no_name_leaves_its_line_or_becomes_mark_up(names):
    chain, (name, other, last) = tiny_chain(), names
    chain.name = name
    head = {"weight": torch.zeros(3, 6), "bias": torch.zeros(3)}
    provenance = {"task": other, "n_train": last, "recipe": {name: last, other: [name], last: {"x": name}}}
    task = TunedTask(chain, frozenset(), {"head": head}, tuple(names), provenance=provenance, scores={name: 0.5})
    card = model_card(task, "me/task", 1)
    metadata, text = parsed(card)
    assert metadata["classes"] == list(map(printable, names))
    assert all(printable(line) == line for line in text.split("\n")) and "\x1b" not in card
    plain = text.replace("\\\\", "").replace("\\|", "").replace("\\`", "").replace("\\[", "").replace("\\]", "")
    table = [line for line in plain.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 for line in table) and len(table) == 11
    before_code, code, after = re.split(r"^```(?:python)?$", plain, flags=re.MULTILINE)
    assert not re.search(r"[<>\[\]`]", before_code.replace("[0, 1]", ""))
    assert len(code.strip().splitlines()) == 3 and "Loading onto any other backbone is refused" in after


def test_a_card_is_refused_for_a_repository_that_cannot_be(tuned, tmp_path):
    with pytest.raises(ValueError, match='repo_id is .*; it must be "owner/name"'):
        write_repository(tuned, tmp_path / "new", repo_id='x/y", __import__("os").system("id")) #')
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("repo_id", ["", "name", "a/b/c", "own er/name", "../up", "/abs/none", "owner/", "a/b--c"])
def test_bad_repository_names_are_refused_before_anything_is_written(tuned, remote, tmp_path, repo_id):
    with pytest.raises(ValueError, match=r'repo_id is .*; it must be "owner/name"'):
        from_hub(repo_id, tiny_chain())
    with pytest.raises(ValueError, match=r'repo_id is .*; it must be "owner/name"'):
        push_to_hub(tuned, repo_id, folder=tmp_path / "copy")
    assert not (tmp_path / "copy").exists() and remote[1] == []


def test_a_repository_without_our_file_is_named(tuned, remote, tmp_path):
    (remote[0] / "owner/other").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for where in ("owner/other", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match=f"{where} holds no tuned task: there is no tuned.safetensors"):
            from_hub(where, tiny_chain())
    folder = write_repository(tuned, tmp_path / "cut")
    (folder / "tuned.safetensors").write_bytes((folder / "tuned.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a readable"):
        from_hub(folder, tiny_chain())


def of_the_hub(kind, status):
    """An error as the hub's library raises it."""
    error = kind.__new__(kind)
    Exception.__init__(error, f"status {status}")
    error.response = type("Response", (), {"status_code": status})()
    return error


FAILURES = {
    "not there": (of_the_hub(RepositoryNotFoundError, 404), FileNotFoundError, "no such repository, or it is private"),
    "no revision": (of_the_hub(RevisionNotFoundError, 404), FileNotFoundError, "no such revision"),
    "forbidden": (of_the_hub(HfHubHTTPError, 403), PermissionError, "refuses this account"),
    "no login": (of_the_hub(HfHubHTTPError, 401), PermissionError, "refuses this account"),
    "broken": (of_the_hub(HfHubHTTPError, 500), ConnectionError, "can't be reached"),
    "offline": (LocalEntryNotFoundError("not in the cache"), ConnectionError, "can't be reached.*not in the cache"),
    "no network": (HfHubHTTPError.__bases__[0]("no route"), ConnectionError, "can't be reached.*no route"),
}


@pytest.mark.parametrize(("error", "kind", "message"), FAILURES.values(), ids=FAILURES)
def test_failures_of_the_hub_name_the_repository(tuned, monkeypatch, error, kind, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(kind, match=f"owner/name can't be read: .*{message}"):
        from_hub("owner/name", tiny_chain())
    monkeypatch.setattr(hub.HfApi, "create_repo", fail)
    with pytest.raises(kind, match=f"owner/name can't be written to: .*{message}"):
        push_to_hub(tuned, "owner/name")


def test_the_real_library_without_a_network(tuned, monkeypatch, tmp_path):
    """Nothing is replaced here but the address, which leads nowhere."""
    nowhere, real_api, real_download = "http://127.0.0.1:9", hub.HfApi, hub.snapshot_download
    monkeypatch.setattr(hub, "HfApi", lambda token: real_api(endpoint=nowhere, token=token))
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *a, **k: real_download(*a, **k, endpoint=nowhere, cache_dir=tmp_path)
    )
    with pytest.raises(ConnectionError, match="owner/name can't be read"):
        from_hub("owner/name", tiny_chain())
    with pytest.raises(ConnectionError, match="owner/name can't be written to"):
        push_to_hub(tuned, "owner/name", token="hf_none")
