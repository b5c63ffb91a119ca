"""A run learns, stops, resumes, and protects its files."""

import json
import math
import re
import shutil
import signal

import pytest
import torch
from compare_runs import assert_same_run, curve, stop_at, weights
from filelock import FileLock
from safetensors.torch import load_file

from rmkv_cli.config import MixConfig, load_config
from rmkv_cli.data.mix import prepare
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import sample
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.model.pretrained import write_checksums
from rmkv_cli.training import BadStepError, loop, train


def test_a_run_learns_and_writes_its_files(make_config, tmp_path, tokenizer):
    config = make_config(tokens=1800, checkpoint_every=5, eval_every=5)
    outcome = train(config, tmp_path / "run")
    losses = [record["loss"] for record in curve(outcome.run) if "loss" in record]
    assert losses[0] == pytest.approx(math.log(300), abs=0.5)
    assert outcome.validation["loss"] < losses[0] - 1
    assert outcome.tokens >= 1800
    assert load_config(outcome.run / "config.toml") == config
    last = outcome.run / "checkpoints" / f"step-{outcome.step:08d}"
    assert (outcome.run / "latest").resolve() == last.resolve()
    names = {path.name for path in last.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "training"}
    kept = {path.name for path in (outcome.run / "checkpoints").iterdir()}
    best = (outcome.run / "best").resolve().name
    assert len(kept - {best}) <= config.train.keep_last
    assert best in kept
    assert RMKV.from_pretrained(outcome.run).count_parameters() == RMKV(config.model).count_parameters()


@pytest.mark.parametrize(
    "keys",
    [
        {"memory": {"cell": "lstm"}, "precision": "bf16"},
        pytest.param({"model": {"dropout": 0.2}}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "muon", "model": {"experts": 4, "expert_size": 8}}, marks=pytest.mark.slow),
        pytest.param({"data": "phases", "micro_batch_size": 2}, marks=pytest.mark.slow),
        pytest.param({"data": "epochs"}, marks=pytest.mark.slow),
    ],
    ids=lambda keys: "-".join(keys[key] if key == "data" else key for key in keys),
)
def test_stopped_and_resumed_is_bit_for_bit_the_same(make_config, mixes, tmp_path, monkeypatch, keys):
    """Stopped by SIGTERM after 3 and again after 6 steps, once between two checkpoints, once right after one."""
    config = make_config(**keys | ({"data": mixes(keys["data"])} if "data" in keys else {}))
    whole = train(config, tmp_path / "whole")
    stop_at(monkeypatch, 3)
    first = train(config, tmp_path / "parts")
    stop_at(monkeypatch, 6)
    second = train(config, tmp_path / "parts", resume=True)
    stop_at(monkeypatch, None)
    last = train(config, tmp_path / "parts", resume=True)
    assert (first.step, second.step, last.step) == (3, 6, whole.step)
    assert (first.exit_code, last.exit_code) == (0, 0)
    assert_same_run(whole.run, last.run)


@pytest.fixture
def mixes(data, tokenizer, tmp_path):
    """Makes a mix of two phases, the second with rows of three segments, or one that is read over and over."""

    def make(name):
        documents = 4 if name == "epochs" else None
        lines = (data.parent / "story.jsonl").read_text().splitlines(keepends=True)[:documents]
        (tmp_path / "story.jsonl").write_text("".join(lines))
        story = {"kind": "files", "name": "story", "weight": 1, "files": ["story.jsonl"]}
        phases = [{"share": 1, "segments_max": 2}, {"share": 4, "segments_min": 3, "segments_max": 3}]
        more = {"tokens": 1000, "phases": phases} if name == "phases" else {}
        prepare(MixConfig(validation=0.2, sources=[story], **more), tmp_path, tokenizer, tmp_path / name, workers=1)
        return str(tmp_path / name)

    return make


@pytest.mark.slow
def test_each_validation_continues_the_same_prompt_and_disturbs_nothing(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "TEXT_TOKENS", 16)
    config = make_config(model={"dropout": 0.2}, tokens=1000)
    samples = [r["sample"] for r in curve(train(config, tmp_path / "run").run) if "validation" in r]
    assert len(samples) > 2
    (prompt,) = {sample["prompt"] for sample in samples}
    assert re.match(r"Line \d+ of a short story", prompt)
    assert len({sample["text"] for sample in samples}) == len(samples)
    monkeypatch.setattr(loop, "write_sample", lambda *_: None)
    without = train(config, tmp_path / "without").run
    assert not any("sample" in record for record in curve(without))
    assert [{k: x for k, x in r.items() if k != "sample"} for r in curve(tmp_path / "run")] == curve(without)
    one, other = weights(tmp_path / "run"), weights(without)
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_resuming_a_finished_run_changes_nothing(make_config, tmp_path):
    outcome = train(make_config(), tmp_path / "run")
    before = curve(outcome.run)
    again = train(make_config(), tmp_path / "run", resume=True)
    assert again.step == outcome.step
    assert curve(outcome.run) == before


def test_ctrl_c_saves_and_exits_with_130(make_config, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3, number=signal.SIGINT)
    outcome = train(make_config(tokens=10_000_000), tmp_path / "run")
    assert outcome.exit_code == 130
    assert find_model(outcome.run).name == f"step-{outcome.step:08d}"


def test_a_run_without_a_whole_checkpoint_says_what_to_do(make_config, tmp_path):
    run = train(make_config(tokens=100), tmp_path / "run").run
    for weights_file in run.glob("checkpoints/*/model.safetensors"):
        weights_file.write_bytes(b"")
    with pytest.raises(UserError, match="all its checkpoints are damaged; start a new run with another --run"):
        find_model(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet; resume its training first: rmkv train --resume --run"):
        find_model(run)


def test_damaged_checkpoints_do_not_replace_good_ones(make_config, tmp_path):
    run = train(make_config(tokens=600, keep_last=1), tmp_path / "run").run
    stray = run / "checkpoints" / "step-99999999"
    (stray / "training").mkdir(parents=True)
    outcome = train(make_config(tokens=600, keep_last=1), run, resume=True)
    assert not stray.exists()
    assert find_model(run).name == f"step-{outcome.step:08d}"
    assert (run / "latest").resolve() == find_model(run).resolve()


@pytest.mark.slow
def test_a_run_resumes_with_smaller_micro_batches(make_config, tmp_path, monkeypatch):
    """What one does when the memory runs out: the lanes' states are of all lanes, however they are split."""
    whole = train(make_config(micro_batch_size=4), tmp_path / "whole")
    stop_at(monkeypatch, 3)
    run = train(make_config(micro_batch_size=4), tmp_path / "run").run
    train(make_config(micro_batch_size=1), run, resume=True)
    for one, other in zip(curve(run), curve(whole.run), strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_two_processes_do_not_train_in_one_folder(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(UserError, match="another process is training in it"):
        train(make_config(), tmp_path / "run")


def test_a_document_longer_than_learned_positions_is_found_before_training(make_config, tmp_path):
    config = make_config(model={"position": "learned", "max_position_embeddings": 50})
    with pytest.raises(UserError, match="has a document of"):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_gradient_accumulation_does_not_change_the_step(make_config, tmp_path):
    runs = [train(make_config(micro_batch_size=size, tokens=400), tmp_path / str(size)).run for size in (1, 4)]
    for one, four in zip(*map(curve, runs), strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(four["loss"], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_update(make_config, tmp_path, monkeypatch, capsys):
    begin = loop.Trainer.__init__

    def poisoned(self, *args):
        begin(self, *args)
        with torch.no_grad():
            self.model.norm.bias[0] = math.nan

    monkeypatch.setattr(loop.Trainer, "__init__", poisoned)
    with pytest.raises(BadStepError, match="step 1: not a finite number: loss nan"):
        train(make_config(), tmp_path / "run")
    with pytest.raises(BadStepError):  # it comes again, and takes the place of the first
        train(make_config(), tmp_path / "run", resume=True)
    failed = tmp_path / "run" / "failed" / "step-00000001"
    assert str(failed) in capsys.readouterr().err.replace("\n", "")
    rows = load_file(failed / "rows.safetensors")
    assert rows["input_ids"].shape == rows["targets"].shape == rows["document_ids"].shape
    report = json.loads((failed / "report.json").read_text())
    assert math.isnan(report["loss"])
    assert {"embedding.weight", "norm.bias"} <= report["gradient_norms"].keys()
    assert (failed / "training" / "progress.pt").is_file()
    model = RMKV.from_pretrained(failed)
    torch.manual_seed(0)
    assert torch.equal(model.embedding.weight, RMKV(make_config().model).embedding.weight)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_does_not_fit_is_refused(make_config, tmp_path, data):
    config = make_config()
    train(make_config(tokens=100), tmp_path / "run")
    with pytest.raises(UserError, match="a run already exists here; resume it with --resume"):
        train(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"its tokenizer has \d+ tokens, but model\.vocab_size = 100; use --set"):
        train(make_config(model={"vocab_size": 100}), tmp_path / "new")
    with pytest.raises(UserError, match="not causal"):
        train(make_config(memory={"carry": "layers", "store": 0}), tmp_path / "new")
    with pytest.raises(UserError, match="no data"):
        train(make_config(data=None), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_resuming_on_other_data_is_refused(make_config, tmp_path, tokenizer):
    train(make_config(tokens=100), tmp_path / "run")
    noise = MixConfig(tokens=500, sources=[{"kind": "noise", "name": "n", "weight": 1, "vocab": 20}])
    prepare(noise, tmp_path, tokenizer, tmp_path / "noise", workers=1)
    with pytest.raises(UserError, match="is not the data that"):
        train(make_config(tokens=100, data=str(tmp_path / "noise")), tmp_path / "run", resume=True)


def test_resuming_with_another_model_is_refused(make_config, tmp_path):
    train(make_config(tokens=100), tmp_path / "run")
    with pytest.raises(UserError, match=r"does not fit the run's config\.toml: 'blocks\.1\.store.* should be absent"):
        train(make_config(tokens=100, memory={"store": 1}), tmp_path / "run", resume=True)


def test_resuming_with_another_optimizer_is_refused(make_config, tmp_path):
    train(make_config(tokens=100), tmp_path / "run")
    with pytest.raises(UserError, match=r"config\.toml: train\.optimizer: .* has the state of 'adamw'"):
        train(make_config(tokens=100, optimizer="muon"), tmp_path / "run", resume=True)


def test_a_checkpoint_of_an_older_version_is_one_line(make_config, tmp_path):
    run = train(make_config(tokens=100), tmp_path / "run").run
    checkpoint = find_model(run)
    (checkpoint / "training" / "progress.pt").rename(checkpoint / "training" / "state.pt")
    write_checksums(checkpoint)
    with pytest.raises(UserError, match="an older version of rmkv wrote its training folder"):
        train(make_config(tokens=100), run, resume=True)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_anew(make_config, tmp_path, capsys):
    whole = train(make_config(), tmp_path / "whole")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 9')
    assert_same_run(whole.run, train(make_config(), tmp_path / "run", resume=True).run)
    assert "run: was stopped before its first checkpoint; starting from the beginning" in capsys.readouterr().err
