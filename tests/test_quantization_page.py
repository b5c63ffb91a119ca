"""docs/quantization.md, line by line, with a small model."""

from pathlib import Path

import pytest
from documented import session
from small_run import written_by
from trained_run import make_data, train_small_run

PAGE = Path(__file__).parents[1] / "docs/quantization.md"


@pytest.mark.slow
def test_every_command_runs_as_documented(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = make_data(tmp_path / "demo")
    train_small_run(data, tmp_path / "demo/run", shape={"hidden_size": 32, "intermediate_size": 32})
    for command in session(PAGE):
        assert written_by(monkeypatch, capsys, *command.words).out
