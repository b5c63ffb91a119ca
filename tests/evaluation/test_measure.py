import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_documents import EOD, make_documents, random_documents
from small_model import make_model

from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import measure
from rmkv_cli.evaluation.measure import choose, long_length, read_losses, sample
from rmkv_cli.tokenizer import Special, train_tokenizer

LENGTHS = [1, 2, 5, 6, 10, 11, 12, 12, 30, 63, 64, 65, 129, 140]
SOURCES = [0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0]


def losses_one_by_one(model, documents):
    """Each document in one forward of its own: (its index, position, nats) of every token."""
    found = []
    for i in range(len(documents)):
        tokens = documents[i].tolist()
        logits, _ = model(torch.tensor([tokens]))
        losses = F.cross_entropy(logits[0], torch.tensor([*tokens[1:], EOD]), reduction="none")
        found += [(i, position, loss) for position, loss in enumerate(losses.tolist())]
    return found


@pytest.mark.parametrize(
    ("memory", "batch_tokens"),
    [({}, 1), ({}, 37), ({}, 8192), ({"cell": "lstm"}, 8192), ({"carry": "layers", "store": 0}, 37)],
)
def test_it_agrees_with_one_forward_a_document(memory, batch_tokens):
    model, documents = make_model(memory=memory), random_documents(LENGTHS, sources=SOURCES)
    expected = losses_one_by_one(model, documents)
    read = []
    report = measure(model, documents, batch_tokens=batch_tokens, advance=read.append)

    nats = [loss for _, _, loss in expected]
    assert report.loss == pytest.approx(np.mean(nats), abs=1e-6)
    assert report.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-6)
    of_text = [loss for i, _, loss in expected if documents.sizes[i]]  # the first document is empty
    assert report.bits_per_byte == pytest.approx(sum(of_text) / math.log(2) / documents.sizes.sum(), abs=1e-6)
    assert (report.documents, report.tokens, report.bytes) == (14, sum(LENGTHS), 3 * (sum(LENGTHS) - 14))
    assert (report.available_documents, report.available_tokens, report.cut) == (14, sum(LENGTHS), 0)
    assert sum(read) == sum(LENGTHS)

    for source, name in enumerate("ab"):
        nats = [loss for i, _, loss in expected if SOURCES[i] == source]
        score = report.by_source[name]
        assert (score.tokens, score.documents) == (len(nats), SOURCES.count(source))
        assert score.loss == pytest.approx(np.mean(nats), abs=1e-6)

    assert [(part.first, part.last) for part in report.by_position] == [(0, 63), (64, 127), (128, 139)]
    for part in report.by_position:
        nats = [loss for _, position, loss in expected if part.first <= position <= part.last]
        assert part.tokens == len(nats)
        assert part.loss == pytest.approx(np.mean(nats), abs=1e-6)

    assert (report.long_documents.documents, report.long_documents.min_tokens) == (2, 128)
    assert [(part.first, part.last) for part in report.long_documents.by_position] == [(0, 63), (64, 127)]
    for part in report.long_documents.by_position:
        nats = [x for i, position, x in expected if LENGTHS[i] >= 128 and part.first <= position <= part.last]
        assert part.tokens == len(nats) == 128
        assert part.loss == pytest.approx(np.mean(nats), abs=1e-6)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([200], 0),  # a single document
        ([127, 500], 0),  # a single bucket
        ([128, 500], 128),
        ([256, 511], 256),
        ([*range(100, 200)], 128),  # a fifth of 100 reach 180
        ([300] * 31 + [128] * 1000, 128),
        ([300] * 32 + [128] * 1000, 256),
    ],
)
def test_documents_are_long_where_enough_of_them_reach_the_end_of_a_bucket(lengths, expected):
    assert long_length(np.array(lengths)) == expected


def test_parts_add_up_to_the_whole():
    model, documents = make_model(), random_documents(LENGTHS, sources=SOURCES)
    read = [[], [], []]
    parts = [read_losses(model, documents, batch_tokens=37, part=i, parts=3, advance=read[i].append) for i in range(3)]
    whole = read_losses(model, documents, batch_tokens=37)
    assert torch.allclose(sum(part.by_document for part in parts), whole.by_document, rtol=1e-6)
    assert torch.allclose(sum(part.by_bucket for part in parts), whole.by_bucket, rtol=1e-6)
    assert torch.equal(sum(part.counts for part in parts), whole.counts)
    assert [sum(each) for each in read] == [sum(sorted(LENGTHS)[i::3]) for i in range(3)]


def test_the_model_is_unchanged_and_evaluated_without_dropout():
    model = make_model(dropout=0.5)
    documents = random_documents([20, 30])
    quiet = measure(model, documents).loss
    model.train()
    assert measure(model, documents).loss == quiet
    assert model.training
    assert all(module.training for module in model.modules())
    with pytest.raises(UserError, match="the model only 13"):
        measure(model, random_documents([5], vocab_size=14))
    assert model.training


def test_long_documents_are_read_a_segment_at_a_time(monkeypatch):
    model = make_model(segment_length=7)
    documents = random_documents([600, 580, 590])
    read, headed = [], []
    hidden, head = model.hidden, model.head
    monkeypatch.setattr(model, "hidden", lambda ids, state: read.append(ids.numel()) or hidden(ids, state))
    monkeypatch.setattr(model, "head", lambda x: headed.append(x.shape[:-1].numel()) or head(x))
    measure(model, documents, batch_tokens=15)
    assert max(read) == 14  # two rows of a segment
    assert sum(read) <= 600 + 2 * 590 + 14  # and nothing is read twice
    assert max(headed) <= 14


def test_text_without_bytes_has_no_bits_per_byte():
    model = make_model()
    documents = random_documents([12, 9], sources=[0, 1], sizes=[0, 24])
    report = measure(model, documents)
    assert report.by_source["a"].bits_per_byte is None
    assert report.bytes == 24
    assert report.bits_per_byte == report.by_source["b"].bits_per_byte
    assert report.bits_per_byte == pytest.approx(report.by_source["b"].loss * 9 / 24 / math.log(2))


class TestTasks:
    """Of a task's documents only the answers count."""

    @pytest.fixture
    def documents(self):
        texts = [random_documents([n], seed=n)[0].tolist()[1:] for n in (30, 12, 75)]
        answers = [None, [(5, 6), (8, 10)], [(70, 74)]]
        return make_documents(texts, sources=[0, 1, 1], sizes=[90, 0, 0], answers=answers)

    @pytest.mark.parametrize("batch_tokens", [1, 8192])
    def test_it_agrees_with_one_forward_a_document(self, documents, batch_tokens):
        model, read = make_model(), []
        asked = {(1, 4), (1, 7), (1, 8), *((2, i) for i in range(69, 73))}  # the places before the answers
        found = losses_one_by_one(model, documents)
        expected = [(i, loss) for i, place, loss in found if i == 0 or (i, place) in asked]
        report = measure(model, documents, batch_tokens=batch_tokens, advance=read.append)
        assert (report.tokens, report.available_tokens, sum(read)) == (37, 37, 30 + 12 + 75)
        assert report.loss == pytest.approx(np.mean([loss for _, loss in expected]))
        assert report.by_source["b"].tokens == 7
        assert report.by_source["b"].loss == pytest.approx(np.mean([loss for i, loss in expected if i]))
        assert report.by_source["b"].bits_per_byte is None
        assert report.bits_per_byte == pytest.approx(report.by_source["a"].bits_per_byte)
        assert [(part.first, part.last, part.tokens) for part in report.by_position] == [(0, 63, 33), (64, 74, 4)]

    def test_positions_and_sources_without_answers_are_left_out(self):
        texts = [random_documents([150])[0].tolist()[1:]]
        documents = make_documents([*texts, texts[0][:9]], sources=[0, 1], sizes=[0, 0], answers=[[(140, 141)], []])
        report = measure(make_model(), documents)
        assert [(part.first, part.tokens) for part in report.by_position] == [(128, 1)]
        assert list(report.by_source) == ["a"]

    def test_a_budget_that_ends_before_the_first_answer_is_refused(self):
        documents = make_documents([[3] * 20], answers=[[(15, 17)]])
        assert measure(make_model(), documents, max_tokens=15).tokens == 1
        with pytest.raises(UserError, match="max_tokens = 14 ends before the first answer"):
            measure(make_model(), documents, max_tokens=14)


class TestConversations:
    """Where the answers of conversations alone are supervised, loss and bits per byte measure the answers."""

    TEXT = "Ünïcödé and some words, 12 and 345. "
    QUESTION = (Special.START, TEXT * 3, Special.END)

    @pytest.fixture
    def tokenizer(self):
        return train_tokenizer(iter([self.TEXT * 20]), 300)

    @pytest.fixture
    def documents(self, tokenizer):
        """A conversation that ends with an answer, one that ends with a question, and a text."""
        question, answer = tokenizer.encode_document(self.QUESTION)[1:], tokenizer.encode(self.TEXT)
        first, after = 1 + len(question), 1 + len(question) + len(answer)
        texts = [question + answer, question + answer + question, answer]
        sizes = [len(self.TEXT.encode()) * times for times in (4, 7, 1)]
        spans = [[(first, after + 1)], [(first, after + 1)], None]  # to the end, and to the next <start>
        return make_documents(texts, [0, 0, 1], sizes, tokenizer.vocab_size, spans)

    def test_they_are_about_the_answers_and_the_tokens_that_end_them(self, documents, tokenizer):
        model, answer = make_model(vocab_size=tokenizer.vocab_size), tokenizer.encode(self.TEXT)
        first = len(tokenizer.encode_document(self.QUESTION)) - 1  # what predicts the answer's first token
        nats = [
            loss
            for i, position, loss in losses_one_by_one(model, documents)
            if i == 2 or first <= position <= first + len(answer)
        ]
        report = measure(model, documents, tokenizer=tokenizer)
        assert report.tokens == report.available_tokens == len(nats) == 3 * (len(answer) + 1)
        assert report.loss == pytest.approx(np.mean(nats))
        assert report.bytes == 3 * len(self.TEXT.encode())
        assert report.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / report.bytes)
        without = measure(model, documents)
        assert without.bits_per_byte == report.by_source["b"].bits_per_byte
        assert without.by_source["a"].bits_per_byte is None

    def test_a_cut_answer_has_the_bytes_of_what_is_read_of_it(self, documents, tokenizer):
        most = len(tokenizer.encode_document(self.QUESTION)) + 4  # five tokens of an answer
        alone = make_documents(
            [documents[0].tolist()[1:]], None, [1], tokenizer.vocab_size, [[(most - 4, len(documents[0]) + 1)]]
        )
        report = measure(make_model(vocab_size=tokenizer.vocab_size), alone, max_tokens=most, tokenizer=tokenizer)
        scored = tokenizer.encode(self.TEXT)[:5]
        assert (report.tokens, report.bytes) == (5, sum(len(tokenizer.token_bytes(token)) for token in scored))


def test_without_any_answer_there_is_no_loss():
    with pytest.raises(UserError, match="no token of these documents is supervised"):
        measure(make_model(), make_documents([[3] * 20], answers=[[]]))


class TestBudget:
    def test_whole_documents_all_over_the_set_and_the_last_one_cut(self):
        lengths = np.random.default_rng(1).integers(1, 200, 5000)
        chosen, read = choose(lengths, 50_000)
        assert read.sum() == 50_000
        assert (read[:-1] == lengths[chosen[:-1]]).all()
        assert read[-1] <= lengths[chosen[-1]]
        assert len(set(chosen.tolist())) == len(chosen)
        assert lengths[chosen].mean() == pytest.approx(lengths.mean(), rel=0.1)  # neither the short nor the long ones
        assert chosen.mean() == pytest.approx(2500, rel=0.15)  # nor only the first
        assert choose(lengths, 50_000)[0].tolist() == chosen.tolist()

    def test_a_sample_keeps_the_shares_of_sources_and_lengths(self):
        draw = np.random.default_rng(2)
        lengths = np.concatenate(
            [draw.integers(10, 50, 20_000), draw.integers(1000, 3000, 300), [90_000, 70_000, 80_000]]
        )
        sources = np.repeat([0, 1, 2], [20_000, 300, 3])
        for budget in (20_000, 200_000, 1_200_000):
            chosen, read = sample(lengths, sources, budget)
            assert read.sum() == budget
            assert (read <= lengths[chosen]).all()
            assert len(set(chosen.tolist())) == len(chosen)
            fraction = budget / lengths.sum()
            assert np.bincount(sources[chosen], read) == pytest.approx(np.bincount(sources, lengths) * fraction, abs=9)
            long = lengths >= 32  # of the first source alone
            whole = lengths[:20_000][long[:20_000]].sum()
            assert read[long[chosen] & (sources[chosen] == 0)].sum() == pytest.approx(whole * fraction, abs=9)
            assert sample(lengths, sources, budget)[0].tolist() == chosen.tolist()

    def test_a_sample_without_a_budget_is_everything_and_bad_ones_are_refused(self):
        lengths, sources = np.array([3, 1, 2]), np.array([0, 1, 0])
        for budget in (None, 6, 7):
            assert sample(lengths, sources, budget)[1].tolist() == [3, 1, 2]
        with pytest.raises(UserError, match="max_tokens: should be 1 or more"):
            sample(lengths, sources, 0)
        with pytest.raises(UserError, match="no documents"):
            sample(lengths[:0], sources[:0], 5)

    def test_a_budget_beyond_everything_is_everything(self):
        chosen, read = choose(np.array([3, 1, 2]), 6)
        assert (chosen.tolist(), read.tolist()) == ([0, 1, 2], [3, 1, 2])

    def test_a_cut_document_counts_in_bytes_only_where_the_tokenizer_tells_them(self):
        text = "Ünïcödé and some words, 12 and 345. " * 20
        tokenizer = train_tokenizer(iter([text]), 300)
        ids = tokenizer.encode(text)
        ids[10:10] = [Special.THINK.id]  # no text: no bytes
        documents = make_documents([ids], sizes=[len(text.encode())], vocab_size=tokenizer.vocab_size)
        model = make_model(vocab_size=tokenizer.vocab_size)
        report = measure(model, documents, max_tokens=40)
        assert (report.tokens, report.cut, report.bits_per_byte) == (40, 1, None)
        report = measure(model, documents, max_tokens=40, tokenizer=tokenizer)
        scored = [token for token in ids[:40] if token != Special.THINK.id]
        assert report.bytes == sum(len(tokenizer.token_bytes(token)) for token in scored)
        assert report.bits_per_byte == pytest.approx(report.loss * 40 / report.bytes / math.log(2))
        whole = measure(model, documents, tokenizer=tokenizer)
        assert whole.bytes == len(text.encode())

    def test_bad_budgets_and_empty_sets_are_refused(self):
        with pytest.raises(UserError, match="max_tokens: should be 1 or more"):
            choose(np.array([3]), 0)
        with pytest.raises(UserError, match="no documents"):
            choose(np.array([], np.int64), None)


def test_documents_beyond_learned_positions_are_refused():
    model = make_model(position="learned")
    assert measure(model, random_documents([64])).tokens == 64
    with pytest.raises(UserError, match="has 65 tokens, but the model's learned positions end at 64"):
        measure(model, random_documents([65]))
