"""A conversation with a model that has its own chat template is read as the template renders it."""

import json

import pytest
import torch
from foreign import foreign_files, foreign_folder
from small_model import make_model
from transformers import AutoTokenizer

from rmkv_cli.data.chat import pieces_of
from rmkv_cli.errors import UserError
from rmkv_cli.generation import (
    Batch,
    Conversation,
    Decoder,
    SamplingConfig,
    generate,
    read_lines,
    read_prompt,
    text_pieces,
    write_lines,
)
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.checkpoint import write_model

GREEDY, WARM = SamplingConfig(temperature=0), SamplingConfig(temperature=1, top_p=1, seed=3)


def loaded(name, spare=3, **shape):
    """A float64 model with a vocabulary slightly larger than the tokenizer's, and the tokenizer."""
    tokenizer = Tokenizer.from_files(foreign_files(name))
    return make_model(vocab_size=tokenizer.vocab_size + spare, **shape), tokenizer


def assert_read(model, conversation, ids):
    """Assert that the conversation's state equals that of one pass over these tokens."""
    logits, state = model(torch.tensor([ids]))
    torch.testing.assert_close(conversation.memory.logits.double(), logits[:, -1], atol=1e-5, rtol=0)
    assert int(conversation.memory.state.position) == len(ids)
    torch.testing.assert_close(conversation.memory.state.memory, state.memory, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["smollm2", "llama3"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_each_turn_is_read_as_transformers_renders_the_conversation(tmp_path, name, system):
    theirs = AutoTokenizer.from_pretrained(foreign_folder(tmp_path, name))
    model, tokenizer = loaded(name)
    conversation = Conversation(model, tokenizer, WARM, 8, system=system)
    assert conversation.empty
    chat = [{"role": "system", "content": system}] if system else []
    ids: list[int] = []
    for message in ("Hello <|im_end|>"[:5], "and you?", "so"):
        chat.append({"role": "user", "content": message})
        whole = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        said = "".join(conversation.say(message))
        assert said == conversation.answer.text
        earlier = theirs.decode(ids)
        before = theirs.apply_chat_template(chat[:-2], add_generation_prompt=True, tokenize=False) if ids else ""
        new = whole[len(before) + len("X") :] if ids else whole  # the answer's place is one letter long
        ids += theirs(new, add_special_tokens=False)["input_ids"]
        assert theirs.decode(ids) == earlier + new
        ids += conversation.answer.ids
        assert_read(model, conversation, ids)
        chat.append({"role": "assistant", "content": "X"})


def test_saving_a_conversation_first_reads_the_tokens_that_end_the_answer(tmp_path):
    model, tokenizer = loaded("smollm2")
    first, second = (Conversation(model, tokenizer, GREEDY, 8) for _ in range(2))
    for conversation in (first, second):
        list(conversation.say("Hello"))
    first.save(tmp_path / "notes")
    third = Conversation(model, tokenizer, GREEDY, 8)
    third.load(tmp_path / "notes")
    for conversation in (first, second, third):
        list(conversation.say("and you?"))
    for conversation in (first, third):
        torch.testing.assert_close(conversation.question.logits, second.question.logits)
        assert int(conversation.question.state.position) == int(second.question.state.position)


def test_nothing_is_read_before_the_first_message(tmp_path):
    model, tokenizer = loaded("mistral")
    conversation = Conversation(model, tokenizer, GREEDY, 8, system="Be brief.")
    with pytest.raises(UserError, match="nothing has been read yet"):
        conversation.save(tmp_path / "notes")
    with pytest.raises(UserError, match=r"the chat template refuses this conversation: .*roles must alternate"):
        list(conversation.say("Hello"))


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_a_text_of_any_length_is_read_as_a_message(tmp_path, name):
    model, tokenizer = loaded(name, segment_length=64)
    (tmp_path / "long.txt").write_text("It is so. " * 3000)
    whole, streamed = (Conversation(model, tokenizer, GREEDY, 4) for _ in range(2))
    with (tmp_path / "long.txt").open("rb") as file:
        streamed.read(text_pieces(file, "long.txt", parts=tokenizer.parts))
    whole.read(["It is so. " * 3000])
    assert int(whole.memory.state.position) == int(streamed.memory.state.position)
    assert torch.equal(whole.memory.seen, streamed.memory.seen)
    expected = tokenizer.encode_document(pieces_of([("user", "It is so. " * 3000)], tokenizer))
    assert streamed.memory.seen[0, expected[: len(expected) // 2]].all()
    list(streamed.say("why?"))


def test_modes_connect_turns_as_in_rmkvs_own_format():
    model, tokenizer = loaded("llama3")
    alone = Conversation(model, tokenizer, GREEDY, 6, mode="single")
    list(alone.say("one"))
    assert alone.empty
    list(alone.say("two"))
    fresh = Conversation(model, tokenizer, GREEDY, 6)
    list(fresh.say("two"))
    assert alone.answer.ids == fresh.answer.ids
    fresh.reset()
    assert fresh.empty
    instructed = Conversation(model, tokenizer, GREEDY, 6, mode="instruct")
    assert len([list(instructed.say(message)) for message in ("one", "two")]) == 2


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3", "mistral"])
def test_an_answer_ends_at_each_of_the_models_ends_and_never_holds_padding(name):
    model, tokenizer = loaded(name)
    model.norm.bias.fill_(1)
    for token in tokenizer.roles.ends:
        ending = make_model(vocab_size=model.config.vocab_size)
        ending.norm.bias.fill_(1)
        ending.embedding.weight[token.id] = 5
        assert generate(ending, tokenizer, "Hello", GREEDY, 5).ids == []
        text = generate(ending, tokenizer, "Hello", GREEDY, 5)
        assert list(text) == []
        assert text.stop_reason == "end"
    for never in tokenizer.roles.never:
        model.embedding.weight[never] = 5
    text = generate(model, tokenizer, "Hello", GREEDY, 20)
    assert "".join(text) == text.text
    assert not set(text.ids) & set(tokenizer.roles.never)
    assert max(text.ids) < tokenizer.vocab_size


def test_a_stop_string_is_found_in_text_of_byte_fallback(monkeypatch):
    """The model generates an emoji as four tokens of one byte each, and the text ends before it."""
    model, tokenizer = loaded("mistral")
    wanted = iter(tokenizer.encode("so \U0001f600 it", continues=True))
    monkeypatch.setattr(Batch, "_draw", lambda *_: [next(wanted)])
    text = generate(model, tokenizer, "Hello", GREEDY, 20, ["\U0001f600"])
    assert "".join(text) == "so "
    assert text.stop_reason == "stop"


def test_lines_of_messages_have_the_models_format(tmp_path):
    model, tokenizer = loaded("qwen3")
    messages = [{"role": "user", "content": "Hello"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"prompt": "Hello"}))
    lines = read_lines(tmp_path / "in.jsonl")
    write_lines(model, tokenizer, lines, tmp_path / "out", [GREEDY], 6, (), Decoder(model, 2))
    chat, text = (json.loads(line)["text"] for line in (tmp_path / "out").read_text().splitlines())
    conversation = Conversation(model, tokenizer, GREEDY, 6)
    assert "".join(conversation.say("Hello")) == chat
    assert "".join(generate(model, tokenizer, read_prompt(model, tokenizer, "Hello"), GREEDY, 6)) == text


def test_a_model_folder_keeps_the_files_and_names_the_tokens_that_end_a_text(tmp_path):
    model, tokenizer = loaded("llama3")
    write_model(tmp_path, model, tokenizer)
    again = Tokenizer.load(tmp_path)
    assert again.hash == tokenizer.hash
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert said["eos_token_id"] == [token.id for token in tokenizer.roles.ends]
    assert said["bos_token_id"] == tokenizer.roles.begin.id
    assert "temperature" in said


def test_a_template_without_a_token_that_ends_an_answer_has_one_turn():
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant: "
    tokenizer = Tokenizer.from_files(foreign_files("llama3") | {"chat_template.jinja": source})
    model = make_model(vocab_size=tokenizer.vocab_size)
    conversation, alone = (Conversation(model, tokenizer, GREEDY, 5, mode=mode) for mode in ("chat", "single"))
    for each in (conversation, alone):
        list(each.say("Hello"))
    with pytest.raises(UserError, match="does not render a conversation turn by turn"):
        list(conversation.say("and you?"))
    list(alone.say("and you?"))
