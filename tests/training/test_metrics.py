"""Lines of a metrics.jsonl from anywhere: a record has the types that all who read it rely on, or it is none."""

import os

import pytest

from rmkv_cli.errors import UserError
from rmkv_cli.training.metrics import Metrics, read_metrics

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
def test_a_line_of_other_types_is_no_record_and_costs_no_other(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    metrics = Metrics(tmp_path / "metrics.jsonl", 1)
    assert metrics.best() == float("inf")
    metrics.close()


def test_a_pipe_in_its_place_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        read_metrics(tmp_path / "metrics.jsonl")
