"""Mixes of data: the sources, the ratio of their tokens, and the phases in which the ratio changes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from rmkv_cli.config.section import Section
from rmkv_cli.config.tasks import CopySource, FactsSource, NeedleSource, RecallSource, ReverseSource, TaskSource
from rmkv_cli.errors import did_you_mean

Supervise = Literal["all", "answers"]
"""Tokens that count in the loss: all, or only those of answers."""


class TextSource(Section):
    """Keys that all sources of text share: the columns of a document, filters, and what follows the last document.

    The order of documents is drawn from the mix's seed, anew for each pass over the source.
    """

    name: str = Field(min_length=1)
    """Unique name of the source, for phases, reports and tasks' `text`."""
    weight: float = Field(ge=0, le=1e9)
    """The source gets weight / (sum of all weights) of the mix's tokens. 0: only phases use it, or tasks as noise."""
    format: Literal["text", "prompt_response", "messages"] = "text"
    """Format of a record. text: one column. prompt_response: a question and its answer, which may begin with
    <think>...</think>. messages: a list of {role, content}, or a text with Llama 3 headers; all messages except the
    assistant's become prompts."""
    text_column: str = "text"
    """Column of the text, for the format text."""
    prompt_column: str = "prompt"
    """Column of the question, for the format prompt_response."""
    response_column: str = "response"
    """Column of the answer, for the format prompt_response."""
    messages_column: str = "messages"
    """Column of the messages, for the format messages."""
    answer_column: str | None = None
    """Column of the assistant's last answer, for the format messages if the messages do not include it."""
    supervise: Supervise | None = None
    """Tokens that count in the loss, for the formats prompt_response and messages. all: every token. answers: the
    assistant's tokens and the token that ends each answer. The default is the mix's `supervise`."""
    when_dry: Literal["repeat", "drop", "stop"] | None = None
    """What to do when the source is exhausted: repeat it, drop it from the mix, or stop the mix. The default is to
    repeat it if the mix has `tokens`, else to stop."""
    min_characters: int = Field(0, ge=0)
    """Minimum length of a document; shorter ones are left out."""
    max_characters: int | None = Field(None, ge=1)
    """Maximum length of a document; longer ones are left out."""
    where: dict[str, list[str | int | float | bool]] = Field(default_factory=dict)
    """Allowed values by column; records with other values are left out."""
    at_least: dict[str, float] = Field(default_factory=dict)
    """Minimum number by column; records with smaller numbers are left out."""
    at_most: dict[str, float] = Field(default_factory=dict)
    """Maximum number by column; records with larger numbers are left out."""
    deduplicate: bool = False
    """Whether to leave out documents that repeat an earlier text of this source. This takes about 100 bytes of memory
    per document."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
        match fields:
            case {"format": "text", "supervise": "answers"}:
                yield "supervise = 'answers' needs format = 'prompt_response' or 'messages'; a text has no answers"


class FileSource(TextSource):
    """Documents from local files: one per row of jsonl, parquet, csv and arrow, one per file of any other text. Files
    can be compressed (.gz)."""

    kind: Literal["files"]
    files: list[str] = Field(min_length=1)
    """Paths and globs (`**` crosses folders), relative to the mix's file, or folders that `datasets` saved to disk."""


class HubSource(TextSource):
    """Documents streamed from a data set of the Hugging Face hub, without a copy on disk."""

    kind: Literal["hub"]
    dataset: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """Id of the data set, such as HuggingFaceFW/fineweb."""
    config: str | None = None
    """Configuration of the data set, if it has several."""
    split: str = "train"
    """Split of the data set. To mix several, give each its own source."""
    revision: str = "main"
    """Branch, tag or commit. Its commit is resolved when the mix begins and stays fixed."""


class NoiseSource(Section):
    """Endless independent, uniformly random tokens: no causal model gets below ln(vocab) nats on them."""

    kind: Literal["noise"]
    name: str = Field(min_length=1)
    """Unique name of the source, for phases and reports."""
    weight: float = Field(gt=0, le=1e9)
    """The source gets weight / (sum of all weights) of the mix's tokens."""
    vocab: int = Field(ge=2, le=1 << 24)
    """Number of distinct tokens, including end-of-document. Documents have `vocab` tokens on average."""


Source = Annotated[
    FileSource | HubSource | NoiseSource | RecallSource | CopySource | ReverseSource | NeedleSource | FactsSource,
    Field(discriminator="kind"),
]


class Phase(Section):
    """A stretch of the mix with its own weights and row lengths."""

    share: float = Field(gt=0)
    """Relative length: the phase gets share / (sum of all shares) of the mix's tokens."""
    weights: dict[str, Annotated[float, Field(ge=0, le=1e9)]] = Field(default_factory=dict)
    """Weights by source; other sources keep their own."""
    moves: bool = False
    """Whether weights move linearly to those of the next phase."""
    segments_min: int | None = Field(None, ge=1)
    """Overrides train.segments_min."""
    segments_max: int | None = Field(None, ge=1)
    """Overrides train.segments_max."""


class MixConfig(Section):
    """A mix of sources."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the documents' order, noise, tasks and the choice of held-out documents."""
    tokens: int | None = Field(None, ge=1)
    """Length of the mix in tokens; exhausted sources are repeated. By default the mix stops when any source is
    exhausted."""
    validation: float = Field(0.01, ge=0, lt=1)
    """Share of the text to hold out: the end of each long text, and whole documents chosen by a hash."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a record that cannot be read: stop the mix, or skip and count it."""
    supervise: Supervise = "all"
    """Default of the sources' `supervise`. All tokens of plain text count."""
    phases: list[Phase] = Field(default_factory=list)
    """Consecutive phases of the mix. If empty, the sources' own weights apply throughout."""
    sources: list[Source] = Field(min_length=1)
    """The sources, one `[[sources]]` table each."""

    def supervision(self, source: TextSource) -> Supervise:
        """Return which tokens of a source count in the loss."""
        return "all" if source.format == "text" else source.supervise or self.supervise

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
        if "sources" not in fields:
            return
        sources, phases = fields["sources"], fields.get("phases", ())
        shared = sorted(name for name, count in Counter(source.name for source in sources).items() if count > 1)
        if shared:
            yield f"sources share a name: {', '.join(shared)}; each needs its own"
        if "tokens" in fields and fields["tokens"] is None:
            yield from _never_ends(sources)
            if phases:
                yield "phases are shares of the mix's tokens; set `tokens`"
        yield from _wrong_phases(sources, phases)
        yield from _wrong_texts(sources, phases)


def _never_ends(sources: Iterable[Source]) -> Iterator[str]:
    for source in sources:
        if not isinstance(source, TextSource):
            yield f"a source of kind '{source.kind}' is endless, so the mix needs `tokens`"
        elif source.when_dry == "repeat":
            yield f"source '{source.name}': when_dry = 'repeat' makes it endless, so the mix needs `tokens`"


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
            yield f"phases[{number}].moves: there is no next phase to move to"
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
            yield f"source '{source.name}': text = '{source.text}' is not a source of text in this mix{hint}"
