"""Alignment: train each layer's attention output toward the teacher's, given the teacher's layer input."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from rmkv_cli.data.lanes import IGNORED
from rmkv_cli.model import RMKV, RMKVBlock, State
from rmkv_cli.model.precision import widen
from rmkv_cli.model.state import contiguous_copy
from rmkv_cli.training.loss import Segment, with_replay


def row_alignment(
    model: RMKV,
    input_ids: Tensor,
    targets: Tensor,
    document_ids: Tensor,
    state: State,
    layers: Sequence[tuple[Tensor, Tensor]],
    *,
    replay: bool = True,
) -> tuple[Tensor, State]:
    """Return the summed distance of rows, (B, T), from the teacher, and the detached state after the rows.

    A layer's distance in a row is the squared distance of its attention output from the teacher's, divided by the
    squared norm of the teacher's output, both summed over the row's tokens that count. The result averages this over
    the layers, multiplies it by the number of those tokens, and sums over the rows. Each layer reads the input of the
    teacher's layer, so gradients do not flow into other layers. Other arguments are as in `row_loss`.

    Args:
        layers: the teacher's input and attention output of each layer, both (B, T, D).
    """
    counts = (targets != IGNORED).to(torch.float32)
    weights = []
    for _, target in layers:
        square = (widen(target).square().sum(2) * counts).sum(1, keepdim=True)
        weights.append(counts * counts.sum(1, keepdim=True) / square.clamp(min=1e-30) / len(layers))
    state = state.map(lambda x, _: contiguous_copy(x.detach()).requires_grad_(x.is_floating_point()))

    def read(ids: Tensor, before: State, documents: Tensor, mixed: bool, *, part: slice) -> tuple[Tensor, State]:
        with _teacher_inputs(model, [x[:, part] for x, _ in layers]) as outputs:
            _, after = model.segment(ids, before, documents, mixed)
        distances = [
            (widen(y) - widen(target[:, part])).square().sum(2) * weight[:, part]
            for y, (_, target), weight in zip(outputs, layers, weights, strict=True)
        ]
        return torch.stack(distances).sum(0), after

    T, total = input_ids.shape[1], widen(state.memory.new_zeros(()))
    for start, stop in model.spans(T, state.filled):
        part = slice(start, stop)
        segment: Segment = partial(read, part=part)
        if replay and stop < T:
            segment = with_replay(segment, preserve_rng_state=model.config.dropout > 0)
        distance, state = model.hidden(input_ids[:, part], state, document_ids[:, part], segment)
        total = total + distance.sum()
    return total, state.detach()


@contextmanager
def _teacher_inputs(model: RMKV, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Replace each layer's input by one of `inputs`, (B, T, D); yield a list that collects attention outputs.

    Feed-forwards and experts are disabled meanwhile, because no layer reads their output.
    """
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for block, x in zip(model.blocks, inputs, strict=True):
            assert isinstance(block, RMKVBlock)
            hooks = [
                block.register_forward_pre_hook(lambda _, given, x=x: (x.to(given[0].dtype), *given[1:])),
                # At the end of a segment, the slots precede the tokens.
                block.attention.out.register_forward_hook(lambda _, __, y, T=x.shape[1]: outputs.append(y[:, -T:])),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
            for branch in ("feed_forward", "experts"):
                stack.callback(setattr, block, branch, getattr(block, branch))
                setattr(block, branch, None)
        yield outputs
