"""Measures of a model: its loss on texts, its accuracy in tasks, the effect of its memory, and an n-gram baseline."""

from rmkv_cli.evaluation.inspect import LayerMemory, MemoryReport, inspect_memory
from rmkv_cli.evaluation.measure import Losses, PositionLoss, Report, Score, measure, read_losses, report_on
from rmkv_cli.evaluation.memory import MemoryEffect, memory_effect
from rmkv_cli.evaluation.ngram import Baseline, NGram, measure_baseline, texts
from rmkv_cli.evaluation.sample import write_sample
from rmkv_cli.evaluation.tasks import Cell, TaskReport, find_task, held_out_text, task_accuracy

__all__ = [
    "Baseline",
    "Cell",
    "LayerMemory",
    "Losses",
    "MemoryEffect",
    "MemoryReport",
    "NGram",
    "PositionLoss",
    "Report",
    "Score",
    "TaskReport",
    "find_task",
    "held_out_text",
    "inspect_memory",
    "measure",
    "measure_baseline",
    "memory_effect",
    "read_losses",
    "report_on",
    "task_accuracy",
    "texts",
    "write_sample",
]
