"""Matrices as integers: 8 bits with a scale per row, or 4 bits with a scale per group of a row's weights."""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import QuantizationConfig

FEW = 16
"""Most rows of activations for which PyTorch's integer kernels are faster than products with bfloat16 weights."""
BLOCK, HALF = 64, 32  # rows that the 4-bit kernel packs together on AVX-512, and those in the low halves of its bytes
GROUPS = (256, 128, 64, 32)  # weights that may share a scale in the 4-bit kernel
ROWS = 256  # of a matrix that are quantized at a time, so that little memory is needed beyond the model's
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a group's range that 4 bits are tried on; weights beyond are clipped."""


class Quantized(nn.Module):
    """A matrix W (rows, columns) ≈ integers * scale in 8 bits, integers * scale + zero in 4 bits.

    Buffers are `weight`, int8 (rows, columns) or, for 4 bits, uint8 (rows, columns / 2); `scale`, bfloat16 (rows,
    groups), of one group in 8 bits; for 4 bits also `zero`, of the same shape. A byte holds two integers, each plus 8,
    the first one in the low half.
    """

    def __init__(self, rows: int, columns: int, how: QuantizationConfig) -> None:
        super().__init__()
        self.rows, self.columns, self.bits = rows, columns, how.bits
        self.groups = 1 if how.bits == 8 else columns // how.group_size
        kind, width = (torch.int8, columns) if how.bits == 8 else (torch.uint8, columns // 2)
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", torch.zeros(rows, width, dtype=kind))
        self.zero: Tensor | None
        self.register_buffer("scale", torch.zeros(rows, self.groups, dtype=torch.bfloat16))
        self.register_buffer("zero", torch.zeros_like(self.scale) if how.bits == 4 else None)
        self._kernel: Tensor | None = None  # scales and zeros for the 4-bit kernel; `weight` is then in its order

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, (..., rows), for x (..., columns)."""
        flat = x.reshape(-1, self.columns).contiguous()
        fast = x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(flat) <= FEW
        if fast and self._kernel is not None:
            if self.bits == 8:
                flat = torch.cat([flat, flat], dim=1)
            group = flat.shape[1] // len(self._kernel)
            weight = self.weight.view(torch.uint8)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weight, group, self._kernel)
        elif fast and self.bits == 8 and self.columns % 32 == 0:
            y = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale[:, 0])
        else:
            return F.linear(x, self.dequantized(x.dtype))
        return y.view(*x.shape[:-1], self.rows)

    def integers(self, rows: Tensor) -> Tensor:
        """Return the integers of these rows (...,), (..., columns)."""
        if self._kernel is not None:
            packed = self._blocks()[rows // BLOCK, :, rows % HALF]
            return self._joined(torch.where((rows % BLOCK >= HALF)[..., None], packed >> 4, packed & 15))
        if self.bits == 8:
            return self.weight[rows]
        packed = self.weight[rows]
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8) - 8

    def all_integers(self) -> Tensor:
        """Return the integers of all rows, (rows, columns)."""
        if self._kernel is not None:
            packed = self._blocks()
            return self._joined(torch.cat([packed & 15, packed >> 4], dim=2).mT.reshape(self.rows, -1))
        if self.bits == 8:
            return self.weight
        return self.integers(torch.arange(self.rows, device=self.weight.device))

    def _blocks(self) -> Tensor:
        """Return the weights in the 4-bit kernel's order, (blocks, columns, HALF), of 8 bits twice the columns."""
        return self.weight.view(torch.uint8).view(self.rows // BLOCK, -1, HALF)

    def _joined(self, halves: Tensor) -> Tensor:
        """Return integers (..., columns) from those of 4 bits in the kernel, each plus 8."""
        if self.bits == 4:
            return halves.to(torch.int8) - 8
        high, low = halves.chunk(2, dim=-1)
        return (high << 4 | low).bitwise_xor_(128).view(torch.int8)

    def dequantized(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Return W, (rows, columns), or these of its rows, (..., columns), in a floating-point type."""
        integers = self.all_integers() if rows is None else self.integers(rows)
        grouped = integers.unflatten(-1, (self.groups, -1)).to(dtype)
        grouped.mul_((self.scale if rows is None else self.scale[rows]).to(dtype)[..., None])
        if self.zero is not None:
            grouped.add_((self.zero if rows is None else self.zero[rows]).to(dtype)[..., None])
        return grouped.flatten(-2)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> None:
        """Take the integers nearest to a matrix (rows, columns), with the scales of least squared error."""
        if self.bits == 8:
            parts = [_nearest8(rows.float()) for rows in weight.split(ROWS)]
            self.weight, self.scale = map(torch.cat, zip(*parts, strict=True))
        else:
            grouped = [_nearest4(rows.float(), self.groups) for rows in weight.split(ROWS)]
            self.weight, self.scale, self.zero = map(torch.cat, zip(*grouped, strict=True))

    def prepare(self) -> None:
        """Arrange weights for PyTorch's 4-bit kernel on the CPU.

        An integer of 8 bits is 16 h + l, with h and l of 4 bits. The kernel multiplies [h l] by [x x] with the scales
        16 s and s, which is exact and, for up to 4 rows of x, faster than PyTorch's 8-bit kernel: for one row it takes
        a fifth to a third less time. Where a machine's kernel has another order than AVX-512's, weights keep theirs.
        """
        unfit = self.rows % BLOCK or self.columns % GROUPS[-1]
        if unfit or self._kernel is not None or not _kernel_order_known():
            return
        for rows in torch.arange(self.rows).split(BLOCK):  # in place: a block takes the same bytes in both orders
            integers = self.integers(rows).int()
            halves = integers + 8 if self.bits == 4 else torch.cat([(integers >> 4) + 8, integers & 15], dim=1)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(halves, 1)
            self.weight[rows[0] : rows[-1] + 1] = packed.view(BLOCK, -1).view(self.weight.dtype)
        if self.zero is None:
            group = next(group for group in GROUPS if self.columns % group == 0)
            scale = self.scale.expand(-1, self.columns // group)
            pairs = (16 * scale, torch.zeros_like(scale)), (scale, 8 * scale)
            self._kernel = torch.cat([torch.stack(pair, dim=-1) for pair in pairs], dim=1).transpose(0, 1).contiguous()
        else:
            self._kernel = torch.stack([self.scale, self.zero], dim=-1).transpose(0, 1).contiguous()
            self.scale, self.zero = self._kernel.transpose(0, 1).unbind(-1)  # not second copies

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._kernel is not None:
            integers = self.all_integers()
            destination[f"{prefix}weight"] = integers if self.bits == 8 else _packed(integers)


class QuantizedLinear(Quantized):
    """A linear layer of integers."""

    def __init__(self, layer: nn.Linear, how: QuantizationConfig) -> None:
        super().__init__(layer.out_features, layer.in_features, how)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., rows), for x (..., columns)."""
        y = super().forward(x)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(Quantized):
    """Embeddings of integers; as a layer it is the head."""

    def __init__(self, layer: nn.Embedding, how: QuantizationConfig) -> None:
        super().__init__(layer.num_embeddings, layer.embedding_dim, how)


class QuantizedCell(nn.Module):
    """A GRU or LSTM cell whose two matrices are integers; it computes with their floating-point values."""

    def __init__(self, cell: nn.GRUCell | nn.LSTMCell, how: QuantizationConfig) -> None:
        super().__init__()
        self.hidden_size = cell.hidden_size
        rows, columns = cell.weight_ih.shape  # those of the other matrix as well
        self.weight_ih, self.weight_hh = Quantized(rows, columns, how), Quantized(rows, columns, how)
        self.bias_ih, self.bias_hh = cell.bias_ih, cell.bias_hh

    def forward(self, x: Tensor, hidden: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Return what PyTorch's cell does: h' (N, D), and of an LSTM (h', c')."""
        weights = (*self.matrices(x.dtype), self.bias_ih, self.bias_hh)
        if isinstance(hidden, Tensor):
            return torch.gru_cell(x, hidden, *weights)
        return torch.lstm_cell(x, hidden, *weights)

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the matrices for x and h in a floating-point type."""
        return self.weight_ih.dequantized(dtype), self.weight_hh.dequantized(dtype)


HEADS = ("embedding", "unembedding")
INSIDE = (".attention.", ".feed_forward.", ".cell.")
Layer = nn.Linear | nn.Embedding | nn.GRUCell | nn.LSTMCell
"""A layer that can be quantized."""


def replacement(
    name: str, layer: Layer, how: QuantizationConfig
) -> QuantizedLinear | QuantizedEmbedding | QuantizedCell:
    """Return the quantized layer that takes a layer's place, with integers of 0.

    Embeddings and head have 8 bits in any case.
    """
    if name in HEADS:
        how = how.model_copy(update={"bits": 8})
    match layer:
        case nn.Linear():
            return QuantizedLinear(layer, how)
        case nn.Embedding():
            return QuantizedEmbedding(layer, how)
    return QuantizedCell(layer, how)


def put_in(model: nn.Module, how: QuantizationConfig) -> None:
    """Replace the layers of a model that are quantized, without their weights."""
    for name, layer in quantizable(model, how.keep).items():
        model.set_submodule(name, replacement(name, layer, how).to(next(layer.parameters()).device))


def quantizable(model: nn.Module, keep: Sequence[str] = ()) -> dict[str, Layer]:
    """Return the layers that are quantized, by name: attention, feed-forward, cells, embeddings and head.

    `keep` names layers that are not, by whole names or their ends.
    """
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Layer)
        and (name in HEADS or any(part in name for part in INSIDE))
        and not any(f".{name}".endswith(f".{kept}") for kept in keep)
    }


def prepare(model: nn.Module) -> None:
    """Prepare all quantized layers of a model on the CPU for decoding; cells compute with dequantized weights."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding) and layer.weight.device.type == "cpu":
            layer.prepare()


def _nearest8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers and the scales of rows of a matrix in 8 bits."""
    scale = (weight.abs().amax(-1, keepdim=True) / 127).bfloat16()
    return _rounded(weight, scale.float(), 8), scale


def _nearest4(weight: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the packed integers, the scales and the zeros of rows of a matrix in 4 bits."""
    grouped = weight.unflatten(1, (groups, -1))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    scale, zero, least = high, low, torch.full_like(low, torch.inf)
    for share in SHARES:
        step = (share * (high - low) / 15).bfloat16().float()
        offset = ((low + high + step) / 2).bfloat16().float()
        error = (grouped - offset - _rounded(grouped - offset, step, 4) * step).square().sum(-1, keepdim=True)
        better, least = error < least, torch.minimum(error, least)
        scale, zero = torch.where(better, step, scale), torch.where(better, offset, zero)
    integers = _rounded(grouped - zero, scale, 4).flatten(1)
    return _packed(integers), scale[..., 0].bfloat16(), zero[..., 0].bfloat16()


def _rounded(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return x / scale as integers of so many bits."""
    half = 1 << bits - 1
    return (x / torch.where(scale == 0, 1, scale)).round_().clamp_(-half, half - 1).to(torch.int8)


def _packed(integers: Tensor) -> Tensor:
    low, high = (integers + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


@cache
def _kernel_order_known() -> bool:
    """Return whether the kernel packs a byte's halves from the rows i and i + 32 of a block, column by column."""
    integers = torch.arange(BLOCK * 32, dtype=torch.int32).view(BLOCK, 32) * 7 % 16
    found = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1).view(32, HALF)
    return torch.equal(torch.cat([found & 15, found >> 4], dim=1).mT.int(), integers)
