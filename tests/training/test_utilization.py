"""The FLOPs of a training step match torch's counter, and the peak is that of the GPU that torch names."""

import pytest
import torch
import torch.nn.functional as F
from small_model import make_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rmkv_cli.model.cost import TRAINING_PASSES, forward_flops_per_token
from rmkv_cli.training import train
from rmkv_cli.training.loss import row_loss
from rmkv_cli.training.metrics import read_metrics
from rmkv_cli.training.utilization import device_peak, peak_flops, training_budget, training_flops_per_token


class Flops(TorchDispatchMode):
    """Counts by torch's formulas. Its own counter follows modules, and stumbles where a backward pass is in another."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        return output


def test_a_step_is_three_forward_passes_and_replay_is_one_more_of_all_but_the_head_and_the_last_segment():
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 200}
    model = make_model(segment_length=64, num_attention_heads=2, lookback=32, memory={"slots": 8}, **shape)
    ids = torch.zeros(1, 256, dtype=torch.int64)
    work = forward_flops_per_token(model.config)
    systems = 3 * 2 * 64 * 64  # a token's, 2 C D a layer; torch counts only the gradient of their matrix, twice that
    forward = sum(work.values()) - systems
    model.requires_grad_(True)

    def plain():
        return F.cross_entropy(model(ids)[0].flatten(0, 1), ids.flatten())

    def replayed():
        return row_loss(model, ids, ids, ids, model.initial_state(1))[0]

    for loss, again in ((plain, 0), (replayed, 3 / 4 * (forward - work["head"]))):
        with Flops() as counted, sdpa_kernel(SDPBackend.MATH):
            loss().backward()
        assert counted.flops / 256 == pytest.approx(TRAINING_PASSES * forward + 2 * systems + again, rel=0.01)
    assert training_flops_per_token(model.config) == 3 * sum(work.values())


def test_records_contain_flops_per_second(make_config, tmp_path):
    config = make_config(tokens=100)
    for record in read_metrics(train(config, tmp_path / "run").run / "metrics.jsonl"):
        if "loss" in record:
            forward = sum(forward_flops_per_token(config.model).values())
            assert record["flops_per_second"] == pytest.approx(3 * forward * record["tokens_per_second"])
            assert "mfu" not in record  # of a CPU no peak is known


def test_a_budget_is_the_work_of_all_tokens_at_a_share_of_the_peak(make_config):
    config = make_config(tokens=10**12)
    budget = training_budget(config)
    assert budget["flops"] == 10**12 * training_flops_per_token(config.model)
    assert budget["hours"]["A100"] == pytest.approx(budget["flops"] / 312e12 / 0.4 / 3600)


def test_the_peak_is_that_of_the_gpu_that_torch_names():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == peak_flops("NVIDIA A100-PCIE-40GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") is None  # slower than the SXM card
    assert peak_flops("NVIDIA GeForce RTX 3090 Ti") is None
    assert device_peak("cpu", "bf16") is None
