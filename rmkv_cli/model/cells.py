"""The recurrent cells that update each memory slot."""

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
        """Return h' (N, D) for x and h (N, D)."""
        gate, candidate = self.linear(torch.cat([hidden, x], dim=-1)).chunk(2, dim=-1)
        return torch.lerp(F.silu(candidate), hidden, torch.sigmoid(gate))


class RecurrentMemoryCell(nn.Module):
    """M' = cell(input, hidden), each slot on its own: GRU, LSTM (which carries a cell state as well) or MinimalRNN.

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
        """Give gate number `index` of torch's cell this bias (D,); its two biases are added, so one becomes zero."""
        assert isinstance(self.cell, nn.GRUCell | nn.LSTMCell)
        gate = slice(index * len(bias), (index + 1) * len(bias))
        self.cell.bias_ih[gate] = bias
        self.cell.bias_hh[gate] = 0

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return M' (B, m, D) and the LSTM's cell state (B, m, D), else None, for input and hidden (B, m, D).

        Hidden and the results are float32 at least, because a keep gate near 1 adds less than bfloat16 resolves.
        """
        x, h = x.flatten(0, 1).to(hidden.dtype), hidden.flatten(0, 1)
        state = h if cell is None else (h, cell.flatten(0, 1))
        if next(self.cell.parameters()).dtype == hidden.dtype:
            new = self.cell(x, state)
        else:  # transformers' model.to(dtype) narrows these weights as well
            weights = {name: widen(weight) for name, weight in self.cell.named_parameters()}
            new = functional_call(self.cell, weights, (x, state))
        if isinstance(new, Tensor):
            return new.view_as(hidden), None
        return new[0].view_as(hidden), new[1].view_as(hidden)


def matrices(cell: nn.GRUCell | nn.LSTMCell | QuantizedCell) -> tuple[Tensor, Tensor]:
    """Return the matrices for x and h of PyTorch's cells, in floating point."""
    return cell.matrices(cell.bias_ih.dtype) if isinstance(cell, QuantizedCell) else (cell.weight_ih, cell.weight_hh)
