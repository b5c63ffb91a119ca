"""`--dtype`: each command that loads a model computes in bfloat16 where it is asked to."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict

import openai
import pytest
import torch
from custom_tasks import QUESTIONS, make_custom_tasks
from safetensors.torch import load_file
from small_run import TEXT, error_of, save_small_model
from trained_run import make_data, train_small_run

from rmkv_cli.data.documents import Documents
from rmkv_cli.evaluation import measure
from rmkv_cli.generation import SamplingConfig, generate, load_notes, read_prompt
from rmkv_cli.model import RMKV
from rmkv_cli.model.precision import is_narrow
from rmkv_cli.model.tensors import layout
from rmkv_cli.tokenizer import Tokenizer

BF16 = ("--dtype", "bf16")
BITS = 0.005  # largest difference in bits per byte between the two types, for a trained model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtype") / "small"
    folder.mkdir()
    save_small_model(folder)
    return folder


@pytest.fixture(scope="module")
def models(folder):
    """The model in float32 and in bfloat16, and the tokenizer."""
    return RMKV.from_pretrained(folder), RMKV.from_pretrained(folder, dtype=torch.bfloat16), Tokenizer.load(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was trained for long enough to predict something, and its data."""
    place = tmp_path_factory.mktemp("trained")
    data = make_data(place / "story")
    return train_small_run(data, place / "run", tokens=6_000, checkpoint_every=1000, eval_every=1000), data


def written(model, tokenizer, prompt=TEXT, seed=7, tokens=60):
    return "".join(generate(model, tokenizer, prompt, SamplingConfig(seed=seed), tokens))


def test_generate_writes_what_the_bfloat16_model_writes(folder, models, printed):
    wide, narrow, tokenizer = models
    text = printed("generate", "--model", folder, "--prompt", TEXT, "--seed", 7, "--max-tokens", 60, *BF16)
    assert text == written(narrow, tokenizer) + "\n"
    assert text != written(wide, tokenizer) + "\n"


def test_many_texts_are_generated_in_bfloat16_and_resumed_only_in_the_same_dtype(
    folder, tmp_path, printed, monkeypatch, capsys
):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text(json.dumps({"prompt": TEXT}) + "\n")
    ask = ["generate", "--model", folder, "--file", prompts, "--out", out, "--max-tokens", 60, "--seed", 7]
    printed(*ask, *BF16)
    narrow, tokenizer = RMKV.from_pretrained(folder, dtype=torch.bfloat16), Tokenizer.load(folder)
    assert json.loads(out.read_text())["text"] == written(narrow, tokenizer)
    out.unlink()
    begun = tmp_path / "texts.jsonl.part"
    monkeypatch.setattr("rmkv_cli.generation.lines.together", lambda *_: 1 / 0)
    with suppress(ZeroDivisionError):
        printed(*ask, *BF16)
    assert begun.exists()
    assert "was started with a different model, prompts or settings" in error_of(monkeypatch, capsys, *ask)


@pytest.mark.parametrize(("read_in", "go_on_in"), [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_notes_saved_in_one_dtype_load_in_the_other(folder, models, tmp_path, printed, read_in, go_on_in):
    by_type, tokenizer = {"fp32": models[0], "bf16": models[1]}, models[2]
    (tmp_path / "book.txt").write_text(TEXT * 10)
    notes = tmp_path / "notes.rmkv"
    printed("read", tmp_path / "book.txt", "--model", folder, "--out", notes, "--dtype", read_in)
    saved, expected = load_file(notes), read_prompt(by_type[read_in], tokenizer, TEXT * 10).state.tensors()
    for name, x in expected.items():
        assert saved[f"state.{name}"].dtype == x.dtype
        assert torch.equal(saved[f"state.{name}"], x)
    going_on = ["--model", folder, "--state", notes, "--dtype", go_on_in]
    text = printed("generate", *going_on, "--prompt", "the", "--seed", 7, "--max-tokens", 60)
    model = by_type[go_on_in]
    prompt = read_prompt(model, tokenizer, "the", load_notes(notes, model, tokenizer))
    assert text == written(model, tokenizer, prompt) + "\n"


def test_a_chat_in_bfloat16_resumes_in_float32(folder, models, tmp_path, shown):
    notes = tmp_path / "notes.rmkv"
    chat = ["chat", "--model", folder, "--state", notes, "--seed", 3, "--max-tokens", 20]
    shown(*chat, *BF16, stdin=b"the cat\n")
    assert load_file(notes)["state.keys.0"].dtype == torch.bfloat16
    messages = int(load_notes(notes, models[0], models[2]).state.position)
    assert "continuing from" in shown(*chat, stdin=b"the dog\n").err
    assert load_file(notes)["state.keys.0"].dtype == torch.float32
    assert int(load_notes(notes, models[0], models[2]).state.position) > messages


@pytest.mark.slow
def test_the_loss_of_a_trained_model_hardly_changes(trained, printed):
    run, data = trained
    ask = ["eval", "--model", run, "--data", data, "--json"]
    wide, narrow = (json.loads(printed(*ask, *more)) for more in ((), BF16))
    documents, tokenizer = Documents.open(data, "validation"), Tokenizer.load(run / "latest")
    model = RMKV.from_pretrained(run, dtype=torch.bfloat16)
    narrow_alone = {key: narrow[key] for key in narrow if key not in ("memory", "beside", "ngram")}
    assert narrow_alone == json.loads(json.dumps(asdict(measure(model, documents, tokenizer=tokenizer))))
    assert wide["bits_per_byte"] < 1  # an untrained model has about 4
    assert 0 < abs(narrow["bits_per_byte"] - wide["bits_per_byte"]) < BITS
    assert abs(narrow["memory"]["reset_cost_bits_per_byte"] - wide["memory"]["reset_cost_bits_per_byte"]) < BITS


@pytest.mark.slow
def test_a_run_keeps_the_evaluations_of_both_dtypes(trained, printed):
    run, data = trained
    task = ["--task", "recall", "--set", "segments=[1]", "--set", "pairs=[1]", "--set", "segment_length=40"]
    for more in ((), BF16):
        printed("eval", "--model", run, "--data", data, "--no-memory", *more)
        printed("eval", "--model", run, *task, "--examples", 2, *more)
    names = {path.name for path in (run / "evaluations").iterdir()}
    recall = "recall-pairs=1-segment_length=40-segments=1-examples=2"
    for name in ("validation-no-memory", recall):
        assert {f"{name}.json", f"{name}-dtype=bf16.json"} <= names
    printed("report", run, "--out", data.parent / "report")
    assert "validation-no-memory-dtype=bf16" in (data.parent / "report" / "report.md").read_text()


def test_the_harness_scores_the_bfloat16_model(folder, tmp_path, printed, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}.items():
        monkeypatch.setenv(name, value)
    make_custom_tasks(tmp_path, ["the"] * len(QUESTIONS))
    ask = ["eval", "--model", folder, "--harness", "own_prose", "--include", tmp_path, "--json"]
    wide, narrow = (json.loads(printed(*ask, *more))["scores"][0]["value"] for more in ((), BF16))
    assert 0 < abs(wide - narrow) < 0.01 * wide


@pytest.mark.slow
def test_a_server_answers_in_bfloat16(folder, models):
    command = [sys.executable, "-m", "rmkv_cli", "serve", "--model", str(folder), "--port", "0", *BF16]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())[0]
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=9) as client:
                asked = {"prompt": TEXT, "seed": 7, "max_tokens": 60, "temperature": 0.8, "top_p": 0.95}
                answer = client.completions.create(model="small", **asked).choices[0].text
        finally:
            process.send_signal(signal.SIGKILL)
    wide, narrow, tokenizer = models
    assert answer == written(narrow, tokenizer) != written(wide, tokenizer)


def test_an_exported_folder_has_the_dtype_and_so_has_the_imported_one(folder, models, tmp_path, printed):
    printed("export", "hf", tmp_path / "out", "--model", folder, *BF16)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, x in models[1].state_dict().items():
        assert found[f"model.{name}"].dtype == (torch.bfloat16 if is_narrow(name) else torch.float32)
        assert torch.equal(found[f"model.{name}"], x)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    printed("import", "hf", tmp_path / "out", "--out", tmp_path / "back")
    assert layout(load_file(tmp_path / "back" / "model.safetensors")) == layout(models[1].state_dict())


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "a"),
        ("chat",),
        ("read", "-", "--out", "notes.rmkv"),
        ("serve", "--port", 0),
        ("eval", "--data", "a.txt"),
        ("eval", "--task", "recall"),
        ("eval", "--harness", "own_choice"),
        ("export", "hf", "out"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_an_unknown_dtype_is_one_line(folder, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    line = error_of(monkeypatch, capsys, *command, "--model", folder, "--dtype", "float16")
    assert line == "error: --dtype float16: should be auto, fp32 or bf16"
    assert not list(tmp_path.iterdir())
