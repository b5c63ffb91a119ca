"""Several processes train as one does: the same rows, the same curve, the same ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from compare_runs import TIMES, assert_same_run
from job import ranks, torchrun
from safetensors.torch import load_file

from rmkv_cli.config import MixConfig, dump_toml, load_config, preset_path
from rmkv_cli.data.lanes import Lanes
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.training import train
from rmkv_cli.training.data import open_data
from rmkv_cli.training.metrics import read_metrics

OTHER = {"ddp": "fsdp", "fsdp": "ddp"}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def written(make_config, tmp_path):
    """Write a config of 6 steps or so, whose micro-batches are single lanes; return it and its file."""

    def write(**train):
        config = make_config(**{"micro_batch_size": 1, "tokens": 400} | train)
        file = tmp_path / "config.toml"
        file.write_text(dump_toml(config))
        return config, file

    return write


def assert_same_curve(run, other, precision):
    """Compare all that metrics.jsonl has of two runs, times apart; rounding shows in a gradient's norm first."""
    records, others = (read_metrics(folder / "metrics.jsonl") for folder in (run, other))
    assert len(records) == len(others)
    for record, its in zip(records, others, strict=True):
        assert record.keys() == its.keys()
        flat, expected = flatten(record), flatten(its)
        norm, its = flat.pop("grad_norm", 0), expected.pop("grad_norm", 0)
        assert flat == pytest.approx(expected, rel=precision)
        assert norm == pytest.approx(its, rel=10 * precision)


def flatten(record):
    left_out = TIMES | {"validation", "sample"}  # a sample is words, and rounding may change a draw
    return {key: x for key, x in (record | record.get("validation", {})).items() if key not in left_out}


@pytest.mark.slow
def test_two_processes_share_the_rows_and_give_the_curve_of_one(forker, written, float64, tmp_path, data):
    config, file = written(optimizer="muon")
    whole = train(config, tmp_path / "whole").run
    (tmp_path / "rows").mkdir()
    epochs = config.train.tokens / Manifest.load(data).splits["train"].tokens  # both processes compute their tokens
    command = ("train", "--config", file, "--run", tmp_path / "run", "--set", f"train.epochs={epochs}")
    job = ranks(forker, 2, *command, FLOAT64=1, ROWS=tmp_path / "rows")
    assert job.returncode == 0, job.stderr
    assert_same_curve(tmp_path / "run", whole, 1e-10)

    records = [record for record in read_metrics(whole / "metrics.jsonl") if "segments" in record]
    with open_data(config, whole) as data:
        lanes = Lanes(data.queue, 4, data.tokenizer.eod)
        for step, record in enumerate(records):
            rows = lanes.next(8 * record["segments"])
            parts = [np.load(tmp_path / "rows" / f"{step:03d}-{rank}.npy") for rank in (0, 1)]
            assert np.array_equal(np.concatenate(parts, axis=1), np.stack([*vars(rows).values()]))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), [("fsdp", 2), ("ddp", 4), ("fsdp", 4)])  # the test above: ddp on 2
def test_any_number_of_processes_gives_the_curve_of_one(forker, written, float64, tmp_path, how, count):
    assert_same_as_one(forker, written(distributed=how), tmp_path, count, 1e-10, FLOAT64=1)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), [("fsdp", 2), ("ddp", 4), ("fsdp", 4)])
def test_in_float32_the_curve_is_the_same_but_for_rounding(forker, written, tmp_path, how, count):
    assert_same_as_one(forker, written(distributed=how), tmp_path, count, 1e-5)


def assert_same_as_one(forker, configured, folder, count, precision, **wishes):
    config, file = configured
    whole, run = train(config, folder / "whole").run, folder / "run"
    job = ranks(forker, count, "train", "--config", file, "--run", run, **wishes)
    assert job.returncode == 0, job.stderr
    assert_same_curve(run, whole, precision)
    sizes = [(find_model(folder) / "model.safetensors").stat().st_size for folder in (run, whole)]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_experts_and_their_balance_train_the_same_on_two_processes(forker, written, float64, tmp_path, how):
    config, file = written(model={"experts": 4, "expert_size": 8}, distributed=how, optimizer="muon")
    whole = train(config, tmp_path / "whole").run
    assert ranks(forker, 2, "train", "--config", file, "--run", tmp_path / "run", FLOAT64=1).returncode == 0
    assert_same_curve(tmp_path / "run", whole, 1e-10)
    balances = [RMKV.from_pretrained(run).blocks[0].experts.balance for run in (whole, tmp_path / "run")]
    assert balances[0].abs().min() > 0
    torch.testing.assert_close(*balances)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_run_resumes_with_another_number_of_processes(forker, written, float64, tmp_path, how):
    """It begins on one, resumes on four until one of them gets a SIGTERM, then on one, and on two the other way."""
    config, file = written(distributed=how, tokens=600)
    whole = train(config, tmp_path / "whole").run
    first, run = tmp_path / "first", tmp_path / "run"
    assert ranks(forker, 1, "train", "--config", file, "--run", first, FLOAT64=1, STOP="0 3").returncode == 0
    shutil.copytree(first, run, symlinks=True)
    job = ranks(forker, 4, "train", "--resume", "--run", run, FLOAT64=1, STOP="3 7")
    assert job.returncode == 0, job.stderr
    assert job.stdout == f"{run}: {tokens_at(whole, 7)} tokens in 7 steps\n"
    shutil.copytree(run, tmp_path / "two", symlinks=True)

    train(config, run, resume=True)
    assert_same_curve(run, whole, 1e-10)
    other = config.model_copy(update={"train": config.train.model_copy(update={"distributed": OTHER[how]})})
    (tmp_path / "two" / "config.toml").write_text(dump_toml(other))
    assert ranks(forker, 2, "train", "--resume", "--run", tmp_path / "two", FLOAT64=1).returncode == 0
    assert_same_curve(tmp_path / "two", whole, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_stopped_and_resumed_on_as_many_processes_is_bit_for_bit_the_same(forker, written, tmp_path, how):
    """Each of two processes accumulates two micro-batches a step; one of them gets a SIGTERM in step 3.

    In float32, in which the curve is that of one process but for rounding.
    """
    config, file = written(distributed=how)
    whole, run = tmp_path / "whole", tmp_path / "run"
    for start, wishes in (
        (("--config", file, "--run", whole), {}),
        (("--config", file, "--run", run), {"STOP": "1 3"}),
        (("--resume", "--run", run), {}),
    ):
        job = ranks(forker, 2, "train", *start, **wishes)
        assert job.returncode == 0, job.stderr
    assert_same_run(whole, run)
    assert_same_curve(whole, train(config, tmp_path / "one").run, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_preset_600m_trains_sharded_and_gives_the_curve_of_one_process(forker, written, float64, tmp_path, count):
    """Its settings at a tiny size. With 3 ranks the shards are uneven, and the last round has fewer matrices."""
    preset = load_config(preset_path("600m"))
    tiny = {"vocab_size": 300, "hidden_size": 18, "num_hidden_layers": 3, "intermediate_size": 48}
    model = preset.model.model_dump() | tiny | {"segment_length": 8, "lookback": 2}
    model["memory"]["slots"] = 4
    config, file = written(model=model, distributed="fsdp", optimizer=preset.train.optimizer, batch_size=12, tokens=600)
    whole = train(config, tmp_path / "whole").run
    run = tmp_path / "run"
    job = ranks(forker, count, "train", "--config", file, "--run", run, FLOAT64=1)
    assert job.returncode == 0, job.stderr
    assert_same_curve(run, whole, 1e-10)


@pytest.mark.slow
def test_muon_s_momentum_moves_between_sharded_and_whole(forker, written, float64, tmp_path):
    """Begun by one process, continued sharded over three, then replicated on two."""
    config, file = written(distributed="fsdp", optimizer="muon", batch_size=12, tokens=1200)
    whole = train(config, tmp_path / "whole").run
    run = tmp_path / "run"
    assert ranks(forker, 1, "train", "--config", file, "--run", run, FLOAT64=1, STOP="0 2").returncode == 0
    job = ranks(forker, 3, "train", "--resume", "--run", run, FLOAT64=1, STOP="1 4")
    assert job.returncode == 0, job.stderr
    other = config.model_copy(update={"train": config.train.model_copy(update={"distributed": "ddp"})})
    (run / "config.toml").write_text(dump_toml(other))
    assert ranks(forker, 2, "train", "--resume", "--run", run, FLOAT64=1).returncode == 0
    assert_same_curve(run, whole, 1e-10)


def tokens_at(run, step):
    return next(record["tokens"] for record in read_metrics(run / "metrics.jsonl") if record["step"] == step)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_ends_the_step_everywhere_and_saves(written, tmp_path, number, code):
    _, file = written(tokens=100_000)
    run = tmp_path / "run"
    with launched(file, run) as job:
        job.send_signal(number)
        _, messages = job.communicate()
    assert job.returncode == code
    assert messages.endswith(f"stopped; resume with: rmkv train --resume --run {run}\n")
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl")]
    assert find_model(run, training=True).name == f"step-{steps[-1]:08d}"


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job_and_is_named(written, tmp_path):
    _, file = written(tokens=100_000)
    with launched(file, tmp_path / "run") as job:
        os.kill(worker(job, rank=1), signal.SIGKILL)
        _, messages = job.communicate()
    assert job.returncode == 1
    assert "error: rank 1 failed first (killed by SIGKILL) and ended the job; resume with: rmkv train" in messages
    assert "Traceback" not in messages

    with launched(file, tmp_path / "other", "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "--") as job:
        os.kill(worker(job, rank=1), signal.SIGKILL)
        _, messages = job.communicate()
    assert job.returncode == 1
    assert "rank      : 1" in messages.partition("Root Cause")[2]


@pytest.mark.slow
def test_ranks_wait_for_rank_0_longer_than_for_each_other(forker, written, tmp_path):
    _, file = written(tokens=300)
    job = ranks(forker, 2, "train", "--config", file, "--run", tmp_path / "run", "--json", TIMEOUT=5, LATE=6)
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout)["finished"]


@pytest.mark.slow
def test_a_silent_rank_0_ends_the_job(written, tmp_path):
    """No connection breaks, as when a machine loses its power, and the others are waiting for it."""
    _, file = written()
    job = torchrun(2, "train", "--config", file, "--run", tmp_path / "run", TIMEOUT=5, FROZEN=1)
    assert job.returncode == 1
    assert "error: rank 0 has not responded for 0:00:05; check its machine, then resume with --resume" in job.stderr
    assert "rank      : 1" in job.stderr.partition("Root Cause")[2]


def launched(file, run, *launcher):
    """Start a job of two processes, by `--nproc` or by a launcher; return it as soon as it has taken three steps."""
    launcher, more = (launcher, ()) if launcher else (("-m",), ("--nproc", "2"))
    command = [sys.executable, *launcher, "rmkv_cli", "train", "--config", file, "--run", run, *more]
    job = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= 3):
        time.sleep(0.05)
    return job


def worker(job, rank):
    """Return the process id of a rank, which is a child of the job's."""
    with open(f"/proc/{job.pid}/task/{job.pid}/children") as children:  # noqa: PTH123
        for pid in children.read().split():
            with open(f"/proc/{pid}/environ") as environment:  # noqa: PTH123
                if f"RANK={rank}" in environment.read().split("\0"):
                    return int(pid)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "launcher"), [("ddp", True), ("fsdp", False)])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_one_report(forker, written, tmp_path, how, launcher):
    """Rank 1's gradient is poisoned; what is saved is the whole job's."""
    _, file = written(distributed=how)
    launch = torchrun if launcher else partial(ranks, forker)
    job = launch(2, "train", "--config", file, "--run", tmp_path / "run", POISON="1 3")
    assert job.returncode == (1 if launcher else 3)  # torchrun's own, or the rank's
    assert job.stderr.count("error: step 3: not a finite number: loss nan") == 1
    failed = tmp_path / "run" / "failed" / "step-00000003"
    assert RMKV.from_pretrained(failed).config.hidden_size == 16
    rows = load_file(failed / "rows.safetensors")
    assert {len(x) for x in rows.values()} == {4}
    report = json.loads((failed / "report.json").read_text())
    assert {"embedding.weight", "norm.bias"} <= report["gradient_norms"].keys()
    assert find_model(tmp_path / "run").name == "step-00000002"


@pytest.mark.slow
def test_only_rank_0_decides_which_steps_are_bad(forker, written, float64, tmp_path):
    config, file = written(on_bad_step="skip")
    whole = train(config, tmp_path / "whole").run
    job = ranks(forker, 2, "train", "--config", file, "--run", tmp_path / "unheard", FLOAT64=1, ALARM=1)
    assert job.returncode == 0, job.stderr
    assert_same_curve(tmp_path / "unheard", whole, 1e-10)
    job = ranks(forker, 2, "train", "--config", file, "--run", tmp_path / "heard", FLOAT64=1, ALARM=0)
    assert job.returncode == 0, job.stderr
    records = [record for record in read_metrics(tmp_path / "heard" / "metrics.jsonl") if "segments" in record]
    assert [record.get("bad_step") for record in records] == [None] + ["an alarm"] * (len(records) - 1)


@pytest.mark.slow
def test_faults_that_only_some_ranks_find_are_reported_once(forker, written, streams, tmp_path):
    """Lanes that cannot be shared out evenly, a bad step, a record that only rank 0 finds to be broken, and a
    held-out document that only rank 1 does."""
    _, file = written(batch_size=6, micro_batch_size=2)
    command = [sys.executable, "-m", "rmkv_cli", "train", "--nproc", "2", "--config", file, "--run", tmp_path / "run"]
    job = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (job.returncode, job.stderr) == (
        2,
        "error: train.batch_size = 6 is not a multiple of train.micro_batch_size = 2 times 2 processes; change one of "
        "them\n",
    )

    _, file = written(learning_rate=1e30, warmup=0.0)
    job = ranks(forker, 2, "train", "--config", file, "--run", tmp_path / "bad")
    assert job.returncode == 3
    (line,) = (line for line in job.stderr.splitlines() if line.startswith("error: "))
    assert "not a finite number" in line

    _, file = written(**streams('{"text": "a story"}\n' * 99 + '{"text": ', on_error="stop"))
    job = ranks(forker, 2, "train", "--config", file, "--run", tmp_path / "run")
    assert job.returncode == 2
    (line,) = (line for line in job.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {tmp_path}/story.jsonl:100: is not valid JSON")

    _, file = written()
    job = ranks(forker, 2, "train", "--config", file, "--run", tmp_path / "broken", BROKEN=1)
    (line,) = (line for line in job.stderr.splitlines() if line.startswith("error: "))
    assert line == "error: document 3 of the data is damaged"


@pytest.mark.slow
def test_the_end_of_the_data_ends_the_job(forker, written, streams, data, float64, tmp_path):
    places = streams((data.parent / "story.jsonl").read_text(), when_dry="stop")
    seldom = {"checkpoint_every": 1000, "eval_every": 1000}
    config, file = written(**places, **seldom, batch_size=16, micro_batch_size=4)
    job = ranks(forker, 2, "train", "--config", file, "--run", tmp_path / "run", "--json", FLOAT64=1)
    assert job.returncode == 0, job.stderr
    whole = train(config, tmp_path / "whole")
    assert json.loads(job.stdout)["finished"]
    assert json.loads(job.stdout)["step"] == whole.step
    assert_same_curve(tmp_path / "run", whole.run, 1e-10)


@pytest.fixture
def streams(tokenizer, tmp_path):
    """What a config needs to stream a file with these lines, and to hold out nothing."""

    def make(lines, on_error="skip", **keys):
        (tmp_path / "story.jsonl").write_text(lines)
        story = {"kind": "files", "name": "story", "weight": 1, "files": ["story.jsonl"], **keys}
        (tmp_path / "mix.toml").write_text(dump_toml(MixConfig(validation=0.0, on_error=on_error, sources=[story])))
        tokenizer.save(tmp_path / "tokenizer.json")
        places = {"mix": str(tmp_path / "mix.toml"), "tokenizer": str(tmp_path / "tokenizer.json")}
        return {"data": None, "tokens": 100_000} | places

    return make
