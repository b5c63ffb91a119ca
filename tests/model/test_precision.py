"""A model in bfloat16: its files, the memory for loading, and states exchanged with the same model in float32."""

import pytest
import torch
from safetensors.torch import load_file
from small_model import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from rmkv_cli.errors import UserError
from rmkv_cli.generation import load_notes, read_prompt, save_notes
from rmkv_cli.generation.hashes import model_hash, rounded_hash
from rmkv_cli.model import RMKV, State, pretrained
from rmkv_cli.model.precision import is_narrow, to_precision
from rmkv_cli.model.size import state_bytes
from rmkv_cli.model.tensors import layout, save_tensors
from rmkv_cli.tokenizer import train_tokenizer

WORDS = train_tokenizer(iter(["the cat sat on the mat, and the dog sat on the log. " * 20]), 280)
WIDE_STATE = {"memory", "cell", "store"}


@pytest.fixture
def folder(tmp_path):
    make_model(vocab_size=280, memory={"cell": "lstm"}, tie_word_embeddings=False).float().save_pretrained(tmp_path)
    return tmp_path


def loaded(folder, dtype):
    return RMKV.from_pretrained(folder, dtype=dtype)


def test_only_the_matrices_of_a_bfloat16_model_are_bfloat16(folder):
    saved, weights = load_file(folder / "model.safetensors"), loaded(folder, torch.bfloat16).state_dict()
    assert {name for name, x in weights.items() if x.dtype == torch.float32} == {n for n in saved if not is_narrow(n)}
    for name, x in weights.items():
        assert torch.equal(x, saved[name].to(x.dtype)), name


def test_each_tensor_is_converted_once_and_by_itself(folder):
    """No second copy of the weights is made: neither a narrow tensor's in float32, nor a wide one's at all."""

    class Conversions(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **kwargs or {})
            if op is torch.ops.aten._to_copy.default:
                made.append(out.dtype)
            return out

    made = []
    with Conversions():
        model = loaded(folder, torch.bfloat16)
    assert made == [torch.bfloat16] * sum(is_narrow(name) for name in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_requested_memory_matches_the_tensors(folder, dtype):
    model = loaded(folder, dtype)
    needed = sum(x.nbytes for x in model.state_dict().values()) + state_bytes(model.config, 4, dtype.itemsize)[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pretrained, "total_memory", lambda device: needed - 1)
        with pytest.raises(UserError, match="but the device has"):
            loaded(folder, dtype)
        patched.setattr(pretrained, "total_memory", lambda device: needed)
        loaded(folder, dtype)


def test_a_folder_of_a_bfloat16_model_contains_its_tensors_and_loads_in_both_dtypes(folder, tmp_path):
    model = loaded(folder, torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow")
    assert layout(load_file(tmp_path / "narrow" / "model.safetensors")) == layout(model.state_dict())
    again, wide = loaded(tmp_path / "narrow", torch.bfloat16), loaded(tmp_path / "narrow", None)
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)
        assert wide.state_dict()[name].dtype == torch.float32
        assert torch.equal(wide.state_dict()[name], x.float())


def test_a_state_has_the_dtypes_of_its_model(folder):
    narrow = loaded(folder, torch.bfloat16).initial_state(1)
    for name, x in narrow.tensors().items():
        if x.is_floating_point():
            assert x.dtype == (torch.float32 if name in WIDE_STATE else torch.bfloat16), name
    assert layout(narrow.tensors()) == layout(
        loaded(folder, None).initial_state(1).to_precision(torch.bfloat16).tensors()
    )


def notes(folder, path, read_in):
    """Save notes of seven tokens by the model in the type `read_in`; return what was read."""
    reader = loaded(folder, None)
    prompt = read_prompt(reader, WORDS, "the cat sat")
    if read_in == torch.bfloat16:
        to_precision(reader, read_in)
        prompt = type(prompt)(7, 1.0, prompt.logits, prompt.state.to_precision(read_in), prompt.seen)
    save_notes(path, prompt, reader, WORDS)
    return prompt


@pytest.mark.parametrize("read_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("go_on_in", [torch.float32, torch.bfloat16])
def test_notes_continue_in_either_dtype(folder, tmp_path, read_in, go_on_in):
    saved = notes(folder, tmp_path / "notes.rmkv", read_in)
    model = loaded(folder, go_on_in)
    found = load_notes(tmp_path / "notes.rmkv", model, WORDS)
    expected = saved.state.to_precision(go_on_in).tensors()
    assert layout(found.state.tensors()) == layout(expected)
    for name, x in found.state.tensors().items():
        assert torch.equal(x, expected[name]), name
    assert torch.equal(found.logits, saved.logits)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("state.memory", torch.bfloat16), ("state.values.1", torch.float32), ("logits", torch.bfloat16)],
)
def test_notes_with_an_impossible_mix_of_dtypes_are_refused(folder, tmp_path, name, dtype):
    path = tmp_path / "notes.rmkv"
    notes(folder, path, torch.bfloat16)
    tensors = load_file(path)
    with pretrained.open_tensors(path, "") as file:
        metadata = {key: x for key, x in file.metadata.items() if key != "sha256"}
    save_tensors(tensors | {name: tensors[name].to(dtype)}, path, metadata)
    with pytest.raises(UserError, match=f"is damaged or not a notes file: '{name}'"):
        load_notes(path, loaded(folder, torch.bfloat16), WORDS)


def test_notes_of_earlier_versions_that_name_the_exact_weights_are_read(folder, tmp_path):
    saved, path, model = (
        notes(folder, tmp_path / "notes.rmkv", torch.float32),
        tmp_path / "notes.rmkv",
        loaded(folder, None),
    )
    tensors = load_file(path)
    with pretrained.open_tensors(path, "") as file:
        metadata = {key: x for key, x in file.metadata.items() if key != "sha256"}
    assert metadata["model"] == rounded_hash(model) != model_hash(model)
    save_tensors(tensors, path, metadata | {"model": model_hash(model)})
    assert torch.equal(load_notes(path, model, WORDS).state.memory, saved.state.memory)


def test_a_state_file_keeps_its_dtypes(folder, tmp_path):
    state = loaded(folder, torch.bfloat16).initial_state(1)
    state.save(tmp_path / "state.safetensors")
    assert layout(State.load(tmp_path / "state.safetensors").tensors()) == layout(state.tensors())
