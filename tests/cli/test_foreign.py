"""The commands with a pretrained model's tokenizer: from a mix to training and export."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from foreign import MODELS, foreign_files, foreign_folder
from small_run import error_of, written_by
from transformers import AutoTokenizer

from rmkv_cli.config import MemoryConfig, ModelConfig
from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.huggingface.tokenizer import write_foreign_tokenizer
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Tokenizer

CHATS = [
    [{"role": "user", "content": f"What is {i} + {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]
    for i in range(30)
]
MIX = """
validation = 0.2
tokens = 3000
[[sources]]
kind = "files"
name = "chats"
weight = 1
files = ["chats.jsonl"]
format = "messages"
supervise = "answers"
[[sources]]
kind = "files"
name = "texts"
weight = 1
files = ["texts.jsonl"]
[[sources]]
kind = "noise"
name = "noise"
weight = 0.1
vocab = 20
[[sources]]
kind = "recall"
name = "recall"
weight = 0.1
keys = 5
values = 5
noise = 5
pairs = [2]
segments = [1]
segment_length = 8
"""


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments, **more: written_by(monkeypatch, capsys, *arguments, **more)


def save_model(folder, name):
    """A small model with a pretrained model's tokenizer, as `rmkv import hf` writes it."""
    source = foreign_folder(folder.with_name(f"{folder.name}-source"), name)
    tokenizer = Tokenizer.load(source)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    memory = MemoryConfig(slots=2)
    config = ModelConfig(vocab_size=tokenizer.vocab_size + 2, **shape, segment_length=8, lookback=4, memory=memory)
    RMKV(config).save_pretrained(folder)
    write_foreign_tokenizer(source, folder)
    return folder


def write_sources(folder):
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    texts = [f"Hello world, this is text {i}. " * (1 + i % 5) for i in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "mix.toml").write_text(MIX)


@pytest.mark.parametrize("name", ["mistral", *(pytest.param(x, marks=pytest.mark.slow) for x in ("smollm2", "llama3"))])
def test_a_model_is_trained_and_exported_with_its_own_tokenizer(tmp_path, run, name):
    model = save_model(tmp_path / "model", name)
    tokenizer = Tokenizer.load(model)
    write_sources(tmp_path)
    run("data", "mix", tmp_path / "mix.toml", "--tokenizer", model, "--out", tmp_path / "data", "--workers", 2)
    documents = Documents.open(tmp_path / "data", "train")
    theirs = AutoTokenizer.from_pretrained(model)
    of_chats = documents.source_names.index("chats")
    chats = [documents[i].tolist() for i in range(len(documents)) if documents.sources[i] == of_chats]
    expected = [theirs.apply_chat_template(chat, return_dict=False) for chat in CHATS]
    assert chats
    messages = [chat[1]["content"] for chat in CHATS]
    for i in np.flatnonzero(documents.sources == of_chats):
        targets = np.append(documents[i][1:], tokenizer.eod)[documents.counted(i)]
        answer = tokenizer.decode(targets).strip(" \n")
        assert any(answer == f"{text}{tokenizer.roles.eod}" for text in messages)
    assert all(tokenizer.decode(chat) in map(tokenizer.decode, expected) for chat in chats)
    (tmp_path / "recipe.toml").write_text(
        f'[train]\ndata = "{tmp_path / "data"}"\ntokens = 200\nbatch_size = 2\nmicro_batch_size = 2\n'
        "segments_min = 2\nsegments_max = 2\ncheckpoint_every = 2\neval_every = 2\neval_tokens = 200\n"
    )
    run("train", "--from", model, "--config", tmp_path / "recipe.toml", "--run", tmp_path / "run")
    run("train", "--resume", "--run", tmp_path / "run", "--set", "train.tokens=400")
    for place in (tmp_path / "data", tmp_path / "run", tmp_path / "run" / "latest"):
        assert Tokenizer.load(place).hash == tokenizer.hash
    report = json.loads(run("eval", "--model", tmp_path / "run", "--data", tmp_path / "data", "--json").out)
    assert report["bits_per_byte"] > 0
    run("export", "hf", tmp_path / "hf", "--model", tmp_path / "run")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / file).read_text() == foreign_files(name)[file]
    config = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [token.id for token in tokenizer.roles.ends]
    run("import", "hf", tmp_path / "hf", "--out", tmp_path / "back")
    assert Tokenizer.load(tmp_path / "back").hash == tokenizer.hash


@pytest.mark.slow
def test_a_mix_is_streamed_with_a_foreign_tokenizer_and_the_run_resumes(tmp_path, run):
    model = save_model(tmp_path / "model", "mistral")
    write_sources(tmp_path)
    (tmp_path / "recipe.toml").write_text(
        f'[train]\nmix = "{tmp_path / "mix.toml"}"\ntokenizer = "{model / "tokenizer.json"}"\ntokens = 200\n'
        "batch_size = 2\nmicro_batch_size = 2\nsegments_min = 2\nsegments_max = 2\ncheckpoint_every = 2\n"
        "eval_tokens = 200\n"
    )
    run("train", "--from", model, "--config", tmp_path / "recipe.toml", "--run", tmp_path / "run")
    shutil.rmtree(model)  # the run has its own
    run("train", "--resume", "--run", tmp_path / "run", "--set", "train.tokens=300")
    assert Tokenizer.load(tmp_path / "run").template is not None


def test_bits_per_byte_of_a_text_count_each_byte_that_is_predicted(tmp_path, run):
    """If no token precedes a text, its first token is not predicted, and its bytes are not counted."""
    (tmp_path / "a.txt").write_text("Hello world, hello again! " * 20)
    size = (tmp_path / "a.txt").stat().st_size
    for name in ("smollm2", "llama3", "mistral"):
        model = save_model(tmp_path / name, name)
        tokenizer = Tokenizer.load(model)
        evaluate = "eval", "--model", model, "--data", tmp_path / "a.txt", "--json"
        whole, cut = json.loads(run(*evaluate).out), json.loads(run(*evaluate, "--max-tokens", 9).out)
        first = tokenizer.token_bytes(tokenizer.encode("Hello world")[0])
        assert whole["bytes"] == size - (0 if tokenizer.roles.begin else len(first))
        nats = whole["loss"] * whole["tokens"]
        assert whole["bits_per_byte"] == pytest.approx(nats / math.log(2) / whole["bytes"])
        ids = tokenizer.encode_document([(tmp_path / "a.txt").read_text()])[1:10]
        predicted = b"".join(map(tokenizer.token_bytes, ids))
        assert cut["bytes"] == len(predicted.removeprefix(b" ") if name == "mistral" else predicted)


def test_a_tokenizer_is_inspected(tmp_path, run):
    folder = foreign_folder(tmp_path, "mistral")
    shown = run("tokenizer", "inspect", folder, "--text", "Hello <s> \U0001f600")
    assert "bytes per token" in shown.out
    ids = run("tokenizer", "encode", folder, "Hello <s>").out.split()
    assert run("tokenizer", "decode", folder, *ids).out == "Hello <s>"


def test_import_notes_lossy_normalizers_and_missing_templates(tmp_path, capsys):
    for name in MODELS:
        (tmp_path / name).mkdir()
        source = foreign_folder(tmp_path / f"{name}-source", name)
        write_foreign_tokenizer(source, tmp_path / name)
        messages = capsys.readouterr().err
        assert ("this tokenizer normalizes texts" in messages.replace("\n", " ")) == (name == "qwen3")
        assert "with other tokens than transformers" not in messages.replace("\n", " ")
        assert Tokenizer.load(tmp_path / name).hash == Tokenizer.load(source).hash
    (source / "chat_template.jinja").unlink()
    (tmp_path / "none").mkdir()
    write_foreign_tokenizer(source, tmp_path / "none")
    assert "note: it has no chat template" in capsys.readouterr().err


def test_an_error_explains_how_to_get_a_missing_tokenizer_json(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer.json; in transformers, AutoTokenizer.from_pretrained"):
        write_foreign_tokenizer(tmp_path, tmp_path)


def test_chat_reads_and_saves(tmp_path, run, monkeypatch, capsys):
    model = save_model(tmp_path / "model", "qwen3")
    notes = tmp_path / "notes"
    chat = ["chat", "--model", model, "--state", notes, "--max-tokens", 5, "--seed", 1, "--device", "cpu"]
    assert "nothing was read" in run(*chat, stdin=b"/stats\n").err
    assert not notes.exists()
    (tmp_path / "a.txt").write_text("Hello world")
    messages = run(*chat, stdin=f"/read {tmp_path / 'a.txt'}\nHello\n".encode())
    assert "saved" in messages.err
    assert run(*chat, stdin=b"and you?\n").err.startswith("continuing from")
    (model / "chat_template.jinja").unlink()
    assert "has no chat template, so it takes no conversations" in error_of(monkeypatch, capsys, *chat[:3])


def test_import_notes_special_tokens_found_only_in_normalized_text(tmp_path, capsys):
    """In some old folders the prepended space ends up between a text and the special token that begins it."""
    source = foreign_folder(tmp_path / "source", "mistral")
    described = json.loads((source / "tokenizer.json").read_text())
    for token in described["added_tokens"]:
        token["normalized"] = True
    (source / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "out").mkdir()
    write_foreign_tokenizer(source, tmp_path / "out")
    messages = " ".join(capsys.readouterr().err.split())
    assert (
        "note: next to special tokens, rmkv tokenizes the text of conversations differently from transformers"
        in messages
    )
