"""Conversations: what is asked stands between <start> and <end>, and no text can forge them."""

import pytest

from rmkv_cli.data.chat import pieces_of, read_messages
from rmkv_cli.tokenizer import Special

START, END, THINK, END_THINK = Special.START, Special.END, Special.THINK, Special.END_THINK


def test_all_turns_but_the_assistants_are_prompts():
    turns = [("system", "Be kind."), ("user", "Hi"), (" Assistant", "<think>so</think>Hello"), ("user", "Bye")]
    assert pieces_of(turns) == (
        *(START, "Be kind.", END, START, "Hi", END),
        *(THINK, "so", END_THINK, "Hello"),
        *(START, "Bye", END),
    )


def test_an_empty_prompt_is_none_and_specials_in_text_are_text():
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
    assert read_messages(value) == turns


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (3, "is neither a list of messages nor a text"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], "message 2 has not both a role and a content"),
        (["a"], "message 1 has not both"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1 has not both a role and a content"),
    ],
)
def test_what_is_no_conversation_is_told(value, what):
    with pytest.raises(ValueError, match=what):
        read_messages(value)
