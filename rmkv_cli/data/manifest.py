"""What `rmkv data mix` writes beside the documents: where they come from, how many they are, and in which ratio."""

import json
from pathlib import Path
from typing import Literal

from rmkv_cli.config import MixConfig, Section, parse
from rmkv_cli.errors import UserError
from rmkv_cli.files import write_text

FILE = "manifest.json"


class Count(Section):
    """How much there is of something."""

    documents: int
    tokens: int
    bytes: int
    """Of untrusted text in UTF-8; 0 for noise and tasks."""


class SourceReport(Count):
    """What a source gave to the training split."""

    name: str
    weight: float
    wanted: float
    """Share of the tokens that its weight asks for."""
    achieved: float
    """Share of the tokens that it has."""
    epochs: int
    """How often its documents were begun: 1, or more where the mix is longer than it."""
    skipped: int
    """Records that could not be read."""
    first_error: str | None
    """What was wrong with the first of them."""
    left_out: int = 0
    """Records that the source's config does not want."""
    duplicates: int = 0
    """Documents that were left out because they came before."""
    held_out_documents: int | None = None
    """Documents of the source in the validation split; None in format 1, which did not count them."""
    held_out_tokens: int | None = None
    """Tokens of them."""


class SplitReport(Count):
    """What a split holds."""

    shards: list[str]


class Manifest(Section):
    """Everything about a mix but the tokens."""

    format: Literal[1, 2] = 2
    """2: long documents are held out in part (see `assign`), and may be several rows of a shard. 1: neither."""
    seed: int
    tokenizer_hash: str
    vocab_size: int
    eod: int
    sources: list[SourceReport]
    splits: dict[str, SplitReport]
    """By name: train and validation."""
    ended_by: str | None = None
    """The source that ran dry and so ended the mix, where it has no `tokens`; the others may hold more."""
    mix: MixConfig

    def save(self, folder: Path) -> None:
        """Write manifest.json into a folder."""
        write_text(folder / FILE, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read a folder's manifest.json; raise `UserError` if the folder is not a mix or the file is damaged."""
        file = folder / FILE
        if not file.is_file():
            how = (
                f"`rmkv data mix {folder} --out NEW` makes one of its texts"
                if folder.is_dir()
                else "`rmkv data mix` makes one"
            )
            raise UserError(f"{folder}: is not a mix (it has no {FILE}); {how}")
        try:
            return parse(cls, json.loads(file.read_text(encoding="utf-8")), str(file))
        except ValueError as error:
            raise UserError(f"{file}: is damaged ({error}); make the mix again") from None
