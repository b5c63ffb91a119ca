"""transformers, in a process that cannot import rmkv_cli, computes, generates and encodes the same as rmkv."""

import json

import pytest
import torch
import torch.nn.functional as F
from random_chats import draw_chat, training_ids
from transformers_alone import NARROW, NEW, SAVED_AGAIN, STARTS, alone

from rmkv_cli.data.chat import pieces_of, read_messages
from rmkv_cli.generation import Conversation, SamplingConfig, generate
from rmkv_cli.huggingface import export_folder, import_folder
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Special

NAMES = ("usual", "other")
WAYS = {"greedy": {"do_sample": False}, "beams": {"do_sample": False, "num_beams": 3}}
TEXTS = [
    "the cat sat on 1234 logs.\n\n\tdef f(x): return 'ж'  ",
    "it ends: <eod>, </think>; <pad><start> and <\n",
    "marked: <\ue000think> <<\ue000\ue000\ue000",
    "",
]
CHATS = [
    [{"role": "user", "content": "the cat?"}],
    [
        {"role": "system", "content": " Be <end> brief.\n"},
        {"role": "user", "content": "What is <eod>, or <<end>>? {{ x }} <|eot_id|> "},
        {"role": "assistant", "content": "\n <think>It is <end> </think> The </think> end.\n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": " no <think>thought</think>"},
    ],
    [{"role": "developer", "content": "<\ue000end>"}, {"role": "user", "content": "\n x "}],
    [
        {"role": "User ", "content": [{"type": "text", "text": "the <end"}, {"type": "text", "text": "> cat"}]},
        {
            "role": " Assistant",
            "content": [{"type": "text", "text": "<think>a <mat"}, {"type": "text", "text": "></think>"}],
        },
        {"role": "user", "content": []},
        {"role": "GPT", "content": "on \u2003"},
        {"role": "ai\n", "content": ""},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "\u2003<think>1 < 2</think>the log"},
    ],
]
RANDOM = [draw_chat(seed) for seed in range(100)]
CHATS[1:1] = RANDOM
ROWS = ["the cat sat on the mat", "a dog", "", "on the log, and the dog sat on the mat and on"]


@pytest.fixture(scope="module")
def place(models, tmp_path_factory):
    """A folder of exported folders."""
    place = tmp_path_factory.mktemp("exported")
    for name in NAMES:
        export_folder(models[0] / name, place / name)
        export_folder(models[0] / name, place / f"{name}-{NARROW}", torch.bfloat16)
    return place


@pytest.fixture(scope="module")
def ids():
    return torch.randint(7, 280, (2, 45), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def answers(place, ids):
    asked = {"ids": ids, "lengths": [1, 7, 20, 1, 1, 15], "ways": WAYS, "texts": TEXTS, "chats": CHATS, "rows": ROWS}
    folders = {name: str(place / name) for name in NAMES}
    answers = alone(place, folders.values(), asked, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    return {name: answers[folder] for name, folder in folders.items()}


@pytest.fixture(params=NAMES)
def both(request, models, answers):
    """Our model and tokenizer, and what transformers answered."""
    return *models[1][request.param], answers[request.param]


@pytest.mark.slow
def test_the_logits_and_the_loss_are_the_same(both, ids):
    model, _, found = both
    with torch.no_grad():
        logits = model(ids)[0]
    assert torch.allclose(found["logits"], logits, atol=1e-5)
    assert torch.allclose(found["last"], logits[:, -1:], atol=1e-5)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item())


def test_the_cache_continues_from_any_place_and_can_be_branched(both):
    found = both[-1]
    assert torch.allclose(found["pieces"], found["logits"], atol=1e-5)
    assert found["read"] == 45
    assert found["same twice"]
    assert found["from a cache"] == 2 * [found["greedy"][1]]


def test_a_padded_row_writes_what_rmkv_writes(both):
    model, tokenizer, found = both
    assert sorted({row[0] for row in found["padding"]}) == [0, 1]
    for start, written, piped in zip(STARTS, found["greedy"], found["pipeline"], strict=True):
        ours = generate(model, tokenizer, start, SamplingConfig(temperature=0), NEW)
        text = "".join(ours)
        assert [token for token in written if token != tokenizer.eod] == ours.ids
        assert piped[0]["generated_text"] == text
    assert len({tuple(row) for row in found["greedy"]}) == len(STARTS)


@pytest.mark.parametrize("way", WAYS)
def test_a_padded_row_writes_what_it_writes_alone_with_and_without_the_cache(both, way):
    found = both[-1]
    assert found[way] == found[f"{way}, alone"] == found[f"{way}, no cache"]


def test_beams_find_other_texts_than_greedy(answers):
    assert any(found["beams"] != found["greedy"] for found in answers.values())


def test_samples_differ_and_contain_no_forbidden_id(both):
    _, tokenizer, found = both
    written = {token for row in found["sampled"] for token in row}
    assert len({tuple(row) for row in found["sampled"]}) == 8 * len(STARTS)
    assert len(written) > 100
    assert not written & {Special.PAD.id, Special.UNK.id}
    assert max(written) < tokenizer.vocab_size


def test_texts_and_conversations_have_the_same_ids_whatever_they_spell(both):
    _, tokenizer, found = both
    assert found["texts"] == [tokenizer.encode_document([text]) for text in TEXTS]
    assert found["decoded"] == [str(Special.EOD) + text for text in TEXTS]
    assert found["chats"] == [tokenizer.encode_document(pieces_of(read_messages(chat))) for chat in CHATS]


def test_conversations_have_the_ids_that_training_reads(both, tmp_path):
    _, tokenizer, found = both
    assert found["chats"][1 : 1 + len(RANDOM)] == training_ids(RANDOM, tokenizer, tmp_path)


def test_a_conversation_is_answered(both):
    said = both[-1]["chat"][0]["generated_text"]
    assert said[:-1] == CHATS[0]
    assert said[-1]["role"] == "assistant"


def test_an_exported_chat_is_what_our_own_conversation_reads(both):
    model, tokenizer, found = both
    conversation = Conversation(model, tokenizer, SamplingConfig(temperature=0), NEW, system=CHATS[-2][0]["content"])
    for _ in conversation.say(CHATS[-2][1]["content"]):
        pass
    assert conversation.question.state.position.item() == len(found["chats"][-2])
    with torch.no_grad():
        logits = model(torch.tensor([found["chats"][-2]]))[0][:, -1]
    assert torch.allclose(conversation.question.logits, logits, atol=1e-5)


def test_a_thought_stays_apart_from_its_answer_where_special_tokens_are_skipped(both):
    kept = "the <end> cat<think>a <mat></think>on \u20033<think>1 < 2</think>the log"
    assert both[-1]["kept"] == kept


def test_an_answer_ends_where_the_next_message_would_begin(both):
    assert both[-1]["ended"] == [Special.START.id]


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_change_nothing_of_the_loss(both, side):
    assert both[-1]["losses"][side] == pytest.approx(unpadded_loss(*both[:2]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_writes_and_has_a_loss(both, dtype):
    model, tokenizer, found = both
    for loss, logits, weights in found[dtype]:  # loaded in it, and cast to it
        assert loss == pytest.approx(unpadded_loss(model, tokenizer), rel=0.02)
        assert logits == weights == dtype
    assert all(length > NEW for lengths in found[dtype, "written"] for length in lengths)


def unpadded_loss(model, tokenizer):
    """Return the mean loss of all targets of ROWS, each read alone."""
    losses = []
    for row in ROWS:
        ids = torch.tensor([tokenizer.encode_document([row])])
        with torch.no_grad():
            losses.append(F.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_transformers_saved_is_imported_unchanged(models, place, answers, tmp_path, name):
    import_folder(place / f"{name}-{SAVED_AGAIN}", tmp_path / "back")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / file).read_bytes() == (models[0] / name / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
class TestBfloat16:
    @pytest.mark.parametrize("way", [0, 1, 2], ids=["its own type", "asked for", "of a float32 folder"])
    def test_dtypes_and_logits_match_rmkv_s(self, models, answers, ids, name, way):
        model = RMKV.from_pretrained(models[0] / name, dtype=torch.bfloat16)
        logits, types = answers[name]["bfloat16"][way]
        assert types == {f"model.{key}": x.dtype for key, x in model.state_dict().items()}
        assert set(types.values()) == {torch.float32, torch.bfloat16}
        with torch.no_grad():
            assert torch.equal(logits, model(ids)[0])

    @pytest.mark.parametrize("folder", ["exported", "saved again by transformers"])
    def test_an_exported_folder_is_imported_with_its_dtypes_and_values(
        self, models, place, answers, tmp_path, name, folder
    ):
        exported = place / (f"{name}-{NARROW}" if folder == "exported" else f"{name}-{NARROW}-{SAVED_AGAIN}")
        assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
        import_folder(exported, tmp_path / "back")
        RMKV.from_pretrained(models[0] / name, dtype=torch.bfloat16).save_pretrained(tmp_path)
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "back" / file).read_bytes() == (tmp_path / file).read_bytes()
