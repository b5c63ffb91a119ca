from functools import partial

import pytest
from small_run import written_by


@pytest.fixture
def shown(monkeypatch, capsys):
    """Runs the command in this process; returns what it wrote, `out` and `err`."""
    return partial(written_by, monkeypatch, capsys)


@pytest.fixture
def printed(shown):
    """Runs the command in this process; returns what it wrote to stdout."""
    return lambda *arguments, **more: shown(*arguments, **more).out
