"""Imported transformers initially compute the same as their source."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_transformer import FAMILIES, LLAMA3, in_float64, make_transformer, save_transformer
from transformers_alone import alone

from rmkv_cli.generation import SamplingConfig, generate
from rmkv_cli.huggingface import Wiring, export_folder, import_folder, import_transformer
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Tokenizer

S, L = 20, 12
OPTIONS = {
    "plain": {},
    "grouped queries": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "epsilon": {"rms_norm_eps": 0.1},
    "base": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "all": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "head_dim": 16,
        "rms_norm_eps": 0.1,
        "rope_parameters": LLAMA3 | {"rope_theta": 50.0},
    },
}
IDS = torch.randint(3, 300, (2, 3 * S), generator=torch.Generator().manual_seed(0))


def imported(folder, out, check=False, **wiring):
    import_transformer(str(folder), out, Wiring(**{"segment_length": S, "lookback": L} | wiring), check)
    return RMKV.from_pretrained(out)


def window_mask(length, lookback=L):
    """Mask (1, 1, T, T) of the tokens that each token sees, in its segment and before it."""
    token, other = torch.arange(length)[:, None], torch.arange(length)
    return ((other <= token) & (other >= token // S * S - lookback))[None, None]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_first_segment_has_the_transformer_s_logits(tmp_path, monkeypatch, family, option):
    with in_float64(monkeypatch):
        teacher = save_transformer(tmp_path / "source", family, **OPTIONS[option])
        expected = teacher(IDS[:, :S]).logits
    model = imported(tmp_path / "source", tmp_path / "model")
    assert model.memory.dtype == torch.float64
    with torch.no_grad():
        logits = model(IDS)[0]
    torch.testing.assert_close(logits[:, :S], expected, atol=1e-9, rtol=0)
    assert not torch.allclose(logits[:, S:], teacher(IDS).logits[:, S:], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float32_transformer_has_its_logits_to_rounding(tmp_path, family):
    teacher = save_transformer(tmp_path / "source", family, dtype=torch.float32)
    model = imported(tmp_path / "source", tmp_path / "model")
    assert model.memory.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[:, :S])[0], teacher(IDS[:, :S]).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_slots_it_is_the_transformer_with_a_window(tmp_path, monkeypatch, family):
    with in_float64(monkeypatch):
        teacher = save_transformer(tmp_path / "source", family, **OPTIONS["all"])
        expected = teacher(IDS, attention_mask=window_mask(IDS.shape[1])).logits
    model = imported(tmp_path / "source", tmp_path / "model", slots=0)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS)[0], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_slot_is_the_first_token_s_residual_stream_at_its_layer(tmp_path, monkeypatch, family):
    with in_float64(monkeypatch):
        teacher = save_transformer(tmp_path / "source", family, **OPTIONS["all"])
        streams = teacher(torch.tensor([[1]]), output_hidden_states=True).hidden_states[:-1]
    model = imported(tmp_path / "source", tmp_path / "model", slots=2)
    assert model.memory.shape == (3, 2, 32)
    torch.testing.assert_close(model.memory.detach()[:, 0], torch.cat(streams)[:, 0], atol=1e-9, rtol=0)
    assert not model.memory[:, 1].any()


def test_stores_begin_without_effect_and_with_a_gradient(tmp_path):
    save_transformer(tmp_path / "source", "Llama")
    model = imported(tmp_path / "source", tmp_path / "model")
    without = imported(tmp_path / "source", tmp_path / "none", store=0)
    with torch.no_grad():
        assert torch.equal(model(IDS)[0], without(IDS)[0])
    assert model.config.stores == 3
    model(IDS)[0].logsumexp(-1).sum().backward()
    assert all(block.store.norm.weight.grad.abs().min() > 0 for block in model.blocks)


class TestStoresThatHaveLearned:
    """The three rules of the model."""

    @pytest.fixture(params=FAMILIES)
    def model(self, request, tmp_path):
        save_transformer(tmp_path / "source", request.param, **OPTIONS["all"])
        model = imported(tmp_path / "source", tmp_path / "model")
        torch.manual_seed(1)
        for block in model.blocks:
            block.store.norm.weight.data = torch.randn_like(block.store.norm.weight)
        return model.requires_grad_(False)

    def test_causal(self, model):
        before = model(IDS)[0]
        for i in (0, S - 1, S, 2 * S + 3):
            changed = IDS.clone()
            changed[:, i] = (changed[:, i] + 1) % 300
            after = model(changed)[0]
            assert torch.equal(after[:, :i], before[:, :i])
            assert not torch.equal(after[:, i:], before[:, i:])

    def test_one_function_three_ways(self, model):
        whole = model(IDS)[0]
        for step in (S, 1):
            state, parts = None, []
            for part in IDS.split(step, dim=1):
                logits, state = model(part, state)
                parts.append(logits)
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-9, rtol=0)

    def test_documents_are_islands(self, model):
        documents = torch.tensor([0] * 5 + [1] * 30 + [2] * 25).expand(2, -1)
        logits = model(IDS, document_ids=documents)[0]
        for document in range(3):
            inside = documents == document
            changed = model(torch.where(inside, IDS, IDS.flip(1)), document_ids=documents)[0]
            assert torch.equal(changed[inside], logits[inside])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_types_and_values(tmp_path, dtype):
    save_transformer(tmp_path / "source", "Qwen2", dtype=dtype)
    imported(tmp_path / "source", tmp_path / "model", check=True)
    theirs = load_file(tmp_path / "source" / "model.safetensors")
    ours = load_file(tmp_path / "model" / "model.safetensors")
    parts = [theirs[f"model.layers.1.self_attn.{x}_proj.bias"] for x in "qkv"]
    assert torch.equal(ours["blocks.1.attention.qkv.bias"], torch.cat(parts))
    assert torch.equal(ours["unembedding.weight"], theirs["lm_head.weight"])
    assert ours["blocks.2.feed_forward.up.weight"].dtype == dtype
    assert {x.dtype for name, x in ours.items() if name == "memory" or ".store." in name} == {torch.float32}


def test_shards_and_one_file_give_the_same_model(tmp_path):
    save_transformer(tmp_path / "one", "Qwen3")
    save_transformer(tmp_path / "several", "Qwen3", max_shard_size="50KB")
    assert len([*(tmp_path / "several").glob("*.safetensors")]) > 2
    one, several = (imported(tmp_path / name, tmp_path / f"{name}-model").state_dict() for name in ("one", "several"))
    torch.testing.assert_close(one.pop("memory"), several.pop("memory"))  # computed, from tensors at other addresses
    assert all(torch.equal(x, several[name]) for name, x in one.items())


def test_a_config_of_transformers_4_means_the_same(tmp_path):
    save_transformer(tmp_path / "source", "Llama", rope_parameters=LLAMA3)
    new = imported(tmp_path / "source", tmp_path / "new").config
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(config))
    assert imported(tmp_path / "source", tmp_path / "old").config == new


def test_a_head_that_differs_from_the_embeddings_is_kept_as_transformers_does(tmp_path):
    teacher = save_transformer(tmp_path / "source", "Llama", dtype=torch.float32)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    model = imported(tmp_path / "source", tmp_path / "model", check=True)
    assert torch.equal(model.unembedding.weight, teacher.lm_head.weight)


def test_a_bias_of_zeros_is_ignored(tmp_path):
    teacher = make_transformer("Llama", dtype=torch.float32, attention_bias=True)
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.bias.zero_()
    save_transformer(tmp_path / "source", "Llama")
    teacher.save_pretrained(tmp_path / "source")
    model = imported(tmp_path / "source", tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[:, :S])[0], teacher(IDS[:, :S]).logits, atol=1e-4, rtol=0)


class TestGeneration:
    """Generation by an imported model, in rmkv and in transformers."""

    @pytest.fixture(params=FAMILIES)
    def teacher(self, request, tmp_path):
        options = OPTIONS["all"] | {"dtype": torch.float32, "max_position_embeddings": 256}
        return save_transformer(tmp_path / "source", request.param, **options)

    def test_within_the_window_it_generates_the_same_as_the_transformer(self, teacher, tmp_path):
        model = imported(tmp_path / "source", tmp_path / "model", segment_length=64)
        tokenizer = Tokenizer.load(tmp_path / "model")
        never = [*tokenizer.roles.never, *range(tokenizer.vocab_size, 300)]
        for prompt in ("the cat sat", "on the log, and", "x"):
            ours = generate(model, tokenizer, prompt, SamplingConfig(temperature=0), 24)
            assert "".join(ours)
            ids = torch.tensor([tokenizer.encode_document([prompt])])
            whole = teacher.generate(ids, max_new_tokens=24, suppress_tokens=never)
            written = whole[0, ids.shape[1] :].tolist()
            assert ours.ids == [token for token in written if token != teacher.config.eos_token_id]

    @pytest.mark.slow
    def test_an_export_generates_the_same_in_transformers(self, teacher, tmp_path):
        model = imported(tmp_path / "source", tmp_path / "model")
        for block in model.blocks:
            torch.nn.init.normal_(block.store.norm.weight)
        model.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "checksums.json").unlink()
        export_folder(tmp_path / "model", tmp_path / "exported")
        here = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        found = alone(tmp_path, [tmp_path / "exported"], {"ids": IDS}, **here)
        with torch.no_grad():
            torch.testing.assert_close(found[str(tmp_path / "exported")]["logits"], model(IDS)[0], atol=1e-4, rtol=0)
        import_folder(tmp_path / "exported", tmp_path / "back")
        for name in ("model.safetensors", "tokenizer.json"):
            assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
