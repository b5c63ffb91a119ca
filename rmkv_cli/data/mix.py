"""Mix sources by tokens into a folder of tokenized documents."""

import os
from pathlib import Path

from rmkv_cli.config import HubSource, MixConfig, NoiseSource, Source, TaskSource
from rmkv_cli.data.encoding import parallel_encoder
from rmkv_cli.data.feed import Splits
from rmkv_cli.data.manifest import Manifest, SourceReport
from rmkv_cli.data.mixer import NOTHING_SUPERVISED, Mixer, Reader, nothing_supervised
from rmkv_cli.data.shards import ShardWriter
from rmkv_cli.data.tasks import require_vocabulary
from rmkv_cli.errors import UserError
from rmkv_cli.files import atomic_directory, require_new
from rmkv_cli.progress import progress, stderr
from rmkv_cli.tokenizer import Tokenizer


def prepare(mix: MixConfig, base: Path, tokenizer: Tokenizer, out: Path, workers: int) -> Manifest:
    """Tokenize and mix the sources into the folder `out`, created atomically, and return its manifest.

    The documents are in the mix's order (see `Mixer`); held-out documents form a separate split. Mixing stops when any
    source is exhausted or, with `mix.tokens`, when the training split has that many tokens. The result does not depend
    on `workers`.

    Raises:
        UserError: `out` exists; a source has no files or no documents; a record is bad and `on_error` is "stop"; or no
            training token is supervised.
        OSError: the disk is full; no partial result is left.
    """
    require_new(out)
    require_room(mix, tokenizer)
    try:
        with atomic_directory(out) as folder:
            manifest = _write(pinned(mix), base, tokenizer, folder, workers)
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(out)) from None  # Arrow's error names no file
    return manifest


def hold_out(mix: MixConfig, base: Path, tokenizer: Tokenizer, tokens: int, out: Path, workers: int) -> Manifest:
    """Write at most about `tokens` tokens of a mix's held-out documents to the folder `out`; return its manifest.

    The sources are mixed by the same weights, and each document occurs once. Errors as in `prepare`.
    """
    with atomic_directory(out) as folder:
        return _write(mix.model_copy(update={"tokens": tokens}), base, tokenizer, folder, workers, "validation")


def warn_of_sources_without_supervision(manifest: Manifest) -> None:
    """Warn of each source whose training documents have no supervised token."""
    for source in manifest.sources:
        if source.documents and source.supervised_tokens == 0:
            stderr().print(nothing_supervised(source.name), style="yellow")


def warn_of_sources_without_held_out(manifest: Manifest) -> None:
    """Warn of each source without any held-out text."""
    for name in manifest.sources_without_held_out():
        stderr().print(
            f"warning: source '{name}': none of its text is held out, so validation does not measure it; raise "
            f"`validation` in the mix, or add text to the source",
            style="yellow",
        )


def pinned(mix: MixConfig) -> MixConfig:
    """Return the mix with its hub sources pinned to their current commits; errors as in `resolve_revision`."""

    def pin(source: Source) -> Source:
        if not isinstance(source, HubSource):
            return source
        from rmkv_cli.data.hub import resolve_revision

        return source.model_copy(update={"revision": resolve_revision(source)})

    return mix.model_copy(update={"sources": [pin(source) for source in mix.sources]})


def require_room(mix: MixConfig, tokenizer: Tokenizer) -> None:
    """Raise `UserError` if the tokenizer has too few ids for the mix's noise or tasks."""
    room = len(tokenizer.text_ids) + 1
    for source in mix.sources:
        if isinstance(source, NoiseSource) and source.vocab > room:
            raise UserError(
                f"source '{source.name}': vocab = {source.vocab} does not fit the tokenizer of {tokenizer.vocab_size} "
                f"ids; at most {room}, as only the end-of-document token counts of the special ones"
            )
        if isinstance(source, TaskSource):
            require_vocabulary(source, tokenizer.text_ids, tokenizer.vocab_size)


def _write(
    mix: MixConfig, base: Path, tokenizer: Tokenizer, folder: Path, workers: int, splits: Splits = "both"
) -> Manifest:
    with (
        parallel_encoder(tokenizer, workers) as submit,
        progress("Mixing" if splits == "both" else "Holding out", mix.tokens, "tokens") as advance,
        ShardWriter(folder, "train", tokenizer.vocab_size) as train,
        ShardWriter(folder, "validation", tokenizer.vocab_size) as validation,
    ):
        mixer = Mixer(mix, base, tokenizer, submit, 2 * workers, splits)
        for index, document in mixer:
            writer = validation if document.held_out else train
            writer.add(index, document.tokens, document.size, document.answers, document.continues)
            advance(len(document.tokens))
    tokens = sum(reader.tokens for reader in mixer.readers)
    if splits == "both" and tokens and not any(reader.supervised for reader in mixer.readers):
        raise UserError(NOTHING_SUPERVISED)
    manifest = Manifest(
        seed=mix.seed,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        sources=[_report(r, w, tokens) for r, w in zip(mixer.readers, mixer.balance.wanted, strict=True)],
        splits={"train": train.report(), "validation": validation.report()},
        ended_by=mixer.ended_by,
        mix=mix,
    )
    manifest.save(folder)
    tokenizer.save(folder)
    return manifest


def _report(reader: Reader, wanted: float, tokens: int) -> SourceReport:
    return SourceReport(
        name=reader.source.name,
        weight=reader.source.weight,
        wanted=wanted,
        achieved=reader.tokens / max(1, tokens),
        documents=reader.documents,
        tokens=reader.tokens,
        bytes=reader.bytes,
        supervised_tokens=reader.supervised,
        epochs=reader.epochs,
        skipped=reader.skipped.records,
        first_error=reader.skipped.first,
        left_out=reader.left_out,
        duplicates=reader.duplicates,
        held_out_documents=reader.held_out_documents,
        held_out_tokens=reader.held_out_tokens,
    )
