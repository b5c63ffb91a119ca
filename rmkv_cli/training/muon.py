"""Muon for matrices that are sharded by rows."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` for sharded matrices: the same update, with momentum sharded like the matrices.

    Each matrix is gathered on one rank, which orthogonalizes it and returns every rank its rows. A round handles one
    matrix per rank; rounds take matrices in order of cost, which balances the ranks' work. Ranks exchange bfloat16,
    the type in which Muon orthogonalizes anyway.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """Take one step; all ranks call this."""
        for group in self.param_groups:
            parameters: list[Any] = []  # DTensors, like the other two lists
            gradients: list[Any] = []
            momenta: list[Any] = []
            self._init_group(group, parameters, gradients, momenta)
            matrices = sorted(zip(parameters, gradients, momenta, strict=True), key=lambda each: _cost(each[0]))
            ranks = parameters[0].device_mesh.size() if parameters else 1
            for start in range(0, len(matrices), ranks):
                self._round(group, *zip(*matrices[start : start + ranks], strict=True))

    def _round(
        self,
        group: dict[str, Any],
        parameters: tuple[DTensor, ...],
        gradients: tuple[DTensor, ...],
        momenta: tuple[DTensor, ...],
    ) -> None:
        """Update at most one matrix per rank."""
        lr, momentum = group["lr"], group["momentum"]
        updates = []
        for gradient, momentum_buffer in zip(gradients, momenta, strict=True):
            g, b = gradient.to_local(), momentum_buffer.to_local()
            b.lerp_(g, 1 - momentum)
            updates.append((g.lerp(b, momentum) if group["nesterov"] else b).bfloat16())
        orthogonal = _apply_to_whole(
            updates,
            parameters,
            lambda x: _zeropower_via_newtonschulz(x, group["ns_coefficients"], group["ns_steps"], group["eps"]),
        )
        for parameter, update in zip(parameters, orthogonal, strict=True):
            p = parameter.to_local()
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(update.view_as(p), alpha=-_adjust_lr(lr, group["adjust_lr_fn"], parameter.shape))


def _apply_to_whole(
    rows: list[Tensor], like: tuple[DTensor, ...], function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Return this rank's rows, flat, of `function` applied to each whole matrix; rank i handles matrix i.

    Args:
        rows: this rank's rows of the matrices.
        like: tensors that are sharded like the matrices.
        function: function of a matrix that keeps its shape and type.
    """
    mesh = like[0].device_mesh
    rank, ranks, processes = mesh.get_local_rank(), mesh.size(), mesh.get_group()
    sent = [x.numel() for x in rows] + [0] * (ranks - len(rows))
    received = [0] * ranks
    if rank < len(like):  # DTensor shards as `torch.chunk` does: the last ranks may have fewer rows, or none
        height, width = like[rank].shape
        size = -(-height // ranks)
        received = [width * min(size, max(0, height - i * size)) for i in range(ranks)]
    flat = torch.cat([x.flatten() for x in rows])
    whole = flat.new_empty(sum(received))
    dist.all_to_all_single(whole, flat, received, sent, processes)
    if rank < len(like):
        whole = function(whole.view(like[rank].shape)).flatten()
    dist.all_to_all_single(flat, whole, sent, received, processes)
    return flat.split(sent[: len(rows)])


def _cost(matrix: Tensor) -> int:
    """Return a number proportional to the operations that orthogonalize a matrix."""
    return matrix.numel() * min(matrix.shape)
