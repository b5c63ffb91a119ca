"""PEFT is the reference for adapters: it loads rmkv's on the exported folder, and rmkv loads PEFT's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_model import with_adapter
from small_run import save_small_model

from rmkv_cli.config import MemoryConfig
from rmkv_cli.huggingface import export_folder
from rmkv_cli.model import RMKV
from rmkv_cli.model.adapter_file import load_adapter, save_adapter

CELLS = ("gru", "lstm", "minimal")
SCRIPT = Path(__file__).parents[1] / "peft_alone.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ids():
    return torch.randint(7, 280, (2, 45), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def place(ids, tmp_path_factory):
    """For each cell a model folder, our adapter and PEFT's, and the logits that PEFT computes with either."""
    place = tmp_path_factory.mktemp("peft")
    torch.save(ids, place / "ids.pt")
    for cell in CELLS:
        (place / cell / "model").mkdir(parents=True)
        save_small_model(place / cell / "model", memory=MemoryConfig(slots=2, cell=cell))
        export_folder(place / cell / "model", place / cell / "exported")
        (place / cell / "ours").mkdir()
        save_adapter(adapted(place / cell), place / cell / "ours", place / cell / "model", "0" * 64)
    command = [sys.executable, "-W", "ignore::FutureWarning", SCRIPT, place, *CELLS]
    here = {"PATH": os.environ["PATH"], "HF_HOME": str(place / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), env=here, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr
    return place


def adapted(place):
    return with_adapter(RMKV.from_pretrained(place / "model"), rank=4, alpha=6.0)


@pytest.mark.parametrize("cell", CELLS)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(place, ids, cell):
    found = torch.load(place / cell / "logits.pt")
    assert (found["ours"] - found["base"]).abs().max() > 0.1
    torch.testing.assert_close(adapted(place / cell)(ids)[0], found["ours"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_an_adapter_that_peft_trained_gives_the_same_logits_here(place, ids, cell):
    found = torch.load(place / cell / "logits.pt")
    assert (found["theirs"] - found["base"]).abs().max() > 0.1
    model = RMKV.from_pretrained(place / cell / "model")
    load_adapter(model, place / cell / "theirs")
    torch.testing.assert_close(model(ids)[0], found["theirs"], atol=1e-5, rtol=1e-5)


def test_both_adapters_have_the_same_files(place):
    for cell in CELLS:
        names = [load_file(place / cell / whose / "adapter_model.safetensors").keys() for whose in ("ours", "theirs")]
        assert names[0] == names[1]
