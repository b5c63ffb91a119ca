"""Packed rows equal single documents, micro-batches a whole batch, two processes one, and a resumed run one that was
not stopped: loss and gradients in float64, where some tokens are not supervised and some parameters are frozen."""

import json

import numpy as np
import pytest
import torch
from compare_runs import assert_same_run, stopped_and_resumed, weights
from job import ranks
from safetensors.torch import load_file
from small_documents import EOD, make_documents
from small_model import make_model, with_adapter

from rmkv_cli.config import Config, MixConfig, dump_toml
from rmkv_cli.data.lanes import IGNORED, Lanes, Prepared
from rmkv_cli.data.mix import prepare
from rmkv_cli.model import find_model
from rmkv_cli.model.groups import freeze, is_trained
from rmkv_cli.training import train
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.loss import row_loss
from rmkv_cli.training.metrics import read_metrics
from rmkv_cli.training.trainer import Trainer

PARTS = ["all", ["norms", "attention", "memory start"], ["memory", "store"]]
S = 5  # tokens of a segment


def masked_documents(lengths, seed=0):
    """Documents of so many tokens, each with spans that alone count; in the second nothing counts."""
    random = np.random.default_rng(seed)
    texts = [random.integers(3, 13, n - 1).tolist() for n in lengths]
    answers = [[(n // 3, n // 2), (2 * n // 3, n)] for n in lengths]
    answers[1] = []
    return make_documents(texts, answers=answers)


def model_of(trainable, memory):
    model = make_model(memory=memory)
    model = with_adapter(model) if trainable == "adapters" else model
    freeze(model, trainable)
    return model


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("trainable", [*PARTS, "adapters"], ids=str)
@pytest.mark.parametrize("memory", [{}, {"cell": "lstm", "store": 1}, {"slots": 0}], ids=str)
def test_packed_documents_give_the_loss_and_gradients_of_each_alone(trainable, memory):
    """A document that begins inside a segment is preceded by other tokens when read alone, and those do not count."""
    lengths = [13, 7, 2, 20, 8, 9]
    documents = masked_documents(lengths)
    rows = Lanes(Prepared(documents, 0), 1, EOD).next(sum(lengths))
    ids, targets, numbers = (torch.from_numpy(x) for x in (rows.input_ids, rows.targets, rows.document_ids))
    model = model_of(trainable, memory)
    packed, _ = row_loss(model, ids, targets, numbers, model.initial_state(1))
    packed.backward()
    expected = gradients_of(model)
    model.zero_grad()

    alone = 0.0
    generator = torch.Generator().manual_seed(1)
    for number, length in enumerate(lengths):
        start = sum(lengths[:number])
        before = torch.randint(3, 13, (1, start % S), generator=generator)
        part = slice(start, start + length)
        its_ids = torch.cat([before, ids[:, part]], dim=1)
        its_targets = torch.cat([torch.full_like(before, IGNORED), targets[:, part]], dim=1)
        its_numbers = torch.cat([torch.zeros_like(before), torch.ones(1, length, dtype=torch.int64)], dim=1)
        loss, _ = row_loss(model, its_ids, its_targets, its_numbers, model.initial_state(1))
        loss.backward()
        alone += loss.item()
    assert packed.item() == pytest.approx(alone, rel=1e-12)
    assert 0 < (targets != IGNORED).sum() < targets.numel()
    assert_equal(expected, gradients_of(model))


@pytest.mark.parametrize("trainable", PARTS, ids=str)
def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch(trainable):
    """The lanes' shares of supervised tokens differ, from none to all: each token weighs the same."""
    texts = [np.random.default_rng(n).integers(3, 13, n).tolist() for n in (23, 25, 28, 21)]
    documents = make_documents(texts, answers=[None, [(20, 21)], [(3, 5), (8, 9)], []])

    def step(size):
        keys = {"batch_size": 4, "micro_batch_size": size, "precision": "fp32", "trainable": trainable}
        config = Config.model_validate({"model": make_model().config.model_dump(), "train": keys})
        trainer = Trainer(config, Lanes(Prepared(documents, 0), 4, EOD), Ranks("cpu"))
        trainer.model.double().load_state_dict(make_model().state_dict())
        trainer.state = trainer.model.initial_state(4)
        rows, counted = trainer._read(4 * S, None)
        (loss, _), *_ = trainer._accumulate(rows, counted)
        return loss.item(), gradients_of(trainer.model)

    loss, gradients = step(4)
    for size in (1, 2):
        of_parts, its = step(size)
        assert of_parts == pytest.approx(loss, rel=1e-12)
        assert_equal(its, gradients)


@pytest.fixture(scope="module")
def tuning(make_config, tokenizer, tmp_path_factory):
    """Makes configs that train a part of a model on conversations of which the answers alone count."""
    folder = tmp_path_factory.mktemp("tuning")
    source = find_model(train(make_config(seed=5, tokens=100), folder / "source").run)
    turns = [
        [("user", f"the cat {i} " * (1 + i % 4)), ("assistant", f"sat on mat {i} " * (1 + i % 3))] for i in range(60)
    ]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in turn]}) for turn in turns]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    chats = {"kind": "files", "name": "chats", "weight": 1, "files": ["chats.jsonl"], "format": "messages"}
    mix = MixConfig(supervise="answers", validation=0.2, sources=[chats])
    prepare(mix, folder, tokenizer, folder / "chats", workers=1)
    keys = {"data": str(folder / "chats"), "from_model": str(source), "micro_batch_size": 1}
    keys |= {"tokens": 350, "checkpoint_every": 9, "eval_every": 9}
    return lambda trainable, **more: make_config(**keys | {"trainable": trainable} | more)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "how", "optimizer"),
    [
        (["norms", "memory start"], "ddp", "adamw"),
        (["attention", "store"], "fsdp", "muon"),
        pytest.param("all", "fsdp", "adamw", marks=pytest.mark.slow),
        pytest.param(["feed_forward"], "ddp", "muon", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_a_part_of_a_model_as_one_does(
    forker, tuning, float64, tmp_path, trainable, how, optimizer
):
    config = tuning(trainable, distributed=how, optimizer=optimizer)
    whole = train(config, tmp_path / "whole").run
    (tmp_path / "config.toml").write_text(dump_toml(config))
    job = ranks(forker, 2, "train", "--config", tmp_path / "config.toml", "--run", tmp_path / "run", FLOAT64=1)
    assert job.returncode == 0, job.stderr
    curves = [
        [
            [record[key] for key in ("tokens", "loss", "grad_norm")]
            for record in read_metrics(run / "metrics.jsonl")
            if "loss" in record
        ]
        for run in (whole, tmp_path / "run")
    ]
    assert len(curves[0]) > 3
    np.testing.assert_allclose(*curves, rtol=1e-9)
    started = load_file(f"{config.train.from_model}/model.safetensors")
    one, other = weights(whole), weights(tmp_path / "run")
    for name, x in one.items():
        if not is_trained(name, trainable):
            assert torch.equal(other[name].float(), started[name])
        # Muon orthogonalizes in bfloat16, whose rounding may fall otherwise.
        torch.testing.assert_close(other[name], x, rtol=1e-9 if optimizer == "adamw" else 1e-3, atol=1e-9, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", PARTS[1:], ids=str)
def test_resumed_it_ends_bit_for_bit_as_if_it_had_not_been_stopped(tuning, tmp_path, monkeypatch, trainable):
    config = tuning(trainable, precision="bf16")
    whole = train(config, tmp_path / "whole").run
    run = stopped_and_resumed(monkeypatch, config, tmp_path / "run")
    assert_same_run(whole, run)
