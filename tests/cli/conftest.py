import io
import sys

import pytest

from rmkv_cli.cli.main import main


@pytest.fixture
def shown(monkeypatch, capsys):
    """Runs the command in this process, which is quicker than in one of its own; returns what it wrote, out and err."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["rmkv", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main()
        wrote = capsys.readouterr()
        assert ended.value.code == 0, wrote.err
        return wrote

    return run


@pytest.fixture
def printed(shown):
    """Runs the command in this process; returns what it wrote to stdout."""
    return lambda *arguments, **more: shown(*arguments, **more).out
