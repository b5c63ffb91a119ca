import json
import shutil
from dataclasses import asdict

import pytest
import torch
from small_run import TEXT, error_of, save_small_model
from small_transformer import save_transformer

from rmkv_cli.config import MemoryConfig, MixConfig, parse
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.mix import prepare
from rmkv_cli.evaluation import measure, measure_baseline, memory_effect
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Tokenizer

ROWS = "[b]x[/i]:cat:"  # what the terminal library takes for markup


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, files, a mix.toml of them, the prepared mix, and another model's folder."""
    place = tmp_path_factory.mktemp("eval")
    _, tokenizer = save_small_model(place / "model")
    save_small_model(place / "other", text="an entirely different text, 1 2 3. ")
    for i in range(12):
        (place / f"cat{i}.txt").write_text(TEXT * (i // 3) + f"ünd so {i}")
    rows = [json.dumps({"text": f"{i}: {TEXT}"}) for i in range(20)]
    (place / "rows.jsonl").write_text("\n".join(rows))
    sources = [
        {"kind": "files", "name": "cats", "weight": 1, "files": ["cat*.txt"]},
        {"kind": "files", "name": ROWS, "weight": 1, "files": ["rows.jsonl"]},
    ]
    prepare(parse(MixConfig, {"validation": 0.4, "sources": sources}, "mix"), place, tokenizer, place / "mix", 1)
    toml = [f"[[sources]]\nkind = 'files'\nname = '{s['name']}'\nweight = 1\nfiles = {s['files']}\n" for s in sources]
    (place / "mix.toml").write_text("\n".join(toml))
    return place


def test_json_contains_the_figures_of_a_mix_and_of_the_memory(place, printed):
    ask = ["eval", "--model", place / "model", "--data", place / "mix"]
    figures = json.loads(printed(*ask, "--json", "--device", "cpu"))
    model, tokenizer = RMKV.from_pretrained(place / "model"), Tokenizer.load(place / "model")
    documents = Documents.open(place / "mix", "validation")
    expected = json.loads(json.dumps(asdict(measure(model, documents, tokenizer=tokenizer))))
    effect = figures.pop("memory")
    assert figures.pop("beside") is None
    assert figures.pop("ngram") == pytest.approx(asdict(measure_baseline(place / "mix", tokenizer)))
    assert figures.keys() == expected.keys()
    assert figures["loss"] == pytest.approx(expected["loss"])
    assert set(figures["by_source"]) == {"cats", ROWS}
    for name, score in expected["by_source"].items():
        assert figures["by_source"][name] == pytest.approx(score)
    for part, other in zip(figures["by_position"], expected["by_position"], strict=True):
        assert part == pytest.approx(other)
    assert figures["bytes"] == documents.sizes.sum()
    assert effect == pytest.approx(asdict(memory_effect(model, documents, tokenizer=tokenizer)))


def test_without_its_training_documents_a_mix_has_no_baseline(place, tmp_path, shown):
    ask = ["eval", "--model", place / "model", "--no-memory", "--data"]
    assert "order-3" in shown(*ask, place / "mix").out
    shutil.copytree(place / "mix", tmp_path / "mix")
    for shard in (tmp_path / "mix").glob("train-*"):
        shard.unlink()
    wrote = shown(*ask, tmp_path / "mix")
    assert "order-3" not in wrote.out
    assert "note: no n-gram for comparison: " in wrote.err
    assert ROWS in wrote.out


def test_tables_of_a_text_file(place, shown):
    file = place / "cat11.txt"
    wrote = shown("eval", "--model", place / "model", "--data", file, "--max-tokens", 50)
    for word in ("perplexity", "bits per byte", "position in document", "0 to 49", "1 of them cut"):
        assert word in wrote.out
    assert "n-gram" not in wrote.out  # a file has no training documents
    assert "at least 2 documents of more than a segment (8 tokens)" in wrote.err  # no memory effect of one document
    assert "Read: 50 of" in wrote.out


def test_a_mix_toml_is_read_from_its_sources(place, printed):
    figures = json.loads(printed("eval", "--model", place / "model", "--data", place / "mix.toml", "--json"))
    assert {name: score["documents"] for name, score in figures["by_source"].items()} == {"cats": 12, ROWS: 20}


def test_a_model_that_is_not_causal_is_measured_with_a_warning(place, tmp_path, shown):
    save_small_model(tmp_path, memory=MemoryConfig(slots=2, carry="layers", store=0))
    wrote = shown("eval", "--model", tmp_path, "--data", place / "mix", "--split", "train")
    assert "this loss is not that of a causal model" in wrote.err
    assert ROWS in wrote.out
    assert "bits per byte" in wrote.out
    assert "another document's" not in wrote.out


def test_bad_input_is_one_line(place, tmp_path, monkeypatch, capsys):
    def error(model, data, *rest):
        return error_of(monkeypatch, capsys, "eval", "--model", model, "--data", data, *rest)

    model, mix = place / "model", place / "mix"
    assert "no such folder" in error(place / "absent", mix)
    assert "not a model folder" in error(mix, mix)
    assert "no such file" in error(model, place / "absent.txt")
    assert "is not a mix" in error(model, model)
    assert "was made with a different tokenizer than that of" in error(place / "other", mix)
    assert "max_tokens: should be 1 or more" in error(model, mix, "--max-tokens", "0")
    (tmp_path / "empty.txt").touch()
    assert "is empty" in error(model, tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\x80\x00")
    assert "binary.txt" in error(model, tmp_path / "binary.txt")
    save_small_model(tmp_path / "small", vocab_size=270)
    assert "the tokenizer has 280 tokens, the model only 270" in error(tmp_path / "small", mix)
    broken, _ = save_small_model(tmp_path / "broken")
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    assert "its loss is nan" in error(tmp_path / "broken", mix)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The folder of a small transformer."""
    folder = tmp_path_factory.mktemp("other") / "llama"
    save_transformer(folder, "Llama", dtype=torch.float32)
    return folder


class TestBeside:
    def test_tables_show_both_models(self, place, other, shown):
        ask = ["eval", "--model", place / "model", "--data", place / "cat11.txt", "--beside", other]
        printed = shown(*ask).out
        for words in ("comparison", "bits per byte", "loss from position 0", "largest state, or cache"):
            assert words in printed

    def test_json_contains_the_other_model(self, place, other, printed):
        ask = ["eval", "--model", place / "model", "--data", place / "mix", "--beside", other, "--json"]
        figures = json.loads(printed(*ask))
        assert figures["beside"]["name"] == str(other)
        assert figures["beside"]["documents"] == figures["documents"]
        assert figures["beside"]["reading"].keys() == figures["beside"]["own"].keys()

    def test_bad_input_is_one_line(self, place, tmp_path, monkeypatch, capsys):
        ask = ["eval", "--model", place / "model", "--data", place / "cat11.txt", "--beside"]
        assert "no such folder, and not a name on the hub" in error_of(monkeypatch, capsys, *ask, "a/b/c")
        (tmp_path / "config.json").write_text("{}")
        assert "transformers cannot load it: " in error_of(monkeypatch, capsys, *ask, tmp_path)
        monkeypatch.setattr("rmkv_cli.evaluation.transformer.find_spec", lambda name: None)
        assert "loading it requires transformers: pip install" in error_of(monkeypatch, capsys, *ask, tmp_path)
        assert "--beside do not apply to --task" in error_of(monkeypatch, capsys, *ask, tmp_path, "--task", "recall")
