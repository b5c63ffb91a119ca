"""The state of a conversation equals that of reading its document at once."""

import itertools
from collections import Counter

import pytest
import torch
from random_chats import training_ids
from small_model import make_model

from rmkv_cli.data.chat import pieces_of
from rmkv_cli.errors import UserError
from rmkv_cli.generation import Conversation, Decoder, SamplingConfig, generate
from rmkv_cli.generation.sampler import Sampler
from rmkv_cli.model import reset_recent
from rmkv_cli.tokenizer import Special, train_tokenizer

WORDS = train_tokenizer(iter(["the cat sat on the mat, and the dog sat on the log. " * 20]), 280)
ASKED = ["the cat", "and the dog?", "on the mat, and on the log, and on the mat again", "<start> is text"]
WARM = SamplingConfig(temperature=1, top_p=1, seed=3)
FORMS = [
    {"memory": {"cell": "lstm"}},
    {"memory": {"slots": 0}, "lookback": 0},
    {"memory": {"cell": "minimal", "store": 0}, "lookback": 5, "position": "sinusoidal"},
]


def talkative(likely_end, **form):
    """A float64 model whose chance to write EOD or START, which end an answer, is higher or lower."""
    model = make_model(vocab_size=WORDS.vocab_size, **form)
    model.norm.bias.fill_(1)
    for special in (Special.EOD, Special.START):
        model.embedding.weight[special.id] = 0.3 * likely_end
    return model


def ids_of(*pieces):
    """The ids of pieces, answers among them given as ids."""
    return [i for piece in pieces for i in (piece if isinstance(piece, list) else WORDS.encode_document([piece])[1:])]


def turn(message, answer):
    return ids_of(Special.START, message, Special.END, answer)


def assert_read(model, conversation, ids):
    """The conversation carries what one pass over these tokens leaves."""
    logits, state = model(torch.tensor([[WORDS.eod, *ids]]))
    memory = conversation.memory
    torch.testing.assert_close(memory.logits.double(), logits[:, -1], atol=1e-5, rtol=0)
    assert memory.seen[0].nonzero().flatten().tolist() == sorted({WORDS.eod, *ids})
    expected, carried = state.tensors(), memory.state.tensors()
    assert carried.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(carried[name], x, atol=1e-9, rtol=0, msg=name)


def interrupted_in_a_step(monkeypatch, model, conversation, message):
    """Say it; Ctrl-C comes when some tokens are written, and the next one's computation is under way."""
    head, computed = model.head, itertools.count()

    def at_last(hidden):
        if next(computed) == 6:
            raise KeyboardInterrupt
        return head(hidden)

    with monkeypatch.context() as patch:
        patch.setattr(model, "head", at_last)
        with pytest.raises(KeyboardInterrupt):
            list(conversation.say(message))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_turns_are_one_document_however_their_answers_end(monkeypatch, form):
    reasons = Counter()
    for likely_end, max_tokens in ((1, 12), (-1, 1), (-1, 7), (3, 5)):
        model = talkative(likely_end, **form)
        conversation, ids = Conversation(model, WORDS, WARM, max_tokens), []
        for message in ASKED:
            text = "".join(conversation.say(message))
            answer = conversation.answer
            assert text == answer.text == WORDS.decode(answer.ids)
            assert not {Special.EOD.id, Special.START.id} & set(answer.ids)
            ids += turn(message, answer.ids)
            assert_read(model, conversation, ids)
            reasons[answer.stop_reason, bool(answer.ids)] += 1
        if max_tokens > 1:
            pieces = conversation.say("the cat")
            for _ in range(2):
                next(pieces, None)
            pieces.close()
            ids += turn("the cat", conversation.answer.ids)
            reasons[conversation.answer.stop_reason, bool(conversation.answer.ids)] += 1
        if max_tokens == 7:
            interrupted_in_a_step(monkeypatch, model, conversation, "the")
            assert conversation.answer.ids
            ids += turn("the", conversation.answer.ids)
        assert_read(model, conversation, ids)
    assert reasons.keys() >= {("end", True), ("end", False), ("length", True), (None, True)}


def test_penalties_count_each_answer_on_its_own():
    model = talkative(-1)
    model.norm.bias.zero_()
    how = SamplingConfig(temperature=0, no_repeat_ngram=1)
    conversation, generated = Conversation(model, WORDS, how, 12), []
    for message in ("the cat", "the cat"):
        list(conversation.say(message))
        generated.append(conversation.answer.ids)
    assert all(len(set(ids)) == len(ids) == 12 for ids in generated)
    assert set(generated[0]) & set(generated[1])


def test_the_document_is_that_of_the_training_data():
    model = talkative(-1)
    conversation = Conversation(model, WORDS, WARM, 9, system="the dog")
    turns, ids = [("system", "the dog")], ids_of(Special.START, "the dog", Special.END)
    for message in ASKED:
        turns += [("user", message), ("assistant", "".join(conversation.say(message)))]
        ids += turn(message, conversation.answer.ids)
    assert_read(model, conversation, ids)
    assert WORDS.decode([WORDS.eod, *ids]) == WORDS.decode(WORDS.encode_document(pieces_of(turns)))


def test_prompts_have_the_ids_that_training_reads(tmp_path):
    prompts = ["the dog", "<end> is é", "and the dog?"]
    model = talkative(-1)
    conversation = Conversation(model, WORDS, WARM, 9, system=prompts[0])
    conversation.read([prompts[1]])
    list(conversation.say(prompts[2]))
    turns = [{"role": role, "content": text} for role, text in zip(("system", "user", "user"), prompts, strict=True)]
    (ids,) = training_ids([turns], WORDS, tmp_path)
    logits, state = model(torch.tensor([ids]))
    torch.testing.assert_close(conversation.question.logits.double(), logits[:, -1], atol=1e-5, rtol=0)
    for name, x in state.tensors().items():
        torch.testing.assert_close(conversation.question.state.tensors()[name], x, atol=1e-9, rtol=0, msg=name)


def test_a_message_abandoned_while_it_is_read_leaves_no_trace(monkeypatch):
    model = talkative(-1)
    conversation = Conversation(model, WORDS, WARM, 5)
    list(conversation.say("the cat"))
    ids = turn("the cat", conversation.answer.ids)
    computed, embed = itertools.count(), model.embed

    def at_last(*arguments):
        if next(computed) == 2:  # the message has three segments
            raise KeyboardInterrupt
        return embed(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(model, "embed", at_last)
        with pytest.raises(KeyboardInterrupt):
            list(conversation.say("the dog sat; the dog sat"))
    assert_read(model, conversation, ids)
    with pytest.raises(UserError, match="lone surrogate"):
        list(conversation.say("\udcff"))
    assert_read(model, conversation, ids)


def test_single_each_message_is_answered_on_its_own():
    model = talkative(-1)
    conversation = Conversation(model, WORDS, WARM, 8, "single", system="the dog")
    beginning = ids_of(Special.START, "the dog", Special.END)
    for number, message in enumerate(ASKED):
        alone = (Special.START, "the dog", Special.END, Special.START, message, Special.END)
        expected = generate(model, WORDS, alone, WARM.model_copy(update={"seed": 3 + number}), 8)
        assert list(conversation.say(message)) == list(expected)
        assert_read(model, conversation, beginning)
    conversation.read(["the mat"])  # what is read does last
    assert_read(model, conversation, [*beginning, *ids_of(Special.START, "the mat", Special.END)])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_instruct_forgets_what_is_recent_before_each_message(form):
    model, state, ids = talkative(-1, **form), None, [WORDS.eod]
    conversation = Conversation(model, WORDS, WARM, 8, "instruct")
    for message in ASKED:
        if state is None:
            _, state = model(torch.tensor([ids]))
        list(conversation.say(message))
        logits, state = model(torch.tensor([turn(message, conversation.answer.ids)]), reset_recent(state))
        torch.testing.assert_close(conversation.memory.logits.double(), logits[:, -1], atol=1e-5, rtol=0)
        for name, x in state.tensors().items():
            torch.testing.assert_close(conversation.memory.state.tensors()[name], x, atol=1e-9, rtol=0, msg=name)


def test_a_text_is_read_as_a_message_without_an_answer():
    model, text = talkative(-1), ["the cat sat on the mat,", " and the dog sat on the log.\n"]
    conversation = Conversation(model, WORDS, WARM, 5)
    reading = conversation.read(iter(text))
    ids = ids_of(Special.START, *text, Special.END)
    assert reading.tokens == len(ids)
    list(conversation.say("the cat"))
    assert_read(model, conversation, ids + turn("the cat", conversation.answer.ids))


def test_a_conversation_is_saved_continued_and_restarted(tmp_path):
    model, path = talkative(-1), tmp_path / "notes.rmkv"
    one = Conversation(model, WORDS, WARM, 8, system="the dog")
    list(one.say("the cat"))
    ids = ids_of(Special.START, "the dog", Special.END) + turn("the cat", one.answer.ids)
    one.save(path)
    two = Conversation(model, WORDS, WARM, 8)
    two.load(path)
    assert_read(model, two, ids)
    list(two.say("the mat"))
    assert_read(model, two, ids + turn("the mat", two.answer.ids))
    one.reset()
    assert_read(model, one, ids_of(Special.START, "the dog", Special.END))
    with pytest.raises(UserError, match="no such file"):
        one.load(tmp_path / "absent")


def test_answers_follow_the_seed_and_differ_from_turn_to_turn():
    def answers(seed):
        conversation = Conversation(talkative(-1), WORDS, SamplingConfig(seed=seed), 12, "single")
        return ["".join(conversation.say("the cat")) for _ in range(3)]

    assert answers(1) == answers(1) != answers(2)
    assert len(set(answers(1))) == 3


def test_learned_positions_end_a_conversation_that_can_be_restarted():
    model = talkative(-1, position="learned", max_position_embeddings=30)
    conversation, ids = Conversation(model, WORDS, WARM, 8), []
    for _ in range(2):
        list(conversation.say("the cat"))
        ids += turn("the cat", conversation.answer.ids)
    assert 1 + len(ids) + len(turn("the cat", [])) + 8 > 30
    with pytest.raises(UserError, match="30 learned positions"):
        list(conversation.say("the cat"))
    assert_read(model, conversation, ids)
    conversation.reset()
    assert list(conversation.say("the cat"))


def test_bad_figures_are_refused_at_once():
    with pytest.raises(UserError, match="max_tokens: should be 1 or more, got 0"):
        Conversation(talkative(-1), WORDS, WARM, 0)


@pytest.mark.parametrize(("part", "call"), [(Decoder, "step"), (Sampler, "draw")])
def test_an_answer_that_fails_leaves_no_trace(monkeypatch, part, call):
    model = talkative(-1)
    conversation, other = (Conversation(model, WORDS, WARM, 20) for _ in range(2))
    calls, works = itertools.count(1), getattr(part, call)

    def broken(*arguments):
        if next(calls) == 5:
            raise MemoryError("no more memory")
        return works(*arguments)

    for each in (conversation, other):
        list(each.say(ASKED[0]))
    before = conversation.memory
    with monkeypatch.context() as patch:
        patch.setattr(part, call, broken)
        with pytest.raises(MemoryError):
            list(conversation.say(ASKED[1]))
    assert conversation.memory is before
    conversation.read([ASKED[2]])
    other.read([ASKED[2]])
    assert torch.equal(conversation.memory.logits, other.memory.logits)
