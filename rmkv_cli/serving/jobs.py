"""What the engine is asked to do, and what it answers."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from rmkv_cli.generation import Prompt, SamplingConfig
from rmkv_cli.serving.choice import Choice, Said
from rmkv_cli.tokenizer import Piece, Special


@dataclass(frozen=True)
class Done:
    """A job is done, having read and written so many tokens."""

    read: int
    written: int


Event = Said | Done | Exception
"""What a job tells: its pieces, then either that it is done or why it is not."""


@dataclass(frozen=True)
class Writing:
    """What is written after a prompt: a text for each config."""

    configs: Sequence[SamplingConfig]
    max_tokens: int
    stop: Sequence[str]
    ends: Collection[Special]
    scores: int | None
    """How many of the likeliest tokens are told with each; None: no score."""
    remembered: Callable[[str], Sequence[Piece]]
    """The pieces that a text is, once it is read like a prompt."""


@dataclass(eq=False, repr=False)  # a prompt is shown in no message
class Job:
    """A prompt to read, after an earlier reading or as a document's beginning, and what to write after it, if anything.

    `send` is called from the engine's thread with each event. `keep`, too: once, at the end, with all that was read and
    written, or with None if the job came to nothing.
    """

    pieces: Sequence[Piece]
    send: Callable[[Event], None]
    seconds: float
    """Time until it is given up."""
    after: Prompt | None = None
    writing: Writing | None = None
    keep: Callable[[Prompt | None], None] | None = None
    first: int = 0
    """The number of the first text."""
    cancelled: bool = False
    """Set by whoever no longer wants it, at any time, from any thread."""
    begun: float = field(default_factory=time.monotonic)
    prompt: Prompt | None = None
    """What was read, once it was."""
    texts: list[Choice] = field(default_factory=list)

    @property
    def lanes(self) -> int:
        """How many it takes; one also where it only reads."""
        return len(self.writing.configs) if self.writing else 1

    @property
    def written(self) -> bool:
        """Whether all its texts have ended; it may still have them read, to be kept."""
        return bool(self.texts) and all(text.stop_reason for text in self.texts)
