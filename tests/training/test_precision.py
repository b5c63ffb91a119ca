"""The error of a row's gradients in bfloat16, which does not grow with the row."""

import pytest
import torch
from torch import nn

from rmkv_cli.config import MemoryConfig, ModelConfig
from rmkv_cli.model import RMKV
from rmkv_cli.model.adapters import ADAPTER_MARK, attach, select
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.loss import row_loss
from rmkv_cli.training.working import WorkingModel

SEGMENT = 16


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    memory = MemoryConfig(slots=8, store=1)
    return RMKV(ModelConfig(**shape, intermediate_size=128, segment_length=SEGMENT, lookback=8, memory=memory))


def gradients(model, dtype, segments, mark=""):
    """Return the gradients of a row's mean loss as one vector, of the parameters with `mark` in their names."""
    phrases = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(1))
    ids = phrases[torch.randint(16, (segments * SEGMENT // 8,), generator=torch.Generator().manual_seed(2))].view(1, -1)
    working = WorkingModel(model, dtype, Ranks("cpu"))
    working.copy_weights()
    loss, _ = row_loss(working.model, ids, ids.roll(-1, 1), torch.zeros_like(ids), working.model.initial_state(1))
    (loss / ids.numel()).backward()
    working.reduce_gradients()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    named = model.named_parameters()
    found = torch.cat([p.grad.flatten() for name, p in named if p.grad is not None and mark in name])
    model.zero_grad()
    return found


@pytest.mark.slow
def test_the_error_of_bfloat16_gradients_does_not_grow_with_the_row(model):
    """Each segment's own is about 1%; their sum is taken in float32. In bfloat16 it was 2.95% at 256 segments."""
    errors = {}
    for segments in (4, 256):
        exact, found = (gradients(model, dtype, segments) for dtype in (torch.float32, torch.bfloat16))
        errors[segments] = ((found - exact).norm() / exact.norm()).item()
    print(errors)
    assert errors[256] < 1.1 * errors[4]
    assert errors[256] < 0.01


def test_a_step_s_weights_are_one_rounded_copy(model):
    working = WorkingModel(model, torch.bfloat16, Ranks("cpu"))
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    working.copy_weights()
    assert torch.equal(working.model.embedding.weight, model.embedding.weight.bfloat16())
    assert working.model.memory is model.memory
    assert working.model.blocks[0].store.start is model.blocks[0].store.start


def test_an_adapter_s_bfloat16_gradients_are_as_close_and_cells_and_stores_keep_theirs_in_float32(model):
    attach(model, select(model, ()), 4, 8.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    exact, found = (gradients(model, dtype, 16, ADAPTER_MARK) for dtype in (torch.float32, torch.bfloat16))
    error = ((found - exact).norm() / exact.norm()).item()
    print(error)
    assert error < 0.015
    dtypes = {name: x.dtype for name, x in WorkingModel(model, torch.bfloat16, Ranks("cpu")).model.named_parameters()}
    assert dtypes["blocks.0.attention.qkv.lora_A.weight"] == torch.bfloat16
    assert dtypes["blocks.0.cell.cell.base_layer.lora_B.weight"] == torch.float32
    assert dtypes["blocks.0.store.gates.lora_A.weight"] == torch.float32
