"""Tasks: every answer follows from the document's statements, and from nothing else."""

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from rmkv_cli.config import CopySource, FactsSource, NeedleSource, RecallSource, ReverseSource
from rmkv_cli.data.tasks import (
    RandomHaystack,
    TextHaystack,
    cycle_documents,
    make_example,
    plain_haystack,
    require_vocabulary,
    row_axis,
    task_example,
)
from rmkv_cli.data.tasks.facts import DROPS, MOVES, TAKES, make_story
from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import train_tokenizer

S = 16


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(iter(["The grass is green. One of the special magic numbers is: 12."] * 2), 400)


@pytest.fixture
def ask(tokenizer):
    """Makes an example of a task with its own plain noise."""

    def make(task, row, segments, seed=0):
        rng = np.random.default_rng(seed)
        return make_example(task, tokenizer, plain_haystack(task, tokenizer), rng, row, segments)

    return make


def answers(example):
    return [example.tokens[start:stop].tolist() for start, stop in example.answers]


class TestRecall:
    @pytest.mark.parametrize("pairs", [1, 5, 20])
    @pytest.mark.parametrize("segments", [0, 1, 9])
    def test_pairs_then_noise_then_the_marker_and_every_key_with_its_value(self, ask, pairs, segments):
        task = RecallSource(keys=20, values=30, noise=10, segment_length=S)
        example = ask(task, pairs, segments)
        shown, noise, asked = np.split(example.tokens, [2 * pairs, 2 * pairs + segments * S])
        assert asked[0] == 7 + 20 + 30 + 10
        value_of = dict(shown.reshape(-1, 2).tolist())
        assert len(value_of) == pairs
        assert dict(asked[1:].reshape(-1, 2).tolist()) == value_of
        assert len(asked) == 1 + 2 * pairs
        assert all(7 <= key < 27 <= value < 57 for key, value in value_of.items())
        assert ((noise >= 57) & (noise < 67)).all()
        first = 2 * pairs + segments * S + 2
        assert example.answers == [(first + 2 * i, first + 2 * i + 1) for i in range(pairs)]

    def test_the_order_of_the_questions_does_not_reveal_that_of_the_pairs(self, ask):
        orders = Counter()
        for seed in range(600):
            a, _, b, _, c, _, _, *asked = ask(RecallSource(), 3, 0, seed).tokens.tolist()
            orders[tuple([a, b, c].index(key) for key in asked[::2])] += 1
        assert len(orders) == 6
        assert min(orders.values()) > 60

    def test_the_last_value_of_an_overwritten_key_counts(self, ask):
        example = ask(RecallSource(rounds=3, values=1000, noise=2, keys=9, text="any"), 9, 0)
        shown = example.tokens[: 2 * 3 * 9].reshape(3, 9, 2)
        assert all(set(shown[i, :, 0]) == set(shown[0, :, 0]) for i in range(3))
        assert len({tuple(shown[i, :, 0]) for i in range(3)}) == 3
        asked = example.tokens[2 * 3 * 9 + 1 :].reshape(-1, 2)
        assert dict(asked.tolist()) == dict(shown[2].tolist()) != dict(shown[1].tolist())

    def test_fewer_queries(self, ask):
        example = ask(RecallSource(queries=4), 10, 1)
        keys = [int(example.tokens[start - 1]) for start, _ in example.answers]
        assert len(set(keys)) == len(keys) == 4
        assert len(ask(RecallSource(queries=4), 2, 1).answers) == 2

    @pytest.mark.parametrize("pairs", [1, 2, 7, 8, 40])
    @pytest.mark.parametrize("rounds", [1, 2])
    def test_straddling_pairs_are_split_by_a_segment_boundary(self, ask, pairs, rounds):
        task = RecallSource(straddle=True, segment_length=S, rounds=rounds, noise=5)
        document = [2, *ask(task, pairs, 3).tokens.tolist()]
        keys = [i for i, token in enumerate(document) if 7 <= token < 71]
        shown = keys[: pairs * rounds]
        assert shown[0] < S + 1
        assert (shown[len(shown) // 2] + 1) % S == 0
        assert len(document) == shown[-1] + 2 + 3 * S + 1 + 2 * pairs

    def test_with_text_the_tokens_are_the_vocabularys_last(self, tokenizer):
        task = RecallSource(text="book", keys=3, values=4, segment_length=S)
        noise = TextHaystack(cycle_documents([np.arange(50, 90)]))
        example = make_example(task, tokenizer, noise, np.random.default_rng(0), 3, 5)
        last = tokenizer.vocab_size
        assert example.tokens[6 : 6 + 5 * S].tolist() == [51 + i % 39 for i in range(5 * S)]  # without its first token
        assert example.tokens[6 + 5 * S] == last - 1
        assert set(example.tokens[:6:2]) == {last - 8, last - 7, last - 6}
        assert all(last - 5 <= token < last - 1 for token in example.tokens[1:6:2])


class TestCopy:
    @pytest.mark.parametrize(
        ("source", "again"), [(CopySource, lambda shown: shown), (ReverseSource, lambda shown: shown[::-1])]
    )
    def test_each_token_again_is_an_answer(self, ask, source, again):
        example = ask(source(alphabet=30, noise=5, repeats=2, segment_length=S), 40, 2)
        shown, noise, (marker, *rest) = np.split(example.tokens, [40, 40 + 2 * S])
        assert rest == [*again(shown), *again(shown)]
        assert marker == 7 + 30 + 5
        assert (shown < 37).all()
        assert ((noise >= 37) & (noise < 42)).all()
        assert [token for (token,) in answers(example)] == rest


class TestNeedle:
    @pytest.mark.parametrize("value", ["number", "uuid", "word"])
    @pytest.mark.parametrize(("needles", "depth"), [(1, 0), (1, 0.5), (4, 1), (30, 0.25)])
    def test_the_sentence_of_the_key_contains_its_value(self, ask, tokenizer, value, needles, depth):
        for seed in range(5):
            example = ask(NeedleSource(value=value, needles=needles, segment_length=S), depth, 60, seed)
            text = tokenizer.decode(example.tokens.tolist())
            shown = re.findall(rf" One of the special magic {value}s for ([a-z-]+) is: ([0-9a-z-]+)\.", text)
            key, answer = re.search(r" magic [a-z]+ for ([a-z-]+) is: ([0-9a-z-]+)$", text).groups()
            assert len(dict(shown)) == len(shown) == needles
            assert dict(shown)[key] == answer
            assert [tokenizer.decode(ids) for ids in answers(example)] == [f" {answer}"]
            pattern = {"number": r"\d{7}", "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]+", "word": r"[a-z]+-[a-z]+"}
            assert re.fullmatch(pattern[value], answer)

    @pytest.mark.parametrize("depth", [0, 0.3, 1])
    def test_the_needle_is_at_its_depth_within_the_segments_of_noise(self, tokenizer, depth):
        task, noise = NeedleSource(needles=1, segment_length=S), RandomHaystack(7, 1)
        tokens = make_example(task, tokenizer, noise, np.random.default_rng(0), depth, 10).tokens
        (elsewhere,) = np.nonzero(tokens != 7)
        assert (tokens == 7).sum() == 10 * S
        assert elsewhere[0] == round(depth * 10 * S)

    def test_the_distracting_sentences_are_anywhere(self, tokenizer):
        task, noise = NeedleSource(needles=2, segment_length=S), RandomHaystack(7, 1)
        firsts = []
        for seed in range(50):
            tokens = make_example(task, tokenizer, noise, np.random.default_rng(seed), 1, 10).tokens
            firsts.append(np.flatnonzero(tokens != 7)[0] / (10 * S))
        assert min(firsts) < 0.2
        assert max(firsts) > 0.8

    def test_the_plain_noise_is_rulers(self, ask, tokenizer):
        text = tokenizer.decode(ask(NeedleSource(segment_length=100), 0, 2).tokens.tolist())
        assert (
            text.count("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.") > 1
        )


def answer(statements, question):
    """Return the answer to a question that follows from the statements, or None if none does."""
    place, holder, trail = {}, {}, {}
    for statement in statements:
        person, verb, what = re.fullmatch(r"(\w+) (.+) the (\w+)\.", statement).groups()
        if verb in MOVES:
            place[person] = what
            for thing in [thing for thing, who in holder.items() if who == person]:
                trail[thing].append(what)
        elif verb in TAKES:
            holder[what] = person
            if trail.get(what, [None])[-1] != place.get(person) or what not in trail:
                trail.setdefault(what, []).append(place.get(person))
        else:
            assert verb in DROPS
            holder.pop(what, None)
    if match := re.fullmatch(r"Where is (\w+)\?", question):
        return place.get(match[1])
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return trail.get(match[1], [None])[-1]
    thing, there = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question).groups()
    visited = trail.get(thing, [])
    return visited[visited.index(there) - 1] if there in visited[1:] else None


class TestFacts:
    @pytest.mark.parametrize("facts", [1, 2, 3])
    def test_an_answer_needs_exactly_the_given_number_of_statements(self, facts):
        places = Counter()
        for seed in range(60):
            *statements, ((question, _), (place, _)) = make_story(
                np.random.default_rng(seed), FactsSource(sentences=9), facts
            )
            story = [statement for ((statement, _),) in statements]
            assert len(story) == 9
            assert answer(story, question) == place
            places[place] += 1
            fewer = [answer(part, question) for part in combinations(story, facts - 1)]
            enough = [answer(part, question) for part in combinations(story, facts)]
            assert place not in fewer
            assert place in enough
        assert len(places) > 4

    def test_nobody_takes_what_is_elsewhere_or_drops_what_another_has(self):
        place, holder, lies = {}, {}, {}
        for ((statement, _),) in make_story(np.random.default_rng(0), FactsSource(sentences=2000), 1)[:-1]:
            person, verb, what = re.fullmatch(r"(\w+) (.+) the (\w+)\.", statement).groups()
            if verb in MOVES:
                assert place.get(person) != what
                place[person] = what
            elif verb in TAKES:
                assert what not in holder
                assert lies.get(what, place[person]) == place[person]
                holder[what] = person
            else:
                assert holder.pop(what) == person
                lies[what] = place[person]

    @pytest.mark.parametrize("facts", [1, 2, 3])
    def test_questions_along_a_story_are_answered_by_its_statements_so_far(self, tokenizer, facts):
        task, noise = FactsSource(sentences=12, along=True, segment_length=S), RandomHaystack(7, 1)
        asked = counted = 0
        for seed in range(20):
            example = make_example(task, tokenizer, noise, np.random.default_rng(seed), facts, 5)
            counted += len(example.answers)
            text = tokenizer.decode(example.tokens[example.tokens != 7].tolist())
            story = []
            for statement, question, place in re.findall(r" (?:([A-Z][^.?]*\.)|([A-Z][^.?]*\?) (\w+))", text):
                if statement:
                    story.append(statement)
                else:
                    assert answer(story, question) == place
                    asked += 1
            assert len(story) == 12
        assert asked == counted > 3 * 20

    @pytest.mark.parametrize("sentences", [3, 10])
    def test_the_statements_are_spread_in_order_through_the_noise(self, tokenizer, sentences):
        task, noise = FactsSource(facts=[3], sentences=sentences, segment_length=S), RandomHaystack(7, 1)
        firsts = []
        for seed in range(20):
            example = make_example(task, tokenizer, noise, np.random.default_rng(seed), 3, 20)
            assert (example.tokens == 7).sum() == 20 * S
            text = tokenizer.decode(example.tokens[example.tokens != 7].tolist())
            *story, question, place = re.findall(r" ([A-Z][^.?]*[.?]|\w+$)", text)
            assert len(story) == sentences
            assert answer(story, question) == place
            assert [tokenizer.decode(ids) for ids in answers(example)] == [f" {place}"]
            firsts.append(np.flatnonzero(example.tokens != 7)[0])
        assert len(set(firsts)) > 10


def test_zero_segments_mean_no_noise(ask):
    assert len(ask(RecallSource(), 1, 0).tokens) == 5
    assert len(ask(CopySource(), 3, 0).tokens) == 7
    for task in (NeedleSource(needles=3), FactsSource()):
        example = ask(task, 1, 0)
        assert example.answers[0][1] == len(example.tokens)


@pytest.mark.parametrize("source", [RecallSource, CopySource, ReverseSource, NeedleSource, FactsSource])
def test_the_seed_determines_an_example_and_every_list_is_sampled(tokenizer, source):
    task = source(
        segments=[0, 3], segment_length=500, **{row_axis(source())[0]: [1, 3] if source != NeedleSource else [0, 1]}
    )

    def first(seed):
        noise = plain_haystack(task, tokenizer)
        return [task_example(task, tokenizer, noise, [seed, number]) for number in range(40)]

    once, again, other = ([e.tokens.tolist() for e in first(seed)] for seed in (2, 2, 3))
    assert once == again != other
    long = [len(tokens) > 1500 for tokens in once]
    assert 8 < sum(long) < 32
    assert all(example.tokens.dtype == np.int64 for example in first(0))


def test_rows_are_the_difficulty_of_each_task():
    assert row_axis(RecallSource(pairs=[2, 4])) == ("pairs", [2, 4])
    assert row_axis(CopySource(length=[2])) == row_axis(ReverseSource(length=[2])) == ("length", [2])
    assert row_axis(NeedleSource(depth=[0.5])) == ("depth", [0.5])
    assert row_axis(FactsSource(facts=[2])) == ("facts", [2])


class TestHaystacks:
    def test_random_tokens_are_uniform(self):
        counts = np.bincount(RandomHaystack(7, 5).take(np.random.default_rng(0), 50_000), minlength=13)
        assert counts[:7].sum() == counts[12:].sum() == 0
        assert abs(counts[7:12] / 10_000 - 1).max() < 0.05

    def test_text_continues_across_documents_and_restarts_after_the_last(self):
        noise = TextHaystack(cycle_documents([np.array([2, 10, 11], np.uint16), np.array([2]), np.array([2, 12])]))
        rng = np.random.default_rng(0)
        assert [noise.take(rng, n).tolist() for n in (1, 0, 4, 2)] == [[10], [], [11, 12, 10, 11], [12, 10]]
        assert noise.take(rng, 5).dtype == np.int64

    def test_text_resumes_at_a_saved_place(self):
        documents = [np.array([2, 10, 11]), np.array([2]), np.array([2, 12])]
        rng = np.random.default_rng(0)
        whole = TextHaystack(cycle_documents(documents)).take(rng, 20).tolist()
        for n in range(9):
            noise = TextHaystack(cycle_documents(documents))
            noise.take(rng, n)
            again = TextHaystack(cycle_documents(documents), noise.place)
            assert again.take(rng, 20 - n).tolist() == noise.take(rng, 20 - n).tolist() == whole[n:]

    def test_text_without_a_token_is_refused(self):
        with pytest.raises(UserError, match="no text"):
            TextHaystack(cycle_documents([np.array([2])])).take(np.random.default_rng(0), 1)


@pytest.mark.parametrize(
    ("task", "need"),
    [
        (RecallSource(keys=10, values=5, noise=3), 7 + 18 + 1),
        (RecallSource(keys=10, values=5, noise=3, text="book"), 7 + 15 + 1),
        (CopySource(alphabet=9, noise=3), 7 + 12 + 1),
    ],
)
def test_a_vocabulary_must_fit_the_task_s_tokens(task, need):
    require_vocabulary(task, range(7, need), need)
    with pytest.raises(UserError, match=f"task '{task.kind}': .* needs {need} ids, but the tokenizer has {need - 1}"):
        require_vocabulary(task, range(7, need - 1), need - 1)


@pytest.mark.parametrize("task", [NeedleSource(needles=4, queries=3), FactsSource(sentences=20, queries=3)])
def test_several_questions_about_one_text(task, tokenizer):
    noise = plain_haystack(task, tokenizer)
    example = make_example(task, tokenizer, noise, np.random.default_rng(0), 1, segments=4)
    assert len(example.answers) == 3
    asked = [tokenizer.decode(example.tokens[start:stop].tolist()) for start, stop in example.answers]
    text = tokenizer.decode(example.tokens[: example.answers[0][0]].tolist())
    assert all(answer in text for answer in asked)
