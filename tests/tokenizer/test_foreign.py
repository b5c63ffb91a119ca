"""A pretrained model's tokenizer is used unchanged: the same ids as in transformers, and its own special tokens."""

import json
import pickle

import pytest
from foreign import MODELS, foreign_files, foreign_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import BARE, CONTINUED, Token, Tokenizer

TOKENIZERS = {name: Tokenizer.from_files(foreign_files(name)) for name in MODELS}
TEXTS = [
    "Hello world, it's 2024-12-01.\n\nYes.  two   three\r\n\ttab",
    " a text that begins with a space",
    "日本語 \U0001f600 naïve",
    "x",
]
every = pytest.mark.parametrize("name", MODELS)


def changed(name, **config):
    """A model's tokenizer with other values in its tokenizer_config.json."""
    files = dict(foreign_files(name))
    files["tokenizer_config.json"] = json.dumps(json.loads(files["tokenizer_config.json"]) | config)
    return files


@every
def test_a_text_has_the_same_ids_as_in_transformers_including_its_beginning(tmp_path, name):
    folder = foreign_folder(tmp_path, name)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for text in TEXTS:
        assert ours.encode_document([text]) == theirs(text)["input_ids"]
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("name", "begin", "end", "ends"),
    [
        ("smollm2", None, "<|im_end|>", ["<|im_end|>"]),
        ("qwen3", None, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
        ("llama3", "<|begin_of_text|>", "<|eot_id|>", ["<|eot_id|>", "<|end_of_text|>"]),
        ("mistral", "<s>", "</s>", ["</s>"]),
    ],
)
def test_the_files_beside_it_define_the_roles_of_special_tokens(name, begin, end, ends):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode_document(["a"])
    assert (tokenizer.tokens.get(ids[0])) == begin == tokenizer.roles.begin
    assert tokenizer.tokens[tokenizer.eod] == end
    assert list(tokenizer.roles.ends) == list(tokenizer.roles.answer_ends) == ends
    assert tokenizer.encode_document([""]) == ([tokenizer.eod] if begin is None else [tokenizer.roles.begin.id])
    assert tokenizer.encode_document([BARE, "a"]) == tokenizer.encode("a")


@pytest.mark.parametrize(("name", "adds"), [("mistral", False), ("smollm2", True)])
def test_only_the_post_processor_decides_how_a_document_begins_as_in_transformers(tmp_path, name, adds):
    files = changed(name, add_bos_token=adds)
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    ours = Tokenizer.load(tmp_path)
    assert (ours.roles.begin is not None) != adds
    assert ours.encode_document(["a b"]) == AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"]


@every
def test_a_text_that_spells_special_tokens_stays_text(name):
    tokenizer = TOKENIZERS[name]
    for token in tokenizer.tokens.values():
        for text in (str(token), f"a {token}b", f"{token}{token}"):
            ids = tokenizer.encode(text)
            assert not set(ids) & tokenizer.tokens.keys()
            assert tokenizer.decode(ids) == text
    thinking = {"<think>", "</think>"} <= set(tokenizer.tokens.values())
    assert thinking == (name == "qwen3") == (tokenizer.roles.thinking is not None)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["smollm2", "llama3", "mistral"]), st.text())
def test_a_text_survives_a_round_trip_without_a_normalizer(name, text):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(MODELS)), st.lists(st.one_of(st.text(), st.sampled_from(TEXTS))).map("".join))
def test_streamed_text_equals_the_decoding(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    for answer in (False, True):
        stream = tokenizer.stream(answer)
        joined = "".join(map(stream.step, ids)) + stream.end()
        space = " " if tokenizer.foreign.spaced[0] and ids and not answer else ""
        assert joined == space + tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["mistral", "tinyllama"])
def test_a_sentencepiece_like_text_has_its_leading_space_only_at_its_beginning(name):
    """The library prepends a space to a text, but not to a continuation; it is removed from a decoded answer."""
    tokenizer = TOKENIZERS[name]
    first, rest = tokenizer.encode("Hello world"), tokenizer.encode("Hello world", continues=True)
    assert b"".join(map(tokenizer.token_bytes, first)) == b" Hello world"
    assert b"".join(map(tokenizer.token_bytes, rest)) == b"Hello world"
    assert tokenizer.decode(first) == "Hello world"
    messages = {answer: "".join(map(tokenizer.stream(answer).step, first)) for answer in (False, True)}
    stream = tokenizer.stream(answer=True)
    assert "".join(map(stream.step, first)) == "Hello world"
    assert messages[False] == " Hello world"
    emoji = tokenizer.encode("\U0001f600", continues=True)
    stream = tokenizer.stream()
    assert [stream.step(i) for i in emoji] == ["", "", "", "\U0001f600"]  # bytes that the vocabulary lacks as a whole


@every
def test_a_long_text_is_encoded_in_parts_unnoticed(name, monkeypatch):
    tokenizer = TOKENIZERS[name]
    text = "\n".join(TEXTS * 30)
    whole = tokenizer.encode(text)
    monkeypatch.setattr("rmkv_cli.tokenizer.tokenizer.PART", 50)
    assert tokenizer.encode(text) == whole
    parts = list(tokenizer.parts([text], 50))
    assert len(parts) > 50
    document = tokenizer.encode_document([text])
    assert [i for ids in tokenizer.encode_stream(iter(parts)) for i in ids] == document
    first, *rest = parts
    later = tokenizer.encode_documents([[CONTINUED, part] for part in rest])
    assert tokenizer.encode_document([first]) + [i for ids in later for i in ids] == document


@every
def test_a_tokenizer_survives_a_folder_and_another_process_unchanged(tmp_path, name):
    tokenizer = TOKENIZERS[name]
    tokenizer.save(tmp_path)
    for file, content in foreign_files(name).items():
        if file != "generation_config.json":
            assert (tmp_path / file).read_text(encoding="utf-8") == content
    for again in (
        Tokenizer.load(tmp_path),
        Tokenizer.load(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.hash == tokenizer.hash
        assert again.roles == tokenizer.roles
        assert again.encode_document(TEXTS) == tokenizer.encode_document(TEXTS)


def test_another_template_or_other_roles_change_the_hash():
    files = dict(foreign_files("llama3"))
    one_end = json.dumps({"eos_token_id": json.loads(files["generation_config.json"])["eos_token_id"][1:]})
    others = [
        files | {"chat_template.jinja": foreign_files("llama3.2")["chat_template.jinja"]},
        files | {"generation_config.json": one_end},
        _tokenizer_changed("llama3", lambda x: x.update(post_processor=None)),
    ]
    hashes = {Tokenizer.from_files(other).hash for other in [files, *others]}
    assert len(hashes) == 4


def test_a_template_in_tokenizer_config_is_found_too():
    files = changed("smollm2", chat_template="{{ messages[0].content }}")
    assert Tokenizer.from_files(files).template.source == files["chat_template.jinja"]
    del files["chat_template.jinja"]
    assert Tokenizer.from_files(files).template.source == "{{ messages[0].content }}"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert (
        Tokenizer.from_files(
            files | {"tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>", "chat_template": named})}
        ).template.source
        == "b"
    )


def test_pieces_separate_special_tokens_from_text():
    tokenizer = TOKENIZERS["mistral"]
    begin, end = tokenizer.roles.begin, tokenizer.roles.eod
    pieces = tokenizer.pieces(tokenizer.encode_document(["so <s>", end, "it is"]))
    assert pieces == (begin, "so <s>", end, "it is")
    assert [type(piece) for piece in pieces] == [Token, str, Token, str]


def _without(name, key):
    files = changed(name)
    files["tokenizer_config.json"] = json.dumps(
        {k: v for k, v in json.loads(files["tokenizer_config.json"]).items() if k != key}
    )
    return files


def _tokenizer_changed(name, change):
    files = dict(foreign_files(name))
    described = json.loads(files["tokenizer.json"])
    change(described)
    return files | {"tokenizer.json": json.dumps(described)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer.json": foreign_files("qwen3")["tokenizer.json"]},
            "lacks the special tokens with their ids .*tokenizer_config",
        ),
        (_without("qwen3", "eos_token"), "names the eos_token"),
        (changed("qwen3", eos_token="<|gone|>"), r"has no token '<\|gone\|>', which tokenizer_config.json names"),
        (_tokenizer_changed("mistral", lambda x: x["model"].update(byte_fallback=False)), "neither a byte-level"),
        (foreign_files("qwen3") | {"chat_template.jinja": "{% for"}, "its chat template is broken: line 1"),
        (foreign_files("qwen3") | {"tokenizer_config.json": "{"}, "tokenizer_config.json beside it is not valid JSON"),
    ],
)
def test_unsupported_tokenizers_are_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)
