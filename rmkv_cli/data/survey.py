"""Survey a mix, prepared or not: its ratios, document lengths and sample documents."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmkv_cli.config import MixConfig, TextSource
from rmkv_cli.data.balance import Balance
from rmkv_cli.data.blocks import BadRecord
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.data.mix import prepare
from rmkv_cli.data.sources import Document, Skipped, open_source, read_source, skip_or_raise
from rmkv_cli.tokenizer import Piece, Token, Tokenizer

SAMPLE_CHARACTERS = 240


@dataclass(frozen=True)
class SourceSurvey:
    """Figures and samples of a source; in a prepared mix, they are those of the training split."""

    name: str
    wanted: float
    """Share of the tokens that the weight asks for."""
    achieved: float | None
    """Actual share of the tokens; None before the mix is prepared."""
    documents: int
    tokens: int | None
    """Number of tokens; None before the mix is prepared."""
    bytes: int
    shortest: int
    """Length of the shortest document, like all lengths in tokens, or in bytes before the mix is prepared."""
    median: float
    longest: int
    skipped: int
    first_error: str | None
    held_out_documents: int | None
    """Number of the source's documents in the validation split; None before the mix is prepared."""
    held_out_tokens: int | None
    """Number of tokens in those documents."""
    histogram: dict[int, int]
    """Number of documents by length: each key N, a power of two, counts lengths from N to 2N - 1."""
    samples: list[tuple[Piece, ...]]
    """Beginnings of some documents; a task's document also shows its end, which contains the question."""


def survey_folder(place: Path, samples: int) -> list[SourceSurvey]:
    """Return the survey of a prepared mix's training split, or of one shard, with `samples` samples per source.

    Raises:
        UserError: the folder is not a mix, or is damaged.
    """
    folder = place if place.is_dir() else place.parent
    manifest = Manifest.load(folder)
    whole = place == folder
    documents = Documents.open(folder, "train") if whole else Documents.of_shards(folder, manifest, [place.name])
    held_out = Documents.of_shards(folder, manifest, manifest.splits["validation"].shards)
    tokenizer = Tokenizer.load(folder)
    found = []
    for index, source in enumerate(manifest.sources):
        indices = np.flatnonzero(documents.sources == index)
        tokens = int(documents.lengths[indices].sum())
        lengths = held_out.lengths[held_out.sources == index]
        found.append(
            SourceSurvey(
                name=source.name,
                wanted=source.wanted,
                achieved=tokens / max(1, int(documents.lengths.sum())),
                documents=len(indices),
                tokens=tokens,
                bytes=int(documents.sizes[indices].sum()),
                **_lengths(documents.lengths[indices]),
                skipped=source.skipped,
                first_error=source.first_error,
                held_out_documents=len(lengths),
                held_out_tokens=int(lengths.sum()),
                samples=[_shown(documents, int(i), tokenizer) for i in indices[:samples]],
            )
        )
    return found


def survey_start(mix: MixConfig, base: Path, samples: int, tokenizer: Tokenizer, tokens: int) -> list[SourceSurvey]:
    """Mix the first `tokens` tokens and return their survey, as `survey_folder` does; errors as in `prepare`."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(mix.model_copy(update={"tokens": tokens}), base, tokenizer, Path(folder, "mix"), workers=1)
        return survey_folder(Path(folder, "mix"), samples)


def survey_mix(mix: MixConfig, base: Path, samples: int, documents: int) -> list[SourceSurvey]:
    """Return the survey of at most `documents` documents of each text source; noise and tasks have no documents here.

    Raises:
        UserError: a source has no files, or a record is bad and `on_error` is "stop".
    """
    found = []
    for source, wanted in zip(mix.sources, Balance(mix).shares(0), strict=True):
        sizes: list[int] = []
        shown: list[tuple[Piece, ...]] = []
        skipped = Skipped()
        items = read_source(source, open_source(source, base)) if isinstance(source, TextSource) else ()
        for _, item in items:
            if isinstance(item, BadRecord):
                skip_or_raise(item, source.name, mix.on_error, skipped)
            if not isinstance(item, Document) or not item.first:
                continue
            if len(sizes) == documents:
                break
            sizes.append(item.part.total if item.part else item.size)
            if len(shown) < samples:
                shown.append(_shortened(item.pieces, SAMPLE_CHARACTERS))
        found.append(
            SourceSurvey(
                name=source.name,
                wanted=wanted,
                achieved=None,
                documents=len(sizes),
                tokens=None,
                bytes=sum(sizes),
                **_lengths(sizes),
                skipped=skipped.records,
                first_error=skipped.first,
                held_out_documents=None,
                held_out_tokens=None,
                samples=shown,
            )
        )
    return found


def _shown(documents: Documents, index: int, tokenizer: Tokenizer) -> tuple[Piece, ...]:
    ids = documents.part(index, 0, 5 * SAMPLE_CHARACTERS).tolist()  # a character is at most four tokens
    if documents.counted(index) is None or documents.sizes[index]:  # a text, not a task
        return _shortened(tokenizer.pieces(ids), SAMPLE_CHARACTERS)
    end = "".join(tokenizer.pieces(documents[index][-SAMPLE_CHARACTERS:].tolist()))[-SAMPLE_CHARACTERS // 2 :]
    return *_shortened(tokenizer.pieces(ids), SAMPLE_CHARACTERS // 2), " ", end


def _shortened(pieces: Sequence[Piece], room: int) -> tuple[Piece, ...]:
    """Return the pieces cut to `room` characters, with "…" at the cut."""
    taken: list[Piece] = []
    for piece in pieces:
        if len(piece) > room:
            return *taken, *([] if isinstance(piece, Token) else [piece[:room]]), "…"
        taken.append(piece)
        room -= len(piece)
    return tuple(taken)


def _lengths(lengths: Any) -> dict[str, Any]:
    if not len(lengths):
        return {"shortest": 0, "median": 0.0, "longest": 0, "histogram": {}}
    bins = Counter(2 ** (int(length).bit_length() - 1) if length else 0 for length in lengths)
    figures = {"shortest": int(min(lengths)), "median": float(np.median(lengths)), "longest": int(max(lengths))}
    return figures | {"histogram": dict(sorted(bins.items()))}
