"""Small patches of RMKV for the study of parameters: alternatives that are measured, but not part of the model.

A patch is a context manager: models that are built and called within it have the alternative. They train, also
compiled, and evaluate whole texts, but cannot continue inside a segment.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from textwrap import dedent
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model import RMKV
from rmkv_cli.model import block as block_module
from rmkv_cli.model import context as context_module
from rmkv_cli.model.attention import QKVBlock
from rmkv_cli.model.block import LayerState, RMKVBlock
from rmkv_cli.model.cells import RecurrentMemoryCell
from rmkv_cli.model.context import TAPS, SegmentContext
from rmkv_cli.model.state import State
from rmkv_cli.model.store import AssociativeStore

Patch = AbstractContextManager[Any]


def after_init(kind: type, change: Callable[..., None]) -> Patch:
    """Patch a class to call `change` after its constructor, with the same arguments."""
    init = kind.__init__

    def patched_init(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        change(self, *arguments)

    return patch.object(kind, "__init__", patched_init)


def edited_block(old: str, new: str) -> Patch:
    """Patch `RMKVBlock.forward` by an edit of its source."""
    source = dedent(inspect.getsource(RMKVBlock.forward))
    assert source.count(old) == 1, f"RMKVBlock.forward does not contain {old!r} once"
    names: dict[str, Any] = {}
    exec(compile(source.replace(old, new), "<edited block>", "exec"), vars(block_module), names)
    return patch.object(RMKVBlock, "forward", names["forward"])


def one_cell() -> Patch:
    """Let all layers use the first layer's cell."""

    def share(model: RMKV, *_: Any) -> None:
        for block in model.blocks[1:]:
            del block.cell
            object.__setattr__(block, "cell", model.blocks[0].cell)  # not as a submodule, which would be saved again

    return after_init(RMKV, share)


class GRU(nn.Module):
    """A GRU cell with other maps from D to 3 D in place of its two matrices. The biases and their start stay."""

    def __init__(self, gru: nn.GRUCell, make_map: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.of_input, self.of_hidden = make_map(gru.hidden_size), make_map(gru.hidden_size)
        self.bias_ih, self.bias_hh = gru.bias_ih, gru.bias_hh

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Return the new hidden state, (N, D), for x and hidden state, both (N, D)."""
        reset, keep, candidate = (self.of_input(x) + self.bias_ih).chunk(3, dim=-1)
        reset_hidden, keep_hidden, from_hidden = (self.of_hidden(hidden) + self.bias_hh).chunk(3, dim=-1)
        candidate = torch.tanh(candidate + torch.sigmoid(reset + reset_hidden) * from_hidden)
        return torch.lerp(candidate, hidden, torch.sigmoid(keep + keep_hidden))


def gru_of(make_map: Callable[[int], nn.Module]) -> Patch:
    """Replace both matrices of each layer's GRU by maps from D to 3 D."""

    def change(self: RecurrentMemoryCell, *_: Any) -> None:
        assert isinstance(self.cell, nn.GRUCell)
        self.cell = GRU(self.cell, make_map)

    return after_init(RecurrentMemoryCell, change)


def low_rank(D: int) -> nn.Module:
    """Return a matrix of rank D / 8 as two factors. Its entries start with the variance of a GRU cell's, 1 / (3 D)."""
    down, up = nn.Linear(D, D // 8, bias=False), nn.Linear(D // 8, 3 * D, bias=False)
    nn.init.normal_(down.weight, std=D**-0.5)
    return nn.Sequential(down, up)


class Diagonal(nn.Module):
    """Three weights per channel in place of three matrices. Outputs start with the variance of a GRU cell's."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * D).uniform_(-1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted channels, (N, 3 D), for x (N, D)."""
        return x.repeat(1, 3) * self.weight


@contextmanager
def slots_in(half: str) -> Iterator[None]:
    """Let only the lower or the upper half of the layers have slots, pooling and cell.

    The other layers' initial slots stay in the model, unused.
    """
    forward = RMKVBlock.forward

    def drop(model: RMKV, config: ModelConfig) -> None:
        middle = config.num_hidden_layers // 2
        for block in model.blocks[middle:] if half == "lower" else model.blocks[:middle]:
            block.slots, block.pooling, block.cell = 0, None, None

    def forward_without(
        self: RMKVBlock, x: Tensor, initial_memory: Tensor, layer: LayerState, context: SegmentContext
    ) -> tuple[Tensor, LayerState]:
        if not self.slots:  # tokens are the last queries, and with the remembered ones the last keys
            T = x.shape[1]
            assert context.rope is not None
            cos, sin = context.rope
            mask = context.mask[:, :, -T:, -T - layer.keys.shape[2] :]
            context = replace(context, mask=mask, rope=(cos[:, -T:], sin[:, -T:]))
        return forward(self, x, initial_memory, layer, context)

    with after_init(RMKV, drop), patch.object(RMKVBlock, "forward", forward_without):
        yield


def pooling_over_x() -> Patch:
    """Let the cell's input pool the block's input X instead of X + Y_X."""
    return edited_block("else residual", "else x")


@contextmanager
def store_heads_apart() -> Iterator[None]:
    """Give the store its own projection, with half as many heads as attention, of twice the width."""
    initial_state, store_masks = RMKV.initial_state, context_module._store_masks

    def of_store(config: ModelConfig) -> ModelConfig:
        return config.model_copy(update={"num_attention_heads": config.num_attention_heads // 2})

    def project(block: RMKVBlock, config: ModelConfig, *_: Any) -> None:
        if block.store is not None:
            block.store = AssociativeStore(of_store(config))
            # Under `attention`, so that Muon trains its matrix too.
            block.attention.apart = QKVBlock(of_store(config))
            del block.attention.apart.out

    def wider(model: RMKV, batch_size: int) -> State:
        config, state = of_store(model.config), initial_state(model, batch_size)
        heads = config.num_attention_heads + config.key_value_heads
        recent = model.memory.new_zeros(model.config.stores, batch_size, heads, TAPS, config.head_width)
        return replace(state, recent=recent.detach())

    def half_masks(ids: Tensor, position: Tensor, heads: int, dtype: torch.dtype, mixed: bool) -> dict[str, Any]:
        return store_masks(ids, position, heads // 2, dtype, mixed)

    with (
        after_init(RMKVBlock, project),
        patch.object(RMKV, "initial_state", wider),
        patch.object(context_module, "_store_masks", half_masks),
        edited_block("qk[:, n:], v[:, n:], gates", "*self.attention.apart.project(h[:, n:]), gates"),
    ):
        yield
