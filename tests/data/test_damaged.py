"""Damaged files lose only the records that cannot be read, and all lost records are counted."""

import csv
import gzip
import io
import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmkv_cli.config import FileSource, MixConfig
from rmkv_cli.data import blocks, csv_blocks
from rmkv_cli.data.blocks import BadRecord, Record
from rmkv_cli.data.mix import prepare
from rmkv_cli.data.order import Place, ordered
from rmkv_cli.data.records import File
from rmkv_cli.data.sources import good_documents
from rmkv_cli.errors import UserError

ROWS = [f"record {i} " + "wörd " * (i % 7) for i in range(60)]
TABLE = pa.table({"text": ROWS, "id": list(range(60))})


def read(path, seed=None, place=None):
    return list(ordered([File.local(path)], ["text"], seed, place or Place()))


def numbers(found):
    """Return the records that were read, and the number of records reported as lost."""
    good = [int(r.columns["text"].split()[1]) for _, r in found if isinstance(r, Record)]
    return good, sum(r.records for _, r in found if isinstance(r, BadRecord))


def requires_all_of(path):
    """Require that reading from any place gives the rest of the whole reading; return the whole reading."""
    whole = read(path, [3])
    for at in range(len(whole)):
        place = Place.from_json(json.loads(json.dumps(whole[at][0].to_json())))
        assert read(path, [3], place) == whole[at + 1 :]
    return read(path)


def arrow(new, compression=None, table=TABLE):
    sink = io.BytesIO()
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=10)
    return bytearray(sink.getvalue())


def parquet(table=TABLE, **options):
    sink = io.BytesIO()
    pq.write_table(table, sink, **({"row_group_size": 12, "compression": "snappy"} | options))
    return bytearray(sink.getvalue())


def damage(data, group, column=0):
    """Overwrite the beginning of a column's values in a row group."""
    at = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(group).column(column).dictionary_page_offset
    data[at + 20 : at + 60] = b"\xff" * 40


def test_a_damaged_row_group_loses_only_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 5)
    data = parquet()
    damage(data, 1)
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    found = requires_all_of(path)
    assert numbers(found) == ([*range(12), *range(24, 60)], 12)
    (bad,) = [str(record) for _, record in found if isinstance(record, BadRecord)]
    assert bad.startswith(f"{path}:13-24: 12 records are not readable as Parquet: ")


def test_the_pages_before_the_damaged_one_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 9)
    small = {
        "compression": "none",
        "use_dictionary": False,
        "data_page_size": 1,
        "write_batch_size": 2,
        "row_group_size": 30,
    }
    data = parquet(**small, write_page_checksum=True)
    at = data.rindex(b"record 41")  # in the second group, whose page headers also have their text
    data[at : at + 9] = b"xxxxxx 99"
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    assert numbers(requires_all_of(path)) == (list(range(40)), 20)


def test_a_damaged_column_that_is_not_read_loses_nothing(tmp_path):
    data = parquet()
    damage(data, 2, column=1)
    (tmp_path / "a.parquet").write_bytes(data)
    assert numbers(read(tmp_path / "a.parquet")) == (list(range(60)), 0)


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_damaged_batch_loses_only_its_rows(tmp_path, new):
    data = arrow(new, "zstd")
    at = data.index(b"\x28\xb5\x2f\xfd", len(data) // 3)  # start of a compressed column
    data[at : at + 4] = b"\0\0\0\0"
    path = tmp_path / "a.arrow"
    path.write_bytes(data)
    found = requires_all_of(path)
    good, lost = numbers(found)
    assert (len(good), lost) == (50, 10)
    (bad,) = [str(record) for _, record in found if isinstance(record, BadRecord)]
    begin = next(i for i, number in enumerate([*good, 60]) if number != i)
    assert bad.startswith(f"{path}:{begin + 1}-{begin + 10}: 10 records are not readable as Arrow: ")


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_damaged_row_of_a_batch_loses_only_itself(tmp_path, new):
    data = arrow(new)
    offsets = pa.array(ROWS[20:30]).buffers()[1].to_pybytes()
    at = data.index(offsets[:44])
    data[at + 20 : at + 24] = b"\xff\xff\xff\x7f"  # where the batch's record 4 ends and 5 begins
    path = tmp_path / "a.arrow"
    path.write_bytes(data)
    found = requires_all_of(path)
    assert numbers(found) == ([i for i in range(60) if i not in (24, 25)], 2)
    first = next(str(record) for _, record in found if isinstance(record, BadRecord))
    assert first.startswith(f"{path}:25: is damaged: ")


def test_a_truncated_arrow_file_is_read_to_its_end(tmp_path):
    data = arrow(pa.ipc.new_file)
    path = tmp_path / "a.arrow"
    path.write_bytes(data[: len(data) * 2 // 3])
    found = requires_all_of(path)
    good, lost = numbers(found)
    assert good == list(range(40))
    assert lost == 1
    assert str(found[-1][1]).endswith("; the number of lost records is unknown")


def test_an_unclosed_quote_loses_only_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    lines = [f"{i},record {i}\n" for i in range(60)]
    lines[9] = '9,"record 9\n'
    lines[30] = '30,"record 30\n'
    lines[31] = '31,"record 31 ""of"" many\nlines"\n'
    lines[50] = '50,"record" 50\n'
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "".join(lines))
    found = requires_all_of(path)
    assert numbers(found) == ([i for i in range(60) if i not in (9, 30, 50)], 3)
    assert [r.where for _, r in found if isinstance(r, BadRecord)] == [f"{path}:{n}" for n in (11, 32, 53)]


def test_lines_that_each_open_a_quote_take_linear_time(tmp_path, monkeypatch):
    """The second quote of each line opens a field without an end, however many lines the reader takes."""
    given = 0
    real = csv_blocks._Lines.__next__

    def counted(lines):
        nonlocal given
        given += 1
        return real(lines)

    monkeypatch.setattr(csv_blocks._Lines, "__next__", counted)
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + '1","record\n' * 3000)
    assert numbers(read(path)) == ([], 3000)
    assert given < 4 * 3000


@pytest.mark.slow
def test_an_unclosed_quote_does_not_load_the_whole_file_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_blocks, "SPAN_BYTES", 500)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    lines = [f"{i},record {i}\n" for i in range(2000)]
    for i in (100, 101, 150, 151, 900):
        lines[i] = f'{i},"record {i}\n'
    lines[1500] = '1500,"record 1500\n' + "so\n" * 100 + '"\n'
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "".join(lines))
    longest = 0
    real = csv_blocks._Lines.give_up_record

    def measured(lines):
        nonlocal longest
        longest = max(longest, sum(map(len, lines._record)))
        real(lines)

    monkeypatch.setattr(csv_blocks._Lines, "give_up_record", measured)
    assert numbers(read(path)) == ([i for i in range(2000) if i not in (100, 101, 150, 151, 900)], 5)
    assert 500 < longest < 1100
    whole = read(path, [3])
    for at in range(0, len(whole), 7):
        assert read(path, [3], whole[at][0]) == whole[at + 1 :]


def test_random_csv_is_read_the_same_from_any_place(tmp_path, monkeypatch):
    """The reference tests each line by itself: does a record that csv can read begin here?"""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20)
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(['"', ",", "\n", "a", '""', '",', '\n"'], [3, 3, 4, 4, 1, 2, 2], k=60))
        path = tmp_path / "a.csv"
        path.write_text("id,text\n" + text, newline="")
        lines = io.StringIO(text, newline="\n").readlines()
        at, expected = 0, []
        while at < len(lines):
            reader = csv.reader(lines[at:], strict=True)
            try:
                row = next(reader)
                step = reader.line_num
            except csv.Error:
                row, step = None, 1
            if row != []:
                expected.append(row[1] if row and len(row) == 2 else None)
            at += step
        found = requires_all_of(path)
        assert [r.columns["text"] if isinstance(r, Record) else None for _, r in found] == expected


def test_rows_before_the_damage_of_a_gzipped_csv_are_read(tmp_path):
    text = "id,text\n" + "".join(f"{i},record {i} {random.Random(i).random()}\n" for i in range(3000))
    path = tmp_path / "a.csv.gz"
    whole = gzip.compress(text.encode())
    path.write_bytes(whole[: len(whole) // 2])
    *good, (_, bad) = read(path)
    assert len(good) > 1000
    assert "is not a whole gzip file" in str(bad)
    assert read(path, [1], read(path, [1])[500][0]) == read(path, [1])[501:]


def test_what_is_lost_is_counted_and_named_or_ends_the_mix(tmp_path, tokenizer, capsys):
    data = parquet()
    for group in (1, 3):
        damage(data, group)
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    source = {"kind": "files", "name": "it", "weight": 1, "files": ["a.parquet"]}
    mix = MixConfig(on_error="skip", validation=0, sources=[source])
    manifest = prepare(mix, tmp_path, tokenizer, tmp_path / "data", 1)
    (report,) = manifest.sources
    assert (report.documents, report.skipped) == (36, 24)
    messages = " ".join(capsys.readouterr().err.split())
    assert "a.parquet:13-24: 12 records are not" in messages
    assert "a.parquet:37-48: 12 records are not" in messages
    stopping = good_documents(FileSource(**source), tmp_path, "stop")
    with pytest.raises(UserError, match=r"a\.parquet:13-24: 12 records are not readable as Parquet"):
        list(stopping)


KINDS = {
    "a.parquet": parquet,
    "plain.parquet": lambda: parquet(compression="none", use_dictionary=False),
    "file.arrow": lambda: arrow(pa.ipc.new_file),
    "stream.arrow": lambda: arrow(pa.ipc.new_stream),
    "zipped.arrow": lambda: arrow(pa.ipc.new_file, "zstd"),
    "zipped-stream.arrow": lambda: arrow(pa.ipc.new_stream, "zstd"),
}


READ_ALL = """
import sys
from pathlib import Path
from rmkv_cli.data.order import Place, ordered
from rmkv_cli.data.records import File
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, flush=True)
    first, second = ([place for place, _ in ordered([File.local(path)], ["text"], [1], Place())] for _ in range(2))
    assert first == second
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_crashes_no_process(tmp_path, name):
    """Files with one flipped bit are all read to their end, and reading them again gives the same result."""
    whole = KINDS[name]()
    for case in range(300):
        rng = random.Random(f"{name} {case}")
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / f"{case:03}-{name}").write_bytes(data)
    limited = ["bash", "-c", 'ulimit -v 8000000; exec "$@"', "-", sys.executable, "-c", READ_ALL, str(tmp_path)]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1]}: {done.stderr}"
    assert len(done.stdout.splitlines()) == 300
