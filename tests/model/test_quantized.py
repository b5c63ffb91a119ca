"""Quantized models: what is stored, what is computed with it, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_model import with_adapter

from rmkv_cli.config import MemoryConfig, ModelConfig, QuantizationConfig
from rmkv_cli.errors import UserError
from rmkv_cli.generation import Decoder
from rmkv_cli.model import RMKV
from rmkv_cli.model.quantize import quantize
from rmkv_cli.model.quantized import MAX_KERNEL_ROWS, Quantized, QuantizedLinear

WAYS = [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 64}, {"bits": 8, "keep": ["embedding"]}]
SHAPE = {"vocab_size": 70, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}


def small(seed=0):
    """A small model as it begins: random, but no rounding grows in it."""
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 2, "segment_length": 5, "lookback": 2, "memory": MemoryConfig(slots=3)}
    return RMKV(ModelConfig(**SHAPE | shape)).eval().requires_grad_(False)


def quantized(way):
    model = small()
    quantize(model, QuantizationConfig(**way))
    return model


def by_hand(stored, name, bits):
    """The matrix of this name in a file's tensors, number by number."""
    weight, scale = stored[f"{name}.weight"].numpy(), stored[f"{name}.scale"].double().numpy()
    if bits == 8:
        return weight * scale
    zero = stored[f"{name}.zero"].double().numpy()
    matrix = np.zeros((len(weight), 2 * weight.shape[1]))
    for i, row in enumerate(weight):
        for j, byte in enumerate(row):
            for half, integer in enumerate((int(byte) % 16 - 8, int(byte) // 16 - 8)):
                column = 2 * j + half
                group = column * scale.shape[1] // matrix.shape[1]
                matrix[i, column] = integer * scale[i, group] + zero[i, group]
    return matrix


@pytest.mark.parametrize("way", WAYS[:3], ids=str)
def test_the_file_holds_integers_and_scales_as_documented(way, tmp_path):
    plain, model = small(), quantized(way)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layer, before = model.blocks[1].feed_forward.down, plain.blocks[1].feed_forward.down.weight
    matrix = by_hand(stored, "blocks.1.feed_forward.down", way["bits"])
    np.testing.assert_allclose(layer.dequantized(torch.float64), matrix, rtol=1e-12)
    error = np.linalg.norm(matrix - before.numpy()) / np.linalg.norm(before.numpy())
    assert error < (0.01 if way["bits"] == 8 else 0.15)
    assert stored["memory"].dtype == torch.float32
    assert stored["blocks.0.cell.cell.bias_ih"].dtype == torch.float32


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_saved_and_loaded_it_is_the_same_bit_for_bit(way, tmp_path):
    model = quantized(way)
    ids = torch.randint(70, (2, 23))
    model.save_pretrained(tmp_path)
    loaded = RMKV.from_pretrained(tmp_path)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
    torch.testing.assert_close(loaded(ids)[0], model(ids)[0], atol=1e-5, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_file_is_not_mapped_and_its_integers_are_aligned(bits, tmp_path):
    quantized({"bits": bits}).save_pretrained(tmp_path)
    model = RMKV.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert all(layer.weight.data_ptr() % 64 == 0 for layer in model.modules() if isinstance(layer, Quantized))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (192, 32), (64, 256), (65, 96), (8, 160)])
def test_kernels_compute_what_the_dequantized_matrix_does(bits, rows, columns):
    layer = torch.nn.Linear(columns, rows)
    how = QuantizationConfig(bits=bits)
    integers = QuantizedLinear(layer, how)
    integers.quantize(layer.weight)
    expected = integers.dequantized(torch.float32)
    chosen = torch.tensor([0, rows - 1, rows // 2])
    integers.prepare()
    assert torch.equal(integers.dequantized(torch.float32), expected)
    assert torch.equal(integers.dequantized(torch.float32, chosen), expected[chosen])
    for count in (1, 3, MAX_KERNEL_ROWS, MAX_KERNEL_ROWS + 1, 40):
        x = torch.randn(count, columns, dtype=torch.bfloat16)
        y = integers(x).float()
        torch.testing.assert_close(y, x.float() @ expected.T + layer.bias.float(), atol=0.02, rtol=0.02)


def test_every_integer_of_8_bits_survives_the_order_of_the_kernel():
    layer = QuantizedLinear(torch.nn.Linear(32, 64, bias=False), QuantizationConfig(bits=8))
    integers = torch.arange(64 * 32).view(64, 32).to(torch.int8)
    layer.weight, layer.scale = integers.clone(), torch.rand(64, 1).bfloat16()
    layer.prepare()
    assert torch.equal(layer.all_integers(), integers)
    rows = torch.tensor([[40], [3]])
    assert torch.equal(layer.integers(rows), integers[rows])
    assert torch.equal(layer.state_dict()["weight"], integers)
    expected = torch.eye(32).double() @ (integers * layer.scale.double()).T
    torch.testing.assert_close(layer(torch.eye(32).bfloat16()[:16]).double(), expected[:16], atol=0, rtol=2**-8)


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_decoding_in_bfloat16_is_the_model_s_forward_pass(way, tmp_path):
    quantized(way).save_pretrained(tmp_path)
    model = RMKV.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.randint(70, (1, 19))
    decoder = Decoder(model)
    decoder.add(model.initial_state(1))
    steps = torch.stack([decoder.step(ids[:, i]) for i in range(19)], dim=1)
    whole = model(ids)[0].float()
    assert (steps - whole).abs().max() < 0.05 * whole.abs().max()
    exact = RMKV.from_pretrained(tmp_path, dtype=torch.float32)(ids)[0]
    assert (whole - exact).abs().max() < 0.05 * exact.abs().max()


def test_4_bits_have_less_error_than_rounding_to_the_range_of_each_group():
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 32, bias=False)
    torch.nn.init.normal_(layer.weight)
    found = QuantizedLinear(layer, QuantizationConfig(bits=4))
    found.quantize(layer.weight)
    grouped = layer.weight.detach().view(32, -1, 32)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    plain = ((grouped - low) / (high - low) * 15).round() / 15 * (high - low) + low
    least = (plain - grouped).square().sum()
    assert (found.dequantized(torch.float32) - layer.weight).square().sum() < 0.95 * least


def test_4_bits_hold_a_matrix_of_4_bits_exactly():
    """As of a model that was quantized before: 16 evenly spaced values in each group."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, bias=False)
    values = torch.randint(16, (32, 2, 32))
    values[..., 0], values[..., 1] = 0, 15
    layer.weight.data = ((values - 8) * 0.25 + 0.5).float().flatten(1)
    found = QuantizedLinear(layer, QuantizationConfig(bits=4))
    found.quantize(layer.weight)
    assert torch.equal(found.dequantized(torch.float32), layer.weight)


def test_kept_layers_and_stores_stay_and_other_layers_are_quantized():
    model = quantized({"bits": 8, "keep": ["embedding", "blocks.0.attention.out"]})
    kept = {name for name, layer in model.named_modules() if not isinstance(layer, Quantized)}
    assert {"embedding", "blocks.0.attention.out", "blocks.0.pooling", "blocks.0.store.gates"} <= kept
    assert isinstance(model.blocks[1].attention.out, Quantized)
    assert isinstance(model.blocks[0].attention.qkv, Quantized)
    assert not [name for name, p in model.named_parameters() if p.dtype not in (torch.float32,)]


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (
            {"bits": 8, "keep": ["embeding"]},
            "--keep: 'embeding' is not a layer that can be quantized; did you mean 'embedding'?",
        ),
        (
            {"bits": 4, "group_size": 128},
            "--group-size 128 does not divide the 64 columns of 'blocks.0.attention.qkv'; choose another, or leave",
        ),
    ],
)
def test_bad_input_is_reported(way, says):
    with pytest.raises(UserError, match=says.split("?")[0].replace("(", r"\(")):
        quantized(way)


def test_it_is_not_quantized_twice_nor_with_an_adapter():
    with pytest.raises(UserError, match="already quantized"):
        quantize(quantized({"bits": 8}), QuantizationConfig())
    with pytest.raises(UserError, match="rmkv merge"):
        quantize(with_adapter(small()), QuantizationConfig())


def test_a_truncated_or_foreign_file_is_one_line(tmp_path):
    quantized({"bits": 4}).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or missing weights"):
        RMKV.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path / "plain")
    file.write_bytes((tmp_path / "plain" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"does not fit config\.json"):
        RMKV.from_pretrained(tmp_path)
