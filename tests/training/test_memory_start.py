"""A tuned memory is a small file with which its base model generates what the tuned model does."""

import json

import pytest
import torch
from compare_runs import weights
from safetensors.torch import load_file
from small_model import MEMORIES, make_model
from small_run import error_of, written_by

from rmkv_cli.generation import load_notes, read_prompt, save_notes
from rmkv_cli.generation.prompt import read_tokens
from rmkv_cli.generation.start import save_start
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.model.groups import is_memory_start
from rmkv_cli.tokenizer import train_tokenizer
from rmkv_cli.training import train
from rmkv_cli.training.metrics import read_metrics

TUNING = {"trainable": ["memory start"], "tokens": 2000, "learning_rate": 0.05, "checkpoint_every": 9, "eval_every": 9}
WORDS = train_tokenizer(iter(["a few words to read " * 9]), 280)


def tuned_by_hand(model):
    """The same model with other slots and stores."""
    other = make_model(**model.config.model_dump(exclude={"memory"}), memory=model.config.memory.model_dump())
    with torch.no_grad():
        for name, p in other.named_parameters():
            if is_memory_start(name):
                p.add_(torch.randn_like(p))
    return other


@pytest.mark.parametrize("memory", [memory for memory in MEMORIES if memory.get("update") != "none"], ids=str)
def test_the_base_with_the_file_reads_as_the_tuned_model(memory, tmp_path):
    """Over a document of several segments, a token at a time and as a whole."""
    base = make_model(vocab_size=280, memory=memory)
    tuned = tuned_by_hand(base)
    save_start(tmp_path / "memory.safetensors", tuned, WORDS)
    text = "a few words to read, and some more words"
    expected = read_prompt(tuned, WORDS, text)
    start = load_notes(tmp_path / "memory.safetensors", base, WORDS)
    assert start.tokens == 0
    found = read_prompt(base, WORDS, text, start)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    if base.config.memory.slots or base.config.stores:
        assert (read_prompt(base, WORDS, text).logits - expected.logits).abs().max() > 1e-3
    for token in WORDS.encode(text):
        start = read_tokens(base, [token], start)
    torch.testing.assert_close(start.logits, expected.logits, rtol=1e-9, atol=1e-9)
    for name, x in expected.state.tensors().items():
        if x.is_floating_point():
            torch.testing.assert_close(start.state.tensors()[name], x, rtol=1e-9, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def source(make_config, tmp_path_factory):
    return find_model(
        train(
            make_config(tokens=3000, checkpoint_every=20, eval_every=20), tmp_path_factory.mktemp("source") / "source"
        ).run
    )


@pytest.fixture(scope="module")
def tuned(make_config, source, tmp_path_factory):
    """A run that trained only the initial memory."""
    config = make_config(from_model=str(source), **TUNING)
    return train(config, tmp_path_factory.mktemp("tuned") / "run").run


@pytest.mark.slow
def test_training_the_start_lowers_the_loss_and_leaves_a_small_file(tuned, source):
    file = load_file(tuned / "latest" / "memory.safetensors")
    whole = weights(tuned)
    assert file.keys() == {"memory", "blocks.0.store.start", "blocks.1.store.start"}
    assert all(torch.equal(x, whole[name]) for name, x in file.items())
    before = load_file(source / "model.safetensors")
    assert {name for name, x in whole.items() if not torch.equal(x, before[name])} == file.keys()
    base, tuned = (
        [record["validation"]["loss"] for record in read_metrics(run / "metrics.jsonl") if "validation" in record][-1]
        for run in (source.parents[1], tuned)
    )
    assert tuned < base - 0.01


def test_generate_with_the_base_and_the_file_writes_what_the_tuned_model_writes(tuned, source, monkeypatch, capsys):
    how = ["--prompt", "Line 3 of", "--max-tokens", "40", "--temperature", "1", "--seed", "1", "--json"]
    expected = written_by(monkeypatch, capsys, "generate", "--model", tuned, *how).out
    state = ["--state", tuned / "latest" / "memory.safetensors"]
    for dtype in ("fp32", "bf16"):
        found = written_by(monkeypatch, capsys, "generate", "--model", source, *state, *how, "--dtype", dtype).out
        if dtype == "fp32":
            assert json.loads(found)["samples"] == json.loads(expected)["samples"]
    plain = written_by(monkeypatch, capsys, "generate", "--model", source, *how).out
    assert json.loads(plain)["samples"] != json.loads(expected)["samples"]


def test_a_chat_starts_from_the_file_goes_back_to_it_and_never_overwrites_it(tuned, source, monkeypatch, capsys):
    file = tuned / "latest" / "memory.safetensors"
    before = file.read_bytes()
    chat = ["chat", "--max-tokens", "9", "--temperature", "0"]
    twice = b"Line 3 of\n/reset\nLine 3 of\n"
    expected = written_by(monkeypatch, capsys, *chat, "--model", tuned, stdin=twice).out
    found = written_by(monkeypatch, capsys, *chat, "--model", source, "--state", file, stdin=twice)
    assert found.out == expected
    assert "starting from the tuned memory" in found.err
    assert file.read_bytes() == before


def test_notes_after_the_file_are_notes_of_the_base(tuned, source, tmp_path):
    base, tokenizer = RMKV.from_pretrained(source), WORDS.load(source)
    start = load_notes(tuned / "latest" / "memory.safetensors", base, tokenizer)
    save_notes(tmp_path / "notes.rmkv", read_prompt(base, tokenizer, "Line 3", start), base, tokenizer)
    assert int(load_notes(tmp_path / "notes.rmkv", base, tokenizer).state.position) > 1


def test_a_file_that_does_not_fit_or_is_damaged_is_refused(source, make_config, tmp_path, monkeypatch, capsys):
    base = make_model(vocab_size=280)
    path = tmp_path / "memory.safetensors"
    save_start(path, tuned_by_hand(base), WORDS)
    line = error_of(monkeypatch, capsys, "generate", "--model", source, "--prompt", "x", "--state", path)
    assert f"{path}: was tuned for a different tokenizer" in line
    RMKV(make_config().model).save_pretrained(tmp_path / "other")
    WORDS.load(source).save(tmp_path / "other" / "tokenizer.json")
    save_start(path, RMKV.from_pretrained(tmp_path / "other"), WORDS.load(source))
    line = error_of(monkeypatch, capsys, "generate", "--model", source, "--prompt", "x", "--state", path)
    assert f"{path}: was tuned for a different model" in line
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    line = error_of(monkeypatch, capsys, "generate", "--model", tmp_path / "other", "--prompt", "x", "--state", path)
    assert "is damaged: its content does not match its checksum" in line
