"""docs/formats.md names exactly the files that a run, a mix and a reading write."""

import json
import math
import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors import safe_open
from small_model import make_model
from small_run import written_by

from rmkv_cli.config import ModelConfig
from rmkv_cli.generation import save_start
from rmkv_cli.tokenizer import Special, train_tokenizer
from rmkv_cli.training import BadStepError, profile, train
from rmkv_cli.training.trainer import Trainer

PAGE = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
ONLY_ON_A_GPU = {"mfu"}
WITH_A_TEACHER = {"kl", "align"}
WITH_ROLLOUTS = {"reward", "solved", "cut", "entropy", "answer_tokens", "logprob_gap", "level", "rollout"} | {
    f"{what}_tokens_per_second" for what in ("written", "learned")
}


def named(heading):
    """What stands in the first column of the section's table; that of its subsections does not count."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(.*?)`", row)]
    assert len(names) == len(set(names)) > 0
    return set(names)


def patterns(names):
    """The names with N for each digit of a number and L for a layer."""
    numbered = (re.sub(r"(?<=-)\d{5,}", lambda number: "N" * len(number[0]), str(name)) for name in names)
    return {re.sub(r"\.\d+(?=\.|$)", ".L", name) for name in numbered}


def files(folder):
    return patterns(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def top(run):
    """A run's files and folders; those of checkpoints and failed steps one by one."""
    inner = {"checkpoints", "failed"}
    return patterns(
        path.relative_to(run)
        for at in run.iterdir()
        for path in (at.iterdir() if at.name in inner else [at])
        if at.name != "tensorboard" or any(at.iterdir())
    )


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def keys(records):
    return set().union(*records)


def tensors(path):
    with safe_open(path, framework="pt") as file:
        return set(file.keys()), file.metadata()


@pytest.fixture
def break_at(monkeypatch):
    """Makes the loss of this step, and of none that is taken again, not finite."""

    def at(step):
        take = Trainer.train_step

        def poked(self):
            if self.step == step - 1:
                with torch.no_grad():
                    self.model.norm.weight.fill_(math.inf)
            return take(self)

        monkeypatch.setattr(Trainer, "train_step", poked)

    return at


@pytest.mark.slow
def test_the_files_of_a_run(make_config, data, streamed, tmp_path, break_at, monkeypatch, capsys):
    profile(make_config(), tmp_path / "prepared", 1)
    prepared = train(make_config(loggers=["tensorboard"]), tmp_path / "prepared").run
    written_by(monkeypatch, capsys, "eval", "--model", prepared, "--data", data, "--no-memory")
    written_by(monkeypatch, capsys, "report", prepared)
    (evaluation,) = (prepared / "evaluations").iterdir()
    assert json.loads(evaluation.read_text()).keys() == named("An evaluation")
    live = train(streamed(), tmp_path / "live").run
    break_at(5)
    with pytest.raises(BadStepError):
        train(make_config(), tmp_path / "broken")
    written = top(prepared) | top(live) | top(tmp_path / "broken")
    assert written == named("A run")

    checkpoint = prepared / "latest"
    whole = {path for path in files(checkpoint) if path != "checksums.json"}
    assert whole | {"checksums.json"} == named("A checkpoint")
    assert json.loads((checkpoint / "checksums.json").read_text()).keys() == whole
    (failed,) = (tmp_path / "broken/failed").iterdir()
    extra = {"checksums.json"}
    assert files(failed) == (named("A checkpoint") - extra) | named("A failed step")
    assert "gradient_norms" in json.loads((failed / "report.json").read_text())

    shape = json.loads((checkpoint / "config.json").read_text()).keys()
    assert shape == named("config.json") | ModelConfig.model_fields.keys()
    assert json.loads((checkpoint / "generation_config.json").read_text()).keys() == named("generation_config.json")
    names, _ = tensors(checkpoint / "model.safetensors")
    assert patterns(names) == named("model.safetensors")
    progress = torch.load(checkpoint / "training/progress.pt", weights_only=True)
    assert progress.keys() == named("training/progress.pt")


def test_the_records_of_a_run(make_config, tmp_path, break_at):
    break_at(6)
    run = train(make_config(on_bad_step="rollback"), tmp_path / "run").run
    bad = [record for record in records(run) if "bad_step" in record]
    validations = [record for record in records(run) if "validation" in record]
    steps = [record for record in records(run) if "loss" in record]
    assert len(bad) + len(validations) + len(steps) == len(records(run))
    assert keys(steps) == named("A step") - ONLY_ON_A_GPU - WITH_A_TEACHER - WITH_ROLLOUTS
    assert keys(bad) == named("A bad step")
    assert keys(validations) == named("A validation")
    for key in ("validation", "sample"):
        (described,) = re.findall(rf"^\| `{key}` \| (.*) \|$", PAGE, re.MULTILINE)
        assert keys(record[key] for record in validations) == set(re.findall(r"`(.*?)`", described))


@pytest.mark.slow
def test_the_records_of_rollouts(answering, tmp_path):
    steps = records(train(answering(tokens=800), tmp_path / "run").run)
    assert keys(steps) == named("A step") - ONLY_ON_A_GPU - WITH_A_TEACHER - {"loss"}
    for record in steps:
        assert record["rollout"].keys() == {"prompt", "answer", "score"}


def test_the_files_of_a_mix(data):
    assert files(data) == named("Prepared data")
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest.keys() == named("manifest.json")
    assert keys(manifest["sources"]) == named("A source in manifest.json")
    assert manifest["splits"].keys() == {"train", "validation"}
    assert keys(manifest["splits"].values()) == {"documents", "tokens", "bytes", "shards", "sha256"}
    assert "{documents, tokens, bytes, shards, sha256}" in PAGE
    with pa.ipc.open_file(str(data / "train-00000.arrow")) as shard:
        assert set(shard.schema.names) == named("A shard")


def test_the_special_tokens():
    assert named("tokenizer.json") == {special.value for special in Special}


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_files_of_reading_and_generating(make_config, tmp_path, monkeypatch, capsys, cell):
    run = train(make_config(memory={"cell": cell}, tokens=100), tmp_path / "run").run
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and the dog sat on the log.")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The"}\n{"messages": [{"role": "user", "content": "Who?"}]}\n')
    notes, texts = tmp_path / "notes.rmkv", tmp_path / "texts.jsonl"
    written_by(monkeypatch, capsys, "read", tmp_path / "text.txt", "--model", run, "--out", notes)
    names, metadata = tensors(notes)
    assert metadata.keys() == named("notes.rmkv")
    assert patterns(names) == named("Tensors of notes.rmkv") - (set() if cell == "lstm" else {"state.cell"})

    writing = ["generate", "--model", run, "--file", tmp_path / "prompts.jsonl", "--out", texts, "--max-tokens", 5]
    written_by(monkeypatch, capsys, *writing)
    lines = [json.loads(line) for line in texts.read_text().splitlines()]
    assert [line.keys() - named("texts.jsonl") for line in lines] == [{"prompt"}, {"messages"}]
    assert {"prompt", "messages"} == named("prompts.jsonl")
    failed = {"error"}  # of a prompt that cannot be read
    assert keys(lines) == named("texts.jsonl") - failed | named("prompts.jsonl")


def test_a_tuned_memory(tmp_path):
    model = make_model(vocab_size=280)
    save_start(tmp_path / "memory.safetensors", model, train_tokenizer(iter(["a few words " * 9]), 280))
    names, metadata = tensors(tmp_path / "memory.safetensors")
    assert patterns(names) | metadata.keys() == named("memory.safetensors")
    assert metadata["format"] == "rmkv-start-1"
