"""The results for lm-evaluation-harness match one forward pass over context and continuation."""

import math
from functools import cache

import pytest
import torch
from custom_tasks import QUESTIONS, make_custom_tasks
from foreign import foreign_files
from lm_eval.api.instance import Instance
from small_model import make_model
from small_run import TEXT

from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import harness_tasks
from rmkv_cli.evaluation.harness import HarnessModel
from rmkv_cli.evaluation.harness_tasks import harness_scores
from rmkv_cli.generation import SamplingConfig, generate
from rmkv_cli.tokenizer import Special, Tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(iter([TEXT * 20]), 280)
EOD = TOKENIZER.eod


def make(batch_tokens=8192, **shape):
    return HarnessModel(make_model(vocab_size=TOKENIZER.vocab_size, **shape), TOKENIZER, batch_tokens)


def random_ids(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(Special), TOKENIZER.vocab_size, (n,), generator=generator).tolist()


def directly(model, context, continuation):
    """ln p of a continuation's ids and whether they are the likeliest, by one forward over the whole."""
    logits = model(torch.tensor([context + continuation]))[0][0, len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    found = logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum()
    return found.item(), bool((logits.argmax(-1) == targets).all())


def likeliest(model, context, n):
    ids = list(context)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(context) :]


def requests(kind, *arguments):
    return [Instance(kind, {}, given, i, ("task", i, 1)) for i, given in enumerate(arguments)]


def read(model, monkeypatch):
    """Watch a model: the list that is returned gets the shape of all that it reads."""
    shapes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: shapes.append(tuple(ids.shape)) or hidden(ids, *rest))
    return shapes


class TestLikelihoods:
    @pytest.mark.parametrize(
        ("memory", "batch_tokens"),
        [({}, 1), ({}, 40), ({}, 8192), ({"cell": "lstm"}, 8192), ({"slots": 0, "store": 0}, 40)],
    )
    def test_they_are_those_of_one_forward_pass(self, memory, batch_tokens):
        lm = make(batch_tokens, memory=memory)
        contexts = [[EOD], *([EOD, *random_ids(n, seed=n)] for n in (3, 3, 4, 9, 37))]
        contexts[2][-1] = 7  # another one of the same length
        asked = [(context, random_ids(n, seed=n)) for n in (1, 6, 13) for context in contexts]
        asked += [(context, likeliest(lm.model, context, 4)) for context in contexts]
        found = lm._loglikelihood_tokens([(("", ""), *pair) for pair in asked])
        for (logprob, greedy), pair in zip(found, asked, strict=True):
            expected, expected_greedy = directly(lm.model, *pair)
            assert logprob == pytest.approx(expected, abs=1e-9)
            assert greedy == expected_greedy
        assert [greedy for _, greedy in found[-len(contexts) :]] == [True] * len(contexts)

    def test_a_context_is_read_once(self, monkeypatch):
        lm = make()
        shapes = read(lm.model, monkeypatch)
        contexts = [[EOD, *random_ids(n, seed=n)] for n in (40, 7, 23)]
        lm._loglikelihood_tokens([(("", ""), c, random_ids(6, seed=i)) for i in range(4) for c in contexts])
        assert sum(rows * length for rows, length in shapes) == sum(map(len, contexts)) + 12 * 5

    def test_only_the_memory_knows_what_is_beyond_the_window(self, monkeypatch):
        contexts = [[EOD, first, *random_ids(90)] for first in (20, 21)]
        asked = [(("", ""), context, [30, 31]) for context in contexts]
        remembering, forgetting = make(), make(memory={"slots": 0, "store": 0})
        shapes = read(remembering.model, monkeypatch)
        one, other = remembering._loglikelihood_tokens(asked)
        assert abs(one[0] - other[0]) > 1e-6
        assert max(length for _, length in shapes) <= remembering.model.config.segment_length
        one, other = forgetting._loglikelihood_tokens(asked)
        assert one[0] == pytest.approx(other[0], abs=1e-12)

    def test_a_context_begins_a_document_and_untrusted_text_stays_text(self):
        lm = make()
        pairs = [("the cat", " sat on"), ("", "the cat"), ("the cat ", "sat"), ("a<eod>b", "<pad> c"), ("cat", "")]
        found = lm.loglikelihood(requests("loglikelihood", *pairs))
        for (context, continuation), (logprob, _) in zip(pairs[:4], found, strict=False):
            whole, kept = TOKENIZER.encode_document([context + continuation]), len(context.rstrip())
            n = len(TOKENIZER.encode_document([context[:kept]] if kept else []))
            assert logprob == pytest.approx(directly(lm.model, whole[:n], whole[n:])[0], abs=1e-9)
        assert found[4] == (0.0, True)

    def test_a_token_across_the_border_loses_nothing_of_the_continuation(self):
        context, continuation = "the c", "at sat"
        whole = TOKENIZER.encode_document([context + continuation])
        assert whole[: len(TOKENIZER.encode_document([context]))] != TOKENIZER.encode_document([context])
        ids, rest = make()._encode_pair(context, continuation)
        assert TOKENIZER.decode(ids) == f"{Special.EOD}{context}"
        assert TOKENIZER.decode(rest) == continuation


def test_texts_of_any_length_are_read_to_their_ends(monkeypatch):
    lm = make(batch_tokens=15)
    shapes = read(lm.model, monkeypatch)
    texts = [TEXT * 20, "", "the", TEXT, "a<eod>b"]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    assert max(rows * length for rows, length in shapes) <= 15
    for text, logprob in zip(texts, found, strict=True):
        expected = directly(lm.model, [EOD], TOKENIZER.encode(text))[0] if text else 0
        assert logprob == pytest.approx(expected, abs=1e-9 * len(text))


class TestWriting:
    def written(self, lm, *given):
        return lm.generate_until(requests("generate_until", *given))

    def test_the_answer_is_what_the_model_generates(self):
        lm, greedy = make(), SamplingConfig(temperature=0, top_p=1)
        whole = "".join(generate(lm.model, TOKENIZER, TEXT, greedy, 20))
        stop = whole[3:5]
        drawn = SamplingConfig(temperature=2, top_k=9, top_p=1, seed=3)
        found = self.written(
            lm,
            (TEXT, {"until": [], "max_gen_toks": 20}),
            (TEXT, {"until": stop, "max_gen_toks": 20, "do_sample": False, "temperature": 1.0}),
            ("", {"until": ["\n\n", ""], "max_new_tokens": 4}),
            (TEXT, {"max_gen_toks": 20, "do_sample": True, "temperature": 2, "top_k": 9}),
        )
        assert found[0] == whole
        assert found[1] == whole[: whole.index(stop)]
        assert found[2] == "".join(generate(lm.model, TOKENIZER, "", greedy, 4))
        assert found[3] == "".join(generate(lm.model, TOKENIZER, TEXT, drawn, 20))

    def test_repeats_share_their_context_and_differ(self, monkeypatch):
        lm = make()
        shapes = read(lm.model, monkeypatch)
        options = {"max_gen_toks": 5, "do_sample": True}
        found = self.written(lm, *[(TEXT, options)] * 6)
        assert len(set(found)) > 1
        assert sum(length for _, length in shapes) <= len(TOKENIZER.encode_document([TEXT])) + 6 * 4

    def test_wrong_options_are_refused(self):
        with pytest.raises(UserError, match="generation_kwargs: temperature"):
            self.written(make(), ("the", {"temperature": -1.0, "do_sample": True}))


def test_models_that_cannot_be_asked_are_refused():
    with pytest.raises(UserError, match="not causal"):
        make(memory={"carry": "layers", "store": 0})
    lm = make(position="learned")
    with pytest.raises(UserError, match="has 65 tokens, but the model's learned positions end at 64"):
        lm._loglikelihood_tokens([(("", ""), [EOD, *random_ids(60)], random_ids(5))])
    lm = make()
    lm.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not numbers"):
        lm._loglikelihood_tokens([(("", ""), [EOD], [8])])


@pytest.fixture(scope="module")
def lm():
    return make()


@pytest.fixture(scope="module")
def own(lm, tmp_path_factory):
    """A folder with tasks; what the model writes is right in the first three questions."""
    folder, greedy = tmp_path_factory.mktemp("own"), SamplingConfig(temperature=0, top_p=1)
    written = ["".join(generate(lm.model, TOKENIZER, q["question"], greedy, 6, [" "])) for q in QUESTIONS]
    make_custom_tasks(folder, [*written[:3], *(f"not {answer}" for answer in written[3:])])
    return folder


class TestTasks:
    def test_their_scores_are_those_of_the_model(self, lm, own):
        report = harness_scores(lm, ["own_choice", "own_prose", "own_writing"], own)
        assert [(s.task, s.metric, s.filter, s.documents, s.num_fewshot, s.version) for s in report.scores] == [
            ("own_choice", "acc", "none", 7, 0, None),
            ("own_prose", "bits_per_byte", "none", 7, 0, None),
            ("own_writing", "exact_match", "none", 7, 0, None),
        ]
        choice, prose, writing = report.scores
        right, nats = 0, 0
        for question in QUESTIONS:
            text = question["question"]
            pairs = [lm._encode_pair(text, choice) for choice in question["choices"]]
            guesses = [directly(lm.model, *pair)[0] for pair in pairs]
            right += guesses.index(max(guesses)) == question["answer"]
            nats -= directly(lm.model, [EOD], TOKENIZER.encode(text))[0]
        assert choice.value == pytest.approx(right / 7)
        assert choice.standard_error == pytest.approx(math.sqrt(right / 7 * (1 - right / 7) / 6))
        assert prose.value == pytest.approx(nats / math.log(2) / sum(len(q["question"]) for q in QUESTIONS))
        assert (prose.higher_is_better, writing.higher_is_better) == (False, True)
        assert writing.value == pytest.approx(3 / 7)

    def test_solved_examples_precede_the_questions(self, lm, own, monkeypatch):
        report = harness_scores(lm, ["own_choice", "own_writing"], own, limit=1, num_fewshot=2)
        assert [(score.num_fewshot, score.documents) for score in report.scores] == [(2, 1), (0, 1)]  # its own 0 stays
        assert report.limit == 1
        shapes = read(lm.model, monkeypatch)
        tokens = []
        for examples in (0, 1, 2, 3):
            shapes.clear()
            harness_scores(lm, ["own_choice"], own, limit=1, num_fewshot=examples)
            tokens.append(sum(rows * length for rows, length in shapes))
        assert tokens == sorted(set(tokens))

    def test_tasks_that_cannot_be_loaded_or_run_are_reported(self, lm, own, tmp_path):
        task = (own / "choice.yaml").read_text()
        (tmp_path / "gone.yaml").write_text(task.replace("questions.jsonl", "absent.jsonl"))
        with pytest.raises(UserError, match=r"cannot load own_choice: FileNotFoundError: .*absent.jsonl"):
            harness_scores(lm, ["own_choice"], tmp_path)
        (tmp_path / "gone.yaml").write_text(f"{task}\nunsafe_code: true")
        with pytest.raises(
            UserError, match="own_choice: tasks that run generated code or show images are not supported"
        ):
            harness_scores(lm, ["own_choice"], tmp_path)
        with pytest.raises(UserError, match="absent: no such folder"):
            harness_scores(lm, ["own_choice"], tmp_path / "absent")

    @pytest.mark.slow
    def test_the_built_in_tasks_of_the_harness_are_found_and_groups_are_averaged(self, lm, own, tmp_path, monkeypatch):
        """Slow, as the harness reads all its own tasks' files; once, as what it has found is kept."""
        monkeypatch.setattr(harness_tasks, "TaskManager", cache(harness_tasks.TaskManager))
        for name in ("choice", "writing"):
            (tmp_path / f"{name}.yaml").write_text((own / f"{name}.yaml").read_text())
        (tmp_path / "group.yaml").write_text(
            "group: own\ntask: [own_choice, own_writing]\n"
            "aggregate_metric_list: [{metric: acc, weight_by_size: true}, {metric: exact_match, weight_by_size: true}]"
        )
        choice, writing, acc, match = harness_scores(lm, ["own"], tmp_path, limit=5).scores
        assert (acc.task, acc.metric, acc.value, acc.documents) == ("own", "acc", choice.value, 10)
        assert (match.task, match.metric, match.value) == ("own", "exact_match", writing.value)
        with pytest.raises(UserError, match=r"no task 'own_choise' in lm_eval .* or .*; did you mean 'own_choice'\?"):
            harness_scores(lm, ["own_choise"], tmp_path)
        with pytest.raises(UserError, match=r"no task 'hellaswagg' in lm_eval .*; did you mean 'hellaswag'\?"):
            harness_scores(lm, ["hellaswagg"], tmp_path)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "mistral"])
def test_with_a_pretrained_models_tokenizer_texts_begin_as_it_begins_them(name):
    """If it prepends nothing to a text, the end-of-document token precedes the continuation of an empty context."""
    tokenizer = Tokenizer.from_files(foreign_files(name))
    model = make_model(vocab_size=tokenizer.vocab_size)
    asked = HarnessModel(model, tokenizer)
    begin = tokenizer.roles.begin
    opening = [begin.id if begin else tokenizer.eod]
    pairs = [("Hello world", ", hello"), ("", "Hello"), ("  ", "x")]
    context, continuation = tokenizer.encode_document(["Hello world"]), tokenizer.encode(", hello", continues=True)
    found = asked.loglikelihood(requests("loglikelihood", *pairs))
    expected = [directly(model, context, continuation), directly(model, opening, tokenizer.encode("Hello"))]
    for (logprob, greedy), (wanted, likely) in zip(found, expected, strict=False):
        assert logprob == pytest.approx(wanted, abs=1e-6)
        assert greedy == likely
    (rolling,) = asked.loglikelihood_rolling(requests("loglikelihood_rolling", ("Hello world",)))
    assert rolling == pytest.approx(directly(model, opening, tokenizer.encode("Hello world"))[0], abs=1e-6)
    options = {"until": ["\n"], "max_gen_toks": 5}
    (text,) = asked.generate_until(requests("generate_until", ("Hello world", options)))
    assert text == "".join(generate(model, tokenizer, "Hello world", SamplingConfig(temperature=0), 5, ["\n"]))
