"""Damage to a run, its disk or its data is reported in one line, and the run resumes and ends the same."""

import os
import pickle
import re
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import pytest
import torch
from compare_runs import assert_same_run, curve, stop_at
from small_run import error_of
from torch.distributed.checkpoint.metadata import MetadataIndex

from rmkv_cli.cli.main import main
from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.model import find_model
from rmkv_cli.model.pretrained import write_checksums
from rmkv_cli.tokenizer import train_tokenizer
from rmkv_cli.training import loop, memory, resolve_device, train
from rmkv_cli.training.memory import memory_errors_explained, require_memory
from rmkv_cli.training.trainer import Trainer


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(tokens=600)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", flip),
        ("training/__0_0.distcp", flip),
        ("training/.metadata", cut),
        ("training/progress.pt", Path.unlink),
        ("checksums.json", Path.unlink),
    ],
    ids=["weights cut", "a bit of the weights", "optimizer", "index", "progress gone", "checksums gone"],
)
def test_a_damaged_checkpoint_is_skipped_and_reported(config, whole, stopped, capsys, name, damage):
    newest = find_model(stopped)
    damage(newest / name)
    train(config, stopped, resume=True)
    assert f"{newest}: {name} is damaged; falling back to the previous checkpoint" in capsys.readouterr().err
    assert_same_run(whole, stopped)


class Act:
    """An object whose pickle calls a function when loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_size(size):
    """Return a function that gives all tensors of an index the shape `size`."""

    def change(index):
        for found in index.state_dict_metadata.values():
            found.size = torch.Size(size)
        return index

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: Act(os.mkdir, "acted"), "it names posix.mkdir, which could run code"),
        (lambda index: [index, Act(eval, "__import__('os').mkdir('acted')")], "it names builtins.eval, which"),
        (lambda index: Act(getattr, torch.Size, "numel"), "it asks for 'numel' of"),
        (lambda index: index.state_dict_metadata, "it contains a dict"),
        (lambda index: None, "it contains a NoneType"),
        (with_size([1 << 40]), r"has the shape \(1099511627776,\), which the files do not contain"),
        (with_size([-1, 8]), r"has the shape \(-1, 8\), which"),
    ],
    ids=["a call", "a call inside", "an attribute", "another object", "nothing", "too large", "negative"],
)
def test_an_index_that_was_tampered_with_runs_no_code(stopped, tmp_path, monkeypatch, capsys, change, says):
    """The checksum matches, because an attacker who changes the index can change the checksum as well."""
    newest = find_model(stopped)
    path = newest / "training" / ".metadata"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))
    write_checksums(newest)
    monkeypatch.chdir(tmp_path)
    line = error_of(monkeypatch, capsys, "train", "--resume", "--run", stopped)
    assert re.match(rf"error: {path}: is damaged, or not an index that rmkv wrote: .*{says}", line)
    assert not (tmp_path / "acted").exists()


def test_an_index_of_an_early_python_3_11_is_read(stopped, whole, config):
    """Before 3.11.4, Python pickled a member of an enumeration as a call of getattr."""

    class Early(pickle.Pickler):
        def reducer_override(self, found):
            return (getattr, (type(found), found.name)) if isinstance(found, Enum) else NotImplemented

    newest = find_model(stopped)
    path = newest / "training" / ".metadata"
    index = pickle.loads(path.read_bytes())
    with path.open("wb") as file:
        Early(file).dump(index)
    assert b"getattr" in path.read_bytes()
    write_checksums(newest)
    train(config, stopped, resume=True)
    assert_same_run(whole, stopped)


def test_moments_of_weights_that_the_run_does_not_train_are_reported(stopped, monkeypatch, capsys):
    newest = find_model(stopped)
    path = newest / "training" / ".metadata"
    index = pickle.loads(path.read_bytes())
    own, other = "optimizer.embedding.weight.exp_avg", "optimizer.another.weight.exp_avg"
    index.state_dict_metadata[other] = index.state_dict_metadata.pop(own)
    for key in [key for key in index.storage_data if key.fqn == own]:
        index.storage_data[MetadataIndex(other, key.offset, key.index)] = index.storage_data.pop(key)
    path.write_bytes(pickle.dumps(index))
    write_checksums(newest)
    line = error_of(monkeypatch, capsys, "train", "--resume", "--run", stopped)
    assert line == f"error: {newest}: has moments of 'another.weight', which the run does not train"


@pytest.mark.parametrize(
    "bytes_", [b"", b"PK\x03\x04", pickle.dumps(Act(os.mkdir, "acted"))], ids=["cut", "a zip", "a call"]
)
def test_progress_that_was_tampered_with_runs_no_code(stopped, tmp_path, monkeypatch, capsys, bytes_):
    newest = find_model(stopped)
    path = newest / "training" / "progress.pt"
    path.write_bytes(bytes_)
    write_checksums(newest)
    monkeypatch.chdir(tmp_path)
    assert error_of(monkeypatch, capsys, "train", "--resume", "--run", stopped).startswith(
        f"error: {path}: is damaged: "
    )
    assert not (tmp_path / "acted").exists()


def test_missing_links_are_recreated(config, whole, stopped):
    (stopped / "latest").unlink()
    (stopped / "best").unlink()
    train(config, stopped, resume=True)
    assert_same_run(whole, stopped)
    assert (stopped / "latest").resolve() == find_model(stopped).resolve()


def test_a_damaged_line_of_the_metrics_loses_no_other(config, whole, stopped):
    """Bytes that are no text in the middle, and a last line that a kill cut in half."""
    first, second, *rest = (stopped / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_bytes(b"".join([first, b"\xff" + second, *rest, b'{"step": 8, "lo']))
    train(config, stopped, resume=True)
    assert curve(stopped) == [record for record in curve(whole) if record["step"] != 2]


@contextmanager
def limited(what, most):
    """Lower a limit of this process for a while."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


@pytest.mark.parametrize(
    ("size", "file"),
    [(100, "metrics.jsonl"), (6_000, "model.safetensors"), (70_000, "training")],
    ids=["metrics", "weights", "optimizer"],
)
def test_a_disk_that_fills_up_during_training_loses_no_checkpoint(config, whole, tmp_path, monkeypatch, size, file):
    """From step 5 on no file can pass a size: what is written next, or at the next checkpoint, finds no room."""
    run, take = tmp_path / "run", Trainer.train_step

    def filling(self):
        if self.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return take(self)

    with monkeypatch.context() as patched, limited(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY):
        patched.setattr(Trainer, "train_step", filling)
        with pytest.raises(UserError, match=f"{file}: cannot be written: ") as error:
            train(config, run)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    train(config, run, resume=True)
    assert_same_run(whole, run)


def test_a_second_ctrl_c_ends_it_at_once_and_leaves_the_checkpoint_before(config, whole, tmp_path, monkeypatch):
    """Both come while the checkpoint of step 6 is begun; test_saving.py has those that come while it is written."""
    run, fill = tmp_path / "run", loop._Job.fill

    def interrupted(self, folder):
        if self.trainer.step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return fill(self, folder)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Job, "fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    train(config, run, resume=True)
    assert_same_run(whole, run)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads how much memory this process has")
def test_exhausted_memory_is_reported(make_config, tmp_path):
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    config = make_config(model={"segment_length": 1024}, batch_size=16, micro_batch_size=16, segments_min=4)
    with (
        limited(resource.RLIMIT_AS, taken + 250_000_000),
        pytest.raises(UserError, match=r"the machine's memory is full: lower train.micro_batch_size \(16\), or model"),
    ):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_exhausted_gpu_memory_is_reported(make_config, error):
    with (
        pytest.raises(UserError, match=r"the GPU's memory is full: lower train"),
        memory_errors_explained(make_config()),
    ):
        raise error
    with pytest.raises(RuntimeError, match="another"), memory_errors_explained(make_config()):
        raise RuntimeError("another")


def test_a_warning_names_a_gpu_that_may_be_too_small(make_config, monkeypatch, capsys):
    monkeypatch.setattr(memory, "total_memory", lambda device: 1000)
    require_memory(make_config(), 4, "cuda")
    assert capsys.readouterr().err.startswith("warning: training needs about 0.0 GB of memory")
    with pytest.raises(UserError, match="training needs about"):
        require_memory(make_config(), 4, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_a_missing_gpu_is_reported():
    with pytest.raises(UserError, match="device = 'cuda': PyTorch finds no GPU on this machine; use 'auto' or 'cpu'"):
        resolve_device("cuda")


def test_a_damaged_config_is_reported_and_repaired(config, whole, stopped, monkeypatch, capsys):
    file = stopped / "config.toml"
    before = file.read_bytes()
    cut(file)
    line = error_of(monkeypatch, capsys, "train", "--resume", "--run", stopped)
    assert line.startswith(f"error: {file}: not valid TOML: ")
    file.write_bytes(before)
    train(config, stopped, resume=True)
    assert_same_run(whole, stopped)


@pytest.fixture
def copied(data, tmp_path):
    """A copy of the data, to be damaged."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def on(config, data):
    """The config with other data."""
    return config.model_copy(update={"train": config.train.model_copy(update={"data": str(data)})})


def test_moved_data_are_found_with_data(config, whole, copied, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        run = train(on(config, copied), tmp_path / "run").run
    capsys.readouterr()
    copied.rename(tmp_path / "elsewhere")
    line = error_of(monkeypatch, capsys, "train", "--resume", "--run", run)
    assert line == f"error: {copied}: is not a mix (it has no manifest.json); `rmkv data mix` makes one"
    monkeypatch.setattr(
        sys, "argv", ["rmkv", "train", "--resume", "--run", str(run), "--data", f"{tmp_path}/elsewhere"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert_same_run(whole, run)


def test_another_tokenizer_is_refused(config, copied, tmp_path):
    train_tokenizer(iter(["other words"]), 263).save(copied / "tokenizer.json")
    with pytest.raises(UserError, match=r"its tokenizer\.json is not the one that prepared the data"):
        train(on(config, copied), tmp_path / "run")


def test_an_overwritten_shard_is_reported(config, copied, whole, tmp_path):
    """Bytes of a shard are overwritten."""
    shard = copied / "train-00000.arrow"
    documents = Documents.open(copied, "train")
    before, tokens = shard.read_bytes(), documents[8].tobytes()
    damaged = before.replace(tokens, b"\xff" * len(tokens))
    assert damaged != before
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match=r"train-00000.arrow: is damaged \(its content does not match its SHA-256\)"):
        train(on(config, copied), tmp_path / "run")
    shard.write_bytes(before)
    train(on(config, copied), tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")
