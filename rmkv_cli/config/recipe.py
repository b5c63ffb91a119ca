"""Recipes for synthetic data: the model that writes, the prompts, and the filters for its answers."""

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
    """The model that writes: a model folder of rmkv, or a model on a server with OpenAI's protocol."""

    model: str = Field(min_length=1)
    """Model folder, checkpoint or run; with `url`, the model's name on the server."""
    url: str | None = Field(None, pattern=r"^https?://[^\s/]+")
    """Address of a server with OpenAI's protocol, up to and including /v1."""
    key_env: str | None = Field(None, min_length=1)
    """Name of the environment variable that holds the server's API key, such as OPENAI_API_KEY."""
    asks_by: Literal["message", "text"] = "message"
    """How to send the prompt. message: as the user's message, which the model answers. text: as text, which the model
    continues."""
    parallel: int = Field(8, ge=1, le=1024)
    """Maximum number of concurrent requests; for a model folder, the batch size."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
        match fields:
            case {"url": None, "key_env": str()}:
                yield "a model folder needs no key; `key_env` is for `url` only"


class Slot(Section):
    """A variable in the templates, drawn for each request from a list, the lines of a file, or passages of files."""

    values: list[str] = Field(default_factory=list)
    """List of values."""
    file: str | None = None
    """File with one value per line; empty lines are skipped."""
    files: list[str] = Field(default_factory=list)
    """Paths and globs of documents, as in a mix's source. Each passage is used once before any is used again."""
    characters: int = Field(2000, ge=1)
    """Maximum number of characters of a passage, which ends between paragraphs, lines, sentences or words."""
    following: int = Field(0, ge=0)
    """Maximum number of characters of the text after a passage, `{SLOT_following}` in the row. The number is drawn
    uniformly from 0 up; the text continues into the next documents."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
        if "files" in fields and sum(bool(fields.get(name)) for name in ("values", "file", "files")) != 1:
            yield "a slot has exactly one of `values`, `file` and `files`"


class Sampling(Section):
    """How the model samples its answers."""

    temperature: float = Field(0.8, ge=0, le=100)
    """Divisor of the logits. 0: always the most likely token."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Sample from the smallest set of most likely tokens with at least this total probability."""
    max_tokens: int = Field(2048, ge=1)
    """Maximum number of tokens of an answer."""


class Filters(Section):
    """Filters for answers. A rejected answer counts under the first filter that rejects it."""

    truncated: bool = True
    """Whether to reject answers that reach `max_tokens`."""
    json_keys: list[str] = Field(default_factory=list)
    """Require the answer to be a JSON object, or to contain one in a code fence, with a text under each of these keys.
    The texts are fields in `[row]`."""
    min_characters: int = Field(1, ge=0)
    """Minimum length of an answer."""
    max_characters: int | None = Field(None, ge=1)
    """Maximum length of an answer."""
    equations: bool = False
    """Require the answer to contain equations such as 12 + 5 * 3 = 27, all of them correct."""
    quoted: dict[str, str] = Field(default_factory=dict)
    """Require the text under a JSON key to occur verbatim in a slot: { answer = "passage" }."""
    evaluation: list[str] = Field(default_factory=list)
    """Files of evaluation sets, as in a mix's source. Reject a row that shares `ngram` consecutive words with a text of
    theirs, or contains a shorter text entirely."""
    ngram: int = Field(13, ge=5, le=100)
    """Number of consecutive words that make a row contaminated."""
    near_duplicates: float = Field(0.8, ge=0, le=1)
    """Reject an answer whose runs of 5 words are this similar to an earlier row's (Jaccard, estimated by MinHash); 0
    disables this filter. Exact duplicates are always rejected."""


class DataRecipe(Section):
    """A recipe for `rmkv data generate`: requests to a writer, and a row for each answer that the filters accept."""

    count: int = Field(ge=1, lt=2**31)
    """Number of requests. Raising it later adds requests; the earlier ones stay the same."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the draws. Request N asks the writer to sample with seed + N."""
    license: str = "unknown"
    """License of the answers, which each row records; the writer's license may demand one."""
    writer: Writer
    slots: dict[str, Slot] = Field(default_factory=dict)
    system: str = ""
    """System message; {SLOT} is replaced by the drawn value."""
    prompt: str = Field(min_length=1)
    """Prompt to the writer; {SLOT} is replaced by the drawn value."""
    sampling: Sampling = Field(default_factory=Sampling)
    filters: Filters = Field(default_factory=Filters)
    row: dict[str, str] = Field(default_factory=lambda: {"prompt": "{prompt}", "response": "{response}"}, min_length=1)
    """Templates of a row's columns, with the fields {prompt}, {response}, {SLOT}, {SLOT_following} and those of
    `filters.json_keys`."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
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
                yield f"'{column}' is a column of every row; choose another name"
            yield from _unknown(column, template, known)


def _unknown(name: str, template: str, known: Collection[str]) -> Iterator[str]:
    for field in dict.fromkeys(FIELD.findall(template)):
        if field not in known:
            hint = did_you_mean(field, known) or f" (there are: {', '.join(known) or 'none'})"
            yield f"'{name}' has the unknown field {{{field}}}{hint}"


def _wrong_filters(filters: Filters, slots: Collection[str]) -> Iterator[str]:
    for key, slot in filters.quoted.items():
        if key not in filters.json_keys:
            yield f"filters.quoted: '{key}' is not among filters.json_keys"
        if slot not in slots:
            hint = did_you_mean(slot, slots) or f" (there are: {', '.join(slots) or 'none'})"
            yield f"filters.quoted: no slot '{slot}'{hint}"
