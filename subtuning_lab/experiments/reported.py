"""What the paper and its neighbours report, as data with sources. A number that was not found is NaN, never a guess.

Accuracies are in [0, 1]. The paper is Kaplun et al., "Less is More: Selective Layer Finetuning with SubTuning",
arXiv 2302.06354.
"""

from typing import Any

import pandas as pd

from subtuning_lab.utils.validation import OneOf, checked

PAPER = "Kaplun et al., arXiv 2302.06354"
_CODE = "official code of the paper"
_NOAH = "NOAH, table 1"
_TASK_ADAPTATION = "task_adaptation results (Sup-100%)"
_REPLICATION = "independent replication of surgical finetuning"
_VTAB_TASKS = ("CIFAR-100", "Caltech101", "Flowers102", "DMLab")
_NAN = float("nan")

# method, backbone, accuracy in per cent on the four tasks, source
_VTAB = (
    ("full finetuning", "ResNet-50", (57.0, 91.0, 88.6, 36.3), _TASK_ADAPTATION),
    ("full finetuning", "ViT-B/16", (68.9, 87.7, 87.2, 41.7), _NOAH),
    ("linear probing", "ViT-B/16", (64.4, 85.0, 97.0, 33.2), _NOAH),
    ("LoRA", "ViT-B/16", (67.1, 91.4, 98.8, 49.8), _NOAH),
    ("VPT", "ViT-B/16", (78.8, 90.8, 98.0, 46.5), _NOAH),
    ("Adapter", "ViT-B/16", (69.2, 90.1, 98.8, 48.6), _NOAH),
    ("SubTuning", "ResNet-50, ViT-B/16", (_NAN,) * 4, "the paper's table 1, not found in a readable source"),
)

# subset, accuracy in per cent, source
_PROFILE = (
    ("B1", 94.0, f"{PAPER}, figure 1 (left)"),
    ("B14", 95.5, f"{PAPER}, figure 1 (left)"),
    ("B2 + B14 (best pair)", _NAN, f"{PAPER}, exhaustive search over pairs; its accuracy was not found"),
)

# training images, tuned, accuracy in per cent
_SURGICAL = (
    (1000, "first stage", 77.0),
    (1000, "all stages", 78.2),
    (3000, "first stage", 80.2),
    (3000, "all stages", 79.4),
)


def _share(per_cent: float) -> float:
    return round(per_cent / 100, 4)


def _profile_table() -> pd.DataFrame:
    rows = [("ResNet-50", "CIFAR-10", subset, _share(accuracy), source) for subset, accuracy, source in _PROFILE]
    return pd.DataFrame(rows, columns=["backbone", "task", "subset", "accuracy", "source"])


def _vtab_table() -> pd.DataFrame:
    rows = [
        (method, backbone, task, 1000, _share(accuracy), source)
        for method, backbone, accuracies, source in _VTAB
        for task, accuracy in zip(_VTAB_TASKS, accuracies, strict=True)
    ]
    return pd.DataFrame(rows, columns=["method", "backbone", "task", "n_train", "accuracy", "source"])


def _surgical_table() -> pd.DataFrame:
    rows = [("CIFAR-10-C", n, tuned, _share(accuracy), _REPLICATION) for n, tuned, accuracy in _SURGICAL]
    return pd.DataFrame(rows, columns=["task", "n_train", "tuned", "accuracy", "source"])


_TABLES = {
    "finetuning_profiles": _profile_table,
    "low_data": _vtab_table,
    "distribution_shift": _surgical_table,
}


@checked(section=OneOf(tuple(_TABLES)))
def reported(section: str) -> pd.DataFrame:
    """Return what is reported for a section of the paper, one number a row with its source.

    Args:
        section: "finetuning_profiles" (single blocks and the best pair), "low_data" (VTAB-1k, 1,000 training images)
            or "distribution_shift" (surgical finetuning on CIFAR-10-C).
    Returns:
        A tidy table; `accuracy` is top-1 in [0, 1], NaN where no number was found.
    """
    return _TABLES[section]()


_COMMON = {"optimizer": "AdamW", "schedule": "cosine", "source": _CODE}
_TRAINING = _COMMON | {
    "batch_size": 256,
    "precision": "fp16",
    "image_size": 224,
    "augmentation": "random resized crop and flip",
}
_RESNET50 = _TRAINING | {"lr": 1e-3, "weight_decay": 1e-2, "epochs": 20, "repeats": 5}

_RECIPES: dict[str, dict[str, Any]] = {
    "resnet50_profile": _RESNET50,
    "resnet50_vtab": _RESNET50,
    "resnet50_full_finetuning": _TRAINING | {"lr": 1e-3, "weight_decay": 1e-2, "epochs": 10, "task": "CIFAR-100"},
    "resnet50_full_finetuning_older": _TRAINING | {"lr": 2e-4, "weight_decay": 5e-3, "task": "CIFAR-100"},
    "resnet50_linear_probing": _TRAINING | {"lr": 1e-2, "weight_decay": 1e-2, "epochs": 10},
    "resnet50_linear_probing_older": _TRAINING | {"lr": 5e-2, "weight_decay": 5e-5},
    "vit_b16": _TRAINING
    | {"lr": 1e-4, "weight_decay": 5e-5, "epochs": 10, "precision": "fp32", "folds": 5, "epsilon": 0.01},
    "active_learning": _TRAINING
    | {
        "blocks": "layer2 block 3",
        "epochs": 50,
        "added_labels": (100, 400, 500, 1500, 2500, 5000, 10000),
    },
    "channel_pruning": _TRAINING | {"blocks": "layer4", "ratio": 0.5, "criterion": "local L1"},
    "reinitialization": _TRAINING | {"blocks": "layer1 block 1"},
    "siamese": _TRAINING | {"blocks": "layer1 block 1", "n_train": 5000},
    "latency": {
        "batch_size": 1,
        "image_size": 224,
        "precision": "fp32",
        "runtime": "TorchScript",
        "warmup_runs": 300,
        "timed_runs": 300,
        "statistic": "median of medians",
        "device": "A100",
        "source": f"{_CODE}; device from {PAPER}",
    },
}


@checked(run=OneOf(tuple(_RECIPES)))
def official_recipe(run: str) -> dict[str, Any]:
    """Return the settings of one of the official runs; what was not found is not in the dictionary.

    Args:
        run: name of the run, such as "resnet50_profile", "vit_b16" or "latency".
    Returns:
        Names and values, with their `source`.
    """
    return dict(_RECIPES[run])
