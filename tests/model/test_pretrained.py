"""Any model folder gives its model, or one line at once, because its files are checked before use."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import make_model

from rmkv_cli.errors import UserError
from rmkv_cli.model import RMKV, pretrained
from rmkv_cli.model.pretrained import write_checksums


@pytest.fixture
def folder(tmp_path):
    make_model().float().save_pretrained(tmp_path)
    return tmp_path


def change(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def refusal(folder):
    with pytest.raises(UserError) as refused:
        RMKV.from_pretrained(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_weights_are_loaded_as_float32(folder, dtype):
    narrow = {name: x.to(dtype) for name, x in load_file(folder / "model.safetensors").items()}
    save_file(narrow, folder / "model.safetensors")
    model = RMKV.from_pretrained(folder)
    for name, x in model.state_dict().items():
        assert torch.equal(x, narrow[name].float())
    assert model(torch.zeros(1, 9, dtype=torch.int64))[0].isfinite().all()


def test_float64_weights_stay_float64_unless_others_are_narrower(folder):
    make_model().save_pretrained(folder)
    assert RMKV.from_pretrained(folder).memory.dtype == torch.float64
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"norm.weight": weights["norm.weight"].float()}, folder / "model.safetensors")
    assert {x.dtype for x in RMKV.from_pretrained(folder).parameters()} == {torch.float32}


def test_weights_that_are_not_floating_point_numbers_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"norm.weight": torch.zeros(12, dtype=torch.int8)}, folder / "model.safetensors")
    assert "'norm.weight' has the type int8; weights should be float32, bfloat16 or float16" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 10**9),
        ("hidden_size", 10**9),
        ("num_hidden_layers", 1_000_000),
        ("num_attention_heads", 10**6),
        ("intermediate_size", 10**9),
        ("segment_length", 10**10),
        ("max_position_embeddings", 10**15),
        ("memory", {"slots": 10**9}),
        ("memory", {"store": 10**30}),
    ],
)
def test_sizes_beyond_any_model_are_refused_at_once(folder, key, value):
    change(folder, **{key: value})
    assert key in refusal(folder)


def test_the_largest_sizes_that_a_config_may_have_are_compared_with_the_file_and_not_allocated(folder):
    change(folder, hidden_size=1 << 17, num_hidden_layers=1024, num_attention_heads=4096, intermediate_size=1 << 19)
    assert "model.safetensors does not fit config.json: 'blocks.0.attention.out.weight' is float32" in refusal(folder)


def test_a_state_larger_than_the_memory_is_reported(folder):
    change(folder, segment_length=1 << 20, lookback=1 << 20)  # no weight's shape depends on these
    assert RMKV.from_pretrained(folder).config.segment_length == 1 << 20
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pretrained, "total_memory", lambda device: 10**8)
        assert "model.safetensors: needs 0.5 GB of memory, but the device has 0.1 GB" in refusal(folder)


def test_a_model_larger_than_the_memory_is_not_called_damaged(folder):
    write_checksums(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pretrained, "total_memory", lambda device: 10**4)
        assert "model.safetensors: needs 0.0 GB of memory, but the device has 0.0 GB" in refusal(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    assert "model.safetensors: damaged or missing weights" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checksums.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_anything_but_a_regular_file_is_refused_without_waiting(folder, name, make):
    write_checksums(folder)
    (folder / name).unlink()
    make(folder / name)
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        "null",
        '"rmkv"',
        '{"model_type": "gpt2"}',
        '{"a": ' + "9" * 5000 + "}",
        "{",
    ],
    ids=lambda text: text[:6],
)
def test_an_invalid_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json: " in refusal(folder)


def test_a_config_of_a_gigabyte_is_refused_before_it_is_read(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    assert "config.json: has 1,073,741,824 bytes; a file of this kind has at most" in refusal(folder)


@pytest.mark.parametrize("record", ["[" * 100_000, "[]", '{"../../../../proc/kcore": "0"}', '{"/proc/kcore": "0"}'])
def test_invalid_checksums_are_damage(folder, record):
    (folder / "checksums.json").write_text(record)
    assert "checksums.json is damaged" in refusal(folder)
