"""Training on conversations whose answers alone are supervised."""

import json

import pytest
import torch
import torch.nn.functional as F
from compare_runs import curve

from rmkv_cli.config import MixConfig
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.lanes import Lanes, Prepared
from rmkv_cli.data.mix import prepare
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import measure
from rmkv_cli.generation import Conversation, SamplingConfig
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Special
from rmkv_cli.training import train
from rmkv_cli.training.loss import row_loss


@pytest.fixture
def chats(tmp_path, tokenizer):
    """Prepares conversations of such turns, of which the answers are supervised; returns the folder."""

    def make(conversations, **keys):
        lines = [
            json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
            for turns in conversations
        ]
        (tmp_path / "chats.jsonl").write_text("\n".join(lines))
        source = {"kind": "files", "name": "chats", "weight": 1, "files": ["chats.jsonl"], "format": "messages"}
        mix = MixConfig(supervise="answers", sources=[source], **{"validation": 0.3} | keys)
        prepare(mix, tmp_path, tokenizer, tmp_path / "chats", workers=1)
        return tmp_path / "chats"

    return make


def test_steps_without_a_supervised_token_are_reported_and_change_nothing(make_config, chats, tmp_path, capsys):
    asked = [("user", "the cat sat on the mat " * 40), ("assistant", "yes")]
    data = chats([asked] * 30, validation=0)
    lane = {"batch_size": 1, "micro_batch_size": 1, "segments_max": 1, "checkpoint_every": 100, "eval_every": 100}
    train(make_config(data=str(data), tokens=800, **lane), tmp_path / "run")
    records = [record for record in curve(tmp_path / "run") if "learning_rate" in record]
    without = [record["step"] for record in records if "loss" not in record]
    assert 10 < len(without) < len(records)
    said = [line for line in capsys.readouterr().err.splitlines() if "no supervised tokens" in line]
    assert said[0] == f"step {without[0]}: no supervised tokens, weights stay unchanged (1 such step so far)"
    assert said[1] == f"step {without[1]}: no supervised tokens, weights stay unchanged (2 such steps so far)"
    assert len(said) == len(without).bit_length()


def test_validation_is_about_the_answers_and_their_bytes(make_config, chats, tmp_path, tokenizer):
    data = chats([[("user", f"the cat {i}"), ("assistant", f"sat on mat {i}")] for i in range(60)])
    outcome = train(make_config(data=str(data), tokens=400, eval_tokens=10_000), tmp_path / "run")
    held_out = Documents.open(data, "validation")
    report = measure(RMKV.from_pretrained(outcome.run), held_out, tokenizer=tokenizer)
    texts = ["".join(piece for piece in tokenizer.pieces(ids.tolist()) if type(piece) is str) for ids in held_out]
    assert report.bytes == sum(len(text[text.index("sat on") :].encode()) for text in texts)
    assert outcome.validation["loss"] == pytest.approx(report.loss, rel=1e-5)
    assert outcome.validation["bits_per_byte"] == pytest.approx(report.bits_per_byte, rel=1e-5)


def test_held_out_documents_without_answers_are_no_validation(make_config, chats, tmp_path, capsys):
    few = [[("user", f"the cat {i}")] for i in range(60)]
    data = chats([*few, [("user", "the"), ("assistant", "mat")]], validation=0.1)
    if Documents.open(data, "validation").counts.any():
        pytest.fail("the only answer is held out: choose another text")
    outcome = train(make_config(data=str(data), tokens=300), tmp_path / "run")
    assert outcome.finished
    assert outcome.validation is None
    assert (
        "warning: no token of the held-out documents is supervised, so there is no validation"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_model_learns_where_its_answers_end(make_config, chats, tmp_path, tokenizer):
    """Answers are followed by a prompt or by the end of the document, and the model ends them after their last word."""
    turns = [("user", "the cat"), ("assistant", "sat on mat"), ("user", "a dog"), ("assistant", "ran")]
    data = chats([turns, turns[:2], turns[2:]] * 10, validation=0)
    rare = {"checkpoint_every": 1000, "eval_every": 1000}
    outcome = train(make_config(data=str(data), tokens=5000, segments_min=2, **rare), tmp_path / "run")
    model = RMKV.from_pretrained(outcome.run)
    conversation = Conversation(model, tokenizer, SamplingConfig(temperature=0), 20)
    for (_, message), (_, answer) in zip(turns[::2], turns[1::2], strict=True):
        assert "".join(conversation.say(message)) == answer
        assert conversation.answer.stop_reason == "end"


def test_a_validation_too_short_for_any_answer_is_refused_before_the_first_step(make_config, chats, tmp_path):
    data = chats([[("user", f"{i} the cat " * 40), ("assistant", "mat")] for i in range(60)])
    with pytest.raises(UserError, match=r"train\.eval_tokens = 20 ends before the first supervised token"):
        train(make_config(data=str(data), eval_tokens=20), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_conversation_longer_than_a_row_is_learned_as_if_read_at_once(make_config, chats):
    """Its rows, each after the state of the one before, have the loss of the whole."""
    turns = [(role, f"{role} {i}: the cat sat on mat {i}. " * 3) for i in range(6) for role in ("user", "assistant")]
    documents = Documents.open(chats([turns], validation=0), "train")
    torch.manual_seed(0)
    model = RMKV(make_config().model).double()
    whole = torch.tensor(documents[0].astype(int))[None]
    targets = torch.cat([whole[:, 1:], torch.tensor([[Special.EOD.id]])], dim=1)
    counted = torch.from_numpy(documents.counted(0))
    losses = F.cross_entropy(model(whole)[0][0], targets[0], reduction="none")
    lanes, state, total, length = Lanes(Prepared(documents, 0), 1, Special.EOD.id), model.initial_state(1), 0.0, 40
    assert whole.shape[1] > 6 * length
    for _ in range(whole.shape[1] // length):
        rows = lanes.next(length)
        ids, wanted, numbers = (torch.from_numpy(x) for x in (rows.input_ids, rows.targets, rows.document_ids))
        loss, state = row_loss(model, ids, wanted, numbers, state)
        total += loss.item()
    read = whole.shape[1] // length * length
    assert total == pytest.approx(losses[:read][counted[:read]].sum().item(), abs=1e-9)
