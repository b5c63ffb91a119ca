"""A task's accuracy matches plain loops, cell by cell, in bounded memory."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_model import make_model

from rmkv_cli.config import CopySource, MemoryConfig, MixConfig, ModelConfig, NeedleSource, RecallSource, parse
from rmkv_cli.data.mix import prepare
from rmkv_cli.data.tasks import Example, plain_haystack, task_example
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import find_task, held_out_text, task_accuracy, tasks
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(iter(["the cat sat on the mat. " * 20]), 280)
RECALL = RecallSource(pairs=[1, 3], segments=[0, 2], keys=4, values=4, noise=4)


def small_model(**rest):
    return make_model(vocab_size=280, **rest)


def random_examples(rng, row, segments):
    """Two kinds of token, and answers of one to three tokens, of which a random model gets some right."""
    tokens = rng.integers(7, 9, 5 * segments + int(rng.integers(6, 20)))
    starts = np.sort(rng.choice(len(tokens) - 3, min(int(row), len(tokens) - 3), replace=False))
    return Example(tokens, [(int(a), int(a) + 1 + int(rng.integers(3))) for a in starts])


@pytest.mark.parametrize("batch_tokens", [1, 16, 8192])
def test_accuracies_match_plain_loops(monkeypatch, batch_tokens):
    made = []

    def make(task, tokenizer, noise, rng, row, segments):
        made.append((row, segments, random_examples(rng, row, segments)))
        return made[-1][2]

    monkeypatch.setattr(tasks, "make_example", make)
    model = small_model()
    with torch.no_grad():
        model.embedding.weight[9:] = model.embedding.weight[:7] = 0  # the guess is one of the two
        model.embedding.weight[7] = -model.embedding.weight[8]
    report = task_accuracy(model, RECALL, TOKENIZER, examples=10, batch_tokens=batch_tokens)
    counts = {}
    for row, segments, example in made:
        ids = torch.tensor([[TOKENIZER.eod, *example.tokens]])
        right = model(ids)[0].argmax(-1)[0, :-1] == ids[0, 1:]
        for start, stop in example.answers:
            counts.setdefault((row, segments), []).append(bool(right[start:stop].all()))
    assert [(c.row, c.segments) for c in report.cells] == list(counts) == [(1, 0), (1, 2), (3, 0), (3, 2)]
    for cell, answers in zip(report.cells, counts.values(), strict=True):
        assert (cell.answers, cell.right) == (len(answers), sum(answers))
        assert cell.accuracy == pytest.approx(np.mean(answers))
    assert 0 < sum(cell.right for cell in report.cells) < sum(cell.answers for cell in report.cells)


def test_a_model_that_has_learned_the_task_is_right_and_one_without_memory_guesses():
    torch.manual_seed(0)
    shape = {"vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "lookback": 0}
    model = RMKV(ModelConfig(**shape, intermediate_size=32, segment_length=4, memory=MemoryConfig(slots=2)))
    model.embedding.weight.data.mul_(15)  # learns sooner
    task = RecallSource(pairs=[1], segments=[1], keys=1, values=2, noise=2, segment_length=4)
    noise = plain_haystack(task, TOKENIZER)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        examples = [task_example(task, TOKENIZER, noise, [step, i]) for i in range(16)]
        ids = torch.tensor(np.stack([[TOKENIZER.eod, *e.tokens] for e in examples]))
        start, stop = examples[0].answers[0]
        loss = F.cross_entropy(model(ids[:, :stop])[0][:, start], ids[:, stop])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wide = task.model_copy(update={"segments": [1, 3]})
    for cell in task_accuracy(model, wide, TOKENIZER, seed=5).cells:
        assert (cell.accuracy, cell.standard_error) == (1, 0)
    with torch.no_grad():
        model.blocks[0].attention.out.weight.zero_()
    for cell in task_accuracy(model, wide, TOKENIZER, seed=5).cells:
        assert cell.accuracy < 0.8
    assert model.training


def test_a_cell_depends_on_the_seed_and_on_itself_alone(monkeypatch):
    seen = []
    make = tasks.make_example
    monkeypatch.setattr(tasks, "make_example", lambda *a: seen.append(make(*a)) or seen[-1])

    def documents(task, **rest):
        seen.clear()
        task_accuracy(small_model(), task, TOKENIZER, examples=2, **rest)
        return [e.tokens.tolist() for e in seen]

    whole = documents(RECALL)
    assert documents(RECALL) == whole
    assert documents(RECALL, batch_tokens=1) == whole
    assert documents(RECALL.model_copy(update={"pairs": [3], "segments": [2, 2]})) == whole[-2:]
    assert documents(RECALL, seed=1) != whole
    assert len({tuple(d) for d in whole}) == 8


def test_noise_is_in_segments_of_the_task_whatever_the_model_s_are():
    tokens = []
    model = small_model()
    forward = model.hidden
    model.hidden = lambda ids, state: tokens.append(ids.numel()) or forward(ids, state)
    task = RECALL.model_copy(update={"pairs": [1], "segments": [9], "segment_length": 7})
    advanced = []
    report = task_accuracy(model, task, TOKENIZER, examples=3, advance=advanced.append)
    assert sum(tokens) == 3 * (1 + 2 + 9 * 7 + 2)
    assert sum(advanced) == pytest.approx(3)
    assert report.task["segment_length"] == 7


def test_a_long_way_is_read_segment_by_segment_and_the_head_at_the_answers_alone(monkeypatch):
    model = small_model()
    widths, headed = [], []
    hidden, head = model.hidden, model.head
    monkeypatch.setattr(model, "hidden", lambda ids, state: widths.append(ids.shape) or hidden(ids, state))
    monkeypatch.setattr(model, "head", lambda x: headed.append(x.shape[:-1].numel()) or head(x))
    task = CopySource(length=[4], segments=[100], alphabet=4, noise=4, segment_length=5)
    task_accuracy(model, task, TOKENIZER, examples=5, batch_tokens=10)
    assert max(rows * width for rows, width in widths) <= 10
    assert sum(headed) == 5 * 4


def test_the_standard_error_takes_a_document_as_one_draw():
    cell = tasks._cell(1, 0, np.array([[2, 2], [2, 0]]))
    assert (cell.accuracy, cell.standard_error) == (0.5, 0.5)
    ones = np.stack([np.ones(100, int), np.arange(100) < 90], axis=1)
    assert tasks._cell(1, 0, ones).standard_error == pytest.approx(math.sqrt(0.9 * 0.1 / 99))
    assert tasks._cell(1, 0, np.array([[3, 1]])).standard_error is None


def test_a_task_that_does_not_fit_the_model_is_refused():
    with pytest.raises(UserError, match="sees the answers"):
        task_accuracy(small_model(memory={"carry": "layers", "store": 0}), RECALL, TOKENIZER)
    with pytest.raises(UserError, match="lower keys, values or noise"):
        task_accuracy(small_model(), RecallSource(keys=1000), TOKENIZER)
    learned = small_model(position="learned", max_position_embeddings=20)
    with pytest.raises(UserError, match="learned positions end at 20"):
        task_accuracy(learned, RECALL.model_copy(update={"segments": [10]}), TOKENIZER)
    with pytest.raises(UserError, match="examples: should be 1 or more, got 0"):
        task_accuracy(small_model(), RECALL, TOKENIZER, examples=0)
    with pytest.raises(UserError, match="the text of 'prose', which is missing"):
        task_accuracy(small_model(), NeedleSource(text="prose"), TOKENIZER)
    broken = small_model()
    broken.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not numbers"):
        task_accuracy(broken, RECALL, TOKENIZER)


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    for i in range(20):
        (place / f"{i}.txt").write_text(f"{i}. the cat sat on the mat. " * 5)
    sources = [
        {"kind": "files", "name": "prose", "weight": 1, "files": ["*.txt"]},
        {"kind": "needle", "name": "pin", "text": "prose", "depth": [0.5], "segments": [2]},
        {"kind": "needle", "name": "another"},
    ]
    config = parse(MixConfig, {"validation": 0.3, "tokens": 3000, "sources": sources}, "mix")
    prepare(config, place, TOKENIZER, place / "mix", 1)
    return place / "mix"


def test_a_task_is_taken_from_a_mix_with_its_noise(mix, monkeypatch):
    task = find_task(NeedleSource, mix, {"segments": [3]})
    assert (task.name, task.text, task.depth, task.segments) == ("pin", "prose", [0.5], [3])
    text = held_out_text(mix, "prose", TOKENIZER)
    assert 0 < len(text) < 20
    assert all("the cat sat" in TOKENIZER.decode(document.tolist()) for document in text)
    seen = []
    make = tasks.make_example
    monkeypatch.setattr(tasks, "make_example", lambda *a: seen.append(make(*a)) or seen[-1])
    report = task_accuracy(small_model(segment_length=16), task, TOKENIZER, text, examples=2)
    assert [(c.row, c.segments) for c in report.cells] == [(0.5, 3)]
    assert all("cat sat on" in TOKENIZER.decode(example.tokens.tolist()) for example in seen)


def test_wrong_settings_are_reported(mix):
    assert find_task(RecallSource, None, {}) == RecallSource()
    assert find_task(RecallSource, None, {"keys": "7"}).keys == 7
    with pytest.raises(UserError, match="has no source of kind 'recall'"):
        find_task(RecallSource, mix, {})
    with pytest.raises(UserError, match="--set pair: unknown key; did you mean 'pairs'"):
        find_task(RecallSource, None, {"pair": [1]})
    with pytest.raises(UserError, match="--set pairs"):
        find_task(RecallSource, None, {"pairs": "many"})
    with pytest.raises(UserError, match="no document of its source 'verse' is held out"):
        held_out_text(mix, "verse", TOKENIZER)
    with pytest.raises(UserError, match="different tokenizer"):
        held_out_text(mix, "prose", train_tokenizer(iter(["other words " * 9]), 270))
