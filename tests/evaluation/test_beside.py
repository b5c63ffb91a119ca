"""Comparison with a transformers model on the same texts."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_run import TEXT, save_small_model
from small_transformer import save_transformer

from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import measure
from rmkv_cli.evaluation.beside import measure_beside
from rmkv_cli.evaluation.transformer import load_transformer, load_transformer_tokenizer
from rmkv_cli.model.size import state_bytes

TEXTS = [TEXT * 3 + "ünd so", TEXT * 8, "x"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our model and tokenizer, the transformer and its tokenizer, and documents with the texts."""
    place = tmp_path_factory.mktemp("beside")
    ours = save_small_model(place)
    save_transformer(place / "other", "Llama", dtype=torch.float32)
    theirs = load_transformer(str(place / "other")), load_transformer_tokenizer(str(place / "other"))
    for number, text in enumerate(TEXTS):
        (place / f"{number}.txt").write_text(text)
    return ours, theirs, Documents.from_files([place / f"{number}.txt" for number in range(len(TEXTS))], ours[1])


def expected(model, tokenizer, text, whole=True):
    """Losses of all tokens except the first, and of the end, in one pass; and the bytes of those tokens."""
    ids = tokenizer(text)["input_ids"]
    targets = torch.tensor(ids[1:] + [tokenizer.eos_token_id] * whole)
    with torch.no_grad():
        logits = model(torch.tensor([ids[: len(targets)]])).logits[0]
    return F.cross_entropy(logits, targets, reduction="none"), len(tokenizer.decode(ids[1:]).encode())


def test_it_reads_the_same_texts_by_its_own_tokenizer_in_chunks(both, monkeypatch):
    monkeypatch.setattr("rmkv_cli.evaluation.beside.CHUNK", 7)
    ours, theirs, documents = both
    report, other = measure_beside(ours, theirs, "other", documents)
    plain = measure(ours[0], documents, tokenizer=ours[1])
    assert (report.loss, report.bits_per_byte) == pytest.approx((plain.loss, plain.bits_per_byte))
    found = [expected(*theirs, text) for text in TEXTS]
    nats, size = torch.cat([losses for losses, _ in found]), sum(size for _, size in found)
    assert (other.documents, other.tokens, other.bytes) == (3, len(nats), size)
    assert other.loss == pytest.approx(nats.mean().item(), rel=1e-5)
    assert other.bits_per_byte == pytest.approx(nats.sum().item() / math.log(2) / size, rel=1e-5)
    first = torch.cat([losses[:64] for losses, _ in found])
    assert (other.by_position[0].first, other.by_position[0].tokens) == (0, len(first))
    assert other.by_position[0].loss == pytest.approx(first.mean().item(), rel=1e-5)
    assert sum(part.tokens for part in other.by_position) == other.tokens
    assert other.tokens != report.tokens  # because the tokenizers differ


def test_state_and_cache_have_their_sizes(both):
    ours, theirs, documents = both
    _, other = measure_beside(ours, theirs, "other", documents)
    longest = max(len(theirs[1](text)["input_ids"]) for text in TEXTS)
    assert other.reading.carried_tokens == longest
    assert other.reading.carried_bytes == 3 * 2 * 4 * 8 * 4 * longest  # layers, K and V, heads, width, float32
    assert other.own.carried_bytes == state_bytes(ours[0].config, 4)[1]
    assert (other.own.carried_tokens, other.own.parameters) == (documents.lengths.max(), ours[0].count_parameters())
    assert other.reading.parameters == sum(x.numel() for x in theirs[0].parameters())


def test_a_text_that_is_cut_has_no_end_to_predict(both):
    ours, theirs, documents = both
    _, other = measure_beside(ours, theirs, "other", documents, max_tokens=60)
    assert sum(expected(*theirs, text)[0].numel() for text in TEXTS) > other.tokens
    assert other.cut == 0


def test_the_other_model_reads_only_up_to_its_maximum_length(both, monkeypatch):
    ours, theirs, documents = both
    monkeypatch.setattr(theirs[0].config, "max_position_embeddings", 40)
    _, other = measure_beside(ours, theirs, "other", documents)
    assert other.cut == 2
    nats = [expected(*theirs, text)[0] for text in TEXTS]
    assert other.loss == pytest.approx(torch.cat([nats[0][:39], nats[1][:39], nats[2]]).mean().item(), rel=1e-5)


def test_documents_with_answers_are_refused(both, monkeypatch):
    ours, theirs, documents = both
    monkeypatch.setattr(documents, "counts", documents.counts - 1)
    with pytest.raises(UserError, match="only the answers count in these documents"):
        measure_beside(ours, theirs, "other", documents)
