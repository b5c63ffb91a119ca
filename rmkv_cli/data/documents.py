"""Random access to tokenized documents, from a prepared mix or directly from files."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rmkv_cli.config import FileSource, load_mix
from rmkv_cli.data.encoding import encode, grouped
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.data.mapped import Verify, map_shard
from rmkv_cli.data.shards import BatchBuilder, Spans, counted
from rmkv_cli.data.sources import Document, good_documents, is_long_text, mix_documents, text_documents
from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Tokenizer


class Documents:
    """A sequence of documents: `documents[i]` is an array (length,) of ids; the target after its last id is `eod`.

    Documents of a prepared mix are memory-mapped and read on demand. The first use of a shard compares its content with
    the hash in the manifest.
    """

    def __init__(
        self,
        batches: Sequence[pa.RecordBatch],
        source_names: Sequence[str],
        eod: int,
        vocab_size: int,
        tokenizer_hash: str,
        verify: Sequence[Verify] = (),
    ) -> None:
        """Wrap the documents of record batches; `verify` has one function per batch, called before its first use."""
        self.source_names = list(source_names)
        self.eod = eod
        self.vocab_size = vocab_size
        self.tokenizer_hash = tokenizer_hash
        self._verify = verify
        self.complete = True
        """Whether no document was cut short."""
        lists = [batch.column("tokens") for batch in batches]
        self._values = [tokens.values.to_numpy() for tokens in lists]
        self._offsets = [tokens.offsets.to_numpy() for tokens in lists]
        self._answers = [_answers(batch) for batch in batches]
        self._first = np.cumsum([0, *map(len, lists)])
        rows = _join([np.diff(o) for o in self._offsets])
        continues = _join([_continues(batch) for batch in batches]).astype(np.bool_)
        continues[:1] = False  # the first row of a lone shard may continue a document of the previous shard
        self._rows = np.append(np.flatnonzero(~continues), len(rows))
        self._before = np.append(0, np.cumsum(rows))  # tokens before each row

        def totals(of_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return np.diff(np.append(0, np.cumsum(of_rows))[self._rows])

        self.lengths: npt.NDArray[np.int64] = totals(rows)
        """Number of tokens of each document (documents,)."""
        self.sizes: npt.NDArray[np.int64] = totals(_join([batch.column("size").to_numpy() for batch in batches]))
        """Number of bytes of each document's untrusted text (documents,)."""
        sources = _join([batch.column("source").to_numpy() for batch in batches])
        self.sources: npt.NDArray[np.int64] = sources[self._rows[:-1]]
        """Index of each document's source in `source_names` (documents,)."""
        counts = np.where(
            _join([has for *_, has in self._answers]), _join([_sums(*spans) for spans in self._answers]), rows
        )
        self.counts: npt.NDArray[np.int64] = totals(counts)
        """Number of each document's targets that count in the loss (documents,): all, or those of its answers."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return self.part(index)

    def part(self, index: int, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Return the ids of a document from `start` to `stop`, (stop - start,), without reading the rest of it.

        Raises:
            IndexError: there is no such document.
            UserError: the document is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        length, before = int(self.lengths[index]), int(self._before[self._rows[index]])
        begin, end = before + min(start, length), before + (length if stop is None else min(stop, length))
        last = int(self._rows[index + 1]) - 1
        first = min(int(self._before.searchsorted(begin, "right")) - 1, last)
        rows = range(first, max(first + 1, int(self._before.searchsorted(end))))
        parts = [self._row(i)[max(begin - self._before[i], 0) : max(end - self._before[i], 0)] for i in rows]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if tokens.max(initial=0) >= self.vocab_size:  # such an id has no embedding
            raise UserError(
                f"document {index} of the data is damaged (it contains token {tokens.max()}); make the mix again"
            )
        return tokens

    def _row(self, row: int) -> npt.NDArray[Any]:
        batch, within = self._locate(row)
        if self._verify:
            self._verify[batch]()
        offsets = self._offsets[batch]
        return self._values[batch][offsets[within] : offsets[within + 1]]

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return (self[i] for i in range(len(self)))

    def _locate(self, row: int) -> tuple[int, int]:
        """Return a row's batch and its index within that batch."""
        batch = int(self._first.searchsorted(row, "right")) - 1
        return batch, row - int(self._first[batch])

    def counted(self, index: int) -> npt.NDArray[np.bool_] | None:
        """Return which targets of a document count in the loss, (length,), or None if all do (see `counted`)."""
        batch, within = self._locate(int(self._rows[index]))  # a document with answers is always a single row
        spans, offsets, has = self._answers[batch]
        answers = spans[offsets[within] : offsets[within + 1]].reshape(-1, 2) if has[within] else None
        return counted(int(self.lengths[index]), answers)

    @classmethod
    def open(cls, folder: Path, split: str) -> "Documents":
        """Return a split ("train" or "validation") of a mix's folder.

        Raises:
            UserError: the folder is not a mix, a shard is damaged, or the split is empty.
        """
        manifest = Manifest.load(folder)
        report = manifest.splits[split]
        documents = cls.of_shards(folder, manifest, report.shards)
        found = len(documents), documents.lengths.sum(), documents.sizes.sum()
        if found != (report.documents, report.tokens, report.bytes):
            raise UserError(f"{folder}: its {split} shards do not match its manifest; make the mix again")
        if not len(documents):
            raise UserError(
                f"{folder}: its {split} split is empty: with validation = {manifest.mix.validation} the mix held out "
                f"{manifest.splits['validation'].documents} documents; raise it and mix again, or use the other split"
            )
        return documents

    @classmethod
    def of_shards(cls, folder: Path, manifest: Manifest, shards: Sequence[str]) -> "Documents":
        """Return the documents of some of a folder's shards; raise `UserError` if one is damaged."""
        hashes = {name: x for split in manifest.splits.values() for name, x in split.hashes().items()}
        names = [source.name for source in manifest.sources]
        batches: list[pa.RecordBatch] = []
        verify: list[Verify] = []
        for shard in shards:
            found, check = map_shard(folder / shard, manifest.vocab_size, len(names), hashes.get(shard))
            batches += found
            verify += [check] * len(found)
        return cls(batches, names, manifest.eod, manifest.vocab_size, manifest.tokenizer_hash, verify)

    @classmethod
    def from_files(cls, paths: Sequence[Path], tokenizer: Tokenizer, max_tokens: int | None = None) -> "Documents":
        """Read and tokenize files into memory: jsonl, parquet, csv, any text, also .gz, or the sources of a mix.toml.

        With `max_tokens`, a long text file is cut after `max_tokens` + 1 tokens; the last one is only a target.

        Raises:
            UserError: a path is missing, a record is bad, or there is no document at all.
        """
        sources, texts = [], set()
        for path in paths:
            if path.suffix == ".toml":
                sources += [
                    (s.name, documents) for s, documents in mix_documents(load_mix(path), path.parent, tokenizer)
                ]
            elif max_tokens is not None and is_long_text(path):
                texts.add(len(sources))
                sources.append((str(path), text_documents(path, tokenizer)))
            else:
                source = FileSource(kind="files", name=str(path), weight=1, files=[str(path.absolute())])
                sources.append((source.name, good_documents(source, path.parent, "stop", tokenizer=tokenizer)))
        builder = BatchBuilder(tokenizer.vocab_size)
        batches = []
        complete = True
        for index, (_, documents) in enumerate(sources):
            length, limit = 0, sys.maxsize if max_tokens is None or index not in texts else max_tokens + 1
            for document, tokens, answers in _tokenized(documents, tokenizer):
                length = 0 if document.first else length
                complete &= length + len(tokens) <= limit
                if length < limit:
                    builder.add(index, tokens[: limit - length], document.size, answers, continues=not document.first)
                length += len(tokens)
                if builder.full:
                    batches.append(builder.build())
                if length > limit:
                    break
        batches.append(builder.build())
        built = cls(batches, [name for name, _ in sources], tokenizer.eod, tokenizer.vocab_size, tokenizer.hash)
        built.complete = complete
        if not len(built):
            raise UserError(f"no document in {', '.join(map(str, paths))}")
        return built


def _tokenized(
    documents: Iterator[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, npt.NDArray[Any], Spans | None]]:
    """Yield each document or part with its tokens and answers; only the first part has the document's beginning."""
    for group in grouped(documents, lambda document: document.size):
        encoded = encode(tokenizer, [(document.placed, document.learned) for document in group])
        for document, (ids, answers) in zip(group, encoded, strict=True):
            yield document, np.array(ids), answers


def _answers(batch: pa.RecordBatch) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return a batch's spans of answers, as three arrays.

    The first has the starts and stops of all spans, the second each document's offset in it (documents + 1,), the third
    whether a document has answers (documents,).
    """
    missing = "answers" not in batch.schema.names  # in shards of the first version
    column = pa.nulls(len(batch), pa.list_(pa.int32())) if missing else batch.column("answers")
    return column.values.to_numpy(), column.offsets.to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)


def _continues(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Return which rows continue the document of the previous row (rows,)."""
    if "continues" not in batch.schema.names:  # in shards of format 1
        return np.zeros(len(batch), np.bool_)
    return batch.column("continues").to_numpy(zero_copy_only=False)


def _sums(spans: npt.NDArray[Any], offsets: npt.NDArray[Any], _: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the number of tokens in each document's spans (documents,)."""
    before = np.append(0, np.cumsum(spans[1::2] - spans[::2], dtype=np.int64))
    return np.diff(before[offsets // 2])


def _join(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *arrays]).astype(np.int64)
