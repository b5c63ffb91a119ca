"""`rmkv merge` and `--adapter`: a merged model generates the same as the unmerged one, and a misfit is one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import with_adapter
from small_run import TEXT, error_of, save_small_model
from trained_run import make_data, train_small_run

from rmkv_cli.files import sha256
from rmkv_cli.model import RMKV
from rmkv_cli.model.adapter_file import save_adapter


def save_model(folder, seed=0, **shape):
    folder.mkdir()
    model, _ = save_small_model(folder, **shape)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model's folder, and one with an adapter."""
    place = tmp_path_factory.mktemp("adapted")
    base = save_model(place / "base")
    (place / "adapter").mkdir()
    save_adapter(with_adapter(RMKV.from_pretrained(base)), place / "adapter", base, sha256(base / "model.safetensors"))
    shutil.copy(base / "tokenizer.json", place / "adapter")  # as a checkpoint of a training has it
    return base, place / "adapter"


GENERATE = ("generate", "--prompt", TEXT, "--max-tokens", 60, "--seed", 7)


def test_a_merged_model_generates_what_the_adapted_one_does(folders, tmp_path, printed):
    base, adapter = folders
    messages = printed("merge", base, adapter, "--out", tmp_path / "merged")
    assert messages.startswith(f"{tmp_path}/merged: {base} with {adapter}; logits differ from the unmerged model's by ")
    with_it = printed(*GENERATE, "--model", base, "--adapter", adapter)
    assert printed(*GENERATE, "--model", tmp_path / "merged") == with_it
    assert printed(*GENERATE, "--model", adapter) == with_it  # its folder names the base
    assert printed(*GENERATE, "--model", base) != with_it


def test_an_adapter_that_cannot_be_merged_exactly_is_refused(folders, tmp_path, monkeypatch, capsys):
    base, adapter = folders
    for factor in (1e4, float("nan")):
        large = tmp_path / f"times {factor}"
        large.mkdir()
        (large / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
        weights = {name: x * factor for name, x in load_file(adapter / "adapter_model.safetensors").items()}
        save_file(weights, large / "adapter_model.safetensors")
        line = error_of(monkeypatch, capsys, "merge", base, large, "--out", tmp_path / "merged")
        assert line.startswith(f"error: {large}: merging changes logits by ")
        assert f"more than 1e-04: its weights are damaged or too large; use it unmerged: --adapter {large}" in line
        assert not (tmp_path / "merged").exists()


def test_models_of_the_same_shape_are_averaged(tmp_path, printed):
    folders = [save_model(tmp_path / f"{seed}", seed) for seed in range(3)]
    assert printed("merge", *folders, "--out", tmp_path / "mean") == f"{tmp_path}/mean: the average of 3 models\n"
    each = [load_file(folder / "model.safetensors") for folder in folders]
    for name, x in load_file(tmp_path / "mean" / "model.safetensors").items():
        torch.testing.assert_close(x, torch.stack([weights[name] for weights in each]).mean(0))
    printed(*GENERATE, "--model", tmp_path / "mean")


def test_the_average_of_a_model_with_itself_is_the_model(folders, tmp_path, printed):
    base, _ = folders
    printed("merge", base, base, base, "--out", tmp_path / "mean")
    for name, x in load_file(base / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "mean" / "model.safetensors")[name], x)


def test_models_that_cannot_be_merged_are_one_line(folders, tmp_path, monkeypatch, capsys):
    base, adapter = folders
    other = save_model(tmp_path / "wider", hidden_size=32)
    foreign = save_model(tmp_path / "foreign")
    save_small_model(foreign, text="another text of other words and letters ")
    for words, messages in (
        ([base], "give a model and its adapter, or at least two models"),
        ([base, other], f"{other}: model.hidden_size is 32, but {base} has 16; only models of the same shape"),
        ([base, foreign], f"{foreign}: has a different tokenizer than {base}"),
        ([adapter, base], f"{adapter}: is an adapter; `rmkv merge MODEL {adapter}` merges it, one adapter at a time"),
        ([base, base, adapter], f"{adapter}: is an adapter; "),
        ([other, adapter], f"{adapter}: the adapter does not fit the model: "),
    ):
        line = error_of(monkeypatch, capsys, "merge", *words, "--out", tmp_path / "out")
        assert line.startswith(f"error: {messages}")
        assert not (tmp_path / "out").exists()
    line = error_of(monkeypatch, capsys, "merge", base, adapter, "--out", base)
    assert str(base) in line


def test_chat_and_notes_use_the_adapted_model(folders, tmp_path, shown, monkeypatch, capsys):
    base, adapter = folders
    notes = tmp_path / "notes.rmkv"
    shown("chat", "--model", base, "--adapter", adapter, "--state", notes, "--max-tokens", 5, stdin=b"the cat\n")
    assert "continuing from" in shown("chat", "--model", adapter, "--state", notes, "--max-tokens", 5, stdin=b"a\n").err
    assert "was made with a different model" in error_of(
        monkeypatch, capsys, *GENERATE, "--model", base, "--state", notes
    )


@pytest.mark.slow
def test_an_evaluation_with_an_adapter_is_saved_beside_the_one_without(tmp_path, printed):
    run = train_small_run(make_data(tmp_path / "mix"), tmp_path / "run")
    (tmp_path / "adapter").mkdir()
    save_adapter(with_adapter(RMKV.from_pretrained(run)), tmp_path / "adapter", run, "")
    ask = ["eval", "--model", run, "--data", tmp_path / "mix" / "data", "--no-memory", "--json"]
    losses = [json.loads(printed(*ask, *more))["loss"] for more in ((), ("--adapter", tmp_path / "adapter"))]
    assert losses[0] != losses[1]
    names = sorted(path.name for path in (run / "evaluations").iterdir())
    assert names[0].startswith("validation-no-memory-adapter=adapter-")
    assert names[1:] == ["validation-no-memory.json"]


def test_an_adapter_for_an_adapted_model_or_for_other_weights_is_reported(
    folders, tmp_path, shown, monkeypatch, capsys
):
    _, adapter = folders
    line = error_of(monkeypatch, capsys, *GENERATE, "--model", adapter, "--adapter", adapter)
    assert line == f"error: {adapter}: already has an adapter; merge that into its base model with `rmkv merge` first"
    other = save_model(tmp_path / "other", seed=5)
    output = shown(*GENERATE, "--model", other, "--adapter", adapter).err
    assert f"warning: {adapter}: this adapter was trained on other weights than {other}" in output


def test_an_adapter_is_not_exported_unmerged(folders, tmp_path, monkeypatch, capsys):
    _, adapter = folders
    line = error_of(monkeypatch, capsys, "export", "hf", tmp_path / "out", "--model", adapter)
    assert line == (
        f"error: {adapter}: is an adapter; export its base model, or merge them first: "
        f"rmkv merge MODEL {adapter} --out DIR"
    )
