"""Tuned tasks on the Hugging Face hub, or in a folder that looks the same: the file and a model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import timm
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.utils import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    validate_repo_id,
)

from subtuning_lab.inference.checkpoint import STORED_DTYPES
from subtuning_lab.inference.tuned_task import TunedTask, load_tuned, show_score
from subtuning_lab.nets.chain import Chain, in_order
from subtuning_lab.nets.registry import BUNDLED, CIFAR_PREFIX
from subtuning_lab.utils.files import expanded, write_atomically
from subtuning_lab.utils.text import markdown, printable
from subtuning_lab.utils.validation import Is, OneOf, Text, checked, shown

WEIGHTS_FILE, CARD_FILE = "tuned.safetensors", "README.md"
_PLACE, _DTYPE = Is((str, Path)), OneOf(tuple(STORED_DTYPES))
_MOST_NAMES = 50  # of classes in the card's table; its metadata has them all
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }} on {{ base }}

Some blocks of a pretrained backbone, tuned for one task, and a readout. Everything else is the backbone's own and not in this repository.

| | |
|---|---|
{% for key, value in rows %}| {{ key }} | {{ value }} |
{% endfor %}
{{ "Scores are accuracies in [0, 1]." if scores else "No scores were saved with it." }}

Recipe: {{ recipe or "not recorded" }}.

## Loading

```python
import subtuning_lab as lab
backbone = {{ backbone }}
tuned = lab.from_hub("{{ repo_id }}", backbone)
```

Loading onto any other backbone is refused. `tuned.predict(images)` takes paths or arrays; `tuned.network()` maps what `tuned.prepare(images)` gives to logits.
"""  # noqa: E501
# The hub library's releases use one of two HTTP libraries; what their errors have in common is a base of its own.
_NETWORK_ERRORS = (OSError, *HfHubHTTPError.__bases__)


@checked
def push_to_hub(
    tuned: TunedTask,
    repo_id: Annotated[str, Is(str)],
    *,
    token: Annotated[str | None, Text().or_none()] = None,
    private: bool = True,
    folder: Annotated[str | Path | None, _PLACE.or_none()] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
) -> str:
    """Uploads a tuned task and its model card to the hub.

    Args:
        tuned: what to share; the card tells its task, classes, recipe and scores.
        repo_id: "owner/name"; made when missing.
        token: of the account; by default the one that is logged in.
        private: of a new repository; one that is there stays as it is.
        folder: where to keep a copy of what is uploaded; None keeps none.
        dtype: as for `TunedTask.save`.
    Returns:
        The repository's address.
    Raises:
        ValueError: no such form of repo_id, or what `TunedTask.save` refuses.
        PermissionError: the account may not write there.
        ConnectionError: the hub can't be reached, or failed.
    """
    _check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        written = write_repository(tuned, folder or temporary, repo_id=repo_id, dtype=dtype)
        with _telling(repo_id, "written to"):
            api = HfApi(token=token)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=written,
                allow_patterns=[WEIGHTS_FILE, CARD_FILE],  # the folder may hold other things
                commit_message=f"Tuned task {_task_name(tuned)}",
            )
    return str(address)


@checked(repo_id=_PLACE, revision=Text().or_none(), token=Text().or_none())
def from_hub(
    repo_id: str | Path, backbone: Chain, *, revision: str | None = None, token: str | None = None
) -> TunedTask:
    """A tuned task from the hub, or from a local folder.

    Args:
        repo_id: "owner/name", or a folder that `write_repository` wrote.
        backbone: the pretrained chain that it was tuned from.
        revision: branch, tag or commit; by default the newest. A folder has none.
        token: for private repositories; by default the one that is logged in.
    Raises:
        FileNotFoundError: no such repository or revision, or no tuned task in it.
        PermissionError: the account may not read it.
        ConnectionError: the hub can't be reached, and the repository isn't in the cache.
        ValueError: no such form of repo_id, or what `load_tuned` refuses.
    """
    if str(repo_id) and expanded(repo_id).is_dir():  # an empty path would be the current folder
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {repo_id} is a folder, which has none")
        folder = expanded(repo_id)
    else:
        _check_repo_id(repo_id)
        with _telling(repo_id, "read"):
            folder = Path(
                snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[WEIGHTS_FILE, CARD_FILE])
            )
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{repo_id} holds no tuned task: there is no {WEIGHTS_FILE} in it")
    return load_tuned(folder / WEIGHTS_FILE, backbone)


@checked(folder=_PLACE, repo_id=Is(str), dtype=_DTYPE)
def write_repository(
    tuned: TunedTask, folder: str | Path, *, repo_id: str = "OWNER/NAME", dtype: str | None = None
) -> Path:
    """Writes what a repository holds, the tuned task's file and its model card, into a folder.

    Args:
        tuned: what to share.
        folder: made when missing; other files in it are left alone.
        repo_id: what the card calls the repository.
        dtype: as for `TunedTask.save`.
    Returns:
        The folder.
    """
    _check_repo_id(repo_id)
    folder = expanded(folder)
    path = tuned.save(folder / WEIGHTS_FILE, dtype)
    write_atomically(folder / CARD_FILE, model_card(tuned, repo_id, path.stat().st_size).encode())
    return folder


def model_card(tuned: TunedTask, repo_id: str, file_bytes: int) -> str:
    """The model card (Markdown with YAML metadata) of a tuned task.

    Names and values, which may come from anybody's file, can't leave their line or become mark-up.

    Args:
        tuned: what it is about.
        repo_id: what to load it by.
        file_bytes: size of the file beside it.
    """
    card = ModelCard.from_template(
        _metadata(tuned),
        template_str=_TEMPLATE,
        name=markdown(_task_name(tuned)),
        base=markdown(tuned.backbone.name),
        rows=[(markdown(key), markdown(value)) for key, value in _facts(tuned, file_bytes).items()],
        scores=tuned.scores,
        recipe=", ".join(markdown(f"{key} {value}") for key, value in _recipe(tuned).items()),
        backbone=_loading(tuned.backbone.name),
        repo_id=repo_id,
    )
    return f"{str(card).strip()}\n"


def _facts(tuned: TunedTask, file_bytes: int) -> dict[str, object]:
    """The rows of the card's table."""
    base, more = tuned.backbone, len(tuned.classes) - _MOST_NAMES
    classes = f"{len(tuned.classes)}: {', '.join(tuned.classes[:_MOST_NAMES])}{f' and {more} more' * (more > 0)}"
    readout = "frozen and tuned features (Siamese)" if tuned.siamese else "tuned features"
    return {
        "task": _task_name(tuned),
        "classes": classes,
        "training images": tuned.provenance.get("n_train", "not recorded"),
        "backbone": f"{base.name}, fingerprint {base.fingerprint[:12]}",
        "tuned blocks": ", ".join(in_order(base, tuned.blocks)) or "none (linear probing)",
        **({"pruned blocks": ", ".join(in_order(base, tuned.pruned))} if tuned.pruned else {}),
        "readout": readout + (f", {tuned.head_depth} layers" if tuned.head_depth > 1 else ""),
        "images": _images(tuned),
        "size": f"{file_bytes:,} bytes; the whole backbone takes {tuned.size_table()['backbone_bytes'].sum():,}",
        **{name: show_score(value) for name, value in tuned.scores.items()},
    }


def _metadata(tuned: TunedTask) -> ModelCardData:
    return ModelCardData(
        library_name="subtuning-lab",
        pipeline_tag="image-classification",
        tags=["subtuning-lab", "subtuning", "image-classification"],
        backbone=tuned.backbone.name,
        backbone_fingerprint=tuned.backbone.fingerprint,
        task=printable(_task_name(tuned)),
        classes=list(map(printable, tuned.classes)),
        blocks=list(in_order(tuned.backbone, tuned.blocks)),
        siamese=tuned.siamese,
        recipe=_recipe(tuned),
        scores={printable(name): value for name, value in tuned.scores.items()},
    )


def _loading(name: str) -> str:
    """The expression that loads a backbone."""
    by_name = name in BUNDLED or name.startswith(CIFAR_PREFIX) or timm.is_model(name.split(".")[0])
    return f"lab.load_backbone({json.dumps(name)})" if by_name else f"...  # your own Chain, {printable(name)}"


def _recipe(tuned: TunedTask) -> dict[str, object]:
    """The recipe's plain values; a file could hold anything in its place."""
    recipe = tuned.provenance.get("recipe")
    items = recipe.items() if isinstance(recipe, Mapping) else ()
    return {
        printable(key): shown(value) if isinstance(value, str) and len(value) > 80 else value
        for key, value in items
        if isinstance(key, str) and isinstance(value, bool | int | float | str)
    }


def _images(tuned: TunedTask) -> str:
    steps = tuned.preparation
    crop = steps.crop_size and "scaled to cover {} x {} pixels, the centre cut out".format(*steps.crop_size)
    squash = steps.image_size and f"squashed to {steps.image_size} x {steps.image_size}"
    return ", then ".join(filter(None, (crop, squash))) or "of any size"


def _task_name(tuned: TunedTask) -> str:
    return str(tuned.provenance.get("task", "a task"))


def _check_repo_id(repo_id: object) -> None:
    try:
        validate_repo_id(repo_id)
        good = repo_id.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise ValueError(
            f'repo_id is {str(repo_id)!r}; it must be "owner/name" out of letters, digits, "-", "_" and ".", '
            "or, for loading, a folder that is there"
        )


@contextmanager
def _telling(repo_id: str, what: str) -> Iterator[None]:
    """Turns the hub's many errors into ones that name the repository."""
    try:
        yield
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} can't be {what}: the hub has no such repository, or it is private; give a token"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} can't be {what}: it has no such revision") from error
    except _NETWORK_ERRORS as error:
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        kind = PermissionError if refused else ConnectionError
        reason = "the hub refuses this account" if refused else "the hub can't be reached"
        raise kind(f"{repo_id} can't be {what}: {reason} ({type(error).__name__}: {error})") from error
