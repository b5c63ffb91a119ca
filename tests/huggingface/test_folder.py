import json
import re
import shutil
import subprocess
import sys

from small_run import error_of, save_small_model

from rmkv_cli.cli.loading import load_model
from rmkv_cli.config import MemoryConfig
from rmkv_cli.data.chat import pieces_of
from rmkv_cli.generation import SamplingConfig
from rmkv_cli.huggingface import export_folder, import_folder
from rmkv_cli.tokenizer import Special
from rmkv_cli.training.checkpoint import write_model


def test_an_exported_model_is_imported_bit_for_bit(models, tmp_path):
    for name in models[1]:
        export_folder(models[0] / name, tmp_path / name)
        import_folder(tmp_path / name, tmp_path / f"{name}-back")
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (tmp_path / f"{name}-back" / file).read_bytes() == (models[0] / name / file).read_bytes()
        assert json.loads((tmp_path / f"{name}-back" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_transformers_samples_as_generate_does_by_default(models, tmp_path):
    export_folder(models[0] / "usual", tmp_path / "exported")
    write_model(tmp_path / "model", *load_model(models[0] / "usual", "cpu"))
    ours = SamplingConfig()
    for folder in ("exported", "model"):
        theirs = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert theirs["do_sample"]
        for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
            assert theirs[name] == getattr(ours, name)


def test_the_code_beside_the_weights_lacks_no_name_and_nothing_of_rmkv(models, tmp_path):
    export_folder(models[0] / "usual", tmp_path / "out")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F811", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for file in (tmp_path / "out").glob("*.py"):
        assert not re.search(r"^\s*(from|import) rmkv_cli", file.read_text(), re.MULTILINE)


def test_a_custom_chat_template_stays_with_the_model(models, tmp_path):
    """With rmkv's own tokenizer and no template, a folder has rmkv's format; its export includes rmkv's template."""
    model = shutil.copytree(models[0] / "usual", tmp_path / "model")
    template = "{{ '<eod>' }}{% for m in messages %}{{ '<start>' + m.content + '<end>' }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    tokenizer = load_model(model, "cpu")[1]
    assert pieces_of([("user", "a<end>")], tokenizer)[1:] == (Special.EOD, Special.START, "a<end>", Special.END)
    assert tokenizer.hash != load_model(models[0] / "usual", "cpu")[1].hash
    export_folder(model, tmp_path / "exported")
    import_folder(tmp_path / "exported", tmp_path / "back")
    for folder in ("exported", "back"):
        assert (tmp_path / folder / "chat_template.jinja").read_text() == template


def test_what_cannot_be_exported_or_imported_is_one_line(models, tmp_path, monkeypatch, capsys):
    def error(*arguments):
        return error_of(monkeypatch, capsys, *arguments)

    def imported(folder):
        return error("import", "hf", folder, "--out", tmp_path / "back")

    ours, out = models[0] / "usual", tmp_path / "out"
    export_folder(ours, out)
    assert "already exists" in error("export", "hf", out, "--model", ours)
    assert "already exists" in error("import", "hf", out, "--out", ours)
    assert "absent: no such folder" in error("export", "hf", tmp_path / "new", "--model", tmp_path / "absent")
    save_small_model(tmp_path / "published", memory=MemoryConfig(slots=2, carry="layers", store=0))
    assert "is not causal" in error("export", "hf", tmp_path / "new", "--model", tmp_path / "published")
    save_small_model(tmp_path / "narrow", vocab_size=100)
    assert "has 280 tokens, the model 100" in error("export", "hf", tmp_path / "new", "--model", tmp_path / "narrow")
    assert "is a model folder of rmkv; `rmkv export hf` makes" in imported(ours)
    assert "is not a Hugging Face folder (it has no config.json)" in imported(tmp_path)
    config, weights = out / "config.json", out / "model.safetensors"
    written = json.loads(config.read_text())
    for change, says in (
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"hidden_size": "wide"}, "config.json: hidden_size: should be a whole number"),
        ({"hidden_size": 32}, "model.safetensors does not fit config.json"),
    ):
        config.write_text(json.dumps(written | change))
        assert says in imported(out)
    config.write_text("{")
    assert "config.json: is damaged" in imported(out)
    config.write_text(json.dumps(written))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors: damaged or missing weights" in imported(out)
    save_small_model(tmp_path / "changing")
    tokenizer = tmp_path / "changing" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"normalizer": {"type": "NFC"}}))
    assert "has a normalizer" in error("export", "hf", tmp_path / "new", "--model", tmp_path / "changing")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "published", "narrow", "changing"}
