"""The loss of a training row, whose segments are replayed in the backward pass and whose logits come in chunks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rmkv_cli.data.lanes import IGNORED
from rmkv_cli.model import RMKV, State
from rmkv_cli.model.cost import MAX_LOGITS
from rmkv_cli.model.precision import wide_dtype, widen
from rmkv_cli.model.state import contiguous_copy

Segment = Callable[[Tensor, State, Tensor, bool], tuple[Tensor, State]]
"""`RMKV.segment`, or what takes its place."""


@dataclass
class Distillation:
    """A teacher's outputs for the tokens of some rows, and their weight in the loss."""

    hidden: Tensor
    """(B, T, D'): the input of the teacher's head."""
    head: Callable[[Tensor], Tensor]
    """The teacher's head: (N, D') -> logits (N, V'). Ids that one of the models lacks are padding of the vocabulary;
    the teacher gives them no probability."""
    share: float
    temperature: float
    divergence: Tensor = field(init=False)
    """Sum of KL(teacher ‖ student) over the tokens that count, in nats; `row_loss` fills it in."""


@dataclass
class TokenWeights:
    """The weight of each token of some rows in the loss, as policy gradients have it."""

    weights: Tensor
    """(B, T): factors of the cross-entropy, of either sign."""
    losses: Tensor = field(init=False)
    """(B, T): the tokens' cross-entropy in nats, without the factors; 0 where a token does not count. `row_loss` fills
    it in."""


def compiled_segment(model: RMKV) -> Segment:
    """Return the model's `segment` as one compiled graph for each shape, which training has few of."""
    compiled: Segment = torch.compile(model.segment, fullgraph=True, dynamic=False)
    return compiled


def row_loss(
    model: RMKV,
    input_ids: Tensor,
    targets: Tensor,
    document_ids: Tensor,
    state: State,
    *,
    replay: bool = True,
    z_loss: float = 0.0,
    segment: Segment | None = None,
    lesson: Distillation | None = None,
    credit: TokenWeights | None = None,
) -> tuple[Tensor, State]:
    """Return the summed cross-entropy in nats of rows (B, T), and the state after them without its graph.

    Targets of -100 do not count.

    With `z_loss` the gradient, and it alone, is that of the cross-entropy plus z_loss * log²Z for each token that
    counts. Z is the sum of the exponentials of its logits, which this keeps from drifting (PaLM: Chowdhery et al.,
    2022).

    With a `lesson`, only the gradient changes: it is that of (1 - share) * cross-entropy + share * temperature² * KL
    (Hinton et al., 2015). KL(teacher ‖ student) is computed from the logits divided by the temperature.

    With `credit`, each token's cross-entropy is multiplied by its weight.

    With `replay` only the states between segments are kept for the backward pass; what happens inside any but the last
    is computed again when its gradient is needed (gradient checkpointing: Chen et al., 2016). So activations are one
    segment's, however long the row is; without it, up to a quarter of the work less, they are the row's. `segment`
    takes the place of the model's, compiled for instance.
    """
    segment = segment or model.segment
    read = replayed(segment, preserve_rng_state=model.config.dropout > 0)
    last = max(start for start, _ in model.spans(input_ids.shape[1], state.filled))  # whose gradient is needed at once
    # PyTorch replays only what has an input that needs a gradient; and a compiled segment is one for all.
    state = state.map(lambda x, _: contiguous_copy(x.detach()).requires_grad_(x.is_floating_point()))
    outputs = []
    for part, how in ((slice(0, last), read if replay else segment), (slice(last, None), segment)):
        if part.stop != 0:
            hidden, state = model.hidden(input_ids[:, part], state, document_ids[:, part], how)
            outputs.append(hidden)
    hidden = torch.cat(outputs, dim=1).flatten(0, 1)
    del outputs
    loss = cross_entropy(hidden, model.head_weight, targets.flatten(), z_loss, lesson, credit)
    if credit:
        credit.losses = credit.losses.view_as(targets)
    return loss, state.detach()


def replayed(segment: Segment, *, preserve_rng_state: bool) -> Segment:
    """Return a function that reads a segment and keeps nothing of it but the state before it for the backward pass.

    The backward pass of each is one of its own (PyTorch's reentrant checkpoint), which adds to the weights' gradients
    in place; otherwise the sum of a row's gradients would stand beside that of the rows before it.
    """

    def read(input_ids: Tensor, state: State, document_ids: Tensor, mixed: bool) -> tuple[Tensor, State]:
        nothing = torch.empty(0)
        before, after = state.map(lambda *_: nothing), None

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            nonlocal after
            known = tensors if torch.is_grad_enabled() else [x.detach() for x in tensors]
            hidden, new = segment(input_ids, before.with_tensors(known), document_ids, mixed)
            after = new.map(lambda *_: nothing)
            return hidden, *new.flat()

        outputs = checkpoint(run, *state.flat(), use_reentrant=True, preserve_rng_state=preserve_rng_state)
        assert after is not None
        return outputs[0], after.with_tensors(outputs[1:])

    return read


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    lesson: Distillation | None = None,
    credit: TokenWeights | None = None,
) -> Tensor:
    """Return the sum of the cross-entropies of hidden (N, D) times the head's weight (V, D).

    Targets (N,) of -100 do not count; `z_loss`, `lesson` and `credit` are as in `row_loss`.

    A chunk of tokens at a time gives its losses and the gradients at once, so that logits exist for one chunk alone.
    """
    loss: Tensor = _CrossEntropy.apply(hidden, weight, targets, z_loss, lesson, credit)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        lesson: Distillation | None,
        credit: TokenWeights | None,
    ) -> Tensor:
        loss = widen(hidden.new_zeros(()))
        divergence = loss.clone()
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight, dtype=wide_dtype(weight.dtype)) if ctx.needs_input_grad[1] else None
        size = max(1, MAX_LOGITS // len(weight))
        share = lesson.share if lesson else 0.0
        losses = []
        for i in range(0, len(hidden), size):
            h, target = hidden[i : i + size], targets[i : i + size, None]
            counts = target != IGNORED
            target = target.clamp(min=0)
            logits = widen(h @ weight.T)
            log_Z = logits.logsumexp(1, keepdim=True)
            losses.append(torch.where(counts, log_Z - logits.gather(1, target), 0.0))
            factor = counts.to(logits.dtype)
            if credit:
                factor = factor * credit.weights.flatten()[i : i + size, None]
            loss += (losses[-1] * factor).sum()
            pull = None
            if lesson:
                part, pull = _distilled(logits, lesson.head(lesson.hidden.flatten(0, 1)[i : i + size]), lesson, counts)
                divergence += part
            # d/dlogits of log Z is the softmax, and of z log²Z it is 2 z log Z times that.
            gradient = logits.sub_(log_Z).exp_().mul_(factor * (1 - share) + counts * (2 * z_loss * log_Z))
            gradient.scatter_add_(1, target, -(1 - share) * factor)
            gradient = (gradient if pull is None else gradient.add_(pull)).to(weight.dtype)
            if for_hidden is not None:
                torch.mm(gradient, weight, out=for_hidden[i : i + size])
            if for_weight is not None:
                for_weight += gradient.T @ h
            del logits, gradient, pull  # before the next chunk is made
        if lesson:
            lesson.divergence = divergence
        if credit:
            credit.losses = torch.cat(losses)[:, 0]
        ctx.gradients = for_hidden, for_weight
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        for_hidden, for_weight = ctx.gradients
        del ctx.gradients  # which are scaled in place, once
        return (
            None if for_hidden is None else for_hidden.mul_(scale),
            None if for_weight is None else for_weight.mul_(scale),
            None,
            None,
            None,
            None,
        )


def _distilled(logits: Tensor, taught: Tensor, lesson: Distillation, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL summed over the tokens that count (n, 1), and the gradient of share * temperature² * KL.

    The gradient is with respect to the student's logits (n, V); `taught` are the teacher's logits (n, V').
    """
    known = min(logits.shape[1], taught.shape[1])
    log_q = (logits / lesson.temperature).log_softmax(1)
    log_p = (widen(taught[:, :known]) / lesson.temperature).log_softmax(1)
    p = log_p.exp()
    divergence = log_p.sub_(log_q[:, :known]).mul_(p).sum(1, keepdim=True)
    pull = log_q.exp_()
    pull[:, :known] -= p
    return (divergence * counts).sum(), pull.mul_(counts).mul_(lesson.share * lesson.temperature)
