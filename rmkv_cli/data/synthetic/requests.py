"""The requests of a recipe, and the keys under which their answers are saved."""

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
"""Finish reason of a request that the writer refuses to answer, for instance because of a content filter."""


@dataclass(frozen=True)
class Request:
    """A request to a writer."""

    number: int
    """Index in the recipe, from 0."""
    filled: Mapping[str, str]
    """Texts that fill its slots, by field."""
    prompt: str
    body: Mapping[str, Any]
    """Body of the request in OpenAI's protocol."""
    key: str
    """SHA-256 of the body and the writer, in hexadecimal."""


@dataclass(frozen=True)
class Answer:
    """A complete answer, or a refusal."""

    text: str
    """The answer's text, or the reason for a refusal."""
    finish_reason: str | None
    """"length" if `max_tokens` cut the answer; `REFUSED` if there is no answer."""
    prompt_tokens: int = 0
    tokens: int = 0


Write = Callable[[Sequence[Request], Callable[[Request, Answer], None]], None]
"""A function that answers requests in any order, and calls a second function with each complete answer.

A request counts as answered when that call returns; only then may another one begin in its place.
"""


def make_requests(recipe: DataRecipe, base: Path, identity: str) -> list[Request]:
    """Return a recipe's requests. Request N does not depend on the number of requests.

    Args:
        recipe: the recipe.
        base: folder that the recipe's files are relative to.
        identity: identifies the writer in the requests' keys.

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
            content: dict[str, Any] = {"messages": [*messages, {"role": "user", "content": prompt}]}
        else:
            content = {"prompt": prompt}
        body = content | sampling | {"seed": recipe.seed + number}
        if recipe.writer.url is not None:
            body["model"] = recipe.writer.model
        key = hashlib.sha256(json.dumps([identity, body], sort_keys=True).encode()).hexdigest()
        requests.append(Request(number, filled, prompt, body, key))
    return requests


def fill_in(template: str, filled: Mapping[str, str]) -> str:
    """Return a template with its fields replaced; fields within the inserted texts are not replaced."""
    return FIELD.sub(lambda found: filled.get(found[1], found[0]), template)
