"""Which sources are mixed, and in what ratio."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rmkv_cli.config.section import Section


class FileSource(Section):
    """Documents from local files: rows of jsonl, parquet and csv; any other text is one document a file; also .gz."""

    kind: Literal["files"]
    name: str = Field(min_length=1)
    weight: float = Field(gt=0)
    """Its share of the mix's tokens is weight / (sum of all weights)."""
    files: list[str] = Field(min_length=1)
    """Paths and globs (`**` crosses folders), relative to the mix's file."""
    format: Literal["text", "prompt_response"] = "text"
    """text: one column. prompt_response: a question and its answer, which may begin with <think>...</think>."""
    text_column: str = "text"
    prompt_column: str = "prompt"
    response_column: str = "response"


class NoiseSource(Section):
    """Endless independent, uniformly random tokens: no causal model gets below ln(vocab) nats on them."""

    kind: Literal["noise"]
    name: str = Field(min_length=1)
    weight: float = Field(gt=0)
    vocab: int = Field(ge=2)
    """Distinct tokens, the end-of-document token among them: documents are `vocab` tokens long on average."""


Source = Annotated[FileSource | NoiseSource, Field(discriminator="kind")]


class MixConfig(Section):
    """Sources and the ratio of their tokens."""

    seed: int = Field(0, ge=0)
    tokens: int | None = Field(None, ge=1)
    """Length of the mix; sources that run dry are repeated. Without it the mix ends when the first one runs dry."""
    validation: float = Field(0.01, ge=0, lt=1)
    """Share of the documents that is held out, chosen by a hash of their text."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a record that cannot be read does: end the mix, or be left out and counted."""
    sources: list[Source] = Field(min_length=1)

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        names = [source.name for source in fields.get("sources", ())]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            yield f"sources share a name: {', '.join(twice)}; each needs its own"
        match fields:
            case {"tokens": None, "sources": sources} if any(source.kind == "noise" for source in sources):
                yield "a source of kind 'noise' never runs dry, so the mix needs `tokens`"
