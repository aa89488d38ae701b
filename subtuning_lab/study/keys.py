"""A study's page in the records: the key of every trial, and the row that holds its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from subtuning_lab.data.task import Task
from subtuning_lab.engine.fit import ENGINE_VERSION
from subtuning_lab.nets.chain import Chain
from subtuning_lab.study.records import Records, record_key
from subtuning_lab.study.trials import OtherImages, Score, Trial
from subtuning_lab.utils.hashing import fingerprint_of

_SCORES = ["fold", "seed", "accuracy", "loss", "params", "flops", "epochs", "seconds"]
_OF_RECIPE = ["lr", "head_lr", "weight_decay", "bn"]


class Scorebook:
    """Looks up and notes the scores of one backbone on one task.

    Args:
        records: the run store.
        backbone, task: what the scores are of.
        folds: pairs of training and validation indices.
        device: that trainings run on.
        image_size: side in pixels that images are resized to, or None.
    """

    def __init__(
        self,
        records: Records,
        backbone: Chain,
        task: Task,
        folds: Sequence[tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
        image_size: int | None = None,
    ):
        self.records, self.backbone_name, self.task, self.folds = records, backbone.name, task, folds
        self.device, self.image_size = device, image_size
        self.fingerprints = {"backbone": backbone.fingerprint, "task": task.fingerprint}
        head = backbone.source_head
        self._source_head = None if head is None else fingerprint_of({"head": head}, (), ())

    def found(self, trials: Sequence[Trial]) -> dict[Trial, dict[str, object]]:
        """The rows of those trials that have one."""
        keys = {trial: self.key(trial) for trial in trials}
        rows = self.records.get(list(keys.values()))
        return {trial: rows[key] for trial, key in keys.items() if key in rows}

    def note(self, scores: Mapping[Trial, Score]) -> None:
        """Writes the rows of finished trials, in one transaction."""
        self.records.put([self._row(trial, score) for trial, score in scores.items()])

    def table(self, trials: Sequence[Trial]) -> pd.DataFrame:
        """One row per trial, all of which are in the records, with what it was and its score."""
        rows = self.found(trials)
        table = pd.DataFrame([rows[trial] for trial in trials], columns=_SCORES)
        table.insert(0, "blocks", [trial.blocks for trial in trials])
        for name in _OF_RECIPE:
            table[name] = [getattr(trial.recipe, name, None) for trial in trials]
        return table

    def count_test(self, other: OtherImages | None = None) -> int:
        """Notes one use of the test split, or of other images; returns how many there have been."""
        scored = {} if other is None else {"scored_on": other.fingerprint}
        return self.records.count_test(record_key(self.fingerprints | scored))

    def sizes(self, trial: Trial) -> tuple[int, int]:
        """Images that a trial is trained on, and scored on."""
        if trial.fold is not None:
            return tuple(len(rows) for rows in self.folds[trial.fold])
        held_out = len(self.folds[0][1]) if trial.stops_early else 0
        scored = self.task.test if trial.other is None else trial.other.split
        return len(self.task.train) - held_out, len(scored or ())

    def key(self, trial: Trial) -> str:
        """The key of a trial's row."""
        return record_key(self._determined_by(trial))

    def _determined_by(self, trial: Trial) -> dict[str, object]:
        """Everything that a score depends on."""
        folds = {} if trial.fold is None and not trial.stops_early else {"folds": len(self.folds)}
        own = {"recipe": trial.settings(), "blocks": trial.blocks, "fold": trial.fold, "seed": trial.seed}
        if trial.method:
            own["image_size"] = self.image_size  # a subset's recipe says it
        if trial.reads_source_head:
            own["source_head"] = self._source_head
        if trial.other is not None:
            own["scored_on"] = trial.other.fingerprint
        return {**self.fingerprints, **folds, **own, "engine": ENGINE_VERSION}

    def _row(self, trial: Trial, score: Score) -> dict[str, object]:
        n_train, n_scored = self.sizes(trial)
        return {
            "key": self.key(trial),
            "split": "test" if trial.fold is None else "fold",
            "backbone": self.backbone_name,
            "task": self.task.name if trial.other is None else f"{self.task.name}, scored on other images",
            "blocks": list(trial.blocks),
            "fold": trial.fold,
            "seed": trial.seed,
            "accuracy": score.accuracy,
            "loss": score.loss,
            "n_train": n_train,
            "n_scored": n_scored,
            "params": score.params,
            "flops": float(score.flops * n_train * score.epochs),
            "epochs": score.epochs,
            "seconds": score.seconds,
            "device": self.device.type,
            "recipe": trial.settings(),
            "determined_by": self._determined_by(trial),
        }
