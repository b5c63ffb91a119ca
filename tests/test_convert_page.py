"""docs/convert.md, line by line, against a hub on loopback with a small Qwen3 and less training."""

import os
import re
from pathlib import Path

import pytest
from documented import session
from forked import Forker
from hub import Hub
from hub_data import write_real_sets
from small_server import running
from small_transformer import save_transformer

from rmkv_cli.cli.loading import load_model
from rmkv_cli.config import load_config, load_recipe, preset_path
from rmkv_cli.huggingface.families import Wiring, read_family
from rmkv_cli.model.cost import training_memory
from rmkv_cli.training.utilization import training_budget

PAGE = Path(__file__).parents[1] / "docs/convert.md"
QWEN3 = {  # config.json of Qwen/Qwen3-0.6B
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SHORTER = {
    "batch_size": 2,
    "micro_batch_size": 1,
    "tokens": 20_000,
    "eval_tokens": 500,
    "precision": "fp32",
    "teacher.precision": "fp32",
    "device": "cpu",
}


@pytest.mark.slow
def test_every_command_runs_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_real_sets(tmp_path / "hub")
    save_transformer(tmp_path / "hub/Qwen/Qwen3-0.6B", "Qwen3", max_position_embeddings=4096, tie_word_embeddings=True)
    Path("notes.txt").write_text("the cat sat on the mat, and the dog sat on the log. " * 100)
    shorter = [word for key, value in SHORTER.items() for word in ("--set", f"train.{key}={value}")]
    with Hub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        with Forker("job", environment=environment) as forker:
            for command in session(PAGE):
                words = command.words + (shorter if command.words[0] == "train" else [])
                done = forker.run(*words, stdin=command.typed.encode())
                assert done.returncode == 0, f"{command.line}\n{done.stderr}"
                assert done.stdout, command.line
    with running(*load_model(Path("runs/qwen3"), "cpu", "bf16")) as server:
        chat = [{"role": "user", "content": "the cat?"}]
        answer = server.client().chat.completions.create(model="small", messages=chat, max_tokens=5)
        assert answer.usage.completion_tokens > 0


def test_its_figures_match_params():
    page = PAGE.read_text(encoding="utf-8")
    model = read_family(QWEN3, Path("config.json"), Wiring())
    for size, cell in re.findall(r"^\| (\d+)[^|]* \| ([\d.]+) \|$", page, re.MULTILINE):
        config = load_recipe(preset_path("convert"), [f"train.micro_batch_size={size}"], model, preset=True)
        row = config.train.segments_max * model.segment_length
        assert cell == f"{training_memory(model, config.train, int(size), row).total / 1e9:.1f}"
    preset = load_config(preset_path("convert")).train
    assert f"| {preset.micro_batch_size}, the preset's |" in page
    assert f"streams {preset.tokens / 1e6:.0f}M tokens of the mix `{preset.mix}`" in page
    config = load_recipe(preset_path("convert"), [], model, preset=True)
    budget = training_budget(config)
    hours = budget["hours"]["GeForce RTX 4090"]
    assert f"At an MFU of {budget['assumed_mfu']:.0%} an RTX 4090 needs {hours:.1f} hours" in page
