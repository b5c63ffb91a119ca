"""Only the tokens of answers, and the token that ends each answer, are learned."""

import json
import random

import numpy as np
import pytest

from rmkv_cli.config import MixConfig, TextSource, load_mix
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.encoding import parallel_encoder
from rmkv_cli.data.lanes import Lanes, Prepared
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.data.mix import prepare, warn_of_sources_without_supervision
from rmkv_cli.data.mixer import Mixer
from rmkv_cli.data.stream import Stream
from rmkv_cli.errors import UserError

EOD, START, END, THINK, END_THINK = 2, 3, 4, 5, 6
WORDS = ["one ", "and two", " 12\n", "é", "<eod>", "<start>", "<end>", "</think>", "<think>", "\ue000", "😀", "  "]
FORMATS = ("messages", "parts", "from", "llama", "beside", "prompt_response")
SUPERVISE = ("all", "answers")


def draw_text(draw, longest=12):
    return "".join(draw.choice(WORDS) for _ in range(draw.randrange(longest)))


def draw_conversation(draw, kind):
    """Turns {role, thought, text, train}: of all roles in any order, some empty, but what the format cannot hold."""
    if kind == "prompt_response":
        roles = ["user", "assistant"]
    else:
        roles = draw.choices(["user", "system", "tool", "assistant", "assistant"], k=draw.randrange(1, 7))
    if kind == "beside":
        roles.append("assistant")
    turns = []
    for role in roles:
        thinks = role == "assistant" and draw.random() < 0.3
        # Without a thought, a text that begins with <think> and holds </think> would be one.
        text = draw_text(draw) if thinks else draw.choice(["", "Well "]) and "Well " + draw_text(draw)
        if kind == "llama" and not text and not thinks and role == "assistant":
            continue  # an answer that is opened and empty is none in this format
        thought = draw_text(draw).replace("</think>", "") if thinks else None
        trained = kind not in ("messages", "parts", "from") or draw.random() < 0.7
        turns.append({"role": role, "thought": thought, "text": text, "train": trained})
    return turns


def content_of(turn):
    return turn["text"] if turn["thought"] is None else f"<think>{turn['thought']}</think>{turn['text']}"


def record_of(turns, kind, draw):
    """Return the turns as a record of this format."""
    contents = [content_of(turn) for turn in turns]
    if kind == "prompt_response":
        return {"prompt": contents[0], "response": contents[1]}
    if kind == "llama":
        parts = zip(turns, contents, strict=True)
        heads = (f"<|start_header_id|>{t['role']}<|end_header_id|>\n\n{text}<|eot_id|>" for t, text in parts)
        return {"messages": "<|begin_of_text|>" + "".join(heads)}
    messages = []
    for turn, content in zip(turns, contents, strict=True):
        if kind == "parts":
            cut = draw.randrange(len(content) + 1)
            parts = [{"type": "text", "text": part} for part in (content[:cut], content[cut:])]
            message = {"role": turn["role"].title(), "content": parts}
        elif kind == "from":
            message = {"from": {"assistant": "gpt", "user": "human"}.get(turn["role"], turn["role"]), "value": content}
        else:
            message = {"role": turn["role"], "content": content}
        messages.append(message if turn["train"] else message | {draw.choice(["train", "training"]): False})
    if kind == "beside":
        return {"messages": messages[:-1], "last": contents[-1]}
    return {"messages": messages}


def heard(turns, kind):
    """The turns that are read: no empty prompts, but in prompt_response; answers in a row as one, where all it takes is
    to write the second one's text behind the first one's."""
    read = []
    for turn in turns:
        answer, before = turn["role"] == "assistant", read[-1] if read else {"role": None}
        if answer and before["role"] == "assistant" and turn["thought"] is None and turn["train"] == before["train"]:
            read[-1] = before | {"text": before["text"] + turn["text"]}
        elif answer or turn["text"] or kind == "prompt_response":
            read.append(turn)
    return read


def by_hand(tokenizer, turns, kind, supervise):
    """The document's ids and, for each id and for the end, whether it is learned: written down turn by turn."""
    ids, learned = [EOD], [False]
    after_answer, its_train = False, True

    def put(tokens, counts):
        ids.extend(tokens)
        learned.extend([counts] * len(tokens))

    for turn in heard(turns, kind):
        encoded = tokenizer.encode(turn["text"])
        if turn["role"] == "assistant":
            if turn["thought"] is not None:
                put([THINK], turn["train"])
                put(tokenizer.encode(turn["thought"]), turn["train"])
                put([END_THINK], turn["train"])
            put(encoded, turn["train"])
            after_answer, its_train = True, turn["train"]
        else:
            prompts = supervise == "all" and turn["train"]
            put([START], its_train if after_answer else prompts)
            put(encoded, prompts)
            put([END], prompts)
            after_answer = False
    if supervise == "all":
        learned.append(its_train if after_answer else True)
    else:
        learned.append(after_answer and its_train)
    return ids, learned


def source_of(kind, **more):
    form = "prompt_response" if kind == "prompt_response" else "messages"
    beside = {"answer_column": "last"} if kind == "beside" else {}
    return {"kind": "files", "name": kind, "weight": 1, "files": [f"{kind}.jsonl"], "format": form} | beside | more


@pytest.fixture
def write_records(tmp_path):
    def write(name, records):
        lines = (json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    return write


@pytest.fixture
def conversations(write_records):
    """Writes 200 conversations of a format to KIND.jsonl and returns their turns."""

    def make(kind):
        draw = random.Random(kind)
        turns = [draw_conversation(draw, kind) for _ in range(200)]
        write_records(kind, [record_of(each, kind, draw) for each in turns])
        return turns

    return make


def flags(documents, index):
    """Whether each id of a document is learned, and its end."""
    counted = documents.counted(index)
    return [False, *([True] * len(documents[index]) if counted is None else counted.tolist())]


@pytest.mark.parametrize("supervise", SUPERVISE)
@pytest.mark.parametrize("kind", FORMATS)
def test_ids_and_learned_tokens_match_those_worked_out_by_hand(tmp_path, tokenizer, conversations, kind, supervise):
    turns = conversations(kind)
    mix = MixConfig(validation=0, supervise=supervise, sources=[source_of(kind)])
    manifest = prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    documents = Documents.open(tmp_path / "out", "train")
    found = sorted((documents[i].tolist(), flags(documents, i)) for i in range(200))
    expected = sorted(by_hand(tokenizer, each, kind, supervise) for each in turns)
    assert found == expected
    assert all(ids[0] == EOD and ids.count(EOD) == 1 for ids, _ in found)  # text that spells <eod> is text
    assert manifest.sources[0].supervised_tokens == documents.counts.sum() == sum(sum(x) for _, x in expected)
    assert any(x[-1] for _, x in found)  # the end of a document is learned after an answer
    if supervise == "answers":
        assert kind in ("beside", "prompt_response") or not all(x[-1] for _, x in found)
        ended_by_start = any(x and i == START for ids, x_ in found for i, x in zip(ids, x_, strict=False))
        assert ended_by_start == (kind != "prompt_response")


@pytest.mark.slow
def test_neighbours_in_a_lane_learn_the_same_tokens_as_alone_prepared_or_streamed(tmp_path, tokenizer, conversations):
    text = {"kind": "files", "name": "text", "weight": 1, "files": ["prompt_response.jsonl"], "text_column": "prompt"}
    sources = [source_of("messages", supervise="all"), *map(source_of, FORMATS[1:]), text]
    expected = []  # some have the same ids
    for kind in FORMATS:
        supervise = "all" if kind == "messages" else "answers"
        turns = conversations(kind)
        expected += [by_hand(tokenizer, each, kind, supervise) for each in turns]
    texts = [[EOD, *tokenizer.encode(prompt["text"])] for prompt, _ in turns]
    expected += [(ids, [False] + [True] * len(ids)) for ids in texts]
    mix = MixConfig(validation=0, tokens=3_000, supervise="answers", sources=sources)
    prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    prepared = Lanes(Prepared(Documents.open(tmp_path / "out", "train"), 0), 2, EOD)
    lengths = random.Random(0).choices(range(1, 30), k=60)
    rows = [prepared.next(length) for length in lengths]
    for lane in range(2):
        ids, targets, numbers = (
            np.concatenate([getattr(row, name)[lane] for row in rows])
            for name in ("input_ids", "targets", "document_ids")
        )
        for number in range(numbers.max()):  # the last one may go on
            whole = ids[numbers == number].tolist()
            learned = [target != -100 for target in targets[numbers == number].tolist()]
            assert (whole, [False, *learned]) in expected
            wanted = np.where(learned, [*whole[1:], EOD], -100)
            assert targets[numbers == number].tolist() == wanted.tolist()
        assert numbers.max() > 8
    state, again = None, []
    for part in (lengths[:25], lengths[25:]):  # the second begins at a checkpoint of the first
        with Stream(mix, tmp_path, tokenizer) as stream:
            lanes = Lanes(stream, 2, EOD)
            if state is not None:
                lanes.load_state_dict(state)
            again += [lanes.next(length) for length in part]
            state = lanes.state_dict()
    for row, other in zip(rows, again, strict=True):
        assert row.input_ids.tolist() == other.input_ids.tolist()
        assert row.targets.tolist() == other.targets.tolist()


def test_files_that_are_evaluated_learn_what_the_mix_says(tmp_path, tokenizer, conversations):
    turns = conversations("messages")
    (tmp_path / "mix.toml").write_text(
        'supervise = "answers"\n[[sources]]\nkind = "files"\nname = "it"\nweight = 1\nfiles = ["messages.jsonl"]\n'
        'format = "messages"\n'
    )
    documents = Documents.from_files([tmp_path / "mix.toml"], tokenizer)
    found = sorted((documents[i].tolist(), flags(documents, i)) for i in range(200))
    assert found == sorted(by_hand(tokenizer, each, "messages", "answers") for each in turns)


def test_a_source_says_what_is_learned_or_else_the_mix_does_and_all_of_a_text_is(tmp_path, tokenizer, write_records):
    write_records("messages", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    write_records("text", [{"text": "one and two"}])
    text = {"kind": "files", "name": "text", "weight": 1, "files": ["text.jsonl"]}
    own = source_of("messages", name="own", supervise="all")
    mix = MixConfig(validation=0, tokens=60, supervise="answers", sources=[source_of("messages"), own, text])
    prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    documents = Documents.open(tmp_path / "out", "train")
    chat = [EOD, START, *tokenizer.encode("a"), END, *tokenizer.encode("b")]
    for index, learned in enumerate(([False] * 4 + [True, True], [False] + [True] * 5)):
        document = int(np.flatnonzero(documents.sources == index)[0])
        assert documents[document].tolist() == chat
        assert flags(documents, document) == learned
    assert documents.counted(int(np.flatnonzero(documents.sources == 2)[0])) is None


def test_a_text_has_no_answers_to_learn():
    with pytest.raises(ValueError, match="supervise = 'answers' needs format = 'prompt_response' or 'messages'"):
        TextSource(name="a", weight=1, supervise="answers")


def test_a_long_conversation_is_never_cut(tmp_path, tokenizer, write_records):
    """It continues in its lane's next rows as the same document, with its state, and all its answers are learned."""
    turns = [
        {"role": role, "thought": None, "text": f"{role} {i} " * 40, "train": True}
        for i in range(30)
        for role in ("user", "assistant")
    ]
    write_records("messages", [record_of(turns, "messages", random.Random(0))])
    mix = MixConfig(validation=0, supervise="answers", sources=[source_of("messages")])
    prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    documents = Documents.open(tmp_path / "out", "train")
    ids, learned = by_hand(tokenizer, turns, "messages", "answers")
    rows = Lanes(Prepared(documents, 0), 1, EOD)
    seen = [rows.next(64) for _ in range(len(ids) // 64)]
    assert len(seen) > 100
    assert {int(number) for row in seen for number in row.document_ids[0]} == {0}
    assert np.concatenate([row.input_ids[0] for row in seen]).tolist() == ids[: 64 * len(seen)]
    targets = [token if counts else -100 for token, counts in zip([*ids[1:], EOD], learned[1:], strict=True)]
    assert np.concatenate([row.targets[0] for row in seen]).tolist() == targets[: 64 * len(seen)]


QUESTIONS = [{"messages": [{"role": "user", "content": f"What of {i}?"}]} for i in range(20)]


def test_a_mix_in_which_nothing_is_supervised_is_refused(tmp_path, tokenizer, write_records):
    write_records("messages", QUESTIONS)
    mix = MixConfig(validation=0, supervise="answers", sources=[source_of("messages")])
    with pytest.raises(UserError, match="no token of the mix is supervised, so there is nothing to learn"):
        prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_a_stream_in_which_nothing_is_supervised_ends_when_it_has_been_read_once(
    tmp_path, tokenizer, write_records, capfd
):
    write_records("messages", QUESTIONS)
    write_records("parts", QUESTIONS)
    mix = MixConfig(validation=0, supervise="answers", sources=[source_of("messages"), source_of("parts")])
    with Stream(mix, tmp_path, tokenizer) as stream, pytest.raises(UserError, match="no token of the mix is superv"):
        Lanes(stream, 1, EOD).next(100_000)
    errors = capfd.readouterr().err
    for name in ("messages", "parts"):
        assert f"warning: source '{name}': no token of its documents is supervised" in errors


def test_a_stream_that_a_source_ends_before_anything_is_supervised_is_refused(tmp_path, tokenizer, write_records):
    write_records("messages", QUESTIONS)
    write_records("parts", QUESTIONS * 20)
    sources = [source_of("messages", when_dry="stop"), source_of("parts")]
    mix = MixConfig(validation=0, supervise="answers", sources=sources)
    with parallel_encoder(tokenizer, 1) as submit, pytest.raises(UserError, match="no token of the mix is supervised"):
        list(Mixer(mix, tmp_path, tokenizer, submit, 1, "train", endless=True))


def test_data_of_the_previous_format_are_still_read(tmp_path, tokenizer, write_records):
    write_records("prompt_response", [{"prompt": "a", "response": "b"}] * 20)
    prepare(MixConfig(validation=0, sources=[source_of("prompt_response")]), tmp_path, tokenizer, tmp_path / "out", 1)
    file = tmp_path / "out" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sources"][0]["supervised_tokens"], manifest["mix"]["supervise"]
    file.write_text(json.dumps(manifest | {"format": 2}))
    documents = Documents.open(tmp_path / "out", "train")
    assert (len(documents), documents.counts.tolist()) == (20, documents.lengths.tolist())
    warn_of_sources_without_supervision(Manifest.load(tmp_path / "out"))


def test_a_source_of_which_nothing_is_supervised_is_named(tmp_path, tokenizer, write_records, capfd):
    write_records("messages", QUESTIONS)
    write_records("prompt_response", [{"prompt": "a", "response": "b"}] * 20)
    sources = [source_of("messages"), source_of("prompt_response")]
    mix = MixConfig(validation=0, tokens=2_000, supervise="answers", sources=sources)
    prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    warn_of_sources_without_supervision(Manifest.load(tmp_path / "out"))
    warnings = [line for line in capfd.readouterr().err.splitlines() if "supervised" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: source 'messages': no token of its documents is supervised")


def test_the_mix_of_a_file_says_what_is_learned(tmp_path):
    (tmp_path / "mix.toml").write_text(
        'supervise = "answer"\n[[sources]]\nkind = "files"\nname = "a"\nweight = 1\nfiles = ["a"]\n'
    )
    with pytest.raises(UserError, match=r"mix\.toml: supervise: should be 'all' or 'answers'"):
        load_mix(tmp_path / "mix.toml")
