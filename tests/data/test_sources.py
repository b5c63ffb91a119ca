"""Local files of every kind are read, and every fault is reported with its location."""

import csv
import glob
import gzip
import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmkv_cli.config import FileSource
from rmkv_cli.data.blocks import BadRecord
from rmkv_cli.data.files import find_files
from rmkv_cli.data.order import Place
from rmkv_cli.data.sources import Document, LeftOut, good_documents, open_source, read_source
from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Special

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TEXTS = ["first\r\nline", "naïve <eod> 😀", ""]


def source(*files, **rest):
    return FileSource(kind="files", name="it", weight=1, files=list(files), **rest)


def read(folder, *files, **rest):
    its = source(*files, **rest)
    return [item for _, item in read_source(its, open_source(its, folder))]


def texts(folder, *files, **rest):
    return ["".join(document.pieces) for document in read(folder, *files, **rest)]


def write(file, kind):
    if kind == "jsonl":
        file.write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in TEXTS))
    elif kind == "parquet":
        pq.write_table(pa.table({"id": [1, 2, 3], "text": TEXTS}), file)
    else:
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["id", "text"], *enumerate(TEXTS)])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_row_is_a_document_with_or_without_gzip(tmp_path, kind):
    file = tmp_path / f"a.{kind}"
    write(file, kind)
    (tmp_path / f"b.{kind}.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert texts(tmp_path, f"a.{kind}") == TEXTS
    assert texts(tmp_path, f"b.{kind}.gz") == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_an_existing_path_is_not_a_pattern(tmp_path, kind):
    folder = tmp_path / "run [1]" / "*"
    folder.mkdir(parents=True)
    write(folder / f"a?.{kind}", kind)
    assert texts(folder, f"a?.{kind}") == TEXTS


@pytest.mark.parametrize("kind", ["txt", "md"])
def test_a_text_file_is_one_unchanged_document(tmp_path, kind):
    text = " one\r\ntwo\rthree\n\n"
    (tmp_path / f"a.{kind}").write_bytes(text.encode())
    (tmp_path / f"B.{kind.upper()}.GZ").write_bytes(gzip.compress(text.encode()))
    assert texts(tmp_path, f"a.{kind}", f"B.{kind.upper()}.GZ") == [text, text]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}', encoding="utf-8-sig")
    (tmp_path / "c.csv").write_text('"text"\nc\n', encoding="utf-8-sig")
    assert texts(tmp_path, "a.txt", "b.jsonl", "c.csv") == ["a", "b", "c"]


def test_globs_cross_folders_in_a_fixed_order_and_a_file_is_read_once(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("b.txt", "x/a.txt", "x/y/c.txt", "x/[1].txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path, "**/*.txt", "b.txt") == ["b.txt", "x/[1].txt", "x/a.txt", "x/y/c.txt"]
    assert texts(tmp_path, "x/[1].txt") == ["x/[1].txt"]
    assert texts(tmp_path, str(tmp_path / "x" / "*.txt")) == ["x/[1].txt", "x/a.txt"]


def test_a_folder_whose_name_is_a_pattern_is_that_folder(tmp_path):
    for folder in ("data [v2]", "data v", "x*", "xy"):
        (tmp_path / "in" / folder / "more").mkdir(parents=True)
        (tmp_path / "in" / folder / "more" / "a.txt").write_text(folder)
    assert texts(tmp_path, "in/data [v2]/**/*.txt") == ["data [v2]"]
    assert texts(tmp_path, "*/data [v2]/more/a.txt") == ["data [v2]"]
    assert texts(tmp_path / "in" / "data [v2]", "*/*.txt") == ["data [v2]"]
    assert texts(tmp_path, "in/x*/more/*") == ["x*"]
    assert texts(tmp_path, "in/x?/more/*") == ["x*", "xy"]
    assert texts(tmp_path, "in/data [uv]/more/*") == ["data v"]
    assert texts(tmp_path, str(tmp_path / "in" / "data [v2]" / "**")) == ["data [v2]"]


def test_a_file_that_is_found_in_several_ways_is_read_once(tmp_path):
    folder = tmp_path / "data"
    (folder / "x").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "x" / "b.txt").write_text("b")
    (folder / "link.txt").symlink_to("a.txt")
    for loop in ("loop", "x/back", "x/loop"):  # with three of them there are more ways than can be walked
        (folder / loop).symlink_to(folder)
    (tmp_path / "other").symlink_to(folder)
    everything = source("data/x/../a.txt", "**/*.txt", "other/*.txt", "data/link.txt")
    names = [file.name for file in open_source(everything, tmp_path)]
    assert names == [str(tmp_path / "data/x/../a.txt"), str(tmp_path / "data/x/b.txt")]


def test_patterns_find_what_glob_finds(tmp_path):
    for name in ("a.txt", ".b.txt", "x/c.txt", "x/.h/d.txt", "x/y/e.txt", ".x/f.txt", "x/z.md/g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    patterns = (
        "*",
        "**",
        "**/*",
        "*.txt",
        ".*",
        "x/*",
        "x/**",
        "**/y/*",
        "**/.h/*.txt",
        "**/**/*.txt",
        ".x/*",
        "?/*.txt",
    )
    for pattern in (*patterns, "[a-x]*", "./x//*.txt", "x/../*.txt", f"{tmp_path}/**/e.txt", "**/x/**/*.txt"):
        found = sorted(glob.glob(pattern, root_dir=tmp_path, recursive=True))  # noqa: PTH207
        expected = list(dict.fromkeys(str(tmp_path / file) for file in found if (tmp_path / file).is_file()))
        assert [file.name for file in open_source(source(pattern), tmp_path)] == expected, pattern


def test_sizes_are_bytes_of_untrusted_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "né?", "response": "<think>é</think>ok"}\n')
    (document,) = read(tmp_path, "a.jsonl", format="prompt_response")
    assert document.size == 4 + 2 + 2


@pytest.mark.parametrize(
    ("response", "pieces"),
    [
        ("<think>a</think>b", (Special.THINK, "a", Special.END_THINK, "b")),
        ("\n <think>a</think> b</think>", (Special.THINK, "a", Special.END_THINK, " b</think>")),
        ("<think></think>", (Special.THINK, "", Special.END_THINK, "")),
        ("so <think>a</think>b", ("so <think>a</think>b",)),
        ("<think>never ends", ("<think>never ends",)),
        (" b", (" b",)),
    ],
)
def test_a_thought_is_recognized_only_if_it_is_complete_and_begins_the_response(tmp_path, response, pieces):
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "p<end>", "a": response}))
    columns = {"prompt_column": "q", "response_column": "a"}
    (document,) = read(tmp_path, "a.jsonl", format="prompt_response", **columns)
    assert document.pieces == (Special.START, "p<end>", Special.END, *pieces)


BAD_LINES = [
    (b'{"text": "a"', "is not valid JSON: Expecting ',' delimiter at column 13"),
    (b'["a"]', "is not a JSON object but a list"),
    (b'{"txt": "a", "id": 3}', "has no column 'text' (it has: txt, id); did you mean 'txt'?"),
    (b'{"text": 3}', "column 'text' is not a string but a number"),
    (b'{"text": null}', "column 'text' is not a string but null"),
    (b'{"text": "\xff"}', "is not valid UTF-8: byte 0xff at offset 10"),
    (b'{"text": "a\\ud800"}', "column 'text' is not valid UTF-8: the lone surrogate U+D800 at character 2"),
    (b'{"text": "\0"}', "contains a NUL byte, so it is not a text file"),
    (b"[" * 100_000, ""),
]


@pytest.mark.parametrize(("line", "what"), BAD_LINES)
def test_a_bad_line_is_named_by_file_and_line_and_the_next_one_is_read(tmp_path, line, what):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "four"}')
    first, bad, last = read(tmp_path, "a.jsonl")
    assert (first.pieces, last.pieces) == (("one",), ("four",))
    assert isinstance(bad, BadRecord)
    assert str(bad).startswith(f"{file}:3: {what}")


def test_bad_rows_of_csv_are_named_by_line(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b'id,text\n1,"two\nlines"\n2,a,b\n3,\xff\n4,fine\n5,"never closed\n')
    good, many, invalid, fine, unclosed = read(tmp_path, "a.csv")
    assert (good.pieces, fine.pieces) == (("two\nlines",), ("fine",))
    assert str(many) == f"{file}:4: has 3 fields where the first line names 2 columns"
    assert str(invalid) == f"{file}:5: column 'text' is not valid UTF-8: byte 0xff at character 1"
    assert str(unclosed).startswith(f"{file}:7: is not valid CSV: ")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", b"", ": is empty"),
        ("a.jsonl", b"", ": is empty"),
        ("a.txt", b"PK\0\1", ": contains a NUL byte"),
        ("a.md", b"fine\n\xe9t\xe9", ": is not valid UTF-8: byte 0xe9 at offset 5 (line 2)"),
        ("a.txt.gz", b"not zipped", ": is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], ": is not a whole gzip file"),
        ("a.parquet", b"no parquet", ":1: is not readable as Parquet"),
        ("a.csv", b'"id"x,text\n1,a\n', ":1: is not valid CSV: "),
        ("a.csv", b"text,id,text\na,1,b\n", ":1: has 2 columns named 'text'; rename all but the one to read"),
        ("a.jsonl", b'{"text": "a", "id": 1, "text": "b"}', ":1: has 2 columns named 'text'"),
        ("a.txt", "é".encode("utf-16"), ": is UTF-16, where UTF-8 is expected; convert it: iconv -f UTF-16 -t UTF-8"),
        ("a.md", b"t\0e\0x\0t\0", ": is UTF-16, where UTF-8 is expected"),
        ("a.csv", "text\na\n".encode("utf-16-be"), ": is UTF-16, where UTF-8 is expected"),
        ("a.jsonl.gz", gzip.compress('{"text": 1}'.encode("utf-16"), mtime=0), ": is UTF-16, where UTF-8 is expected"),
        ("a.txt", "text".encode("utf-32"), ": is UTF-32, where UTF-8 is expected"),
        ("a.txt", POINTER, ": is a git-lfs pointer, not the file itself; fetch that with `git lfs pull`"),
        ("a.parquet", POINTER, ": is a git-lfs pointer, not the file itself"),
        ("a.arrow", POINTER, ": is a git-lfs pointer, not the file itself"),
        ("a.jsonl", b"/annex/objects/SHA256E-s9--a.jsonl\n", ": is a git-annex pointer, not the file itself"),
    ],
)
def test_a_bad_file_is_named_and_the_next_one_is_read(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.txt").write_text("fine")
    bad, fine = read(tmp_path, name, "z.txt")
    assert str(bad).startswith(f"{tmp_path / name}{what}")
    assert fine.pieces == ("fine",)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_duplicate_column_names_are_reported_if_one_of_them_is_read(tmp_path, name):
    table = pa.table([["one"], [1], ["two"], [2]], names=["text", "id", "words", "id"])
    for given, expected in (
        (table, "one"),
        (table.rename_columns(["text", "id", "text", "other"]), "has 2 columns named 'text'; rename all but the one"),
    ):
        if name == "a.parquet":
            pq.write_table(given, tmp_path / name)
        else:
            with pa.ipc.new_file(tmp_path / name, given.schema) as file:
                file.write_table(given)
        (item,) = read(tmp_path, name)
        assert expected in str(item)


def test_a_column_of_numbers_is_not_text(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    first, second = map(str, read(tmp_path, "a.parquet"))
    assert first == f"{tmp_path / 'a.parquet'}:1: column 'text' is not a string but a number"
    assert ":2: " in second


def test_a_row_that_is_not_utf8_loses_only_itself(tmp_path):
    words = [b"one", b"tw\xff", b"three"]
    column = pa.Array.from_buffers(pa.string(), 3, pa.array(words, pa.binary()).buffers())
    rows = pa.table({"text": column})
    pq.write_table(rows, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", rows.schema) as file:
        file.write_table(rows)
    for name in ("a.parquet", "a.arrow"):
        one, two, three = read(tmp_path, name)
        assert (one.pieces, three.pieces) == (("one",), ("three",))
        assert str(two).startswith(f"{tmp_path / name}:2: is not valid UTF-8: ")


def test_lines_before_the_damage_of_a_gzip_file_are_read(tmp_path):
    lines = "".join(f'{{"text": "{random.Random(i).random()}"}}\n' for i in range(2000))
    whole = gzip.compress(lines.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    *good, bad = read(tmp_path, "a.jsonl.gz")
    assert len(good) > 500
    assert "is not a whole gzip file" in str(bad)


def test_a_source_with_only_bad_records_is_an_error_even_if_bad_records_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"words": "a"}\n' * 1000)
    what = r"a\.jsonl:1: has no column 'text' \(it has: words\).*source 'it'; the next 999 records cannot"
    with pytest.raises(UserError, match=what):
        list(good_documents(source("a.jsonl"), tmp_path, "skip"))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "fine"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n' + '{"words": "a"}\n' * 2000)
    assert len(list(good_documents(source("b.jsonl"), tmp_path, "skip"))) == 1


def test_a_source_that_was_good_may_have_a_thousand_bad_records_in_a_row_later(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + '{"words": "a"}\n' * 1500)
    its = source("a.jsonl")
    files = open_source(its, tmp_path)
    whole = list(read_source(its, files))
    after = whole[0][0]
    assert list(read_source(its, files, place=after)) == whole[1:]
    (tmp_path / "a.jsonl").write_text('{"words": "a"}\n' * 1500 + '{"text": "fine"}\n')
    assert len(list(read_source(its, files, place=Place(epoch=1)))) == 1501


def test_the_numbers_of_a_csv_can_be_compared(tmp_path):
    (tmp_path / "a.csv").write_text("text,score,year\none,0.9,2024\ntwo,0.1,2024\nthree,0.9,2023\nfour,,2024\n")
    one, two, three, four = read(tmp_path, "a.csv", at_least={"score": 0.5}, where={"year": [2024]})
    assert (one.pieces, two, three) == (("one",), LeftOut(), LeftOut())
    assert str(four).endswith(":5: column 'score' is not a number but a string")


def test_on_error_stops_at_the_first_bad_record_or_counts_them(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nbad\n{"text": 2}\n{"text": "four"}\n')
    stopping = good_documents(source("a.jsonl"), tmp_path, "stop")
    assert next(stopping).pieces == ("one",)
    with pytest.raises(UserError, match=r"a\.jsonl:2: is not valid JSON.*source 'it'; .*set on_error = \"skip\""):
        next(stopping)
    assert [d.pieces for d in good_documents(source("a.jsonl"), tmp_path, "skip")] == [("one",), ("four",)]
    assert "source 'it': 2 bad records left out, the first: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("none.txt", "no such file"),
        ("**/*.jsonl", "no such file"),
        ("folder", "is a folder; name its files, such as folder/**/*.txt"),
        ("*.ndjson", "a.ndjson: is ambiguous; name it .jsonl if each line is a record, or .txt if it is text"),
        ("saved", "contains a folder for each split; name one, such as saved/train"),
        ("*.json", "a.json: is ambiguous; name it .jsonl if each line is a record, or .txt if it is text"),
    ],
)
def test_missing_files_and_files_of_unknown_kinds_are_refused_at_once(tmp_path, pattern, what):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.json").write_text("a")
    (tmp_path / "a.ndjson").write_text("a")
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"^source 'it': ") as error:
        open_source(source(pattern), tmp_path)
    assert str(error.value).endswith(what)


def test_records_are_chosen_by_length_and_columns(tmp_path):
    rows = [
        {"text": "fine words", "language": "en", "score": 0.9},
        {"text": "short", "language": "en", "score": 0.9},
        {"text": "far too many words for this", "language": "en", "score": 0.9},
        {"text": "mots justes", "language": "fr", "score": 0.9},
        {"text": "bad words", "language": "en", "score": 0.1},
        {"text": "more words", "language": "de", "score": 1},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {
        "min_characters": 6,
        "max_characters": 20,
        "where": {"language": ["en", "de"]},
        "at_least": {"score": 0.5},
        "at_most": {"score": 1},
    }
    found = read(tmp_path, "a.jsonl", **chosen)
    assert [item.pieces[0] for item in found if isinstance(item, Document)] == ["fine words", "more words"]
    assert sum(isinstance(item, LeftOut) for item in found) == 4
    bad = read(tmp_path, "a.jsonl", at_least={"scor": 1})[0]
    assert str(bad).endswith("has no column 'scor' (it has: text, language, score); did you mean 'score'?")
    bad = read(tmp_path, "a.jsonl", at_most={"language": 1})[0]
    assert str(bad).endswith("column 'language' is not a number but a string")


def test_messages_with_the_answer_beside_them(tmp_path):
    rows = [
        {"input": "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>", "output": "<think>a</think>b"},
        {"input": [{"role": "user", "content": "Why?"}], "output": "b<end>"},
        {"input": [{"role": "user"}], "output": "b"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"format": "messages", "messages_column": "input", "answer_column": "output"}
    one, other, bad = read(tmp_path, "a.jsonl", **columns)
    assert one.pieces == (Special.START, "Why?", Special.END, Special.THINK, "a", Special.END_THINK, "b")
    assert other.pieces == (Special.START, "Why?", Special.END, "b<end>")
    assert str(bad).endswith(":3: column 'input' message 1 should have a role and a content, both strings")


def test_a_folder_that_datasets_saved_is_its_files(tmp_path):
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path, "saved") == TEXTS


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is damaged"),
        ('{"_data_files": 3}', "is not a file that"),
    ],
    ids=lambda text: text[:6],
)
def test_a_damaged_state_json_of_datasets_is_reported(tmp_path, state, what):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match=f"state.json: {what}"):
        find_files([str(tmp_path)], tmp_path)
