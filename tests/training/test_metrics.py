"""A line of metrics.jsonl is a record only if it has the types that its readers rely on."""

import math
import os

import pytest

from rmkv_cli.errors import UserError
from rmkv_cli.training.metrics import Metrics, best_validation, read_metrics

GOOD = '{"step": 1, "tokens": 8, "loss": 2.5}'


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        "7",
        '{"step": "1", "tokens": 8}',
        '{"step": true, "tokens": 8}',
        '{"step": 1, "tokens": 8, "validation": 3}',
        '{"step": 1, "tokens": 8, "validation": {}}',
        '{"step": 1, "tokens": 8, "validation": {"loss": "low"}}',
        '{"step": 1, "tokens": 8, "validation": {"loss": 1.5, "perplexity": []}}',
        f'{{"step": 1, "tokens": 8, "loss": 1{"0" * 400}}}',
    ],
    ids=lambda line: line[:60],
)
def test_a_line_with_other_types_is_not_a_record_and_loses_no_other(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    metrics = Metrics(tmp_path / "metrics.jsonl", 1)
    assert best_validation(metrics.records) == (math.inf, None)
    metrics.close()


def test_a_pipe_in_its_place_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_the_best_validation_is_the_first_of_the_lowest_losses_that_are_numbers():
    losses = [math.nan, 3.0, math.nan, 2.5, 2.5, 2.75, math.inf]
    records = [{"step": step, "validation": {"loss": loss}} for step, loss in enumerate(losses, 1)]
    assert best_validation([*records, {"step": 9, "loss": 1.0}]) == (2.5, 4)
    assert best_validation(records[:1]) == (math.inf, None)
