"""How well a model predicts text and solves tasks, what its memory does for it, and the baseline to beat."""

from rmkv_cli.evaluation.inspect import LayerMemory, MemoryReport, inspect_memory
from rmkv_cli.evaluation.measure import Losses, PositionLoss, Report, Score, measure, read_losses, report_on
from rmkv_cli.evaluation.memory import MemoryEffect, memory_effect
from rmkv_cli.evaluation.ngram import NGram, texts
from rmkv_cli.evaluation.sample import write_sample
from rmkv_cli.evaluation.tasks import Cell, TaskReport, find_task, held_out_text, task_accuracy

__all__ = [
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
    "memory_effect",
    "read_losses",
    "report_on",
    "task_accuracy",
    "texts",
    "write_sample",
]
