"""Effect of the memory: the loss on a text with its memory, with none, and with that of another document."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.measure import choose, token_sizes
from rmkv_cli.evaluation.reading import continuing, require_fits, steps, token_losses
from rmkv_cli.model import RMKV, State, inference, reset_memory, swap_memory
from rmkv_cli.tokenizer import Tokenizer


@dataclass(frozen=True)
class MemoryEffect:
    """Losses in nats per token after the first segment of each document, in three readings of the same text.

    In documents with answers, only the answers count.
    """

    documents: int
    tokens: int
    bytes: int | None
    """UTF-8 bytes of these tokens; None without a tokenizer."""
    carried: float
    """Loss with the memory carried from segment to segment, as usual."""
    reset: float
    """Loss with the memory reset at the start of every segment; only the look-back shows earlier text."""
    swapped: float
    """Loss with the memory of another document, read up to the same segment."""
    reset_cost: float
    """reset - carried: the value of the memory, in nats per token."""
    swapped_cost: float
    """swapped - carried: the value of having this document's memory, in nats per token."""
    reset_cost_bits_per_byte: float | None
    swapped_cost_bits_per_byte: float | None


def memory_effect(
    model: RMKV,
    documents: Documents,
    *,
    max_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
    batch_tokens: int = 8192,
    advance: Callable[[float], None] = lambda tokens: None,
) -> MemoryEffect:
    """Measure the memory's effect on documents longer than a segment; arguments as in `measure`.

    Each reading has its own look-back. The part of a document beyond the end of all others in its batch is not scored,
    because no other memory has read that far.

    Raises:
        UserError: fewer than two documents are longer than a segment, they contain no answer there, they do not fit the
            model, or the model is not causal.
    """
    S = model.config.segment_length
    if model.config.memory.carry == "layers":
        raise UserError(
            "the memory's effect cannot be measured for a model that is not causal (memory.carry = 'layers')"
        )
    long = np.flatnonzero(documents.lengths > S)
    if len(long):
        chosen, lengths = choose(documents.lengths[long], max_tokens)
        chosen, lengths = long[chosen[lengths > S]], lengths[lengths > S]
    if not len(long) or len(chosen) < 2:
        raise UserError(f"the memory's effect needs at least 2 documents of more than a segment ({S} tokens)")
    require_fits(model, documents.vocab_size, int(lengths.max()))
    of_token = token_sizes(tokenizer) if tokenizer and documents.sizes[chosen].all() else None
    totals = torch.zeros(3, dtype=torch.float64, device=model.memory.device)
    tokens = size = 0
    order = np.argsort(lengths, kind="stable")
    with inference(model):
        for batch in np.array_split(order, max(1, len(order) // max(2, batch_tokens // S))):
            texts = [documents.part(int(chosen[i]), 0, int(lengths[i]) + 1) for i in batch]
            states = [model.initial_state(len(batch))] * 3
            counted = [documents.counted(int(i)) for i in chosen[batch]]
            for step in steps(texts, lengths[batch], documents.eod, model, counted):
                if len(step.inputs) < 2:
                    break
                advance(step.read)
                if step.start == 0:
                    states = [model.hidden(step.inputs, states[0])[1]] * 3
                    continue
                carried, reset, swapped = (continuing(state, step) for state in states)
                states = [carried, reset_memory(reset), _with_memory_of_previous_row(carried, swapped)]
                for i, state in enumerate(states):
                    hidden, states[i] = model.hidden(step.inputs, state)
                    totals[i] += token_losses(model, hidden, step).sum()
                tokens += len(step.targets)
                if of_token is not None:
                    size += int(of_token[step.targets.cpu().numpy()].sum())
    if not tokens:
        raise UserError(
            "the memory's effect cannot be measured: no answer is in the part that is compared between documents"
        )
    losses = (totals / tokens).tolist()
    costs = [loss - losses[0] for loss in losses[1:]]
    in_bits = [cost * tokens / size / math.log(2) if size else None for cost in costs]
    return MemoryEffect(len(chosen), tokens, size or None, *losses, *costs, *in_bits)


def _with_memory_of_previous_row(carried: State, swapped: State) -> State:
    """Return `swapped` with the memory of the previous row of `carried`; the first row takes the last row's."""
    rows = torch.arange(len(carried.position), device=carried.position.device)
    other = swap_memory(carried, rows.roll(1))
    return replace(swapped, memory=other.memory, cell=other.cell, store=other.store)
