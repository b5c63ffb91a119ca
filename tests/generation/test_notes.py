"""Notes outlive the process: continuing from the file equals continuing in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small_model import make_model

from rmkv_cli.errors import UserError
from rmkv_cli.generation import SamplingConfig, generate, load_notes, read_prompt, save_notes
from rmkv_cli.generation.hashes import model_hash
from rmkv_cli.model.precision import to_precision
from rmkv_cli.model.tensors import save_tensors
from rmkv_cli.tokenizer import train_tokenizer

WORDS = train_tokenizer(iter(["the cat sat on the mat, and the dog sat on the log. " * 20]), 280)
TEXTS = st.text("the catsondmlg. \n", min_size=1, max_size=60)
MODELS = [
    make_model(vocab_size=280, memory={"cell": "lstm"}),
    make_model(vocab_size=280, memory={"slots": 0}, lookback=0),
    make_model(vocab_size=280, memory={"cell": "minimal", "store": 0}, lookback=5, position="sinusoidal"),
]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MODELS), st.lists(TEXTS, min_size=2, max_size=3))
def test_continuing_from_saved_notes_equals_one_reading(tmp_path_factory, model, texts):
    path = tmp_path_factory.getbasetemp() / "notes.rmkv"
    whole = read_prompt(model, WORDS, texts)
    read = None
    for text in texts:
        read = read_prompt(model, WORDS, text, read)
        save_notes(path, read, model, WORDS)
        read = load_notes(path, model, WORDS)
    torch.testing.assert_close(read.logits, whole.logits, atol=1e-6, rtol=0)
    assert torch.equal(read.seen, whole.seen)
    expected, tensors = whole.state.tensors(), read.state.tensors()
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(tensors[name], x, atol=1e-9, rtol=0, msg=name)
    penalised = SamplingConfig(temperature=0, repetition_penalty=1.5)
    written = [list(generate(model, WORDS, prompt, penalised, 10)) for prompt in (whole, read)]
    assert written[0] == written[1]


def test_notes_of_the_first_format_are_read(tmp_path):
    """Inside a segment they have keys and values of the slots and of the learned slots before those of the tokens."""
    model, path = MODELS[0], tmp_path / "notes.rmkv"
    prompt = read_prompt(model, WORDS, "the cat sat")
    assert prompt.state.filled
    save_notes(path, prompt, model, WORDS)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    slots = torch.randn(1, 3, 2 * model.config.memory.slots, 4, dtype=torch.float64)
    for name in tensors:
        if name.startswith(("state.keys.", "state.values.")):
            tensors[name] = torch.cat([slots, tensors[name]], dim=2)
    del metadata["sha256"]
    save_tensors(tensors, path, metadata | {"format": "rmkv-notes-1"})
    state = load_notes(path, model, WORDS).state.tensors()
    for name, x in prompt.state.tensors().items():
        assert torch.equal(state[name], x), name
    narrow = make_model(vocab_size=280, memory={"cell": "lstm"})
    to_precision(narrow, torch.bfloat16)
    save_tensors(tensors, path, metadata | {"format": "rmkv-notes-1", "model": "another's"})
    with pytest.raises(UserError, match="try it without --dtype"):
        load_notes(path, narrow, WORDS)
    save_tensors(tensors, path, metadata)
    with pytest.raises(UserError, match="keys"):
        load_notes(path, model, WORDS)


def test_the_file_does_not_grow_with_the_text(tmp_path):
    model, sizes = make_model(vocab_size=280), []
    for n in (4, 404):  # a token each, and one before them: whole segments
        prompt = read_prompt(model, WORDS, ";" * n)
        assert int(prompt.state.position) == n + 1
        save_notes(tmp_path / "notes.rmkv", prompt, model, WORDS)
        sizes.append((tmp_path / "notes.rmkv").stat().st_size)
    assert sizes[0] == pytest.approx(sizes[1], abs=8)  # the header's own figures


def test_notes_of_another_model_or_tokenizer_are_refused(tmp_path):
    model, path = make_model(vocab_size=280), tmp_path / "notes.rmkv"
    save_notes(path, read_prompt(model, WORDS, "the cat"), model, WORDS)
    for other in (make_model(1, vocab_size=280), make_model(vocab_size=280, segment_length=6)):
        with pytest.raises(UserError, match=r"was made with a different model \([0-9a-f]{12}, not [0-9a-f]{12}\)"):
            load_notes(path, other, WORDS)
    with pytest.raises(UserError, match="was made with a different tokenizer"):
        load_notes(path, model, train_tokenizer(iter(["something else " * 9]), 270))
    assert load_notes(path, make_model(vocab_size=280), WORDS)


def test_a_file_that_is_not_notes_is_refused(tmp_path):
    model, path = make_model(vocab_size=280), tmp_path / "notes.rmkv"
    with pytest.raises(UserError, match="no such file"):
        load_notes(path, model, WORDS)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is not a notes file"):
        load_notes(path, model, WORDS)
    save_notes(path, read_prompt(model, WORDS, "the cat"), model, WORDS)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="is damaged or not a notes file"):
        load_notes(path, model, WORDS)


def test_notes_are_written_atomically(tmp_path):
    model = make_model(vocab_size=280)
    prompt = read_prompt(model, WORDS, "the cat")
    path = tmp_path / "notes.rmkv"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        save_notes(path, prompt, model, WORDS)
    assert list(tmp_path.iterdir()) == [path]


def test_a_models_hash_is_its_weights_and_its_shape():
    model = make_model(vocab_size=280)
    hashes = {model_hash(make_model(vocab_size=280)), model_hash(model)}
    assert len(hashes) == 1
    with torch.no_grad():
        model.blocks[1].attention.out.weight[3, 4] += 1e-6
    hashes |= {model_hash(model), model_hash(make_model(vocab_size=280, lookback=3)), model_hash(model.float())}
    assert len(hashes) == 4


@pytest.fixture
def saved(tmp_path):
    """A model with a store, the path of its notes in mid-segment, and the notes' tensors and metadata."""
    model = make_model(vocab_size=280)
    save_notes(tmp_path / "notes.rmkv", read_prompt(model, WORDS, ";" * 7), model, WORDS)
    with safe_open(tmp_path / "notes.rmkv", framework="pt") as file:
        return model, {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


TAMPERED = {
    "a store that is left out": lambda x: {"state.store": None},
    "slots of another width": lambda x: {"state.memory": x["state.memory"][..., :-1].contiguous()},
    "a layer too many": lambda x: {"state.keys.2": x["state.keys.1"].clone()},
    "empty keys": lambda x: {"state.keys.0": x["state.keys.0"][:, :, :0].contiguous()},
    "another type": lambda x: {"state.memory": x["state.memory"].float()},
    "two texts": lambda x: {"state.owner": torch.zeros(2, dtype=torch.int64)},
    "a segment that is overfull": lambda x: {"state.filled": torch.tensor(5)},
    "fewer tokens than there are": lambda x: {"state.filled": torch.tensor(1)},
    "a negative count": lambda x: {"state.filled": torch.tensor(-1)},
    "a count that is a list": lambda x: {"state.filled": torch.zeros(3, dtype=torch.int64)},
    "an offset beyond the segment": lambda x: {"state.offset": torch.tensor([5])},
    "a position below 0": lambda x: {"state.position": torch.tensor([-3])},
    "another position": lambda x: {"state.position": torch.tensor([9])},
    "a document of none": lambda x: {"state.owner": torch.tensor([4])},
    "logits that are none": lambda x: {"logits": torch.full_like(x["logits"], torch.nan)},
    "a store that is infinite": lambda x: {"state.store": torch.full_like(x["state.store"], torch.inf)},
    "seen tokens as numbers": lambda x: {"seen": x["seen"].to(torch.int64)},
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_notes_that_no_text_can_produce_are_refused_whatever_their_checksum(saved, tmp_path, tamper):
    model, tensors, metadata = saved
    changed = {name: x for name, x in (tensors | tamper(tensors)).items() if x is not None}
    save_tensors(changed, tmp_path / "bad.rmkv", {key: x for key, x in metadata.items() if key != "sha256"})
    with pytest.raises(UserError, match=r"bad\.rmkv: is damaged or not a notes file"):
        load_notes(tmp_path / "bad.rmkv", model, WORDS)


def test_a_flipped_bit_anywhere_in_the_numbers_is_detected(saved, tmp_path):
    model = saved[0]
    data = (tmp_path / "notes.rmkv").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    for place in range(begin, len(data), len(data) // 50):
        flipped = bytearray(data)
        flipped[place] ^= 1
        (tmp_path / "bad.rmkv").write_bytes(flipped)
        with pytest.raises(UserError, match="damaged"):
            load_notes(tmp_path / "bad.rmkv", model, WORDS)


def test_notes_of_earlier_versions_without_a_checksum_are_read(saved, tmp_path):
    model, tensors, metadata = saved
    del metadata["sha256"]
    save_file(tensors, tmp_path / "old.rmkv", metadata)
    whole = read_prompt(model, WORDS, ";" * 7)
    assert torch.equal(load_notes(tmp_path / "old.rmkv", model, WORDS).logits, whole.logits)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("how", "kind", "error"), [("bf16", "BF16", 2**-8), ("int8", "I8", 1 / 254)])
def test_compressed_notes_are_as_exact_as_their_bits(model, how, kind, error, tmp_path):
    prompt = read_prompt(model, WORDS, "the cat sat on the mat, and the dog sat on the log. " * 3)
    save_notes(tmp_path / "exact.rmkv", prompt, model, WORDS)
    save_notes(tmp_path / "small.rmkv", prompt, model, WORDS, how)
    exact, small = (load_notes(tmp_path / f"{name}.rmkv", model, WORDS) for name in ("exact", "small"))
    assert torch.equal(small.logits, exact.logits)
    tensors = small.state.tensors()
    with safe_open(tmp_path / "small.rmkv", "pt") as file:
        for name, x in exact.state.tensors().items():
            assert tensors[name].dtype == x.dtype
            if x.is_floating_point():
                largest = x.abs() if how == "bf16" else x.abs().amax(-1, keepdim=True)
                assert ((tensors[name] - x).abs() <= 1.001 * error * largest).all(), name
                assert file.get_slice(f"state.{name}").get_dtype() == kind
            else:
                assert torch.equal(tensors[name], x)


def test_an_unknown_compression_is_refused(tmp_path):
    path = tmp_path / "notes.rmkv"
    save_notes(path, read_prompt(MODELS[0], WORDS, "the cat"), MODELS[0], WORDS, "bf16")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata["sha256"]
    for how, says in (("int4", "should be bf16 or int8"), ("int8", r"'state\.\S+' is \S+")):
        save_tensors(tensors, path, metadata | {"compression": how})
        with pytest.raises(UserError, match=says):
            load_notes(path, MODELS[0], WORDS)
