"""Named memories are made of texts, continued, kept separate and bounded."""

import json
import threading

import pytest
import torch
from small_server import running, wait_for

from rmkv_cli.data.chat import answer
from rmkv_cli.errors import UserError
from rmkv_cli.generation import SamplingConfig, generate, read_prompt, save_start
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Special

TEXT = "the dog sat on the log. "
CAT = {"prompt": "the cat", "max_tokens": 12, "seed": 3}


@pytest.fixture
def memories(server):
    """Asks about memories, and deletes what the test left."""

    def ask(method, path="", status=None, /, **body):
        more = {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}} if body else {}
        answer = server.ask(method, f"/v1/memories{path and '/'}{path}", **more)
        assert answer.status_code == (status or (201 if method == "POST" and not path else 200)), answer.text
        return answer.json()

    yield ask
    for memory in ask("GET")["data"]:
        ask("DELETE", memory["name"])


@pytest.fixture
def complete(server):
    def ask(**body):
        answer = server.ask("POST", "/v1/completions", json=CAT | body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    return ask


def write(loaded, *parts, ends=(Special.EOD,)):
    """What is written after these parts, each read after the one before."""
    prompt = None
    for part in parts:
        prompt = read_prompt(*loaded, part, prompt)
    generation = generate(*loaded, prompt, SamplingConfig(seed=3), 12, ends=ends)
    list(generation)
    return generation.text


class TestMemories:
    def test_a_tuned_memory_is_offered_under_its_name(self, memories, complete, server, loaded, tmp_path):
        model, tokenizer = loaded
        tuned = RMKV(model.config).double().eval()
        tuned.load_state_dict(model.state_dict() | {"memory": model.memory + torch.randn_like(model.memory)})
        save_start(tmp_path / "memory.safetensors", tuned, tokenizer)
        server.service.load_memory("tuned", tmp_path / "memory.safetensors")
        assert memories("GET", "tuned")["tokens"] == 1
        assert complete(memory="tuned") == write((tuned, tokenizer), CAT["prompt"]) != complete()
        with pytest.raises(UserError, match=r"--memory tuned=.*: memory 'tuned' exists"):
            server.service.load_memory("tuned", tmp_path / "memory.safetensors")

    def test_one_is_made_listed_and_deleted(self, memories, loaded):
        made = memories("POST", name="dogs", text=TEXT * 20)
        assert made["tokens"] == len(loaded[1].encode_document([TEXT * 20]))
        assert made == memories("GET", "dogs")
        assert memories("GET")["data"] == [made]
        assert memories("DELETE", "dogs")["deleted"]
        assert memories("GET")["data"] == []
        for method, body in (("GET", {}), ("DELETE", {}), ("POST", {"text": "a"})):
            assert memories(method, "dogs", 404, **body)["error"]["code"] == "memory_not_found"

    def test_a_text_continues_from_it(self, memories, complete, loaded):
        memories("POST", name="dogs", text=TEXT)
        assert complete(memory="dogs") == write(loaded, TEXT, "the cat")
        assert complete(memory="dogs", prompt="") == write(loaded, TEXT)
        assert complete() == write(loaded, "the cat")

    def test_it_reads_on(self, memories, complete, loaded):
        before = memories("POST", name="dogs", text=TEXT)
        after = memories("POST", "dogs", text=TEXT * 50)
        assert after["tokens"] == before["tokens"] + len(loaded[1].encode(TEXT * 50))
        assert after["bytes"] <= after["bytes_at_most"] == before["bytes_at_most"]
        assert complete(memory="dogs") == write(loaded, TEXT, TEXT * 50, "the cat")

    def test_a_request_leaves_the_memory_unchanged(self, memories, complete):
        made = memories("POST", name="dogs", text=TEXT)
        first = complete(memory="dogs")
        assert complete(memory="dogs") == first
        assert memories("GET", "dogs") == made

    @pytest.mark.parametrize("stop", [[], ["at"]])
    def test_with_keep_it_holds_what_was_asked_and_said(self, memories, complete, loaded, stop):
        memories("POST", name="dogs", text=TEXT)
        said = complete(memory="dogs", keep=True, stop=stop)
        expected = read_prompt(*loaded, TEXT)
        for part in ("the cat", said):
            expected = read_prompt(*loaded, part, expected)
        assert memories("GET", "dogs")["tokens"] == int(expected.state.position)
        assert complete(memory="dogs", prompt="a") == write(loaded, TEXT, "the cat", said, "a")

    def test_a_chat_is_kept_turn_by_turn(self, server, client, memories, loaded):
        memories("POST", name="talk", text="")
        ends = (Special.EOD, Special.START)
        said = []
        for words in ("hello", "the cat"):
            message = {"role": "user", "content": words}
            more = {"memory": "talk", "keep": True}
            reply = client.chat.completions.create(
                model="small", messages=[message], max_tokens=12, seed=3, extra_body=more
            )
            parts = [x for turn in said for x in turn] + [(Special.START, words, Special.END)]
            assert reply.choices[0].message.content == write(loaded, "", *parts, ends=ends)
            said.append(((Special.START, words, Special.END), answer(reply.choices[0].message.content)))

    def test_a_stream_keeps_as_well(self, client, memories):
        before = memories("POST", name="dogs", text=TEXT)
        more = {"memory": "dogs", "keep": True}
        list(client.completions.create(model="small", prompt="a", max_tokens=5, stream=True, extra_body=more))
        assert memories("GET", "dogs")["tokens"] > before["tokens"]

    def test_a_client_that_has_the_whole_answer_may_leave(self, server, client, memories):
        before = memories("POST", name="dogs", text=TEXT)
        more = {"memory": "dogs", "keep": True}
        with client.completions.create(
            model="small", prompt="a", max_tokens=200, seed=3, stream=True, extra_body=more
        ) as stream:
            next(chunk for chunk in stream if chunk.choices[0].finish_reason)
        wait_for(lambda: not server.unfinished())
        assert memories("GET", "dogs")["tokens"] > before["tokens"] + 100

    def test_a_failed_request_leaves_the_memory_unchanged(self, server, memories):
        made = memories("POST", name="dogs", text=TEXT)
        body = json.dumps(CAT | {"prompt": "\ud800", "memory": "dogs", "keep": True})
        asked = server.ask("POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert asked.status_code == 400
        assert memories("POST", "dogs", 400, text="\ud800")
        assert memories("GET", "dogs") == made
        assert memories("POST", "", 400, name="cats", text="\ud800")
        memories("POST", name="cats", text="a")

    @pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 65, "-a", "é"])
    def test_names_are_plain(self, memories, name):
        assert memories("POST", "", 400, name=name, text="a")["error"]["param"] == "name"


class TestTogether:
    def test_many_continue_from_one_while_it_is_written(self, server, memories, complete, loaded):
        memories("POST", name="dogs", text=TEXT)
        texts = []
        readers = [threading.Thread(target=lambda: texts.append(complete(memory="dogs"))) for _ in range(6)]
        kept = server.service.memories.hold("dogs")[1]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        kept(None)
        assert set(texts) == {write(loaded, TEXT, "the cat")}

    def test_only_one_request_at_a_time_changes_a_memory(self, server, memories):
        made = memories("POST", name="dogs", text=TEXT)
        _, keep = server.service.memories.hold("dogs")
        for refused in (
            memories("POST", "dogs", 409, text="a"),
            memories("DELETE", "dogs", 409),
            server.ask("POST", "/v1/completions", json=CAT | {"memory": "dogs", "keep": True}).json(),
        ):
            assert refused["error"]["code"] == "memory_busy"
        keep(None)
        assert memories("GET", "dogs") == made
        memories("POST", "dogs", text="a")

    def test_a_name_is_given_once(self, server, memories):
        keep = server.service.memories.create("dogs", "small")
        assert memories("POST", "", 409, name="dogs", text="a")["error"]["code"] == "memory_exists"
        keep(None)
        memories("POST", name="dogs", text="a")
        assert memories("POST", "", 409, name="dogs", text="a")["error"]["code"] == "memory_exists"

    @pytest.mark.parametrize("path", ["", "dogs"])
    def test_the_creator_gets_its_response_although_another_client_deletes_it_at_once(
        self, server, memories, monkeypatch, path
    ):
        read = server.service.read

        async def read_and_lose(*what):
            figures = await read(*what)
            server.service.memories.delete("dogs")
            return figures

        if path:
            memories("POST", name="dogs", text=TEXT)
        monkeypatch.setattr(server.service, "read", read_and_lose)
        figures = memories("POST", path, text=TEXT, **({} if path else {"name": "dogs"}))
        assert (figures["name"], figures["tokens"] > 0) == ("dogs", True)
        assert memories("GET", "dogs", 404)


class TestBounds:
    @pytest.mark.parametrize("bound", ["number", "bytes"])
    def test_the_number_of_memories_is_bounded(self, loaded, bound):
        with running(*loaded, max_memories=2) as server:
            most = server.service.memories.bytes_at_most
        limits = {"max_memories": 2} if bound == "number" else {"max_memory_bytes": 3 * most - 1}
        with running(*loaded, **limits) as server:
            made = [server.ask("POST", "/v1/memories", json={"name": x, "text": "a"}) for x in "abc"]
            assert [answer.status_code for answer in made] == [201, 201, 507]
            assert made[2].json()["error"]["code"] == "no_room_for_memory"
            server.ask("DELETE", "/v1/memories/a")
            assert server.ask("POST", "/v1/memories", json={"name": "c", "text": "a"}).status_code == 201

    @pytest.mark.slow
    def test_the_bytes_do_not_grow_with_the_text(self, server, memories):
        """Nor do the tensors keep larger ones alive, of which they would be parts."""
        memories("POST", name="dogs", text="a")
        sizes = set()
        for part in range(20):
            figures = memories("POST", "dogs", text=TEXT * 20 + "x" * part)
            state = server.service.memories.get("dogs").state
            stored = sum(x.untyped_storage().nbytes() for x in state.tensors().values())
            assert stored <= figures["bytes"] <= figures["bytes_at_most"]
            sizes.add(figures["bytes"])
        assert len(sizes) <= server.model.config.segment_length


def test_a_client_that_leaves_while_its_text_is_read_changes_nothing(server, memories):
    made = memories("POST", name="dogs", text=TEXT)
    with server.begin("/v1/memories/dogs", {"text": TEXT * 20_000}):
        wait_for(server.unfinished)
    wait_for(lambda: not server.unfinished())
    assert memories("GET", "dogs") == made
    memories("POST", "dogs", text="a")
    assert torch.isfinite(server.service.memories.get("dogs").logits).all()
