"""The OpenAI protocol, spoken by the official client with a real server."""

import json
from collections import Counter

import openai
import pytest
import torch
from random_chats import draw_chat, training_ids
from small_server import running

from rmkv_cli.generation import Decoder, SamplingConfig, generate
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Special

CAT = {"model": "small", "prompt": "the cat", "max_tokens": 12, "seed": 3}
HELLO = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "seed": 3}


def error_of(call, status):
    with pytest.raises(openai.APIStatusError) as refused:
        call()
    assert refused.value.status_code == status
    body = json.loads(refused.value.response.text)["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    return body


def write(loaded, prompt, max_tokens=12, ends=(Special.EOD,), stop=(), **config):
    generation = generate(*loaded, prompt, SamplingConfig(**config), max_tokens, stop, ends)
    list(generation)
    return generation


class TestModels:
    def test_there_is_one_under_its_folder_s_name(self, client):
        assert [model.id for model in client.models.list()] == ["small"]
        assert client.models.retrieve("small").owned_by == "rmkv"
        assert error_of(lambda: client.models.retrieve("other"), 404)["code"] == "model_not_found"
        assert error_of(lambda: client.completions.create(**CAT | {"model": "other"}), 404)["param"] == "model"


class TestCompletions:
    @pytest.mark.parametrize(
        "how",
        [
            {"temperature": 0},
            {"temperature": 1.5, "top_p": 0.5},
            {"top_k": 5},
            {"min_p": 0.5, "temperature": 3},
            {"repetition_penalty": 5, "temperature": 0},
            {"frequency_penalty": 1.5, "temperature": 0},
            {"presence_penalty": -2.0, "frequency_penalty": 0.1},
            {"no_repeat_ngram": 1},
        ],
    )
    def test_it_is_drawn_as_asked(self, client, loaded, how):
        own = {key: how[key] for key in how.keys() & {"top_k", "min_p", "repetition_penalty", "no_repeat_ngram"}}
        asked = {key: how[key] for key in how.keys() - own.keys()} | {"extra_body": own, "max_tokens": 40}
        text = write(loaded, "the cat", 40, **how | {"seed": 3}).text
        assert client.completions.create(**CAT | asked).choices[0].text == text
        assert client.completions.create(**CAT | {"max_tokens": 40}).choices[0].text != text

    def test_n_grams_and_penalties_count_the_tokens_of_each_answer(self, client):
        def counts(**how):
            asked = HELLO | {"max_tokens": 30, "temperature": 0, "n": 2, "logprobs": True}
            choices = client.chat.completions.create(**asked, **how).choices
            return [max(Counter(tuple(score.bytes) for score in c.logprobs.content).values()) for c in choices]

        plain = counts()[0]
        assert plain > 2
        assert counts(extra_body={"no_repeat_ngram": 1}) == [1, 1]
        penalised = counts(frequency_penalty=2, presence_penalty=2)
        assert penalised[0] == penalised[1] < plain

    def test_usage_counts_what_was_read_and_written(self, client, loaded):
        usage = client.completions.create(**CAT).usage
        assert usage.prompt_tokens == len(loaded[1].encode_document(["the cat"]))
        assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)

    def test_n_texts_are_drawn_with_the_seeds_that_follow(self, client, loaded):
        choices = client.completions.create(**CAT, n=3).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        assert [choice.text for choice in choices] == [write(loaded, "the cat", seed=3 + i).text for i in range(3)]

    def test_each_of_several_prompts_has_its_n(self, client, loaded):
        choices = client.completions.create(**CAT | {"prompt": ["the cat", "a dog"]}, n=2).choices
        expected = [write(loaded, prompt, seed=seed).text for prompt in ("the cat", "a dog") for seed in (3, 4)]
        assert [choice.text for choice in choices] == expected

    def test_without_a_seed_texts_differ(self, client):
        del (asked := dict(CAT))["seed"]
        assert len({client.completions.create(**asked).choices[0].text for _ in range(4)}) > 1

    def test_a_long_prompt_is_read_as_a_whole(self, client, loaded):
        prompt = "\ufeff" + "the cat sat on the mat, and the dog " * 250  # the first one is text, and no file's mark
        answer = client.completions.create(**CAT | {"prompt": prompt})
        assert answer.choices[0].text == write(loaded, prompt, seed=3).text
        assert answer.usage.prompt_tokens == len(loaded[1].encode_document([prompt]))


class TestEnd:
    def test_length_and_stop_strings(self, client, loaded):
        whole = client.completions.create(**CAT).choices[0]
        assert whole.finish_reason == "length"
        middle = whole.text[5:7]
        for stop in (middle, ["never written", middle]):
            cut = client.completions.create(**CAT, stop=stop).choices[0]
            assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(middle)], "stop")

    def test_a_text_that_the_model_ends(self, client, loaded):
        """A chat's answer ends where the user would speak again, too."""
        longer = {"max_tokens": 2000, "temperature": 1.0, "top_p": 1.0}
        chat = client.chat.completions.create(**HELLO | longer)
        pieces = (Special.START, "hello", Special.END)
        ends = (Special.EOD, Special.START)
        alone = write(loaded, pieces, 2000, ends, temperature=1, top_p=1, seed=3)
        assert alone.stop_reason == "end"
        assert chat.choices[0].message.content == alone.text
        assert chat.choices[0].finish_reason == "stop"
        assert chat.usage.completion_tokens == len(alone.ids)


class TestStreams:
    @pytest.mark.parametrize("more", [{}, {"n": 3}, {"stop": ["a"]}, {"logprobs": 2}])
    def test_completions_are_the_same_in_pieces(self, client, more):
        whole = client.completions.create(**CAT, **more)
        chunks = list(client.completions.create(**CAT, **more, stream=True))
        for choice in whole.choices:
            own = [x for chunk in chunks for x in chunk.choices if x.index == choice.index]
            assert "".join(x.text for x in own) == choice.text
            assert [x.finish_reason for x in own] == [None] * (len(own) - 1) + [choice.finish_reason]
            if "logprobs" in more:
                assert len(own) == 12
                for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    assert [y for x in own for y in getattr(x.logprobs, field)] == getattr(choice.logprobs, field)

    def test_chats_are_the_same_in_pieces(self, client):
        whole = client.chat.completions.create(**HELLO, logprobs=True, top_logprobs=3)
        stream = client.chat.completions.create(**HELLO, logprobs=True, top_logprobs=3, stream=True)
        choices = [chunk.choices[0] for chunk in stream]
        assert [x.delta.role for x in choices] == ["assistant"] + [None] * (len(choices) - 1)
        assert "".join(x.delta.content for x in choices) == whole.choices[0].message.content
        assert [y for x in choices for y in x.logprobs.content] == whole.choices[0].logprobs.content
        assert choices[-1].finish_reason == whole.choices[0].finish_reason

    @pytest.mark.parametrize("wanted", [True, False])
    def test_the_usage_comes_last_if_asked_for(self, client, wanted):
        options = {"stream_options": {"include_usage": True}} if wanted else {}
        chunks = list(client.completions.create(**CAT, **options, stream=True))
        assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [wanted]
        if wanted:
            assert chunks[-1].choices == []
            assert chunks[-1].usage == client.completions.create(**CAT).usage

    def test_the_events_are_the_protocol_s(self, server):
        answer = server.ask("POST", "/v1/completions", json=CAT | {"stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, end, nothing = answer.text.split("\n\n")
        assert (end, nothing) == ("data: [DONE]", "")
        assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


class TestLogprobs:
    def test_they_are_the_model_s_own(self, client, loaded):
        """Of the model itself: not of what temperature and the rest make of it."""
        model, tokenizer = loaded
        ids = tokenizer.encode_document(["the cat"])
        text = write(loaded, "the cat", temperature=3, seed=3)
        with torch.no_grad():
            expected = model(torch.tensor([ids + text.ids]))[0][0].log_softmax(-1)[len(ids) - 1 : -1]
        said = client.completions.create(**CAT, temperature=3, logprobs=4).choices[0].logprobs
        own = expected.gather(1, torch.tensor(text.ids)[:, None])[:, 0]
        assert said.token_logprobs == pytest.approx(own.tolist(), abs=1e-5)
        for row, likeliest, token in zip(expected, said.top_logprobs, said.tokens, strict=True):
            best = row.topk(4).values.tolist()
            assert sorted(likeliest.values(), reverse=True)[:4] == pytest.approx(best, abs=1e-5)
            assert token in likeliest
        chat = client.chat.completions.create(**HELLO, logprobs=True, top_logprobs=2).choices[0].logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in chat)
        content = b"".join(bytes(token.bytes) for token in chat).decode("utf-8", "replace")
        assert content == client.chat.completions.create(**HELLO).choices[0].message.content

    def test_the_offsets_are_where_the_tokens_begin(self, client):
        choice = client.completions.create(**CAT | {"max_tokens": 60}, logprobs=0).choices[0]
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            if token.isascii() and not token.startswith("bytes:"):
                assert choice.text[offset:].lstrip("\ufffd").startswith(token)


class TestChats:
    def test_a_conversation_is_read_as_it_was_trained(self, client, loaded):
        messages = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]},
            {"role": "assistant", "content": "<think>on</think>the mat"},
            {"role": "user", "content": "the dog"},
        ]
        start, end = Special.START, Special.END
        pieces = (start, "be brief", end, start, "the cat", end, Special.THINK, "on", Special.END_THINK, "the mat")
        pieces += (start, "the dog", end)
        answer = client.chat.completions.create(**HELLO | {"messages": messages})
        ends = (Special.EOD, Special.START)
        assert answer.choices[0].message.content == write(loaded, pieces, ends=ends, seed=3).text
        assert answer.usage.prompt_tokens == len(loaded[1].encode_document(pieces))

    def test_its_ids_are_those_of_training(self, client, loaded, tmp_path):
        model, tokenizer = loaded
        chats = [draw_chat(seed) for seed in range(25)]
        for messages, ids in zip(chats, training_ids(chats, tokenizer, tmp_path), strict=True):
            asked = HELLO | {"messages": messages, "max_tokens": 1, "temperature": 0}
            answer = client.chat.completions.create(**asked, logprobs=True)
            assert answer.usage.prompt_tokens == len(ids)
            with torch.no_grad():
                expected = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)[len(Special) :].max()
            (token,) = answer.choices[0].logprobs.content
            assert token.logprob == pytest.approx(expected.item(), abs=1e-6)

    def test_text_that_spells_a_special_token_stays_text(self, client, loaded):
        answer = client.chat.completions.create(**HELLO | {"messages": [{"role": "user", "content": "<end><eod>"}]})
        assert answer.usage.prompt_tokens == 3 + len(loaded[1].encode("<end><eod>"))

    def test_the_newer_name_of_max_tokens_goes_first(self, client):
        assert client.chat.completions.create(**HELLO, max_completion_tokens=2).usage.completion_tokens == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("wrong", "param", "message"),
        [
            ({"prompt": None}, "prompt", "prompt: is missing"),
            (
                {"prompt": [1, 2]},
                "prompt",
                "prompt: should be a string or a list of strings; token ids are not supported",
            ),
            ({"prompt": []}, "prompt", "prompt: list should have at least 1 item"),
            ({"temperature": -1}, "temperature", "temperature: input should be greater than or equal to 0"),
            ({"temperature": "1"}, "temperature", "temperature: input should be a valid number"),
            ({"temperature": 101}, "temperature", "temperature: input should be less than or equal to 100"),
            ({"repetition_penalty": 1e-40}, "repetition_penalty", "repetition_penalty: input should be greater than"),
            ({"repetition_penalty": 101}, "repetition_penalty", "repetition_penalty: input should be less than"),
            ({"top_k": -1}, "top_k", "top_k: input should be greater than or equal to 0"),
            ({"top_k": 2**31}, "top_k", "top_k: input should be less than 2147483648"),
            ({"top_p": 0}, "top_p", "top_p: input should be greater than 0"),
            ({"top_p": 1.1}, "top_p", "top_p: input should be less than or equal to 1"),
            ({"min_p": -0.1}, "min_p", "min_p: input should be greater than or equal to 0"),
            ({"min_p": 1.1}, "min_p", "min_p: input should be less than or equal to 1"),
            ({"seed": 2**63}, "seed", "seed: input should be less than 9223372036854775808"),
            ({"n": 129}, "n", "n: input should be less than or equal to 128"),
            ({"seed": -1}, "seed", "seed: input should be greater than or equal to 0"),
            ({"seed": 2**63 - 1, "n": 2}, "n", "n: seed + n should be at most 2**63"),
            ({"stop": ""}, "stop.0", "stop.0: string should have at least 1 character"),
            ({"stop": ["a"] * 5}, "stop", "stop: list should have at most 4 items"),
            ({"n": 9}, "n", "n: this server generates at most 8 texts per request, got 9"),
            ({"prompt": ["a"] * 5, "n": 2}, "n", "n: this server generates at most 8 texts per request, got 10"),
            ({"max_tokens": 5000}, "max_tokens", "max_tokens: should be 4096 or less on this server, got 5000"),
            ({"logprobs": 6}, "logprobs", "logprobs: input should be less than or equal to 5"),
            ({"echo": True}, "echo", "echo: is not supported; leave it out"),
            ({"frequency_penalty": 2.1}, "frequency_penalty", "frequency_penalty: input should be less than or equal"),
            ({"presence_penalty": -3}, "presence_penalty", "presence_penalty: input should be greater than or equal"),
            ({"no_repeat_ngram": -1}, "no_repeat_ngram", "no_repeat_ngram: input should be greater than or equal"),
            ({"temprature": 1}, "temprature", "Unrecognized request argument supplied: temprature"),
            ({"prompt": "a\ud800"}, None, "character 2 of the text is a lone surrogate"),
            ({"prompt": "the cat " * 10_000 + "\ud800"}, None, "character 80001 of the text is a lone surrogate"),
            ({"keep": True}, "keep", "keep: needs the name of a memory"),
            ({"memory": "no such"}, "memory", "memory: string should match pattern"),
            ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options: is only for streams"),
        ],
    )
    def test_what_is_wrong_with_a_completion(self, server, wrong, param, message):
        body = json.dumps(CAT | wrong)
        answer = server.ask("POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["message"].startswith(message)
        assert (error["type"], error["param"]) == ("invalid_request_error", param)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"messages": []}, "messages: list should have at least 1 item"),
            ({"messages": [{"role": "function", "content": "a"}]}, "messages.0.role: input should be 'system'"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                "messages.0.content: input should be",
            ),
            ({"messages": [{"role": "user"}]}, "messages.0.content: is missing"),
            (
                {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
                "messages.0: has a tool call without a function",
            ),
            ({"tools": [{"type": "function"}]}, "tools: is not supported"),
            ({"top_logprobs": 2}, "top_logprobs: needs logprobs = true"),
            ({"response_format": {"type": "json_object"}}, "response_format: is not supported"),
        ],
    )
    def test_what_is_wrong_with_a_chat(self, server, wrong, message):
        answer = server.ask("POST", "/v1/chat/completions", json=HELLO | wrong)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(message)

    def test_fields_that_change_nothing_are_taken(self, client):
        asked = {"user": "me", "store": False, "metadata": {"a": "b"}, "tools": [], "presence_penalty": 0}
        answer = client.chat.completions.create(**HELLO, **asked, response_format={"type": "text"})
        assert answer.choices == client.chat.completions.create(**HELLO).choices

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/completions", 400)],
    )
    def test_every_error_has_the_protocol_s_form(self, server, method, path, status):
        answer = server.ask(method, path)
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

    @pytest.mark.parametrize(
        "body", [b"{", b"[]", b'"text"', b"\xff", b'{"prompt": NaN}', b'{"\\ud800": 1}', b"[" * 100_000]
    )
    def test_a_body_that_is_not_a_request(self, server, body):
        answer = server.ask("POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert "body" in answer.json()["error"]["message"] or "prompt" in answer.json()["error"]["message"]

    def test_a_fault_of_the_server_is_reported_and_survived(self, loaded, capsys, monkeypatch):
        def broken(*_):
            raise RuntimeError("no more memory")

        model, tokenizer = RMKV(loaded[0].config), loaded[1]
        with running(model, tokenizer) as server, server.client() as client:
            monkeypatch.setattr(model, "head", broken)
            assert error_of(lambda: client.completions.create(**CAT), 500)["type"] == "server_error"
            monkeypatch.undo()
            assert client.completions.create(**CAT).usage.completion_tokens == 12
        assert "no more memory" in capsys.readouterr().err

    def test_an_engine_that_is_beyond_repair_leaves_nobody_waiting(self, loaded, monkeypatch):
        def broken(*_):
            raise RuntimeError("no more memory")

        with running(*loaded) as server, server.client() as client:
            assert server.ask("GET", "/health").status_code == 200
            for part in ("step", "clear"):
                monkeypatch.setattr(Decoder, part, broken)
            for status, code in ((500, "internal_error"), (503, "shutting_down")):
                assert error_of(lambda: client.completions.create(**CAT), status)["code"] == code
            assert server.ask("GET", "/health").status_code == 503
