"""What a tokenizer must never do: lose text, or take text for a special token."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Special, Tokenizer, train_tokenizer
from rmkv_cli.tokenizer.tokenizer import PROBE

WORDS = "The quick brown fox, naïve café, 2024-01-02 <eod> def f(x):\r\n\treturn x ** 2 "
TOKENIZER = train_tokenizer(iter([WORDS * 3, WORDS.upper()]), 300)
SPELLINGS = [str(special) for special in Special]
ODD = [
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01",  # letters that every normal form changes
    " \u00a0\u2003\u200b\u3000\ufeff",
    "a\r\nb\rc\n\n\td  ",
    "\0\x01\x7f\x85\u2028\ufffd\uffff\U0010ffff",
    "१२३ 12345",
    "",
    " ",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "<eod><think></think><pad>",
]
texts = st.lists(st.one_of(st.text(), st.sampled_from([*ODD, *SPELLINGS, WORDS]))).map("".join)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_decoding_gives_back_every_text_exactly_and_no_text_forges_a_special_token(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(len(Special) <= i < TOKENIZER.vocab_size for i in ids)


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_come_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, TOKENIZER.vocab_size - 1), st.integers(7, 262)), max_size=30))
def test_streaming_any_ids_joins_to_their_decoding_which_is_the_librarys(ids):
    stream = TOKENIZER.stream()
    joined = "".join(map(stream.step, ids)) + stream.end()
    assert joined == TOKENIZER.decode(ids) == TOKENIZER._library.decode(ids, skip_special_tokens=False)


def test_a_streamed_character_appears_with_its_last_byte():
    stream = TOKENIZER.stream()
    assert [stream.step(i) for i in TOKENIZER.encode("😀")] == ["", "", "", "😀"]
    assert stream.end() == ""
    for token in TOKENIZER.encode("😀")[:2]:
        assert stream.step(token) == ""
    assert stream.end() == "\ufffd"


def test_the_special_tokens_have_their_fixed_ids_and_their_spelling():
    assert [special.id for special in Special] == list(range(7))
    assert " ".join(Special) == "<pad> <unk> <eod> <start> <end> <think> </think>"
    assert TOKENIZER.decode(list(range(7))) == "".join(Special)
    assert TOKENIZER.eod == 2


def test_a_document_begins_with_its_end_token_and_holds_specials_only_where_a_piece_is_one():
    pieces = [Special.START, "a<end>b", Special.END, "", Special.THINK, "c</think>", Special.END_THINK]
    encode = TOKENIZER.encode
    assert TOKENIZER.encode_document(pieces) == [2, 3, *encode("a<end>b"), 4, 5, *encode("c</think>"), 6]
    assert TOKENIZER.encode_document([]) == [2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.one_of(st.text(), st.sampled_from(Special)))))
def test_encoding_together_is_encoding_one_by_one(documents):
    one_by_one = [
        [2, *(i for p in pieces for i in ([p.id] if isinstance(p, Special) else TOKENIZER.encode(p)))]
        for pieces in documents
    ]
    assert TOKENIZER.encode_documents(documents) == one_by_one


def test_digits_are_single_tokens():
    shown = [TOKENIZER.token_bytes(i) for i in TOKENIZER.encode("2024 100")]
    assert shown == [b"2", b"0", b"2", b"4", b" ", b"1", b"0", b"0"]


def test_a_lone_surrogate_is_refused_with_its_place():
    with pytest.raises(UserError, match=r"character 3 of the text is a lone surrogate \('\\ud800'\)"):
        TOKENIZER.encode("ab\ud800")


@pytest.mark.parametrize("token", [-1, TOKENIZER.vocab_size])
def test_an_id_out_of_range_is_refused(token):
    with pytest.raises(UserError, match=f"{token} is not a token id of this tokenizer; its ids are 0 to"):
        TOKENIZER.decode([token])


def test_saving_and_loading_keeps_everything_and_the_hash(tmp_path):
    TOKENIZER.save(tmp_path)
    TOKENIZER.save(tmp_path / "other.json")
    for place in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "other.json"):
        loaded = Tokenizer.load(place)
        assert loaded.hash == TOKENIZER.hash
        assert loaded.vocab_size == TOKENIZER.vocab_size
        assert loaded.encode(WORDS + "</think>") == TOKENIZER.encode(WORDS + "</think>")


def _foreign(change):
    content = json.loads(TOKENIZER.to_json())
    change(content)
    return json.dumps(content)


def _swap_ids(content):
    first, second = content["added_tokens"][:2]
    first["content"], second["content"] = second["content"], first["content"]
    vocab = content["model"]["vocab"]
    vocab["<pad>"], vocab["<unk>"] = vocab["<unk>"], vocab["<pad>"]


def _add_word(content):
    content["model"]["vocab"]["日"] = len(content["model"]["vocab"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ("{not json", "is not a tokenizer file"),
        ("{}", "is not a tokenizer file"),
        (_foreign(_swap_ids), "lacks the special tokens with their ids"),
        (_foreign(_add_word), "is not a byte-level tokenizer"),
    ],
)
def test_a_file_that_is_no_tokenizer_of_ours_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def described(**changes):
    """Return the tokenizer's JSON with other values at these keys; "a__b" stands for b within a."""
    whole = json.loads(TOKENIZER.to_json())
    for key, value in changes.items():
        *outer, last = key.split("__")
        part = whole
        for name in outer:
            part = part[name]
        part[last] = value
    return json.dumps(whole)


def test_what_would_cut_or_scatter_a_text_is_taken_out():
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 600}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "<pad>"}
    careless = Tokenizer.from_json(described(truncation=truncation, padding=padding, model__dropout=0.5))
    assert careless.encode(PROBE * 9) == TOKENIZER.encode(PROBE * 9)
    assert careless.hash == TOKENIZER.hash


@pytest.mark.parametrize("number", [5, TOKENIZER.vocab_size, 2**31])
def test_ids_with_holes_or_given_twice_are_refused(number):
    vocabulary = json.loads(TOKENIZER.to_json())["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    with pytest.raises(UserError, match=r"tokens should have the ids 0 to|lacks the special tokens"):
        Tokenizer.from_json(described(model__vocab=vocabulary | {last: number}))


@pytest.mark.parametrize("changes", [{"pre_tokenizer": None}, {"normalizer": {"type": "Lowercase"}}], ids=str)
def test_one_that_loses_text_is_refused(changes):
    with pytest.raises(UserError, match=r"does not decode its own encoding|is not a byte-level tokenizer"):
        Tokenizer.from_json(described(**changes))


def test_an_absurd_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"has 1,099,511,627,776 bytes; a file of this kind has at most"):
        Tokenizer.load(tmp_path)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not a tokenizer file"):
        Tokenizer.load(tmp_path / "deep.json")
