"""Imported transformers initially compute the same as their source."""

import json
import shutil

import pytest
import torch
from hub import Hub
from safetensors.torch import load_file
from small_run import error_of, errors_of, written_by
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


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a small Llama; tests must not modify it."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    save_transformer(folder, "Llama", dtype=torch.float32)
    return folder


def said(monkeypatch, capsys, source, out, *options):
    """The lines of the command's error message."""
    lines = errors_of(monkeypatch, capsys, "import", "hf", source, "--out", out, *options)
    assert not out.exists()
    return lines


def changed(llama, folder, **keys):
    shutil.copytree(llama, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "architecture GemmaForCausalLM cannot be imported; LlamaForCausalLM, M",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope type 'yarn' cannot be imported; 'default' and",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' cannot be"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}},
            "'llama3' needs low_freq_factor, high_freq_factor",
        ),
        (
            {"rope_parameters": {"full_attention": {}}},
            "rotary positions of each kind of layer (full_attention) cannot be",
        ),
        ({"partial_rotary_factor": 0.5}, "(partial_rotary_factor = 0.5) cannot be imported; of all can"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' cannot be imported; 'silu' can"),
        (
            {"sliding_window": 1000},
            "a sliding window of 1000 tokens is shorter than the 1024 that a token may see here",
        ),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping (30.0) cannot be imported; models without it can"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (gptq) cannot be imported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "config.json: hidden_size: should be a whole number"),
        (
            {"num_key_value_heads": 2},
            "its weights do not fit its config.json: 'model.layers.0.self_attn.k_proj.weight' is",
        ),
    ],
)
def test_what_cannot_be_imported_is_said_with_what_can_be(llama, tmp_path, monkeypatch, capsys, keys, line):
    (found,) = said(monkeypatch, capsys, changed(llama, tmp_path / "source", **keys), tmp_path / "out")
    assert line in found


def test_everything_that_cannot_be_imported_is_reported_together(llama, tmp_path, monkeypatch, capsys):
    keys = {
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    lines = said(monkeypatch, capsys, changed(llama, tmp_path / "source", **keys), tmp_path / "out")
    assert len(lines) == len(keys)
    for words, line in zip(("architecture Gemma2ForCausalLM", *list(keys)[1:]), lines, strict=True):
        assert f"config.json: {words}" in line


def test_weights_without_a_place_are_named(tmp_path, monkeypatch, capsys):
    save_transformer(tmp_path / "source", "Llama", attention_bias=True, mlp_bias=True)
    (line,) = said(monkeypatch, capsys, tmp_path / "source", tmp_path / "out")
    assert "cannot be imported: model.layers.*.mlp.down_proj.bias, model.layers.*.mlp.gate_proj.bias" in line
    assert "model.layers.*.self_attn.o_proj.bias; only biases that are all 0 are ignored" in line


def test_damaged_folders_are_reported(llama, tmp_path, monkeypatch, capsys):
    source = changed(llama, tmp_path / "source")
    weights = source / "model.safetensors"
    for damage, line in (
        (weights.read_bytes()[:-10], "model.safetensors: damaged weights"),
        (None, "has neither model.safetensors nor model.safetensors.index.json"),
    ):
        weights.unlink()
        if damage:
            weights.write_bytes(damage)
        assert line in said(monkeypatch, capsys, source, tmp_path / "out")[0]
    index = source / "model.safetensors.index.json"
    for content, line in (
        ({"weight_map": {}}, "index.json: is damaged: weight_map should name the file of each tensor"),
        ({"weight_map": {"x": "../other.safetensors"}}, "'../other.safetensors' is not a file in its folder"),
        ({"weight_map": {"x": "absent.safetensors"}}, "absent.safetensors: no such file"),
    ):
        index.write_text(json.dumps(content))
        assert line in said(monkeypatch, capsys, source, tmp_path / "out")[0]


def test_logits_that_differ_from_transformers_are_an_error(llama, tmp_path, monkeypatch, capsys):
    """Simulate an option that the import does not know by making it overlook one."""
    source = changed(
        llama, tmp_path / "source", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    )
    monkeypatch.setattr("rmkv_cli.huggingface.families.ROPES", ("default", "linear"))
    assert "the logits differ from transformers' by" in said(monkeypatch, capsys, source, tmp_path / "out")[0]
    written_by(monkeypatch, capsys, "import", "hf", source, "--out", tmp_path / "out", "--no-check")
    assert (tmp_path / "out" / "model.safetensors").exists()


class TestCommand:
    def test_it_shows_the_origin_of_all_weights(self, llama, tmp_path, monkeypatch, capsys):
        printed = written_by(monkeypatch, capsys, "import", "hf", llama, "--out", tmp_path / "out").out
        for words in ("embed_tokens", "blocks.*.attention.qkv", "token 1 read alone", "new, with a gain of 0"):
            assert words in printed
        assert "Logits of " in printed
        assert printed.splitlines()[-1].startswith(f"{tmp_path / 'out'}: a model folder, for --model")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["segment_length"], config["lookback"]) == (512, 512)
        memory = {"slots": 1, "update": "none", "fresh": "hidden", "store": 3}
        assert memory.items() <= config["memory"].items()

    def test_json_has_the_parts_and_the_check(self, llama, tmp_path, monkeypatch, capsys):
        options = ["--segment-length", 64, "--lookback", 32, "--slots", 0, "--store", 1, "--json"]
        printed = json.loads(
            written_by(monkeypatch, capsys, "import", "hf", llama, "--out", tmp_path / "out", *options).out
        )
        assert printed["sink"] is None
        assert 0 <= printed["check"]["difference"] < 1e-3 < printed["check"]["largest"]
        assert (
            sum(part["parameters"] for part in printed["parts"])
            == RMKV.from_pretrained(tmp_path / "out").count_parameters()
        )
        config = RMKV.from_pretrained(tmp_path / "out").config
        assert (config.segment_length, config.lookback, config.memory.slots, config.stores) == (64, 32, 0, 1)

    def test_without_transformers_a_note_replaces_the_check(self, llama, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("rmkv_cli.evaluation.transformer.find_spec", lambda name: None)
        shown = written_by(monkeypatch, capsys, "import", "hf", llama, "--out", tmp_path / "out")
        assert "the logits are not compared, because transformers is not installed" in shown.err
        assert "Logits of" not in shown.out

    def test_options_for_transformers_are_refused_for_exported_folders(self, models, tmp_path, monkeypatch, capsys):

        export_folder(models[0] / "usual", tmp_path / "exported")
        options = ["--slots", 2, "--no-check"]
        (line,) = said(monkeypatch, capsys, tmp_path / "exported", tmp_path / "out", *options)
        assert "is already an RMKV; --slots, --check" in line


@pytest.fixture
def hub(llama, tmp_path, monkeypatch):
    """A hub with the small Llama, which this process uses in place of the real one."""
    shutil.copytree(llama, tmp_path / "hub" / "someone" / "llama")
    (tmp_path / "hub" / "someone" / "llama" / "consolidated.safetensors").write_bytes(b"for other programs")
    with Hub(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub


class TestHub:
    def test_a_name_is_downloaded_once(self, hub, llama, tmp_path, monkeypatch, capsys):
        written_by(monkeypatch, capsys, "import", "hf", "someone/llama", "--out", tmp_path / "out")
        imported(llama, tmp_path / "direct", segment_length=512, lookback=512)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
        asked = [path for method, path, *_ in hub.requests() if method == "GET" and "/resolve/" in path]
        assert sorted(path.rpartition("/")[2] for path in asked) == sorted(file.name for file in llama.iterdir())

    def test_what_cannot_be_imported_is_not_downloaded(self, hub, tmp_path, monkeypatch, capsys):
        path = tmp_path / "hub" / "someone" / "llama" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
        (line,) = said(monkeypatch, capsys, "someone/llama", tmp_path / "out")
        assert "hidden_act 'gelu' cannot be imported" in line
        assert not any("safetensors" in path for method, path, *_ in hub.requests() if method == "GET")

    def test_an_offline_hub_is_reported_and_the_cache_is_used(self, hub, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in said(monkeypatch, capsys, "someone/llama", tmp_path / "out")[0]
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for number in range(2):
            written_by(monkeypatch, capsys, "import", "hf", "someone/llama", "--out", tmp_path / f"out-{number}")
            hub.kill()
            monkeypatch.setattr("time.sleep", lambda seconds: None)
        hub.start()


@pytest.mark.parametrize(
    ("name", "fault", "line"),
    [
        ("someone/lama", None, "there is no model someone/lama at http"),
        ("no/such/folder", None, "no such folder, and not a name on the hub (OWNER/NAME)"),
        ("someone/llama", {"gated": True}, "model someone/llama is gated: accept its terms at http"),
        ("someone/llama", {"status": 403}, "model someone/llama: access is refused; accept its terms at http"),
    ],
)
def test_what_waiting_does_not_cure_is_one_line(hub, tmp_path, monkeypatch, capsys, name, fault, line):
    if fault:
        hub.fail("resolve|api", 99, **fault)
    assert line in error_of(monkeypatch, capsys, "import", "hf", name, "--out", tmp_path / "out")


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
