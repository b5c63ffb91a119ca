"""A teacher's outputs for packed rows equal those for each document alone, within the context that it can read."""

import pytest
import torch
import torch.nn.functional as F
from small_documents import EOD, random_documents
from small_model import make_model
from small_transformer import FAMILIES, make_transformer

from rmkv_cli.data.lanes import Lanes, Prepared
from rmkv_cli.training.loss import Distillation, row_loss
from rmkv_cli.training.teacher import RMKVTeacher, TransformersTeacher

LENGTHS = [13, 7, 2, 40, 8, 9, 30, 6]


def rows_of(lengths, width, seed=0):
    """Consecutive rows of two lanes, as (ids, targets, document ids)."""
    lanes = Lanes(Prepared(random_documents(lengths, seed), 0), 2, EOD)
    for each in width:
        rows = lanes.next(each)
        yield tuple(torch.from_numpy(x) for x in (rows.input_ids, rows.targets, rows.document_ids))


@pytest.mark.parametrize(("family", "context"), [*((family, 64) for family in FAMILIES), ("Llama", 24)])
def test_a_transformer_isolates_documents_and_rereads_their_earlier_tokens(family, context):
    model = make_transformer(family, vocab_size=13)
    teacher = TransformersTeacher(model, context, shortest=5)
    carried, seen = teacher.start(2), [[], []]
    for ids, _, documents in rows_of(LENGTHS, [10, 5, 20, 15, 5, 20]):
        taught = teacher.read(ids, documents, carried)
        carried = taught.carried
        logits = teacher.head(taught.hidden)
        for lane, before in enumerate(seen):
            room = context - ids.shape[1]
            for at in range(ids.shape[1]):
                before.append((int(ids[lane, at]), int(documents[lane, at])))
                start = max(0, len(before) - at - 1 - room)
                own = [token for token, number in before[start:] if number == before[-1][1]]
                expected = model(torch.tensor([own])).logits[0, -1]
                torch.testing.assert_close(logits[lane, at], expected, rtol=1e-9, atol=1e-9)


def test_the_kl_to_a_transformer_equals_that_of_a_forward_pass_over_each_document():
    model, student = make_transformer("Llama", vocab_size=13), make_model()
    teacher = TransformersTeacher(model, 64, shortest=5)
    state, carried, found, expected = student.initial_state(2), teacher.start(2), 0.0, 0.0
    texts = {}
    for ids, targets, documents in rows_of(LENGTHS, [15, 10, 20]):
        taught = teacher.read(ids, documents, carried)
        distillation = Distillation(taught.hidden, teacher.head, 1.0, 1.0)
        logits, _ = student(ids, state, documents)
        _, state = row_loss(student, ids, targets, documents, state, distillation=distillation)
        carried = taught.carried
        found += distillation.divergence
        for lane in range(2):
            for number in documents[lane].unique().tolist():
                here = documents[lane] == number
                known = torch.cat([texts.get((lane, number), ids[lane, :0]), ids[lane, here]])
                texts[lane, number] = known
                whole = model(known[None]).logits[0, -int(here.sum()) :]
                q = logits[lane, here].log_softmax(1)
                expected += F.kl_div(q, whole.log_softmax(1), reduction="sum", log_target=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_an_rmkv_carries_its_state_whatever_its_segments_are():
    model = make_model(3, segment_length=7, hidden_size=8, num_attention_heads=2)
    teacher = RMKVTeacher(model)
    rows = list(rows_of(LENGTHS, [10, 5, 20]))
    carried, hidden = teacher.start(2), []
    for ids, _, documents in rows:
        taught = teacher.read(ids, documents, carried)
        carried = teacher.restored(taught.carried.tensors())
        hidden.append(taught.hidden)
    whole, numbers = (torch.cat([row[i] for row in rows], dim=1) for i in (0, 2))
    torch.testing.assert_close(torch.cat(hidden, dim=1), model.hidden(whole, document_ids=numbers)[0])


def test_layers_have_the_transformers_inputs_and_attention_outputs():
    """These are the targets of alignment: the residual stream before each layer, and its attention's output."""
    model = make_transformer("Llama", vocab_size=13)
    teacher = TransformersTeacher(model, 64, shortest=5)
    (ids, _, documents), *_ = rows_of([40, 40], [20])
    layers = teacher.read(ids, documents, teacher.start(2), layers=True).layers
    streams = model(ids, output_hidden_states=True).hidden_states
    for (x, y), layer, stream in zip(layers, model.model.layers, streams[:-1], strict=True):
        torch.testing.assert_close(x, stream)
        residual = x + y
        torch.testing.assert_close(
            residual + layer.mlp(layer.post_attention_layernorm(residual)),
            layer(x, position_embeddings=model.model.rotary_emb(x, torch.arange(20)[None])),
        )
