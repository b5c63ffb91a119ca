"""The recurrent cells that update each memory slot."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig


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
        self.kind = config.memory.cell
        self.cell: nn.GRUCell | nn.LSTMCell | MinimalRNNCell
        keep = torch.empty(D).uniform_(1, config.memory.horizon).log()
        if self.kind == "gru":  # torch's order: reset, keep, candidate
            self.cell = nn.GRUCell(D, D)
            self._start_gate(1, keep)
        elif self.kind == "lstm":  # torch's order: input, forget (which keeps), candidate, output
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
        x, flat = x.flatten(0, 1).to(hidden.dtype), hidden.flatten(0, 1)
        if self.kind == "lstm":
            assert cell is not None
            h, c = self.cell(x, (flat, cell.flatten(0, 1)))
            return h.view_as(hidden), c.view_as(hidden)
        return self.cell(x, flat).view_as(hidden), None
