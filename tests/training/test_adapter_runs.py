"""Runs that train an adapter: what they learn, save and resume, on one process and on several."""

import json
import shutil

import pytest
import torch
from compare_runs import curve, stopped_and_resumed
from job import ranks
from safetensors.torch import load_file
from small_documents import EOD, make_documents, random_documents
from small_model import make_model

from rmkv_cli.config import Config, dump_toml, load_config
from rmkv_cli.data.lanes import Lanes, Prepared
from rmkv_cli.errors import UserError
from rmkv_cli.files import sha256
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.model.adapters import ADAPTER_MARK
from rmkv_cli.model.pretrained import write_checksums
from rmkv_cli.training import train
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.metrics import read_metrics
from rmkv_cli.training.trainer import Trainer

SAVED = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def source(make_config, tmp_path_factory):
    return find_model(train(make_config(seed=5, tokens=100), tmp_path_factory.mktemp("source") / "source").run)


@pytest.fixture(scope="module")
def tuned(make_config, source):
    """Makes configs of runs that start from the source and train an adapter."""

    def make(**keys):
        adapter = {"rank": 4, "alpha": 8.0} | keys.pop("adapter", {})
        return make_config(**{"from_model": str(source), "trainable": "adapters", "adapter": adapter} | keys)

    return make


@pytest.fixture(scope="module")
def run(tuned, tmp_path_factory):
    return train(tuned(), tmp_path_factory.mktemp("tuned") / "run").run


def assert_same_adapters(a, b):
    assert curve(a) == curve(b)
    one, other = (load_file(find_model(run) / SAVED[1]) for run in (a, b))
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_checkpoints_contain_only_the_adapter_and_name_the_base(run, source):
    checkpoint = find_model(run)
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {*SAVED, "tokenizer.json", "generation_config.json", "checksums.json", "training"}
    described = json.loads((checkpoint / SAVED[0]).read_text())
    assert described["base_model_name_or_path"] == str(source)
    assert described["revision"] == sha256(source / "model.safetensors")
    assert (described["r"], described["lora_alpha"]) == (4, 8.0)
    losses = [record["validation"]["loss"] for record in read_metrics(run / "metrics.jsonl") if "validation" in record]
    assert losses[-1] < losses[0]


def test_the_run_is_a_model_whose_base_stays_as_it_was(run, source):
    weights, base = RMKV.from_pretrained(run).state_dict(), load_file(source / "model.safetensors")
    assert {name for name in weights if ADAPTER_MARK not in name} == base.keys()
    assert all(torch.equal(x, weights[name]) for name, x in base.items())
    changed = {name for name, x in weights.items() if "lora_B" in name and x.any()}
    assert changed == {name for name in weights if "lora_B" in name}


def test_targets_of_the_config_are_those_that_are_trained(tuned, tmp_path):
    run = train(tuned(tokens=100, adapter={"targets": ["qkv", "cell.cell"]}), tmp_path / "run").run
    layers = {name.partition(".lora")[0].removesuffix(".base_layer") for name in load_file(find_model(run) / SAVED[1])}
    assert {name.split(".", 5)[5] for name in layers} == {"attention.qkv", "cell.cell"}
    with pytest.raises(UserError, match=r"targets: 'qk' matches no linear layer or cell; did you mean 'qkv'"):
        train(tuned(adapter={"targets": ["qk"]}), tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_it_is_bit_for_bit_the_same(tuned, tmp_path, monkeypatch, precision):
    config = tuned(precision=precision, on_bad_step="rollback")
    whole = train(config, tmp_path / "whole").run
    run = stopped_and_resumed(monkeypatch, config, tmp_path / "run")
    assert_same_adapters(whole, run)


def test_it_resumes_on_its_own_base_alone(run, source, tuned, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    resumed = train(tuned(from_model=str(copy), tokens=100), tmp_path / "run").run
    config = load_config(resumed / "config.toml")
    torch.manual_seed(1)
    RMKV(config.model).save_pretrained(copy)
    write_checksums(copy)
    with pytest.raises(UserError, match="is not the file that the run starts from"):
        train(config, resumed, resume=True)
    shutil.rmtree(copy)
    with pytest.raises(UserError, match="no longer exists, and no checkpoint has its weights"):
        train(config, resumed, resume=True)


def test_no_run_starts_from_an_adapter(run, make_config, tmp_path):
    with pytest.raises(UserError, match=r"is an adapter, not a model to start from; merge it first: rmkv merge MODEL"):
        train(make_config(from_model=str(run)), tmp_path / "run")


def test_packed_micro_batches_give_the_gradients_of_the_whole_batch():
    """In float64, to 1e-9: of a batch at once, and lane by lane."""
    documents = make_documents([random_documents([n], seed=n)[0].tolist()[1:] for n in (23, 25)])

    def step(micro_batch_size):
        model = make_model()
        keys = {"batch_size": 2, "micro_batch_size": micro_batch_size, "precision": "fp32", "trainable": "adapters"}
        keys |= {"segments_min": 3, "segments_max": 3, "from_model": "m", "adapter": {"rank": 2, "alpha": 3.0}}
        trainer = Trainer(
            Config.model_validate({"model": model.config.model_dump(), "train": keys}),
            Lanes(Prepared(documents, 0), 2, EOD),
            Ranks("cpu"),
        )
        trainer.model.double().load_state_dict(model.state_dict(), strict=False)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in trainer.model.named_parameters():
            if ADAPTER_MARK in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        trainer.state = trainer.model.initial_state(2)
        rows, counted = trainer._read(15, None)
        (loss, _), *_ = trainer._accumulate(rows, counted)
        return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}

    (loss, gradients), (expected_loss, expected) = step(1), step(2)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=0)
    assert gradients.keys() == {name for name in expected if ADAPTER_MARK in name} == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_the_adapter_of_one(forker, tuned, tmp_path, how):
    torch.set_default_dtype(torch.float64)
    try:
        config = tuned(micro_batch_size=1, distributed=how)
        whole = train(config, tmp_path / "whole").run
    finally:
        torch.set_default_dtype(torch.float32)
    (tmp_path / "config.toml").write_text(dump_toml(config))
    job = ranks(forker, 2, "train", "--config", tmp_path / "config.toml", "--run", tmp_path / "run", FLOAT64=1)
    assert job.returncode == 0, job.stderr
    losses = [
        [r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r] for run in (tmp_path / "run", whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    one, other = (load_file(find_model(run) / SAVED[1]) for run in (tmp_path / "run", whole))
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=1e-7, atol=1e-10, msg=name)
