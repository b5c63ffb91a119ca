"""A run starts from an existing model: its weights, shape and tokenizer, and no others."""

import re
import shutil

import pytest
import torch
from compare_runs import assert_same_run, curve, stop_at, weights
from safetensors.torch import load_file, save_file
from small_run import error_of, errors_of, written_by

from rmkv_cli.config import MixConfig, dump_toml, load_config
from rmkv_cli.data.mix import prepare
from rmkv_cli.errors import UserError
from rmkv_cli.files import sha256
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.tokenizer import train_tokenizer
from rmkv_cli.training import dry_run, loop, train


@pytest.fixture(scope="module")
def source(make_config, tmp_path_factory):
    """A run of 9 steps, to start from."""
    return train(make_config(seed=5), tmp_path_factory.mktemp("source") / "source").run


@pytest.fixture
def begun(make_config, source):
    """Makes configs of runs that start from the source's newest checkpoint."""
    return lambda **keys: make_config(**{"from_model": str(find_model(source))} | keys)


@pytest.fixture
def recipe(make_config, tmp_path):
    """A config file that has a `[train]` section alone."""
    text = dump_toml(make_config())
    (tmp_path / "recipe.toml").write_text(text[text.index("[train]") :])
    return tmp_path / "recipe.toml"


@pytest.mark.parametrize("kind", ["a run", "a checkpoint", "a model folder", "in bfloat16"])
def test_the_first_step_has_the_weights_of_the_model(kind, source, recipe, tmp_path, monkeypatch, capsys):
    model = {"a run": source, "a checkpoint": find_model(source)}.get(kind, tmp_path / "model")
    if model == tmp_path / "model":
        dtype = torch.bfloat16 if kind == "in bfloat16" else torch.float32
        RMKV.from_pretrained(source, dtype=dtype).save_pretrained(model)
        shutil.copy(source / "tokenizer.json", model)
    begun = {name: x.float() for name, x in load_file(find_model(model) / "model.safetensors").items()}
    command = ["train", "--from", model, "--config", recipe, "--run", tmp_path / "run"]
    still = ["--set", "train.learning_rate=1e-30", "--set", "train.final_learning_rate=0", "--set", "train.tokens=1"]
    written_by(monkeypatch, capsys, *command, *still)
    assert all(torch.equal(x, begun[name]) for name, x in weights(tmp_path / "run").items())
    config = load_config(tmp_path / "run" / "config.toml")
    assert config.train.from_model == str(find_model(model))
    assert config.train.from_sha256 == sha256(find_model(model) / "model.safetensors")
    assert config.model == load_config(source / "config.toml").model


def test_its_config_repeats_the_run_bit_for_bit(begun, tmp_path, monkeypatch, capsys):
    run = train(begun(tokens=300), tmp_path / "run").run
    written_by(monkeypatch, capsys, "train", "--config", run / "config.toml", "--run", tmp_path / "again")
    assert_same_run(run, tmp_path / "again")


@pytest.mark.slow
def test_stopped_and_resumed_without_the_source_it_is_bit_for_bit_the_same(begun, source, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(find_model(source), copy)
    whole = train(begun(), tmp_path / "whole").run
    stop_at(monkeypatch, 3)
    run = train(begun(from_model=str(copy)), tmp_path / "run").run
    shutil.rmtree(copy)
    stop_at(monkeypatch, None)
    train(load_config(run / "config.toml"), run, resume=True)
    assert_same_run(whole, run)


@pytest.mark.slow
def test_killed_before_its_first_checkpoint_it_starts_from_the_same_weights_or_not_at_all(
    begun, source, tmp_path, monkeypatch, capsys
):
    copy = tmp_path / "copy"
    RMKV.from_pretrained(source).save_pretrained(copy)
    shutil.copy(source / "tokenizer.json", copy)

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Trainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(begun(from_model=str(copy)), tmp_path / "run")
    resume = ["train", "--resume", "--run", tmp_path / "run"]
    good = load_file(copy / "model.safetensors")
    save_file({name: x + 1 for name, x in good.items()}, copy / "model.safetensors")
    line = error_of(monkeypatch, capsys, *resume)
    assert f"{copy / 'model.safetensors'}: is not the file that the run starts from: its SHA-256 is" in line
    copy.rename(tmp_path / "moved")
    line = error_of(monkeypatch, capsys, *resume)
    assert f"{copy}: the model that the run starts from no longer exists, and no checkpoint has its weights" in line
    (tmp_path / "moved").rename(copy)
    RMKV.from_pretrained(source).save_pretrained(copy)
    written_by(monkeypatch, capsys, *resume)
    whole = train(begun(), tmp_path / "whole").run
    assert_same_run(whole, tmp_path / "run")


def test_each_key_that_contradicts_the_model_has_its_line(source, recipe, tmp_path, monkeypatch, capsys):
    recipe.write_text(
        "[model]\nhidden_size = 32\nnum_hidden_layers = 2\n[model.memory]\nslots = 3\n" + recipe.read_text()
    )
    command = ["train", "--from", source, "--config", recipe, "--set", "model.memory.cell=lstm"]
    assert errors_of(monkeypatch, capsys, *command, "--run", tmp_path / "run") == [
        f"error: {recipe}: model.hidden_size: is 32, but the model of --from has 16; remove the key",
        f"{recipe}: model.memory.slots: is 3, but the model of --from has 2; remove the key",
        '--set model.memory.cell: is "lstm", but the model of --from has "gru"; remove the key',
    ]
    assert not (tmp_path / "run").exists()


def test_a_preset_says_how_the_model_is_trained_and_not_its_shape(source, data, tmp_path, monkeypatch, capsys):
    keys = ["train.tokens=1", "train.batch_size=2", "train.micro_batch_size=2", "model.hidden_size=16"]
    sets = [word for key in keys for word in ("--set", key)]
    command = ["train", "--from", source, "--preset", "tiny", "--data", data, "--run", tmp_path / "run", *sets]
    written_by(monkeypatch, capsys, *command)
    config = load_config(tmp_path / "run" / "config.toml")
    assert config.model == load_config(source / "config.toml").model
    assert config.train.learning_rate == 3e-3


def test_a_config_that_names_the_model_must_have_its_shape(begun, tmp_path):
    with pytest.raises(UserError) as refused:
        train(begun(model={"hidden_size": 32, "lookback": 5}), tmp_path / "run")
    one, other = str(refused.value).splitlines()
    assert re.fullmatch(r"model\.hidden_size: is 32, but .*, which the run starts from, has 16", one)
    assert re.fullmatch(r"model\.lookback: is 5, but .*, which the run starts from, has 4", other)
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_are_refused(begun, source, data, tmp_path):
    other = train_tokenizer(iter(["other texts, with other words"] * 9), 280)
    mix = MixConfig(sources=[{"kind": "files", "name": "story", "weight": 1, "files": ["story.jsonl"]}])
    prepare(mix, data.parent, other, tmp_path / "data", workers=1)
    line = f"{tmp_path / 'data'}: its tokenizer is not that of the model {find_model(source)}; prepare the data again"
    for attempt in (train, dry_run):
        with pytest.raises(UserError, match=line):
            attempt(begun(data=str(tmp_path / "data")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stream_is_tokenized_as_the_model_was(streamed, source, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.toml").write_text(dump_toml(streamed(tokens=300, tokenizer="gone.json")))
    command = ["train", "--from", source, "--config", tmp_path / "recipe.toml", "--run", tmp_path / "run"]
    written_by(monkeypatch, capsys, *command)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from", "nowhere"], "nowhere: no such folder; give a model folder, a checkpoint or a run"),
        (["--from", "{source}", "--set", "train.tokenizer=x.json"], "--from uses the model's tokenizer"),
        (
            ["--from", "{source}", "--resume"],
            "--from starts a new run, but --resume continues {run}",
        ),
    ],
)
def test_an_unsuitable_starting_model_is_reported(arguments, says, source, recipe, tmp_path, monkeypatch, capsys):
    places = {"source": source, "run": tmp_path / "run"}
    command = ["train", "--config", recipe, "--run", tmp_path / "run", *(x.format(**places) for x in arguments)]
    assert says.format(**places) in error_of(monkeypatch, capsys, *command)


def test_a_dry_run_loads_the_model(begun, source, tmp_path):
    RMKV(begun().model).save_pretrained(tmp_path / "model")
    shutil.copy(source / "tokenizer.json", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or missing weights"):
        dry_run(begun(from_model=str(tmp_path / "model")), tmp_path / "run")


def test_training_a_model_further_lowers_its_loss(begun, source, tmp_path):
    before = next(r["validation"]["loss"] for r in reversed(curve(source)) if "validation" in r)
    outcome = train(begun(tokens=1200, checkpoint_every=20, eval_every=20), tmp_path / "run")
    assert outcome.validation["loss"] < before - 0.2
