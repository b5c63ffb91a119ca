"""Which sources are mixed, and in what ratio."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rmkv_cli.config.section import Section
from rmkv_cli.config.tasks import CopySource, FactsSource, NeedleSource, RecallSource, ReverseSource, TaskSource
from rmkv_cli.errors import did_you_mean


class FileSource(Section):
    """Documents from local files: rows of jsonl, parquet and csv; any other text is one document a file; also .gz."""

    kind: Literal["files"]
    name: str = Field(min_length=1)
    weight: float = Field(ge=0)
    """Its share of the mix's tokens is weight / (sum of all weights). 0: it is only the noise of tasks that name it."""
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


Source = Annotated[
    FileSource | NoiseSource | RecallSource | CopySource | ReverseSource | NeedleSource | FactsSource,
    Field(discriminator="kind"),
]


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
            case {"tokens": None, "sources": sources}:
                endless = next((source.kind for source in sources if not isinstance(source, FileSource)), None)
                if endless:
                    yield f"a source of kind '{endless}' never runs dry, so the mix needs `tokens`"
        yield from _wrong_texts(fields.get("sources", ()))


def _wrong_texts(sources: Iterable[Source]) -> Iterator[str]:
    named = {source.text for source in sources if isinstance(source, TaskSource)}
    for source in sources:
        if not source.weight and source.name not in named:
            yield f"source '{source.name}': weight = 0, and no task takes its noise from it; give it a weight above 0"
    texts = [source.name for source in sources if isinstance(source, FileSource)]
    for source in sources:
        if isinstance(source, TaskSource) and source.text is not None and source.text not in texts:
            hint = did_you_mean(source.text, texts) or f" (there are: {', '.join(texts) or 'none'})"
            yield f"source '{source.name}': text = '{source.text}' is no source of kind 'files' of this mix{hint}"
