"""What a run reads, opened and checked before anything else is done."""

from dataclasses import dataclass
from pathlib import Path

from rmkv_cli.config import Config
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.errors import UserError
from rmkv_cli.files import sha256
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import Tokenizer


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    documents: Documents
    held_out: Documents | None
    """None if there are none."""
    tokenizer: Tokenizer
    hash: str
    """Of the mix's manifest."""


def with_absolute_data(config: Config) -> Config:
    """Return the config with a data folder that is found from everywhere."""
    if config.train.data is None:
        raise UserError("no data: give --data DIR, a folder that `rmkv data mix` made")
    data = str(Path(config.train.data).resolve())
    return config.model_copy(update={"train": config.train.model_copy(update={"data": data})})


def open_data(config: Config) -> Data:
    """Return what the run reads; raise `UserError` if its parts, or it and the model, do not fit together."""
    folder = Path(config.train.data or "")
    documents = Documents.open(folder, "train")
    held_out = Documents.open(folder, "validation") if Manifest.load(folder).splits["validation"].documents else None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.hash != documents.tokenizer_hash:
        raise UserError(f"{folder}: its tokenizer.json is not the one that the data was made with")
    model = config.model
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size = {model.vocab_size}; "
            f"use --set model.vocab_size={tokenizer.vocab_size}"
        )
    if tokenizer.vocab_size < 0.9 * model.vocab_size:
        stderr().print(
            f"note: model.vocab_size = {model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; "
            f"--set model.vocab_size={tokenizer.vocab_size} makes the model smaller",
            style="yellow",
        )
    longest = max(int(split.lengths.max()) for split in (documents, held_out) if split)
    if model.position == "learned" and longest > model.max_position_embeddings:
        raise UserError(
            f"{folder}: has a document of {longest} tokens, but learned positions end at "
            f"model.max_position_embeddings = {model.max_position_embeddings}; rotary and sinusoidal ones know no end"
        )
    return Data(documents, held_out, tokenizer, sha256(folder / "manifest.json"))
