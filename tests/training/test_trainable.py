"""Frozen parameters stay unchanged, and the trained ones get the same gradients as in full training."""

import pytest
import torch
from compare_runs import weights
from safetensors.torch import load_file
from small_documents import EOD, make_documents, random_documents
from small_model import make_model

from rmkv_cli.config import Config
from rmkv_cli.data.lanes import Lanes, Prepared
from rmkv_cli.errors import UserError
from rmkv_cli.model import find_model
from rmkv_cli.model.groups import group_of, is_memory_start, is_trained
from rmkv_cli.training import train
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.trainer import Trainer

LISTS = [["memory start"], ["memory"], ["store"], ["norms"], ["embeddings"], ["attention"], ["feed_forward", "norms"]]


@pytest.fixture(scope="module")
def source(make_config, tmp_path_factory):
    return find_model(train(make_config(seed=5, tokens=100), tmp_path_factory.mktemp("source") / "source").run)


@pytest.fixture
def tuned(make_config, source):
    """Makes configs of runs that start from the source and train a part of it."""
    return lambda trainable, **keys: make_config(from_model=str(source), trainable=trainable, **keys)


def test_each_parameter_is_of_the_group_that_its_name_says():
    model = make_model(position="learned", tie_word_embeddings=False, memory={"store": 1})
    groups = {}
    for name, _ in model.named_parameters():
        groups.setdefault(group_of(name), set()).add(name.split(".", 2)[-1] if name.startswith("blocks") else name)
    assert groups == {
        "embeddings": {"embedding.weight", "position.weight", "unembedding.weight"},
        "memory": {
            *("memory", "pooling.queries"),
            *(f"cell.cell.{kind}_{side}" for kind in ("weight", "bias") for side in ("ih", "hh")),
        },
        "store": {"store.start", "store.taps", "store.gates.weight", "store.gates.bias", "store.norm.weight"},
        "norms": {f"{norm}.{kind}" for norm in ("norm", "feed_forward_norm") for kind in ("weight", "bias")},
        "attention": {"attention.qkv.weight", "attention.out.weight"},
        "feed_forward": {f"feed_forward.{name}.weight" for name in ("gate", "up", "down")},
    }
    starts = {name for name, _ in model.named_parameters() if is_memory_start(name)}
    assert starts == {"memory", "blocks.0.store.start"}


@pytest.mark.parametrize("trainable", LISTS, ids="+".join)
def test_frozen_parameters_take_no_gradient_and_the_others_theirs(trainable):
    """In float64: gradients of what is trained are those of training all of it."""
    documents = make_documents([random_documents([n], seed=n)[0].tolist()[1:] for n in (23, 25)])

    def step(trainable):
        model = make_model()
        keys = {"batch_size": 2, "micro_batch_size": 1, "segments_min": 3, "segments_max": 3, "precision": "fp32"}
        config = Config.model_validate({"model": model.config.model_dump(), "train": keys | {"trainable": trainable}})
        trainer = Trainer(config, Lanes(Prepared(documents, 0), 2, EOD), Ranks("cpu"))
        trainer.model.double().load_state_dict(model.state_dict())
        trainer.state = trainer.model.initial_state(2)
        rows, counted = trainer._read(15, None)
        (loss, _), *_ = trainer._accumulate(rows, counted)
        return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}

    loss, gradients = step(trainable)
    expected_loss, expected = step("all")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert gradients.keys() == {name for name in expected if is_trained(name, trainable)}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_are_saved_unchanged_and_have_no_moments(
    tuned, source, tmp_path, monkeypatch, precision, optimizer
):
    trainable = ["norms", "attention"] if optimizer == "muon" else ["memory", "store"]
    kept = {}
    save = Trainer.save
    monkeypatch.setattr(
        Trainer, "save", lambda self, folder: (kept.update(optimizers=self.optimizers), save(self, folder))[1]
    )
    config = tuned(trainable, precision=precision, optimizer=optimizer, tokens=200)
    run = train(config, tmp_path / "run").run
    before, after = load_file(source / "model.safetensors"), weights(run)
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert changed == {name for name in after if is_trained(name, trainable)}
    moments = sum(len(each.state) for each in kept["optimizers"])
    assert moments == len(changed)


def test_moments_are_of_what_the_run_trains(tuned, tmp_path):
    run = train(tuned(["norms"], tokens=100), tmp_path / "run").run
    with pytest.raises(UserError, match=r"has moments of '.*norm.*', which the run does not train"):
        train(tuned(["store"], tokens=100), run, resume=True)


@pytest.mark.parametrize(
    ("trainable", "memory", "says"),
    [
        ("norms", {}, r"should be 'all', 'adapters' or a list, such as \['norms', 'memory'\], got 'norms'"),
        ([], {}, "trainable is empty, so nothing would be trained"),
        (["norm"], {}, "there is no group 'norm'; did you mean 'norms'"),
        (["store"], {"store": 0}, r'train.trainable = \["store"\]: the model has no such parameters'),
        (["memory start"], {"update": "none"}, "memory.update = 'none' leaves no initial memory to train"),
    ],
)
def test_an_untrainable_choice_is_reported(make_config, source, tmp_path, trainable, memory, says):
    with pytest.raises((UserError, ValueError), match=says):
        train(make_config(memory=memory, from_model=str(source), trainable=trainable), tmp_path / "run")


def test_freezing_random_weights_is_refused(make_config, tmp_path):
    with pytest.raises(UserError, match="it freezes random weights; give a model to start from with --from"):
        train(make_config(trainable=["norms"]), tmp_path / "run")
