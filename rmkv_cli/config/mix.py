"""Which sources are mixed, in what ratio, and how the ratio changes on the way."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from rmkv_cli.config.section import Section
from rmkv_cli.config.tasks import CopySource, FactsSource, NeedleSource, RecallSource, ReverseSource, TaskSource
from rmkv_cli.errors import did_you_mean

Supervise = Literal["all", "answers"]
"""Which tokens are learned."""


class TextSource(Section):
    """What sources of text share: which columns make a document, which documents are left out, what follows the last.

    Documents come in an order that is drawn from the mix's seed, another one each time that the source is read.
    """

    name: str = Field(min_length=1)
    """What phases, reports and tasks' `text` call it; each source has its own."""
    weight: float = Field(ge=0, le=1e9)
    """Its share of the mix's tokens is weight / (sum of all weights). 0: only phases, or tasks as noise, use it."""
    format: Literal["text", "prompt_response", "messages"] = "text"
    """text: one column. prompt_response: a question and its answer, which may begin with <think>...</think>. messages:
    a list of {role, content}, or a text with Llama-3 headers; all but the assistant's become prompts."""
    text_column: str = "text"
    """Of text."""
    prompt_column: str = "prompt"
    """Of prompt_response: the question."""
    response_column: str = "response"
    """Of prompt_response: the answer."""
    messages_column: str = "messages"
    """Of messages."""
    answer_column: str | None = None
    """Of messages: the column of the assistant's last answer, where it stands beside them."""
    supervise: Supervise | None = None
    """Tokens that are learned, for the formats prompt_response and messages. all: every token. answers: the
    assistant's, and the token that ends each answer. By default the mix's `supervise`."""
    when_dry: Literal["repeat", "drop", "stop"] | None = None
    """After the source's last document: begin again, go on without it, or end the mix. By default it is repeated if the
    mix has `tokens`, and ends the mix if not."""
    min_characters: int = Field(0, ge=0)
    """Documents with less text are left out."""
    max_characters: int | None = Field(None, ge=1)
    """Documents with more text are left out."""
    where: dict[str, list[str | int | float | bool]] = Field(default_factory=dict)
    """For each of these columns the values that a record may have; others are left out."""
    at_least: dict[str, float] = Field(default_factory=dict)
    """For each of these columns the least number that a record may have."""
    at_most: dict[str, float] = Field(default_factory=dict)
    """For each of these columns the greatest number that a record may have."""
    deduplicate: bool = False
    """Documents whose text came before in this source are left out. Costs about 100 bytes of memory a document."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        match fields:
            case {"format": "text", "supervise": "answers"}:
                yield "supervise = 'answers' needs format = 'prompt_response' or 'messages'; a text has no answers"


class FileSource(TextSource):
    """Documents from local files: rows of jsonl, parquet, csv and arrow; any other text is one a file; also .gz."""

    kind: Literal["files"]
    files: list[str] = Field(min_length=1)
    """Paths and globs (`**` crosses folders), relative to the mix's file; folders that `datasets` saved to disk."""


class HubSource(TextSource):
    """Documents from a data set of the Hugging Face hub, streamed: nothing of it is kept on the disk."""

    kind: Literal["hub"]
    dataset: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """Its id, for instance HuggingFaceFW/fineweb."""
    config: str | None = None
    """A configuration of the data set, where it has several."""
    split: str = "train"
    """To mix splits, make a source of each."""
    revision: str = "main"
    """A branch, tag or commit. The commit that it means when the mix begins is kept to its end."""


class NoiseSource(Section):
    """Endless independent, uniformly random tokens: no causal model gets below ln(vocab) nats on them."""

    kind: Literal["noise"]
    name: str = Field(min_length=1)
    """What phases and reports call it."""
    weight: float = Field(gt=0, le=1e9)
    """Its share of the mix's tokens is weight / (sum of all weights)."""
    vocab: int = Field(ge=2, le=1 << 24)
    """Number of distinct tokens, including end-of-document; documents are `vocab` tokens long on average."""


Source = Annotated[
    FileSource | HubSource | NoiseSource | RecallSource | CopySource | ReverseSource | NeedleSource | FactsSource,
    Field(discriminator="kind"),
]


class Phase(Section):
    """A stretch of the mix with weights, and rows, of its own."""

    share: float = Field(gt=0)
    """Its share of the mix's tokens is share / (sum of all shares)."""
    weights: dict[str, Annotated[float, Field(ge=0, le=1e9)]] = Field(default_factory=dict)
    """By source; those that are not named keep their own."""
    moves: bool = False
    """The ratios move linearly to those of the next phase."""
    segments_min: int | None = Field(None, ge=1)
    """Fewest segments a row of training, in place of train.segments_min."""
    segments_max: int | None = Field(None, ge=1)
    """Most segments a row of training, in place of train.segments_max."""


class MixConfig(Section):
    """Sources and the ratio of their tokens."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Of the documents' order, of noise and tasks, and of what is held out."""
    tokens: int | None = Field(None, ge=1)
    """Length of the mix; sources that run dry are repeated. Without it the mix ends when the first one runs dry."""
    validation: float = Field(0.01, ge=0, lt=1)
    """Share of the text to hold out: the last part of each long text, and other whole documents chosen by a hash."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a record that cannot be read does: end the mix, or be left out and counted."""
    supervise: Supervise = "all"
    """Which tokens of prompt_response and messages are learned, where the source does not say; of a text all are."""
    phases: list[Phase] = Field(default_factory=list)
    """Stretches of the mix, one after the other; none: one with the sources' own weights."""
    sources: list[Source] = Field(min_length=1)
    """What is mixed, a table each."""

    def supervision(self, source: TextSource) -> Supervise:
        """Return which tokens of a source are learned."""
        return "all" if source.format == "text" else source.supervise or self.supervise

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        if "sources" not in fields:
            return
        sources, phases = fields["sources"], fields.get("phases", ())
        twice = sorted(name for name, times in Counter(source.name for source in sources).items() if times > 1)
        if twice:
            yield f"sources share a name: {', '.join(twice)}; each needs its own"
        if "tokens" in fields and fields["tokens"] is None:
            yield from _never_ends(sources)
            if phases:
                yield "phases are shares of the mix's tokens: give it `tokens`"
        yield from _wrong_phases(sources, phases)
        yield from _wrong_texts(sources, phases)


def _never_ends(sources: Iterable[Source]) -> Iterator[str]:
    for source in sources:
        if not isinstance(source, TextSource):
            yield f"a source of kind '{source.kind}' never runs dry, so the mix needs `tokens`"
        elif source.when_dry == "repeat":
            yield f"source '{source.name}': with when_dry = 'repeat' it never runs dry, so the mix needs `tokens`"


def _wrong_phases(sources: Iterable[Source], phases: Sequence[Phase]) -> Iterator[str]:
    own = {source.name: source.weight for source in sources}
    for number, phase in enumerate(phases):
        for name in phase.weights:
            if name not in own:
                hint = did_you_mean(name, own) or f" (there are: {', '.join(own)})"
                yield f"phases[{number}].weights: no source '{name}'{hint}"
        if not any((own | phase.weights).values()):
            yield f"phases[{number}]: all its weights are 0"
        if phase.moves and number == len(phases) - 1:
            yield f"phases[{number}].moves: there is no next phase whose ratios they could move to"
        match phase:
            case Phase(segments_min=int(least), segments_max=int(most)) if least > most:
                yield f"phases[{number}]: segments_min = {least} is above segments_max = {most}"


def _wrong_texts(sources: Iterable[Source], phases: Iterable[Phase]) -> Iterator[str]:
    used = {source.text for source in sources if isinstance(source, TaskSource)}
    used |= {name for phase in phases for name, weight in phase.weights.items() if weight}
    for source in sources:
        if not source.weight and source.name not in used:
            yield f"source '{source.name}': weight = 0, and no phase or task uses it; give it a weight above 0"
    texts = [source.name for source in sources if isinstance(source, TextSource)]
    for source in sources:
        if isinstance(source, TaskSource) and source.text is not None and source.text not in texts:
            hint = did_you_mean(source.text, texts) or f" (there are: {', '.join(texts) or 'none'})"
            yield f"source '{source.name}': text = '{source.text}' is no source of text of this mix{hint}"
