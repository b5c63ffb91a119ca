"""`rmkv data generate`: from a recipe to a source of a mix."""

import json

import pytest
from small_run import error_of, save_small_model
from small_writer import small_writer

from rmkv_cli.data.synthetic.generate import journal_path

RECIPE = """
count = 6
license = "MIT"
prompt = "Write about {topic}."
[writer]
model = "small"
[slots.topic]
values = ["cats", "dogs"]
[sampling]
max_tokens = 8
[filters]
truncated = false
near_duplicates = 1.0
"""
MIX = """
[[sources]]
kind = "files"
name = "made"
weight = 1
files = ["out.jsonl"]
format = "prompt_response"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_small_model(tmp_path / "small")
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "mix.toml").write_text(MIX)
    return tmp_path


def test_a_model_folder_writes_what_a_mix_reads(folder, shown):
    result = shown("data", "generate", "r.toml", "--out", "out.jsonl", "--json")
    report = json.loads(result.out)
    assert (report["requests"], report["answered_before"], report["rows"], report["rejected"]) == (6, 0, 6, {})
    assert report["tokens"] == 48
    assert "No row is checked for contamination" in result.err
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "response", "writer", "seed", "license", "verdict"}] * 6
    mixed = json.loads(shown("data", "mix", "mix.toml", "--tokenizer", "small", "--out", "data", "--json").out)
    assert (mixed["sources"][0]["documents"], mixed["sources"][0]["skipped"]) == (6, 0)

    (folder / "out.jsonl").unlink()
    again = shown("data", "generate", "r.toml", "--out", "out.jsonl").out
    assert again.splitlines()[0] == "out.jsonl: 6 rows from 6 requests, 0 of them sent now"
    assert [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()] == rows


def test_rejected_answers_are_counted_by_filter(folder, shown):
    (folder / "set.txt").write_text("write about dogs please and nothing else at all")
    result = shown(
        *("data", "generate", "r.toml", "--out", "out.jsonl", "--set", "filters.max_characters=1"),
        *("--set", 'filters.evaluation=["set.txt"]'),
    )
    assert "rejected by max_characters: 6 answers; the first: " in result.out
    assert "No row is checked" not in result.err
    assert (folder / "out.jsonl").read_bytes() == b""


def test_shipped_recipes_turn_a_server_s_answers_into_rows(folder, shown):
    answers = {
        "problems": {"problem": "2 and 3?", "steps": "2 + 3 = 5", "answer": "5."},
        "questions": {"question": "Who sat?", "answer": "The cat"},
        "stories": None,
    }
    (folder / "docs").mkdir()
    (folder / "docs" / "a.txt").write_text("The cat sat on the mat. " * 500)
    for name, answer in answers.items():

        def said(body, answer=answer):
            seed = body["seed"]
            if answer is None:
                return " ".join(f"Word{seed}x{i}" for i in range(9))
            first, *others = answer
            return json.dumps({first: f"{answer[first]} {seed}"} | {key: answer[key] for key in others})

        with small_writer(answer=said) as paid:
            made = ["--set", "writer.model=m", "--set", f"writer.url={paid.url}", "--set", "count=5"]
            if name == "questions":
                made += ["--set", 'slots.passage.files=["docs/*.txt"]', "--set", "filters.near_duplicates=1.0"]
            report = json.loads(shown("data", "generate", name, "--out", f"{name}.jsonl", *made, "--json").out)
        assert (report["rows"], report["rejected"]) == (5, {})
        row = json.loads((folder / f"{name}.jsonl").read_text().splitlines()[1])
        assert row["verdict"] == ("accepted" if name == "stories" else "verified")
        assert set(row) - {"writer", "seed", "license", "verdict"} == (
            {"text"} if name == "stories" else {"prompt", "response"}
        )
        if name == "problems":
            assert row["response"] == "<think>2 + 3 = 5</think>5."
        if name == "questions":
            assert row["prompt"].startswith("The cat sat on the mat.")
            assert row["prompt"].endswith("\n\nWho sat? 1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.toml"], "absent.toml: no such file"),
        (["story"], "recipe 'story': no such recipe; did you mean 'stories'?"),
        (["stories"], "stories.toml: writer: is missing"),
        (["r.toml", "--set", "writer.model=absent"], "absent: no such folder"),
        (["r.toml", "--set", "cuont=3"], "--set cuont: unknown key; did you mean 'count'?"),
        (["r.toml", "--set", "writer.url=http://x/v1", "--set", "writer.key_env=NO_KEY"], "NO_KEY is not set"),
        (["r.toml", "--out", "out.json"], "--out out.json: should end in .jsonl"),
        (["r.toml", "--out", "there.jsonl"], "there.jsonl: already exists"),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, capsys, arguments, words):
    (folder / "there.jsonl").write_text("mine")
    out = [] if "--out" in arguments else ["--out", "out.jsonl"]
    assert words in error_of(monkeypatch, capsys, "data", "generate", *arguments, *out)
    assert not journal_path(folder / "out.jsonl").exists()
