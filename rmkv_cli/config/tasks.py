"""Tasks that only a memory solves, as sources of a mix: something is told, noise follows, then it is asked for."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rmkv_cli.config.section import Section

Count = Annotated[int, Field(ge=1)]


class TaskSource(Section):
    """What all tasks share. Their documents are endless; of each one only the answers count in the loss.

    A training document draws an entry of each list, uniformly and independently of the others; an evaluation reports
    every combination of them.
    """

    name: str = Field("task", min_length=1)
    """What phases and reports call it; by default its kind."""
    weight: float = Field(1, gt=0)
    """Its share of the mix's tokens, noise among them, is weight / (sum of all weights)."""
    segments: list[Annotated[int, Field(ge=0)]] = Field(list(range(8)), min_length=1)
    """How many segments of noise lie between what is told and what is asked; for needle and facts: in all."""
    segment_length: int = Field(64, ge=1)
    """Tokens of a segment; the model's, so that `segments` are segments to the model."""
    text: str | None = None
    """The name of a source of text in the same mix, whose training documents are the noise. Without it the noise is
    random tokens, and for needle and facts a few sentences over and over."""


class RecallSource(TaskSource):
    """Key-value pairs, noise, a marker, and keys, after each of which its value is to be recalled.

    Keys, values, noise and the marker are ids of their own, in this order from the first one after the special tokens.
    With `text` keys, values and marker are the last ids of the vocabulary, which are its rarest tokens; even so a text
    may hold some of them.
    """

    kind: Literal["recall"] = "recall"
    name: str = Field("recall", min_length=1)
    pairs: list[Count] = Field([1], min_length=1)
    """Keys that are given a value."""
    keys: int = Field(64, ge=1)
    """How many different keys there are."""
    values: int = Field(64, ge=2)
    """How many different values there are: a guess is right once in so many times."""
    noise: int = Field(64, ge=1)
    """How many different tokens of noise there are."""
    rounds: int = Field(1, ge=1)
    """How often every key is given a value, each round in an order of its own; only the last one counts."""
    queries: int | None = Field(None, ge=1)
    """At most so many keys are asked for; all by default."""
    straddle: bool = False
    """Noise before the pairs, so that a segment's end parts the middle pair's key from its value."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        match fields:
            case {"pairs": pairs, "keys": keys} if max(pairs) > keys:
                yield f"pairs = {max(pairs)} need as many different keys, but there are only keys = {keys}"


class CopyTask(TaskSource):
    """What copy and reverse share; the ids of tokens, noise and marker are as in `RecallSource`."""

    length: list[Count] = Field([32], min_length=1)
    """Tokens to copy."""
    alphabet: int = Field(64, ge=2)
    """How many different tokens they are drawn from."""
    noise: int = Field(64, ge=1)
    """How many different tokens of noise there are."""
    repeats: int = Field(1, ge=1)
    """How often they are to be given again."""


class CopySource(CopyTask):
    """Random tokens, noise, a marker, and the same tokens again (Recurrent Memory Transformer, 2022)."""

    kind: Literal["copy"] = "copy"
    name: str = Field("copy", min_length=1)


class ReverseSource(CopyTask):
    """Random tokens, noise, a marker, and the same tokens from the last to the first."""

    kind: Literal["reverse"] = "reverse"
    name: str = Field("reverse", min_length=1)


class NeedleSource(TaskSource):
    """A sentence that gives a key's value, somewhere in a text, and at its end the question for it (RULER, 2024)."""

    kind: Literal["needle"] = "needle"
    name: str = Field("needle", min_length=1)
    depth: list[Annotated[float, Field(ge=0, le=1)]] = Field([0, 0.25, 0.5, 0.75, 1], min_length=1)
    """How far into the noise the sentence stands that is asked for: 0 at its start, 1 at its end."""
    needles: int = Field(1, ge=1, le=1000)
    """Sentences with keys and values; the first one asked for stands at `depth`, the others anywhere."""
    queries: int = Field(1, ge=1)
    """How many of them are asked for, one after the other; more teach more."""
    value: Literal["number", "uuid", "word"] = "number"
    """What a key's value is: seven digits, a UUID, or a word."""


class FactsSource(TaskSource):
    """A story of people, places and things in pieces all over a text, then a question (bAbI, 2015; BABILong, 2024)."""

    kind: Literal["facts"] = "facts"
    name: str = Field("facts", min_length=1)
    facts: list[Annotated[int, Field(ge=1, le=3)]] = Field([1], min_length=1)
    """How many of the story's statements the answer needs, as in bAbI's tasks 1 to 3."""
    sentences: int = Field(10, ge=1)
    """Statements of a story."""
    queries: int = Field(1, ge=1)
    """At most so many questions at the end, one after the other; more teach more."""
    along: bool = False
    """A question after every statement too, which teaches most; bAbI's stories ask after every second one."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        match fields:
            case {"facts": facts, "sentences": sentences} if max(facts) > sentences:
                yield f"facts = {max(facts)} are more than the story's sentences = {sentences}"
