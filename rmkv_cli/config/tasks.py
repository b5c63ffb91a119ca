"""Memory tasks as sources of a mix: information, then noise, then a question about the information."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rmkv_cli.config.section import Section

Count = Annotated[int, Field(ge=1)]


class TaskSource(Section):
    """Keys that all tasks share. Tasks generate endless documents, and only the answers count in the loss.

    Each training document draws one entry of each list, uniformly and independently. Evaluations report every
    combination.
    """

    name: str = Field("task", min_length=1)
    """Unique name of the source, for phases and reports; by default its kind."""
    weight: float = Field(1, gt=0)
    """The source gets weight / (sum of all weights) of the mix's tokens, including its noise."""
    segments: list[Annotated[int, Field(ge=0)]] = Field(list(range(8)), min_length=1)
    """Numbers of segments of noise between the information and the question; for needle and facts, segments in
    total."""
    segment_length: int = Field(64, ge=1)
    """Number of tokens per segment. Use the model's segment_length, so that `segments` counts memory updates."""
    text: str | None = None
    """Name of a source of text in the same mix whose training documents serve as noise. By default noise is random
    tokens, or for needle and facts a few repeated sentences."""


class RecallSource(TaskSource):
    """Key-value pairs, noise, a marker, then keys, each followed by the value to recall.

    Keys, values, noise and the marker have distinct ids, in this order after the special tokens. With `text`, keys,
    values and marker are the vocabulary's last ids, its rarest tokens, although a text may contain them.
    """

    kind: Literal["recall"] = "recall"
    name: str = Field("recall", min_length=1)
    pairs: list[Count] = Field([1], min_length=1)
    """Numbers of key-value pairs."""
    keys: int = Field(64, ge=1)
    """Number of different keys."""
    values: int = Field(64, ge=2)
    """Number of different values; a guess is right with probability 1 / values."""
    noise: int = Field(64, ge=1)
    """Number of different noise tokens."""
    rounds: int = Field(1, ge=1)
    """Number of times that every key gets a new value, in a new order each time. Only the last value counts."""
    queries: int | None = Field(None, ge=1)
    """Maximum number of keys to ask for; by default all."""
    straddle: bool = False
    """Whether to add noise before the pairs so that a segment boundary separates the middle pair's key from its
    value."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
        match fields:
            case {"pairs": pairs, "keys": keys} if max(pairs) > keys:
                yield f"pairs = {max(pairs)} needs at least as many different keys, but keys = {keys}"


class CopyTask(TaskSource):
    """Keys that copy and reverse share. The ids of tokens, noise and marker are as in `RecallSource`."""

    length: list[Count] = Field([32], min_length=1)
    """Numbers of tokens to repeat."""
    alphabet: int = Field(64, ge=2)
    """Number of different tokens to draw from."""
    noise: int = Field(64, ge=1)
    """Number of different noise tokens."""
    repeats: int = Field(1, ge=1)
    """Number of repetitions to give."""


class CopySource(CopyTask):
    """Random tokens, noise, a marker, and the same tokens again (Recurrent Memory Transformer, 2022)."""

    kind: Literal["copy"] = "copy"
    name: str = Field("copy", min_length=1)


class ReverseSource(CopyTask):
    """Random tokens, noise, a marker, and the same tokens from the last to the first."""

    kind: Literal["reverse"] = "reverse"
    name: str = Field("reverse", min_length=1)


class NeedleSource(TaskSource):
    """A sentence that states a key's value, somewhere in a text, and a question for it at the end (RULER, 2024)."""

    kind: Literal["needle"] = "needle"
    name: str = Field("needle", min_length=1)
    depth: list[Annotated[float, Field(ge=0, le=1)]] = Field([0, 0.25, 0.5, 0.75, 1], min_length=1)
    """Positions of the sentence in the noise: 0 is the start, 1 the end."""
    needles: int = Field(1, ge=1, le=1000)
    """Number of sentences with keys and values. The first one asked for is at `depth`, the others anywhere."""
    queries: int = Field(1, ge=1)
    """Number of consecutive questions; more give more supervised tokens per document."""
    value: Literal["number", "uuid", "word"] = "number"
    """Kind of values: seven digits, a UUID, or a word."""


class FactsSource(TaskSource):
    """A story of people, places and things scattered over a text, then a question (bAbI, 2015; BABILong, 2024)."""

    kind: Literal["facts"] = "facts"
    name: str = Field("facts", min_length=1)
    facts: list[Annotated[int, Field(ge=1, le=3)]] = Field([1], min_length=1)
    """Numbers of statements that the answer depends on, as in bAbI's tasks 1 to 3."""
    sentences: int = Field(10, ge=1)
    """Number of statements in a story."""
    queries: int = Field(1, ge=1)
    """Maximum number of consecutive questions at the end; more give more supervised tokens per document."""
    along: bool = False
    """Whether to ask after every statement as well, which gives the most supervised tokens. bAbI asks after every
    second one."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
        match fields:
            case {"facts": facts, "sentences": sentences} if max(facts) > sentences:
                yield f"facts = {max(facts)} is more than the story's sentences = {sentences}"
