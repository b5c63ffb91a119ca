import io
import json
import sys
from contextlib import redirect_stdout

import pytest
from safetensors import safe_open
from small_run import TEXT, error_of, save_small_model

from rmkv_cli.cli.main import main
from rmkv_cli.config import MemoryConfig
from rmkv_cli.generation import SamplingConfig, generate, load_notes, read_prompt


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and two files, the first of which has been read; the model and its tokenizer."""
    place = tmp_path_factory.mktemp("read")
    model, tokenizer = save_small_model(place / "model")
    (place / "one.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode() * 10)
    (place / "two.txt").write_text("The end.\n")
    command = ["rmkv", "read", place / "one.txt", "--model", place / "model", "--out", place / "one.rmkv"]
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(io.StringIO()) as shown:
        patched.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    assert "one.rmkv: " in shown.getvalue()
    assert "tokens per second" in shown.getvalue()
    return place, model, tokenizer


def test_text_after_two_readings_equals_text_after_one(place, printed):
    place, model, tokenizer = place
    notes, using = place / "two.rmkv", ["--model", place / "model"]
    on = ["read", "-", *using, "--out", notes, "--state", place / "one.rmkv", "--json"]
    figures = json.loads(printed(*on, stdin=(place / "two.txt").read_bytes()))
    whole = read_prompt(model, tokenizer, [TEXT * 10, "The end.\n"])
    assert figures["tokens"] == len(tokenizer.encode("The end.\n"))
    assert figures["document_tokens"] == whole.tokens
    assert figures["bytes"] == notes.stat().st_size
    assert figures["tokens_per_second"] > 0
    generating = ["generate", *using, "--state", notes, "--max-tokens", 30, "--seed", 3]
    expected = generate(model, tokenizer, read_prompt(model, tokenizer, "the cat", whole), SamplingConfig(seed=3), 30)
    assert printed(*generating, "--prompt", "the cat") == "".join(expected) + "\n"
    figures = json.loads(printed(*generating, "--json"))
    assert figures["prompt_tokens"] == 0
    assert figures["samples"][0]["text"] == "".join(generate(model, tokenizer, whole, SamplingConfig(seed=3), 30))


def test_the_notes_describe_themselves(place):
    place, model, tokenizer = place
    with safe_open(place / "one.rmkv", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "rmkv-notes-2"
    assert metadata["tokens"] == str(len(tokenizer.encode_document([TEXT * 10])))
    assert metadata["tokenizer"] == tokenizer.hash
    assert int(load_notes(place / "one.rmkv", model, tokenizer).state.position) == int(metadata["tokens"])


def test_bad_input_is_one_line(place, monkeypatch, capsys, tmp_path):
    place = place[0]

    def error(file, *rest, model=place / "model", command="read"):
        return error_of(monkeypatch, capsys, command, *([file] if file else []), "--model", model, *rest)

    out, state = ["--out", tmp_path / "out"], ["--state", place / "one.rmkv"]
    (tmp_path / "empty").touch()
    (tmp_path / "mark").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "binary").write_bytes(b"text \xff")
    assert "no such file" in error(tmp_path / "absent", *out)
    assert "is empty" in error(tmp_path / "empty", *out)
    assert "contains no text" in error(tmp_path / "mark", *out, *state)
    assert "is not valid UTF-8: byte 0xff at offset 5" in error(tmp_path / "binary", *out)
    assert "already exists" in error(place / "two.txt", "--out", place / "one.rmkv")
    assert "cannot be written" in error(place / "two.txt", "--out", place / "two.txt" / "notes.rmkv")
    assert "is not a notes file" in error(place / "two.txt", *out, "--state", place / "model" / "model.safetensors")
    save_small_model(tmp_path / "other", hidden_size=32)
    wrong = "one.rmkv: was made with a different model"
    assert wrong in error(place / "two.txt", *out, *state, model=tmp_path / "other")
    assert wrong in error(None, "--prompt", "x", *state, model=tmp_path / "other", command="generate")
    save_small_model(tmp_path / "published", memory=MemoryConfig(slots=2, carry="layers", store=0))
    assert "is not causal" in error(place / "two.txt", *out, model=tmp_path / "published")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["bf16", "int8"])
def test_compressed_notes_are_smaller_and_are_used_like_others(how, place, printed):
    place, *_ = place
    notes, using = place / f"{how}.rmkv", ["--model", place / "model"]
    figures = json.loads(printed("read", place / "one.txt", *using, "--out", notes, "--compress", how, "--json"))
    assert figures["bytes"] < 0.8 * (place / "one.rmkv").stat().st_size
    assert printed("generate", *using, "--state", notes, "--prompt", "The", "--max-tokens", 5)


def test_an_unknown_compression_is_one_line(place, tmp_path, monkeypatch, capsys):
    place, *_ = place
    read = ("read", place / "one.txt", "--model", place / "model", "--out", tmp_path / "notes", "--compress", "int4")
    assert error_of(monkeypatch, capsys, *read) == "error: --compress int4: should be bf16 or int8"
