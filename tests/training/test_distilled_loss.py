"""The loss of a row with a teacher: KL(teacher ‖ student) and its gradient in chunks, compared with the definition."""

import pytest
import torch
import torch.nn.functional as F
from small_model import make_model

from rmkv_cli.training import loss as loss_module
from rmkv_cli.training.loss import Distillation, row_loss

SHARE, TEMPERATURE, Z = 0.7, 1.5, 0.1


def rows(length=20):
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(13, (2, 2, length), generator=generator)
    targets[0, 3:9] = -100
    return ids, targets, torch.tensor([0] * 7 + [1] * (length - 7)).expand(2, -1)


def lesson_of(teacher, ids, documents, share=SHARE, temperature=TEMPERATURE):
    hidden, _ = teacher.hidden(ids, document_ids=documents)
    return Distillation(hidden, teacher.head, share, temperature)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 100, 2**24])
@pytest.mark.parametrize("ids_of_teacher", [13, 11, 17])
def test_loss_and_gradient_equal_those_of_kl_div(chunk, ids_of_teacher, monkeypatch):
    """Either vocabulary may be padded: the teacher gives no probability to ids that one of them lacks."""
    monkeypatch.setattr(loss_module, "MAX_LOGITS", chunk)
    model = make_model(memory={"cell": "lstm"}).requires_grad_(True)
    teacher = make_model(3, hidden_size=8, num_attention_heads=2, segment_length=7, vocab_size=ids_of_teacher)
    ids, targets, documents = rows()
    ids = ids.clamp(max=10)
    distillation = lesson_of(teacher, ids, documents)
    value, _ = row_loss(model, ids, targets, documents, model.initial_state(2), z_loss=Z, distillation=distillation)
    value.backward()
    given = gradients(model)
    model.zero_grad()

    counts = targets.flatten() != -100
    logits = model(ids, document_ids=documents)[0].flatten(0, 1)[counts]
    known = min(13, ids_of_teacher)
    taught = teacher(ids, document_ids=documents)[0].flatten(0, 1)[counts, :known]
    target = F.pad((taught / TEMPERATURE).softmax(1), (0, 13 - known))
    kl = F.kl_div((logits / TEMPERATURE).log_softmax(1), target, reduction="sum")
    cross_entropy = F.cross_entropy(logits, targets.flatten()[counts], reduction="sum")
    z = Z * (logits.logsumexp(1) ** 2).sum()
    ((1 - SHARE) * cross_entropy + SHARE * TEMPERATURE**2 * kl + z).backward()
    torch.testing.assert_close(value, cross_entropy, rtol=1e-12, atol=0)
    torch.testing.assert_close(distillation.divergence, kl, rtol=1e-9, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_model_that_is_its_own_teacher_learns_nothing(temperature):
    model = make_model().requires_grad_(True)
    ids, targets, documents = rows()
    with torch.no_grad():
        distillation = lesson_of(model, ids, documents, 1.0, temperature)
    row_loss(model, ids, targets, documents, model.initial_state(2), distillation=distillation)[0].backward()
    assert abs(distillation.divergence.item()) < 1e-12
    assert max(gradient.abs().max() for gradient in gradients(model).values()) < 1e-12
