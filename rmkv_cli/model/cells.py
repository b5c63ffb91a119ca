"""The recurrent cells that update each memory slot."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.precision import wide


class MinimalRNNCell(nn.Module):
    """The weights of `minimal_cell`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * size, 2 * size)


def minimal_cell(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return h' = sigmoid(g) h + (1 - sigmoid(g)) SigLU(c) (N, D), where (g, c) = W [h; x] + b, for x and h (N, D)
    (MinimalRNN: Chen, 2017)."""
    gate, candidate = F.linear(torch.cat([hidden, x], dim=-1), weight, bias).chunk(2, dim=-1)
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
        weights = [wide(weight) for weight in self.cell.parameters()]
        if self.kind == "lstm":
            assert cell is not None
            h, c = torch.lstm_cell(x, [flat, cell.flatten(0, 1)], *weights)
            return h.view_as(hidden), c.view_as(hidden)
        h = torch.gru_cell(x, flat, *weights) if self.kind == "gru" else minimal_cell(x, flat, *weights)
        return h.view_as(hidden), None
