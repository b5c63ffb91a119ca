"""What a server takes on at most."""

from pydantic import Field

from rmkv_cli.config import Section


class Limits(Section):
    """Beyond these, requests are refused with a line that says so; none is answered worse."""

    lanes: int = Field(8, ge=1)
    """Texts that are written at once."""
    queue: int = Field(64, ge=0)
    """Texts that wait for a lane."""
    max_tokens: int = Field(4096, ge=1)
    """Tokens that a text may have."""
    max_seconds: float = Field(600, gt=0)
    """Time a request may take, waiting included."""
    max_body: int = Field(16_000_000, ge=1)
    """Bytes of a request."""
    max_memories: int = Field(100, ge=0)
    """Named memories."""
    max_memory_bytes: int = Field(1_000_000_000, ge=0)
    """Bytes of all of them together, each counted at its largest."""
