"""An unwritable folder or a disk that is too small is found before training, and nothing is left behind."""

import shutil
from pathlib import Path

import pytest

from rmkv_cli.errors import UserError
from rmkv_cli.training import train
from rmkv_cli.training.disk import checkpoint_bytes, remaining_checkpoints


@pytest.mark.parametrize("keys", [{}, {"precision": "bf16"}, {"optimizer": "muon"}], ids=["adamw", "bf16", "muon"])
def test_the_predicted_size_of_a_checkpoint_is_right(make_config, tmp_path, keys):
    config = make_config(model={"hidden_size": 96, "intermediate_size": 256}, tokens=100, **keys)
    checkpoint = train(config, tmp_path / "run").run / "latest"
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    tokenizer = (checkpoint / "tokenizer.json").stat().st_size
    assert checkpoint_bytes(config) == pytest.approx(size - tokenizer, rel=0.08)  # a kilobyte a tensor more


def test_a_resumed_run_needs_space_only_for_the_remaining_checkpoints(make_config, tmp_path):
    config = make_config(tokens=400, keep_last=5)
    assert remaining_checkpoints(config, tmp_path / "run") == 7
    kept = len(list((train(config, tmp_path / "run").run / "checkpoints").iterdir()))
    assert remaining_checkpoints(config, tmp_path / "run") == max(1, 7 - kept)


def test_too_little_disk_space_is_found_before_anything_is_written(make_config, tmp_path):
    """A model of 60 TB: its size is known without allocating it."""
    huge = {"hidden_size": 115_200, "num_attention_heads": 900, "num_hidden_layers": 240}
    config = make_config(model=huge, keep_last=2)
    free = shutil.disk_usage(tmp_path).free / 1e9
    with pytest.raises(UserError, match=r"run: 4 checkpoints need [\d,]+\.\d GB, but ([\d,.]+) GB are free") as error:
        train(config, tmp_path / "runs" / "run")
    reported = float(str(error.value).split("but ")[1].split(" GB")[0].replace(",", ""))
    assert reported == pytest.approx(free, rel=0.2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="wants a folder in which not even root can write")
def test_an_unwritable_folder_is_found_before_training(make_config):
    with pytest.raises(UserError, match=r"/proc: cannot be written \(.+\); choose another --run"):
        train(make_config(), Path("/proc/run"))
