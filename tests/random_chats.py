"""Random conversations, and the ids that training reads for them, for tests."""

import json
import random

from rmkv_cli.config import FileSource
from rmkv_cli.data.encoding import encode
from rmkv_cli.data.sources import open_source, read_source

WORDS = [
    "the ",
    "cat",
    " <end>",
    "<start>",
    "<eod>",
    "<think>",
    "</think>",
    "\ue000",
    "<",
    "end>",
    "\n",
    "é",
    " 12",
    "  ",
]
CALLS = [
    {"type": "function", "function": {"name": "sit", "arguments": {"on": ["the <end> é", 1.5, None], "x": {}}}},
    {"type": "function", "function": {"name": "said", "arguments": '{"so":  true}'}},
]


def draw_chat(seed):
    """A conversation of any roles, with tool calls, thoughts, parts, empty messages and text that spells specials."""
    draw = random.Random(seed)
    messages = []
    for _ in range(draw.randrange(1, 8)):
        text = "".join(draw.choices(WORDS, k=draw.randrange(6)))
        content = draw.choice([text, [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]])
        message = {"role": draw.choice(["system", "user", "tool", "assistant", "assistant"]), "content": content}
        if message["role"] == "assistant" and draw.random() < 0.3:
            message |= {
                "content": draw.choice([None, "", text]),
                "tool_calls": draw.choices(CALLS, k=draw.choice([1, 2])),
            }
        messages.append(message)
    return messages


def training_ids(chats, tokenizer, folder):
    """The ids that training reads of each conversation, from a file of messages in a folder."""
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source = FileSource(kind="files", name="chats", weight=1, files=["chats.jsonl"], format="messages")
    documents = [document for _, document in read_source(source, open_source(source, folder))]
    encoded = encode(tokenizer, [(document.pieces, document.learned) for document in documents])
    return [ids.tolist() for ids, _ in encoded]
