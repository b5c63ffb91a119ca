"""Write documents to shards, which are Arrow IPC files for memory mapping."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rmkv_cli.data.manifest import SplitReport
from rmkv_cli.files import sha256

BATCH_TOKENS = 1 << 20
BATCH_DOCUMENTS = 1 << 16
SHARD_BYTES = 256 << 20
Spans: TypeAlias = Sequence[tuple[int, int]]
"""Spans of tokens, as (start, stop)."""


def schema(vocab_size: int) -> pa.Schema:
    """Return the columns of a shard.

    `source` is the source's index. `tokens` has the narrowest type that fits the vocabulary. `size` is the number of
    bytes of text. `answers` is start, stop, start, stop, ... of the tokens that count in the loss, or null if all do.
    The end of a document of n tokens counts as its token n, so the last stop may be n + 1. A long document has several
    consecutive rows; `continues` is true in all but the first.
    """
    ids = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    columns = [("source", pa.int16()), ("tokens", pa.list_(ids)), ("size", pa.int64())]
    return pa.schema([*columns, ("answers", pa.list_(pa.int32())), ("continues", pa.bool_())])


def counted(length: int, answers: Iterable[Iterable[int]] | None) -> npt.NDArray[np.bool_] | None:
    """Return which targets of a document count in the loss, (length,), or None if all do.

    The target of a token is the next token; the target of the last token is the end of the document. If a document has
    answers, only their tokens count.
    """
    if answers is None:
        return None
    counts = np.zeros(length, np.bool_)
    for start, stop in answers:
        counts[start - 1 : stop - 1] = True
    return counts


class BatchBuilder:
    """Collects documents for one record batch, whose size bounds the memory for writing."""

    def __init__(self, vocab_size: int) -> None:
        self._schema = schema(vocab_size)
        self._dtype = self._schema.field("tokens").type.value_type.to_pandas_dtype()
        self._sources: list[int] = []
        self._tokens: list[npt.NDArray[Any]] = []
        self._sizes: list[int] = []
        self._answers: list[npt.NDArray[np.int32] | None] = []
        self._continues: list[bool] = []
        self._length = 0

    def add(
        self,
        source: int,
        tokens: npt.NDArray[Any],
        size: int,
        answers: Spans | None = None,
        continues: bool = False,
    ) -> None:
        """Add a document, or with `continues` the next part of the previous one.

        Args:
            source: index of the document's source.
            tokens: ids (length,).
            size: bytes of text.
            answers: spans of the ids that count in the loss; None: all do.
            continues: whether this is the next part of the previous document.
        """
        self._sources.append(source)
        self._tokens.append(tokens.astype(self._dtype))
        self._sizes.append(size)
        self._answers.append(None if answers is None else np.array(answers, np.int32).ravel())
        self._continues.append(continues)
        self._length += len(tokens)

    @property
    def full(self) -> bool:
        """Whether it is time to `build`."""
        return self._length >= BATCH_TOKENS or len(self._sources) >= BATCH_DOCUMENTS

    def build(self) -> pa.RecordBatch:
        """Return the added documents as a record batch, and start a new one."""
        offsets = np.cumsum([0, *map(len, self._tokens)], dtype=np.int32)
        values = np.concatenate([np.empty(0, self._dtype), *self._tokens])
        columns = [
            pa.array(self._sources, pa.int16()),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
            pa.array(self._sizes, pa.int64()),
            pa.array(self._answers, pa.list_(pa.int32())),
            pa.array(self._continues, pa.bool_()),
        ]
        self._sources, self._tokens, self._sizes, self._answers, self._continues = [], [], [], [], []
        self._length = 0
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


class ShardWriter:
    """Context manager that writes one split's documents to SPLIT-00000.arrow, SPLIT-00001.arrow, ... in a folder."""

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        self._folder, self._split, self._schema = folder, split, schema(vocab_size)
        self._batch = BatchBuilder(vocab_size)
        self._file: pa.NativeFile = None
        self._writer: pa.RecordBatchWriter = None
        self._shards: list[str] = []
        self._hashes: list[str] = []
        self._documents = self._tokens = self._bytes = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def add(self, source: int, tokens: npt.NDArray[Any], size: int, answers: Spans | None, continues: bool) -> None:
        """Write a document or its next part; arguments as in `BatchBuilder.add`."""
        self._batch.add(source, tokens, size, answers, continues)
        self._documents += not continues
        self._tokens += len(tokens)
        self._bytes += size
        if self._batch.full:
            self._flush()

    def report(self) -> SplitReport:
        """Return the counts and hashes of the written shards; call this after the context has ended."""
        return SplitReport(
            documents=self._documents,
            tokens=self._tokens,
            bytes=self._bytes,
            shards=self._shards,
            sha256=self._hashes,
        )

    def _flush(self) -> None:
        if self._file is not None and self._file.tell() >= SHARD_BYTES:
            self._close()
        if self._file is None:
            self._shards.append(f"{self._split}-{len(self._shards):05d}.arrow")
            self._file = pa.OSFile(str(self._folder / self._shards[-1]), "wb")
            self._writer = pa.ipc.new_file(self._file, self._schema)
        self._writer.write_batch(self._batch.build())

    def _close(self) -> None:
        if self._file is not None:
            self._writer.close()
            self._file.close()
            self._file = self._writer = None
            self._hashes.append(sha256(self._folder / self._shards[-1]))  # the file is still in the page cache

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None:
            self._flush()
            self._close()
        elif self._file is not None:
            self._file.close()
