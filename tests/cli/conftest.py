import io
import sys

import pytest

from rmkv_cli.cli.main import main


@pytest.fixture
def printed(monkeypatch, capsys):
    """Runs the command in this process, which is quicker than in one of its own; returns what it wrote to stdout."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["rmkv", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert ended.value.code == 0, shown.err
        return shown.out

    return run
