"""The schedule, the number of segments, and which parameters decay."""

import pytest
from small_model import CELLS, make_model

from rmkv_cli.config import TrainConfig
from rmkv_cli.training.optimizer import decays, learning_rate, make_optimizer, row_segments


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


def test_segments_vary_and_their_most_grows_over_the_first_half():
    keys = config(segments_min=2, segments_max=10)
    drawn = {p: {row_segments(keys, [], step, p) for step in range(300)} for p in (0, 0.25, 0.5, 1)}
    assert drawn == {0: {2}, 0.25: set(range(2, 7)), 0.5: set(range(2, 11)), 1: set(range(2, 11))}


@pytest.mark.parametrize("cell", CELLS)
def test_only_matrices_of_attention_and_feed_forward_decay(cell):
    model = make_model(memory={"cell": cell}, position="learned", tie_word_embeddings=False)
    decaying = {name.split(".", 2)[-1] for name, p in model.named_parameters() if decays(name, p)}
    assert decaying == {
        *("attention.qkv.weight", "attention.out.weight"),
        *("feed_forward.gate.weight", "feed_forward.up.weight", "feed_forward.down.weight"),
    }
    groups = make_optimizer(model, config()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
