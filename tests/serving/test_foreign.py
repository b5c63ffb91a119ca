"""Serving a model with a pretrained model's tokenizer and chat template."""

import openai
import pytest
from foreign import foreign_files, foreign_folder
from small_model import make_model
from small_server import running
from transformers import AutoTokenizer

from rmkv_cli.data.chat import pieces_of
from rmkv_cli.generation import Conversation, SamplingConfig, generate
from rmkv_cli.tokenizer import Tokenizer

CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "and <|im_end|> you?"},
]


def loaded(name):
    tokenizer = Tokenizer.from_files(foreign_files(name))
    return make_model(vocab_size=tokenizer.vocab_size + 5), tokenizer


@pytest.fixture(scope="module")
def served():
    with running(*loaded("smollm2")) as server:
        yield server


@pytest.fixture
def ask(served):
    client = served.client()
    with client:
        yield lambda messages=CHAT, **more: client.chat.completions.create(
            model="small", messages=messages, **{"max_tokens": 12, "seed": 3} | more
        )


def test_a_chat_has_the_ids_of_the_chat_template(served, ask, tmp_path):
    theirs = AutoTokenizer.from_pretrained(foreign_folder(tmp_path, "smollm2"))
    harmless = [message | {"content": message["content"].replace("<|im_end|>", "it")} for message in CHAT]
    ids = theirs.apply_chat_template(harmless, add_generation_prompt=True, return_dict=False)
    assert ask(harmless).usage.prompt_tokens == len(ids)
    assert ask().usage.prompt_tokens > len(ids)  # text that spells a special token is several tokens


def test_a_first_answer_is_that_of_rmkv_chat_and_streams_alike(served, ask):
    conversation = Conversation(served.model, served.tokenizer, SamplingConfig(seed=3), 12)
    said = "".join(conversation.say("Hello"))
    assert ask(CHAT[:1]).choices[0].message.content == said
    chunks = ask(CHAT[:1], stream=True, logprobs=True, top_logprobs=2)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == said


def test_a_stored_chat_continues_after_the_tokens_that_end_an_answer(served, ask):
    tokenizer = served.tokenizer
    served.ask("POST", "/v1/memories", json={"name": "talk", "text": "Hello world"}).raise_for_status()
    keep = {"memory": "talk", "keep": True}
    first = ask(CHAT[:1], extra_body=keep)
    read = tokenizer.encode("Hello world"), tokenizer.encode(first.choices[0].message.content)
    closing = tokenizer.encode_document(tokenizer.template.closing)
    total = sum(map(len, read)) + first.usage.prompt_tokens + len(closing)
    assert served.ask("GET", "/v1/memories/talk").json()["tokens"] == total
    second = ask(CHAT[2:], extra_body=keep)
    pieces = pieces_of([("user", CHAT[2]["content"])], tokenizer, after=True)
    assert second.usage.prompt_tokens == sum(map(len, tokenizer.encode_stream(pieces, after=True)))


def test_completions_begin_and_end_as_the_model_does(served):
    said = served.client().completions.create(model="small", prompt="Hello", max_tokens=9, seed=3)
    alone = generate(served.model, served.tokenizer, "Hello", SamplingConfig(seed=3), 9)
    assert said.choices[0].text == "".join(alone)
    assert said.usage.prompt_tokens == len(served.tokenizer.encode_document(["Hello"]))


def test_what_the_template_refuses_is_400_with_its_words():
    with running(*loaded("mistral")) as server, server.client() as client:
        messages = [{"role": "system", "content": "Be brief."}, *CHAT[:1]]
        with pytest.raises(
            openai.BadRequestError,
            match="the chat template refuses this conversation: Conversation roles must alternate",
        ) as error:
            client.chat.completions.create(model="small", messages=messages)
        assert error.value.param == "messages"
        answer = client.chat.completions.create(model="small", messages=CHAT[:1], max_tokens=5, seed=3)
        assert not answer.choices[0].message.content.startswith(" ")


def test_a_model_without_a_chat_template_completes_texts_alone():
    files = {name: content for name, content in foreign_files("llama3").items() if "template" not in name}
    tokenizer = Tokenizer.from_files(files)
    with running(make_model(vocab_size=tokenizer.vocab_size), tokenizer) as server, server.client() as client:
        with pytest.raises(
            openai.BadRequestError, match="this model has no chat template, so it takes no conversations"
        ):
            client.chat.completions.create(model="small", messages=CHAT[:1])
        assert client.completions.create(model="small", prompt="Hello", max_tokens=5).usage.completion_tokens
