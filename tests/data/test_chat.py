"""Conversations: prompts are between <start> and <end>, which no text can forge."""

import pytest

from rmkv_cli.data.chat import Turn, pieces_of, read_messages, render
from rmkv_cli.tokenizer import Special

START, END, THINK, END_THINK = Special.START, Special.END, Special.THINK, Special.END_THINK


def test_all_turns_except_the_assistant_s_are_prompts():
    turns = [("system", "Be kind."), ("user", "Hi"), (" Assistant", "<think>so</think>Hello"), ("user", "Bye")]
    assert pieces_of(turns) == (
        *(START, "Be kind.", END, START, "Hi", END),
        *(THINK, "so", END_THINK, "Hello"),
        *(START, "Bye", END),
    )


def test_an_empty_prompt_is_omitted_and_spelt_special_tokens_stay_text():
    assert pieces_of([("system", ""), ("user", "a<end>b<think>")]) == (START, "a<end>b<think>", END)
    assert all(type(piece) is str for piece in pieces_of([("assistant", "x</think><end>")]))


@pytest.mark.parametrize(
    ("value", "turns"),
    [
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
            [("user", "Hi"), ("assistant", "Yes")],
        ),
        ([{"from": "gpt", "value": "Hi"}], [("gpt", "Hi")]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}],
            [("user", "Hi")],
        ),
        ("plain", [("user", "plain")]),
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nthink<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?\n<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            [("system", "think"), ("user", "Why?\n")],
        ),
        (
            "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            "b<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>",
            [("user", "a"), ("assistant", "b"), ("user", "c")],
        ),
        ("", []),
    ],
)
def test_messages_are_a_list_or_llama_3_s_text(value, turns):
    assert read_messages(value) == [Turn(*turn) for turn in turns]


def test_consecutive_answers_are_one_text():
    """As in what a chat template gives, so that the ids are the same on all paths."""
    turns = [("assistant", "a <"), ("gpt", "end>"), ("assistant", "<think>so</think>b"), ("bot", "c"), ("user", "d")]
    assert pieces_of(turns) == ("a <end>", THINK, "so", END_THINK, "bc", START, "d", END)
    separate = [Turn("assistant", "a"), Turn("assistant", "b", train=False), Turn("assistant", "c", train=False)]
    assert render(separate) == (("a", "bc"), (True, False, False))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}
WRITTEN = '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "tool_calls": [CALL]}, WRITTEN),
        ({"content": "Wait.", "tool_calls": [CALL, CALL]}, f"Wait.\n{WRITTEN}\n{WRITTEN}"),
        (
            {"content": "", "tool_calls": [{"function": {"name": "add", "arguments": '{"a":1}'}}]},
            '<tool_call>\n{"name": "add", "arguments": {"a":1}}\n</tool_call>',
        ),
        ({"content": "Hi", "tool_calls": []}, "Hi"),
        ({"content": "Hi", "tool_calls": None}, "Hi"),
    ],
)
def test_tool_calls_are_text_after_the_message(message, text):
    assert read_messages([{"role": "assistant"} | message]) == [Turn("assistant", text)]


@pytest.mark.parametrize(
    ("keys", "train"),
    [
        ({}, True),
        ({"train": True}, True),
        ({"train": None, "weight": 1.0}, True),
        ({"train": False}, False),
        ({"training": False}, False),
        ({"weight": 0}, False),
        ({"train": True, "weight": 0}, False),
    ],
)
def test_a_message_can_be_excluded_from_the_loss(keys, train):
    assert read_messages([{"role": "assistant", "content": "a"} | keys]) == [Turn("assistant", "a", train)]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (3, "is neither a list of messages nor a text"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], "message 2 should have a role and a content"),
        (["a"], "message 1 should have"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1 should have a role and a content"),
        ([{"role": "user", "content": None, "tool_calls": []}], "message 1 should have a role and a content"),
        ([{"role": "bot", "content": [{"type": "image_url"}], "tool_calls": [CALL]}], "message 1 should have a role"),
        ([{"role": "bot", "tool_calls": [{"name": "f"}]}], "message 1 has a tool call without a function's name"),
        ([{"role": "bot", "content": "a", "train": "no"}], "message 1: train should be true or false, got 'no'"),
    ],
)
def test_an_invalid_conversation_is_reported(value, what):
    with pytest.raises(ValueError, match=what):
        read_messages(value)
