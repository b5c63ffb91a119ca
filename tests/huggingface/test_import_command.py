"""`rmkv import hf`: what it prints, what it refuses, and models of the hub."""

import json
import shutil

import pytest
import torch
from hub import Hub
from small_run import error_of, errors_of, written_by
from small_transformer import save_transformer

from rmkv_cli.huggingface import Wiring, export_folder, import_transformer
from rmkv_cli.model import RMKV


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
            "architecture GemmaForCausalLM is not supported; supported are LlamaForCausalLM, M",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope type 'yarn' is not supported; supported are 'default' and",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}},
            "'llama3' needs low_freq_factor, high_freq_factor",
        ),
        (
            {"rope_parameters": {"full_attention": {}}},
            "rotary positions that differ by kind of layer (full_attention) are not",
        ),
        ({"partial_rotary_factor": 0.5}, "(partial_rotary_factor = 0.5) are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported is 'silu'"),
        (
            {"sliding_window": 1000},
            "a sliding window of 1000 tokens is shorter than the 2048 that a token may see here",
        ),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping (30.0) is not supported; use a model without it"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (gptq) is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "config.json: hidden_size: should be a whole number"),
        (
            {"num_key_value_heads": 2},
            "its weights do not fit its config.json: 'model.layers.0.self_attn.k_proj.weight' is",
        ),
    ],
)
def test_an_unsupported_model_is_reported_with_the_supported_ones(llama, tmp_path, monkeypatch, capsys, keys, line):
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
        assert (config["segment_length"], config["lookback"]) == (1024, 1024)
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
        assert "logits are not compared, because transformers is not installed" in shown.err
        assert "Logits of" not in shown.out

    def test_options_for_transformers_are_refused_for_exported_folders(self, models, tmp_path, monkeypatch, capsys):

        export_folder(models[0] / "usual", tmp_path / "exported")
        options = ["--slots", 2, "--no-check"]
        (line,) = said(monkeypatch, capsys, tmp_path / "exported", tmp_path / "out", *options)
        assert "is already an RMKV; leave out --slots, --check" in line


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
        import_transformer(str(llama), tmp_path / "direct", Wiring(), False)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
        asked = [path for method, path, *_ in hub.requests() if method == "GET" and "/resolve/" in path]
        assert sorted(path.rpartition("/")[2] for path in asked) == sorted(file.name for file in llama.iterdir())

    def test_what_cannot_be_imported_is_not_downloaded(self, hub, tmp_path, monkeypatch, capsys):
        path = tmp_path / "hub" / "someone" / "llama" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
        (line,) = said(monkeypatch, capsys, "someone/llama", tmp_path / "out")
        assert "hidden_act 'gelu' is not supported" in line
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
def test_a_permanent_failure_is_one_line(hub, tmp_path, monkeypatch, capsys, name, fault, line):
    if fault:
        hub.fail("resolve|api", 99, **fault)
    assert line in error_of(monkeypatch, capsys, "import", "hf", name, "--out", tmp_path / "out")
