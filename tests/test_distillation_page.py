"""docs/distillation.md, line by line, with a small teacher and less training."""

from pathlib import Path

import pytest
from documented import blocks, session
from small_run import written_by

from rmkv_cli.config import Config, MixConfig, load_config, preset_path
from rmkv_cli.config.load import parse
from rmkv_cli.data.mix import prepare
from rmkv_cli.tokenizer import train_tokenizer
from rmkv_cli.training import train

PAGE = Path(__file__).parents[1] / "docs/distillation.md"
TEXT = "the cat sat on the mat, and the dog sat on the log. "
SHORTER = ["--set", "train.tokens=2000", "--set", "train.eval_tokens=500", "--set", "train.device=cpu"]


@pytest.fixture
def first(tmp_path, monkeypatch):
    """Smaller versions of the folder `data` and the run `runs/first` from the first hour."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(TEXT * (1 + number % 9))
    tokenizer = train_tokenizer(iter([TEXT * 20]), 280)
    source = {"kind": "files", "name": "texts", "weight": 1, "files": ["texts/*.txt"]}
    prepare(MixConfig(validation=0.2, sources=[source]), tmp_path, tokenizer, Path("data"), workers=1)
    keys = ["train.data=data", "train.tokens=2000", "train.eval_tokens=500", "train.device=cpu"]
    train(load_config(preset_path("tiny"), keys), Path("runs/first"))


@pytest.mark.slow
@pytest.mark.usefixtures("first")
def test_every_command_runs_as_documented(monkeypatch, capsys):
    distil, *others = session(PAGE)
    written_by(monkeypatch, capsys, *distil.words, *SHORTER)
    assert "kl" in Path("runs/small/metrics.jsonl").read_text()
    for command in others:
        assert written_by(monkeypatch, capsys, *command.words).out


def test_its_stages_match_the_preset():
    import tomllib

    (text,) = blocks(PAGE, "toml")
    shown = parse(Config, tomllib.loads(text), str(PAGE)).train.stages
    preset = load_config(preset_path("convert")).train.stages
    assert [stage.kind for stage in shown] == [stage.kind for stage in preset]
    assert [stage.share for stage in shown] == [stage.share for stage in preset]
