"""The length of a training, in tokens or in epochs of prepared data."""

import pytest
from compare_runs import assert_same_run, stop_at
from small_run import written_by

from rmkv_cli.config import Config, load_config
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.errors import UserError
from rmkv_cli.training import dry_run, train
from rmkv_cli.training.length import with_length


@pytest.fixture
def in_epochs(make_config):
    """Makes configs that say their length in epochs alone."""

    def make(epochs, **train):
        config = make_config(**train).model_dump(exclude_unset=True)
        del config["train"]["tokens"]
        config["train"]["epochs"] = epochs
        return Config.model_validate(config)

    return make


@pytest.mark.slow
def test_epochs_are_tokens_of_the_training_split_and_the_run_records_both(
    make_config, in_epochs, tmp_path, data, monkeypatch, capsys
):
    tokens = round(0.1 * Manifest.load(data).splits["train"].tokens)
    train(make_config(tokens=tokens), tmp_path / "tokens")
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        train(in_epochs(0.1), tmp_path / "epochs")
    recorded = load_config(tmp_path / "epochs" / "config.toml")
    assert (recorded.train.epochs, recorded.train.tokens) == (0.1, tokens)
    outcome = train(recorded, tmp_path / "epochs", resume=True)
    assert outcome.finished
    assert_same_run(tmp_path / "tokens", tmp_path / "epochs")
    shown = written_by(monkeypatch, capsys, "train", "--resume", "--run", outcome.run, "--set", "train.epochs=0.2")
    assert f"train.tokens: {tokens} before, {round(2 * tokens)} from now on" in shown.err
    assert dry_run(in_epochs(0.1), tmp_path / "new")["tokens"] == tokens


def test_a_stream_has_no_epochs(in_epochs, streamed, tmp_path):
    mix = streamed().train
    config = in_epochs(2, data=None, mix=mix.mix, tokenizer=mix.tokenizer)
    with pytest.raises(UserError, match=r"train\.epochs needs prepared data, .* run `rmkv data mix`"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_epochs_and_other_tokens_are_refused(make_config, in_epochs, data):
    tokens = 2 * Manifest.load(data).splits["train"].tokens
    assert with_length(in_epochs(2)).train.tokens == tokens
    assert with_length(make_config(epochs=2, tokens=tokens)).train.tokens == tokens
    with pytest.raises(UserError) as refused:
        with_length(make_config(epochs=2, tokens=600))
    said = str(refused.value)
    assert said.startswith(f"train.epochs = 2 of {data}")
    assert f" is {tokens:,} tokens, but train.tokens = 600; set only one of them" in said
