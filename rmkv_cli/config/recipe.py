"""A recipe for synthetic data: which model writes, what it is asked, and which answers are kept."""

import re
from collections.abc import Collection, Iterator
from typing import Any, Literal

from pydantic import Field

from rmkv_cli.config.section import Section
from rmkv_cli.errors import did_you_mean

FIELD = re.compile(r"\{(\w+)\}")
NOTES = "writer", "seed", "license", "verdict"
"""Columns that every row has besides those of `[row]`."""


class Writer(Section):
    """The model that writes: a model folder of rmkv, or a model behind an address that speaks OpenAI's protocol."""

    model: str = Field(min_length=1)
    """A model folder, checkpoint or run; with `url`, the name of the model there."""
    url: str | None = Field(None, pattern=r"^https?://[^\s/]+")
    """Address of a server with OpenAI's protocol, up to and including /v1."""
    key_env: str | None = Field(None, min_length=1)
    """Name of the environment variable that holds the server's API key, such as OPENAI_API_KEY."""
    asks_by: Literal["message", "text"] = "message"
    """message: the prompt is the user's message, and the model answers. text: the model continues the prompt."""
    parallel: int = Field(8, ge=1, le=1024)
    """Most requests that are in flight at once; for a model folder, texts that are generated together."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        match fields:
            case {"url": None, "key_env": str()}:
                yield "a model folder needs no key; `key_env` goes with `url`"


class Slot(Section):
    """A place in the templates, filled anew for each request from a list, the lines of a file, or passages of files."""

    values: list[str] = Field(default_factory=list)
    """The list."""
    file: str | None = None
    """A file with a value a line; empty lines are skipped."""
    files: list[str] = Field(default_factory=list)
    """Paths and globs of documents, as in a mix's source. Each passage is used once before any is used again."""
    characters: int = Field(2000, ge=1)
    """Most characters of a passage, which ends between paragraphs, lines, sentences or words."""
    following: int = Field(0, ge=0)
    """Most characters of the text that follows a passage, drawn evenly from 0 on: `{SLOT_following}` in the row. After
    the document's end come the next documents."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        if "files" in fields and sum(bool(fields.get(name)) for name in ("values", "file", "files")) != 1:
            yield "a slot has exactly one of `values`, `file` and `files`"


class Sampling(Section):
    """How the model draws its answers."""

    temperature: float = Field(0.8, ge=0, le=100)
    """Divides the logits; 0: always the likeliest token."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Keep the fewest likeliest tokens that hold this much of the probability."""
    max_tokens: int = Field(2048, ge=1)
    """Most tokens of an answer."""


class Filters(Section):
    """Which answers become rows. A rejected answer is counted under the first filter that rejects it."""

    truncated: bool = True
    """Reject answers that `max_tokens` cut."""
    json_keys: list[str] = Field(default_factory=list)
    """The answer should be a JSON object (or hold one in a code fence) with a text under each of these keys. Their
    texts are fields in `[row]`."""
    min_characters: int = Field(1, ge=0)
    """Shorter answers are rejected."""
    max_characters: int | None = Field(None, ge=1)
    """Longer answers are rejected."""
    equations: bool = False
    """Verify that the answer has equations such as 12 + 5 * 3 = 27, and that all of them hold."""
    quoted: dict[str, str] = Field(default_factory=dict)
    """Verify that the text under the JSON key stands, word for word, in the slot: { answer = "passage" }."""
    evaluation: list[str] = Field(default_factory=list)
    """Files of evaluation sets, as in a mix's source. A row that shares `ngram` words in a row with them, or all words
    of a text there that is shorter, is rejected."""
    ngram: int = Field(13, ge=5, le=100)
    """Words in a row that make a row contaminated."""
    near_duplicates: float | None = Field(0.8, ge=0.1, le=1)
    """Reject an answer whose runs of 5 words are this similar to an earlier row's (Jaccard, estimated by MinHash).
    Exact duplicates are always rejected."""


class DataRecipe(Section):
    """What `rmkv data generate` makes: requests to a writer, and a row for each answer that the filters accept."""

    count: int = Field(ge=1, lt=2**31)
    """Number of requests. Raising it later adds requests; the earlier ones stay the same."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the draws. Request N asks the writer to sample with seed + N."""
    license: str = "unknown"
    """A note on the licence of the answers, for each row: what the writer's licence demands, for instance."""
    writer: Writer
    slots: dict[str, Slot] = Field(default_factory=dict)
    system: str = ""
    """The system message; {SLOT} is replaced by what is drawn."""
    prompt: str = Field(min_length=1)
    """What the writer is asked; {SLOT} is replaced by what is drawn."""
    sampling: Sampling = Field(default_factory=Sampling)
    filters: Filters = Field(default_factory=Filters)
    row: dict[str, str] = Field(default_factory=lambda: {"prompt": "{prompt}", "response": "{response}"}, min_length=1)
    """Columns of a row and their templates, with the fields {prompt}, {response}, {SLOT}, {SLOT_following} and
    those of `filters.json_keys`."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        if "slots" not in fields:
            return
        slots = fields["slots"]
        if "row" not in fields:
            last = next(reversed(fields))
            if last in ("system", "prompt"):
                yield from _unknown(last, fields[last], slots)
            return
        if "filters" not in fields:
            return
        yield from _wrong_filters(fields["filters"], slots)
        following = [f"{name}_following" for name, slot in slots.items() if slot.following]
        known = ["prompt", "response", *slots, *following, *fields["filters"].json_keys]
        for column, template in fields["row"].items():
            if column in NOTES:
                yield f"'{column}' is a column that each row has; choose another name"
            yield from _unknown(column, template, known)


def _unknown(name: str, template: str, known: Collection[str]) -> Iterator[str]:
    for field in dict.fromkeys(FIELD.findall(template)):
        if field not in known:
            hint = did_you_mean(field, known) or f" (there are: {', '.join(known) or 'none'})"
            yield f"'{name}' has {{{field}}}, which nothing fills{hint}"


def _wrong_filters(filters: Filters, slots: Collection[str]) -> Iterator[str]:
    for key, slot in filters.quoted.items():
        if key not in filters.json_keys:
            yield f"filters.quoted: '{key}' is not among filters.json_keys"
        if slot not in slots:
            hint = did_you_mean(slot, slots) or f" (there are: {', '.join(slots) or 'none'})"
            yield f"filters.quoted: no slot '{slot}'{hint}"
