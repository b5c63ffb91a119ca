"""`rmkv upcycle`: the same function with experts to train."""

import json

import pytest
import torch
from small_run import error_of, rmkv, save_small_model, written_by

from rmkv_cli.model import RMKV


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    save_small_model(folder)
    return folder


def test_an_upcycled_model_is_the_same_function(dense, tmp_path):
    out = tmp_path / "sparse"
    done = rmkv("upcycle", dense, "--experts", "5", "--expert-size", "12", "--out", out)
    assert done.returncode == 0, done.stderr
    before, after = RMKV.from_pretrained(dense), RMKV.from_pretrained(out)
    assert f"{after.count_parameters():,} parameters" in done.stdout
    assert json.loads((out / "config.json").read_text())["experts"] == 5
    ids = torch.randint(before.config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    assert torch.equal(before(ids)[0], after(ids)[0])
    with torch.no_grad():
        for block in after.blocks:
            for expert in block.experts.feed_forwards:
                expert.down.weight.normal_()
    assert not torch.equal(before(ids)[0], after(ids)[0])


def test_experts_begin_as_different_parts_of_the_feed_forward(dense, tmp_path, monkeypatch, capsys):
    size = RMKV.from_pretrained(dense).config.intermediate_size // 2
    out = tmp_path / "sparse"
    written_by(monkeypatch, capsys, "upcycle", dense, "--experts", "2", "--expert-size", str(size), "--out", out)
    block = RMKV.from_pretrained(out).blocks[0]
    both = torch.cat([expert.gate.weight for expert in block.experts.feed_forwards])
    assert {tuple(row) for row in both.tolist()} == {tuple(row) for row in block.feed_forward.gate.weight.tolist()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "1"], "experts_per_token = 2 is more than experts = 1"),
        (["--experts", "4", "--expert-size", "9999"], "--expert-size 9999 is more than the feed-forward's width"),
    ],
)
def test_numbers_that_do_not_fit_are_one_line(dense, tmp_path, monkeypatch, capsys, arguments, message):
    out = tmp_path / "sparse"
    assert message in error_of(monkeypatch, capsys, "upcycle", dense, *arguments, "--out", out)
    assert not out.exists()


def test_a_model_with_experts_or_integers_is_refused(dense, tmp_path, monkeypatch, capsys):
    sparse, small = tmp_path / "sparse", tmp_path / "small"
    written_by(monkeypatch, capsys, "upcycle", dense, "--experts", "2", "--out", sparse)
    written_by(monkeypatch, capsys, "quantize", dense, "--out", small)
    for source, message in ((sparse, "already has 2 experts per layer"), (small, "is quantized")):
        error = error_of(monkeypatch, capsys, "upcycle", source, "--experts", "2", "--out", tmp_path / "new")
        assert message in error
