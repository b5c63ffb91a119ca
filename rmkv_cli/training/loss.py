"""The loss of a training row, with each segment replayed in the backward pass."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rmkv_cli.data.lanes import IGNORED
from rmkv_cli.model import RMKV, State


def row_loss(
    model: RMKV,
    input_ids: Tensor,
    targets: Tensor,
    document_ids: Tensor,
    state: State,
    *,
    replay: bool = True,
    z_loss: float = 0.0,
) -> tuple[Tensor, State]:
    """Return the summed cross-entropy in nats of rows (B, T) and the state after them; targets of -100 do not count.

    With `z_loss` the gradient, and it alone, is that of the cross-entropy plus z_loss * log²Z for each token that
    counts. Z is the sum of the exponentials of its logits, which this keeps from drifting (PaLM: Chowdhery et al.,
    2022).

    With `replay` only the states between segments are kept for the backward pass; what happens inside a segment, the
    logits included, is computed again when its gradient is needed (gradient checkpointing: Chen et al., 2016). So
    activations are one segment's, however long the row is; without it, a third of the work less, they are the row's.
    """
    read = _segment_loss
    if replay:
        preserve = model.config.dropout > 0
        read = partial(checkpoint, _segment_loss, use_reentrant=False, preserve_rng_state=preserve)
    losses = []
    for start, stop in model.spans(input_ids.shape[1], state.filled):
        part = slice(start, stop)
        loss, state = read(model, input_ids[:, part], targets[:, part], document_ids[:, part], state, z_loss)
        losses.append(loss)
    return torch.stack(losses).sum(), state


class RowLoss(nn.Module):
    """`row_loss` as a module's forward pass, which is what PyTorch's engines for many processes act on."""

    def __init__(self, model: RMKV, *, replay: bool, z_loss: float) -> None:
        super().__init__()
        self.model, self.replay, self.z_loss = model, replay, z_loss

    def forward(self, input_ids: Tensor, targets: Tensor, document_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the rows' loss and the state after them, detached, so that what the loss does not need is unused."""
        row = input_ids, targets, document_ids
        loss, state = row_loss(self.model, *row, state, replay=self.replay, z_loss=self.z_loss)
        return loss, state.detach()


def _segment_loss(
    model: RMKV, input_ids: Tensor, targets: Tensor, document_ids: Tensor, state: State, z_loss: float
) -> tuple[Tensor, State]:
    hidden, state = model.segment(input_ids, state, document_ids)
    logits = model.head(hidden).flatten(0, 1)
    with torch.autocast(logits.device.type, enabled=False):  # the softmax is not for bfloat16
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = targets.flatten()
        losses = F.cross_entropy(wide, targets, reduction="none")
        loss = losses.sum()
        if z_loss:
            chosen = wide.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            log_Z = torch.where(targets == IGNORED, 0, losses + chosen)  # a loss is log Z less its target's logit
            penalty = z_loss * log_Z.square().sum()
            loss = loss + (penalty - penalty.detach())
        return loss, state
