"""The requests of a recipe: what each asks, and the key by which its answer is found again."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmkv_cli.config import DataRecipe
from rmkv_cli.config.recipe import FIELD
from rmkv_cli.data.synthetic.slots import slot_draw

REFUSED = "refused"
"""Finish reason of a request that the writer refuses, as a filter of a server does. It has no answer."""


@dataclass(frozen=True)
class Request:
    """A request to a writer."""

    number: int
    """Its place in the recipe, from 0."""
    filled: Mapping[str, str]
    """What its slots were filled with."""
    prompt: str
    body: Mapping[str, Any]
    """The request in OpenAI's protocol."""
    key: str
    """SHA-256 of the body and the writer, in hexadecimal."""


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    finish_reason: str | None
    """"length" if `max_tokens` cut it; `REFUSED` if there is none, and `text` is why."""
    prompt_tokens: int = 0
    tokens: int = 0


Write = Callable[[Sequence[Request], Callable[[Request, Answer], None]], None]
"""Answers requests, in any order, and calls the function with each answer as soon as it is whole.

A request counts as answered when that call returns; only then another may take its place.
"""


def make_requests(recipe: DataRecipe, base: Path, identity: str) -> list[Request]:
    """Return a recipe's requests. Request N is the same whatever the count is.

    Args:
        recipe: what is asked.
        base: folder that the recipe's files are relative to.
        identity: the writer's, in the requests' keys.

    Raises:
        UserError: a slot's files cannot be read.
    """
    draws = [slot_draw(name, slot, base, recipe.seed) for name, slot in recipe.slots.items()]
    sampling = recipe.sampling.model_dump()
    requests = []
    for number in range(recipe.count):
        draw = random.Random(f"{recipe.seed} {number}")
        filled = {name: text for fill in draws for name, text in fill(number, draw).items()}
        prompt, system = fill_in(recipe.prompt, filled), fill_in(recipe.system, filled)
        if recipe.writer.asks_by == "message":
            messages = [{"role": "system", "content": system}] if system else []
            asked: dict[str, Any] = {"messages": [*messages, {"role": "user", "content": prompt}]}
        else:
            asked = {"prompt": prompt}
        body = asked | sampling | {"seed": recipe.seed + number}
        if recipe.writer.url is not None:
            body["model"] = recipe.writer.model
        key = hashlib.sha256(json.dumps([identity, body], sort_keys=True).encode()).hexdigest()
        requests.append(Request(number, filled, prompt, body, key))
    return requests


def fill_in(template: str, filled: Mapping[str, str]) -> str:
    """Return a template with its fields replaced, once: what is filled in is text alone."""
    return FIELD.sub(lambda found: filled.get(found[1], found[0]), template)
