"""SubTuning Lab: learn, run and trust selective layer finetuning."""

from subtuning_lab.backbones import backbone_names, load_backbone
from subtuning_lab.chain import Chain, count_parameters, part_table, set_trainable
from subtuning_lab.deltas import TunedTask, load_tuned
from subtuning_lab.profiles import Profile, finetuning_profile, pair_profile
from subtuning_lab.recipe import Recipe
from subtuning_lab.records import Records
from subtuning_lab.study import Study, TestResult
from subtuning_lab.tasks import Split, Task, load_task, task_names
from subtuning_lab.training import Fit, fit_together

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "Fit",
    "Profile",
    "Recipe",
    "Records",
    "Split",
    "Study",
    "Task",
    "TestResult",
    "TunedTask",
    "backbone_names",
    "count_parameters",
    "finetuning_profile",
    "fit_together",
    "load_backbone",
    "load_task",
    "load_tuned",
    "pair_profile",
    "part_table",
    "set_trainable",
    "task_names",
]
