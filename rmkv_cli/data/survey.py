"""A look at a mix, prepared or not: its ratios, the lengths of its documents, and samples of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmkv_cli.config import FileSource, MixConfig
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.data.records import BadRecord
from rmkv_cli.data.sources import Skipped, read_source, refuse
from rmkv_cli.tokenizer import Tokenizer

SAMPLE_CHARACTERS = 240


@dataclass(frozen=True)
class SourceSurvey:
    """What is known of a source; counts and lengths are of the training split where the mix is prepared."""

    name: str
    wanted: float
    """Share of the tokens that its weight asks for."""
    achieved: float | None
    """Share of the tokens that it has; None before the mix is prepared, as also `tokens`."""
    documents: int
    tokens: int | None
    bytes: int
    shortest: int
    """Length of a document; in tokens, or in bytes before the mix is prepared."""
    median: float
    longest: int
    skipped: int
    first_error: str | None
    samples: list[str]
    """The beginnings of some documents, special tokens spelt out; with a task's also the end, which asks."""


def survey_folder(folder: Path, samples: int) -> list[SourceSurvey]:
    """Return what a prepared mix's training split holds, with `samples` samples a source.

    Raises:
        UserError: the folder is not a mix, or is damaged.
    """
    manifest = Manifest.load(folder)
    documents = Documents.open(folder, "train")
    tokenizer = Tokenizer.load(folder)
    found = []
    for index, source in enumerate(manifest.sources):
        its = np.flatnonzero(documents.sources == index)
        found.append(
            SourceSurvey(
                name=source.name,
                wanted=source.wanted,
                achieved=source.achieved,
                documents=source.documents,
                tokens=source.tokens,
                bytes=source.bytes,
                **_lengths(documents.lengths[its]),
                skipped=source.skipped,
                first_error=source.first_error,
                samples=[_shown(documents, int(i), tokenizer) for i in its[:samples]],
            )
        )
    return found


def survey_mix(mix: MixConfig, base: Path, samples: int) -> list[SourceSurvey]:
    """Read the sources of a mix through and return what they hold; noise and tasks, without end, hold nothing here.

    Raises:
        UserError: a source has no files, or a record is bad and `on_error` is "stop".
    """
    weights = sum(source.weight for source in mix.sources)
    found = []
    for source in mix.sources:
        sizes: list[int] = []
        shown: list[str] = []
        skipped = Skipped()
        for item in read_source(source, base) if isinstance(source, FileSource) else ():
            if isinstance(item, BadRecord):
                refuse(item, source.name, mix.on_error, skipped)
                continue
            sizes.append(item.size)
            if len(shown) < samples:
                shown.append(_beginning("".join(item.pieces)))
        found.append(
            SourceSurvey(
                name=source.name,
                wanted=source.weight / weights,
                achieved=None,
                documents=len(sizes),
                tokens=None,
                bytes=sum(sizes),
                **_lengths(sizes),
                skipped=skipped.records,
                first_error=skipped.first,
                samples=shown,
            )
        )
    return found


def _shown(documents: Documents, index: int, tokenizer: Tokenizer) -> str:
    text = tokenizer.decode(documents[index].tolist())
    if documents.counted(index) is None or len(text) <= SAMPLE_CHARACTERS:
        return _beginning(text)
    return f"{text[: SAMPLE_CHARACTERS // 2]} … {text[-SAMPLE_CHARACTERS // 2 :]}"


def _beginning(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + "…"


def _lengths(lengths: Any) -> dict[str, Any]:
    if not len(lengths):
        return {"shortest": 0, "median": 0.0, "longest": 0}
    return {"shortest": int(min(lengths)), "median": float(np.median(lengths)), "longest": int(max(lengths))}
