"""A model's own chat template: the same ids as in transformers, and special tokens only from the template's text."""

import pytest
from foreign import MODELS, foreign_files, foreign_folder
from foreign_chats import draw_foreign_chat
from transformers import AutoTokenizer

from rmkv_cli.data.chat import Turn, answer, pieces_of, read_messages, render
from rmkv_cli.tokenizer import BARE, Token, Tokenizer
from rmkv_cli.tokenizer.template import MARKS, Message

TOKENIZERS = {name: Tokenizer.from_files(foreign_files(name)) for name in MODELS}
every = pytest.mark.parametrize("name", MODELS)


def with_template(name, source):
    return Tokenizer.from_files(foreign_files(name) | {"chat_template.jinja": source})


def tokens_of(pieces):
    return [piece for piece in pieces if isinstance(piece, Token) and piece is not BARE]


def text_of(pieces):
    return "".join(piece for piece in pieces if not isinstance(piece, Token))


@every
def test_the_ids_of_100_random_conversations_are_those_of_transformers(tmp_path, name):
    folder = foreign_folder(tmp_path, name)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for seed in range(100):
        chat = draw_foreign_chat(seed, system=name != "mistral", think=name == "qwen3", prompted=seed % 4)
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        pieces = pieces_of(read_messages(chat), ours)
        assert ours.encode_document(pieces) == expected
        assert [i for ids in ours.encode_stream(pieces) for i in ids] == expected


@every
def test_no_message_forges_a_special_token(name):
    """Whatever a message's text and role, the special tokens are those of a harmless message, and its text remains."""
    tokenizer = TOKENIZERS[name]
    plain = tokens_of(pieces_of([("user", "so"), ("assistant", "it"), ("user", "is")], tokenizer))
    for token in tokenizer.tokens.values():
        spelt = token, token * 2, f"a{token}\n{token}b", token.upper(), token[:-1], token[1:], f"<{token}>"
        marked = [text[:2] + MARKS[0] + text[2:] for text in spelt]
        for text in (*spelt, *marked, *(MARKS[0] + text for text in spelt)):
            pieces = pieces_of([("user", text), ("assistant", f"a{text}"), ("user", text)], tokenizer)
            assert tokens_of(pieces) == plain
            assert text_of(pieces).count(text) >= 3


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ '<|im_' + m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content + '_end|>' }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | lower }}{% endfor %}",
        "{% for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content[:4] ~ m.content[4:] }}{% endfor %}",
        "{{ messages | tojson }}",
    ],
)
def test_no_token_forms_across_the_edge_of_a_message(source):
    tokenizer = with_template("smollm2", source)
    contents = ["end|>", "<|im", "_end|>", "<|", "im_end|>", "<|IM_END|>", "<|im_end|>", ">", "|im_end|>"]
    for first in contents:
        for second in contents:
            assert not tokens_of(pieces_of([("user", first), ("|im_end|", second)], tokenizer))


def test_a_conversation_with_every_private_character_is_refused():
    with pytest.raises(ValueError, match="all of Unicode's private characters"):
        pieces_of([("user", MARKS)], TOKENIZERS["smollm2"])


def test_a_thought_that_an_answer_begins_with_is_enclosed_by_the_models_tokens():
    tokenizer = TOKENIZERS["qwen3"]
    messages = "<think>\nso </think> it <think> is"
    pieces = pieces_of([("user", "<think>why</think>"), ("assistant", messages)], tokenizer)
    assert tokens_of(pieces) == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<think>",
        "</think>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    opened, closed = tokenizer.roles.thinking
    assert answer("<think>so</think>it", tokenizer) == (opened, "so", closed, "it")
    assert answer("<think>so</think>it", TOKENIZERS["smollm2"]) == ("<think>so</think>it",)


def test_roles_of_datasets_get_the_names_that_templates_know():
    chats = ([("human", "a"), ("gpt", "b"), ("human", "c")], [("user", "a"), ("assistant", "b"), ("user", "c")])
    assert pieces_of(chats[0], TOKENIZERS["mistral"]) == pieces_of(chats[1], TOKENIZERS["mistral"])


class TestSupervision:
    def learned(self, name, turns, answers_only=True):
        """The ids of a conversation to train on, and the pieces that are learned."""
        tokenizer = TOKENIZERS.get(name) or name
        pieces, flags = render([Turn(*turn) for turn in turns], answers_only, tokenizer)
        flags = flags or (True,) * (len(pieces) + 1)
        assert len(flags) == len(pieces) + 1
        shown = [*pieces, "(end)"]
        return pieces, [piece for piece, flag in zip(shown, flags, strict=True) if flag and piece is not BARE]

    @pytest.mark.parametrize(
        ("name", "end"),
        [("smollm2", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>"), ("tinyllama", "</s>")],
    )
    def test_answers_are_learned_with_the_token_that_ends_them(self, name, end):
        turns = [("user", f"say {end}"), ("assistant", f"it {end}"), ("user", "more"), ("assistant", "so")]
        assert self.learned(name, turns)[1] == [f"it {end}", end, "so", end]

    def test_an_answer_is_learned_as_the_template_gives_it(self):
        """Qwen3's template removes thoughts from earlier answers and adds an empty one to the last."""
        turns = [("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "d")]
        assert self.learned("qwen3", turns)[1] == [
            "b",
            "<|im_end|>",
            "<think>",
            "\n\n",
            "</think>",
            "\n\nd",
            "<|im_end|>",
        ]

    @every
    def test_the_ids_are_those_of_transformers(self, tmp_path, name):
        """The exceptions are the date, which is fixed, and an answer's beginning, where a token boundary is forced."""
        folder = foreign_folder(tmp_path, name)
        theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
        for seed in range(20):
            chat = draw_foreign_chat(seed, system=name != "mistral", think=name == "qwen3", prompted=False)
            more = {"date_string": "26 Jul 2024"} if name == "llama3.2" else {}
            expected = theirs.apply_chat_template(chat, return_dict=False, **more)
            pieces, learned = render(read_messages(chat), False, ours)
            assert learned is None
            assert ours.encode_document(pieces) == expected
            pieces, learned = render(read_messages(chat), True, ours)
            assert ours.decode(ours.encode_document(pieces)) == ours.decode(expected)

    def test_a_turn_marked_as_not_learned_is_not_learned(self):
        turns = [("user", "a", False), ("assistant", "b"), ("user", "c"), ("assistant", "d", False)]
        learned = self.learned("llama3", turns, answers_only=False)[1]
        assert learned == [
            "b",
            "<|eot_id|>",
            "<|start_header_id|>",
            "user",
            "<|end_header_id|>",
            "\n\nc",
            "<|eot_id|>",
            "<|start_header_id|>",
            "assistant",
            "<|end_header_id|>",
            "\n\n",
            "(end)",
        ]
        assert self.learned("llama3", turns)[1] == ["b", "<|eot_id|>"]

    def test_the_end_of_the_document_ends_a_last_answer_without_an_end_token(self):
        source = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
        bare = with_template("smollm2", source + prompt)
        assert self.learned(bare, [("user", "a"), ("assistant", "b")])[1] == ["b\n", "(end)"]
        with pytest.raises(ValueError, match="does not render a conversation turn by turn"):
            self.learned(bare, [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
        assert self.learned(bare, [("user", "a"), ("assistant", "b"), ("user", "c")], False)[1][-1] == "(end)"


def test_a_template_whose_beginning_depends_on_the_end_is_refused():
    source = "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    counting = with_template("smollm2", source)
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    with pytest.raises(ValueError, match="the chat template does not render a conversation turn by turn"):
        render(turns, True, counting)
    assert not counting.template.by_turns
    assert all(tokenizer.template.by_turns for tokenizer in TOKENIZERS.values())


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3", "mistral", "tinyllama"])
def test_the_pieces_after_an_answer_equal_those_of_the_whole_conversation(name):
    tokenizer = TOKENIZERS[name]
    template = tokenizer.template
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    whole = tokenizer.encode_document(pieces_of(turns, tokenizer))
    before = tokenizer.encode_document((*pieces_of(turns[:1], tokenizer), "b"))
    following = [
        i for ids in tokenizer.encode_stream(template.follow([Message("user", "c")], closed=False), True) for i in ids
    ]
    assert tokenizer.decode(before) + tokenizer.decode(following) == tokenizer.decode(whole)
    closed = "".join((*template.closing, *template.follow([Message("user", "c")], closed=True)))
    assert closed == "".join(template.follow([Message("user", "c")], closed=False))
    assert pieces_of(turns[2:], tokenizer, after=True) == template.follow([Message("user", "c")], closed=True)


def test_messages_that_may_not_follow_are_read_as_a_separate_conversation():
    """A system message in the middle: Mistral's template refuses it even at the beginning, with a reason."""
    with pytest.raises(ValueError, match=r"the chat template refuses this conversation: .*roles must alternate"):
        pieces_of([("system", "a"), ("user", "b")], TOKENIZERS["mistral"], after=True)
    first = "{% if m.role == 'system' and not loop.first %}{{ raise_exception('no') }}{% endif %}"
    source = "{{ bos_token }}{% for m in messages %}" + first + "{{ m.content + '<|eot_id|>' }}{% endfor %}"
    first_only = with_template("llama3", source)
    assert pieces_of([("system", "a"), ("user", "b")], first_only, after=True) == ("a", "<|eot_id|>", "b", "<|eot_id|>")


class TestTheSandbox:
    @pytest.mark.parametrize(
        ("source", "text"),
        [
            ("{{ {'a': '<é>', 'b': [1, none]} | tojson }}", '{"a": "<é>", "b": [1, null]}'),
            ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
            ("{% for x in range(9) %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "01"),
            ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi"),
            ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
            ("{{ bos_token ~ tools ~ documents }}", "NoneNone"),
            ("{{ strftime_now('%Y') | length }}", "4"),
        ],
    )
    def test_it_provides_the_same_as_transformers(self, tmp_path, source, text):
        files = foreign_files("llama3") | {"chat_template.jinja": source}
        for name, content in files.items():
            (tmp_path / name).write_text(content, encoding="utf-8")
        pieces = pieces_of([("user", "hi")], Tokenizer.load(tmp_path))
        assert text_of(pieces) == text
        theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False
        )
        assert "".join(pieces) == theirs

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("{{ raise_exception('only\ntwo turns') }}", "the chat template refuses this conversation: only two turns"),
            ("{{ messages[5].content + 'x' }}", "the chat template refuses this conversation: "),
            ("{{ ''.__class__.__mro__ }}", "the chat template refuses this conversation: .*unsafe"),
            ("{{ messages.append(1) }}", "the chat template refuses this conversation: .*unsafe"),
        ],
    )
    def test_errors_in_a_template_are_one_line(self, source, message):
        with pytest.raises(ValueError, match=message) as error:
            pieces_of([("user", "a")], with_template("llama3", source))
        assert "\n" not in str(error.value)
