"""The schedule, the number of segments, and which optimizer has which parameters."""

import pytest
import torch
from small_model import CELLS, make_model

from rmkv_cli.config import Config, ModelConfig, Phase, TrainConfig
from rmkv_cli.config.train import TRAINABLE
from rmkv_cli.model import RMKV
from rmkv_cli.model.cost import optimizer_bytes
from rmkv_cli.training.optimizer import (
    describe_groups,
    has_weight_decay,
    learning_rate,
    make_optimizers,
    mean_segments,
    most_segments,
    row_segments,
)


def config(**keys):
    return TrainConfig(**{"learning_rate": 1.0, "final_learning_rate": 0.1, "warmup": 0.1, "decay": 0.2} | keys)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("wsd", {0: 0, 0.05: 0.5, 0.1: 1, 0.5: 1, 0.8: 1, 0.9: 0.55, 1: 0.1}),
        ("cosine", {0: 0, 0.05: 0.5, 0.1: 1, 0.55: 0.55, 1: 0.1}),
    ],
)
def test_learning_rate_at_points_worked_out_by_hand(schedule, points):
    for progress, rate in points.items():
        assert learning_rate(config(schedule=schedule), progress) == pytest.approx(rate)


def test_without_warmup_or_decay_it_is_constant():
    flat = config(warmup=0, decay=0)
    assert {learning_rate(flat, p) for p in (0, 0.5, 1)} == {1.0}


def test_segments_vary_and_their_maximum_grows_over_the_first_half():
    keys = config(segments_min=2, segments_max=10)
    drawn = {p: {row_segments(keys, [], step, p) for step in range(300)} for p in (0, 0.25, 0.5, 1)}
    assert drawn == {0: {2}, 0.25: set(range(2, 7)), 0.5: set(range(2, 11)), 1: set(range(2, 11))}


@pytest.mark.parametrize("phases", [[], [{"share": 1, "segments_max": 2}, {"share": 3, "segments_max": 12}]])
def test_mean_and_most_segments_are_those_of_a_whole_training(phases):
    keys, phases = config(segments_min=1, segments_max=9), [Phase(**phase) for phase in phases]
    drawn, progress = [], 0.0
    while progress < 1:  # a segment is 1/10,000 of the tokens
        drawn.append(row_segments(keys, phases, len(drawn), progress))
        progress += drawn[-1] / 10_000
    assert mean_segments(keys, phases) == pytest.approx(sum(drawn) / len(drawn), rel=0.03)
    assert most_segments(keys, phases) == max(drawn)


@pytest.mark.parametrize("cell", CELLS)
def test_only_matrices_of_attention_and_feed_forward_decay(cell):
    model = make_model(memory={"cell": cell}, position="learned", tie_word_embeddings=False)
    decaying = {name.split(".", 2)[-1] for name, p in model.named_parameters() if has_weight_decay(name, p)}
    assert decaying == {
        *("attention.qkv.weight", "attention.out.weight"),
        *("feed_forward.gate.weight", "feed_forward.up.weight", "feed_forward.down.weight"),
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(optimizer):
    model = make_model().requires_grad_(True)
    optimizers = make_optimizers(model, config(optimizer=optimizer))
    groups = {group["name"]: group for each in optimizers for group in each.param_groups}
    assert [type(each).__name__ for each in optimizers] == ["AdamW", "Muon"][: 1 + (optimizer == "muon")]
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"matrices": 0.1, "others": 0.0}
    assert {group["lr"] for group in groups.values()} == {1.0}
    mine = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(mine) == sorted(map(id, model.parameters()))


def test_muon_moves_a_matrix_by_an_orthogonal_one_of_adamw_s_size():
    """Newton-Schulz leaves singular values near 1; times 0.2 sqrt(max(rows, columns)) their mean square is 0.2²."""
    torch.manual_seed(0)
    model = RMKV(ModelConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50))
    weight = model.blocks[0].attention.qkv.weight  # (3D, D), orthogonalised as one matrix
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in make_optimizers(model, config(optimizer="muon", weight_decay=0.0)):
        optimizer.step()
    moved = before - weight.detach()  # the learning rate is 1
    singular = torch.linalg.svdvals(moved) / (0.2 * 144**0.5)
    assert weight.shape == (144, 48)
    assert 0.6 < singular.min() < singular.max() < 1.3
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_described_groups_are_those_of_the_optimizers():
    """Two layers of width 12: 4 D^2 of attention and 3 D F of feed-forward are Muon's."""
    whole = Config(model=make_model().config, train=config(optimizer="muon", learning_rate=0.5))
    groups = {group["name"]: group for group in describe_groups(whole)}
    assert groups.keys() == {*TRAINABLE} - {"memory start"}
    assert groups["attention"] == {
        "name": "attention",
        "trained": True,
        "parameters": 2 * 4 * 12 * 12,
        "optimizer": "muon",
        "learning_rate": 0.5,
        "weight_decay": 0.1,
    }
    matrices = 2 * (4 * 12 * 12 + 3 * 12 * 16)
    assert sum(group["parameters"] for group in groups.values() if group["optimizer"] == "muon") == matrices
    everything = make_model().count_parameters()
    assert sum(group["parameters"] for group in groups.values()) == everything
    assert optimizer_bytes(whole.model, config(optimizer="adamw")) == 8 * everything
    assert optimizer_bytes(whole.model, config(optimizer="muon")) == 8 * everything - 4 * matrices


def test_described_groups_say_what_is_frozen():
    whole = Config(model=make_model().config, train=config(trainable=["memory start", "norms"]))
    groups = describe_groups(whole)
    trained = [group for group in groups if group["trained"]]
    # Two layers' slots; two layers' stores of three heads; weights and biases of five norms of width 12.
    assert {group["name"]: group["parameters"] for group in trained} == {
        "memory": 2 * 3 * 12,
        "store": 2 * 3 * 4 * 4,
        "norms": 5 * 2 * 12,
    }
    frozen = [group for group in groups if not group["trained"]]
    assert {group["name"] for group in frozen} == {"memory", "store", "embeddings", "attention", "feed_forward"}
    assert {group["optimizer"] for group in frozen} == {None}
    assert sum(group["parameters"] for group in groups) == make_model().count_parameters()
    assert optimizer_bytes(whole.model, whole.train) == 8 * sum(group["parameters"] for group in trained)
