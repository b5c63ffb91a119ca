"""The sample corpus is made locally, deterministic and correct."""

import ast
import json
import re
import subprocess
import sys
from itertools import islice

import pytest

from rmkv_cli.config import load_mix
from rmkv_cli.data.mix import prepare
from rmkv_cli.data.problems import KINDS, NAMES, UNITS, problems
from rmkv_cli.data.sample import _modules, make_sample, split_docstrings
from rmkv_cli.data.sources import mix_documents
from rmkv_cli.data.vocabulary import train_on_mix
from rmkv_cli.errors import UserError


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The folder that `rmkv data sample` makes."""
    folder = tmp_path_factory.mktemp("made") / "sample"
    command = [sys.executable, "-m", "rmkv_cli", "data", "sample", str(folder), "--json"]
    files = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert files == {file.name: file.stat().st_size for file in folder.iterdir()}
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Makes a sample of forty modules alone, in a moment, in a folder of a given name; returns the folder."""
    place, modules = tmp_path_factory.mktemp("short"), _modules()[:40]

    def make(name):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("rmkv_cli.data.sample._modules", lambda: modules)
            files = make_sample(place / name)
        assert files == {file.name: file.stat().st_size for file in (place / name).iterdir()}
        return place / name

    return make


@pytest.fixture(scope="module")
def short_sample(short):
    return short("sample")


def records(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_the_sample_has_a_useful_size(sample):
    assert {file.name for file in sample.iterdir()} == {"prose.jsonl", "code.jsonl", "reasoning.jsonl", "mix.toml"}
    assert 4e6 < sum(file.stat().st_size for file in sample.iterdir()) < 10e6


def test_the_sample_is_deterministic_and_overwrites_nothing(short, short_sample):
    first, second = ({file.name: file.read_bytes() for file in made.iterdir()} for made in (short_sample, short("b")))
    assert first == second
    with pytest.raises(UserError, match="already exists"):
        short("sample")


def test_the_code_is_python_without_a_docstring_so_that_it_shares_no_text_with_the_prose(short_sample):
    code = [record["text"] for record in records(short_sample / "code.jsonl")]
    assert len(code) > 20
    for text in code:
        tree = ast.parse(text)
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        assert not [n for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)]
    prose = [record["text"] for record in records(short_sample / "prose.jsonl")]
    assert any('The "assert" statement' in text.replace("“", '"').replace("”", '"') for text in prose)


def test_docstrings_are_removed_exactly():
    source = '''"""É one.

More."""
x = "é"  # stays
def f():
    "two"

class A:
    "three"
    y = 1
async def g():
    """four"""
    return f
'''
    words, code = split_docstrings(source.encode())
    assert sorted(words.split("\n\n")) == sorted(["É one.", "More.", "two", "three", "four"])
    assert code == 'x = "é"  # stays\ndef f():\n    pass\n\nclass A:\n    y = 1\nasync def g():\n    return f\n'


@pytest.mark.parametrize("source", [b'"one"; x = 1\n', b"x = \xff", b"x = "])
def test_a_module_whose_docstrings_cannot_be_removed_cleanly_is_left_out(source):
    assert split_docstrings(source) == ("", "")


@pytest.mark.slow
def test_most_of_the_corpus_is_used_in_the_wanted_ratio(sample, tmp_path):
    mix = load_mix(sample / "mix.toml")
    trained = train_on_mix(mix, sample, 1024, 500_000)
    manifest = prepare(mix, sample, trained.tokenizer, tmp_path / "out", 1)
    used = sum(split.bytes for split in manifest.splits.values())
    assert used > 0.75 * sum(d.size for _, documents in mix_documents(mix, sample) for d in documents)
    assert all(abs(source.achieved - source.wanted) < 0.02 for source in manifest.sources)
    assert manifest.splits["validation"].documents > 50


def solve(prompt):
    """Return the significant words of the answer, computed from the prompt alone."""
    numbers = list(map(int, re.findall(r"\d+", prompt)))
    if match := re.fullmatch(r"(?:What is|Work out|Calculate) ([\d +*-]+)[?.]", prompt):
        return [str(eval(match[1]))]
    if prompt.startswith("Add "):
        return [str(sum(numbers))]
    if " packs of " in prompt:
        start, packs, each, given = numbers
        return [str(start + packs * each - given)]
    if "shared equally" in prompt:
        return list(map(str, divmod(*numbers)))
    if prompt.startswith("Sort "):
        return list(map(str, sorted(numbers, reverse="from largest" in prompt)))
    if match := re.fullmatch(r'How often is the letter "(.)" in "(.*)"\?', prompt):
        return [str(match[2].count(match[1]))]
    if match := re.fullmatch(r"How many (\w+) are (\d+) (\w+) and (\d+) (\w+)\?", prompt):
        assert match[1] == match[5]
        sizes = {"metres": 100, "kilometres": 100_000, "centimetres": 1, "kilograms": 1000, "grams": 1}
        sizes |= {"litres": 1000, "millilitres": 1, "dozens": 12, "pieces": 1, "yards": 36, "feet": 12, "inches": 1}
        sizes |= {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
        return [str(int(match[2]) * sizes[match[3]] // sizes[match[1]] + int(match[4]))]
    if prompt.startswith("A train "):
        hour, minute, hours, minutes = numbers
        total = (hour + hours) * 60 + minute + minutes
        return [f"{total // 60 % 24:02}", f"{total % 60:02}"]
    if " Who is the " in prompt:
        pairs = re.findall(r"(\w+) is \w+ than (\w+)\.", prompt)
        above, below = {a for a, _ in pairs}, {b for _, b in pairs}
        most = re.search(r"tallest|oldest|fastest", prompt)
        return list(above - below if most else below - above)
    if prompt.startswith("What comes next"):
        a, b, c, d = numbers
        return [str(d + d - c if d - c == b - a else d * d // c)]
    a, b, c, d = numbers
    return [] if a * b == c * d else ["first" if a * b > c * d else "second"]


def test_every_worked_problem_is_right_and_its_sums_add_up():
    seen = set()
    for record in islice(problems(seed=3), 4000):
        prompt, (thought, answer) = record["prompt"], record["response"].removeprefix("<think>").split("</think>")
        assert prompt not in seen
        seen.add(prompt)
        wanted = solve(prompt)
        assert all(re.search(rf"\b{word}\b", answer) for word in wanted), (prompt, answer)
        if numbers := re.findall(r"\d+", answer):
            assert numbers == wanted, (prompt, answer)
        assert wanted or answer == "They are equal.", prompt
        for left, right in re.findall(r"(\d[\d +*-]*) = (\d+)", thought):
            assert eval(left) == int(right), thought


def test_all_kinds_of_problems_are_drawn():
    prompts = [record["prompt"] for record in islice(problems(seed=0), 1000)]
    starts = [
        "What is",
        "Add",
        "How many",
        "shared",
        "Sort",
        "letter",
        "train",
        "Who is",
        "comes next",
        "larger",
        "packs",
    ]
    assert len(starts) == len(KINDS)
    assert all(sum(start in prompt for prompt in prompts) > 20 for start in starts)
    assert len(set(NAMES)) == len(NAMES)
    assert len(UNITS) == len(set(UNITS))
