from functools import partial

import pytest
from small_run import written_by


@pytest.fixture
def shown(monkeypatch, capsys):
    """Run the command in this process; return its output, `out` and `err`."""
    return partial(written_by, monkeypatch, capsys)


@pytest.fixture
def printed(shown):
    """Run the command in this process; return its stdout."""
    return lambda *arguments, **more: shown(*arguments, **more).out
