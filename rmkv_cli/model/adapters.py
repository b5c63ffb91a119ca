"""LoRA (Hu et al., 2021): trainable low-rank matrices beside the frozen matrices of linear layers and cells."""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import TrainConfig
from rmkv_cli.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rmkv_cli.model.model import RMKV

ADAPTER_MARK = "lora_"
"""Substring of the names of an adapter's parameters, and of no others."""
AdaptableLayer = nn.Linear | nn.GRUCell | nn.LSTMCell


class LowRank(nn.Module):
    """W + (alpha / rank) B A in place of W, (out, in), with A, (rank, in), and B, (out, rank).

    A is initialized Kaiming-uniform and B with zeros, so a new adapter changes nothing.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        size_out, size_in = weight.shape
        self.lora_A = nn.Linear(size_in, rank, bias=False, device=weight.device, dtype=weight.dtype)
        self.lora_B = nn.Linear(rank, size_out, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.lora_B.weight)

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + (alpha / rank) B A x, (..., out), for x, (..., in), and y = W x."""
        return torch.add(y, self.lora_B(self.lora_A(x)), alpha=self.alpha / self.rank)

    def merged(self, weight: Tensor) -> Tensor:
        """Return W + (alpha / rank) B A, (out, in), for W."""
        return torch.addmm(weight, self.lora_B.weight, self.lora_A.weight, alpha=self.alpha / self.rank)


class LoRALinear(LowRank):
    """A linear layer with an adapter. The layer's own parameters keep their names."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(layer.weight, rank, alpha)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output, (..., out), for x, (..., in)."""
        return self.add_update(F.linear(x, self.weight, self.bias), x)

    def merged_weights(self) -> dict[str, Tensor]:
        """Return the merged weights by name."""
        return {"weight": self.merged(self.weight)}


class LoRACell(LowRank):
    """A GRU or LSTM cell with an adapter for each of its two matrices.

    PEFT wraps a module once per adapted parameter, so the second parameter's adapter contains the first one's as
    `base_layer`. This class does the same, to give its parameters PEFT's names.
    """

    def __init__(self, cell: nn.GRUCell | nn.LSTMCell, rank: int, alpha: float) -> None:
        super().__init__(cell.weight_hh, rank, alpha)
        self.base_layer = LowRank(cell.weight_ih, rank, alpha)
        self.weight_ih, self.weight_hh = cell.weight_ih, cell.weight_hh
        self.bias_ih, self.bias_hh = cell.bias_ih, cell.bias_hh

    def forward(self, x: Tensor, hidden: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Return what PyTorch's cell returns: h', (N, D), or for an LSTM (h', c')."""
        h = hidden if isinstance(hidden, Tensor) else hidden[0]
        from_x = self.base_layer.add_update(F.linear(x, self.weight_ih, self.bias_ih), x)
        from_h = self.add_update(F.linear(h, self.weight_hh, self.bias_hh), h)
        if isinstance(hidden, Tensor):
            (reset_x, keep_x, new_x), (reset_h, keep_h, new_h) = from_x.chunk(3, dim=1), from_h.chunk(3, dim=1)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            return torch.lerp(new, h, torch.sigmoid(keep_x + keep_h))
        write, keep, new, read = (from_x + from_h).chunk(4, dim=1)
        c = torch.sigmoid(keep) * hidden[1] + torch.sigmoid(write) * torch.tanh(new)
        return torch.sigmoid(read) * torch.tanh(c), c

    def merged_weights(self) -> dict[str, Tensor]:
        """Return the merged weights by name."""
        return {"weight_ih": self.base_layer.merged(self.weight_ih), "weight_hh": self.merged(self.weight_hh)}


def adaptable(model: nn.Module) -> dict[str, AdaptableLayer]:
    """Return the layers that can have an adapter, by name: all linear layers and cells except head and experts."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptableLayer)
        and name.startswith("blocks.")
        and ".experts." not in name
        and ADAPTER_MARK not in name
    }


def adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRACell]]:
    """Yield the name and the layer of each layer that has an adapter."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear | LoRACell))


def is_adapted(model: nn.Module) -> bool:
    """Return whether the model has an adapter."""
    return any(True for _ in adapted(model))


def select(model: nn.Module, targets: Collection[str]) -> list[str]:
    """Return the names of the layers that `targets` select, by name or by its end, such as "attention.qkv".

    Without targets, all layers that can have an adapter are selected.

    Raises:
        UserError: a target matches no layer.
    """
    names = list(adaptable(model))
    for target in targets:
        if not any(_matches(name, target) for name in names):
            ends = sorted({name.split(".", 2)[2] for name in names})  # without "blocks.N."
            nearest = did_you_mean(target, ends + [end.rpartition(".")[2] for end in ends])
            hint = nearest or f"; the layers are {', '.join(ends)}"
            raise UserError(f"train.adapter.targets: '{target}' matches no linear layer or cell{hint}")
    return [name for name in names if not targets or any(_matches(name, target) for target in targets)]


def attach(model: nn.Module, names: Collection[str], rank: int, alpha: float) -> None:
    """Attach new adapters to the layers of these names, on their devices and in their types."""
    layers = adaptable(model)
    for name in names:
        layer = layers[name]
        new = LoRALinear(layer, rank, alpha) if isinstance(layer, nn.Linear) else LoRACell(layer, rank, alpha)
        model.set_submodule(name, new)


def attach_configured(model: nn.Module, train: TrainConfig) -> None:
    """Attach a new adapter to the model if `train.trainable` is "adapters"; raises the errors of `select`."""
    if train.trainable == "adapters":
        attach(model, select(model, train.adapter.targets), train.adapter.rank, train.adapter.alpha)


def blank_copy(model: "RMKV") -> "RMKV":
    """Return a model of the same shape, with the same adapters, on the meta device."""
    with torch.device("meta"):
        copy = type(model)(model.config)
    for name, layer in adapted(model):
        attach(copy, [name], layer.rank, layer.alpha)
    return copy


def merged(model: "RMKV") -> "RMKV":
    """Return the model with its adapter merged into the weights. Weights that the adapter leaves alone are shared."""
    weights = {name: x.detach() for name, x in model.state_dict().items() if ADAPTER_MARK not in name}
    with torch.no_grad():
        for name, layer in adapted(model):
            weights |= {f"{name}.{key}": x for key, x in layer.merged_weights().items()}
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(weights, assign=True)
    return plain.train(model.training)


def _matches(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")
