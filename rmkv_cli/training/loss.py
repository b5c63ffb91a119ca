"""Loss of training rows: segments are recomputed in the backward pass, and logits exist one chunk at a time."""

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
"""`RMKV.segment` or a replacement of it."""


@dataclass
class Distillation:
    """A teacher's outputs for rows, and their weight in the loss."""

    hidden: Tensor
    """Input of the teacher's head, (B, T, D')."""
    head: Callable[[Tensor], Tensor]
    """Teacher's head, (N, D') -> logits (N, V'). Ids that only one of the models has are vocabulary padding; the
    teacher gives them no probability."""
    share: float
    """Share of the KL in the loss."""
    temperature: float
    """Divisor of both models' logits."""
    divergence: Tensor = field(init=False)
    """Sum of KL(teacher ‖ student) over the tokens that count, in nats; set by `row_loss`."""


@dataclass
class TokenWeights:
    """Weight of each token of rows in the loss, as in policy gradients."""

    weights: Tensor
    """Factors of the tokens' cross-entropy, of either sign, (B, T)."""
    losses: Tensor = field(init=False)
    """Cross-entropy of each token in nats, without the factors, (B, T); 0 where a token does not count. Set by
    `row_loss`."""


def compiled_segment(model: RMKV) -> Segment:
    """Return the model's `segment`, compiled as one graph per shape; training has few shapes."""
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
    distillation: Distillation | None = None,
    token_weights: TokenWeights | None = None,
) -> tuple[Tensor, State]:
    """Return the summed cross-entropy of rows in nats, and the detached state after them.

    Args:
        model: the model.
        input_ids: the rows' tokens, (B, T).
        targets: the tokens to predict, (B, T); -100 does not count.
        document_ids: each token's document, (B, T).
        state: the state before the rows.
        replay: whether to keep only the states between segments for the backward pass, and to recompute all segments
            except the last when their gradients are needed (gradient checkpointing: Chen et al., 2016). Activations
            then take the memory of one segment instead of a row, for up to a third more work.
        z_loss: coefficient of log²Z in the gradient, for each token that counts, where Z is the sum of the exponentials
            of its logits. It keeps log Z from drifting (PaLM: Chowdhery et al., 2022). The returned loss excludes it.
        segment: a replacement for `model.segment`, such as a compiled one.
        distillation: a teacher's outputs. The gradient is then that of (1 - share) * cross-entropy + share *
            temperature² * KL(teacher ‖ student), with both models' logits divided by the temperature (Hinton et al.,
            2015). The returned loss stays the cross-entropy.
        token_weights: weights of the tokens' cross-entropy.
    """
    segment = segment or model.segment
    read = with_replay(segment, preserve_rng_state=model.config.dropout > 0)
    last = max(start for start, _ in model.spans(input_ids.shape[1], state.filled))  # the backward pass begins here
    # PyTorch recomputes only functions with an input that requires a gradient. If every state does, one compiled
    # segment serves all.
    state = state.map(lambda x, _: contiguous_copy(x.detach()).requires_grad_(x.is_floating_point()))
    outputs = []
    for part, reader in ((slice(0, last), read if replay else segment), (slice(last, None), segment)):
        if part.stop != 0:
            hidden, state = model.hidden(input_ids[:, part], state, document_ids[:, part], reader)
            outputs.append(hidden)
    hidden = torch.cat(outputs, dim=1).flatten(0, 1)
    del outputs
    loss = cross_entropy(hidden, model.head_weight, targets.flatten(), z_loss, distillation, token_weights)
    if token_weights:
        token_weights.losses = token_weights.losses.view_as(targets)
    return loss, state.detach()


def with_replay(segment: Segment, *, preserve_rng_state: bool) -> Segment:
    """Return a function that reads a segment but keeps only the state before it for the backward pass.

    Each segment has its own backward pass (PyTorch's reentrant checkpoint), which adds to the weights' gradients in
    place. Otherwise a row's summed gradients would need memory beside those of earlier rows.
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
    distillation: Distillation | None = None,
    token_weights: TokenWeights | None = None,
) -> Tensor:
    """Return the summed cross-entropy of the logits of hidden, (N, D), and the head's weight, (V, D).

    Targets, (N,), of -100 do not count; other arguments are as in `row_loss`. The forward pass also computes the
    gradients, chunk by chunk, so logits exist only for one chunk.
    """
    loss: Tensor = _CrossEntropy.apply(hidden, weight, targets, z_loss, distillation, token_weights)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        distillation: Distillation | None,
        token_weights: TokenWeights | None,
    ) -> Tensor:
        loss = widen(hidden.new_zeros(()))
        divergence = loss.clone()
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=wide_dtype(weight.dtype)) if ctx.needs_input_grad[1] else None
        size = max(1, MAX_LOGITS // len(weight))
        share = distillation.share if distillation else 0.0
        losses = []
        for i in range(0, len(hidden), size):
            h, target = hidden[i : i + size], targets[i : i + size, None]
            counts = target != IGNORED
            target = target.clamp(min=0)
            logits = widen(h @ weight.T)
            log_Z = logits.logsumexp(1, keepdim=True)
            losses.append(torch.where(counts, log_Z - logits.gather(1, target), 0.0))
            factor = counts.to(logits.dtype)
            if token_weights:
                factor = factor * token_weights.weights.flatten()[i : i + size, None]
            loss += (losses[-1] * factor).sum()
            kl_gradient = None
            if distillation:
                part, kl_gradient = _distillation_gradient(
                    logits, distillation.head(distillation.hidden.flatten(0, 1)[i : i + size]), distillation, counts
                )
                divergence += part
            # The gradient of log Z is the softmax; the gradient of z log²Z is 2 z log Z times that.
            gradient = logits.sub_(log_Z).exp_().mul_(factor * (1 - share) + counts * (2 * z_loss * log_Z))
            gradient.scatter_add_(1, target, -(1 - share) * factor)
            gradient = (gradient if kl_gradient is None else gradient.add_(kl_gradient)).to(weight.dtype)
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[i : i + size])
            if weight_gradient is not None:
                weight_gradient += gradient.T @ h
            del logits, gradient, kl_gradient  # frees memory before the next chunk
        if distillation:
            distillation.divergence = divergence
        if token_weights:
            token_weights.losses = torch.cat(losses)[:, 0]
        ctx.gradients = hidden_gradient, weight_gradient
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden_gradient, weight_gradient = ctx.gradients
        del ctx.gradients  # they are scaled in place, so only once
        return (
            None if hidden_gradient is None else hidden_gradient.mul_(scale),
            None if weight_gradient is None else weight_gradient.mul_(scale),
            None,
            None,
            None,
            None,
        )


def _distillation_gradient(
    logits: Tensor, teacher_logits: Tensor, distillation: Distillation, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the KL summed over the tokens that count, and the gradient of share * temperature² * KL.

    Args:
        logits: the student's logits, (n, V).
        teacher_logits: the teacher's logits, (n, V').
        distillation: share and temperature.
        counts: whether each token counts, (n, 1).
    """
    known = min(logits.shape[1], teacher_logits.shape[1])
    log_q = (logits / distillation.temperature).log_softmax(1)
    log_p = (widen(teacher_logits[:, :known]) / distillation.temperature).log_softmax(1)
    p = log_p.exp()
    divergence = log_p.sub_(log_q[:, :known]).mul_(p).sum(1, keepdim=True)
    kl_gradient = log_q.exp_()
    kl_gradient[:, :known] -= p
    return (divergence * counts).sum(), kl_gradient.mul_(counts).mul_(distillation.share * distillation.temperature)
