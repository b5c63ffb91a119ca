import shutil

import pytest
from report_pages import data_of
from trained_run import make_data, train_small_run

from rmkv_cli.config import RecallSource
from rmkv_cli.data.documents import Documents
from rmkv_cli.evaluation import measure, memory_effect, task_accuracy
from rmkv_cli.evaluation.kept import DocumentsReport, Evaluation, keep_evaluation
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run that was trained, with its data beside it."""
    place = tmp_path_factory.mktemp("trained")
    return train_small_run(make_data(place / "story"), place / "first")


@pytest.fixture
def run(trained, tmp_path):
    """A run that nothing was measured of."""
    shutil.copytree(trained, tmp_path / "first", symlinks=True)
    return tmp_path / "first"


@pytest.fixture(scope="session")
def measured(trained):
    """What was found of the run on its held-out documents and on a task."""
    model, tokenizer = RMKV.from_pretrained(trained), Tokenizer.load(trained)
    documents = Documents.open(data_of(trained), "validation")
    report = measure(model, documents, tokenizer=tokenizer)
    effect = memory_effect(model, documents, tokenizer=tokenizer)
    task = RecallSource(kind="recall", name="r", weight=1, pairs=[1, 2], segments=[0, 1, 3], segment_length=40)
    return {
        "validation": DocumentsReport(**vars(report), memory=effect),
        "recall": task_accuracy(model, task, tokenizer, examples=2),
    }


@pytest.fixture
def evaluated(run, measured):
    """A run that keeps what was found of it; and that."""
    step = int((run / "latest").resolve().name.removeprefix("step-"))
    for name, its in measured.items():
        keep_evaluation(run, name, Evaluation(step, f"rmkv eval --{name}", its))
    return run, measured
