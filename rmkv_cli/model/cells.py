"""Recurrent cells that update the memory slots."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.precision import widen
from rmkv_cli.model.quantized import QuantizedCell


class MinimalRNNCell(nn.Module):
    """h' = sigmoid(g) h + (1 - sigmoid(g)) SigLU(c), where (g, c) = W [h; x] + b (MinimalRNN: Chen, 2017)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * size, 2 * size)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Return h', (N, D), for x and h, both (N, D)."""
        gate, candidate = self.linear(torch.cat([hidden, x], dim=-1)).chunk(2, dim=-1)
        return torch.lerp(F.silu(candidate), hidden, torch.sigmoid(gate))


class RecurrentMemoryCell(nn.Module):
    """M' = cell(input, hidden) for each slot by itself: GRU, LSTM (which also carries a cell state) or MinimalRNN.

    Keep-gate biases start as log(Uniform(1, horizon)), so that channels forget over 1 to about `horizon` segments
    ("chrono" initialisation: Tallec & Ollivier, 2018).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.hidden_size
        kind = config.memory.cell
        self.cell: nn.GRUCell | nn.LSTMCell | QuantizedCell | MinimalRNNCell
        keep = torch.empty(D).uniform_(1, config.memory.horizon).log()
        if kind == "gru":  # torch's order: reset, keep, candidate
            self.cell = nn.GRUCell(D, D)
            self._start_gate(1, keep)
        elif kind == "lstm":  # torch's order: input, forget (which keeps), candidate, output
            self.cell = nn.LSTMCell(D, D)
            self._start_gate(1, keep)
            self._start_gate(0, -keep)
        else:
            self.cell = MinimalRNNCell(D)
            nn.init.zeros_(self.cell.linear.bias)
            self.cell.linear.bias.data[:D] = keep

    @torch.no_grad()
    def _start_gate(self, index: int, bias: Tensor) -> None:
        """Set the bias, (D,), of gate number `index` of torch's cell, which adds two biases: the other becomes 0."""
        assert isinstance(self.cell, nn.GRUCell | nn.LSTMCell)
        gate = slice(index * len(bias), (index + 1) * len(bias))
        self.cell.bias_ih[gate] = bias
        self.cell.bias_hh[gate] = 0

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return M' and an LSTM's new cell state, else None, for input and hidden state; all are (B, m, D).

        The hidden state and the results are float32 at least: a keep gate near 1 makes changes that bfloat16 cannot
        resolve.
        """
        x, h = x.flatten(0, 1).to(hidden.dtype), hidden.flatten(0, 1)
        state = h if cell is None else (h, cell.flatten(0, 1))
        if next(self.cell.parameters()).dtype == hidden.dtype:
            new = self.cell(x, state)
        else:  # transformers' model.to(dtype) also converts these weights
            weights = {name: widen(weight) for name, weight in self.cell.named_parameters()}
            new = functional_call(self.cell, weights, (x, state))
        if isinstance(new, Tensor):
            return new.view_as(hidden), None
        return new[0].view_as(hidden), new[1].view_as(hidden)


def matrices(cell: nn.GRUCell | nn.LSTMCell | QuantizedCell) -> tuple[Tensor, Tensor]:
    """Return a PyTorch cell's matrices for x and for h, (gates * D, D), in floating point."""
    return cell.matrices(cell.bias_ih.dtype) if isinstance(cell, QuantizedCell) else (cell.weight_ih, cell.weight_hh)
