"""Alignment: each layer's attention output to the teacher's, where its input is the teacher's."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from rmkv_cli.data.lanes import IGNORED
from rmkv_cli.model import RMKV, RMKVBlock, State
from rmkv_cli.model.precision import wide
from rmkv_cli.model.state import copied
from rmkv_cli.training.loss import Segment, replayed


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
    """Return how far rows (B, T) are from the teacher, and the state after them without its graph.

    That is the squared distance of a layer's attention output from the teacher's, over a row's tokens that count, in
    parts of the teacher's own square there; the mean over the layers, times the number of those tokens; summed over
    the rows. Each layer reads what the teacher's layer reads, so gradients flow through no other layer. `replay` and
    the other arguments are as in `row_loss`.

    Args:
        layers: for each layer the teacher's input and its attention's output, both (B, T, D).
    """
    counts = (targets != IGNORED).to(torch.float32)
    weights = []
    for _, wanted in layers:
        square = (wide(wanted).square().sum(2) * counts).sum(1, keepdim=True)
        weights.append(counts * counts.sum(1, keepdim=True) / square.clamp(min=1e-30) / len(layers))
    state = state.map(lambda x, _: copied(x.detach()).requires_grad_(x.is_floating_point()))

    def read(ids: Tensor, before: State, documents: Tensor, mixed: bool, *, part: slice) -> tuple[Tensor, State]:
        with _taught(model, [x[:, part] for x, _ in layers]) as outputs:
            _, after = model.segment(ids, before, documents, mixed)
        distances = [
            (wide(y) - wide(wanted[:, part])).square().sum(2) * weight[:, part]
            for y, (_, wanted), weight in zip(outputs, layers, weights, strict=True)
        ]
        return torch.stack(distances).sum(0), after

    T, total = input_ids.shape[1], wide(state.memory.new_zeros(()))
    for start, stop in model.spans(T, state.filled):
        part = slice(start, stop)
        how: Segment = partial(read, part=part)
        if replay and stop < T:
            how = replayed(how, preserve_rng_state=model.config.dropout > 0)
        distance, state = model.hidden(input_ids[:, part], state, document_ids[:, part], how)
        total = total + distance.sum()
    return total, state.detach()


@contextmanager
def _taught(model: RMKV, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Let each layer read its of `inputs` (B, T, D); give the list that its attention's output (B, T, D) comes into.

    Feed-forwards are left out meanwhile: what they make no layer would read.
    """
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for block, x in zip(model.blocks, inputs, strict=True):
            assert isinstance(block, RMKVBlock)
            hooks = [
                block.register_forward_pre_hook(lambda _, given, x=x: (x.to(given[0].dtype), *given[1:])),
                # Before the tokens there are the slots, where a segment ends.
                block.attention.out.register_forward_hook(lambda _, __, y, T=x.shape[1]: outputs.append(y[:, -T:])),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
            stack.callback(setattr, block, "feed_forward", block.feed_forward)
            block.feed_forward = None
        yield outputs
