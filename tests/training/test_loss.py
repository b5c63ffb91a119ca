"""Replaying segments changes neither the loss nor its gradients, only what is kept for the backward pass."""

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_documents import EOD, make_documents, random_documents
from small_model import make_model
from torch import nn

from rmkv_cli.config import Config
from rmkv_cli.data.lanes import Lanes, Prepared
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.loss import row_loss
from rmkv_cli.training.trainer import Trainer


def rows(length):
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(13, (2, 2, length), generator=generator)
    return ids, targets, torch.tensor([0] * 7 + [1] * (length - 7)).expand(2, -1)


@pytest.mark.parametrize("replay", [True, False])
def test_loss_and_gradients_are_those_of_one_forward_pass(replay):
    model = make_model(memory={"cell": "lstm"}).requires_grad_(True)
    ids, targets, documents = rows(20)
    loss, state = row_loss(model, ids, targets, documents, model.initial_state(2), replay=replay)
    loss.backward()
    replayed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits, expected = model(ids, document_ids=documents)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(state.memory, expected.memory)
    for name, p in model.named_parameters():
        torch.testing.assert_close(replayed[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_targets_that_do_not_count_add_nothing():
    model = make_model()
    ids, targets, documents = rows(20)
    some = targets.clone()
    some[:, :7], some[1, 9:] = -100, -100  # in the second row a segment of 5, and more, has none at all
    loss, state = row_loss(model, ids, some, documents, model.initial_state(2))
    logits, expected = model(ids, document_ids=documents)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(loss, losses[(some != -100).flatten()].sum())
    torch.testing.assert_close(state.memory, expected.memory)


def test_z_loss_is_in_the_gradient_and_not_in_the_loss():
    model = make_model().requires_grad_(True)
    ids, targets, documents = rows(20)
    targets[:, :7] = -100
    loss, _ = row_loss(model, ids, targets, documents, model.initial_state(2), z_loss=0.1)
    loss.backward()
    given = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids, document_ids=documents)[0].flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    log_Z = logits.exp().sum(1).log()[targets.flatten() != -100]
    (plain + 0.1 * (log_Z**2).sum()).backward()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(given[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_step_is_the_mean_over_the_targets_that_count(micro_batch_size):
    """Of 4 lanes one is text; the micro-batches' shares differ, the loss and the gradient do not."""
    texts = [random_documents([n], seed=n)[0].tolist()[1:] for n in (23, 25, 28, 21)]
    documents = make_documents(texts, answers=[None, [(20, 21)], [(3, 5), (8, 9)], []])
    config = Config.model_validate(
        {
            "model": make_model().config.model_dump(),
            "train": {"batch_size": 4, "micro_batch_size": micro_batch_size, "segments_max": 1, "precision": "fp32"},
        }
    )
    trainer = Trainer(config, Lanes(Prepared(documents, 0), 4, EOD), Ranks("cpu"))
    rows = Lanes(Prepared(documents, 0), 4, EOD).next(5)
    logits, _ = trainer.model(torch.from_numpy(rows.input_ids))
    expected = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows.targets).flatten())
    gradients = torch.autograd.grad(expected, list(trainer.model.parameters()), allow_unused=True)
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    record = trainer.train_step()
    assert 5 < (rows.targets != -100).sum() < 20
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert record["tokens"] == 20  # the schedule goes by all that is read


def test_a_step_in_which_nothing_counts_has_no_loss_and_changes_no_weight():
    documents = make_documents([[3, 4, 5, 6, 7, 8]], answers=[[]])
    config = Config.model_validate({"model": make_model().config.model_dump(), "train": {"precision": "fp32"}})
    trainer = Trainer(config, Lanes(Prepared(documents, 0), config.train.batch_size, EOD), Ranks("cpu"))
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    record = trainer.train_step()
    assert "loss" not in record
    assert (record["step"], record["grad_norm"]) == (1, 0)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.state_dict().items())


def test_dropout_is_replayed_as_it_fell():
    """With dropout a numerical derivative exists only if the replay drops the same: compare along the gradient."""
    model = make_model(dropout=0.3).requires_grad_(True).train()
    ids, targets, documents = rows(15)

    def loss():
        torch.manual_seed(5)
        return row_loss(model, ids, targets, documents, model.initial_state(2))[0]

    before = loss()
    before.backward()
    squared = sum((p.grad**2).sum() for p in model.parameters())
    step = 1e-7
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(step * p.grad)
    torch.testing.assert_close((before - loss()) / step, squared, rtol=1e-3, atol=0)


def test_gradient_flows_through_memory_across_segments():
    """Without a look-back only the memory can carry anything from the first segment to the last loss."""
    model = make_model(lookback=0, num_hidden_layers=1).requires_grad_(True)
    ids, targets, _ = rows(15)
    embedded = []
    model.embedding.register_forward_hook(lambda _, __, output: embedded.append(output) or output.retain_grad())
    hidden, _ = model.hidden(ids)
    F.cross_entropy(model.head(hidden[:, -1]), targets[:, -1]).backward()
    assert embedded[0].grad.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("lookback", [0, 4])
def test_what_is_kept_for_the_backward_pass_grows_by_the_states_and_the_heads_gradient(lookback):
    model = make_model(segment_length=32, lookback=lookback, intermediate_size=64).requires_grad_(True)

    def kept(segments):
        """Bytes that live on after the forward pass of so many segments, because the loss does."""
        ids, targets, _ = rows(32 * segments)
        gc.collect()
        before = live_bytes()
        loss, _ = row_loss(model, ids, targets, torch.zeros_like(ids), model.initial_state(2))
        gc.collect()
        return live_bytes() - before, loss

    ids, *others = rows(32)
    state = model(ids)[1]
    gradient = 8 * ids.numel() * model.config.hidden_size
    assert (kept(9)[0] - kept(3)[0]) / 6 <= state.size() + gradient + ids.nbytes + sum(x.nbytes for x in others) + 200


def live_bytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # No subclasses: a compiler that another test has used leaves tensors without storage.
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
