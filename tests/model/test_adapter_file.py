"""Adapter folders are loaded as they were saved, and a wrong one is a one-line error."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import make_model, with_adapter

from rmkv_cli.errors import UserError
from rmkv_cli.files import sha256
from rmkv_cli.model import RMKV
from rmkv_cli.model.adapter_file import load_adapter, save_adapter

IDS = torch.randint(13, (2, 23), generator=torch.Generator().manual_seed(0))
PREFIX = "base_model.model.model."
FIRST = f"{PREFIX}blocks.0.attention.qkv.lora_A.weight"


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    make_model().float().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter on all layers of the base."""
    (tmp_path / "adapter").mkdir()
    model = with_adapter(RMKV.from_pretrained(base))
    save_adapter(model, tmp_path / "adapter", base, sha256(base / "model.safetensors"))
    return tmp_path / "adapter"


def change(adapter, **keys):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | keys))


def refusal(base, adapter):
    with pytest.raises(UserError) as refused:
        load_adapter(RMKV.from_pretrained(base), adapter)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_adapter_is_loaded_as_it_was_saved(base, adapter, dtype):
    model = RMKV.from_pretrained(base, dtype=dtype)
    load_adapter(model, adapter)
    saved = with_adapter(RMKV.from_pretrained(base)).state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(x, saved[name].to(x.dtype))
    assert model.blocks[0].attention.qkv.lora_A.weight.dtype == (dtype or torch.float32)
    assert model.blocks[0].store.gates.lora_A.weight.dtype == torch.float32


def test_an_adapter_may_cover_part_of_the_layers(base, tmp_path):
    save_adapter(with_adapter(RMKV.from_pretrained(base), ["blocks.1.attention.qkv", "cell.cell"]), tmp_path, base, "")
    model = RMKV.from_pretrained(base)
    load_adapter(model, tmp_path)
    assert {name.rpartition(".lora")[0] for name in model.state_dict() if "lora" in name} == {
        *("blocks.1.attention.qkv", "blocks.0.cell.cell", "blocks.1.cell.cell"),
        *("blocks.0.cell.cell.base_layer", "blocks.1.cell.cell.base_layer"),
    }


def test_a_folder_with_an_adapter_gives_its_base_with_it(base, adapter):
    expected = with_adapter(RMKV.from_pretrained(base))(IDS)[0]
    assert torch.equal(RMKV.from_pretrained(adapter)(IDS)[0], expected)


def test_a_missing_or_changed_base_is_reported(base, adapter):
    make_model(seed=1).float().save_pretrained(base)
    with pytest.raises(UserError, match=r"its weights have changed since the adapter .* was trained on them"):
        RMKV.from_pretrained(adapter)
    base.rename(base.with_name("moved"))
    with pytest.raises(UserError, match=r"its base model '.*base' does not exist; name the base with --model BASE"):
        RMKV.from_pretrained(adapter)


def test_weights_that_fit_nothing_are_refused_with_the_nearest_name(base, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    weights[FIRST.replace("qkv", "qvk")] = weights.pop(FIRST)
    save_file(weights, adapter / "adapter_model.safetensors")
    line = refusal(base, adapter)
    assert line.endswith(f"qvk.lora_A.weight' matches no parameter of the model; did you mean '{FIRST}'?")


def test_an_adapter_of_another_shape_is_refused(adapter, tmp_path):
    make_model(hidden_size=24).float().save_pretrained(tmp_path)
    line = refusal(tmp_path, adapter)
    assert line.startswith(f"{adapter}: the adapter does not fit the model: 'base_model.model.model.blocks.0.")
    assert "is float32 (2, 12), should be float32 (2, 24)" in line


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LoRA adapters are supported"),
        ({"use_dora": True}, "use_dora = True is not supported; only plain LoRA adapters are"),
        ({"rank_pattern": {"qkv": 3}}, "rank_pattern = {'qkv': 3} is not supported; only plain LoRA adapters are"),
        ({"r": 0}, "r: "),
        ({"lora_alpha": float("nan")}, "lora_alpha: "),
        ({"lora_alpha": "much"}, "lora_alpha: "),
    ],
)
def test_an_adapter_that_computes_something_else_is_refused(base, adapter, keys, said):
    change(adapter, **keys)
    assert refusal(base, adapter).startswith(f"{adapter / 'adapter_config.json'}: {said}")


def test_a_rank_that_the_weights_do_not_have_is_refused_before_any_allocation(base, adapter):
    change(adapter, r=10**15)
    assert f"adapter_config.json has r = {10**15}, but '{PREFIX}" in refusal(base, adapter)


def test_an_incomplete_adapter_of_a_cell_is_refused(base, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: x for name, x in weights.items() if "base_layer" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    assert "base_layer.lora_A.weight' is absent, should be float32 (2, 12)" in refusal(base, adapter)


def test_a_folder_without_an_adapter_and_damaged_files_are_refused(base, adapter):
    assert refusal(base, base) == f"{base}: not an adapter folder (it has no adapter_config.json)"
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "adapter_model.safetensors: damaged or missing weights" in refusal(base, adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refusal(base, adapter)
