import json

import pytest

from rmkv_cli.config import MixConfig
from rmkv_cli.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(iter(["A few words, and numbers such as 12 or 3.", "def f(x): return x"] * 2), 300)


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes texts to a jsonl file in tmp_path and returns its name."""

    def write(name, texts):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
        return name

    return write


@pytest.fixture
def mix_of():
    """Makes a mix of {name: (weight, file)} sources; a number instead of a file is the vocabulary of noise."""

    def make(sources, **rest):
        tables = [
            {"name": name, "weight": weight}
            | ({"kind": "noise", "vocab": it} if isinstance(it, int) else {"kind": "files", "files": [it]})
            for name, (weight, it) in sources.items()
        ]
        return MixConfig(sources=tables, **rest)

    return make
