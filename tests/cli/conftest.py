from functools import partial

import pytest
from small_run import output_of


@pytest.fixture
def printed(monkeypatch, capsys):
    """Runs the command in this process, which is quicker than in one of its own; returns what it wrote to stdout."""
    return partial(output_of, monkeypatch, capsys)
