"""Show the supervised tokens of prepared documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rmkv_cli.data.documents import Documents
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.tokenizer import Piece, Tokenizer


@dataclass(frozen=True)
class Supervised:
    """The supervision of a document of a prepared mix, or of its beginning."""

    source: str
    """Name of its source."""
    document: int
    """Index in the split, from 0."""
    length: int
    """Number of tokens of the whole document."""
    supervised_tokens: int
    """Number of supervised tokens of the whole document, its end included."""
    ids: list[int]
    supervised: list[bool]
    """Whether each of the ids is supervised; the first, which opens the document, never is."""
    end_supervised: bool | None
    """Whether the document's end is supervised; None if `ids` do not reach it."""

    def runs(self, tokenizer: Tokenizer) -> Iterator[tuple[bool, tuple[Piece, ...]]]:
        """Yield runs of the document's pieces (with its end, if it is whole), and whether each run is supervised."""
        marked = list(zip(self.supervised, self.ids, strict=True))
        if self.end_supervised is not None:
            marked.append((self.end_supervised, tokenizer.eod))
        for supervised, run in groupby(marked, key=lambda pair: pair[0]):
            yield supervised, tokenizer.pieces([token for _, token in run])


def supervised_documents(place: Path, tokens: int) -> list[Supervised]:
    """Return the first `tokens` tokens of the training documents of a prepared mix, or of one of its shards.

    The last document may be cut. Errors as in `survey_folder`.
    """
    folder = place if place.is_dir() else place.parent
    shards = [place.name] if place != folder else None
    manifest = Manifest.load(folder)
    documents = Documents.of_shards(folder, manifest, shards or manifest.splits["train"].shards)
    found = []
    for index in range(len(documents)):
        if tokens <= 0:
            break
        ids = documents.part(index, 0, tokens).tolist()
        counted = documents.counted(index)
        flags = [False, *([True] * int(documents.lengths[index]) if counted is None else counted.tolist())]
        found.append(
            Supervised(
                source=documents.source_names[int(documents.sources[index])],
                document=index,
                length=int(documents.lengths[index]),
                supervised_tokens=int(documents.counts[index]),
                ids=ids,
                supervised=flags[: len(ids)],
                end_supervised=flags[-1] if len(ids) == documents.lengths[index] else None,
            )
        )
        tokens -= len(ids)
    return found
