"""Synthetic data: a recipe, its answers and its seed determine the file, whatever interrupts the generation."""

import json
import random
import resource
from itertools import pairwise

import pytest
from small_writer import a_recipe

from rmkv_cli.data.synthetic import REFUSED, Answer, generate_data
from rmkv_cli.data.synthetic.generate import journal_path
from rmkv_cli.data.synthetic.journal import open_journal
from rmkv_cli.data.synthetic.requests import make_requests
from rmkv_cli.data.synthetic.slots import cut
from rmkv_cli.errors import UserError

DOCUMENTS = {
    "a.txt": "\n\n".join(f"Paragraph {i} of a has its own words. " * 3 for i in range(9)),
    "b.txt": "A short one.",
}


class Writer:
    """Answers requests in an order drawn from its seed, and notes which it got; it fails after `most` of them."""

    def __init__(self, seed=0, most=None, answer=None):
        self.asked = []
        self._seed, self._most = seed, most
        self._answer = answer or (lambda r: Answer(f"{r.prompt} {random.Random(r.key).random()}", "stop", 2, 3))

    def __call__(self, requests, done):
        for request in random.Random(self._seed).sample(requests, len(requests)):
            if len(self.asked) == self._most:
                raise UserError("the server is gone")
            self.asked.append(request.number)
            done(request, self._answer(request))


def made(recipe, folder, name, writer=None, identity="w"):
    out = folder / f"{name}.jsonl"
    report = generate_data(recipe, folder, out, writer or Writer(), identity)
    return out.read_bytes(), report


@pytest.fixture
def folder(tmp_path):
    for name, text in DOCUMENTS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "words.txt").write_text("\nred\r\nblue\n\n")
    return tmp_path


def test_rows_do_not_depend_on_the_order_in_which_answers_come(folder):
    files = {made(a_recipe(), folder, f"out{seed}", Writer(seed))[0] for seed in range(5)}
    assert len(files) == 1
    rows = [json.loads(line) for line in files.pop().splitlines()]
    assert [row["seed"] for row in rows] == list(range(40))
    assert {key: rows[3][key] for key in ("writer", "license", "verdict")} == {
        "writer": "m",
        "license": "unknown",
        "verdict": "accepted",
    }
    assert rows[3]["response"].startswith(rows[3]["prompt"])


def test_a_seed_draws_other_prompts_and_a_larger_count_adds_some(folder):
    few, many = (make_requests(a_recipe(count=count), folder, "w") for count in (10, 30))
    assert many[:10] == few
    others = make_requests(a_recipe(count=10, seed=100), folder, "w")
    assert [request.prompt for request in others] != [request.prompt for request in few]


@pytest.mark.parametrize("most", [0, 1, 17, 39])
def test_after_a_failure_only_unanswered_requests_are_sent(folder, most):
    first, second = Writer(1, most), Writer(2)
    with pytest.raises(UserError, match="the server is gone"):
        made(a_recipe(), folder, "out", first)
    assert not (folder / "out.jsonl").exists()
    data, report = made(a_recipe(), folder, "out", second)
    assert sorted(first.asked + second.asked) == list(range(40))
    assert report.answered_before == most
    assert data == made(a_recipe(), folder, "other")[0]


def test_an_interruption_reports_how_to_continue(folder, capsys):
    with pytest.raises(UserError):
        made(a_recipe(), folder, "out", Writer(1, 17))
    assert "17 answers saved in" in capsys.readouterr().err


def test_filters_and_rows_change_without_a_request(folder):
    made(a_recipe(), folder, "out")
    (folder / "out.jsonl").unlink()
    silent = Writer(most=0)
    data, report = made(a_recipe(row={"text": "{topic}: {response}"}), folder, "out", silent)
    assert report.rows == 40
    assert json.loads(data.splitlines()[0])["text"].split(":")[0] in ("cats", "dogs", "trees")


def test_other_writers_and_other_sampling_are_other_requests(folder):
    recipe = a_recipe()
    keys = {request.key for request in make_requests(recipe, folder, "w")}
    hotter = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"temperature": 1.5})})
    for other in (make_requests(recipe, folder, "v"), make_requests(hotter, folder, "w")):
        assert not keys & {request.key for request in other}


def test_an_incomplete_last_line_is_dropped_wherever_it_ends(folder):
    whole, _ = made(a_recipe(count=3), folder, "out")
    journal = journal_path(folder / "out.jsonl")
    data = journal.read_bytes()
    lines = data.splitlines(keepends=True)
    for size in range(len(data) + 1):
        journal.write_bytes(data[:size])
        left = len(data[:size].splitlines(keepends=True)) - (not data[:size].endswith(b"\n") and size > 0)
        with open_journal(journal) as opened:
            assert len(opened.answers) == left
        assert journal.read_bytes() == b"".join(lines[:left])
    journal.write_bytes(data[:-5])
    (folder / "out.jsonl").unlink()
    again = Writer()
    assert made(a_recipe(count=3), folder, "out", again)[0] == whole
    assert len(again.asked) == 1


def test_a_damaged_line_is_named(folder):
    made(a_recipe(count=3), folder, "out")
    journal = journal_path(folder / "out.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"{}\n" + lines[2])
    with pytest.raises(UserError, match=r"out\.jsonl\.journal:2: is damaged; remove this line"), open_journal(journal):
        pass


def test_two_processes_do_not_share_a_journal(folder):
    writer = Writer()
    with (
        open_journal(journal_path(folder / "out.jsonl")),
        pytest.raises(UserError, match="is in use by another process"),
    ):
        made(a_recipe(), folder, "out", writer)
    assert writer.asked == []


def test_an_answer_that_cannot_be_written_leaves_no_partial_line(folder):
    with open_journal(folder / "x") as journal:
        journal.add("a", Answer("kept", "stop"))
        before = (folder / "x").read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))  # as a disk with 10 bytes left
        try:
            with pytest.raises(OSError, match="File too large"):
                journal.add("b", Answer("lost", "stop"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (folder / "x").read_bytes() == before
        journal.add("c", Answer("kept", "stop"))
    with open_journal(folder / "x") as journal:
        assert list(journal.answers) == ["a", "c"]


def test_refused_requests_are_counted_and_sent_again_next_time(folder):
    def picky(request):
        return Answer("content filter", REFUSED) if request.number % 4 == 1 else Answer(request.key, "stop")

    _, report = made(a_recipe(), folder, "out", Writer(answer=picky))
    assert (report.rows, report.rejected["refused"].rows) == (30, 10)
    assert report.rejected["refused"].first == "content filter"
    (folder / "out.jsonl").unlink()
    again = Writer()
    assert made(a_recipe(), folder, "out", again)[1].rows == 40
    assert sorted(again.asked) == list(range(1, 40, 4))


def test_a_writer_that_refuses_everything_ends_generation(folder):
    writer = Writer(answer=lambda request: Answer("no such parameter", REFUSED))
    with pytest.raises(UserError, match="the writer refused the first 10 requests: no such parameter"):
        made(a_recipe(), folder, "out", writer)
    assert len(writer.asked) == 10


def test_equal_requests_are_sent_once(folder):
    writer = Writer()
    recipe = a_recipe(count=5)
    requests = make_requests(recipe, folder, "w")
    assert len({request.key for request in requests}) == 5  # the seeds differ
    made(recipe, folder, "out", writer)
    assert sorted(writer.asked) == [0, 1, 2, 3, 4]


def test_slots_come_from_lists_lines_and_passages(folder):
    slots = {
        "topic": {"values": ["x"]},
        "colour": {"file": "words.txt"},
        "passage": {"files": ["*.txt"], "characters": 150, "following": 500},
    }
    recipe = a_recipe(count=60, slots=slots, prompt="{passage}|{colour}", row={"text": "{passage}{passage_following}"})
    requests = make_requests(recipe, folder, "w")
    assert {request.filled["colour"] for request in requests} == {"red", "blue"}
    passages = [request.filled["passage"] for request in requests]
    number = len(set(passages))
    assert number > 9
    assert len(set(passages[:number])) == number  # each is used once before any is used again
    assert all(len(passage) <= 150 for passage in passages)
    assert "A short one." in passages
    lengths = [len(request.filled["passage_following"]) for request in requests]
    assert min(lengths) < 100
    assert max(lengths) > 400
    assert all("passage_following" not in request.prompt for request in requests)


def test_the_text_that_follows_a_passage_is_the_document_s(folder):
    (folder / "b.txt").unlink()
    text = DOCUMENTS["a.txt"]
    slots = {"passage": {"files": ["a.txt"], "characters": 150, "following": 10_000}}
    for request in make_requests(a_recipe(slots=slots, prompt="{passage}"), folder, "w"):
        following = request.filled["passage_following"]
        assert request.filled["passage"] + following in text


@pytest.mark.parametrize("seed", range(20))
def test_passages_cover_a_text_in_order(seed):
    draw = random.Random(seed)
    text = "".join(draw.choice(["word", "words ", "\n", "\n\n", " ", "x" * draw.randint(1, 60)]) for _ in range(80))
    size = draw.randint(1, 80)
    bounds = cut(text, size)
    assert all(0 < stop - start <= size for start, stop in bounds)
    assert all(before[1] <= after[0] for before, after in pairwise(bounds))
    left_out = "".join(
        text[a:b] for a, b in zip([0, *(s for _, s in bounds)], [*(s for s, _ in bounds), None], strict=True)
    )
    assert not left_out.strip()


def test_a_slot_s_value_is_not_a_template(folder):
    slots = {"topic": {"values": ["{other}"]}, "other": {"values": ["filled"]}}
    requests = make_requests(a_recipe(count=1, slots=slots, prompt='{topic} {"a": "{b c}"}'), folder, "w")
    assert requests[0].prompt == '{other} {"a": "{b c}"}'


@pytest.mark.parametrize(
    ("slot", "words"),
    [
        ({"file": "absent.txt"}, "absent.txt: no such file"),
        ({"file": "blank.txt"}, "blank.txt: has only empty lines"),
        ({"file": "wide.txt"}, "wide.txt: is UTF-16, where UTF-8 is expected"),
        ({"files": ["no*.md"]}, "no*.md: no such file"),
        ({"files": ["blank.txt"]}, "slots.topic: its files contain no text"),
        ({"files": ["bad.jsonl"]}, "bad.jsonl:1: is not valid JSON"),
    ],
)
def test_a_slot_that_cannot_be_filled_is_named_before_any_request(folder, slot, words):
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "wide.txt").write_text("hello", encoding="utf-16")
    (folder / "bad.jsonl").write_text("{")
    writer = Writer()
    with pytest.raises(UserError) as caught:
        made(a_recipe(slots={"topic": slot}), folder, "out", writer)
    assert words in str(caught.value)
    assert writer.asked == []


def test_an_existing_file_is_not_overwritten(folder):
    (folder / "out.jsonl").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        made(a_recipe(), folder, "out")
    assert (folder / "out.jsonl").read_text() == "mine"
