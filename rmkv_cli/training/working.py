"""The working model, which steps compute with: it copies the master weights and returns gradients to them."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from rmkv_cli.model import RMKV
from rmkv_cli.model.adapters import blank_copy
from rmkv_cli.model.precision import parameter_dtype
from rmkv_cli.training.distribution import Ranks, full_tensor


def distribute(model: nn.Module, ranks: Ranks, method: Literal["ddp", "fsdp"]) -> None:
    """Distribute rank 0's weights: whole to every rank ("ddp"), or sharded, like the optimizer's state ("fsdp")."""
    if ranks.mesh is None:
        return
    for module in model.modules():
        for name, x in list(module.named_parameters(recurse=False)):
            dist.broadcast(x.detach(), src=0)
            if method == "fsdp":
                part = distribute_tensor(x.detach(), ranks.mesh, [Shard(0)], src_data_rank=None)
                setattr(module, name, nn.Parameter(part))


class WorkingModel:
    """A model to compute with beside its master weights: whole if they are sharded, in bfloat16 if that is configured.

    Other weights are the masters themselves. A GPU stores only the copies of frozen weights. Gradients are float32, to
    sum over a row's segments. Weights are gathered once per step, because each segment of a row uses all of them.
    """

    def __init__(self, masters: RMKV, dtype: torch.dtype, ranks: Ranks) -> None:
        self._ranks = ranks
        self.model = blank_copy(masters)
        self.set_aside = False
        """Whether frozen master weights were moved to the CPU, to keep only their copies on the device."""
        self._pairs = []
        modules = dict(self.model.named_modules())
        for name, master in masters.named_parameters():
            narrowed = parameter_dtype(name, dtype)
            copy = master
            if narrowed != master.dtype or isinstance(master, DTensor):
                empty = torch.empty(master.shape, dtype=narrowed, device=ranks.device)
                copy = nn.Parameter(empty, requires_grad=master.requires_grad)
                if master.requires_grad:
                    copy.grad_dtype = master.dtype
                elif not isinstance(master, DTensor):
                    self.set_aside |= ranks.device != "cpu"
                    master.data = master.data.cpu()
            module, _, attribute = name.rpartition(".")
            setattr(modules[module], attribute, copy)
            self._pairs.append((copy, master))

    @torch.no_grad()
    def copy_weights(self, *, frozen: bool = False) -> None:
        """Copy trained master weights, and with `frozen` all others, which steps do not change."""
        for copy, master in self._pairs:
            if copy is not master and (frozen or master.requires_grad):
                copy.copy_(full_tensor(master.to(copy.dtype)))

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Set the masters' gradients to the sum over all ranks, and clear the copies'."""
        gradients = []
        for copy, master in self._pairs:
            gradient, copy.grad = copy.grad, None
            if gradient is not None and isinstance(master, DTensor):
                parts = DTensor.from_local(gradient, master.device_mesh, [Partial()], run_check=False)
                master.grad = parts.redistribute(placements=master.placements, async_op=True)
            elif gradient is not None:
                master.grad = gradient
                gradients.append(gradient)
        self._ranks.sum_all(gradients)
