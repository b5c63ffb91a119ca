"""The command line on a small model, for tests."""

import io
import subprocess
import sys

import pytest
import torch

from rmkv_cli.cli.main import main
from rmkv_cli.config import MemoryConfig, ModelConfig
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import train_tokenizer

TEXT = "the cat sat on the mat, and the dog sat on the log. "


def save_small_model(folder, text=TEXT, **shape):
    """Write a random model that never ends a text, and its tokenizer; return both."""
    tokenizer = train_tokenizer(iter([text * 20]), 280)
    torch.manual_seed(0)
    config = ModelConfig(
        **{
            "vocab_size": 280,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "segment_length": 8,
            "lookback": 4,
            "memory": MemoryConfig(slots=2),
        }
        | shape
    )
    model = RMKV(config)
    with torch.no_grad():
        model.norm.bias.fill_(3)
        model.embedding.weight[tokenizer.eod] = -1
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return model.eval(), tokenizer


def rmkv(*arguments, stdin=b""):
    """Run the command in a separate process; return the finished process with its output as text."""
    done = subprocess.run([sys.executable, "-m", "rmkv_cli", *map(str, arguments)], input=stdin, capture_output=True)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr
    return done


def written_by(monkeypatch, capsys, *arguments, stdin=b""):
    """Run the command in this process, which is faster than in a separate one; return its output, `out` and `err`."""
    monkeypatch.setattr(sys, "argv", ["rmkv", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as ended:
        main()
    written = capsys.readouterr()
    assert ended.value.code == 0, written.err
    return written


def error_of(monkeypatch, capsys, *arguments):
    """Run the command in this process; return its one line of error."""
    (line,) = errors_of(monkeypatch, capsys, *arguments)
    return line


def errors_of(monkeypatch, capsys, *arguments):
    """Run the command in this process; return its lines of errors, the first with "error: "."""
    monkeypatch.setattr(sys, "argv", ["rmkv", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert all(other.endswith(": done") for other in lines[:first])  # progress
    return lines[first:]
