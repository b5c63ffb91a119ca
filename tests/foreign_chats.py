"""Random conversations without spelt special tokens, for models with their own chat templates."""

import random

WORDS = [
    "the ",
    "cat",
    "Hello",
    " world",
    "\n",
    "\n\n",
    "  ",
    "é",
    " 12",
    "日本",
    "def f(x):",
    "\t",
    "!",
    ".",
    " ",
    "'s",
]


def draw_foreign_chat(seed, *, system, think, prompted):
    """A conversation with an optional system message that may end with a question or an answer."""
    draw = random.Random(seed)

    def text():
        return "".join(draw.choices(WORDS, k=draw.randrange(1, 8)))

    messages = [{"role": "system", "content": text()}] if system and draw.random() < 0.4 else []
    for _ in range(draw.randrange(1, 5)):
        thought = f"<think>{text()}</think>" if think and draw.random() < 0.5 else ""
        messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": thought + text()}]
    return messages[:-1] if prompted else messages
