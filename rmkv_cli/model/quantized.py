"""Integer matrices: 8 bits with a scale per row, or 4 bits with a scale and a zero per group of a row's weights."""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import QuantizationConfig

MAX_KERNEL_ROWS = 16
"""Largest number of activation rows for which PyTorch's integer kernels beat products with bfloat16 weights."""
PACKED_ROWS = 64  # rows that the 4-bit kernel packs together on AVX-512
HALF_ROWS = 32  # the first of them, in the low halves of its bytes
KERNEL_GROUP_SIZES = (256, 128, 64, 32)  # weights that can share a scale in the 4-bit kernel
ROWS_AT_ONCE = 256  # rows quantized at a time, to bound the memory beyond the model's own
RANGE_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Fractions of a group's range tried for 4 bits; weights outside the range are clipped."""


class Quantized(nn.Module):
    """A matrix W, (rows, columns): integers * scale in 8 bits, integers * scale + zero in 4 bits.

    The buffers are `weight`, int8 (rows, columns) or, for 4 bits, uint8 (rows, columns / 2); `scale`, bfloat16 (rows,
    groups), with one group in 8 bits; and for 4 bits `zero`, with the shape of `scale`. For 4 bits each byte packs two
    integers, each plus 8, the first one in the low half.
    """

    def __init__(self, rows: int, columns: int, config: QuantizationConfig) -> None:
        super().__init__()
        self.rows, self.columns, self.bits = rows, columns, config.bits
        self.groups = 1 if config.bits == 8 else columns // config.group_size
        kind, width = (torch.int8, columns) if config.bits == 8 else (torch.uint8, columns // 2)
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", torch.zeros(rows, width, dtype=kind))
        self.zero: Tensor | None
        self.register_buffer("scale", torch.zeros(rows, self.groups, dtype=torch.bfloat16))
        self.register_buffer("zero", torch.zeros_like(self.scale) if config.bits == 4 else None)
        self._kernel: Tensor | None = None  # scales and zeros for the 4-bit kernel; if set, `weight` has its layout

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, (..., rows), for x, (..., columns)."""
        flat = x.reshape(-1, self.columns).contiguous()
        fast = x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(flat) <= MAX_KERNEL_ROWS
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
        """Return the integers, (..., columns), of the given rows, (...,)."""
        if self._kernel is not None:
            packed = self._blocks()[rows // PACKED_ROWS, :, rows % HALF_ROWS]
            return self._joined(torch.where((rows % PACKED_ROWS >= HALF_ROWS)[..., None], packed >> 4, packed & 15))
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
        """Return the weights in the 4-bit kernel's layout, (blocks, columns, 32); 8 bits take twice the columns."""
        return self.weight.view(torch.uint8).view(self.rows // PACKED_ROWS, -1, HALF_ROWS)

    def _joined(self, halves: Tensor) -> Tensor:
        """Return integers, (..., columns), from the kernel's 4-bit integers, which are stored plus 8."""
        if self.bits == 4:
            return halves.to(torch.int8) - 8
        high, low = halves.chunk(2, dim=-1)
        return (high << 4 | low).bitwise_xor_(128).view(torch.int8)

    def dequantized(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Return W, (rows, columns), or the given rows of it, (..., columns), in a floating-point type."""
        integers = self.all_integers() if rows is None else self.integers(rows)
        grouped = integers.unflatten(-1, (self.groups, -1)).to(dtype)
        grouped.mul_((self.scale if rows is None else self.scale[rows]).to(dtype)[..., None])
        if self.zero is not None:
            grouped.add_((self.zero if rows is None else self.zero[rows]).to(dtype)[..., None])
        return grouped.flatten(-2)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> None:
        """Set the integers and scales that approximate a matrix, (rows, columns), with the least squared error."""
        if self.bits == 8:
            parts = [_nearest8(rows.float()) for rows in weight.split(ROWS_AT_ONCE)]
            self.weight, self.scale = map(torch.cat, zip(*parts, strict=True))
        else:
            grouped = [_nearest4(rows.float(), self.groups) for rows in weight.split(ROWS_AT_ONCE)]
            self.weight, self.scale, self.zero = map(torch.cat, zip(*grouped, strict=True))

    def prepare(self) -> None:
        """Convert the weights to the layout of PyTorch's 4-bit kernel on the CPU.

        An 8-bit integer is 16 h + l, with h and l of 4 bits. The kernel multiplies [h l] by [x x] with the scales 16 s
        and s. This is exact and, for up to 4 rows of x, faster than PyTorch's 8-bit kernel: it saves a fifth to a third
        of the time for one row. If this machine's kernel does not have AVX-512's layout, weights stay as they are.
        """
        unfit = self.rows % PACKED_ROWS or self.columns % KERNEL_GROUP_SIZES[-1]
        if unfit or self._kernel is not None or not _kernel_order_known():
            return
        for rows in torch.arange(self.rows).split(PACKED_ROWS):  # in place: a block has equal bytes in both layouts
            integers = self.integers(rows).int()
            halves = integers + 8 if self.bits == 4 else torch.cat([(integers >> 4) + 8, integers & 15], dim=1)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(halves, 1)
            self.weight[rows[0] : rows[-1] + 1] = packed.view(PACKED_ROWS, -1).view(self.weight.dtype)
        if self.zero is None:
            group = next(group for group in KERNEL_GROUP_SIZES if self.columns % group == 0)
            scale = self.scale.expand(-1, self.columns // group)
            pairs = (16 * scale, torch.zeros_like(scale)), (scale, 8 * scale)
            self._kernel = torch.cat([torch.stack(pair, dim=-1) for pair in pairs], dim=1).transpose(0, 1).contiguous()
        else:
            self._kernel = torch.stack([self.scale, self.zero], dim=-1).transpose(0, 1).contiguous()
            self.scale, self.zero = self._kernel.transpose(0, 1).unbind(-1)  # views, to avoid second copies

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._kernel is not None:
            integers = self.all_integers()
            destination[f"{prefix}weight"] = integers if self.bits == 8 else _pack(integers)


class QuantizedLinear(Quantized):
    """A linear layer with an integer matrix."""

    def __init__(self, layer: nn.Linear, config: QuantizationConfig) -> None:
        super().__init__(layer.out_features, layer.in_features, config)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., rows), for x, (..., columns)."""
        y = super().forward(x)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(Quantized):
    """An integer embedding table. Its `forward` is the head's product; `dequantized` looks up embeddings."""

    def __init__(self, layer: nn.Embedding, config: QuantizationConfig) -> None:
        super().__init__(layer.num_embeddings, layer.embedding_dim, config)


class QuantizedCell(nn.Module):
    """A GRU or LSTM cell whose two matrices are integers; it computes with their floating-point values."""

    def __init__(self, cell: nn.GRUCell | nn.LSTMCell, config: QuantizationConfig) -> None:
        super().__init__()
        self.hidden_size = cell.hidden_size
        rows, columns = cell.weight_ih.shape  # the other matrix has the same shape
        self.weight_ih, self.weight_hh = Quantized(rows, columns, config), Quantized(rows, columns, config)
        self.bias_ih, self.bias_hh = cell.bias_ih, cell.bias_hh

    def forward(self, x: Tensor, hidden: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Return what PyTorch's cell returns: h', (N, D), or for an LSTM (h', c')."""
        weights = (*self.matrices(x.dtype), self.bias_ih, self.bias_hh)
        if isinstance(hidden, Tensor):
            return torch.gru_cell(x, hidden, *weights)
        return torch.lstm_cell(x, hidden, *weights)

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the matrices for x and for h, (gates * D, D), in a floating-point type."""
        return self.weight_ih.dequantized(dtype), self.weight_hh.dequantized(dtype)


HEADS = ("embedding", "unembedding")
QUANTIZED_PARTS = (".attention.", ".feed_forward.", ".cell.")
QuantizableLayer = nn.Linear | nn.Embedding | nn.GRUCell | nn.LSTMCell
"""A layer that can be quantized."""


def make_quantized(
    name: str, layer: QuantizableLayer, config: QuantizationConfig
) -> QuantizedLinear | QuantizedEmbedding | QuantizedCell:
    """Return a quantized layer, with all integers 0, to replace the layer of this name.

    Embeddings and head always have 8 bits.
    """
    if name in HEADS:
        config = config.model_copy(update={"bits": 8})
    match layer:
        case nn.Linear():
            return QuantizedLinear(layer, config)
        case nn.Embedding():
            return QuantizedEmbedding(layer, config)
    return QuantizedCell(layer, config)


def insert_quantized(model: nn.Module, config: QuantizationConfig) -> None:
    """Replace a model's quantizable layers by quantized ones with all integers 0."""
    for name, layer in quantizable(model, config.keep).items():
        model.set_submodule(name, make_quantized(name, layer, config).to(next(layer.parameters()).device))


def quantizable(model: nn.Module, keep: Sequence[str] = ()) -> dict[str, QuantizableLayer]:
    """Return the layers to quantize, by name: attention, feed-forward, cells, embeddings and head.

    Args:
        model: the model.
        keep: layers not to quantize, by name or by the end of a name.
    """
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizableLayer)
        and (name in HEADS or any(part in name for part in QUANTIZED_PARTS))
        and not any(f".{name}".endswith(f".{kept}") for kept in keep)
    }


def prepare(model: nn.Module) -> None:
    """Prepare a model's quantized layers on the CPU for decoding, except cells, which compute with floats."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding) and layer.weight.device.type == "cpu":
            layer.prepare()


def _nearest8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8-bit integers, (rows, columns), and the scales, (rows, 1), of rows of a matrix."""
    scale = (weight.abs().amax(-1, keepdim=True) / 127).bfloat16()
    return _round(weight, scale.float(), 8), scale


def _nearest4(weight: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the packed 4-bit integers, (rows, columns / 2), scales and zeros, (rows, groups), of rows of a matrix."""
    grouped = weight.unflatten(1, (groups, -1))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    scale, zero, least = high, low, torch.full_like(low, torch.inf)
    for share in RANGE_SHARES:
        step = (share * (high - low) / 15).bfloat16().float()
        offset = ((low + high + step) / 2).bfloat16().float()
        error = (grouped - offset - _round(grouped - offset, step, 4) * step).square().sum(-1, keepdim=True)
        better, least = error < least, torch.minimum(error, least)
        scale, zero = torch.where(better, step, scale), torch.where(better, offset, zero)
    integers = _round(grouped - zero, scale, 4).flatten(1)
    return _pack(integers), scale[..., 0].bfloat16(), zero[..., 0].bfloat16()


def _round(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return x / scale rounded to integers of `bits` bits."""
    half = 1 << bits - 1
    return (x / torch.where(scale == 0, 1, scale)).round_().clamp_(-half, half - 1).to(torch.int8)


def _pack(integers: Tensor) -> Tensor:
    """Return 4-bit integers, (..., columns), as bytes, (..., columns / 2)."""
    low, high = (integers + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


@cache
def _kernel_order_known() -> bool:
    """Return whether this machine's kernel packs the rows i and i + 32 of a block into each byte, column by column."""
    integers = torch.arange(PACKED_ROWS * 32, dtype=torch.int32).view(PACKED_ROWS, 32) * 7 % 16
    found = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1).view(32, HALF_ROWS)
    return torch.equal(torch.cat([found & 15, found >> 4], dim=1).mT.int(), integers)
