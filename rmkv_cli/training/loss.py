"""The loss of a training row, with each segment replayed in the backward pass."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rmkv_cli.model import RMKV, State


def row_loss(
    model: RMKV, input_ids: Tensor, targets: Tensor, document_ids: Tensor, state: State
) -> tuple[Tensor, State]:
    """Return the summed cross-entropy in nats of rows (B, T) and the state after them; targets of -100 do not count.

    Only the states between segments are kept for the backward pass; what happens inside a segment, the logits
    included, is computed again when its gradient is needed (gradient checkpointing: Chen et al., 2016). So activations
    are one segment's, however long the row is.
    """
    losses = []
    for start, stop in model.spans(input_ids.shape[1], state.filled):
        part = slice(start, stop)
        loss, state = checkpoint(
            _segment_loss,
            model,
            input_ids[:, part],
            targets[:, part],
            document_ids[:, part],
            state,
            use_reentrant=False,
            preserve_rng_state=model.config.dropout > 0,
        )
        losses.append(loss)
    return torch.stack(losses).sum(), state


class RowLoss(nn.Module):
    """`row_loss` as a module's forward pass, which is what PyTorch's engines for many processes act on."""

    def __init__(self, model: RMKV) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor, document_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the rows' loss and the state after them, detached, so that what the loss does not need is unused."""
        loss, state = row_loss(self.model, input_ids, targets, document_ids, state)
        return loss, state.detach()


def _segment_loss(
    model: RMKV, input_ids: Tensor, targets: Tensor, document_ids: Tensor, state: State
) -> tuple[Tensor, State]:
    hidden, state = model.segment(input_ids, state, document_ids)
    logits = model.head(hidden).flatten(0, 1)
    with torch.autocast(logits.device.type, enabled=False):  # the softmax is not for bfloat16
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, targets.flatten(), reduction="sum"), state
