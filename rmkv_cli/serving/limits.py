"""Define the limits of a server."""

from pydantic import Field

from rmkv_cli.config import Section


class Limits(Section):
    """Limits beyond which the server refuses requests; it never shortens an answer instead."""

    lanes: int = Field(8, ge=1)
    """Number of texts generated at once."""
    queue: int = Field(64, ge=0)
    """Number of texts that wait for a lane."""
    max_tokens: int = Field(4096, ge=1)
    """Largest number of tokens of a text."""
    max_seconds: float = Field(600, gt=0)
    """Seconds that a request may take, including waiting."""
    max_body: int = Field(16_000_000, ge=1)
    """Largest body of a request, in bytes."""
    max_memories: int = Field(100, ge=0)
    """Number of named memories."""
    max_memory_bytes: int = Field(1_000_000_000, ge=0)
    """Bytes of all named memories together, each counted at its largest size."""
