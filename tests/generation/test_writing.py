from dataclasses import replace
from functools import partial

import pytest
import torch
from small_model import make_model
from torch._dynamo.utils import counters

from rmkv_cli.config import MemoryConfig, ModelConfig
from rmkv_cli.errors import UserError
from rmkv_cli.generation import Decoder, SamplingConfig, Text, generate, read_prompt, read_prompts, together
from rmkv_cli.generation.decoder import DEEP
from rmkv_cli.generation.stop import StopStrings
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Special, train_tokenizer

GREEDY = SamplingConfig(temperature=0)
WARM = SamplingConfig(temperature=1, top_p=1, seed=5)


@pytest.fixture(scope="module")
def words():
    text = "the cat sat on the mat, and the dog sat on the log. " * 20
    return train_tokenizer(iter([text]), 280)


@pytest.fixture(scope="module")
def bytewise():
    return train_tokenizer(iter(["nothing"]), 263)


def scripted(tokenizer, ids):
    """A model that writes these distinct ids one after the other: its blocks do nothing, and its head maps each id's
    embedding to the next id. After the last one the document ends."""
    V = tokenizer.vocab_size
    config = ModelConfig(
        vocab_size=V,
        hidden_size=2 * V,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=0,
        segment_length=4,
        lookback=2,
        tie_word_embeddings=False,
        memory=MemoryConfig(slots=1),
    )
    model = RMKV(config).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.embedding.weight.zero_()[:, :V] = torch.eye(V)
        model.unembedding.weight.zero_()
        for token, following in zip([tokenizer.eod, *ids], [*ids, tokenizer.eod], strict=True):
            model.unembedding.weight[following, token] = 1
    return model


def write(model, tokenizer, prompt="", config=GREEDY, max_tokens=50, stop=()):
    generation = generate(model, tokenizer, prompt, config, max_tokens, stop)
    return list(generation), generation


class TestGreedy:
    @pytest.mark.parametrize("cell", ["gru", "lstm", "minimal"])
    @pytest.mark.parametrize("prompt", ["", "the cat sat on the mat"])
    def test_it_is_the_argmax_of_a_forward_over_the_whole_text(self, words, cell, prompt):
        model = make_model(3, vocab_size=words.vocab_size + 3, memory={"cell": cell}, max_position_embeddings=200)
        ids = words.encode_document([prompt])
        written = []
        while len(written) < 40:
            logits = model(torch.tensor([ids + written]))[0][0, -1]
            logits[[Special.PAD.id, Special.UNK.id]] = -torch.inf
            logits[words.vocab_size :] = -torch.inf
            token = int(logits.argmax())
            if token == words.eod:
                break
            written.append(token)
        assert len(written) > 10
        _, generation = write(model, words, prompt, max_tokens=40)
        assert generation.ids == written
        assert generation.text == words.decode(written)
        assert generation.stop_reason == ("length" if len(written) == 40 else "end")


class TestSeeds:
    def test_the_same_seed_gives_the_same_text(self, words):
        model = make_model(vocab_size=words.vocab_size)
        texts = [write(model, words, "the cat", SamplingConfig(seed=seed))[1].text for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_several_texts_continue_a_prompt_that_is_read_once(self, words, monkeypatch):
        model = make_model(vocab_size=words.vocab_size)
        alone = [write(model, words, "the cat", SamplingConfig(seed=seed))[1].text for seed in range(3)]
        prompt = read_prompt(model, words, "the cat")
        before = {name: x.clone() for name, x in prompt.state.tensors().items()}
        branched = [write(model, words, prompt, SamplingConfig(seed=seed))[1].text for seed in range(3)]
        assert branched == alone
        assert all(torch.equal(x, before[name]) for name, x in prompt.state.tensors().items())
        assert prompt.seen.sum() == len(set(words.encode_document(["the cat"])))

    def test_a_prompt_is_read_a_segment_at_a_time(self, words, monkeypatch):
        model = make_model(vocab_size=words.vocab_size)
        headed = []
        head = model.head
        monkeypatch.setattr(model, "head", lambda x: headed.append(x.shape[:-1].numel()) or head(x))
        text, advanced = "the cat sat on the mat. " * 10, []
        prompt = read_prompt(model, words, text, advance=advanced.append)
        ids = words.encode_document([text])
        assert sum(advanced) == prompt.tokens == len(ids)
        assert max(advanced) == 5
        assert max(headed) == 1
        expected = model(torch.tensor([ids]))[0][:, -1]
        assert torch.allclose(prompt.logits.double(), expected, atol=1e-5)

    def test_a_prompt_continues_after_another(self, words):
        model = make_model(vocab_size=words.vocab_size)
        first = read_prompt(model, words, "the cat")
        second = read_prompt(model, words, "the dog", first)
        whole = read_prompt(model, words, ["the cat", "the dog"])
        assert whole.tokens == first.tokens + second.tokens
        assert torch.allclose(second.logits, whole.logits, atol=1e-6)
        assert torch.equal(second.seen, whole.seen)
        nothing = read_prompt(model, words, "", first)
        assert (nothing.tokens, nothing.logits is first.logits) == (0, True)


class TestEnd:
    TEXT = "aé€😀!"  # characters of 1, 2, 3 and 4 bytes, all bytes distinct

    def test_characters_appear_whole(self, bytewise):
        ids = bytewise.encode(self.TEXT)
        assert len(ids) == 11
        pieces, generation = write(scripted(bytewise, ids), bytewise)
        assert pieces == ["a", "é", "€", "😀", "!"]
        assert (generation.stop_reason, generation.ids) == ("end", ids)

    def test_a_character_that_stays_incomplete_is_shown_as_such(self, bytewise):
        model = scripted(bytewise, bytewise.encode(self.TEXT))
        pieces, generation = write(model, bytewise, max_tokens=2)
        assert pieces == ["a", "\ufffd"]
        assert generation.stop_reason == "length"

    @pytest.mark.parametrize(
        ("stop", "text", "tokens"),
        [(["é€"], "a", 6), (["€", "é"], "a", 3), (["😀!"], "aé€", 11), (["a"], "", 1), (["b", "a€"], "aé€😀!", 11)],
    )
    def test_stop_strings_across_tokens(self, bytewise, stop, text, tokens):
        pieces, generation = write(scripted(bytewise, bytewise.encode(self.TEXT)), bytewise, stop=stop)
        assert "".join(pieces) == generation.text == text
        assert len(generation.ids) == tokens
        assert generation.stop_reason == ("stop" if text != self.TEXT else "end")

    def test_what_was_held_back_comes_at_the_end(self, bytewise):
        pieces, _ = write(scripted(bytewise, bytewise.encode("xyz")), bytewise, stop=["yz!"])
        assert pieces == ["x", "yz"]

    def test_pad_unk_and_ids_beyond_the_tokenizer_are_never_written(self, bytewise):
        model = make_model(vocab_size=bytewise.vocab_size + 1)
        with torch.no_grad():  # a large constant in the last layer norm's bias makes them the likeliest by far
            model.norm.bias.fill_(3)
            forbidden = [Special.PAD.id, Special.UNK.id, bytewise.vocab_size]
            model.embedding.weight[forbidden] = 5
        likeliest = model(torch.tensor([[bytewise.eod]]))[0][0, -1].topk(3).indices
        assert set(likeliest.tolist()) == set(forbidden)
        for config in (GREEDY, WARM):
            _, generation = write(model, bytewise, config=config, max_tokens=30)
            assert generation.ids
            assert not set(generation.ids) & set(forbidden)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_state_does_not_grow(bytewise, cell):
    model = make_model(1, vocab_size=bytewise.vocab_size, memory={"cell": cell}, segment_length=5, lookback=5)
    with torch.no_grad():
        model.norm.bias.fill_(3)
        model.embedding.weight[bytewise.eod] = -5  # never ends
    short = write(model, bytewise, "a", WARM, 10)[1]
    long = write(model, bytewise, "a", WARM, 1000)[1]
    assert (len(short.ids), len(long.ids)) == (10, 1000)
    assert long.state.size() == short.state.size()
    assert int(long.state.position) == 2 + 999  # the prompt, and all but the last


class TestTheModel:
    def test_is_left_in_its_mode_and_read_without_dropout(self, words):
        model = make_model(vocab_size=words.vocab_size, dropout=0.5)
        text = write(model, words, "the cat", WARM)[1].text
        model.train()
        generation = generate(model, words, "the cat", WARM, 50)
        for _ in generation:  # what is done between the pieces is not in inference mode
            assert model.training
            assert not torch.is_inference_mode_enabled()
        assert generation.text == text

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ({"memory": {"carry": "layers", "store": 0}}, "cannot generate: .* not causal"),
            ({"vocab_size": 270}, "the tokenizer has 280 tokens, the model only 270"),
            ({"position": "learned", "max_position_embeddings": 20}, "exceed the model's 20 learned positions"),
        ],
    )
    def test_that_cannot_generate_is_refused(self, words, shape, message):
        assert words.vocab_size == 280
        with pytest.raises(UserError, match=message):
            generate(make_model(**{"vocab_size": 280} | shape), words, "the cat", GREEDY, 30)

    def test_whose_weights_are_no_numbers_is_refused(self, words):
        model = make_model(vocab_size=words.vocab_size)
        with torch.no_grad():
            model.norm.weight.fill_(torch.nan)
        with pytest.raises(UserError, match="logits are not numbers"):
            generate(model, words, "the cat", GREEDY, 30)

    def test_learned_positions_can_be_filled_to_the_last(self, words):
        model = make_model(3, vocab_size=280, position="learned", max_position_embeddings=20)
        assert generate(model, words, "", GREEDY, 20)
        with pytest.raises(UserError, match="exceed the model's 20 learned positions"):
            generate(model, words, "", GREEDY, 21)


def test_bad_input_is_refused(words):
    model = make_model(vocab_size=280)
    with pytest.raises(UserError, match="max_tokens: should be 1 or more, got 0"):
        generate(model, words, "", GREEDY, 0)
    with pytest.raises(UserError, match="stop string is empty"):
        generate(model, words, "", GREEDY, 1, [""])
    with pytest.raises(UserError, match="lone surrogate"):
        generate(model, words, "a\udc80", GREEDY, 1)


class TestTogether:
    PROMPTS = ("", "the cat", "the dog sat on the log, and", "the cat sat on the mat. " * 3, "the mat", "a dog, a cat")

    def test_prompts_are_read_as_each_alone(self, words, monkeypatch):
        model = make_model(vocab_size=words.vocab_size)
        calls = []
        hidden = model.hidden
        monkeypatch.setattr(model, "hidden", lambda ids, *rest: calls.append(ids.shape) or hidden(ids, *rest))
        together = read_prompts(model, words, [[prompt] for prompt in self.PROMPTS])
        assert max(shape[0] for shape in calls) > 1
        assert max(shape[1] for shape in calls) == 5
        for text, prompt in zip(self.PROMPTS, together, strict=True):
            alone = read_prompt(model, words, text)
            assert prompt.tokens == alone.tokens
            assert torch.equal(prompt.seen, alone.seen)
            assert torch.allclose(prompt.logits, alone.logits, atol=1e-6)
            tensors = alone.state.tensors()
            assert all(torch.allclose(x, tensors[name], atol=1e-9) for name, x in prompt.state.tensors().items())

    @pytest.mark.parametrize(
        ("lanes", "configs"),
        [
            (1, [WARM]),
            (2, [GREEDY]),
            (4, [SamplingConfig(repetition_penalty=1.5, seed=3)]),
            (3, [WARM, GREEDY, SamplingConfig(top_k=3), SamplingConfig(repetition_penalty=1.5)]),
            (3, [WARM, SamplingConfig(frequency_penalty=1, presence_penalty=1), SamplingConfig(no_repeat_ngram=2)]),
            (10, [WARM]),
        ],
    )
    def test_each_text_is_what_it_is_alone(self, words, lanes, configs):
        model = make_model(3, vocab_size=words.vocab_size)
        alone, texts = [], []
        for i, prompt in enumerate(read_prompts(model, words, [[prompt] for prompt in self.PROMPTS])):
            config = configs[i % len(configs)]
            how = config.model_copy(update={"seed": config.seed + i}), 5 + 7 * i, ["on"]
            alone.append(write(model, words, self.PROMPTS[i], *how)[1])
            texts.append(Text(words, prompt, *how))
        written = list(together(Decoder(model, lanes), texts))
        assert {id(text) for text in written} == {id(text) for text in texts}
        assert [text.ids for text in texts] == [text.ids for text in alone]
        assert [(text.text, text.stop_reason) for text in texts] == [(text.text, text.stop_reason) for text in alone]
        for text, other in zip(texts, alone, strict=True):
            tensors = other.state.tensors()
            assert all(torch.allclose(x, tensors[name], atol=1e-9) for name, x in text.state.tensors().items())

    def test_nothing_to_read_or_write(self, words):
        model = make_model(vocab_size=words.vocab_size)
        assert read_prompts(model, words, []) == []
        assert list(together(Decoder(model), [])) == []


class TestFaults:
    """A fault in a text ends that text and no other."""

    SEED, STOP = 9, "raise"

    @pytest.fixture(params=["logits", "stop"])
    def faulty(self, request, words, monkeypatch):
        """Return the arguments of a failing text: the first fails after some tokens, others at their first token."""

        def raising(function, when):
            calls = []

            def call(*arguments):
                if when(*arguments):
                    calls.append(arguments)
                    if len(calls) > 2:
                        raise MemoryError("no more memory")
                return function(*arguments)

            return call

        if request.param == "stop":
            broken = raising(StopStrings.push, lambda stops, _: stops._stops == (self.STOP,))
            monkeypatch.setattr(StopStrings, "push", broken)

        def begin(prompt):
            if request.param == "logits":
                keys = tuple(torch.full_like(x, torch.nan) for x in prompt.state.keys)
                prompt = replace(prompt, state=replace(prompt.state, keys=keys))
            return prompt, WARM.model_copy(update={"seed": self.SEED}), 30, [self.STOP]

        return begin

    def test_the_others_are_written_as_if_it_were_not_there(self, words, faulty):
        model = make_model(3, vocab_size=words.vocab_size)
        prompts = read_prompts(model, words, [[prompt] for prompt in ("", "the cat", "the dog")])
        expected = [write(model, words, prompt, WARM, 30)[1] for prompt in prompts]
        broken = [Text(words, *faulty(prompts[0])) for _ in range(3)]
        others = [Text(words, prompt, WARM, 30) for prompt in prompts]
        texts = [x for pair in zip(broken, others, strict=True) for x in pair]
        assert {id(text) for text in together(Decoder(model, 2), texts)} == {id(text) for text in texts}
        assert [(text.text, text.stop_reason) for text in others] == [(x.text, x.stop_reason) for x in expected]
        assert all(text.ended and text.fault is None for text in others)
        assert all(isinstance(text.fault, MemoryError | UserError) and text.ended for text in broken)
        assert 0 < len(broken[0].ids) < 5

    def test_a_text_that_is_written_on_its_own_raises_it(self, words, faulty):
        model = make_model(3, vocab_size=words.vocab_size)
        generation = generate(model, words, *faulty(read_prompt(model, words, "the cat")))
        with pytest.raises((MemoryError, UserError), match=r"no more memory|not numbers"):
            list(generation)


def test_a_special_token_may_end_a_text(bytewise):
    ids = [*bytewise.encode("ab"), Special.START.id, *bytewise.encode("c")]
    model = scripted(bytewise, ids)
    assert write(model, bytewise)[1].text == "ab<start>c"
    generation = generate(model, bytewise, "", GREEDY, 50, ends=[Special.EOD, Special.START])
    assert ("".join(generation), generation.stop_reason) == ("ab", "end")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # PyTorch's compiler itself calls it
@pytest.mark.parametrize(("seed", "layers"), [(3, 1), (6, DEEP)])
def test_a_compiled_step_writes_the_same(words, seed, layers):
    """Three texts in four lanes: the step is padded."""
    model = make_model(seed, vocab_size=words.vocab_size, num_hidden_layers=layers)
    prompt = read_prompt(model, words, "the cat")
    written = []
    for decoder in (Decoder(model, 4), Decoder(model, 4, compiled=True)):
        for _ in range(2):  # texts leave a decoder as good as new
            texts = list(together(decoder, [Text(words, prompt, WARM, 40) for _ in range(3)]))
            assert all(len(text.ids) > 10 for text in texts)
            written += [text.text for text in texts]
    assert len(written) == 12
    assert len(set(written)) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize(("seed", "layers", "graphs"), [(3, 1, 1), (6, DEEP, 2)])  # layers with and without a store
def test_however_many_texts_are_left_few_graphs_are_compiled(words, seed, layers, graphs, monkeypatch):
    """Texts end one after the other, so their number takes every value; it is padded to a few sizes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # counts alike, and is quick
    model = make_model(seed, vocab_size=words.vocab_size, num_hidden_layers=layers)
    prompts = read_prompts(model, words, [["the cat"] if i % 2 else ["a dog on"] for i in range(12)])
    written = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        texts = [Text(words, prompt, WARM, 2 + 2 * i) for i, prompt in enumerate(prompts)]
        done = list(together(Decoder(model, 12, compiled=compiled), texts))
        assert {len(text.ids) for text in done} == set(range(2, 26, 2))
        written.append([(text.text, text.stop_reason, text.fault) for text in texts])
        assert counters["stats"]["unique_graphs"] == 4 * graphs * compiled  # of 12, 6, 3 and 1
    assert written[0] == written[1]
