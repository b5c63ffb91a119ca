"""The cost report matches the model."""

import pytest
import torch
from small_model import CELLS, IMPORTED, make_model
from torch.utils.flop_counter import FlopCounterMode

from rmkv_cli.config import ModelConfig, TrainConfig, load_config, preset_path
from rmkv_cli.model import RMKV
from rmkv_cli.model.cost import (
    count_by_part,
    forward_flops_per_token,
    state_bytes,
    touched_per_token,
    training_memory,
)
from rmkv_cli.model.precision import to_precision


@pytest.mark.parametrize(("preset", "least", "most"), [("600m", 570e6, 630e6), ("600m-published", 621e6, 633e6)])
def test_presets_have_the_size_of_their_name(preset, least, most):
    config = load_config(preset_path(preset)).model
    assert least <= sum(count_by_part(config).values()) <= most


def test_published_preset_counted_by_hand():
    """12 layers of width 2048: attention 4 D^2, GRU 6 D^2 + 6 D, 32 queries, a norm; two tables of 30,000 rows."""
    D, V = 2048, 30_000
    layer = 4 * D * D + (6 * D * D + 6 * D) + 32 * D + 2 * D
    by_hand = 12 * layer + 2 * V * D + 32 * D + 2 * D
    assert sum(count_by_part(load_config(preset_path("600m-published")).model).values()) == by_hand


@pytest.mark.parametrize(
    "shape", [{}, {"position": "learned"}, {"tie_word_embeddings": False}, {"intermediate_size": 0}, *IMPORTED]
)
def test_parts_add_up_to_the_model(shape):
    model = make_model(**shape)
    assert sum(count_by_part(model.config).values()) == model.count_parameters()


def test_touched_per_token_counted_by_hand():
    """Two layers of width 12, feed-forward 16, vocabulary 13: matrices, a store for 3 heads with gates, convolution,
    norm and start, norms, the head and one row of the table."""
    layer, store = 4 * 12 * 12 + 3 * 12 * 16 + 4 * 12, 25 * 6 + 4 * 2 * 12 + 4 + 3 * 4 * 4
    assert touched_per_token(make_model().config) == 2 * (layer + store) + 2 * 12 + 13 * 12 + 12
    assert touched_per_token(make_model(memory={"store": 1}).config) == 2 * layer + store + 2 * 12 + 13 * 12 + 12


@pytest.mark.parametrize(
    "memory", [*({"cell": cell} for cell in CELLS), {"store": 0}, {"store": 1}, {"slots": 0}, {"store_features": 2}]
)
@pytest.mark.parametrize(
    "heads", [{}, {"num_key_value_heads": 1}, {"head_size": 48, "num_key_value_heads": 1}], ids=str
)
@pytest.mark.parametrize("lookback", [0, 64])
def test_flops_match_torch_s_counter(memory, lookback, heads):
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 200} | heads
    memory = {"slots": 8} | memory
    model = make_model(segment_length=64, num_attention_heads=2, lookback=lookback, memory=memory, **shape)
    ids = torch.zeros(1, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids)
    # torch does not count the linear system: C^2 per feature of keys and channel of values, per chunk.
    columns = model.config.key_value_heads * (model.config.store_key_width + model.config.head_width)
    systems = model.config.stores * 64 * 64 * columns
    mine = sum(forward_flops_per_token(model.config).values()) * 64 - systems
    assert mine == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_experts_counted_by_hand():
    """Two layers of width 12, each with four experts of width 6, of which a token reads two, and a router."""
    dense, sparse = make_model().config, make_model(experts=4, expert_size=6).config
    expert, router = 3 * 12 * 6, 4 * 12 + 4
    assert count_by_part(sparse)["experts"] == 2 * (4 * expert + router)
    assert touched_per_token(sparse) - touched_per_token(dense) == 2 * (2 * expert + router)
    assert forward_flops_per_token(sparse)["experts"] == 2 * 2 * (2 * expert + 4 * 12)


def test_in_bfloat16_slots_and_stores_are_as_large_and_the_rest_is_half():
    model = make_model()
    to_precision(model, torch.bfloat16)
    _, state = model(torch.zeros(1, 100, dtype=torch.int64))
    assert state.memory.dtype == state.store.dtype == torch.float32
    assert state.size() == state_bytes(model.config, 4, 2)[0]


@pytest.mark.parametrize(
    "shape",
    [
        *({"memory": memory} for memory in [{}, {"cell": "lstm"}, {"store": 0}, {"store": 1}, {"slots": 0}]),
        *IMPORTED,
    ],
    ids=str,
)
def test_state_bytes_match_the_state(shape):
    model = make_model(**shape)
    boundary, most = state_bytes(model.config, element_size=8)
    ids = torch.zeros(1, 100, dtype=torch.int64)
    assert model(ids)[1].size() == boundary
    assert model(ids[:, :99])[1].size() == most


def test_600m_trains_on_a_24_gb_card_by_this_estimate():
    config = load_config(preset_path("600m"))
    longest = config.train.segments_max * config.model.segment_length
    assert training_memory(config.model, config.train, config.train.micro_batch_size, longest).total < 24e9
    config = load_config(preset_path("600m"), ["train.batch_size=8", "train.micro_batch_size=1"])
    assert training_memory(config.model, config.train, batch=1, row_tokens=131_072).total < 24e9


@pytest.mark.parametrize(("precision", "element"), [("bf16", 2), ("fp32", 4)])
def test_a_teacher_s_weights_and_logits_count(tmp_path, precision, element):
    teacher = make_model(vocab_size=1000)
    teacher.save_pretrained(tmp_path)
    config, logits = ModelConfig(vocab_size=1000), 4 * 500 * 1000
    plain = training_memory(config, TrainConfig(), 4, 125)
    taught = training_memory(config, TrainConfig(teacher={"model": str(tmp_path), "precision": precision}), 4, 125)
    assert plain.teacher == 0
    assert taught.total - plain.total == taught.teacher == element * teacher.count_parameters() + 4 * logits


def test_counting_allocates_no_weights():
    huge = ModelConfig(hidden_size=115_200, num_attention_heads=900, num_hidden_layers=240)  # 60 TB
    assert sum(count_by_part(huge).values()) > 10**13
    with torch.device("meta"):
        assert RMKV(ModelConfig()).embedding.weight.is_meta
