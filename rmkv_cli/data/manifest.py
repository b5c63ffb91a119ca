"""The manifest of a prepared mix: the origin, number and ratio of its documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rmkv_cli.config import MixConfig, Section, TextSource, parse
from rmkv_cli.errors import UserError
from rmkv_cli.files import read_json, write_text

FILE = "manifest.json"


class Count(Section):
    """Numbers of documents, tokens and bytes."""

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    """Bytes of untrusted text in UTF-8; 0 for noise and tasks."""


class SourceReport(Count):
    """A source's contribution to the training split."""

    name: str
    weight: float
    wanted: float
    """Share of the tokens that the weight asks for."""
    achieved: float
    """Actual share of the tokens."""
    epochs: int
    """Number of epochs begun; more than 1 if the mix is longer than the source."""
    skipped: int
    """Number of records that could not be read."""
    first_error: str | None
    """Message of the first record that could not be read."""
    left_out: int = 0
    """Number of records that the source's config excludes."""
    duplicates: int = 0
    """Number of documents left out as duplicates."""
    supervised_tokens: int | None = None
    """Number of its tokens that count in the loss; None in formats 1 and 2, which did not count them."""
    held_out_documents: int | None = None
    """Number of the source's documents in the validation split; None in format 1, which did not count them."""
    held_out_tokens: int | None = None
    """Number of tokens in those documents."""


class SplitReport(Count):
    """Contents of a split."""

    shards: list[str]
    """Names of the split's shards, in order."""
    sha256: list[str] = Field([])
    """SHA-256 of each shard, in hexadecimal; empty in mixes of earlier versions."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield the rules across fields that are broken."""
        match fields:
            case {"shards": shards} if any(Path(name).name != name for name in shards):
                yield "shards should be names of files beside the manifest"
        match fields:
            case {"shards": shards, "sha256": hashes} if hashes and len(hashes) != len(shards):
                yield f"has {len(hashes)} hashes for {len(shards)} shards"

    def hashes(self) -> dict[str, str]:
        """Return a dict from shard names to SHA-256, for the shards that have one."""
        return dict(zip(self.shards, self.sha256, strict=False))


class Manifest(Section):
    """Description of a prepared mix."""

    format: Literal[1, 2, 3] = 3
    """Version of the format. Since 2, long documents are held out in part (see `assign`) and may span several rows.
    Since 3, documents of text may have answers, and the end of a document may be one of their tokens (see `schema`)."""
    seed: int
    tokenizer_hash: str
    vocab_size: int = Field(ge=1, le=1 << 24)
    eod: int = Field(ge=0)
    sources: list[SourceReport]
    splits: dict[str, SplitReport]
    """Splits by name: train and validation."""
    ended_by: str | None = None
    """Name of the exhausted source that ended a mix without `tokens`; other sources may have documents left."""
    mix: MixConfig

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield the rules across fields that are broken."""
        if fields.get("eod", 0) >= fields.get("vocab_size", 1 << 24):
            yield "eod should be one of the vocabulary's ids"
        if "splits" in fields and fields["splits"].keys() != {"train", "validation"}:
            yield "splits should be train and validation"

    def sources_without_held_out(self) -> list[str]:
        """Return the names of the text sources that should have held-out documents but have none."""
        texts = {source.name for source in self.mix.sources if isinstance(source, TextSource)}
        without = [s.name for s in self.sources if (s.weight or s.documents) and not s.held_out_documents]
        return [name for name in without if name in texts] if self.mix.validation else []

    def save(self, folder: Path) -> None:
        """Write manifest.json into a folder."""
        write_text(folder / FILE, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read a folder's manifest.json; raise `UserError` if the folder is not a mix or the file is damaged."""
        file = folder / FILE
        if not file.is_file():
            how = (
                f"`rmkv data mix {folder} --out NEW` makes one from its texts"
                if folder.is_dir()
                else "`rmkv data mix` makes one"
            )
            raise UserError(f"{folder}: is not a mix (it has no {FILE}); {how}")
        return parse(cls, read_json(file), str(file))
