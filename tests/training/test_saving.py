"""A checkpoint is written while training continues, and contains the step at which it was begun."""

import signal
import threading
import time

import pytest
import torch
from compare_runs import assert_same_run
from safetensors.torch import load_file

from rmkv_cli.model.checkpoints import checkpoint_path
from rmkv_cli.training import loop, train
from rmkv_cli.training.tensors import read_tensors
from rmkv_cli.training.trainer import Trainer


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(tokens=600, checkpoint_every=4, eval_every=4)


@pytest.mark.slow
def test_steps_taken_while_a_checkpoint_is_written_do_not_change_it(config, whole, tmp_path, monkeypatch):
    """The checkpoint of step 4 is written only after step 6 was taken."""
    run, take, write, sixth = tmp_path / "run", Trainer.train_step, loop.write_model, threading.Event()

    def taken(self, *arguments):
        record = take(self, *arguments)
        if record["step"] == 6:
            assert not checkpoint_path(run, 4).exists()
            sixth.set()
        return record

    def late(*arguments):
        assert sixth.wait(60)
        write(*arguments)

    monkeypatch.setattr(Trainer, "train_step", taken)
    monkeypatch.setattr(loop, "write_model", late)
    monkeypatch.setattr(loop._Job, "evaluate", lambda self: None)  # it waits for the checkpoint
    train(config, run)
    one, other = (checkpoint_path(folder, 4) for folder in (run, whole))
    for read in (lambda folder: load_file(folder / "model.safetensors"), tensors):
        mine, others = read(one), read(other)
        assert mine.keys() == others.keys()
        assert all(torch.equal(x, others[name]) for name, x in mine.items())


def tensors(checkpoint):
    return read_tensors(checkpoint, lambda name, shape, dtype: torch.empty(shape, dtype=dtype))


def test_a_second_ctrl_c_during_writing_leaves_the_checkpoint_complete(config, whole, tmp_path, monkeypatch):
    run, write = tmp_path / "run", loop.write_model
    main = threading.main_thread().ident

    def interrupted(*arguments):
        first = signal.getsignal(signal.SIGINT)
        signal.pthread_kill(main, signal.SIGINT)
        while signal.getsignal(signal.SIGINT) == first:  # until it is noted
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)
        write(*arguments)

    def wait(job):
        """Let both signals arrive here: an interrupt while a file is opened leaves it to the garbage collector."""
        if job.saving is not None:
            threading.Event().wait(60)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_model", interrupted)
        patched.setattr(loop._Job, "evaluate", wait)  # resumed training makes up for it
        with pytest.raises(KeyboardInterrupt):
            train(config, run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    train(config, run, resume=True)
    assert_same_run(whole, run)
