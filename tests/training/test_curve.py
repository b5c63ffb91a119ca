"""The loss curve as a picture and in the terminal."""

import json
import sys

import pytest

from rmkv_cli.errors import UserError
from rmkv_cli.training.curve import draw_loss_curve


def test_it_shows_training_and_held_out_loss(tmp_path):
    records = [{"step": i, "tokens": 10 * i, "loss": 8 / i} for i in range(1, 500)]
    records.append({"step": 499, "tokens": 4990, "validation": {"loss": 1.0}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    picture = draw_loss_curve(tmp_path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "loss in nats per token" in picture
    assert "\x1b" not in picture
    assert max(map(len, picture.splitlines())) <= 80


def test_a_missing_requirement_is_reported(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="has no metrics yet"):
        draw_loss_curve(tmp_path, tmp_path / "loss.png")
    monkeypatch.setitem(sys.modules, "plotext", None)
    with pytest.raises(UserError, match="plotext is not installed; pip install"):
        draw_loss_curve(tmp_path, tmp_path / "loss.png")
