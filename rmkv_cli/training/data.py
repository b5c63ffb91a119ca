"""Open and check a run's data before anything else happens."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rmkv_cli.config import Config, FileSource, MixConfig, Phase, dump_toml, load_mix, mix_path
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.lanes import Prepared, Queue
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.data.mix import hold_out, pinned, require_room, warn_of_sources_without_held_out
from rmkv_cli.data.sources import open_source
from rmkv_cli.data.stream import Stream
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.measure import scored_tokens
from rmkv_cli.files import sha256, write_text
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.begin import require_tokenizer_of_source
from rmkv_cli.training.files import current_mix
from rmkv_cli.training.length import with_length

MIX = "mix.toml"
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Data:
    """The data of a run."""

    queue: Queue | None
    """Queue of the training documents; None with roll-outs, in which the model generates its own rows."""
    phases: list[Phase]
    """Phases of the mix."""
    held_out: Documents | None
    """Held-out documents for validation, if any."""
    tokenizer: Tokenizer
    hash: str
    """Hash that identifies the data: that of the mix's manifest, or of the mix itself if streamed."""


def with_absolute_paths(config: Config, begun: bool = False) -> Config:
    """Return the config with absolute paths of the data, and with epochs converted to tokens (see `with_length`).

    Raises:
        UserError: as in `with_length`, or the config names no data or a mix that does not exist. A run that has `begun`
            has its own copy of the mix.
    """
    train = config.train
    if train.data is not None:
        absolute = {"data": str(Path(train.data).resolve())}
    elif train.rollouts.tasks:
        if train.from_model is None:
            raise UserError("train.rollouts: only a trained model can answer exercises; give one with --from MODEL")
        absolute = {}
    elif train.mix is not None:
        needed = not begun or not Path(train.mix).is_absolute()
        mix = mix_path(train.mix).resolve() if needed else Path(train.mix)
        tokenizer = Path(train.tokenizer).resolve()
        absolute = {"mix": str(mix), "tokenizer": str(tokenizer)}
    else:
        raise UserError("no data: give --data DIR with data from `rmkv data mix`, or --set train.mix=MIX.toml")
    return with_length(config.model_copy(update={"train": train.model_copy(update=absolute)}))


@contextmanager
def open_data(config: Config, run: Path) -> Iterator[Data]:
    """Open the data of the run in the folder `run`: a prepared mix or a stream.

    A stream's mix, with resolved files and revisions, and its held-out documents are written into `run`.

    Raises:
        UserError: the data are inconsistent or do not match the model.
    """
    if config.train.data is not None:
        data = _prepared(config, run, Path(config.train.data))
        yield replace(data, queue=None) if config.train.rollouts.tasks else data
        return
    if config.train.rollouts.tasks:
        assert config.train.from_model is not None
        tokenizer = Tokenizer.load(run if (run / "config.toml").exists() else Path(config.train.from_model))
        yield Data(None, [], None, tokenizer, "rollouts")
        return
    begun = (run / "config.toml").exists()
    # A run that has begun keeps its own copy, even if the original changes.
    tokenizer = Tokenizer.load(run if begun else Path(config.train.tokenizer))
    _require_fit(config, run, tokenizer, config.train.tokenizer)
    if config.model.position == "learned":
        raise UserError(
            "model.position = 'learned' ends at model.max_position_embeddings, and a stream's documents may be longer; "
            "use rotary or sinusoidal positions, which have no limit"
        )
    mix = current_mix(load_mix(run / MIX), run, Path(config.train.mix or "")) if begun else _resolve_mix(config)
    require_room(mix, tokenizer)
    _note_phases(mix, config.train.tokens)
    workers = max(1, (os.cpu_count() or 1) // 2)
    if not begun:  # leftovers of a killed start may belong to another mix
        write_text(run / MIX, dump_toml(mix))
        shutil.rmtree(run / HELD_OUT, ignore_errors=True)
        if mix.validation:
            made = hold_out(mix, run, tokenizer, config.train.eval_tokens, run / HELD_OUT, workers)
            warn_of_sources_without_held_out(made)
    manifest = Manifest.load(run / HELD_OUT) if mix.validation else None
    held_out = open_held_out(config, run)
    _check_held_out(config, manifest, held_out)
    stretches = manifest is None or manifest.format > 1  # older runs keep the kind of held-out set that they began with
    digest = hashlib.sha256(f"{tokenizer.hash} {sha256(run / MIX)}".encode()).hexdigest()
    with Stream(mix, run, tokenizer, workers, stretches=stretches) as stream:
        yield Data(stream, mix.phases, held_out, tokenizer, digest)


def open_held_out(config: Config, run: Path) -> Documents | None:
    """Return the documents for validation after `open_data` has run; None if none of their tokens count."""
    folder = run / HELD_OUT if config.train.data is None else Path(config.train.data)
    if not folder.exists() or not Manifest.load(folder).splits["validation"].documents:
        return None
    documents = Documents.open(folder, "validation")
    return documents if documents.counts.any() else None


def _check_held_out(config: Config, manifest: Manifest | None, held_out: Documents | None) -> None:
    """Warn if there are held-out documents without supervised tokens.

    Raises:
        UserError: train.eval_tokens ends before the first supervised token.
    """
    if held_out is not None and not scored_tokens(held_out, config.train.eval_tokens):
        raise UserError(
            f"train.eval_tokens = {config.train.eval_tokens} ends before the first supervised token of the held-out "
            "documents; raise it"
        )
    if manifest and manifest.splits["validation"].documents and held_out is None:
        stderr().print(
            "warning: no token of the held-out documents is supervised, so there is no validation; raise `validation` "
            "in the mix, or add text to it",
            style="yellow",
        )


def _resolve_mix(config: Config) -> MixConfig:
    """Return the mix of train.mix with the length of training, files instead of globs, and commits as revisions."""
    assert config.train.mix is not None
    path = Path(config.train.mix)
    mix = pinned(load_mix(path))
    sources = [
        source.model_copy(update={"files": [file.name for file in open_source(source, path.parent)]})
        if isinstance(source, FileSource)
        else source
        for source in mix.sources
    ]
    return mix.model_copy(update={"sources": sources, "tokens": config.train.tokens})


def _prepared(config: Config, run: Path, folder: Path) -> Data:
    documents = Documents.open(folder, "train")
    manifest = Manifest.load(folder)
    held_out = open_held_out(config, run)
    _check_held_out(config, manifest, held_out)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.hash != documents.tokenizer_hash:
        raise UserError(f"{folder}: its tokenizer.json is not the one that prepared the data")
    _require_fit(config, run, tokenizer, str(folder))
    model = config.model
    longest = max(int(split.lengths.max()) for split in (documents, held_out) if split)
    if model.position == "learned" and longest > model.max_position_embeddings:
        raise UserError(
            f"{folder}: has a document of {longest} tokens, but learned positions end at "
            f"model.max_position_embeddings = {model.max_position_embeddings}; use rotary or sinusoidal positions"
        )
    _note_phases(manifest.mix, config.train.tokens)
    queue = Prepared(documents, config.train.seed)
    return Data(queue, manifest.mix.phases, held_out, tokenizer, sha256(folder / "manifest.json"))


def _note_phases(mix: MixConfig, tokens: int) -> None:
    """Print a note if the mix's phases assume another number of tokens."""
    if mix.phases and mix.tokens != tokens:
        line = f"note: the mix's phases are shares of its {mix.tokens:,} tokens, but train.tokens = {tokens:,}"
        stderr().print(line, style="yellow")


def _require_fit(config: Config, run: Path, tokenizer: Tokenizer, location: str) -> None:
    """Raise `UserError` if the tokenizer differs from the source model's or has more ids than the model.

    Print a note if a new model has far more ids than the tokenizer.
    """
    require_tokenizer_of_source(config, run, tokenizer, location)
    size = config.model.vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(
            f"{location}: its tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size = {size}; "
            f"use --set model.vocab_size={tokenizer.vocab_size}"
        )
    if tokenizer.vocab_size < 0.9 * size and config.train.from_model is None:
        stderr().print(
            f"note: model.vocab_size = {size}, but the tokenizer has {tokenizer.vocab_size} tokens; "
            f"--set model.vocab_size={tokenizer.vocab_size} makes the model smaller",
            style="yellow",
        )
