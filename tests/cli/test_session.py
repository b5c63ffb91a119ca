"""The session of docs/data.md works as documented, against a hub on loopback and with a small model."""

import os
import re
from pathlib import Path

import pytest
from documented import session
from forked import Forker
from hub import Hub
from hub_data import write_real_sets

DOCS = Path(__file__).parents[2] / "docs/data.md"
SMALL = """
model.hidden_size=32 model.num_hidden_layers=2 model.num_attention_heads=2 model.intermediate_size=32
model.segment_length=16 model.lookback=8 model.memory.slots=2 train.tokens=3000 train.batch_size=4
train.micro_batch_size=4 train.segments_max=2 train.eval_tokens=500 train.precision=fp32
"""


@pytest.mark.slow
def test_the_documented_session_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documented = session(DOCS)
    write_real_sets(tmp_path / "sets")
    assert sum("train --preset" in command.line for command in documented) == 3
    with (
        Hub(tmp_path / "sets") as hub,
        Forker("job", "datasets", environment=os.environ | hub.environment(tmp_path / "home")) as forker,
    ):
        for typed in documented:
            words = typed.words
            if words[0] == "train":
                words += [word for setting in SMALL.split() for word in ("--set", setting)]
            words = ["50k" if word == "5M" else word for word in words]
            done = forker.run(*words)
            assert done.returncode == 0, f"{typed.line}\n{done.stderr}"
            assert done.stdout
    losses = [
        re.findall(r'"loss": ([\d.]+), "learning_rate"', (tmp_path / "runs" / run / "metrics.jsonl").read_text())
        for run in ("600m", "prepared")
    ]
    assert len(losses[0]) > 2
    assert losses[0] == losses[1]  # the same rows
