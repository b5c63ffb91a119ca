"""Define the engine's jobs and the events that report on them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rmkv_cli.generation import Prompt, SamplingConfig
from rmkv_cli.serving.choice import Choice, Said
from rmkv_cli.tokenizer import Piece


@dataclass(frozen=True)
class Done:
    """The end of a successful job, with the numbers of tokens that it read and generated."""

    read: int
    written: int


Event = Said | Done | Exception
"""An event of a job: pieces of text, then either `Done` or the error that ended the job."""


@dataclass(frozen=True)
class Writing:
    """The texts to generate after a prompt, one for each config."""

    configs: Sequence[SamplingConfig]
    max_tokens: int
    stop: Sequence[str]
    answer: bool
    """Whether the texts are answers in a conversation."""
    scores: int | None
    """Number of likeliest tokens to report with each token; None: no log probabilities."""
    remembered: Callable[[str], Sequence[Piece]]
    """A function that returns a generated text as pieces to read like a prompt."""


@dataclass(eq=False, repr=False)  # no message may show a prompt
class Job:
    """A prompt to read, after an earlier reading or as a document's beginning, and the texts to generate, if any.

    The engine's thread calls `send` with each event. It calls `keep` once, at the end: with all that was read and
    generated, or with None if the job failed.
    """

    model: str
    """Name of the model."""
    pieces: Sequence[Piece]
    send: Callable[[Event], None]
    seconds: float
    """Seconds after which the job fails."""
    after: Prompt | None = None
    writing: Writing | None = None
    keep: Callable[[Prompt | None], None] | None = None
    first: int = 0
    """Number of the first text."""
    cancelled: bool = False
    """Whether the result is no longer wanted; may be set at any time, from any thread."""
    begun: float = field(default_factory=time.monotonic)
    prompt: Prompt | None = None
    """The prompt's reading, once it is complete."""
    texts: list[Choice] = field(default_factory=list)

    @property
    def lanes(self) -> int:
        """Number of lanes that the job takes; a job that only reads counts as one."""
        return len(self.writing.configs) if self.writing else 1

    @property
    def written(self) -> bool:
        """Whether all texts have ended; the engine may still read them in order to keep them."""
        return bool(self.texts) and all(text.stop_reason for text in self.texts)
