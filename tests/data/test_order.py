"""The order of a source's records is drawn from a seed, differs in each epoch, and resumes from any place."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmkv_cli.data import blocks
from rmkv_cli.data.blocks import BadRecord
from rmkv_cli.data.order import Place, ordered
from rmkv_cli.data.records import File

LINES = [json.dumps({"text": f"record {i}"}) for i in range(40)]
ROWS = [f"record {i}" for i in range(40)]


@pytest.fixture(params=["jsonl", "jsonl.gz", "csv", "parquet", "arrow", "stream.arrow", "txt"])
def files(request, tmp_path, monkeypatch):
    """Three files of 40 records, or 40 texts, in blocks of about five."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 5)
    kind = request.param
    table = pa.table({"text": ROWS, "id": list(range(40))})
    paths = [tmp_path / f"{n}.{kind}" for n in range(40 if kind == "txt" else 3)]
    for number, path in enumerate(paths):
        match kind:
            case "jsonl":
                path.write_text("\n".join(LINES))
            case "jsonl.gz":
                path.write_bytes(gzip.compress("\n".join(LINES).encode()))
            case "csv":
                path.write_text("text\n" + "".join(f"{row}\n" for row in ROWS))
            case "parquet":
                pq.write_table(table, path, row_group_size=7)
            case "txt":
                path.write_text(f"record {number}")
            case _:
                new = pa.ipc.new_stream if kind.startswith("stream") else pa.ipc.new_file
                with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
                    writer.write_table(table, max_chunksize=7)
    return [File.local(path) for path in paths]


BEGINNING = Place()


def read(files, seed, place=BEGINNING):
    return [(after, record.where, record.columns["text"]) for after, record in ordered(files, ["text"], seed, place)]


def test_an_epoch_has_every_record_once_in_an_order_of_its_own(files):
    standing = [text for *_, text in read(files, None)]
    orders = [[text for *_, text in read(files, [1, 2], Place(epoch))] for epoch in range(3)]
    assert standing == ROWS * (len(standing) // 40)
    assert all(Counter(order) == Counter(standing) for order in orders)
    assert len({tuple(order) for order in [standing, *orders]}) == 4
    assert orders[0] == [text for *_, text in read(files, [1, 2])]


def test_reading_resumes_from_any_place(files):
    whole = read(files, [5])
    for at in range(0, len(whole), 3):
        place = Place.from_json(json.loads(json.dumps(whole[at][0].to_json())))
        assert read(files, [5], place) == whole[at + 1 :]


def test_locations_count_from_one(files):
    for _, where, text in read(files, [5]):
        if where.endswith(".txt"):
            continue
        number = int(where.rpartition(":")[2])
        assert text == ROWS[number - (2 if ".csv" in where else 1)]  # of csv the first line names the columns


def test_a_truncated_file_is_not_read_twice_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(LINES).encode(), compresslevel=0)[:-300])
    files = [File.local(path)]
    whole = list(ordered(files, ["text"], [1], Place()))
    assert isinstance(whole[-1][1], BadRecord)
    assert len(whole) > 20
    for at in range(len(whole)):
        assert list(ordered(files, ["text"], [1], whole[at][0])) == whole[at + 1 :]
