"""Map shards into memory; check their structure at once and their content on first use."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from rmkv_cli.data.shards import schema
from rmkv_cli.errors import UserError
from rmkv_cli.files import sha256

Verify: TypeAlias = Callable[[], None]
"""A function that verifies a shard once: it raises `UserError` if the SHA-256 differs from the manifest's."""
ALWAYS = ("source", "tokens", "size")  # columns of shards of every version


def map_shard(file: Path, vocab_size: int, sources: int, digest: str | None) -> tuple[list[pa.RecordBatch], Verify]:
    """Return the memory-mapped record batches of a shard, and the function that verifies its content.

    The offsets of documents are checked here, so that later reads stay within the file and their document. Token ids
    are not read.

    Args:
        file: the shard.
        vocab_size: number of ids of the mix's tokenizer.
        sources: number of the mix's sources.
        digest: SHA-256 of the file, in hexadecimal; None in mixes of earlier versions, which cannot be verified.

    Raises:
        UserError: the shard is missing or damaged.
    """
    if not file.is_file():
        raise UserError(f"{file}: {'is not a file' if file.exists() else 'is missing'}; make the mix again")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
            if wrong := _fault(batch, vocab_size, sources):
                raise UserError(f"{file}: is damaged ({wrong}); make the mix again")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is damaged ({str(error).partition(chr(10))[0]}); make the mix again") from None

    @cache
    def verify() -> None:
        if digest is not None and sha256(file) != digest:
            raise UserError(f"{file}: is damaged (its content does not match its SHA-256); make the mix again")

    return batches, verify


def _fault(batch: pa.RecordBatch, vocab_size: int, sources: int) -> str | None:
    """Return what makes a valid record batch unfit for a shard, or None."""
    expected = schema(vocab_size)
    if not set(ALWAYS) <= set(batch.schema.names) <= set(expected.names) or len(set(batch.schema.names)) != len(
        batch.schema.names
    ):
        return f"its columns are {', '.join(batch.schema.names)}"
    for field in batch.schema:
        column = batch.column(field.name)
        if field.type != expected.field(field.name).type:
            return f"its column '{field.name}' is of type {field.type}"
        if pa.types.is_list(field.type) and column.values.null_count:
            return f"its column '{field.name}' has gaps"
        if field.name != "answers" and column.null_count:
            return f"its column '{field.name}' has gaps"
    source, size = batch.column("source").to_numpy(), batch.column("size").to_numpy()
    lengths = np.diff(batch.column("tokens").offsets.to_numpy())
    if ((source < 0) | (source >= sources)).any():
        return "a document has no valid source"
    if (size < 0).any() or (lengths < 1).any():
        return "a document has no tokens, or a negative size"
    return _answers_fault(batch.column("answers"), lengths) if "answers" in batch.schema.names else None


def _answers_fault(column: pa.ListArray, lengths: np.ndarray) -> str | None:
    """Return what is wrong with the answers' spans, given the documents' lengths, or None."""
    offsets, spans = column.offsets.to_numpy(), column.values.to_numpy()
    if (offsets % 2).any() or len(spans) % 2:
        return "an answer has a start but no end"
    of_row = np.repeat(np.arange(len(lengths)), np.diff(offsets) // 2)
    starts, stops = (spans[offsets[0] : offsets[-1]][i::2] for i in (0, 1))
    if ((starts < 1) | (stops <= starts) | (stops > lengths[of_row] + 1)).any():  # the end counts as a token
        return "an answer is not within its document"
    if ((starts[1:] < stops[:-1]) & (of_row[1:] == of_row[:-1])).any():
        return "answers overlap"
    return None
