import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from small_run import save_small_model

from rmkv_cli.config import Config, MixConfig, dump_toml
from rmkv_cli.data.mix import prepare
from rmkv_cli.huggingface import export_folder
from rmkv_cli.huggingface.card import _measured, model_card
from rmkv_cli.model.pretrained import write_checksums


@pytest.fixture
def card_of(tmp_path):
    """Exports the checkpoint of a run with these keys of `train`, which was evaluated; returns its card."""

    def make(streamed=None, **train):
        run = tmp_path / "run"
        checkpoint = run / "checkpoints" / "step-00000040"
        model, _ = save_small_model(checkpoint)
        write_checksums(checkpoint)
        (run / "config.toml").write_text(dump_toml(Config.model_validate({"model": model.config, "train": train})))
        if streamed:
            (run / "mix.toml").write_text(dump_toml(streamed))
        figures = [{"loss": loss, "perplexity": 9.0, "bits_per_byte": None} for loss in (2.5, 2.25)]
        records = [{"step": 20 * i, "tokens": 1000 * i, "validation": x} for i, x in enumerate(figures, 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        export_folder(run, tmp_path / "mine")
        return (tmp_path / "mine" / "README.md").read_text()

    return make


def test_a_checkpoint_that_was_moved_and_linked_has_the_card_of_its_run(card_of, tmp_path):
    card = card_of()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000040"
    checkpoint.symlink_to(checkpoint.rename(tmp_path / "moved"))
    for name, model in (("one", "run"), ("two", "run/checkpoints/step-00000040")):
        export_folder(tmp_path / model, tmp_path / name)
        assert (tmp_path / name / "README.md").read_text() == card.replace("mine", name)


def test_a_copy_that_somebody_put_among_the_checkpoints_is_exported_without_an_evaluation(card_of, tmp_path):
    card_of()
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000040", checkpoints / "step-00000040-mine")
    export_folder(checkpoints / "step-00000040-mine", tmp_path / "copy")
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "## Training" in card
    assert "## Evaluation" not in card


def texts(**keys):
    return MixConfig(
        sources=[{"kind": "files", "name": n, "weight": w, "files": ["a.jsonl"]} for n, w in (("one", 3), ("two", 1))],
        **keys,
    )


def test_a_run_s_card_describes_model_data_evaluation_and_command_without_paths(card_of, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "the cat sat on log {i}"}}\n' for i in range(40)))
    _, tokenizer = save_small_model(tmp_path / "model")
    manifest = prepare(texts(validation=0.2), tmp_path, tokenizer, tmp_path / "data", workers=1)
    card = card_of(data=str(tmp_path / "data"), learning_rate=1e-3, tokens=2000)
    front, title = re.match(r"---\n(.*?)\n---\n\n# (\w+)\n", card, re.DOTALL).groups()
    assert front.splitlines() == ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- rmkv"]
    assert title == "mine"
    assert "| memory.slots | 2 |" in card
    one = manifest.sources[0]
    assert f"| one | {one.documents:,} | {one.tokens:,} | {one.achieved:.1%} | {one.epochs} |" in card
    held_out = manifest.splits["validation"].tokens
    assert f"On all held-out documents ({held_out:,} tokens), after 2,000 tokens in 40 steps" in card
    assert "| loss | 2.2500 |" in card
    assert "$ rmkv train --config config.toml" in card
    assert _measured(Config(train={"data": str(tmp_path / "data"), "eval_tokens": 20}), tmp_path) == (
        f"a sample of 20 of {held_out} tokens of held-out documents, with each source and each length of documents in "
        "its share"
    )
    (config,) = re.findall(r"```toml\n(.*?)```", card, re.DOTALL)
    shown = Config.model_validate(tomllib.loads(config)).train
    assert (shown.data, shown.learning_rate) == ("data", 1e-3)
    assert str(tmp_path) not in card


def test_the_card_of_a_streamed_run_contains_the_weights(card_of):
    card = card_of(texts(), mix="mixes/mix.toml")
    assert "| one | 3 |\n| two | 1 |\n" in card


def test_missing_data_and_models_outside_runs_are_not_described(card_of, tmp_path):
    assert "## Data" not in card_of(data=str(tmp_path / "gone"))
    model, _ = save_small_model(tmp_path / "model")
    export_folder(tmp_path / "model", tmp_path / "alone")
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "## Config" in card
    assert "## Training" not in card
    assert model_card("alone", Path("/model"), model) == card  # a folder with nothing above it but the root
