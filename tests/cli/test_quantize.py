"""`rmkv quantize`: the folder works like any other, the report shows the cost, and unsupported uses are errors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_model import with_adapter
from small_run import TEXT, error_of, save_small_model

from rmkv_cli.config import MixConfig, QuantizationConfig
from rmkv_cli.data.mix import prepare
from rmkv_cli.files import sha256
from rmkv_cli.model import RMKV
from rmkv_cli.model.adapter_file import save_adapter
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.quantize import quantize_folder

RECALL = ("--set", "keys=4", "--set", "values=4", "--set", "noise=4")
SHAPE = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_small_model(folder, **SHAPE)
    return folder


@pytest.fixture(scope="module")
def quantized(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "small"
    quantize_folder(base, out, QuantizationConfig(bits=4))
    return out


@pytest.fixture(scope="module")
def data(base, tmp_path_factory):
    """A mix of text and recall."""
    folder = tmp_path_factory.mktemp("mix")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} {TEXT}" * 3}) + "\n" for i in range(30)))
    text = {"kind": "files", "name": "text", "weight": 3, "files": ["text.jsonl"]}
    recall = {"kind": "recall", "weight": 1, "pairs": [1, 2], "segments": [1], "segment_length": 8, "keys": 4}
    mix = MixConfig(validation=0.2, tokens=2000, sources=[text, recall | {"values": 4, "noise": 4}])
    prepare(mix, folder, Tokenizer.load(base), folder / "data", workers=1)
    return folder / "data"


@pytest.mark.parametrize("bits", [8, 4])
def test_the_report_compares_size_loss_tasks_and_speed(bits, base, data, tmp_path, printed):
    messages = json.loads(printed("quantize", base, "--out", tmp_path / "q", "--bits", bits, "--data", data, "--json"))
    before, after = messages["before"], messages["after"]
    assert after["bytes"] == (tmp_path / "q" / "model.safetensors").stat().st_size < before["bytes"] / 2
    assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=0.1)
    evaluated = json.loads(printed("eval", "--model", base, "--data", data, "--json"))
    assert before["bits_per_byte"] == evaluated["bits_per_byte"]
    again = json.loads(printed("eval", "--model", tmp_path / "q", "--data", data, "--json"))
    assert after["bits_per_byte"] == again["bits_per_byte"]  # in bfloat16 by default
    assert before["tasks"].keys() == after["tasks"].keys() == {"recall"}
    assert before["tokens_per_second"] > 0 < after["tokens_per_second"]
    card = (tmp_path / "q" / "README.md").read_text()
    assert f"| bits per byte | {before['bits_per_byte']:.4f} | {after['bits_per_byte']:.4f} |" in card


def test_without_data_it_compares_size_and_speed(base, tmp_path, printed):
    messages = printed("quantize", base, "--out", tmp_path / "q")
    assert "weights, MB" in messages
    assert "tokens/s" in messages
    assert "bits per byte" not in messages


def test_the_folder_serves_every_command_that_uses_a_model(quantized, tmp_path, printed):
    assert printed("generate", "--model", quantized, "--prompt", TEXT, "--max-tokens", 5)
    (tmp_path / "text.txt").write_text(TEXT * 5)
    printed("read", tmp_path / "text.txt", "--model", quantized, "--out", tmp_path / "notes.rmkv")
    printed("generate", "--model", quantized, "--state", tmp_path / "notes.rmkv", "--prompt", TEXT, "--max-tokens", 5)
    printed("eval", "--model", quantized, "--task", "recall", *RECALL)


def test_fp32_computes_in_float32(quantized, printed):
    generate = ("generate", "--model", quantized, "--prompt", TEXT, "--max-tokens", 5, "--temperature", 0)
    assert printed(*generate, "--dtype", "fp32")
    assert RMKV.from_pretrained(quantized, dtype=torch.float32).norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("quantize", "{q}", "--out", "{new}"), "is already quantized; quantize the original model instead"),
        (("quantize", "{base}", "--out", "{base}"), "already exists"),
        (("quantize", "{base}", "--out", "{new}", "--bits", 3), "bits: should be 4 or 8, got 3"),
        (("quantize", "{base}", "--out", "{new}", "--group-size", 64), "--group-size is for --bits 4"),
        (("quantize", "{base}", "--out", "{new}", "--keep", "embeding"), "did you mean 'embedding'?"),
        (("quantize", "{adapter}", "--out", "{new}"), "is an adapter; merge it first"),
        (("export", "hf", "{new}", "--model", "{q}"), "is quantized; export the model that it was made from"),
        (("merge", "{q}", "{adapter}", "--out", "{new}"), "is quantized; merge into the original model"),
        (("merge", "{q}", "{q}", "--out", "{new}"), "is quantized; merge into the original model"),
        (
            ("generate", "--model", "{q}", "--adapter", "{adapter}", "--prompt", "a"),
            "a quantized model cannot take an adapter",
        ),
        (
            ("train", "--preset", "tiny", "--from", "{q}", "--data", "{data}", "--run", "{new}"),
            "is quantized, so it cannot be trained",
        ),
    ],
)
def test_unsupported_uses_of_a_quantized_model_are_one_line(
    command, says, base, quantized, data, tmp_path, monkeypatch, capsys
):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(with_adapter(RMKV.from_pretrained(base)), adapter, base, sha256(base / "model.safetensors"))
    shutil.copy(base / "tokenizer.json", adapter)
    places = {"q": quantized, "base": base, "new": tmp_path / "new", "adapter": adapter, "data": data}
    assert says in error_of(monkeypatch, capsys, *(str(word).format(**places) for word in command))
    assert not (tmp_path / "new").exists()


def test_a_changed_folder_is_one_line(quantized, tmp_path, monkeypatch, capsys):
    for key, after in (("bits", 8), ("group_size", 64)):
        folder = shutil.copytree(quantized, tmp_path / key)
        config = json.loads((folder / "config.json").read_text())
        config["quantization"][key] = after
        (folder / "config.json").write_text(json.dumps(config))
        generate = ("generate", "--model", folder, "--prompt", "a")
        assert "config.json is damaged (its checksum is wrong)" in error_of(monkeypatch, capsys, *generate)
        (folder / "checksums.json").unlink()
        assert "model.safetensors does not fit config.json" in error_of(monkeypatch, capsys, *generate)


def test_a_kept_layer_is_stored_unchanged(base, tmp_path, printed):
    printed("quantize", base, "--out", tmp_path / "q", "--keep", "embedding", "--keep", "feed_forward.down")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "q" / "model.safetensors")
    for name in ("embedding.weight", "blocks.1.feed_forward.down.weight", "blocks.1.store.gates.weight", "memory"):
        assert torch.equal(before[name], after[name])
    assert after["blocks.1.feed_forward.up.weight"].dtype == torch.int8
    assert after["blocks.1.cell.cell.weight_hh.weight"].dtype == torch.int8
